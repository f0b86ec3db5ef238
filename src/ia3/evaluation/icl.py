"""In-context learning: labelled examples ("shots") stand before each prompt, and nothing is trained.

The shots are the same for every prompt, so a decoder reads them once, and each prompt attends to their keys and values.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ia3.errors import InputError
from ia3.evaluation.prediction import Prediction, predict
from ia3.scoring.fitting import answer_lengths
from ia3.scoring.prefix import SEPARATOR, Prefix
from ia3.scoring.scorer import Scorer
from ia3.scoring.tokens import continuations
from ia3.task.rows import as_rows
from ia3.task.task import Row, Task
from ia3.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def draw_shots(rows: Any, task: Task, count: int, seed: int = 0, balanced: bool = True) -> list[Row]:
    """A random draw of labelled rows to show in context, in random order.

    Args:
        rows: to draw from, as `as_rows` takes them.
        task: knows their labels.
        count: how many.
        seed: decides the draw and the order. A larger draw of the same seed holds the smaller ones.
        balanced: as equally many of each label as `count` and `rows` allow; else as it comes.

    Raises:
        InputError: there are fewer rows, or a label is not known.
    """
    rows = as_rows(rows, task)
    if count < 1 or count > len(rows):
        raise InputError(f"Expected between 1 and {len(rows)} shots, as many as there are rows, found {count}.")
    chance = random.Random(seed)
    drawn = chance.sample(rows, len(rows))
    if balanced:
        seen: Counter[str] = Counter()
        turns = []
        for row in drawn:
            label = task.label(row)
            turns.append(seen[label])
            seen[label] += 1
        drawn = [drawn[i] for i in sorted(range(len(drawn)), key=turns.__getitem__)]
    drawn = drawn[:count]
    random.Random(f"{seed} {count}").shuffle(drawn)
    return drawn


def shots_text(task: Task, shots: Any, template: int = 0) -> str:
    """Shots as the model reads them: each one's prompt with the right answer, blank lines between."""
    return SEPARATOR.join(
        wording.prompt + task.separator + wording.answers[wording.label] for wording in task.wordings(shots, template)
    )


def fitting(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    shots: Any,
    rows: Any,
    template: int = 0,
) -> int:
    """How many of the shots, counted from the first, fit into the model's context with the longest of the rows."""
    limit, shots = Scorer(model, tokenizer).max_length, as_rows(shots, task)
    if limit is None:
        return len(shots)
    wordings = task.wordings(rows, template)
    prompts = continuations(tokenizer, [SEPARATOR + wording.prompt for wording in wordings])
    answers = answer_lengths(tokenizer, wordings)
    longest = max((len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)), default=0)
    for count in range(len(shots), 0, -1):
        if len(tokenizer(shots_text(task, shots[:count], template))["input_ids"]) + longest <= limit:  # type: ignore[arg-type]
            return count
    return 0


def shots_prefix(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    shots: Any,
    rows: Any,
    template: int = 0,
) -> Prefix:
    """Shots, read by the model, to stand before the prompts of rows.

    Raises:
        InputError: with the longest of the rows they do not fit into the model's context; see `Wording`.
    """
    shots = as_rows(shots, task)
    count = fitting(model, tokenizer, task, shots, rows, template)
    if count < len(shots):
        raise InputError(
            f"Expected shots that fit into the model's {Scorer(model, tokenizer).max_length} tokens with the longest prompt, found "
            f"{len(shots)}, of which {count} fit; ask for fewer."
        )
    return Prefix(model, tokenizer, shots_text(task, shots, template))


def predict_in_context(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Any,
    shots: Any,
    on_progress: Callable[[list[int]], None] | None = None,
    template: int = 0,
    recipe: Recipe | None = None,
) -> list[Prediction]:
    """As `predict`, with labelled examples before each prompt.

    Args:
        model: a causal language model or an encoder-decoder, adapted or not.
        tokenizer: its tokenizer.
        task: says what rows and shots mean.
        rows: to label, as `predict` takes them.
        shots: the labelled examples, rows too, in the order in which they are shown; at least one.
        on_progress: called with the indices of the rows that each batch finished.
        template: the index of the task's template that shots and prompts are worded in.
        recipe: see `predict`.

    Raises:
        InputError: see `shots_prefix`; or there are no shots.
    """
    rows = as_rows(rows, task)
    prefix = shots_prefix(model, tokenizer, task, shots, rows, template)
    return predict(
        model,
        tokenizer,
        task,
        rows,
        on_progress,
        template=template,
        recipe=recipe,
        prefix=prefix,
    )
