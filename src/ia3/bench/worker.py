"""One column's process: loads the model, and does each job in a copy of itself, so that each has a memory of its own.

    python -m ia3.bench.worker COLUMN FOLDER THREADS

Speaks in lines of JSON. `{"job": …}` begins a job (see `jobs.Row.job`), `{"run": true}` does it once, `{"end": true}` ends
it and tells its peak memory. Every line is answered by one; `{"error": …}` also says that the job is over.

The model is loaded by one thread: a copy of a process has none of its threads, and those of OpenMP would be missed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any

COLUMNS = {
    "ours": ("ia3.bench.ours", "Ours"),
    "peft": ("ia3.bench.peers", "Peft"),
    "authors": ("ia3.bench.peers", "Authors"),
    "adapterhub": ("ia3.bench.adapterhub", "AdapterHub"),
    "floor": ("ia3.bench.floor", "Floor"),
}


class Memory:
    """The resident set of this process, and its peak over what it was at first; looked at every five milliseconds."""

    def __init__(self) -> None:
        import psutil

        trimmed()
        self.process = psutil.Process()
        self.before = self.peak = self.process.memory_info().rss

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look, within `with`."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.005):
                self.look()

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            self.look()

    def look(self) -> None:
        """Take the resident set into account."""
        self.peak = max(self.peak, self.process.memory_info().rss)

    @property
    def added_mb(self) -> float:
        """The peak over what was there."""
        return (self.peak - self.before) / 1e6


def trimmed() -> None:
    """Give memory back that is free."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library that cannot
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def main() -> None:
    """Load, then do jobs until the input ends."""
    name, folder, threads = sys.argv[1:]
    # Libraries print as they like; answers go where standard output went.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import importlib

    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    module, kind = COLUMNS[name]
    column = getattr(importlib.import_module(module), kind)(folder)
    say(answers, {"versions": versions(name)})
    for line in sys.stdin:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            torch.set_num_threads(int(threads))
            do(column, json.loads(line)["job"], answers)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            say(answers, {"error": f"its process ended with status {os.waitstatus_to_exitcode(status)}"})


def do(column: Any, job: dict[str, Any], answers: IO[str]) -> None:
    """One job, as often as it is asked for."""
    try:
        column.wake()
        memory = Memory()
        with memory.watched():
            run = column.prepare(job)
        say(answers, {"ready": True})
        for line in sys.stdin:
            if "end" in json.loads(line):
                say(answers, {"peak_mb": memory.added_mb})
                return
            with memory.watched():
                seconds, found = run()
            say(answers, {"seconds": seconds, "found": found})
    except Exception as error:
        import traceback

        traceback.print_exc()
        say(answers, {"error": f"{type(error).__name__}: {error}"})


def say(answers: IO[str], value: dict[str, Any]) -> None:
    """One answer."""
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def versions(column: str) -> dict[str, str]:
    """What the column runs on."""
    from importlib import metadata

    found = {}
    for name in ("torch", "transformers", *({"peft": ["peft"], "adapterhub": ["adapters"]}.get(column, ()))):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


if __name__ == "__main__":
    main()
