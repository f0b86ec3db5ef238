"""Which rows an experiment trains on and which it measures on: `Source`, `drawn`."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ia3.task.reading import is_delimited, read_rows
from ia3.task.task import Row, Task, few_shot


def read(source: str, task: Task | None = None, delimiter: str | None = None) -> list[dict[str, Any]]:
    """The rows of a file or a data set.

    Args:
        source: as `read_rows` takes it.
        task: how its class labels are read, and which delimiter its own files have.
        delimiter: what separates columns; it holds for sources that have one, and `require_delimited` says whether there
            are any.
    """
    if task is None:
        return read_rows(source, delimiter=delimiter if is_delimited(source) else None)
    if source in (task.train, task.test):
        delimiter = delimiter or task.delimiter
    return read_rows(source, task.class_names, delimiter if is_delimited(source) else None)


@dataclass(frozen=True)
class Source:
    """A task with the rows to draw training examples from, and the test rows, where they are given."""

    task: Task
    rows: Sequence[Row]
    test: Sequence[Row] | None

    @functools.cached_property
    def fingerprints(self) -> list[str]:
        """That of each row to draw from."""
        return [self.task.fingerprint(row, number) for number, row in enumerate(self.rows, 1)]

    def check(self) -> None:
        """Raise `InputError` for a row that does not fit the task."""
        self.task.check(self.rows)
        self.task.check(self.test or [])


@dataclass(frozen=True)
class Draw:
    """What is trained on, and what is measured on.

    Attributes:
        examples: the rows that were drawn.
        test: the given test rows, or those that training leaves over.
        left_out: how many more it would leave over, but for their words, which training sees in another row.
        repeated: how many of the given test rows are in words that training sees; they stay.
    """

    examples: list[Row]
    test: list[Row]
    left_out: int = 0
    repeated: int = 0


def drawn(
    source: Source, per_label: int | None, test_rows: int, seed: int, seen: Callable[[Row], bool] | None = None
) -> Draw:
    """Training examples and test rows.

    Args:
        source: what to draw from.
        per_label: how many examples of each label; None: the usual number, as far as there are; 0: all rows.
        test_rows: at most so many; 0: all.
        seed: decides the draw.
        seen: what an adapter that is trained already has learned from: these rows are its examples, each once, where
            the source has any of them, and no test rows where none are given.
    """
    learned: dict[str, Row] = {}
    if seen is not None:
        learned = {key: row for row, key in zip(source.rows, source.fingerprints, strict=True) if seen(row)}
    if learned:
        examples = list(learned.values())
    else:
        examples = list(source.rows) if per_label == 0 else few_shot(source.rows, source.task, per_label, seed)
    known = {source.task.fingerprint(row) for row in examples}

    def is_known(row: Row, key: str) -> bool:
        return key in known or (seen is not None and seen(row))

    def sampled(rows: Sequence[Row]) -> list[Row]:
        # Of given test rows the same whatever the seed, so that runs can be compared.
        return random.Random(0).sample(rows, test_rows) if 0 < test_rows < len(rows) else list(rows)

    if source.test is not None:
        test = sampled(source.test)
        return Draw(examples, test, repeated=sum(is_known(row, source.task.fingerprint(row)) for row in test))
    used = {id(row) for row in examples}
    rest = [(row, key) for row, key in zip(source.rows, source.fingerprints, strict=True) if id(row) not in used]
    test = [row for row, key in rest if not is_known(row, key)]
    return Draw(examples, sampled(test), left_out=len(rest) - len(test))
