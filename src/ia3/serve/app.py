"""The application and its routes, except those of `openai` and `labelling`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi_offline import FastAPIOffline
from pydantic.json_schema import models_json_schema
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ia3 import __version__
from ia3.errors import InputError, excerpt
from ia3.serve import labelling, openai
from ia3.serve.adapter import Adapter
from ia3.serve.gate import Gate
from ia3.serve.limits import CLIENT_GONE, Problem
from ia3.serve.schemas import (
    Body,
    ChatBody,
    ClassifyBody,
    CompletionBody,
    FolderBody,
    LabelBody,
    LabelsBody,
    ProjectBody,
    TableBody,
    read_body,
)
from ia3.serve.server import Server, told

if TYPE_CHECKING:
    from fastapi import FastAPI

_BODIES: dict[tuple[str, str], type[Body]] = {
    ("post", "/v1/classify"): ClassifyBody,
    ("post", "/v1/completions"): CompletionBody,
    ("post", "/v1/chat/completions"): ChatBody,
    ("post", "/v1/adapters"): FolderBody,
    ("post", "/v1/tables"): TableBody,
    ("post", "/v1/projects"): ProjectBody,
    ("put", "/v1/projects/{name}/labels"): LabelsBody,
    ("put", "/v1/projects/{name}/rows/{row}"): LabelBody,
}

_PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def create_app(server: Server, in_background: bool = True) -> Any:
    """The ASGI application of a server.

    Args:
        server: does the work.
        in_background: load the model while `/health` and `/ready` are answered; False: before anything is answered.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async def start() -> None:
            try:
                await server.start()
            except Exception as error:
                server.fail(error)

        starting = asyncio.ensure_future(start() if in_background else server.start())
        try:
            if not in_background:
                await starting
            yield
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await server.stop()

    app = FastAPIOffline(
        title="ia3 serve",
        version=__version__,
        description='Any number of (IA)³ adapters of one model. Errors have OpenAI\'s form: {"error": {…}}.',
        lifespan=lifespan,
        redoc_url=None,
    )
    _add_pages(app, server)
    _add_adapters(app, server)
    _add_classification(app, server)
    openai.add_routes(app, server)
    labelling.add_routes(app, server)
    _describe(app)

    async def tell(request: Request, error: Exception) -> Response:
        problem = told(server, request.scope, error)
        return JSONResponse(problem.body(), problem.status, problem.headers)

    async def misdirected(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # of the path or the query; `read_body` checks bodies
        found = "; ".join(f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in error.errors())
        return await tell(request, Problem(422, f"Cannot use the address: {excerpt(found)}.", "invalid"))

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(RequestValidationError, misdirected)
    for kind in (Problem, InputError, HTTPException, Exception):
        app.add_exception_handler(kind, tell)
    return Gate(app, server.limits, server.metrics, server.token, server.hosts)


def _add_pages(app: FastAPI, server: Server) -> None:
    page, script = (
        resources.files("ia3.serve").joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.js")
    )

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    @app.get("/page.js", include_in_schema=False)
    async def page_script() -> Response:
        return Response(script, media_type="text/javascript")

    @app.get("/health", tags=["operation"])
    async def health() -> Any:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/ready", tags=["operation"])
    async def ready() -> Any:
        """200 if requests are answered; 503 while the model loads or the server shuts down."""
        if not server.ready:
            raise Problem(503, "Not ready.", "not_ready", {"Retry-After": "2"})
        return {"status": "ready"}

    @app.get("/metrics", tags=["operation"])
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", tags=["models"])
    async def models() -> Any:
        """The base model and all adapters, in OpenAI's format for models."""
        server.require_started()
        names = [server.engine.name, *server.store.names]
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": "ia3"} for name in names],
        }

    @app.get("/v1/models/{name:path}", tags=["models"])
    async def model(name: str) -> Any:
        """The base model or an adapter."""
        server.require_started()
        server.adapter(name)
        return {"id": name, "object": "model", "created": 0, "owned_by": "ia3"}


def _described(adapter: Adapter) -> dict[str, Any]:
    """The description of an adapter for a client. Blocks."""
    found = adapter.settings()
    task = found.task
    return {
        "name": adapter.name,
        "columns": None if task is None else task.columns,
        "labels": None if task is None else task.labels,
        "description": None if task is None else task.description,
        "example": None if task is None else task.example,
        "calibrated": found.calibrated,
    }


