"""Runs rows of the suite: a process for each column, a copy of it for each row, one repeat of each column in turn."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ia3
from ia3.errors import InputError, brief, shown, similar
from ia3.files import read_json, replacing

from .report import summary
from .rows import COLUMNS, Row, suite

JSON_NAME = "bench.json"

_CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Settings:
    """What decides the numbers, apart from the machine.

    Attributes:
        model: the base model's name.
        repeats: how often each column does each row.
        threads: of each process.
        whole: no samples.
    """

    model: str
    repeats: int = 3
    threads: int = 1
    whole: bool = False


# A process says itself what it held at most: of one that was started by a large process, the kernel's answer to that one is
# no less than the large one's.
_PEAK = """
import atexit, sys
atexit.register(lambda: print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0], file=sys.__stdout__))
"""


class Failed(Exception):
    """A column cannot do a job."""


class Worker:
    """A column's process, see `worker`.

    Args:
        column: its name.
        python: the interpreter.
        folder: the base model's.
        threads: of its jobs.
    """

    def __init__(self, column: str, python: str, folder: str, threads: int) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.jobs.worker", column, folder, str(threads)],
            cwd=_CHECKOUT,  # where `-m` looks, whatever is installed
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the suite, which ends its workers
        )

    def ask(self, question: Mapping[str, Any] | None) -> dict[str, Any]:
        """Say a line, and read the answer; None: only read.

        Raises:
            Failed: with the reason, in one line.
        """
        try:
            if question is not None:
                self.process.stdin.write(json.dumps(question) + "\n")  # type: ignore[union-attr]
                self.process.stdin.flush()  # type: ignore[union-attr]
            line = self.process.stdout.readline()  # type: ignore[union-attr]
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            self.log.seek(0)
            last = [text for text in self.log.read().splitlines() if text.strip()] or ["no message"]
            raise Failed(last[-1].strip())
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(" ".join(answer["error"].split()))
        return answer

    def close(self) -> None:
        """End it, and the copy that it has, if any."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]


def chosen(only: str | None, whole: bool) -> list[Row]:
    """The rows that are asked for, in the suite's order.

    Raises:
        InputError: there is no such row.
    """
    rows = suite(whole)
    if only is None:
        return [*rows.values()]
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in rows:
            raise InputError(f"Expected rows of the suite (--only), found {name!r}; {similar(name, rows)}.")
    if not names:
        raise InputError(f"Expected rows of the suite (--only), found none; there are {shown(rows, 20)}.")
    return [row for name, row in rows.items() if name in names]


