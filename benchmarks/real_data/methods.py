"""All methods by name, in order of priority, and a cell's record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ia3.training.recipe import Recipe

from . import adapters, baselines, jobs, prompted
from .data import Data
from .judging import Found, judged

Cells = Mapping[tuple[str, str, int], dict[str, Any]]
"""(task, method, seed) → record."""


class TooEarly(Exception):
    """A method that needs another one's cell."""


def _peft_ia3(data: Data, seed: int, name: str, cells: Cells) -> Found:
    other = cells.get((name, "tfew", seed))
    if other is None:
        raise TooEarly("tfew is not there, which says how many steps to make")
    return adapters.peft_ia3(data, seed, other["steps"])


Method = Callable[[Data, int, str, Cells], Found]

# Seconds a cell: all seeds come first.
QUICK: dict[str, Method] = {
    "most-frequent": lambda data, seed, name, cells: baselines.most_frequent(data),
    "tfidf": lambda data, seed, name, cells: baselines.tfidf(data, seed),
    "minilm": lambda data, seed, name, cells: baselines.minilm(data, seed),
    "zero-shot": lambda data, seed, name, cells: prompted.zero_shot(data, balanced=False),
    "zero-shot-balanced": lambda data, seed, name, cells: prompted.zero_shot(data, balanced=True),
}
METHODS: dict[str, Method] = {
    **QUICK,
    "ours": lambda data, seed, name, cells: jobs.ours(data, seed, name),
    "ours-worded": lambda data, seed, name, cells: jobs.job(data, seed, data.task),
    "icl-8": lambda data, seed, name, cells: prompted.in_context(data, seed, 8, balanced=False),
    "icl-16-balanced": lambda data, seed, name, cells: prompted.in_context(data, seed, 16, balanced=True),
    "setfit": lambda data, seed, name, cells: baselines.setfit(data, seed),
    "tfew": lambda data, seed, name, cells: jobs.job(data, seed, data.task, Recipe.small().changed(opinions="vectors")),
    "peft-ia3": _peft_ia3,
    "lora": lambda data, seed, name, cells: adapters.lora(data, seed),
}

# Of the tables: what a person would try first stands first, this project's last.
OURS = ["ours", "ours-worded"]
OTHERS = [name for name in METHODS if name not in OURS]


def measured(name: str, method: str, seed: int, data: Data, cells: Cells) -> dict[str, Any]:
    """A cell's record. Raises `Unsuited` or `TooEarly`."""
    wall, started = time.perf_counter(), time.process_time()
    found = METHODS[method](data, seed, name, cells)
    seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - started}
    record = {**judged(data, found), **seconds, **found.details}
    return {
        "task": name,
        "method": method,
        "seed": seed,
        **_rounded(record),
        "train_rows": len(data.train),
        "test_rows": len(data.test),
        "threads": torch.get_num_threads(),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(its) for key, its in value.items()}
    if isinstance(value, list):
        return [_rounded(its) for its in value]
    return round(value, 5) if isinstance(value, float) else value
