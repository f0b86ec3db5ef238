"""Checks of every request before its route: `Gate`; and timeouts of idle connections."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import sys
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ia3.serve.limits import Limits, Problem, left
from ia3.serve.metrics import Metrics

logger = logging.getLogger(__name__)

# Routes that need no token: nothing about adapters, and no work.
_OPEN = {"/", "/page.js", "/health", "/ready", "/docs", "/openapi.json"}
_OPEN_BELOW = "/static-offline-docs/"

# The path of uploads, whose bodies may be larger.
UPLOADS = "/v1/adapters"

# Headers that must not be repeated, because they decide something.
_SINGLE = {
    b"authorization", b"content-encoding", b"content-length", b"content-type", b"expect", b"host", b"origin",
    b"transfer-encoding",
}  # fmt: skip

# Methods in `/metrics`. All others count as one, because clients can invent any number.
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}

# Seconds after the deadline until a client that does not read is disconnected. The response may be about the deadline.
_TAKING_SECONDS = 2.0

# Bytes of a too large body to read and discard, so that the client gets the error.
_DISCARDED_BYTES, _DISCARDED_SECONDS = 8 << 20, 2.0

LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Gate:
    """An ASGI application around another one: token, origin, size and time of the body, metrics, logs, errors.

    A request's scope gets `deadline` (a time of `time.monotonic`), `note` (values for the log) and `identity`. Its
    `state` has `abort` of `impatient`.

    Args:
        app: the application.
        limits: the limits of bodies and time.
        metrics: counts requests.
        token: the token that clients must send; None: none.
        hosts: the server's host names if there is no token. So a web page of another site cannot reach it through a
            host name that points here.
    """

    def __init__(self, app: Any, limits: Limits, metrics: Metrics, token: str | None, hosts: set[str]) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._token = None if token is None else token.encode()
        self._hosts = hosts | LOOPBACK

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self._app(scope, receive, send)
            return
        started = time.monotonic()
        scope["deadline"] = started + self._limits.deadline
        note: dict[str, Any] = {}
        scope["note"] = note
        scope["identity"] = identity = uuid.uuid4().hex[:16]
        status, ended = 0, False

        async def answer(message: Any) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", identity.encode()), *_SAFETY]
            await send(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body")

        def cut_off() -> None:
            if status:  # otherwise there is nothing to read yet
                note["error"] = "the client did not take its answer in time"
                scope["state"]["abort"]()

        cutting = asyncio.get_running_loop().call_later(self._limits.deadline + _TAKING_SECONDS, cut_off)
        try:
            self._check(scope)
            await self._app(scope, self._reading(scope, receive), answer)
        except Problem as problem:
            await respond(problem, answer)
        except Exception as error:
            note |= described(error)
            if not status:
                await respond(unexpected(identity), answer)
            elif not ended:
                raise _Broken from None
        finally:
            cutting.cancel()
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if route != "other" and scope["method"] in _METHODS else "other"
            self._metrics.request(method, route, status, seconds)
            quiet = route in ("/health", "/ready", "/metrics") and status < 400
            logger.log(
                logging.ERROR if "frames" in note else logging.DEBUG if quiet else logging.INFO,
                "request",
                extra={
                    "fields": {
                        "id": identity,
                        "method": scope["method"],
                        "route": route,
                        "status": status,
                        "ms": round(1000 * seconds, 1),
                        **note,
                    }
                },
            )

    def _check(self, scope: Any) -> None:
        counts = Counter(name for name, _ in scope["headers"])
        twice = sorted(name.decode("latin-1") for name in _SINGLE if counts[name] > 1)
        if twice:  # later code may read another value than the one checked here
            raise Problem(
                400, f"Expected one header {twice[0]!r}, found {counts[twice[0].encode()]}.", "duplicate_header"
            )
        headers = dict(scope["headers"])
        path = scope["path"]
        if self._token is None:
            origin = headers.get(b"origin", b"").decode("latin-1")
            try:
                host, its = urlsplit("//" + headers.get(b"host", b"localhost").decode("latin-1")), urlsplit(origin)
            except ValueError:  # brackets without a valid address
                raise Problem(400, "Expected Host and Origin as HTTP has them.") from None
            if host.hostname not in self._hosts or (origin and its.netloc != host.netloc):
                raise Problem(
                    403, "Without a token, this server answers its own host and its own page only.", "forbidden"
                )
        elif path not in _OPEN and not path.startswith(_OPEN_BELOW):
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            # Always compare, and in constant time.
            right = hmac.compare_digest(given.strip(), self._token)
            if kind.lower() != b"bearer" or not right:
                raise Problem(
                    401, "Expected 'Authorization: Bearer TOKEN' with this server's token.", "invalid_api_key",
                    {"WWW-Authenticate": "Bearer"},
                )  # fmt: skip

    def _reading(self, scope: Any, receive: Callable) -> Callable:
        """`receive` with limits: raises if the body is too large or too late."""
        headers = dict(scope["headers"])
        upload = scope["path"] == UPLOADS and headers.get(b"content-type", b"").lower().startswith(b"multipart/")
        most = self._limits.upload_bytes + (1 << 16) if upload else self._limits.body_bytes
        declared = headers.get(b"content-length", b"0")
        read, ended = 0, False

        async def receiving() -> Any:
            nonlocal read, ended
            if ended:
                return await receive()  # the client disconnected
            try:
                if declared.isdigit() and int(declared[:20]) > most:
                    await _discard(receive, 0)
                    raise _too_large(most)
                message = await asyncio.wait_for(receive(), left(scope["deadline"]))
            except asyncio.TimeoutError:
                raise Problem(408, "The body did not come in time.", "timeout", {"Connection": "close"}) from None
            read += len(message.get("body", b""))
            if read > most:
                if message.get("more_body"):
                    await _discard(receive, read)
                raise _too_large(most)
            ended = not message.get("more_body", False)
            return message

        return receiving


_SAFETY = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


def described(error: BaseException) -> dict[str, Any]:
    """An unexpected error for the log: its type and frames, without its message, which may contain a client's text."""
    frames = traceback.extract_tb(error.__traceback__)[-12:]
    return {"error": type(error).__name__, "frames": [f"{each.filename}:{each.lineno} {each.name}" for each in frames]}


