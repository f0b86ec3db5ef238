"""What the benchmarks share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from ia3.adapter.pretrained import EMBEDDED_MODEL


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--device`, by default SmolLM2-135M and the GPU, where there is one."""
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="a folder or a hub id (%(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=device, help="where models compute (%(default)s)")


def synchronize() -> None:
    """Wait until the GPU, if one is in use, has done what was asked of it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleaved(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, one of each in turn, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            synchronize()
            started = time.perf_counter()
            step()
            synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds
