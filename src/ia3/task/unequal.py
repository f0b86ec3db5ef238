"""Labels that do not count the same: how much a row of each counts in training, and what each mistake costs."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from ia3.errors import brief
from ia3.task.template import as_text

BALANCED: Literal["balanced"] = "balanced"

ClassWeight = Literal["balanced"] | dict[str, float]
"""As scikit-learn's `class_weight`: "balanced", or label → weight; a label that is left out has the weight 1."""

Costs = Mapping[str, Mapping[str, float]]
"""True label → label that is given → cost; a pair that is left out costs 1, a right label 0. Empty: all mistakes cost 1."""


def as_class_weight(value: Any) -> ClassWeight | None:
    """A class weight as people write it. Raises `ValueError` for anything but "balanced" or numbers above 0."""
    if value is None or value == BALANCED:
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"expected 'balanced' or label: weight, found {brief(value)}")
    return {
        as_text(label): _number(weight, f"for {brief(as_text(label))}", above=True) for label, weight in value.items()
    }


def as_costs(value: Any) -> dict[str, dict[str, float]]:
    """A matrix of costs as people write it. Raises `ValueError` for anything but numbers that are not negative."""
    if not isinstance(value, Mapping) or not all(isinstance(row, Mapping) for row in value.values()):
        raise ValueError(f"expected costs as truth: {{given: cost}}, found {brief(value)}")
    found: dict[str, dict[str, float]] = {}
    for truth, row in value.items():
        found[as_text(truth)] = its = {}
        for given, cost in row.items():
            its[as_text(given)] = _number(cost, f"for {brief(as_text(truth))} taken for {brief(as_text(given))}")
    return found


def _number(value: Any, what: str, above: bool = False) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0 or (above and not number):
        raise ValueError(f"expected a number {'above 0' if above else 'of 0 or more'} {what}, found {brief(value)}")
    return number


def class_weights(given: ClassWeight | None, labels: Iterable[str] | Mapping[str, float]) -> dict[str, float]:
    """Label → how much each of its rows counts, of labels that rows have; empty: all count the same.

    >>> class_weights("balanced", ["a", "a", "a", "b"])
    {'a': 0.6666666666666666, 'b': 2.0}

    "balanced" is scikit-learn's n / (k · n_label), for n rows of k labels. The mean over the rows is 1 for any class weight, so
    that only the weights' ratios count: neither the learning rate nor the penalty on a regression's weights changes.

    Args:
        given: as of a task.
        labels: of the rows, or their counts.
    """
    if given is None:
        return {}
    counts = {label: count for label, count in Counter(labels).items() if count > 0}
    total = sum(counts.values())
    if given == BALANCED:
        return {label: total / (len(counts) * count) for label, count in counts.items()}
    assert not isinstance(given, str)
    weights = {label: given.get(label, 1.0) for label in counts}
    mean = math.fsum(counts[label] * weight for label, weight in weights.items()) / total
    return {label: weight / mean for label, weight in weights.items()}


def cost_of(costs: Costs, truth: str, given: str) -> float:
    """What it costs to give a label to a row of another, or of the same one."""
    return costs.get(truth, {}).get(given, 0.0 if truth == given else 1.0)


def least_costly(probabilities: Mapping[str, float], costs: Costs) -> str:
    """The label with the least expected cost, Σ p(truth) · cost(truth, label): Bayes' decision.

    >>> least_costly({"fraud": 0.1, "fine": 0.9}, {"fraud": {"fine": 20}})
    'fraud'

    Without costs it is the most probable label. Of labels that cost the same it is the most probable one; of equally probable
    labels, the first in alphabetical order.
    """
    # A mistake costs 1; what is listed costs more or less than that. Few pairs may be listed, of many labels.
    parts = {label: [-p] for label, p in probabilities.items()}
    for truth, row in costs.items():
        for given, cost in row.items():
            if truth in parts and given in parts:
                parts[given].append(probabilities[truth] * (cost - cost_of({}, truth, given)))
    return min(parts, key=lambda label: (math.fsum(parts[label]), -probabilities[label], label))


def mean_cost(costs: Costs, labels: Sequence[str], predictions: Sequence[str]) -> float:
    """The mean cost of predictions for rows with these labels."""
    return statistics.fmean(cost_of(costs, *pair) for pair in zip(labels, predictions, strict=True))
