"""A linear classifier on what the frozen model's layers hold of a question: `Head`, `fit_head`."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from ia3.errors import InputError, brief, excerpt

_STRENGTH = 10.0
"""Inverse strength of the penalty, scikit-learn's `C`, on features of length 1 on average."""

# A feature's standard deviation, in parts of the median one, is taken to be no smaller.
_LEAST_SPREAD = 0.1

_BEST = 5
"""How many places a head reads. One is chosen by luck; the average of some is surer than the best of them."""

# Rows times labels, up to which so many places are tried: a place takes longer to fit with more of them.
_TRIED = ((5_000, 32), (50_000, 16), (500_000, 8))

# What a place's answers are multiplied by, and from where they are pulled: an average of answers is less sure than each.
_SURENESS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
USUAL_SURENESS, _SPREAD = 1.4, 0.7


@dataclass(frozen=True, eq=False)
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
        single: each row has one label, so that scores become log-probabilities of all labels; otherwise labels are scored
            one by one, for rows that have several (`fit_label_sets`).
    """

    labels: tuple[str, ...]
    places: tuple[int, ...]
    weight: np.ndarray
    bias: np.ndarray
    of: int
    single: bool = True

    def log_probs(self, states: np.ndarray) -> np.ndarray:
        """The log-probability of each label: (N, K), for states (N, places of the model, width); see `scores`."""
        return log_softmax(self.scores(states), axis=1)

    def scores(self, states: np.ndarray) -> np.ndarray:
        """The score of each label: (N, K), for states (N, places of the model, width).

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
        return np.einsum("npd,kpd->nk", some, self.weight.astype(np.float64)) + self.bias

    def said(self, row: np.ndarray) -> dict[str, float]:
        """Label → log-probability, or score where rows have several, for one row's states (places of the model, width)."""
        found = (self.log_probs if self.single else self.scores)(row[None])
        return dict(zip(self.labels, found[0].tolist(), strict=True))

    def to_bytes(self) -> bytes:
        """The content of a safetensors file that `from_bytes` reads."""
        from safetensors.numpy import save

        described = {"labels": list(self.labels), "places": list(self.places), "of": self.of}
        described |= {} if self.single else {"single": False}
        # The library writes an array's memory, whatever its strides.
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in ("weight", "bias")}
        return save(tensors, {"ia3_head": json.dumps(described, ensure_ascii=False)})

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
                bool(described.get("single", True)),
            )
            labels, places, _ = head.weight.shape
            whole = (labels, places) == (len(head.labels), len(head.places)) and head.bias.shape == (labels,)
            if len(head.labels) < 2:
                raise ValueError("it has fewer than two labels")
            if not whole or not all(0 <= place < head.of for place in head.places):
                raise ValueError("its parts do not fit together")
            if not (np.isfinite(head.weight).all() and np.isfinite(head.bias).all()):
                raise ValueError("it has numbers that are not finite")
        except Exception as error:
            raise InputError(f"Cannot read {excerpt(str(path))} as a head: {brief(str(error))}; train anew.") from error
        return head


