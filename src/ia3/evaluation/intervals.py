"""How much the metrics of test rows may vary by chance: `measures`, `bootstrap`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ia3.task.fields import Fields, agreement
from ia3.task.free_text import FreeText
from ia3.task.grades import Grades
from ia3.task.label_sets import indicators
from ia3.task.text_metrics import TEXT_METRICS
from ia3.task.unequal import cost_of

if TYPE_CHECKING:
    from ia3.task.kinds import AnyTask

RESAMPLES = 2_000

# Resamples at a time, which bounds memory: rows times these numbers.
_AT_ONCE = 100

Sums = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Measure:
    """A metric that follows from sums over rows, so that all resamples are one product of matrices.

    Attributes:
        parts: (N, D), what each row adds to D sums.
        of: sums (…, D), divided by N, → the metric (…).
    """

    parts: np.ndarray
    of: Sums

    @property
    def value(self) -> float:
        """The metric of all rows."""
        return float(self.of(self.parts.mean(0)))


def measures(task: AnyTask, truth: Sequence[Any], said: Sequence[Any]) -> dict[str, Measure]:
    """The task's metrics that are means over rows, or F1 of counts: name → measure, with the value of `task.metrics`.

    Args:
        task: the task of the rows, of any kind.
        truth: what is right for N rows: labels, tuples of labels, texts or fields.
        said: what was said to them.
    """
    if isinstance(task, Fields):
        counts = [agreement(one, other, task.fields) for one, other in zip(said, truth, strict=True)]
        totals = np.array([[some.total() for some in its] for its in counts], dtype=float)
        return {
            "micro_f1": Measure(totals, _micro_f1),
            "exact_match": _mean([its[0] == its[1] == its[2] for its in counts]),
        }
    if isinstance(task, FreeText):
        each = [FreeText.metrics(task, [one], [other], "token_f1") for one, other in zip(said, truth, strict=True)]
        names = [name for name in TEXT_METRICS if each and name in each[0]]
        return {name: _mean([one[name] for one in each]) for name in names}
    found = {"accuracy": _mean([one == other for one, other in zip(truth, said, strict=True)])}
    sets = [truth, said] if task.multi_label else [[(label,) for label in some] for some in (truth, said)]
    names = sorted({label for some in sets for its in some for label in its})
    right, given = (indicators(some, names).reshape(len(truth), len(names)) for some in sets)
    parts = np.stack([right * given, right, given], axis=1)  # (N, 3, labels)
    flat = parts.reshape(len(truth), -1)
    found["macro_f1"] = Measure(flat, lambda sums: _macro_f1(sums.reshape(*sums.shape[:-1], 3, len(names))))
    if task.multi_label:
        found["micro_f1"] = Measure(parts.sum(2), lambda sums: _f1(*np.moveaxis(sums, -1, 0)))
    if task.costs:
        found["mean_cost"] = _mean([cost_of(task.costs, *pair) for pair in zip(truth, said, strict=True)])
    if task.grades:
        values = Grades(task.grades).values
        found["mean_absolute_error"] = _mean([abs(values[a] - values[b]) for a, b in zip(truth, said, strict=True)])
    return found


def bootstrap(some: Mapping[Any, Measure], resamples: int = RESAMPLES, seed: int = 0) -> dict[Any, np.ndarray]:
    """Each measure's values (resamples,) in rows that are drawn with replacement, the same rows for all measures, so that
    differences between them are paired (Efron 1979, https://doi.org/10.1214/aos/1176344552).

    Args:
        some: measures of the same N rows, at least one row.
        resamples: the number of draws.
        seed: decides the draws.
    """
    chance = np.random.default_rng(seed)
    found: dict[Any, list[np.ndarray]] = {name: [] for name in some}
    rows = len(next(iter(some.values())).parts) if some else 0
    for start in range(0, resamples if some else 0, _AT_ONCE):
        counts = chance.multinomial(rows, np.full(rows, 1 / rows), min(_AT_ONCE, resamples - start)).astype(float)
        for name, one in some.items():
            found[name].append(one.of(counts @ one.parts / rows))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def interval(values: np.ndarray, share: float = 0.95) -> tuple[float, float] | None:
    """The middle share of bootstrapped values: a percentile interval; None where all are the same, as where every row is right, for
    then other rows may well differ."""
    if np.ptp(values) == 0:
        return None
    low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def _mean(values: Sequence[float]) -> Measure:
    return Measure(np.array(values, dtype=float).reshape(-1, 1), lambda sums: sums[..., 0])


def _f1(right: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """F1 of the share that is right, and of those that are wanted and found; 0 where there are none."""
    both = one + other
    return np.divide(2 * right, both, out=np.zeros_like(both), where=both > 0)


def _micro_f1(sums: np.ndarray) -> np.ndarray:
    """The F1 of fields; 1 where there is nothing to find and nothing is found."""
    right, said, known = np.moveaxis(sums, -1, 0)
    return np.where(said + known > 0, _f1(right, said, known), 1.0)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    """The mean F1 (…) over the labels that occur, of sums (…, 3, labels)."""
    right, wanted, given = np.moveaxis(sums, -2, 0)
    occur = (wanted + given > 0).sum(-1)
    total = _f1(right, wanted, given).sum(-1)
    return np.divide(total, occur, out=np.zeros_like(total), where=occur > 0)
