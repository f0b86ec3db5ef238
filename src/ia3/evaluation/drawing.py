"""Divide rows into training examples and test rows: `Source`, `drawn`."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ia3.errors import InputError, shown
from ia3.opinions.priors import shares_of
from ia3.task.free_text import FreeText, few_rows
from ia3.task.kinds import AnyTask
from ia3.task.reading import is_delimited, read_rows
from ia3.task.task import Row, Task, few_shot
from ia3.task.template import as_text

# Rows that say how frequent labels are among all: fewer would invent it.
_TELLING = 50


def read(source: str, task: AnyTask | None = None, delimiter: str | None = None) -> list[dict[str, Any]]:
    """Read the rows of a file or a data set.

    Args:
        source: a file or data set, as `read_rows` takes it.
        task: decides how class labels are read, and the delimiter of its own files.
        delimiter: the delimiter between columns, used only for sources that have one (see `require_delimited`).
    """
    if task is None:
        return read_rows(source, delimiter=delimiter if is_delimited(source) else None)
    own = source in (task.train, task.test)
    if own:
        delimiter = delimiter or task.delimiter
    rows = read_rows(source, task.class_names, delimiter if is_delimited(source) else None)
    if not (own and isinstance(task, Task) and task.only_choices and task.labels is not None):
        return rows
    known = {*task.labels, *task.aliases}
    return [row for row in rows if as_text(row.get(task.label_column)) in known]


def require_different(rows: Sequence[Row], fingerprints: Sequence[str]) -> None:
    """Raise `InputError` if a task asks the same of all rows, by their fingerprints, so that nothing can tell them apart."""
    if len(rows) > 1 and len({*fingerprints}) == 1:
        raise InputError(
            f"Expected rows that differ in the prompt, found the same for all {len(rows)}; let the template name a column with "
            f"texts: {{{{ COLUMN }}}}, of {shown(rows[0], 20)}."
        )


@dataclass(frozen=True)
class Source:
    """A task with the rows to draw training examples from, and given test rows or None."""

    task: AnyTask
    rows: Sequence[Row]
    test: Sequence[Row] | None

    @functools.cached_property
    def fingerprints(self) -> list[str]:
        """The fingerprint of each row to draw from."""
        return [self.task.fingerprint(row, number) for number, row in enumerate(self.rows, 1)]

    def check(self) -> None:
        """Raise `InputError` for a row that does not fit the task."""
        self.task.check(self.rows)
        self.task.check(self.test or [])
        require_different(self.rows, self.fingerprints)


@dataclass(frozen=True)
class Draw:
    """Training examples and test rows.

    Attributes:
        examples: the drawn training examples.
        test: the given test rows, or the rows that are not used for training.
        left_out: the number of rows that are left out of the test rows because they duplicate a training example.
        repeated: the number of given test rows that duplicate a training example; they stay.
        shares: label → its share of the rows to draw from, as far as rows show that are not test rows; None: they do not.
    """

    examples: list[Row]
    test: list[Row]
    left_out: int = 0
    repeated: int = 0
    shares: dict[str, float] | None = None


def drawn(
    source: Source, per_label: int | None, test_rows: int, seed: int, seen: Callable[[Row], bool] | None = None
) -> Draw:
    """Draw training examples and test rows.

    Args:
        source: the rows to draw from.
        per_label: examples per label; None: 16, or all if a label has fewer; 0: all rows. If the answer is text, examples in
            all; None: 64, or all if there are fewer.
        test_rows: the maximum of test rows; 0: all.
        seed: decides the draw.
        seen: whether a trained adapter was trained on a row. If the source has such rows, they are the examples, each
            once. They are not used as test rows, unless test rows are given.
    """
    learned: dict[str, Row] = {}
    if seen is not None:
        learned = {key: row for row, key in zip(source.rows, source.fingerprints, strict=True) if seen(row)}
    if learned:
        examples = list(learned.values())
    else:
        examples = list(source.rows) if per_label == 0 else _few(source, per_label, seed)
    known = {source.task.fingerprint(row) for row in examples}

    def is_known(row: Row, key: str) -> bool:
        return key in known or (seen is not None and seen(row))

    def sampled(rows: Sequence[Row]) -> list[Row]:
        # The sample of given test rows does not depend on the seed, so that runs can be compared.
        return random.Random(0).sample(rows, test_rows) if 0 < test_rows < len(rows) else list(rows)

    if source.test is not None:
        test = sampled(source.test)
        repeated = sum(is_known(row, source.task.fingerprint(row)) for row in test)
        return Draw(examples, test, repeated=repeated, shares=_shares(source.task, source.rows))
    used = {id(row) for row in examples}
    rest = [(row, key) for row, key in zip(source.rows, source.fingerprints, strict=True) if id(row) not in used]
    test = [row for row, key in rest if not is_known(row, key)]
    tested = sampled(test)
    held = {id(row) for row in tested}
    # A random sample of the rows that could have been test rows.
    left = [row for row in test if id(row) not in held]
    shares = _shares(source.task, examples, left, len(test)) if len(left) >= _TELLING or not test else None
    return Draw(examples, tested, left_out=len(rest) - len(test), shares=shares)


def nested(task: AnyTask, rows: Sequence[Row], sizes: Sequence[int]) -> dict[int, list[Row]]:
    """Parts of training examples, each inside the next larger one: size → its rows, in their order.

    Args:
        task: the task of the rows.
        rows: the examples, in the random order in which they were drawn.
        sizes: rows for each label, as far as it has so many; if the answer is text, rows in all.

    Raises:
        InputError: a part would be all rows, or fewer than one for each label.
    """
    if isinstance(task, FreeText):
        labels: list[Sequence[str]] = [[""]] * len(rows)
    elif task.multi_label:
        labels = [task.labels_of(row, number) or ("",) for number, row in enumerate(rows, 1)]
    else:
        labels = [[task.label(row, number)] for number, row in enumerate(rows, 1)]
    found: dict[int, list[Row]] = {}
    counts: Counter[str] = Counter()
    taken: set[int] = set()
    for size in sorted(sizes):
        for index, its in enumerate(labels):
            if index not in taken and any(counts[label] < size for label in its):
                taken.add(index)
                counts.update(its)
        if size < 1 or len(taken) == len(rows):
            what = "examples" if isinstance(task, FreeText) else "examples for each label"
            raise InputError(
                f"Expected from 1 {what} to fewer than all {len(rows)} examples, found {size}",
                "take other numbers for",
                argument="learning_curve",
            )
        found[size] = [rows[index] for index in sorted(taken)]
    return found


def _few(source: Source, count: int | None, seed: int) -> list[Row]:
    if isinstance(source.task, FreeText):
        return few_rows(source.rows, source.task, count, seed)
    return few_shot(source.rows, source.task, count, seed)


def _shares(
    task: AnyTask, rows: Sequence[Row], others: Sequence[Row] = (), stand_for: int = 0
) -> dict[str, float] | None:
    """The shares of labels among rows and `stand_for` more, of which `others` are a random sample."""
    if isinstance(task, FreeText) or task.labels is None or task.multi_label:
        return None
    first, second = (Counter(task.label(row) for row in some) for some in (rows, others))
    each = stand_for / max(len(others), 1)
    return shares_of({name: first[name] + second[name] * each for name in task.labels}, task.labels)
