"""Heads that learn from rows without labels: `self_train`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.special import log_softmax

from ia3.opinions.head import USUAL_SURENESS, Head, fit_head, sureness_of, weights_of


@dataclass(frozen=True, eq=False)
class Examples:
    """What a head reads.

    Attributes:
        states: (N + M, places, width), of N labelled rows and M more examples, which are never held out.
        labels: N + M of them.
        pool: (P, places, width), of rows without labels.
        class_weight: as of `fit_head`.
    """

    states: np.ndarray
    labels: Sequence[str]
    pool: np.ndarray
    class_weight: Mapping[str, float] = field(default_factory=dict)

    def known(self, rows: np.ndarray) -> np.ndarray:
        """Those of some examples that it has: another opinion may have more."""
        return rows[rows < len(self.labels)]

    def of(self, places: Sequence[int], rows: np.ndarray, pseudo: Mapping[int, str]) -> tuple[np.ndarray, list[str]]:
        """States and labels of some labelled rows, and of rows of the pool with the labels that they are taken to have."""
        states = np.concatenate([self.states[rows], self.pool[[*pseudo]]])[:, list(places)]
        return states, [*(str(self.labels[row]) for row in rows), *pseudo.values()]


def self_train(
    examples: Mapping[str, Examples], heads: Mapping[str, Head], weights: Mapping[str, float], folds: Sequence[int]
) -> tuple[dict[str, Head], dict[str, np.ndarray]]:
    """Heads that learn also from rows of a pool, with the labels that the heads together give to these.

    Of each label the surest rows are taken, as many as it has training rows that can be held out. Cross-validation repeats all of it without each
    fold in turn, on the places that the heads have already: what it finds can be compared with what heads have without a pool.

    Args:
        examples: opinion → what its head reads.
        heads: opinion → its head, which has learned without the pool.
        weights: opinion → how much its head counts in the labels that the pool is given.
        folds: the fold of each of N + M examples, from 0, -1 for one that is never held out.

    Returns:
        Opinion → its head; opinion → held-out log-probabilities (N, labels), labels in alphabetical order.
    """
    fold_of = np.asarray(folds)
    measured = np.flatnonzero(fold_of >= 0)
    held_out = {name: np.zeros((len(measured), len(head.labels))) for name, head in heads.items()}
    for fold in np.unique(fold_of[measured]):
        made = _learned(examples, heads, weights, np.flatnonzero(fold_of != fold), measured)
        rows = np.flatnonzero(fold_of == fold)
        for name, head in made.items():
            held_out[name][fold_of[measured] == fold] = head.log_probs(examples[name].states[rows])
    found = {}
    for name, head in _learned(examples, heads, weights, np.arange(len(fold_of)), measured).items():
        y = [head.labels.index(examples[name].labels[row]) for row in measured.tolist()]
        each = weights_of(examples[name].class_weight, head.labels)
        factor = sureness_of(held_out[name] / USUAL_SURENESS, np.array(y), each) / USUAL_SURENESS
        held_out[name] = log_softmax(held_out[name] * factor, axis=1)
        found[name] = replace(head, weight=head.weight * np.float32(factor), bias=head.bias * np.float32(factor))
    return found, held_out


def _learned(
    examples: Mapping[str, Examples],
    heads: Mapping[str, Head],
    weights: Mapping[str, float],
    rows: np.ndarray,
    measured: np.ndarray,
) -> dict[str, Head]:
    """Heads on some of the examples, and on the rows of the pool that they label most surely, of each label as many as there are
    among the examples that are held out in turn."""
    first = {name: _fitted(its, heads[name], its.known(rows), {}) for name, its in examples.items()}
    labels = next(iter(first.values())).labels
    said = sum(weights[name] * head.log_probs(examples[name].pool) for name, head in first.items())
    some = next(iter(examples.values()))
    counts = Counter(some.labels[row] for row in np.intersect1d(rows, measured))
    pseudo: dict[int, str] = {}
    best = np.argmax(said, axis=1)
    said = log_softmax(said, axis=1)
    for place, label in enumerate(labels):
        mine = np.flatnonzero(best == place)
        surest = mine[np.argsort(-said[mine, place], kind="stable")][: counts[label]]
        pseudo |= dict.fromkeys(surest.tolist(), label)
    return {name: _fitted(its, heads[name], its.known(rows), pseudo) for name, its in examples.items()}


def _fitted(examples: Examples, head: Head, rows: np.ndarray, pseudo: Mapping[int, str]) -> Head:
    """A head on the places of another one."""
    made, _ = fit_head(*examples.of(head.places, rows, pseudo), class_weight=examples.class_weight)
    places = tuple(head.places[place] for place in made.places)
    made = replace(made, places=places, of=head.of)
    if made.labels == head.labels:
        return made
    # A label whose only row is held out: as improbable as `fit_head` would have it.
    weight = np.zeros((len(head.labels), *made.weight.shape[1:]), np.float32)
    bias = np.full(len(head.labels), made.bias.min() - np.log(len(rows) + 1), np.float32)
    known = [head.labels.index(label) for label in made.labels]
    weight[known], bias[known] = made.weight, made.bias
    return replace(made, labels=head.labels, weight=weight, bias=bias)
