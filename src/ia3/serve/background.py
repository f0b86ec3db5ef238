"""Long work beside the answers, one job at a time: `Background`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from asyncio.subprocess import PIPE
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ia3.errors import InputError, reason

logger = logging.getLogger(__name__)

# Bytes of a line of the job's process.
_LONGEST_LINE = 1 << 20

# The end of what the process writes for people, for the log: bytes, and lines.
_KEPT, _LOGGED = 1 << 12, 20

# Starts `job`. Modules in the working directory, which `-c` and `-m` put first, are not for it: think of a `random.py`.
COMMAND = (
    sys.executable,
    "-c",
    "import sys; sys.path = [path for path in sys.path if path]; from ia3.serve.job import main; main()",
)


class Cancelled(Exception):
    """The job was cancelled."""


@dataclass(eq=False)
class Job:
    """Work that waits or runs.

    Attributes:
        kind: "read" or "train" (see `job`).
        stage: what it does now, for people.
        done, total: rows or steps of the stage; a total of 0: they are not counted.
        note: beside the count.
        cancelled: somebody has cancelled it.
    """

    kind: str
    stage: str = "Waiting for its turn …"
    done: int = 0
    total: int = 0
    note: str = ""
    cancelled: bool = False
    _turn: asyncio.Future[Any] | None = field(default=None, repr=False)
    _process: asyncio.subprocess.Process | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The job for clients."""
        return {name: getattr(self, name) for name in ("kind", "stage", "done", "total", "note")}

    def cancel(self) -> None:
        """End it. Its result, if it has one already, is kept."""
        self.cancelled = True
        if self._turn is not None:
            self._turn.cancel()
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


class Background:
    """Runs jobs in a process of their own, one after the other. Used on the event loop.

    Args:
        command: starts the process, which reads and writes what `job` does.
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = command
        self._one = asyncio.Lock()

    async def run(self, job: Job, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Do a job, when those before it are done.

        Args:
            job: shows the progress.
            arguments: of its function in `job`.

        Returns:
            Its result.

        Raises:
            InputError: it has failed.
            Cancelled: it was cancelled.
        """
        job._turn = asyncio.ensure_future(self._one.acquire())
        try:
            await job._turn
        except asyncio.CancelledError:
            if job.cancelled:
                raise Cancelled from None
            raise
        try:
            return await self._run(job, arguments)
        finally:
            self._one.release()

    async def _run(self, job: Job, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if job.cancelled:
            raise Cancelled
        job.stage = "Starting …"
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                limit=_LONGEST_LINE,
                start_new_session=True,  # Ctrl-C ends the server, which ends this process
            )
        except OSError as error:
            raise InputError(f"Cannot start a process: {reason(error)}; try again.") from error
        job._process = process
        written = bytearray()
        reading = asyncio.ensure_future(_keep_end(process.stderr, written))
        try:
            if job.cancelled:  # while it started
                raise Cancelled
            result = await self._followed(job, process, json.dumps({"kind": job.kind, **arguments}))
            if result is not None:
                return result
            code = await process.wait()
            if job.cancelled:
                raise Cancelled
            await asyncio.wait({reading}, timeout=1)  # a process that it started may keep it open
            lines = written.decode(errors="replace").splitlines()[-_LOGGED:]
            logger.error("a job has failed", extra={"fields": {"kind": job.kind, "code": code, "lines": lines}})
            why = f"signal {-code}, perhaps because memory is full" if code < 0 else f"exit code {code}"
            raise InputError(f"Expected a result, found that the process has ended ({why}); try again.")
        finally:
            reading.cancel()
            job._process = None
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def _followed(self, job: Job, process: asyncio.subprocess.Process, line: str) -> dict[str, Any] | None:
        """The result; None if the process ends without one."""
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(ConnectionError):  # it was killed
            process.stdin.write(line.encode() + b"\n")
            await process.stdin.drain()
        async for data in process.stdout:
            told = json.loads(data)
            if "result" in told:
                return told["result"]
            if "problem" in told:
                if "error" in told:
                    fields = {key: told[key] for key in ("error", "frames")}
                    logger.error("a job has failed", extra={"fields": {"kind": job.kind, **fields}})
                raise InputError(told["problem"])
            job.stage, job.done, job.total, job.note = (told[key] for key in ("stage", "done", "total", "note"))
        return None


async def _keep_end(stream: asyncio.StreamReader | None, end: bytearray) -> None:
    """Read a stream, so that its writer does not wait, and keep its last bytes."""
    assert stream is not None
    while data := await stream.read(1 << 16):
        end += data
        del end[:-_KEPT]
