"""Labels and probabilities for rows: `predict`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ia3.errors import InputError
from ia3.tfew.choices import score_choices
from ia3.tfew.task import Row, Task

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prediction:
    """A row's label, and the probability of each label."""

    label: str
    probabilities: dict[str, float]


def predict(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | Sequence[Task],
    rows: Iterable[Row],
    on_progress: Callable[[list[int]], None] | None = None,
    adapter_names: Sequence[str] | None = None,
) -> list[Prediction]:
    """The label whose answer text has the best length-normalized log-probability, for each row.

    Probabilities are the softmax of these scores, the distribution that the length-normalized loss trains.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer.
        task: says what the rows mean; or a task for each row. Labels of rows are not read.
        rows: column → value.
        on_progress: called with the indices of the rows that each batch finished.
        adapter_names: for each row the adapter that answers it; None: the active ones.

    Raises:
        InputError: see `Task.prompt` and `score_choices`; or not as many tasks as rows.
    """
    rows = list(rows)
    tasks = [task] * len(rows) if isinstance(task, Task) else list(task)
    if len(tasks) != len(rows):
        raise InputError(f"Expected a task for each of the {len(rows)} rows, found {len(tasks)}.")
    for one in {id(one): one for one in tasks}.values():
        one.check_answers(tokenizer)
    prompts = [one.prompt(row, number) for number, (one, row) in enumerate(zip(tasks, rows, strict=True), 1)]
    answers = [one.answers for one in tasks]
    scores = score_choices(model, tokenizer, prompts, answers, on_progress=on_progress, adapter_names=adapter_names)
    predictions = []
    for one, row in zip(tasks, scores, strict=True):
        labels = list(one.choices)
        probabilities = torch.softmax(row.double(), -1).tolist()
        # The first of equal scores, whatever the device's argmax would take.
        best = max(range(len(labels)), key=lambda i: probabilities[i])
        predictions.append(Prediction(labels[best], dict(zip(labels, probabilities, strict=True))))
    return predictions
