"""What words rows have, for a head on them: `Words`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Counters of n-grams: of a few hundred short texts hardly two n-grams that matter share one.
_WIDTH = 8192


class Words:
    """Counts of character n-grams within words, hashed: they need no vocabulary, and suit any script.

    >>> Words().embeddings(["Lovely tea.", "The invoice is wrong."]).shape
    (2, 1, 8192)
    """

    def embeddings(self, texts: Sequence[str], on_progress: Callable[[list[int]], Any] | None = None) -> np.ndarray:
        """Features of N texts, of length 1: float32 (N, 1, width), as heads read them (`Head`).

        Args:
            texts: N of them.
            on_progress: called with the indices of the texts that are done.
        """
        found = _vectorizer().transform(texts).toarray().astype(np.float32)
        if on_progress is not None:
            on_progress([*range(len(texts))])
        return found[:, None]


@functools.lru_cache(maxsize=1)
def _vectorizer() -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(analyzer="char_wb", ngram_range=(2, 5), n_features=_WIDTH)
