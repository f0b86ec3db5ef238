"""A linear classifier on what the frozen model's layers hold of a question: `Head`, `fit_head`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from ia3.errors import InputError, brief, excerpt

_STRENGTH = 10.0
"""Inverse strength of the penalty, scikit-learn's `C`, on features of length 1 on average."""

_BEST = 5
"""How many places a head reads. One is chosen by luck; the average of some is surer than the best of them."""

# Places that are tried: fewer, where each takes longer to fit (rows · labels).
_TRIED = ((5_000, 32), (50_000, 16), (500_000, 8))

# What a place's answers are multiplied by, and from where they are pulled: an average of answers is less sure than each.
_SURENESS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
_USUAL, _SPREAD = 1.4, 0.7


@dataclass(frozen=True)
class Head:
    """A linear classifier on hidden states of some places.

    >>> head, _ = fit_head(scorer.states(questions).numpy(), labels)
    >>> head.log_probs(scorer.states(others).numpy())

    Attributes:
        labels: K of them.
        places: which of a question's states it reads, as `Scorer.states` lists them.
        weight: float32 (K, places, width), on the states as they are.
        bias: float32 (K,).
        of: how many places the model has.
    """

    labels: tuple[str, ...]
    places: tuple[int, ...]
    weight: np.ndarray
    bias: np.ndarray
    of: int

    def log_probs(self, states: np.ndarray) -> np.ndarray:
        """The log-probability of each label: (N, K), for states (N, places of the model, width).

        Raises:
            InputError: states of another model.
        """
        if states.shape[1:] != (self.of, self.weight.shape[-1]):
            found, expected = (
                f"{places} places of width {width}"
                for places, width in (states.shape[1:], (self.of, self.weight.shape[-1]))
            )
            raise InputError(f"Expected hidden states of {expected}, on which the head was fitted, found {found}.")
        some = states[:, list(self.places)].astype(np.float64)
        return log_softmax(np.einsum("npd,kpd->nk", some, self.weight.astype(np.float64)) + self.bias, axis=1)

    def to_bytes(self) -> bytes:
        """The content of a safetensors file that `from_bytes` reads."""
        from safetensors.numpy import save

        described = {"labels": list(self.labels), "places": list(self.places), "of": self.of}
        return save({"weight": self.weight, "bias": self.bias}, {"ia3_head": json.dumps(described, ensure_ascii=False)})

    @classmethod
    def from_bytes(cls, data: bytes, path: str | Path) -> Head:
        """The head in the content of `path`. Raises `InputError` for a damaged file."""
        from safetensors.numpy import load

        try:
            size = int.from_bytes(data[:8], "little")
            described = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["ia3_head"])
            tensors = load(data)
            head = cls(
                tuple(map(str, described["labels"])),
                tuple(map(int, described["places"])),
                tensors["weight"].astype(np.float32),
                tensors["bias"].astype(np.float32),
                int(described["of"]),
            )
            labels, places, _ = head.weight.shape
            whole = (labels, places) == (len(head.labels), len(head.places)) and head.bias.shape == (labels,)
            if not whole or not all(0 <= place < head.of for place in head.places):
                raise ValueError("its parts do not fit together")
            if not (np.isfinite(head.weight).all() and np.isfinite(head.bias).all()):
                raise ValueError("it has numbers that are not finite")
        except Exception as error:
            raise InputError(f"Cannot read {excerpt(str(path))} as a head: {brief(str(error))}; train anew.") from error
        return head


def fit_head(
    states: np.ndarray, labels: Sequence[str], folds: Sequence[int] | None = None
) -> tuple[Head, np.ndarray | None]:
    """Fit logistic regressions on single places, and make one head of those that answer best in cross-validation.

    A place's features are standardized on the rows and divided by the square root of their number. The head's
    log-probabilities are those of the best places, averaged, times a number that cross-validation finds: the average of
    linear classifiers is linear too.

    Args:
        states: (N, places, width), as `Scorer.states` gives them.
        labels: the label of each row, of at least two.
        folds: the fold of each row, from 0 (see `fold_of_each`); None: no cross-validation, and places at even distances.

    Returns:
        The head; and with folds what held-out rows were given, log-probabilities (N, K) by regressions, places and a
        number that were chosen without them. Its labels are in alphabetical order.
    """
    names = sorted(set(labels))
    y = np.array([names.index(label) for label in labels])
    states = states.astype(np.float64)
    step = -(-states.shape[1] // next((most for work, most in _TRIED if len(y) * len(names) <= work), 4))
    # From the last layers on, which are close to the answer.
    tried = list(range(states.shape[1] - 1, -1, -step))[::-1]
    if folds is None:
        chosen, sureness, held_out = tried[:: max(1, len(tried) // _BEST)][-_BEST:], _USUAL, None
    else:
        of_each = np.asarray(folds)
        found = np.stack([_held_out(states[:, place], y, len(names), of_each) for place in tried])
        losses = -found[:, np.arange(len(y)), y]
        held_out = np.zeros(found.shape[1:])
        for fold in np.unique(of_each):
            others = of_each != fold
            held_out[~others] = found[_best(losses[:, others])][:, ~others].mean(0)
        sureness = _sureness(held_out, y)
        held_out = log_softmax(held_out * sureness, axis=1)
        chosen = [tried[index] for index in sorted(_best(losses))]
    fitted = [_fit(states[:, place], y, len(names)) for place in chosen]
    weight = np.stack([weight for weight, _ in fitted], axis=1) * sureness / len(chosen)
    bias = np.stack([bias for _, bias in fitted]).sum(0) * sureness / len(chosen)
    head = Head(tuple(names), tuple(chosen), weight.astype(np.float32), bias.astype(np.float32), of=states.shape[1])
    return head, held_out


def _best(losses: np.ndarray) -> np.ndarray:
    """The places with the lowest mean loss (places, rows)."""
    return np.argsort(losses.mean(1), kind="stable")[:_BEST]


def _fit(features: np.ndarray, y: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (K, width) and biases (K,) on features as they are; a label without rows gets none, and a low bias."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = features.mean(0), (features.std(0) + 1e-6) * np.sqrt(features.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of regressions that have not converged to the last digit
        model: Any = LogisticRegression(C=_STRENGTH, max_iter=200).fit((features - mean) / scale, y)
    weight, bias = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # scikit-learn has one row for two labels
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scale
    bias = bias - weight @ mean
    whole, low = np.zeros((count, features.shape[1])), np.full(count, bias.min() - np.log(len(y) + 1))
    whole[model.classes_], low[model.classes_] = weight, bias
    return whole, low


def _held_out(features: np.ndarray, y: np.ndarray, count: int, folds: np.ndarray) -> np.ndarray:
    """The log-probabilities (N, K) of each fold's rows by a regression on the others."""
    found = np.zeros((len(y), count))
    for fold in np.unique(folds):
        rest = folds != fold
        weight, bias = _fit(features[rest], y[rest], count)
        found[~rest] = log_softmax(features[~rest] @ weight.T + bias, axis=1)
    return found


def _sureness(log_probs: np.ndarray, y: np.ndarray) -> float:
    """The factor with the lowest loss on N rows, pulled to the usual one like one more row or so."""
    rows = np.arange(len(y))

    def loss(factor: float) -> float:
        pulled = (np.log(factor / _USUAL) / _SPREAD) ** 2 / 2
        return float(-log_softmax(log_probs * factor, axis=1)[rows, y].sum() + pulled)

    return min(_SURENESS, key=loss)