def unexpected(identity: str) -> Problem:
    """The response for an internal error."""
    return Problem(500, f"Something went wrong here; see the server's log for {identity}.")


class _Broken(Exception):
    """A started response cannot be completed; the connection is closed."""


def _too_large(most: int) -> Problem:
    return Problem(413, f"Expected a body of at most {most} bytes.", "too_large", {"Connection": "close"})


async def _discard(receive: Callable, read: int) -> None:
    async def all_of_it() -> None:
        total = read
        while total < _DISCARDED_BYTES:
            message = await receive()
            total += len(message.get("body", b""))
            if not message.get("more_body"):
                return

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(all_of_it(), _DISCARDED_SECONDS)


async def respond(problem: Problem, send: Callable) -> None:
    """Send a problem as the response."""
    body = json.dumps(problem.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **problem.headers}
    await send(
        {
            "type": "http.response.start",
            "status": problem.status,
            "headers": [(key.lower().encode(), value.encode()) for key, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})


def impatient(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol with a timeout in seconds for the head of the next request on a connection.

    The `state` of a request's scope has `abort`, which closes the connection even if data remains to be sent.
    """

    class Impatient(H11Protocol):
        def connection_made(self, transport: Any) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.app_state = {**self.app_state, "abort": transport.abort}
            self._timer = self.loop.call_later(seconds, self._look, None)

        def _look(self, idle: Any) -> None:
            waiting = self.cycle is None or self.cycle.response_complete
            if waiting and self.cycle is idle:  # idle since the last check
                self.transport.close()
            else:
                self._timer = self.loop.call_later(seconds, self._look, self.cycle if waiting else self)

        def send_400_response(self, msg: str) -> None:
            """Answer a request that is not HTTP, or repeats a header for the body's length."""
            error = sys.exc_info()[1]
            problem = Problem(400, f"Expected a request as HTTP has it: {error or msg}"[:200], "invalid")
            body = json.dumps(problem.body()).encode()
            head = [(b"content-type", b"application/json"), (b"connection", b"close")]
            for event in (h11.Response(status_code=400, headers=head), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

    return Impatient
