"""Labels and probabilities for rows: `predict`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ia3.errors import InputError
from ia3.scoring.prefix import Prefix
from ia3.scoring.readings import Readings
from ia3.scoring.scorer import Scorer
from ia3.task.rows import items_of
from ia3.task.task import Task
from ia3.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prediction:
    """A row's label, and the probability of each label.

    Attributes:
        label: the most probable label; None: its probability is below the threshold.
        probabilities: label → probability; the sum is 1.
        scores: label → length-normalized log-probability of its answer text. Probabilities are computed from scores.
    """

    label: str | None
    probabilities: dict[str, float]
    scores: dict[str, float] = field(repr=False)

    @property
    def best(self) -> str:
        """The most probable label; of equally probable labels, the first in alphabetical order."""
        return min(self.probabilities, key=lambda label: (-self.probabilities[label], label))

    @classmethod
    def of(cls, scores: Mapping[str, float], temperature: float = 1.0, abstain_below: float = 0.0) -> Prediction:
        """The softmax of scores / temperature. The result does not depend on the order of the labels."""
        highest = max(scores.values())
        powers = {label: math.exp((score - highest) / temperature) for label, score in scores.items()}
        total = math.fsum(powers.values())  # exact in any order
        probabilities = {label: power / total for label, power in powers.items()}
        found = cls(None, probabilities, dict(scores))
        return replace(found, label=found.best) if probabilities[found.best] >= abstain_below else found


def predict(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | Sequence[Task],
    rows: Any,
    on_progress: Callable[[list[int]], None] | None = None,
    adapter_names: Sequence[str] | None = None,
    temperature: float | Sequence[float] = 1.0,
    abstain_below: float = 0.0,
    template: int = 0,
    recipe: Recipe | None = None,
    prefix: Prefix | None = None,
    readings: Readings | None = None,
) -> list[Prediction]:
    """Predict for each row the label whose answer text has the best length-normalized log-probability.

    Probabilities are the softmax of these scores, the distribution that the length-normalized loss trains.

    Args:
        model: a language model, adapted or not.
        tokenizer: its tokenizer.
        task: the task of the rows, or a task for each row. Labels of rows are not read.
        rows: a DataFrame, a `datasets.Dataset`, dictionaries, one dictionary, or texts; see `as_rows`.
        on_progress: called with the indices of the rows that each batch finished.
        adapter_names: the adapter for each row; None: the active adapters.
        temperature: divides the scores to calibrate the probabilities (see `Calibration`); one number, or one per row.
        abstain_below: give no label if the best label's probability is lower.
        template: the index of the task's template to use.
        recipe: decides length normalization and what to do about long prompts; None: the paper's.
        prefix: a text before each row's prompt, such as shots (see `predict_in_context`).
        readings: keeps what the base model reads of the rows' texts from call to call (see `Readings`).

    Raises:
        InputError: the numbers of tasks or temperatures and rows differ, or a temperature or threshold is out of range;
            see also `Scorer.questions` and `score_choices`.
    """
    items, recipe = items_of(rows, task if isinstance(task, Task) else None), recipe or Recipe()
    tasks = [task] * len(items) if isinstance(task, Task) else list(task)
    temperatures = [temperature] * len(items) if isinstance(temperature, (int, float)) else list(temperature)
    for name, values in {"task": tasks, "temperature": temperatures}.items():
        if len(values) != len(items):
            raise InputError(f"Expected a {name} for each of the {len(items)} rows, found {len(values)}.")
    wordings = [
        one.wording(item, number, template) for number, (item, one) in enumerate(zip(items, tasks, strict=True), 1)
    ]
    for one in temperatures:
        if not (math.isfinite(one) and one > 0):
            raise InputError(f"Expected a temperature above 0, found {one}.")
    if not 0 <= abstain_below <= 1:
        raise InputError(f"Expected a threshold (abstain_below) from 0 to 1, found {abstain_below}.")
    scorer = Scorer(model, tokenizer, readings)
    scores = scorer.score(
        scorer.questions(wordings, False, recipe.long_prompts, prefix),
        length_normalization=recipe.length_normalization,
        on_progress=on_progress,
        adapter_names=adapter_names,
        prefix=prefix,
    )
    return [
        Prediction.of(dict(zip(wording.answers, row.tolist(), strict=True)), one, abstain_below)
        for wording, row, one in zip(wordings, scores, temperatures, strict=True)
    ]