def _add_adapters(app: FastAPI, server: Server) -> None:
    @app.get("/v1/adapters", tags=["adapters"])
    async def adapters() -> Any:
        """The names of all adapters."""
        server.require_started()
        return {"base": server.engine.name, "adapters": [{"name": name} for name in server.store.names]}

    @app.get("/v1/adapters/{name:path}", tags=["adapters"])
    async def adapter(name: str) -> Any:
        """An adapter's columns and labels."""
        server.require_started()
        return await asyncio.to_thread(_described, server.store.get(name))

    @app.post("/v1/adapters", tags=["adapters"], status_code=201)
    async def admit(request: Request) -> Any:
        """Upload an adapter's files (multipart/form-data: `name`, `files`), or name a folder below the adapters' root
        (application/json). It replaces a served adapter of that name; running requests end with the old one."""
        server.require_started()
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            body = await read_body(request, FolderBody)
            known = (body.folder if body.name is None else body.name) in server.store
            found = await server.store.admit(body.folder, body.name)
            return JSONResponse(await asyncio.to_thread(_described, found), 200 if known else 201)
        with server.uploads.room(1):
            try:
                async with request.form(max_files=8, max_fields=8) as form:
                    found, new = await _upload(server, form)
            except HTTPException as error:  # from the form's parser
                raise InputError(f"Expected multipart/form-data: {error.detail}") from error
        return JSONResponse(await asyncio.to_thread(_described, found), 201 if new else 200)

    @app.delete("/v1/adapters/{name:path}", tags=["adapters"])
    async def remove(name: str) -> Any:
        """Stop serving an adapter. Its files are deleted if they were uploaded."""
        server.require_started()
        await server.store.remove(name)
        return {"name": name, "deleted": True}


async def _upload(server: Server, form: FormData) -> tuple[Adapter, bool]:
    name = form.get("name")
    files = [part for part in form.getlist("files") if isinstance(part, UploadFile)]
    if not isinstance(name, str) or set(form) - {"name", "files"}:
        raise InputError("Expected a form with the fields 'name' and 'files'.")
    named = {str(part.filename): _writer(part) for part in files}
    if len(named) != len(files):
        raise InputError("Expected files with different names.")
    return await server.store.upload(name, named)


def _writer(part: UploadFile) -> Callable[[Path], Awaitable[None]]:
    async def write(path: Path) -> None:
        with open(path, "wb") as file:
            while data := await part.read(1 << 20):
                file.write(data)

    return write


def _add_classification(app: FastAPI, server: Server) -> None:
    @app.post("/v1/classify", tags=["answers"])
    async def classify(request: Request) -> Any:
        """The label and all labels' probabilities, for each text or row, from one adapter or from each of several."""
        server.require_started()
        body = await read_body(request, ClassifyBody)
        note = request.scope["note"]
        note |= {"texts": len(body.items), **({} if body.adapter is None else {"adapter": body.adapter[:100]})}
        if server.log_texts:
            note["content"] = body.items
        if len(body.items) > server.limits.texts:
            raise Problem(422, f"Expected at most {server.limits.texts} texts, found {len(body.items)}.", "too_many")
        adapters = server.asked(body)
        if body.adapters is not None:
            note["adapters"] = len(adapters)
        with contextlib.ExitStack() as held:
            held.enter_context(server.queue.room(len(body.items) * len(adapters)))
            for adapter in adapters:
                held.enter_context(server.store.using(adapter))
            return JSONResponse(await server.settle(request, server.classify(body, adapters)))


def _describe(app: FastAPI) -> None:
    """Add the request bodies, which FastAPI does not parse, to the OpenAPI document."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = made()
            _, definitions = models_json_schema(
                [(kind, "validation") for kind in _BODIES.values()], ref_template="#/components/schemas/{model}"
            )
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"token": []}]
            for (method, path), kind in _BODIES.items():
                reference = {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}
                schema["paths"][path][method]["requestBody"] = {
                    "required": True,
                    "content": {"application/json": reference},
                }
            form = {
                "type": "object",
                "required": ["name", "files"],
                "properties": {
                    "name": {"type": "string"},
                    "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                },
            }
            schema["paths"]["/v1/adapters"]["post"]["requestBody"]["content"]["multipart/form-data"] = {"schema": form}
        return app.openapi_schema or schema

    app.openapi = openapi  # type: ignore[method-assign]
