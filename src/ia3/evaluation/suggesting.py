"""Which rows without labels would teach most, once somebody labels them: `suggest`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import entr

from ia3.adapter.pretrained import load_base, reads_sentences
from ia3.errors import InputError
from ia3.evaluation.progress import Progress
from ia3.opinions.sentences import Sentences
from ia3.scoring.scorer import Scorer

# Of so many times the wanted number of rows, the most doubtful ones, those are taken that differ most.
_DOUBTFUL = 10


def suggest(embeddings: np.ndarray, count: int, probabilities: np.ndarray | None = None, seed: int = 0) -> list[int]:
    """The rows whose labels would teach most: those in doubt, and unlike each other (Zhdanov 2019, arXiv:1901.05954).

    Rows are put into as many clusters as are wanted, where doubtful ones count more. Each cluster gives the row nearest to its
    centre.

    >>> suggest(Sentences("minilm").embeddings(texts)[:, 0], 32)

    Args:
        embeddings: (N, width), alike for rows that are alike.
        count: how many rows are wanted.
        probabilities: (N, labels), by a classifier that was trained on a few rows; None: there is none yet, and all rows
            are equally in doubt. Doubt is their entropy.
        seed: of the clusters' first centres.

    Returns:
        Indices of rows; the one for the most doubt comes first.

    Raises:
        InputError: fewer rows than are wanted.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if not 1 <= count <= len(embeddings):
        raise InputError(f"Expected a count from 1 to the number of different rows, {len(embeddings)}, found {count}.")
    doubt = np.ones(len(embeddings)) if probabilities is None else entr(probabilities).sum(axis=1) + 1e-6
    some = np.argsort(-doubt, kind="stable")[: len(doubt) if probabilities is None else _DOUBTFUL * count]
    values, weights = embeddings[some].astype(np.float64), doubt[some]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of rows that are alike: fewer clusters than wanted
        clusters: Any = KMeans(count, random_state=seed).fit(values, sample_weight=weights)
    far = np.linalg.norm(values - clusters.cluster_centers_[clusters.labels_], axis=1)
    nearest = {
        int(cluster): members[np.argmin(far[members])]
        for cluster in np.unique(clusters.labels_)
        for members in [np.flatnonzero(clusters.labels_ == cluster)]
    }
    mass = np.bincount(clusters.labels_, weights=weights, minlength=count)
    found = [int(some[nearest[cluster]]) for cluster in sorted(nearest, key=lambda cluster: -mass[cluster])]
    rest = [row for row in some.tolist() if row not in {*found}] if len(found) < count else []
    return [*found, *rest[: count - len(found)]]


def embeddings_of(
    texts: Sequence[str], model: str, encoder: str = "auto", dtype: str = "auto", progress: Progress | None = None
) -> np.ndarray:
    """What tells which of N texts are alike, for `suggest`: (N, width).

    Args:
        texts: N of them.
        model: the base model, as `load_base` takes it.
        encoder: a sentence encoder, as `Sentences.found` takes it. Without one, the base model's states stand in.
        dtype: the type of the base model's weights.
        progress: shows the progress.
    """
    stage = (progress or Progress()).stage("Reading", len(texts))
    sentences = Sentences.found(encoder) or (Sentences(model) if reads_sentences(model) else None)
    if sentences is not None:
        return sentences.embeddings(texts, lambda done: stage.advance(len(done)))[:, 0]
    return states_as_embeddings(Scorer(*load_base(model, dtype=dtype)), texts, lambda done: stage.advance(len(done)))


def states_as_embeddings(
    scorer: Scorer, texts: Sequence[str], on_progress: Callable[[list[int]], Any] | None = None
) -> np.ndarray:
    """What a language model's middle layer holds of N texts, as embeddings (N, width), for want of a sentence encoder."""
    states = scorer.states(scorer.encode(texts, [["?"]] * len(texts)), on_progress).numpy()
    layers = states.shape[1] if scorer.family.has_encoder else states.shape[1] // 2
    middle = states[:, layers // 2]
    middle = (middle - middle.mean(0)) / (middle.std(0) + 1e-6)
    # A single text, or texts that are all alike, are the mean, whose length is 0.
    return middle / np.maximum(np.linalg.norm(middle, axis=1, keepdims=True), 1e-6)
