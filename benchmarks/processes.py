"""Several processes on one machine against one: training steps and predictions, and what their exchange costs.

- one: a process with `--threads` threads. On GPUs, each process has one.
- several: `--processes` of them with so many threads each. They share each batch of `--batch` examples, and the rows to predict.
- all threads: one process with the threads of all, what else a processor's cores could do. Not on GPUs.
- shards: several that hold a share of each layer (`--device-map shards`). They share batches; each predicts all rows.

Printed are ratios: how many times faster than one; of a step, the share that an exchange of gradients takes, and the share that a
process waits for the others before it; and how many times longer steps and predictions take with shares than with whole models.
Times are medians over steps, and over runs of all kinds in turn.

    python -m benchmarks.processes [--processes 2] [--threads 1] [--model smollm2] [--task courses] [--steps 12] [--batch 8]
        [--rows 64] [--repeats 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from transformers import TrainerCallback

from ia3 import Member, Recipe, Scorer, Task, TFewTrainer, load_base, processes
from ia3.adapter.pretrained import EMBEDDED_MODEL
from ia3.evaluation.drawing import read
from ia3.evaluation.running import with_adapters
from ia3.scoring.family import passes_in_step
from ia3.training import choices

# Steps at the beginning that no time is taken of.
WARM = 2


class Clock(TrainerCallback):
    """Seconds of each step, and of its exchange: waiting for the other processes, and adding up."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.waiting: list[float] = []
        self.adding: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = _now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(_now() - self._started)

    def around(self, add_up: Any) -> Any:
        """`add_up_gradients`, timed."""

        def timed(*args: Any) -> Any:
            before = _now()
            torch.distributed.barrier()
            ready = _now()
            found = add_up(*args)
            self.waiting.append(ready - before)
            self.adding.append(_now() - ready)
            return found

        return timed


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def work(settings: argparse.Namespace) -> dict[str, float] | None:
    """Train and predict in this process, together with others; the first one's seconds."""
    if "RANK" in os.environ:
        processes.connect(vars(settings))
    task = Task.embedded(settings.task)
    assert task.train is not None
    rows = list(read(task.train, task))
    base, tokenizer = load_base(settings.model, device_map="shards" if settings.shards else None)
    recipe = Recipe(steps=settings.steps + WARM, batch_size=settings.batch)
    model, clock = with_adapters(base, {"default": "start"}, recipe), Clock()
    choices.add_up_gradients = clock.around(choices.add_up_gradients)
    with tempfile.TemporaryDirectory() as folder:
        arguments = recipe.training_arguments(folder, save_strategy="no", disable_tqdm=True)
        trainer = TFewTrainer(model, arguments, tokenizer, Member(task, rows[: 8 * settings.batch]), recipe)
        trainer.add_callback(clock)
        trainer.silence()
        trainer.train()
    scorer = Scorer(model, tokenizer)
    some = [rows[index % len(rows)] for index in range(settings.rows)]
    questions = scorer.questions(task.wordings(some), labelled=False)
    scorer.score(questions[: settings.batch])
    started = _now()
    together = passes_in_step(model)
    processes.dealt(len(questions), lambda mine: scorer.score([questions[index] for index in mine]), together)
    found = {"predicting": _now() - started}
    parts = {"training": clock.steps, "waiting": clock.waiting, "adding": clock.adding}
    return found | {name: statistics.median(its[WARM:]) for name, its in parts.items() if its}


def launched(settings: argparse.Namespace, number: int, threads: int, shards: bool = False) -> dict[str, float]:
    """What `work` finds in so many processes."""
    command = [sys.executable]
    if number > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
        command += ["--nproc_per_node", str(number)]
    command += ["-m", "benchmarks.processes", "--work", *(["--shards"] if shards else [])]
    for name in ("model", "task", "steps", "batch", "rows"):
        command += [f"--{name}", str(getattr(settings, name))]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def ratios(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Kind of run → what it did in each repeat, as ratios of medians."""
    seconds = {
        kind: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for kind, runs in found.items()
    }
    several, results = seconds["several"], {}
    for name in ("training", "predicting"):
        result = {
            f"{kind}, times faster than one": seconds["one"][name] / its[name]
            for kind, its in seconds.items()
            if kind in ("several", "all threads")
        }
        result["shards, times longer than whole models"] = seconds["shards"][name] / several[name]
        results[name] = result
    for what in ("waiting", "adding"):
        results["training"][f"{what}, share of a step"] = several[what] / several["training"]
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="a folder or a hub id (%(default)s)")
    parser.add_argument("--task", default="courses", help="an embedded task (%(default)s)")
    defaults = {"processes": 2, "threads": 1, "steps": 12, "batch": 8, "rows": 64, "repeats": 3}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print seconds and ratios as JSON")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shards", action="store_true", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.work:
        found = work(settings)
        if processes.is_first():
            print(json.dumps(found), flush=True)
        return
    number, threads = settings.processes, settings.threads
    kinds: dict[str, tuple[int, int, bool]] = {"one": (1, threads, False), "several": (number, threads, False)}
    if not torch.cuda.is_available():
        kinds["all threads"] = (1, number * threads, False)
    kinds["shards"] = (number, threads, True)
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(settings.repeats):
        for kind, how in kinds.items():
            runs[kind].append(launched(settings, *how))
    if settings.json:
        print(json.dumps({"runs": runs, "ratios": ratios(runs)}, indent=2))
        return
    for name, its in ratios(runs).items():
        print(name)
        for what, value in its.items():
            print(f"  {what}: {value:.2f}")


if __name__ == "__main__":
    main()
