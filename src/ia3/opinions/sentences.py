"""What a sentence encoder makes of rows, for a head on its embeddings: `Sentences`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ia3.adapter.pretrained import SENTENCE_MODEL, find_base, load_base, reads_sentences, sentence_folder
from ia3.errors import InputError, about, brief
from ia3.scoring.question import Question
from ia3.scoring.scorer import Scorer
from ia3.task.template import Row, as_text, is_missing
from ia3.task.wording import Wording

# Texts between two reports of progress.
_AT_ONCE = 256


class Sentences:
    """A frozen sentence encoder. It is loaded when it is first asked, and once in a process.

    >>> Sentences("minilm").embeddings(["Lovely tea.", "The invoice is wrong."]).shape
    (2, 1, 384)

    Args:
        name: as `load_base` takes it.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def found(cls, name: str) -> Sentences | None:
        """The encoder that a recipe names.

        Args:
            name: "auto": the one that is installed, or None; "none": None; otherwise as `load_base` takes it.

        Raises:
            InputError: no such model, or one that is no sentence encoder.
        """
        if name == "none":
            return None
        if name == "auto":
            # Its name, unless a folder here is called so.
            return None if sentence_folder() is None else cls(find_base(SENTENCE_MODEL)[0])
        if not reads_sentences(name):
            raise InputError(f"Expected a sentence encoder, found {brief(name)}", "use minilm; see", argument="encoder")
        return cls(find_base(name)[0])

    def embeddings(self, texts: Sequence[str], on_progress: Callable[[list[int]], Any] | None = None) -> np.ndarray:
        """Embeddings of N texts, of length 1: float32 (N, 1, width), as heads read them (`Head`).

        The end of a text that is longer than the encoder reads is left out, as sentence-transformers does.

        Args:
            texts: N of them.
            on_progress: called with the indices of the texts that are done.
        """
        scorer = _scorer(self.name)
        limit = scorer.max_length
        options: dict[str, Any] = {} if limit is None else {"truncation": True, "max_length": limit}
        if not texts:
            raise InputError("Expected texts to embed, found none.")
        found = []
        for start in range(0, len(texts), _AT_ONCE):
            some = list(texts[start : start + _AT_ONCE])
            tokens: Any = scorer.tokenizer(some, **options)["input_ids"]
            found.append(scorer.embeddings([Question(ids, [[0]]) for ids in tokens]).numpy())
            if on_progress is not None:
                on_progress([*range(start, start + len(some))])
        return np.concatenate(found)[:, None]


def sentence_of(wording: Wording) -> str:
    """What an encoder reads of a row: the columns that its template names, a line each, without the template's words."""
    return sentence(wording.row, wording.template.columns) or wording.prompt


def sentence(row: Row, columns: Iterable[str]) -> str:
    """Some columns of a row, a line each; empty cells are left out."""
    cells = (row.get(name) for name in columns)
    return "\n".join(as_text(cell) for cell in cells if not is_missing(cell))


@functools.lru_cache(maxsize=2)
def _scorer(name: str) -> Scorer:
    with about(f"The sentence encoder {brief(name)}"):
        # Its own head is not asked.
        return Scorer(*load_base(name, labels=[""]))
