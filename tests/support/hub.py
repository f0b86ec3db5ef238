"""A hub in a thread: what huggingface_hub asks of the real one to create repositories, commit to them and download from them."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants as constants
import pytest

from ia3.files.hub import _reach_hub

TOKEN = "hf_of_the_tests"

Files = dict[str, bytes]


@dataclass
class Repository:
    """A repository: commit → files, and branch → commit."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: Files, message: str) -> str:
        self.messages.append(message)
        sha = hashlib.sha1(repr((sorted(files.items()), self.messages)).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def sha(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None

    @property
    def files(self) -> Files:
        return self.commits[self.branches["main"]]


class Hub:
    """The hub: repositories by "owner/name", and what was asked ("GET /…") in order."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: Files = {}  # by the hash of their content
        self.asked: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; then nobody answers at the address."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def running(monkeypatch: pytest.MonkeyPatch, cache) -> Iterator[Hub]:
    """In a `with` block, huggingface_hub in this process uses a new hub, with a login, and caches downloads in a folder."""
    hub = Hub()
    at(monkeypatch, hub.url, cache)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        hub.close()
        _reach_hub.cache_clear()


def at(monkeypatch: pytest.MonkeyPatch, url: str, cache) -> None:
    """huggingface_hub in this process uses the hub at an address, and caches downloads in a folder."""
    _reach_hub.cache_clear()
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    settings = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
    for name, value in {**settings, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)


def environment(hub: Hub, home) -> dict[str, str]:
    """The environment in which another process uses the hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def _answer(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._path = unquote(urlsplit(self.path).path)
        self._known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        for command, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, self._path)
            if match and self.command in command:
                handle(self, **match.groupdict())
                return
        self._fail(404, "NoSuchRoute")

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _send(self, body: bytes | object, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _fail(self, status: int, code: str) -> None:
        self._send({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def _repository(self, name: str, writes: bool = False) -> Repository | None:
        """The repository; None if the client was told that there is none for it, or that it may not write."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._known):
            self._fail(404 if self._known else 401, "RepoNotFound")
        elif writes and not self._known:
            self._fail(401, "Unauthorized")
        else:
            return found
        return None

    def _sha(self, repository: Repository, revision: str) -> str | None:
        sha = repository.sha(revision)
        if sha is None:
            self._fail(404, "RevisionNotFound")
        return sha

    # What the routes answer.

    def home(self) -> None:
        self._send({})

    def valid(self) -> None:
        good = "base_model: /" not in json.loads(self._body)["content"]
        self._send({} if good else {"errors": [{"message": '"base_model" is not valid'}]}, 200 if good else 400)

    def create(self) -> None:
        fields = json.loads(self._body)
        name = f"{fields['organization']}/{fields['name']}"
        if not self._known:
            self._fail(401, "Unauthorized")
            return
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(name, Repository(fields.get("visibility") == "private"))
        self._send({"url": f"{self.hub.url}/{name}", "error": "exists"}, status)

    def info(self, name: str, revision: str | None = None) -> None:
        found = self._repository(name)
        sha = found and self._sha(found, revision or "main")
        if found and sha:
            siblings = [{"rfilename": path} for path in found.commits[sha]]
            self._send({"id": name, "sha": sha, "private": found.private, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        found = self._repository(name)
        sha = found and self._sha(found, revision)
        if found and sha:
            files = found.commits[sha].items()
            self._send([{"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in files])

    def branch(self, name: str, branch: str) -> None:
        found = self._repository(name, writes=True)
        if found and branch in found.branches:
            self._fail(409, "BranchExists")
        elif found:
            found.branches[branch] = found.branches["main"]
            self._send({})

    def preupload(self, name: str, revision: str) -> None:
        found = self._repository(name, writes=True)
        if found and self._sha(found, revision):
            files = json.loads(self._body)["files"]
            large = {True: "lfs", False: "regular"}
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": large[one["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in files
            ]
            self._send({"files": modes})

    def batch(self, name: str) -> None:
        if self._repository(name, writes=True):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/large/{one['oid']}"}}}
                for one in json.loads(self._body)["objects"]
            ]
            self._send({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        assert hashlib.sha256(self._body).hexdigest() == oid
        self.hub.large[oid] = self._body
        self._send({})

    def commit(self, name: str, revision: str) -> None:
        found = self._repository(name, writes=True)
        sha = found and self._sha(found, revision)
        if not found or not sha:
            return
        header, *changes = (json.loads(line) for line in self._body.splitlines())
        files = dict(found.commits[sha])
        for change in changes:
            its = change["value"]
            if change["key"] == "deletedFile":
                del files[its["path"]]
            else:
                large = change["key"] == "lfsFile"
                files[its["path"]] = self.hub.large[its["oid"]] if large else base64.b64decode(its["content"])
        request = "create_pr" in self.path
        done = found.commit("refs/pr/1" if request else revision, files, header["value"]["summary"])
        url = f"{self.hub.url}/{name}"
        answer = {"commitUrl": f"{url}/commit/{done}", "commitOid": done}
        self._send({**answer, **({"pullRequestUrl": f"{url}/discussions/1"} if request else {})})

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self._repository(name)
        sha = found and self._sha(found, revision)
        if found and sha and path not in found.commits[sha]:
            self._send({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        elif found and sha:
            data = found.commits[sha][path]
            self._send(data, ETag=f'"{_oid(data)}"', X_Repo_Commit=sha, X_Linked_Size=str(len(data)))


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


_NAME = r"(?P<name>[\w.-]+/[\w.-]+?)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
_ROUTES = [
    (("GET", "HEAD"), "/?", _Handler.home),
    (("POST",), "/api/validate-yaml", _Handler.valid),
    (("POST",), "/api/repos/create", _Handler.create),
    (("GET",), f"/api/models/{_NAME}(/revision/{_REVISION})?", _Handler.info),
    (("GET",), f"/api/models/{_NAME}/tree/{_REVISION}", _Handler.tree),
    (("POST",), rf"/api/models/{_NAME}/branch/(?P<branch>.+)", _Handler.branch),
    (("POST",), f"/api/models/{_NAME}/preupload/{_REVISION}", _Handler.preupload),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/large/(?P<oid>\w+)", _Handler.upload),
    (("POST",), f"/api/models/{_NAME}/commit/{_REVISION}", _Handler.commit),
    (("GET", "HEAD"), f"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
