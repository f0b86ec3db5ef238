"""How frequent labels are where predictions are made: `shares_of`, `estimated_prior`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy.special import log_softmax

from ia3.errors import InputError, brief, shown, similar

BALANCED = "balanced"

_ROUNDS, _CHANGE = 200, 1e-6


def shares_of(labels: Iterable[str] | Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The share of each name among labels, or in their counts, as if each had been there once more: none is impossible."""
    counts = Counter(labels)
    total = sum(counts[name] for name in names) + len(names)
    return {name: (counts[name] + 1) / total for name in names}


def weighted_shares(labels: Sequence[str], weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """`shares_of` labels of which some count more; `weights` are those of `class_weights`."""
    return shares_of({name: count * weights.get(name, 1.0) for name, count in Counter(labels).items()}, names)


def prior_of(text: str, names: Sequence[str]) -> dict[str, float]:
    """Shares as people write them: "balanced", or "spam=0.1,other=0.9"; a label that is left out shares what is left.

    Raises:
        InputError: an unknown label, no number above 0, or a sum that is not 1.
    """
    if text == BALANCED:
        return dict.fromkeys(names, 1 / len(names))
    found: dict[str, float] = {}
    for part in text.split(","):
        label, _, share = part.rpartition("=")
        label = label.strip()
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if label not in names:
            raise InputError(
                f"Expected label=share with the labels {shown(names, 20)}, found {brief(part)}",
                f"{similar(label, names)}; see",
                argument="prior",
            )
        if not 0 < value < 1 or label in found:
            raise InputError(
                f"Expected one share between 0 and 1 for each label, found {brief(part)}", argument="prior"
            )
        found[label] = value
    left, rest = 1 - math.fsum(found.values()), [name for name in names if name not in found]
    if abs(left) > 1e-6 if not rest else left <= 0:
        raise InputError(
            f"Expected shares that add up to {'less than 1' if rest else '1'}, found {math.fsum(found.values()):g}",
            "the labels without a share divide the rest; see" if rest else "",
            argument="prior",
        )
    return {name: found.get(name, left / max(len(rest), 1)) for name in names}


def estimated_prior(log_probs: np.ndarray, seen: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The shares of labels among rows without labels, from what a model says to each (Saerens et al. 2002).

    Expectation maximization: p(label | row) is moved to the present estimate, whose next value is the mean over rows.

    Args:
        log_probs: (N, K), by a model that has seen the labels with the shares `seen`.
        seen: label → share.
        names: the labels of the K columns.
    """
    before = np.log([seen[name] for name in names])
    # One row more of each label, as in `shares_of`: a label that nobody has found yet is not impossible.
    prior = np.exp(before)
    for _ in range(_ROUNDS):
        rows = np.exp(log_softmax(log_probs + np.log(prior) - before, axis=1))
        found = (rows.sum(axis=0) + 1) / (len(rows) + len(names))
        if np.abs(found - prior).max() < _CHANGE:
            break
        prior = found
    return dict(zip(names, (found / found.sum()).tolist(), strict=True))
