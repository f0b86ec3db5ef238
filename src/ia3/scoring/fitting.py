"""Prompts that fit a model's context."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ia3.errors import InputError, brief, shown
from ia3.task import sandbox
from ia3.task.template import Row, at_row, is_missing, items_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.adapter.config import TaskType
    from ia3.evaluation.icl import Prefix
    from ia3.task.task import Task

logger = logging.getLogger(__name__)

# A text with more characters for each token than these, and not short, counts as too long: no language has so many.
_CHARACTERS_A_TOKEN, _FEW_CHARACTERS = 16, 10_000

# Tokens of a character, as a first guess.
_DENSITY = 0.25

# So many characters are tokenized at once.
_TOGETHER = 1_000_000


def answer_lengths(tokenizer: PreTrainedTokenizerBase, answers: Sequence[dict[str, str]], separator: str) -> list[int]:
    """The number of tokens of each row's longest answer.

    Raises:
        InputError: two answers of a row are the same tokens, which nothing can tell apart, or one has none.
    """
    from ia3.scoring.questions import continuations

    lengths: dict[tuple[str, ...], int] = {}
    found = []
    for number, its in enumerate(answers, 1):
        texts = tuple(its.values())
        if texts not in lengths:
            sandbox.checkpoint()
            seen: dict[tuple[int, ...], str] = {}
            encoded = continuations(tokenizer, [separator + text for text in texts])
            for text, tokens in zip(texts, map(tuple, encoded), strict=True):
                if not tokens:
                    raise InputError(
                        f"The answer {brief(text)} has no tokens in this model's tokenizer{at_row(number)}."
                    )
                if tokens in seen:
                    raise InputError(
                        f"The answers {brief(seen[tokens], 80)} and {brief(text, 80)} are the same to this model's tokenizer"
                        f"{at_row(number)}; choose other words."
                    )
                seen[tokens] = text
            lengths[texts] = max(map(len, seen))
        found.append(lengths[texts])
    return found


def prompt_sizes(
    tokenizer: PreTrainedTokenizerBase, prefix: Prefix | None, family: TaskType, prompts: Sequence[str]
) -> list[int]:
    """The number of tokens that each prompt takes of a model's positions; behind a prefix, of those that it leaves."""
    from ia3.adapter.config import TaskType
    from ia3.scoring.questions import continuations

    if prefix is None:
        return [len(ids) for ids in tokenizer(list(prompts))["input_ids"]]  # type: ignore[arg-type]
    # As `Prefix.encode` asks them: what separates a prompt from the prefix takes positions as well.
    behind = [prefix.separator + prompt for prompt in prompts]
    if family == TaskType.CAUSAL_LM:
        return [len(ids) for ids in continuations(tokenizer, behind)]
    whole = tokenizer([prefix.text + text for text in behind])["input_ids"]
    return [len(ids) - len(prefix.tokens) for ids in whole]  # type: ignore[arg-type]


def most_characters(tokens: int) -> int:
    """A text of more characters than these counts as longer than so many tokens without being tokenized."""
    return max(_FEW_CHARACTERS, _CHARACTERS_A_TOKEN * tokens)


def fitted(
    task: Task,
    sizes_of: Callable[[Sequence[str]], list[int]],
    rows: Sequence[Row],
    rooms: Sequence[int],
    template: int,
    long_prompts: str,
) -> list[str]:
    """The rows' prompts, those that take more tokens than there is room for with a column cut short.

    Args:
        task: has the words.
        sizes_of: prompts' numbers of tokens.
        rows: column → value.
        rooms: tokens of each prompt, at most.
        template: the index of one of the task's.
        long_prompts: "truncate", or "refuse" to cut.

    Raises:
        InputError: a row cannot be used, or is too long.
    """
    prompts = [_prompt(task, row, i + 1, room, template) for i, (row, room) in enumerate(zip(rows, rooms, strict=True))]
    sizes = _sizes(sizes_of, prompts)
    columns = []
    for i, (row, size, room) in enumerate(zip(rows, sizes, rooms, strict=True)):
        if size <= room or room < 1:  # `encode` knows what to say of answers that leave no room
            continue
        if long_prompts == "refuse":
            found = size if prompts[i] is not None else f"one of more than {most_characters(room)} characters"
            raise InputError(
                f"Expected prompts of at most {room} tokens, found {found} (row {i + 1}); shorten the row, or let the "
                f"recipe truncate (long_prompts)."
            )
        prompts[i], column = _cut(task, sizes_of, row, i + 1, room, template)
        columns.append(column)
    if columns:
        logger.warning(
            "%d of %d prompts are longer than the model's context; the end of %s is cut off in them.",
            len(columns),
            len(prompts),
            shown(dict.fromkeys(columns)),
        )
    return prompts  # type: ignore[return-value]


def _prompt(task: Task, row: Row, number: int, room: int, template: int) -> str | None:
    """A row's prompt; None when it has too many characters to fit."""
    most = most_characters(room)
    allowed = sandbox.most_characters()
    try:
        with sandbox.bounded(most):
            return task.prompt(row, number, template)
    except sandbox.TooLong:
        if allowed < most:  # by whoever asks
            raise
        return None


def _sizes(sizes_of: Callable[[Sequence[str]], list[int]], prompts: Sequence[str | None]) -> list[float]:
    """The number of tokens of each prompt, of not too many at a time; infinite where there is none."""
    sizes: list[float] = [math.inf] * len(prompts)
    group: list[int] = []
    together = 0
    for i, prompt in enumerate(prompts):
        if prompt is not None:
            group.append(i)
            together += len(prompt)
        if group and (i == len(prompts) - 1 or together > _TOGETHER):
            sandbox.checkpoint()
            for j, size in zip(group, sizes_of([prompts[j] or "" for j in group]), strict=True):
                sizes[j] = size
            group, together = [], 0
    return sizes


def _cut(
    task: Task,
    sizes_of: Callable[[Sequence[str]], list[int]],
    row: Row,
    number: int,
    room: int,
    template: int,
) -> tuple[str, str]:
    """A prompt of at most `room` tokens, and the column that was cut last."""
    names = [name for name in task.templates[template].columns if name in row and not is_missing(row[name])]
    names.sort(key=lambda name: -len(str(row[name])))
    names = [name for name in task.truncate if name in names] or names[:1]
    wording, shorter = task.wording(row, number, template), dict(row)
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

        def tokens(length: int, prompt: Callable[[int], str | None] = prompt) -> float:
            return _sizes(sizes_of, [prompt(length)])[0]

        # A column that cannot make room alone is left out for the next one.
        length = _longest(len(whole), room, tokens)
        text = None if length is None else prompt(length)
        if text is not None:
            return text, name
        shorter[name] = whole[:0]
    raise InputError(
        f"Expected a prompt of at most {room} tokens, found more (row {number}) even without {shown(names)}; use a "
        f"shorter template, or name more columns to truncate."
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