def interpreters(adapterhub: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """The interpreter of each column that can run, and why the others cannot.

    Raises:
        InputError: the one that is given for AdapterHub is no file.
    """
    found, left_out = dict.fromkeys(COLUMNS, sys.executable), {}
    if not _has_peft():
        del found["peft"]
        left_out["peft"] = "not installed: pip install peft"
    if not _multiplies_bfloat16():
        del found["bfloat16"]
        left_out["bfloat16"] = "this processor has no instructions for it"
    if adapterhub is None:
        del found["adapterhub"]
        left_out["adapterhub"] = (
            "needs an environment of its own, for transformers 4: python -m venv hub && hub/bin/pip install adapters accelerate, "
            "then --adapterhub hub/bin/python"
        )
    elif not Path(adapterhub).is_file():
        raise InputError(
            f"Expected the interpreter of an environment with adapters (--adapterhub), found {adapterhub!r}."
        )
    else:
        found["adapterhub"] = adapterhub
    return found, left_out


def _has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


def _multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it (AVX512-BF16, AMX, Arm's), by the kernel's list."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return (
            re.search(r"^(flags|Features)\s*:.*\b(avx512_bf16|amx_bf16|bf16)\b", file.read(), re.MULTILINE) is not None
        )


def begin(settings: Settings, file: Path, resume: bool) -> dict[str, Any]:
    """A result without rows, or the one that is there.

    Raises:
        InputError: there is none to go on from, it is damaged, or it is of other settings.
    """
    fresh = {
        "settings": vars(settings),
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "versions": {"ia3": ia3.__version__},
        "left_out": {},
        "rows": {},
    }
    if not resume:
        return fresh
    if not file.is_file():
        raise InputError(f"Expected {file} to go on from (--resume), found none.")
    known = read_json(file, "start without --resume")
    before = known.get("settings")
    if not isinstance(before, dict) or not isinstance(known.get("rows"), dict):
        raise InputError(
            f"Expected a result of python -m benchmarks in {file}, found a damaged one; start without --resume."
        )
    for name, value in vars(settings).items():
        if before.get(name) != value:
            raise InputError(
                f"Expected {name} {brief(before.get(name))}, as in {file} that is to be gone on from (--resume), found "
                f"{value!r}."
            )
    return known


@dataclass
class Plan:
    """What is to be done.

    Attributes:
        settings: how.
        rows: what.
        file: where the result goes.
        result: what is known already.
        pythons: the interpreter of each column that can run.
        folder: the base model's.
    """

    settings: Settings
    rows: list[Row]
    file: Path
    result: dict[str, Any]
    pythons: dict[str, str]
    folder: str


def plan(
    settings: Settings, rows: Sequence[Row], file: Path, adapterhub: str | None = None, resume: bool = False
) -> Plan:
    """Look at everything that can be looked at before anything is measured.

    Args:
        settings: how.
        rows: what.
        file: where the result goes.
        adapterhub: the interpreter of an environment with AdapterHub's `adapters`.
        resume: rows that the file has are not done again.

    Raises:
        InputError: this is not Linux; or see `begin`, `interpreters` and `ia3.adapter.pretrained.find_base`.
    """
    from ia3.adapter.pretrained import find_base

    if not Path("/proc/self/status").is_file():
        raise InputError(
            "Expected Linux, whose processes can be copied with a model in them and say what memory they hold."
        )
    pythons, left_out = interpreters(adapterhub)
    result = begin(settings, file, resume)
    result["left_out"] = left_out
    missing = [row for row in rows if row.name not in result["rows"]]
    return Plan(settings, missing, file, result, pythons, find_base(settings.model)[1])


def run(plan: Plan, on_step: Callable[[int, int, str], None] = lambda done, total, note: None) -> dict[str, Any]:
    """Do what is planned; the result is written after each row.

    Args:
        plan: see `plan`.
        on_step: called with what is done, of how much, and what comes next.

    Raises:
        InputError: the base model cannot be loaded.
    """
    settings, rows, result = plan.settings, plan.rows, plan.result
    texts = _reviews() if any(row.kind for row in rows) else []
    steps = len(rows) * settings.repeats
    needed = {name for row in rows if row.kind for name in row.columns}
    pythons = {name: python for name, python in plan.pythons.items() if name in needed}
    with _workers(pythons, plan.folder, settings.threads) as started:
        for place, row in enumerate(rows):

            def say(repeat: int, column: str, place: int = place, row: Row = row) -> None:
                on_step(place * settings.repeats + repeat, steps, f"{row.name}: {COLUMNS[column]}")

            columns = [name for name in row.columns if name in plan.pythons and name not in result["left_out"]]
            if row.kind is None:
                result["rows"][row.name] = _commands(row, columns, plan.pythons, settings.repeats, say)
            else:
                on_step(place * settings.repeats, steps, "loading the model")
                for name, why in started(result).items():
                    result["left_out"].setdefault(name, why)
                columns = [name for name in columns if name not in result["left_out"]]
                workers = {name: started.workers[name] for name in columns}
                result["rows"][row.name] = _job(row, row.job(texts), workers, settings.repeats, say)
            save(result, plan.file)
    on_step(steps, steps, "")
    save(result, plan.file)
    return result


def _reviews() -> list[str]:
    """Texts of the embedded task's training rows."""
    from ia3.task.reading import read_rows
    from ia3.task.task import Task

    task = Task.embedded("food-reviews")
    assert task.train is not None
    return [row["review"] for row in read_rows(task.train)[:300]]


class _Started:
    """The workers, which are started when they are first needed: all at once, because loading takes a while."""

    def __init__(self, pythons: Mapping[str, str], folder: str, threads: int) -> None:
        self.workers: dict[str, Worker] = {}
        self._wanted = (pythons, folder, threads)

    def __call__(self, result: dict[str, Any]) -> dict[str, str]:
        """Start them, unless they are; what they run on goes into the result. Returns those that cannot start, and why."""
        if self.workers:
            return {}
        pythons, folder, threads = self._wanted
        failed = {}
        for name, python in pythons.items():
            self.workers[name] = Worker(name, python, folder, threads)
        for name, worker in self.workers.items():
            try:
                versions = worker.ask(None)["versions"]
            except Failed as error:
                if name == "ours":
                    raise InputError(f"Cannot measure {folder!r}: {error}") from error
                failed[name] = str(error)
                continue
            prefix = "adapterhub: " if name == "adapterhub" else ""
            result["versions"] |= {prefix + package: version for package, version in versions.items()}
        return failed


@contextlib.contextmanager
def _workers(pythons: Mapping[str, str], folder: str, threads: int) -> Iterator[_Started]:
    started = _Started(pythons, folder, threads)
    try:
        yield started
    finally:
        for worker in started.workers.values():
            worker.close()


def save(result: Mapping[str, Any], file: Path) -> None:
    """Write the result, in whole or not at all."""
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _job(
    row: Row, job: dict[str, Any], workers: Mapping[str, Worker], repeats: int, say: Callable[[int, str], None]
) -> dict[str, Any]:
    """A row by workers."""
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    found: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    errors: dict[str, str] = {}

    def each(question: dict[str, Any], repeat: int) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, worker in workers.items():
            if name in errors:
                continue
            say(repeat, name)
            try:
                yield name, worker.ask(question)
            except Failed as error:
                errors[name] = str(error)

    for _ in each({"job": job}, 0):
        pass
    for repeat in range(repeats):
        for name, answer in each({"run": True}, repeat):
            seconds[name].append(answer["seconds"])
            found.setdefault(name, answer["found"])
    for name, answer in each({"end": True}, repeats):
        peaks[name] = answer["peak_mb"]
    return summary(row, {name: seconds[name] for name in workers if name not in errors}, peaks, found, errors)


def _commands(
    row: Row, columns: Sequence[str], pythons: Mapping[str, str], repeats: int, say: Callable[[int, str], None]
) -> dict[str, Any]:
    """A row of commands: seconds from the start of a process to its end, and its largest resident set."""
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in columns}
    peaks: dict[str, float] = {}
    errors: dict[str, str] = {}
    for repeat in range(repeats + 1):  # the first brings files into memory
        for name in columns:
            if name in errors:
                continue
            say(max(0, repeat - 1), name)
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
            if pythons[name] != sys.executable:
                environment.pop("PYTHONPATH", None)
            with tempfile.TemporaryFile("w+") as log:
                started = time.perf_counter()
                process = subprocess.Popen(
                    [pythons[name], "-c", _PEAK + row.commands[name]], stdout=log, stderr=log, env=environment
                )
                process.wait()
                took = time.perf_counter() - started
                log.seek(0)
                said = log.read().strip().splitlines() or [""]
            if process.returncode:
                said = [line for line in said if not line.isdigit()]  # without its peak
                errors[name] = said[-1] if any(said) else f"its process ended with status {process.returncode}"
            elif repeat:
                seconds[name].append({"whole": took})
                peaks[name] = max(peaks.get(name, 0.0), 1024 * int(said[-1]) / 1e6)
    return summary(row, {name: seconds[name] for name in columns if name not in errors}, peaks, {}, errors)
