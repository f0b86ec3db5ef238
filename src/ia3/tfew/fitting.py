"""Prompts that fit a model's context."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ia3.errors import InputError, brief, shown
from ia3.tfew.template import Row, at_row, is_missing, items_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.config import TaskType
    from ia3.tfew.icl import Prefix
    from ia3.tfew.task import Task

logger = logging.getLogger(__name__)


def answer_lengths(tokenizer: PreTrainedTokenizerBase, answers: Sequence[dict[str, str]], separator: str) -> list[int]:
    """The number of tokens of each row's longest answer.

    Raises:
        InputError: two answers of a row are the same tokens, which nothing can tell apart, or one has none.
    """
    from ia3.tfew.questions import continuation

    lengths: dict[tuple[str, ...], int] = {}
    found = []
    for number, its in enumerate(answers, 1):
        texts = tuple(its.values())
        if texts not in lengths:
            seen: dict[tuple[int, ...], str] = {}
            for text in texts:
                tokens = tuple(continuation(tokenizer, separator + text))
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
    from ia3.config import TaskType
    from ia3.tfew.questions import continuation

    if prefix is None:
        return [len(ids) for ids in tokenizer(list(prompts))["input_ids"]]  # type: ignore[arg-type]
    # As `Prefix.encode` asks them: what separates a prompt from the prefix takes positions as well.
    behind = [prefix.separator + prompt for prompt in prompts]
    if family == TaskType.CAUSAL_LM:
        return [len(continuation(tokenizer, text)) for text in behind]
    whole = tokenizer([prefix.text + text for text in behind])["input_ids"]
    return [len(ids) - len(prefix.tokens) for ids in whole]  # type: ignore[arg-type]


def shortened(
    task: Task,
    sizes_of: Callable[[Sequence[str]], list[int]],
    rows: Sequence[Row],
    prompts: list[str],
    rooms: Sequence[int],
    template: int,
    long_prompts: str,
) -> list[str]:
    """The prompts, those that take more tokens than there is room for with a column cut short."""
    fitted, columns = list(prompts), []
    for i, (row, size, room) in enumerate(zip(rows, sizes_of(prompts), rooms, strict=True)):
        if size <= room or room < 1:  # `encode` knows what to say of answers that leave no room
            continue
        if long_prompts == "refuse":
            raise InputError(
                f"Expected prompts of at most {room} tokens, found {size} (row {i + 1}); shorten the row, or let the "
                f"recipe truncate (long_prompts)."
            )
        fitted[i], column = _cut(task, sizes_of, row, i + 1, room, template)
        columns.append(column)
    if columns:
        logger.warning(
            "%d of %d prompts are longer than the model's context; the end of %s is cut off in them.",
            len(columns),
            len(prompts),
            shown(dict.fromkeys(columns)),
        )
    return fitted


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
    shorter = dict(row)
    for name in names:
        items = items_of(row[name])
        whole = str(row[name]) if items is None else items  # a list loses items, and stays one

        def prompt(length: int, name: str = name, whole: str | list[Any] = whole) -> str:
            shorter[name] = whole[:length]
            return task.filled(shorter, number, template)

        def tokens(length: int, prompt: Callable[[int], str] = prompt) -> int:
            return sizes_of([prompt(length)])[0]

        # The longest beginning that fits; a column that cannot make room alone is left out for the next one.
        length = max(bisect.bisect_right(range(len(whole)), room, key=tokens) - 1, 0)
        if tokens(length) <= room:
            return prompt(length), name
    raise InputError(
        f"Expected a prompt of at most {room} tokens, found more (row {number}) even without {shown(names)}; use a "
        f"shorter template, or name more columns to truncate."
    )
