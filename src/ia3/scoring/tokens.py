"""Texts as token ids: one that goes on, and one that continues another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ia3.errors import InputError

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


def chat_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of prompts as a user's messages, up to where the assistant's answer begins.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            "Expected a model with a chat template, such as an instruct model, found none",
            "take another model, or leave out",
            argument="chat",
        )
    texts = [_chat(tokenizer, [{"role": "user", "content": prompt}], True) for prompt in prompts]
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []  # type: ignore[return-value]


def closing_token(tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> int:
    """The token that ends an answer: the end of a text, or in a chat what the template puts behind the assistant's message.

    Raises:
        InputError: the tokenizer has no such token.
    """
    if chat:
        asked = [{"role": "user", "content": "?"}]
        said = _chat(tokenizer, [*asked, {"role": "assistant", "content": "!"}])
        before, behind, closing = said.removeprefix(_chat(tokenizer, asked, True)).partition("!")
        first: list[int] = tokenizer(closing, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
        if behind and not before.strip() and first:
            return first[0]
    if not isinstance(tokenizer.eos_token_id, int):
        raise InputError("Expected a tokenizer with an end-of-text token, found none; set its eos_token.")
    return tokenizer.eos_token_id


def _chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], asks: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id to fill places with that nothing attends to."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0


def question_lengths(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    tokens: Sequence[list[int]],
    texts: Sequence[str],
    tokens_of: Callable[[Sequence[str]], list[list[int]]],
) -> list[int]:
    """How many of each prompt's last tokens are of its question: those behind the tokens that its text alone begins with.

    A token that a tokenizer makes of the text's end and the question's beginning is the question's.

    Args:
        tokenizer: the model's.
        prompts: N texts.
        tokens: those of each.
        texts: with which they begin, before the question; "" where the question stands first.
        tokens_of: a text's tokens, as the prompts'.

    Returns:
        N numbers; 0 where the question stands first.
    """
    found = [0] * len(prompts)
    some = [i for i, text in enumerate(texts) if text]
    for i, alone in zip(some, tokens_of([texts[i] for i in some]), strict=True):
        alone, whole = unclosed(tokenizer, alone, texts[i]), unclosed(tokenizer, tokens[i], prompts[i])
        pairs = enumerate(zip(alone, whole, strict=False))
        common = next((place for place, (a, b) in pairs if a != b), min(len(alone), len(whole)))
        found[i] = max(len(whole) - common, 1)
    return found
