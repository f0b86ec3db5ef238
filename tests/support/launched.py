"""Processes of their own, forked from one that has imported what they need: Python takes seconds to start.

`Process` is `ia3 serve`; `together` calls a function in as many processes as `torchrun` would start.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import httpx

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("ia3.cli", "ia3.serve.run", "ia3.serve.local", "ia3.training.trainer"),
        *("transformers.models.llama.modeling_llama", "support.tiny"),
    ]
)


def _main(error: Connection, program: str, environment: dict[str, str], arguments: list[str]) -> None:
    """What the process does: standard error goes where the test reads it."""
    os.dup2(error.fileno(), 2)
    error.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    os.environ.update(environment)
    exec(program, {})
    from ia3.cli import main

    main(arguments)


def _run(said: Path, environment: dict[str, str], function: Callable, arguments: tuple) -> None:
    """What a process of `together` does: what it prints goes to files in the working directory."""
    os.chdir(said.parent)
    for number, name in ((1, said), (2, said.with_suffix(".err"))):
        with name.open("wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(environment)
    function(*arguments)
    sys.stdout.flush()


def together(folder: Path, function: Callable, *arguments, processes: int = 1) -> str:
    """Call a module's function in several processes; returns what they print, and ends the test if one fails.

    Args:
        folder: the working directory.
        function: which the processes import.
        arguments: its own.
        processes: how many; several find each other as those of `torchrun` do.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        environment = {"OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
        said = folder / f"said-{rank}.out"
        process = _CONTEXT.Process(target=_run, args=(said, environment, function, arguments), daemon=True)
        process.start()
        started.append((process, said))
    end = time.monotonic() + 300
    while any(process.is_alive() for process, _ in started) and not any(process.exitcode for process, _ in started):
        assert time.monotonic() < end, "they go on"
        time.sleep(0.01)
    for process, _ in started:
        if process.exitcode is None:  # it waits for one that failed
            process.kill()
        process.join()
    failed = [said.with_suffix(".err").read_text()[-2000:] for process, said in started if process.exitcode]
    assert not failed, "\n".join(failed)
    return "".join(said.read_text(encoding="utf-8") for _, said in started)


class Process:
    """A process.

    Args:
        folder: with `model` and `adapters`.
        arguments: more of the command line.
        program: runs before the command.
        environment: more variables.

    Attributes:
        log: the JSON lines of its standard error.
        others: the other lines.
        said: the last of them.
        port: where it listens.
        http: a client.
    """

    def __init__(self, folder, *arguments, program="", **environment) -> None:
        self.log: list[dict] = []
        self.others: list[str] = []
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
                    self.others.append(line)

    @property
    def said(self) -> str:
        return self.others[-1] if self.others else ""

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
