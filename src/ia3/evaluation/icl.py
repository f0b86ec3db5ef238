"""In-context learning: shots (labelled examples) stand before each prompt, and nothing is trained.

All prompts have the same shots, so a decoder reads them once, and each prompt attends to their keys and values.
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
    """Draw random shots from labelled rows, in random order.

    Args:
        rows: the rows to draw from, as `as_rows` takes them.
        task: the task of the rows.
        count: the number of shots.
        seed: decides the draw and the order. A larger draw with the same seed contains the smaller ones.
        balanced: balance the labels as far as `count` and `rows` allow; otherwise draw regardless of labels.

    Raises:
        InputError: there are too few rows, or a label is unknown.
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
    """The text of the shots: each prompt with its right answer, separated by blank lines."""
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
    """The number of shots, from the first, that fit into the model's context together with the longest row."""
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
    """The shots as a `Prefix` for the prompts of rows. The model reads them.

    Raises:
        InputError: they do not fit into the model's context together with the longest row; see also `Wording`.
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
    """Predict like `predict`, with shots before each prompt.

    Args:
        model: a causal language model or an encoder-decoder, adapted or not.
        tokenizer: its tokenizer.
        task: the task of rows and shots.
        rows: the rows to label, as `predict` takes them.
        shots: labelled rows, at least one, in the order of the prompt.
        on_progress: called with the indices of the rows that each batch finished.
        template: the index of the task's template for shots and prompts.
        recipe: see `predict`.

    Raises:
        InputError: there are no shots; see also `shots_prefix`.
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
