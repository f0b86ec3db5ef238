"""Labels in an order, such as stars or severities: `Grades`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

MEASURES = ("mean_absolute_error", "quadratic_kappa")
"""The metrics of tasks with grades, beside accuracy and macro-F1."""


class Grade(NamedTuple):
    """What probabilities say of a grade.

    Attributes:
        expected: the expected value, Σ p(label) · value(label).
        spread: the standard deviation of the value.
    """

    expected: float
    spread: float


class Grades:
    """The values of labels in an order.

    >>> Grades(["1", "2", "3"]).of({"1": 0.0, "2": 0.5, "3": 0.5})
    Grade(expected=2.5, spread=0.5)

    Args:
        labels: from the lowest to the highest. If they are numbers that rise, these are their values, otherwise 1, 2, ….

    Attributes:
        values: label → value.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        try:
            values = [float(label) for label in labels]
        except ValueError:
            values = [math.nan]
        rise = all(one < other for one, other in itertools.pairwise(values)) and all(map(math.isfinite, values))
        self.values = dict(zip(labels, values if rise else map(float, range(1, len(labels) + 1)), strict=True))

    def of(self, probabilities: Mapping[str, float]) -> Grade:
        """The grade that the probabilities of all labels give."""
        expected = math.fsum(p * self.values[label] for label, p in probabilities.items())
        variance = math.fsum(p * (self.values[label] - expected) ** 2 for label, p in probabilities.items())
        return Grade(expected, math.sqrt(variance))

    def metrics(self, labels: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        """The mean absolute error of values, and Cohen's kappa with quadratic weights of places in the order.

        Kappa is 1 where all are right and 0 where agreement is chance; it is 0 where all labels and predictions are one.
        """
        from sklearn.metrics import cohen_kappa_score, mean_absolute_error

        order = list(self.values)
        places = [[order.index(label) for label in some] for some in (labels, predictions)]
        one = len({*places[0], *places[1]}) == 1
        values = [[self.values[label] for label in some] for some in (labels, predictions)]
        return {
            "mean_absolute_error": float(mean_absolute_error(*values)),
            "quadratic_kappa": 0.0 if one else float(cohen_kappa_score(*places, weights="quadratic")),
        }
