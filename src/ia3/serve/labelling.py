"""The routes of projects: a table becomes labelled rows, and these an adapter."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse

from ia3.errors import InputError
from ia3.serve.limits import Problem
from ia3.serve.projects import described, rows_of
from ia3.serve.schemas import LabelBody, LabelsBody, ProjectBody, TableBody, read_body
from ia3.serve.server import Server

if TYPE_CHECKING:
    from fastapi import FastAPI


def add_routes(app: FastAPI, server: Server) -> None:
    """Tables and projects."""
    projects = server.projects

    @app.post("/v1/tables", tags=["projects"])
    async def table(request: Request) -> Any:
        """The columns of a table, each with examples, and its different values if they may be labels. Nothing is kept."""
        body = await read_body(request, TableBody)
        return await asyncio.to_thread(lambda: described(rows_of(body.table)))

    @app.get("/v1/projects", tags=["projects"])
    async def names() -> Any:
        """The names of all projects; and `refused`, why no adapters are trained here, or null."""
        return {"projects": await projects.names(), "refused": projects.refused}

    @app.post("/v1/projects", tags=["projects"], status_code=201)
    async def create(request: Request) -> Any:
        """Make a project of a table. Its texts are read in the background, so that rows can be suggested."""
        server.require_started()
        body = await read_body(request, ProjectBody)
        made = await projects.create(body.name, body.table, body.column, body.labels, body.label_column)
        return JSONResponse(made.to_dict(), 201)

    @app.get("/v1/projects/{name}", tags=["projects"])
    async def project(name: str) -> Any:
        """A project: its labels with the number of their rows, what is under way, and how good its adapter is."""
        return (await projects.get(name)).to_dict()

    @app.delete("/v1/projects/{name}", tags=["projects"])
    async def remove(name: str) -> Any:
        """Remove a project with its labels. Its adapter is served on."""
        await projects.remove(name)
        return {"name": name, "deleted": True}

    @app.put("/v1/projects/{name}/labels", tags=["projects"])
    async def name_labels(request: Request, name: str) -> Any:
        """Add labels, or take away some that no row has."""
        body = await read_body(request, LabelsBody)
        found = await projects.get(name)
        await found.name_labels(body.labels)
        return found.to_dict()

    @app.get("/v1/projects/{name}/suggestions", tags=["projects"])
    async def suggestions(request: Request, name: str, count: Annotated[int, Query(ge=1, le=100)] = 10) -> Any:
        """The rows whose labels would teach most, the best first; none while texts are read, or if all rows have been labelled
        or skipped."""
        found = await projects.get(name)
        rows = await server.settle(request, projects.suggest(found, count))
        return {"rows": rows, "job": found.to_dict()["job"]}

    @app.put("/v1/projects/{name}/rows/{row}", tags=["projects"])
    async def give(request: Request, name: str, row: int) -> Any:
        """Label a row, or skip it."""
        body = await read_body(request, LabelBody)
        found = await projects.get(name)
        await found.give(row, body.label)
        return found.to_dict()

    @app.delete("/v1/projects/{name}/rows/{row}", tags=["projects"])
    async def take_back(name: str, row: int) -> Any:
        """Forget a row's label, or that it was skipped."""
        found = await projects.get(name)
        await found.take_back(row)
        return found.to_dict()

    @app.post("/v1/projects/{name}/training", tags=["projects"], status_code=202)
    async def train(name: str) -> Any:
        """Train an adapter on the labelled rows, in the background; at the end it is served by the project's name. One is trained
        at a time; others wait."""
        server.require_started()
        found = await projects.get(name)
        projects.train(found)
        return JSONResponse(found.to_dict(), 202)

    @app.delete("/v1/projects/{name}/training", tags=["projects"])
    async def cancel(name: str) -> Any:
        """Cancel the training; the adapter stays as it was."""
        found = await projects.get(name)
        if not found.works("train"):
            raise InputError("Expected a project whose adapter is being trained, found that nothing is under way.")
        await found.cancel("train")
        return found.to_dict()

    @app.get("/v1/projects/{name}/labels.csv", tags=["projects"])
    async def labels_file(name: str) -> Response:
        """The labelled rows with all their columns, as `ia3 train --data` reads them."""
        found = await projects.get(name)
        text = await asyncio.to_thread(found.labels_file)
        return Response(text, media_type="text/csv; charset=utf-8", headers=_attached(f"{name}-labels.csv"))

    @app.get("/v1/projects/{name}/adapter.zip", tags=["projects"])
    async def adapter_file(name: str) -> Response:
        """The trained adapter's folder."""
        found = await projects.get(name)
        if not await asyncio.to_thread(found.zip.is_file):
            raise Problem(404, f"The adapter of project {name!r} is not trained yet.", "not_trained")
        return FileResponse(found.zip, media_type="application/zip", headers=_attached(f"{name}.zip"))


def _attached(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}
