"""The server's process: socket, signals, logs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import uvicorn

from ia3.errors import InputError, reason
from ia3.serve.app import create_app
from ia3.serve.gate import described, impatient
from ia3.serve.server import Server

logger = logging.getLogger(__name__)

# Seconds until an idle connection is closed.
_IDLE_SECONDS = 30.0

# Seconds between closing the port and closing idle connections, so that requests in transit still arrive.
_GRACE_SECONDS = 0.3

# Seconds to read requests that have arrived by then. A client that keeps sending must not delay the end.
_READING_SECONDS = 10.0


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1]:
            line |= described(record.exc_info[1])
        return json.dumps(line, ensure_ascii=False, default=str)


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, server: Server, drain: float) -> None:
        super().__init__(config)
        self._server, self._drain = server, drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the proxy turn elsewhere; stop listening after all received data is read; then finish the requests."""
        self._server.closing = True
        # A proxy must not send its next request on a connection that will be closed.
        self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
        end = time.monotonic() + self._drain
        while time.monotonic() < end and not (self.force_exit or self._server.failed):
            await asyncio.sleep(0.1)
        await self._read_all([each for server in self.servers for each in server.sockets])
        for server in self.servers:
            server.close()
        await asyncio.sleep(_GRACE_SECONDS)
        await self._read_all([])
        await super().shutdown(sockets)

    async def _read_all(self, listening: Iterable[Any]) -> None:
        """Wait until no connection waits to be accepted, and no idle connection has unread bytes.

        Otherwise, on a busy machine, uvicorn would close connections that look idle.
        """
        end, quiet = time.monotonic() + _READING_SECONDS, 0
        while quiet < 3 and time.monotonic() < end:  # a connection appears in `connections` with a delay
            poll = select.poll()
            for each in listening:
                poll.register(each.fileno(), select.POLLIN)
            for connection in self.server_state.connections:
                cycle: Any = connection.cycle  # type: ignore[union-attr]
                handle = connection.transport.get_extra_info("socket").fileno()  # type: ignore[union-attr]
                if handle >= 0 and (cycle is None or cycle.response_complete):
                    poll.register(handle, select.POLLIN)
            quiet = 0 if poll.poll(0) else quiet + 1
            await asyncio.sleep(0.005)


def run(server: Server, host: str, port: int, drain: float = 0) -> None:
    """Serve until a signal arrives; then finish accepted requests.

    Args:
        server: serves. It reads its adapters again on SIGHUP.
        host, port: the address to listen on; port 0: any free one.
        drain: seconds from the signal to the closing of the port, in which `/ready` says no and requests are still
            accepted, so that a proxy has time to send them elsewhere.

    Raises:
        InputError: the address is not available, the model cannot be loaded, or its engine has ended.
    """
    listening = _listen(host, port)
    _log_to_stderr()
    _allow_connections()
    failures: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failures.append(error)
        running.should_exit = True

    server.on_failure = fail
    app = create_app(server)
    config = uvicorn.Config(
        app,
        http=impatient(_IDLE_SECONDS),
        ws="none",
        loop="asyncio",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(server.limits.deadline) + 5,
    )
    running = _Uvicorn(config, server, drain)

    async def serve() -> None:
        if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hang_up)
        await running.serve([listening])

    def hang_up() -> None:
        task = asyncio.ensure_future(server.reload())
        tasks.add(task)  # the loop holds tasks only weakly
        task.add_done_callback(tasks.discard)

    tasks: set[asyncio.Future] = set()
    address = f"http://{'[' + host + ']' if ':' in host else host}:{listening.getsockname()[1]}"
    logger.info("listening", extra={"fields": {"address": address, "model": server.engine.name}})
    with _exiting_cleanly():
        asyncio.run(serve())
    if failures:
        error = failures[0]
        if isinstance(error, InputError):
            raise error
        what = "The engine has ended by an error" if server.started else "Cannot load the model"
        raise InputError(f"{what}: {reason(error)}") from error


@contextlib.contextmanager
def _exiting_cleanly():
    """Exit with success after SIGTERM, although uvicorn raises the signal again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
        listening.setblocking(False)
    except OSError as error:
        raise InputError(
            f"Cannot listen at {host}:{port}: {reason(error)}", "choose another host, or", argument="port"
        ) from error
    return listening


def _allow_connections() -> None:
    """Raise the limit of open files to the system's maximum, because each connection needs one."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        if soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("ia3", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(True)
