"""Scores without the answers' own frequency: `Balance` (Zhao et al. 2021, arXiv:2102.09690; Zhou et al. 2024, arXiv:2309.17249)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ia3.opinions.priors import shares_of
from ia3.task.template import Row, columns_of

if TYPE_CHECKING:
    from ia3.evaluation.prediction import Prediction
    from ia3.task.task import Task

# The strength of the penalty on shifts, divided by the number of rows: few rows give no large shifts.
_PENALTY = 0.1

# Rows that a balance is estimated on, at most.
_MOST_ROWS = 256


def shift_of(scores: np.ndarray, prior: np.ndarray | None = None, weights: np.ndarray | None = None) -> np.ndarray:
    """What to add to each answer's score, so that on average each has its prior probability.

    The mean over rows of softmax(scores + shift) is the prior. A model prefers some answers whatever it reads; the shift
    removes that, and what it says about a row remains. It needs no labels. The shift is the minimum of a convex function,
    mean log Σ exp(scores + shift) - prior · shift, plus a small penalty, which decides where there are few rows.

    Args:
        scores: (N, K), log-probabilities up to a constant in each row.
        prior: (K,), positive, the sum is 1; None: the same for all.
        weights: (N,), how much each row counts in the mean; None: all the same.

    Returns:
        (K,), whose mean is 0.
    """
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    count, answers = scores.shape
    wanted = np.full(answers, 1 / answers) if prior is None else prior
    rows = log_softmax(scores, axis=1)
    share = np.full(count, 1 / count) if weights is None else weights / weights.sum()
    strength = _PENALTY / count

    def function(shift: np.ndarray) -> tuple[float, np.ndarray]:
        # By hand: scipy's logsumexp takes most of the time where there are few rows, and a search asks thousands of times.
        moved = rows + shift
        most = moved.max(axis=1, keepdims=True)
        parts = np.exp(moved - most)
        total = parts.sum(axis=1, keepdims=True)
        value = share @ (np.log(total) + most)[:, 0] - wanted @ shift + strength / 2 * shift @ shift
        return float(value), share @ (parts / total) - wanted + strength * shift

    start = -rows.mean(axis=0)
    found = minimize(function, start - start.mean(), jac=True, method="L-BFGS-B").x
    return found - found.mean()


@dataclass(frozen=True)
class Balance:
    """What to add to each label's score.

        balance = Balance.fit(predict(model, tokenizer, task, rows), [task.label(row) for row in rows])
        balance.balanced(predict(model, tokenizer, task, others))

    Attributes:
        shift: label → number; the mean is 0.
    """

    shift: Mapping[str, float]

    @classmethod
    def fit(cls, predictions: Sequence[Prediction], labels: Sequence[str] = ()) -> Balance:
        """Estimate the balance on N rows, which must not be those that it is measured on.

        Args:
            predictions: N predictions of one task whose answers are the same for all rows.
            labels: N labels, whose shares the balanced predictions have on average; none: the same share for each.
        """
        names = list(predictions[0].scores)
        prior = np.array([*shares_of(labels, names).values()])
        scores = np.array([[prediction.scores[name] for name in names] for prediction in predictions])
        return cls(dict(zip(names, shift_of(scores, prior).tolist(), strict=True)))

    def balanced(self, predictions: Sequence[Prediction]) -> list[Prediction]:
        """The predictions from shifted scores; the scores that they keep are shifted as well."""
        return [
            type(one).of({label: score + self.shift[label] for label, score in one.scores.items()}, costs=one.costs)
            for one in predictions
        ]


def can_balance(task: Task, template: int = 0) -> bool:
    """Whether all rows have the same answers in a template. Others have no frequency that rows could show."""
    choices = task.choices_of(template)
    return isinstance(choices, dict) and not columns_of(choices)


def balancing_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows to estimate a balance on: all of a few, some of many."""
    return random.Random(0).sample(rows, _MOST_ROWS) if len(rows) > _MOST_ROWS else list(rows)
