"""Texts as token ids: one that goes on, and one that continues another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def unclosed(tokenizer: PreTrainedTokenizerBase, tokens: list[int], text: str) -> list[int]:
    """A text's tokens without the one that a tokenizer closes every text with: here the text goes on."""
    closed = len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token))
    return tokens[:-1] if closed else tokens


def continuations(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts, each of which continues another one."""
    if not texts:
        return []
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    spaced = [i for i, text in enumerate(texts) if text[:1].isspace()]
    if not spaced:
        return found
    # SentencePiece puts a space of its own in front of every text: behind a word the given white space is enough.
    word: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    behind: Any = tokenizer(["a" + texts[i] for i in spaced], add_special_tokens=False)["input_ids"]
    for i, both in zip(spaced, behind, strict=True):
        if word and both[: len(word)] == word:
            found[i] = both[len(word) :]
    return found


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id to fill places with that nothing attends to."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
