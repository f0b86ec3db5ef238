"""The file of finished cells, a line for each, and the order in which they are made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from .methods import METHODS, QUICK

SEEDS = [0, 1, 32]


def read_cells(file: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Finished cells; of a cell that is there twice, the first."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found.setdefault((record["task"], record["method"], record["seed"]), record)
    return found


def append(file: Path, record: dict[str, Any]) -> None:
    """Add a line at once, whatever other processes add."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, (json.dumps(record) + "\n").encode())
    finally:
        os.close(handle)


def in_order(tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, str, int]]:
    """(task, method, seed) by priority: quick methods with all seeds, then the others with the first seed, the next, …."""
    quick = [name for name in METHODS if name in methods and name in QUICK]
    slow = [name for name in METHODS if name in methods and name not in QUICK]
    for method, name, seed in product(quick, tasks, seeds):
        yield name, method, seed
    for seed, method, name in product(seeds, slow, tasks):
        yield name, method, seed
