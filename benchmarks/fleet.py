"""Several seeds as a fleet against as many runs alone: `ia3 train` on SmolLM2-135M in float32 and its embedded task.

- alone: `ia3 train --seed S` for each seed, one after the other, each in a process of its own.
- fleet: `ia3 train --seeds …`, one process.

    python benchmarks/fleet.py [--seeds 5] [--steps 40] [--test-rows 200] [--threads 2] [--json]

Whole: seconds from the start of a process to its end: imports, loading, zero-shot, training, measuring, saving. Training:
what the command itself measures. Memory: the largest resident set of a process. The short form
`--seeds 3 --steps 3 --test-rows 8 --threads 1` takes about four minutes on a busy core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ia3.adapter.pretrained import EMBEDDED_MODEL, find_base

COMMAND = [sys.executable, "-c", "from ia3.cli import main; main()", "train", "--json"]


def measured(arguments: list[str], threads: int) -> dict[str, Any]:
    """Run `ia3 train`: seconds, the largest resident set in MB, and what it printed."""
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([*COMMAND, *arguments], stdout=out, stderr=err, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        if process.returncode:
            err.seek(0)
            raise SystemExit(f"ia3 train {' '.join(arguments)} failed:\n{err.read()}")
        out.seek(0)
        return {"seconds": seconds, "peak_mb": usage.ru_maxrss / 1024, "result": json.load(out)}


def difference(a: Path, b: Path) -> float:
    """The largest difference of two saved adapters' numbers."""
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    return max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    find_base(EMBEDDED_MODEL)  # dequantized and cached, once, before anything is measured
    seeds = range(options.seeds)
    usual = ["--steps", str(options.steps), "--test-rows", str(options.test_rows)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = []
        for seed in seeds:
            output = str(folder / f"seed-{seed}")
            alone.append(measured([*usual, "--seed", str(seed), "--output", output], options.threads))
        given = ["--seeds", ",".join(map(str, seeds)), "--output", str(folder / "fleet")]
        fleet = measured([*usual, *given], options.threads)
        apart = [difference(folder / f"seed-{seed}", folder / "fleet" / f"seed-{seed}") for seed in seeds]
    members = list(fleet["result"]["members"].values())
    seconds = {"alone": sum(run["seconds"] for run in alone), "fleet": fleet["seconds"]}
    training = {
        "alone": sum(run["result"]["train_seconds"] for run in alone),
        "fleet": members[0]["train_seconds"],
    }
    memory = {"alone": max(run["peak_mb"] for run in alone), "fleet": fleet["peak_mb"]}
    found = {
        **vars(options),
        "whole_seconds": seconds,
        "training_seconds": training,
        "peak_mb": memory,
        "alone_over_fleet_whole": seconds["alone"] / seconds["fleet"],
        "alone_over_fleet_training": training["alone"] / training["fleet"],
        "fleet_over_alone_memory": memory["fleet"] / memory["alone"],
        "largest_difference": max(apart),
        "accuracy": {
            "alone": [run["result"]["trained"]["accuracy"] for run in alone],
            "fleet": [member["trained"]["accuracy"] for member in members],
        },
    }
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{options.seeds} seeds, {options.steps} steps, {options.test_rows} test rows, {options.threads} threads")
    for title, values in (("whole, s", seconds), ("training, s", training), ("peak memory, MB", memory)):
        ratio = values["alone"] / values["fleet"]
        print(f"{title:16} alone {values['alone']:8.1f}   fleet {values['fleet']:8.1f}   alone / fleet {ratio:.2f}")
    print(f"largest difference of a number in the adapters: {max(apart):.1e}")


if __name__ == "__main__":
    main()
