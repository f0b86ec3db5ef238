"""Prompts that fit a model's context, as tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ia3.errors import InputError, brief, shown
from ia3.scoring.tokens import continuations
from ia3.task import sandbox
from ia3.task.template import is_missing, items_of
from ia3.task.wording import Wording

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Tokens = list[int]

# A text with more characters for each token than these, and not short, counts as too long: no language has so many.
_CHARACTERS_A_TOKEN, _FEW_CHARACTERS = 16, 10_000

# Tokens of a character, as a first guess.
_DENSITY = 0.25

# So many characters are tokenized at once.
_TOGETHER = 1_000_000


@dataclass(frozen=True)
class Fitted:
    """A row's prompt, its tokens, and the column that was cut so that it fits; None: the row is whole."""

    prompt: str
    tokens: Tokens
    cut: str | None = None


def answer_lengths(tokenizer: PreTrainedTokenizerBase, wordings: Sequence[Wording]) -> list[int]:
    """The number of tokens of each row's longest answer.

    Raises:
        InputError: two answers of a row are the same tokens, which nothing can tell apart, or one has none.
    """
    lengths: dict[tuple[str, ...], int] = {}
    found = []
    for wording in wordings:
        separator, number = wording.separator, wording.number
        texts = tuple(separator + text for text in wording.answers.values())
        if texts not in lengths:
            sandbox.checkpoint()
            seen: dict[tuple[int, ...], str] = {}
            encoded = continuations(tokenizer, texts)
            for text, tokens in zip(wording.answers.values(), map(tuple, encoded), strict=True):
                if not tokens:
                    raise InputError(f"The answer {brief(text)} has no tokens in this model's tokenizer.", row=number)
                if tokens in seen:
                    raise InputError(
                        f"The answers {brief(seen[tokens], 80)} and {brief(text, 80)} are the same to this model's tokenizer",
                        "choose other words",
                        row=number,
                    )
                seen[tokens] = text
            lengths[texts] = max(map(len, seen))
        found.append(lengths[texts])
    return found


def most_characters(tokens: int) -> int:
    """A text of more characters than these counts as longer than so many tokens without being tokenized."""
    return max(_FEW_CHARACTERS, _CHARACTERS_A_TOKEN * tokens)


def fitted(
    wordings: Sequence[Wording],
    tokens_of: Callable[[Sequence[str]], list[Tokens]],
    rooms: Sequence[int] | None,
    long_prompts: str,
) -> list[Fitted]:
    """The rows' prompts, those that take more tokens than there is room for with a column cut short.

    Args:
        wordings: the rows.
        tokens_of: prompts' tokens.
        rooms: tokens of each prompt, at most; None: any number.
        long_prompts: "truncate", or "refuse" to cut.

    Raises:
        InputError: a row cannot be used, or is too long.
    """
    if rooms is None:
        whole = [wording.prompt for wording in wordings]
        return [Fitted(*pair) for pair in zip(whole, tokens_of(whole), strict=True)]
    prompts = [_prompt(wording, room) for wording, room in zip(wordings, rooms, strict=True)]
    found = []
    tokens = _tokens(tokens_of, prompts)
    for wording, prompt, its, room in zip(wordings, prompts, tokens, rooms, strict=True):
        # `Family.ask` knows what to say of answers that leave no room.
        if prompt is not None and its is not None and (len(its) <= room or room < 1):
            found.append(Fitted(prompt, its))
            continue
        if long_prompts == "refuse":
            size = f"one of more than {most_characters(room)} characters" if its is None else len(its)
            raise InputError(
                f"Expected prompts of at most {room} tokens, found {size}",
                "shorten the row, or let the recipe truncate (long_prompts)",
                row=wording.number,
            )
        found.append(_cut(wording, tokens_of, room))
    return found


