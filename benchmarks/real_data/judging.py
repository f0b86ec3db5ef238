"""How good a method's predictions are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ia3.evaluation.calibration import Calibration
from ia3.evaluation.prediction import Prediction

from .data import Data

# The share of rows outside all labels that a threshold lets pass.
_PASSING = 0.05


@dataclass(frozen=True)
class Found:
    """What a method found.

    Attributes:
        predictions: of the test rows.
        outside: of the rows that have none of the labels.
        details: what else its record says. Its `seconds` and `cpu_seconds` replace those of the whole call.
    """

    predictions: Sequence[Prediction]
    outside: Sequence[Prediction] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


class Unsuited(Exception):
    """A task that a method is not for."""


def of_probabilities(labels: Sequence[str], rows: Iterable[Sequence[float]]) -> list[Prediction]:
    """Predictions of (N, labels) probabilities."""
    return [Prediction.of({a: math.log(max(p, 1e-12)) for a, p in zip(labels, row, strict=True)}) for row in rows]


def judged(data: Data, found: Found) -> dict[str, Any]:
    """The numbers of a record: all between 0 and 1, but `log_loss`, the mean of -log p(right label) in nats."""
    labels, best = data.labels, [one.best for one in found.predictions]
    return {
        **data.task.metrics(labels, best),
        **Calibration.quality(found.predictions, labels, 1.0),
        **(abstention(labels, found.predictions, found.outside) if found.outside else {}),
        "predicted": dict(Counter(best).most_common(5)),
    }


def abstention(labels: Sequence[str], inside: Sequence[Prediction], outside: Sequence[Prediction]) -> dict[str, float]:
    """How well the best label's probability tells rows from those that have none of the labels.

    Returns:
        `outside_auroc`: the probability that a row has a higher one than a row outside, equal ones counted half.
        `accepted_right`: the share of the rows that are above the threshold and right, if at most 5 % of those outside are
        above it.
    """
    from sklearn.metrics import roc_auc_score

    sure, others = ([max(one.probabilities.values()) for one in some] for some in (inside, outside))
    threshold = sorted(others, reverse=True)[math.floor(_PASSING * len(others))]
    right = [one.best == label and p > threshold for one, label, p in zip(inside, labels, sure, strict=True)]
    return {
        "outside_auroc": float(roc_auc_score([1] * len(sure) + [0] * len(others), [*sure, *others])),
        "accepted_right": sum(right) / len(right),
    }
