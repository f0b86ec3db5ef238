"""The head of a sentence encoder: a logistic regression on embeddings."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ia3.adapter.trained import TrainedModule
from ia3.opinions.head import regression
from ia3.scoring.family import frozen

if TYPE_CHECKING:
    from ia3.scoring.scorer import Scorer
    from ia3.training.examples import Example

# The inverse strengths of the penalty on weights that cross-validation chooses from, and the one where it cannot.
_STRENGTHS, _USUAL = (1.0, 10.0, 100.0, 1000.0), 10.0
_FOLDS, _ITERATIONS = 5, 300


def fill_head(scorer: Scorer, examples: Sequence[Example], name: str) -> None:
    """Fit a logistic regression on embeddings, and make it the head of an adapter.

    Cross-validation chooses its strength on the embeddings of the untrained encoder: vectors that were trained on the same
    labels make any strength look right.

    Args:
        scorer: the scorer of a sentence encoder.
        examples: at least one of each label; their first questions are asked.
        name: the adapter; without adapters, the head is the model's own.
    """
    questions = [example.questions[0] for example in examples]
    labels = np.array([question.choices[question.label][0] for question in questions])  # type: ignore[index]
    weights = dict(zip(labels.tolist(), (example.weight for example in examples), strict=True))
    with frozen(scorer.model):
        untrained = scorer.embeddings([replace(question, adapter=None) for question in questions]).numpy()
    strength = _chosen_strength(untrained, labels, weights)
    embeddings = scorer.embeddings(questions).numpy()
    weight, bias = map(torch.from_numpy, regression(embeddings, labels, strength, _ITERATIONS, weights))
    head = scorer.family.base.classifier
    if isinstance(head, TrainedModule):
        head = head.modules_to_save[name]
    with torch.no_grad():
        for parameter, value in zip(head.parameters(), (weight, bias), strict=True):
            parameter.copy_(value)


def _chosen_strength(embeddings: np.ndarray, labels: np.ndarray, weights: Mapping[int, float]) -> float:
    """The strength with the lowest log-loss on held-out rows; the usual one where each label has one row."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = min(_FOLDS, min(Counter(labels.tolist()).values()))
    if folds < 2:
        return _USUAL
    parts = StratifiedKFold(folds, shuffle=True, random_state=0)

    def loss(strength: float) -> float:
        model = LogisticRegression(C=strength, class_weight={**weights}, max_iter=_ITERATIONS)
        found: Any = cross_val_predict(model, embeddings, labels, cv=parts, method="predict_log_proba")
        each = [weights[label] for label in labels.tolist()]
        return -float(np.average(found[np.arange(len(labels)), labels], weights=each))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of regressions that have not converged to the last digit
        return min(_STRENGTHS, key=loss)