def warn_of_cuts(columns: Sequence[str | None]) -> None:
    """Say how many prompts were cut: for each the column, or None."""
    cut = [column for column in columns if column is not None]
    if cut:
        logger.warning(
            "%d of %d prompts are longer than the model's context; the end of %s is cut off in them.",
            len(cut),
            len(columns),
            shown(dict.fromkeys(cut)),
        )


def _prompt(wording: Wording, room: int) -> str | None:
    """A row's prompt; None when it has too many characters to fit."""
    most = most_characters(room)
    allowed = sandbox.most_characters()
    try:
        with sandbox.bounded(most):
            return wording.prompt
    except sandbox.TooLong:
        if allowed < most:  # by whoever asks
            raise
        return None


def _tokens(tokens_of: Callable[[Sequence[str]], list[Tokens]], prompts: Sequence[str | None]) -> list[Tokens | None]:
    """The tokens of each prompt, of not too many at a time; None where there is none."""
    tokens: list[Tokens | None] = [None] * len(prompts)
    group: list[int] = []
    together = 0
    for i, prompt in enumerate(prompts):
        if prompt is not None:
            group.append(i)
            together += len(prompt)
        if group and (i == len(prompts) - 1 or together > _TOGETHER):
            sandbox.checkpoint()
            for j, its in zip(group, tokens_of([prompts[j] or "" for j in group]), strict=True):
                tokens[j] = its
            group, together = [], 0
    return tokens


def _cut(wording: Wording, tokens_of: Callable[[Sequence[str]], list[Tokens]], room: int) -> Fitted:
    """A prompt of at most `room` tokens, and the column that was cut last."""
    row, shorter = wording.row, dict(wording.row)
    names = [name for name in wording.template.columns if name in row and not is_missing(row[name])]
    names.sort(key=lambda name: -len(str(row[name])))
    names = [name for name in wording.task.truncate if name in names] or names[:1]
    for name in names:
        items = items_of(row[name])
        whole = str(row[name]) if items is None else items  # a list loses items, and stays one

        def prompt(length: int, name: str = name, whole: str | list[Any] = whole) -> str | None:
            shorter[name] = whole[:length]
            try:
                with sandbox.bounded(most_characters(room)):
                    return wording.filled(shorter)
            except sandbox.TooLong:
                return None

        def size(length: int, prompt: Callable[[int], str | None] = prompt) -> float:
            [tokens] = _tokens(tokens_of, [prompt(length)])
            return math.inf if tokens is None else len(tokens)

        # A column that cannot make room alone is left out for the next one.
        length = _longest(len(whole), room, size)
        text = None if length is None else prompt(length)
        if text is not None:
            return Fitted(text, tokens_of([text])[0], name)
        shorter[name] = whole[:0]
    raise InputError(
        f"Expected a prompt of at most {room} tokens, found more even without {shown(names)}",
        "use a shorter template, or name more columns to truncate",
        row=wording.number,
    )


def _longest(most: int, room: int, tokens: Callable[[int], float]) -> int | None:
    """The greatest length up to `most` whose tokens are no more than `room`; None when there is none.

    The tokens that are left say about how many characters are: a text is as dense in one place as in another. So few
    texts are tokenized, none of them much longer than what fits.
    """
    least = tokens(0)
    if least > room:
        return None
    fits, its = 0, least
    bursts, over = most + 1, math.inf  # from this length on it does not fit
    density, stride, turn = _DENSITY, 1, 0
    while bursts - fits > 1:
        turn += 1
        if math.isfinite(over):
            density = (over - its) / (bursts - fits)
        length = fits + max(stride, int((room - its) / density))
        if length >= bursts or (math.isfinite(over) and (its == room or turn % 3 == 0)):
            length = most if bursts > most else (fits + bursts) // 2
        size = tokens(length)
        if size <= room:
            fits, its, stride = length, size, 2 * stride
            density = max(size - least, 1) / length
        else:
            bursts, over, stride = length, size, 1
    return fits
