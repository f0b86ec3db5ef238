"""Training rows to look at again: duplicates, and labels that cross-validation contradicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ia3.evaluation.balance import can_balance
from ia3.evaluation.prediction import Prediction
from ia3.task.free_text import FreeText
from ia3.task.kinds import AnyTask

_QUARTER = 0.25


@dataclass(frozen=True)
class HeldOut:
    """Predictions of training rows by what has not seen them.

    Attributes:
        rows: which of the training rows these are, counted from 0.
        predictions: one for each.
        labels: their labels; tuples of labels where rows may have several.
    """

    rows: Sequence[int]
    predictions: Sequence[Prediction]
    labels: Sequence[Any]


@dataclass(frozen=True)
class Doubt:
    """A label of a training row that may be wrong.

    Attributes:
        row: which training row, counted from 0.
        label: the label that it has; None: it lacks `other`, where rows may have several.
        other: the label that it seems to have; None: it seems to lack `label`.
        p_label: the held-out probability of what the row says: of `label`, or that it lacks `other`.
        p_other: that of what it seems to be.
    """

    row: int
    label: str | None
    other: str | None
    p_label: float
    p_other: float


def doubts(held_out: HeldOut) -> list[Doubt]:
    """The labels that held-out probabilities contradict, the most doubtful first.

    A row's label is doubtful if another one is the most probable, and as probable as it is for most rows that have it: the
    off-diagonal of the confident joint (Northcutt et al. 2021, arXiv:1911.00068), with a quartile instead of the mean, which misses
    half of the wrong labels where all predictions are equally sure. Where rows may have several labels, each label is a question of
    its own with the answers yes and no.
    """
    sets = any(isinstance(label, tuple) for label in held_out.labels)
    found = _of_sets(held_out) if sets else _of_labels(held_out)
    return sorted(found, key=lambda doubt: (doubt.p_label - doubt.p_other, doubt.row))


def _of_labels(held_out: HeldOut) -> list[Doubt]:
    each = _rows(held_out)
    known = {*held_out.labels}
    usual = {
        label: np.quantile([one.probabilities[label] for _, (one, its) in each if its == label], _QUARTER)
        for label in known
    }
    found = []
    for row, (one, label) in each:
        other = max(one.probabilities, key=lambda name: (one.probabilities[name], name))
        if other != label and other in usual and one.probabilities[other] >= usual[other]:
            found.append(Doubt(row, label, other, one.probabilities[label], one.probabilities[other]))
    return found


def _of_sets(held_out: HeldOut) -> list[Doubt]:
    found = []
    for name in held_out.predictions[0].probabilities:
        each = [(row, one.probabilities[name], name in its) for row, (one, its) in _rows(held_out)]
        having, lacking = ([p for _, p, its in each if its == has] for has in (True, False))
        if not having or not lacking:  # nothing to compare with
            continue
        low, high = max(np.quantile(having, _QUARTER), 0.5), min(np.quantile(lacking, 1 - _QUARTER), 0.5)
        found += [Doubt(row, None, name, 1 - p, p) for row, p, has in each if not has and p >= low]
        found += [Doubt(row, name, None, p, 1 - p) for row, p, has in each if has and p <= high]
    return found


def _rows(held_out: HeldOut) -> list[tuple[int, tuple[Prediction, Any]]]:
    return [*zip(held_out.rows, zip(held_out.predictions, held_out.labels, strict=True), strict=True)]


@dataclass(frozen=True)
class Duplicates:
    """Training rows that a model cannot tell apart.

    Attributes:
        rows: which training rows, counted from 0; at least two.
        labels: what each says is right.
    """

    rows: Sequence[int]
    labels: Sequence[Any]

    @property
    def contradict(self) -> bool:
        """Whether they disagree."""
        return any(label != self.labels[0] for label in self.labels)


def duplicates(task: AnyTask, rows: Sequence[Mapping[str, Any]]) -> list[Duplicates]:
    """Groups of rows whose texts differ in case and white space alone; those whose labels differ come first, then the largest."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, wording in enumerate(task.wordings(rows)):
        # Rows with answers of their own ask about these, too; a text's answer is what they are to be compared by.
        answers = () if isinstance(task, FreeText) or can_balance(task) else wording.answers.values()
        key = tuple(" ".join(text.casefold().split()) for text in (wording.prompt, *answers))
        groups.setdefault(key, []).append(index)
    known = [truth_of(task, row) for row in rows]
    found = [Duplicates(its, [known[i] for i in its]) for its in groups.values() if len(its) > 1]
    return sorted(found, key=lambda one: (not one.contradict, -len(one.rows), one.rows[0]))


def truth_of(task: AnyTask, row: Mapping[str, Any]) -> Any:
    """What is right for a labelled row of a task of any kind: a label, a tuple of labels, a text or fields."""
    return task.reference(row) if isinstance(task, FreeText) else task.truth(row)