def fit_head(
    states: np.ndarray,
    labels: Sequence[str],
    folds: Sequence[int] | None = None,
    class_weight: Mapping[str, float] | None = None,
) -> tuple[Head, np.ndarray | None]:
    """Fit logistic regressions on single places, and make one head of those that answer best in cross-validation.

    A place's features are standardized on the rows and divided by the square root of their number. The head's
    log-probabilities are those of the best places, averaged, times a number that cross-validation finds: the average of
    linear classifiers is linear too.

    Args:
        states: (N, places, width), as `Scorer.states` gives them.
        labels: the label of each row, of at least two.
        folds: the fold of each row, from 0 (see `fold_of_each`), -1 for a row that is never held out; None: no
            cross-validation.
        class_weight: label → how much each of its rows counts, as scikit-learn's; None or empty: all the same.

    Returns:
        The head; and with folds what the rows that are held out are given, log-probabilities (rows, K): regressions and
        places were chosen without them. Without folds, or with two, places are taken at even distances. Labels are in
        alphabetical order.
    """
    names = sorted(set(labels))
    y = np.array([names.index(label) for label in labels])
    weights = weights_of(class_weight, names)
    step = -(-states.shape[1] // next((most for work, most in _TRIED if len(y) * len(names) <= work), 4))
    # From the last layer on, which is closest to the answer.
    tried = list(range(states.shape[1] - 1, -1, -step))[::-1]
    features = [_Features(states[:, place]) for place in tried]
    even = list(range(0, len(tried), max(1, len(tried) // _BEST)))[-_BEST:]
    chosen, sureness, held_out = even, USUAL_SURENESS, None
    if folds is not None:
        fold_of = np.asarray(folds)
        held_out, chosen = _held_out(features, y, weights, fold_of, even)
        held_out = held_out[fold_of >= 0]
        sureness = sureness_of(held_out, y[fold_of >= 0], weights)
        held_out = log_softmax(held_out * sureness, axis=1)
    fitted = [features[index].classifier(y, weights) for index in chosen]
    weight = np.stack([weight for weight, _ in fitted], axis=1) * sureness / len(chosen)
    bias = np.stack([bias for _, bias in fitted]).sum(0) * sureness / len(chosen)
    places = tuple(tried[index] for index in chosen)
    head = Head(tuple(names), places, weight.astype(np.float32), bias.astype(np.float32), states.shape[1])
    return head, held_out


def scale_of(states: np.ndarray) -> np.ndarray:
    """What to divide each feature of states (N, width) by, so that it is standardized and a row's length is about 1: (width,)."""
    spread = states.std(0)
    # Of two rows a feature may be the same by chance, and is not in others.
    spread = np.maximum(spread, _LEAST_SPREAD * np.median(spread)) + 1e-6
    return spread * np.sqrt(states.shape[1])


class _Features:
    """A place's hidden states (N, width), standardized, and turned so that there are no more features than rows.

    A penalized regression is the same in any rotation of its features.
    """

    def __init__(self, states: np.ndarray) -> None:
        states = states.astype(np.float64)
        self._mean, self._scale = states.mean(0), scale_of(states)
        rotated, sizes, self._back = np.linalg.svd((states - self._mean) / self._scale, full_matrices=False)
        self.values = rotated * sizes

    def classifier(self, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights (K, width) and biases (K,) on the states as they are, of a regression on all rows."""
        weight, bias = _regression(self.values, y, weights)
        weight = weight @ self._back / self._scale
        return weight, bias - weight @ self._mean


def weights_of(class_weight: Mapping[str, float] | None, names: Sequence[str]) -> np.ndarray:
    """How much each row of some labels counts: (K,)."""
    return np.array([(class_weight or {}).get(name, 1.0) for name in names])


def regression(
    values: np.ndarray, y: np.ndarray, strength: float, iterations: int, class_weight: Mapping[int, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (K, features) and biases (K,) of a logistic regression, whose scores are one for each of K labels.

    Args:
        values: (N, features).
        y: (N,), the label of each row; there are at least two.
        strength: scikit-learn's `C`, the inverse strength of the penalty.
        iterations: the maximum.
        class_weight: how much a row of each label counts.
    """
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of regressions that have not converged to the last digit
        made = LogisticRegression(C=strength, class_weight={**class_weight}, max_iter=iterations)
        model: Any = made.fit(values, y)
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:  # scikit-learn has one row for two labels, the second against the first
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias


def _regression(values: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (K, features) and biases (K,); a label without rows gets no weights, and a low bias.

    `weights` (K,) are how much a row of each label counts.
    """
    count = len(weights)
    whole, low = np.zeros((count, values.shape[1])), np.zeros(count)
    labels = np.unique(y)
    if len(labels) > 1:
        each = {label: float(weights[label]) for label in labels.tolist()}
        whole[labels], low[labels] = regression(values, y, _STRENGTH, 200, each)
    low[np.setdiff1d(np.arange(count), labels)] = low.min() - np.log(len(y) + 1)
    return whole, low


def _held_out(
    features: Sequence[_Features], y: np.ndarray, weights: np.ndarray, folds: np.ndarray, even: list[int]
) -> tuple[np.ndarray, list[int]]:
    """The log-probabilities (N, K) of each fold's rows by regressions on the others, and the best places of all rows.

    A fold's places are those that answer best for each of the other folds without both: a choice that has seen the labels
    of a fold is too sure of it.
    """
    numbers = np.unique(folds[folds >= 0])
    rows, each = np.arange(len(y)), weights[y]

    def without(*left_out: int) -> np.ndarray:
        """The log-probabilities (places, N, K) by regressions on the rows of other folds."""
        rest = ~np.isin(folds, left_out)
        found = []
        for one in features:
            weight, bias = _regression(one.values[rest], y[rest], weights)
            found.append(log_softmax(one.values @ weight.T + bias, axis=1))
        return np.stack(found)

    by_fold = {fold: without(fold) for fold in numbers}
    if len(numbers) < 3 or len(features) <= _BEST:
        choices = dict.fromkeys(numbers, even)
        best = even
    else:
        losses = {fold: np.zeros((len(features), len(y))) for fold in numbers}
        for first, second in itertools.combinations(numbers, 2):
            found = -without(first, second)[:, rows, y] * each
            losses[first][:, folds == second] = found[:, folds == second]
            losses[second][:, folds == first] = found[:, folds == first]
        choices = {fold: _best(losses[fold][:, (folds != fold) & (folds >= 0)]) for fold in numbers}
        best = _best(np.sum([-by_fold[fold][:, rows, y] * each * (folds == fold) for fold in numbers], axis=0))
    held_out = np.zeros((len(y), len(weights)))
    for fold in numbers:
        held_out[folds == fold] = by_fold[fold][choices[fold]].mean(0)[folds == fold]
    return held_out, best


def _best(losses: np.ndarray) -> list[int]:
    """The places with the lowest mean loss (places, rows), in order."""
    return sorted(np.argsort(losses.mean(1), kind="stable")[:_BEST].tolist())


def sureness_of(log_probs: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """The factor of log-probabilities (N, K) with the lowest loss on N rows, pulled to the usual one like one more row or so; a
    label's rows count as `weights` (K,) say."""
    rows = np.arange(len(y))

    def loss(factor: float) -> float:
        pulled = (np.log(factor / USUAL_SURENESS) / _SPREAD) ** 2 / 2
        return float(-(log_softmax(log_probs * factor, axis=1)[rows, y] * weights[y]).sum() + pulled)

    return min(_SURENESS, key=loss)
