"""Rows with several labels: heads that score labels one by one (`fit_label_sets`), and when a row has a label (`decide`)."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from ia3.opinions.head import Head, scale_of
from ia3.opinions.opinions import HEAD, SENTENCES, WORDS
from ia3.task.label_sets import indicators

# The strengths of the penalty that are tried, for features of length 1.
_PENALTIES = (0.03, 0.1, 0.3, 1.0)

# How much the first features count, in what proportion to the next ones: all combinations are tried. Sentences and words tell
# labels apart equally well; a model's hidden states add little to both.
_SCALES = {SENTENCES: (1.0,), WORDS: (0.25, 0.5, 1.0, 2.0), HEAD: (0.0, 0.1, 0.3, 1.0)}

# The most places that are tried: 12 with at most 400 rows, 6 with more.
_FEW, _TRIED = 400, (12, 6)

# The most rows that choose features and place: a regression takes the cube of their number.
_CHOOSING = 800

# Thresholds' bounds: half of the best F1 is no more, and no label is given to a row that hardly has it.
_HIGHEST, _LOWEST = 0.5, 0.02


class Decisions(NamedTuple):
    """How scores of labels become label sets.

    Attributes:
        weights: opinion → weight, of those that count.
        bias: what is added to the weighed sum; its sigmoid is a label's probability.
        thresholds: (K,), the probability from which on a row has the label.
    """

    weights: dict[str, float]
    bias: float
    thresholds: np.ndarray


def decide(held_out: Mapping[str, np.ndarray], y: np.ndarray) -> Decisions:
    """Weigh opinions, and find the thresholds with the best F1 of each label.

    Weights and bias are those of a logistic regression over all rows and labels. A label's threshold is half of the best F1
    that its probabilities let one expect, which is the optimum for calibrated probabilities (Lipton et al. 2014,
    arXiv:1402.1892): the harder a label is to tell, the sooner it is given. It needs no held-out row of each label, so that
    labels with few rows have a threshold, too.

    Args:
        held_out: opinion → scores (N, K) of rows that it was not formed on.
        y: (N, K), whether a row has a label; each value occurs.
    """
    from sklearn.linear_model import LogisticRegression

    names = list(held_out)
    while True:
        features = np.stack([held_out[name].ravel() for name in names], axis=1)
        spread = features.std(0) + 1e-12
        model = LogisticRegression(C=100.0, max_iter=1000).fit(features / spread, y.ravel())
        slopes = model.coef_[0] / spread
        if len(names) == 1 or (slopes > 0).all():
            break
        names = [name for name, slope in zip(names, slopes, strict=True) if slope > 0] or names[:1]
    slopes = np.clip(slopes, 1e-3, 100.0)
    weights, bias = dict(zip(names, slopes.tolist(), strict=True)), float(model.intercept_[0])
    probabilities = expit(sum(weight * held_out[name] for name, weight in weights.items()) + bias)
    return Decisions(weights, bias, np.clip(_best_expected(probabilities) / 2, _LOWEST, _HIGHEST))


def _best_expected(probabilities: np.ndarray) -> np.ndarray:
    """The best F1 of each label (K,) that probabilities (N, K) let one expect: of giving it to the n surest rows, for any n."""
    surest = -np.sort(-probabilities, axis=0)
    given = np.arange(1, len(surest) + 1)[:, None]
    return (2 * surest.cumsum(0) / (given + surest.sum(0))).max(0)


def fit_label_sets(
    states: Mapping[str, np.ndarray], label_sets: Sequence[Sequence[str]], groups: Sequence[str]
) -> tuple[dict[str, Head], np.ndarray]:
    """Fit heads that score labels one by one, by one ridge regression on the features of all of them.

    A ridge regression's predictions for rows that it was fitted without have a closed form, so each row is held out by itself:
    r / (1 - h), where r is its residual and h its leverage. How much features count, the penalty and the place of hidden states
    are those with the lowest log-loss of held-out rows.

    Args:
        states: opinion → (N, places, width), of `HEAD`, `SENTENCES` and `WORDS` those that are there.
        label_sets: N of them; at least two labels occur, and rows differ.
        groups: rows with the same one are duplicates, and held out together; at least two.

    Returns:
        Opinion → its head, of those that count equally: labels' scores are the sum of all. And scores (N, K) of held-out rows,
        their labels in alphabetical order.
    """
    names = sorted({label for its in label_sets for label in its})
    y = indicators(label_sets, names)
    same: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        same.setdefault(group, []).append(row)
    every = list(same.values())
    some = every[:: -(-len(y) // _CHOOSING)]
    place, scales = _chosen(states, y, some if len(some) > 1 else every)
    blocks = {name: _Block(states[name], place if name == HEAD else 0, name == HEAD) for name in scales}
    fitted = _fitted(_kernel(blocks, scales), y, every)
    heads, bias = {}, y.mean(0)
    for name, scale in scales.items():
        heads[name] = blocks[name].head(names, scale, fitted.dual, bias)
        bias = np.zeros(len(names))  # of all together
    return heads, fitted.held_out


def _chosen(
    states: Mapping[str, np.ndarray], y: np.ndarray, groups: Sequence[Sequence[int]]
) -> tuple[int, dict[str, float]]:
    """The place of hidden states, and how much the features of each opinion count, of those that do; by the rows of some groups."""
    rows = [row for group in groups for row in group]
    starts = np.cumsum([0, *map(len, groups)])
    y, groups = y[rows], [range(*bounds) for bounds in itertools.pairwise(starts)]
    blocks = {name: _Block(some[rows], 0) for name, some in states.items() if name != HEAD}
    place = 0
    if HEAD in states:
        count = states[HEAD].shape[1]
        step = -(-count // _TRIED[len(rows) > _FEW])
        tried = {place: _Block(states[HEAD][rows], place, standard=True) for place in range(0, count, step)}
        place = min(tried, key=lambda place: _fitted(tried[place].kernel, y, groups).loss)
        blocks[HEAD] = tried[place]
    kinds = [name for name in _SCALES if name in blocks]
    grid = itertools.product(*((1.0,) if name == kinds[0] else _SCALES[name] for name in kinds))
    all_scales = [dict(zip(kinds, scales, strict=True)) for scales in grid]
    best = min(all_scales, key=lambda scales: _fitted(_kernel(blocks, scales), y, groups).loss)
    return place, {name: scale for name, scale in best.items() if scale}


def _kernel(blocks: Mapping[str, _Block], scales: Mapping[str, float]) -> np.ndarray:
    return np.sum([scale * blocks[name].kernel for name, scale in scales.items()], axis=0)


class _Block:
    """The features of an opinion: states of one place, as they are or standardized, divided to be about of length 1."""

    def __init__(self, states: np.ndarray, place: int, standard: bool = False) -> None:
        self._of, self._place = states.shape[1], place
        features = states[:, place].astype(np.float64)
        self._mean, self._scale = features.mean(0), scale_of(features) if standard else np.ones(features.shape[1])
        self._features = (features - self._mean) / self._scale
        self.kernel = self._features @ self._features.T

    def head(self, names: Sequence[str], scale: float, dual: np.ndarray, bias: np.ndarray) -> Head:
        """The part of the regression on these features, as a head on the states as they are."""
        weight = scale * (self._features.T @ dual).T / self._scale
        bias = bias - weight @ self._mean
        return Head(
            tuple(names),
            (self._place,),
            weight.astype(np.float32)[:, None],
            bias.astype(np.float32),
            self._of,
            single=False,
        )


class _Fit(NamedTuple):
    """A ridge regression: the log-loss of held-out rows, their scores (N, K), and its dual coefficients (N, K)."""

    loss: float
    held_out: np.ndarray
    dual: np.ndarray


def _fitted(kernel: np.ndarray, y: np.ndarray, groups: Sequence[Sequence[int]]) -> _Fit:
    """The regression with the best penalty.

    Args:
        kernel: (N, N), of features whose mean is 0.
        y: (N, K).
        groups: the indices of rows that are held out together.
    """
    count, shares = len(y), y.mean(0)
    values, vectors = np.linalg.eigh(kernel)
    values, turned = np.maximum(values, 0.0), vectors.T @ (y - shares)
    squares = vectors**2
    best = None
    for penalty in _PENALTIES:
        # The hat matrix, vectors · kept · vectorsᵀ + 1/N, is too large to have in whole.
        kept = values / (values + penalty)
        residuals = y - shares - vectors @ (kept[:, None] * turned)
        held_out = y - residuals / (1 - 1 / count - squares @ kept)[:, None]
        for some in (group for group in groups if len(group) > 1):
            its = vectors[some]
            part = np.eye(len(some)) - 1 / count - (its * kept) @ its.T
            held_out[some] = y[some] - np.linalg.solve(part, residuals[some])
        loss = _log_loss(held_out, y)
        if best is None or loss < best.loss:
            best = _Fit(loss, held_out, vectors @ (turned / (values + penalty)[:, None]))
    assert best is not None
    return best


def _log_loss(scores: np.ndarray, y: np.ndarray) -> float:
    """The log-loss of the labels' probabilities (N, K), when a logistic regression makes them of scores."""
    from sklearn.linear_model import LogisticRegression

    if y.min() == y.max():  # some rows of many, of which none has a label
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of regressions that have not converged to the last digit
        model = LogisticRegression(C=100.0).fit(scores.reshape(-1, 1), y.ravel())
    logits = model.decision_function(scores.reshape(-1, 1))
    return float(np.logaddexp(0.0, (1 - 2 * y.ravel()) * logits).mean())
