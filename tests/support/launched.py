"""`ia3 serve` in processes of their own, forked from one that has imported what they need: Python takes seconds to start."""

import json
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection

import httpx

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["ia3.cli", "ia3.serve.run", "ia3.serve.local", "transformers.models.llama"])


def _main(error: Connection, program: str, environment: dict[str, str], arguments: list[str]) -> None:
    """What the process does: standard error goes where the test reads it."""
    os.dup2(error.fileno(), 2)
    error.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    os.environ.update(environment)
    exec(program, {})
    from ia3.cli import main

    main(arguments)


class Process:
    """A process.

    Args:
        folder: with `model` and `adapters`.
        arguments: more of the command line.
        program: runs before the command.
        environment: more variables.

    Attributes:
        log: the JSON lines of its standard error.
        said: the last of the other lines.
        port: where it listens.
        http: a client.
    """

    def __init__(self, folder, *arguments, program="", **environment) -> None:
        self.log: list[dict] = []
        self.said = ""
        places = ("--model", folder / "model", "--adapters", folder / "adapters", "--port", 0)
        command = ["serve", *map(str, (*places, *arguments))]
        reading, writing = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(target=_main, args=(writing, program, environment, command))
        self._process.start()
        writing.close()
        self._reader = threading.Thread(target=self._read, args=(reading,))
        self._reader.start()
        self.http = httpx.Client(timeout=60)
        address = self.until(
            lambda: next((line["address"] for line in self.log if line.get("event") == "listening"), None)
        )
        self.port = int(address.rpartition(":")[2])
        self.http.base_url = address

    def _read(self, reading: Connection) -> None:
        with reading, open(reading.fileno(), closefd=False) as lines:
            for line in lines:
                if line.startswith("{"):
                    self.log.append(json.loads(line))
                else:
                    self.said = line

    def until(self, condition, seconds: float = 120.0):
        """Wait for something that has to come."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end and (self._process.is_alive() or condition()), (self.log, self.said)
            time.sleep(0.01)
        return found

    def wait_until_ready(self) -> None:
        """Until the model is loaded."""
        self.until(lambda: self.http.get("/ready").status_code == 200)

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self._process.pid, number)

    def ended(self) -> int:
        """The exit code, when the process has ended by itself."""
        self._process.join(60)
        assert self._process.exitcode is not None, "it goes on"
        self._reader.join(60)
        return self._process.exitcode

    def close(self) -> None:
        """End it."""
        self.http.close()
        self._process.kill()
        self._process.join()
        self._reader.join()
        self._process.close()
