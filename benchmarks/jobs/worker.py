"""One column's process: loads the model, and does each job in a copy of itself, so that each has a memory of its own.

    python -m benchmarks.jobs.worker COLUMN FOLDER THREADS

Speaks in lines of JSON. `{"job": …}` begins a job (see `rows.Row.job`), `{"run": true}` does it once, `{"end": true}` ends
it and tells its peak memory. Every line is answered by one; `{"error": …}` also says that the job is over.

A copy counts its peak memory from its own beginning. The model is loaded by one thread: a copy of a process has none of
its threads, and those of OpenMP would be missed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
from pathlib import Path
from typing import IO, Any

COLUMNS = {
    "ours": (".ours", "Ours"),
    "bfloat16": (".ours", "InBfloat16"),
    "peft": (".peers", "Peft"),
    "authors": (".peers", "Authors"),
    "adapterhub": (".adapterhub", "AdapterHub"),
    "floor": (".floor", "Floor"),
}


class Memory:
    """The peak of this process's resident set over what it was at first, as the kernel counts it."""

    def __init__(self) -> None:
        trimmed()
        with contextlib.suppress(OSError):  # a kernel that keeps the earlier peak
            Path("/proc/self/clear_refs").write_text("5")
        self.before = resident("VmRSS")

    @property
    def added_mb(self) -> float:
        """The peak, in MB."""
        return max(0, resident("VmHWM") - self.before) / 1e6


def resident(field: str) -> int:
    """Bytes of this process's resident set: VmRSS, what it is now, or VmHWM, its peak."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


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

    module, kind = COLUMNS[name]
    made = getattr(importlib.import_module(module, __package__), kind)

    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    column = made(folder)
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
        run = column.prepare(job)
        say(answers, {"ready": True})
        for line in sys.stdin:
            if "end" in json.loads(line):
                say(answers, {"peak_mb": memory.added_mb})
                return
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
