"""Which base model suits labelled rows: `choose_model`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ia3.adapter.pretrained import (
    EMBEDDED_MODEL,
    HEADED,
    SENTENCE_MODEL,
    load_base,
    parameter_count,
    reads_sentences,
    sentence_folder,
    task_type,
)
from ia3.errors import InputError, brief
from ia3.evaluation.balance import can_balance
from ia3.evaluation.forming import Forming, form_opinions
from ia3.evaluation.learner import Learner
from ia3.evaluation.prediction import Prediction
from ia3.evaluation.progress import Progress
from ia3.evaluation.wordings import choose_wording
from ia3.opinions.opinions import HEAD, SENTENCES
from ia3.opinions.sentences import Sentences
from ia3.scoring.readings import Readings
from ia3.task.task import Row, Task
from ia3.training.recipe import Recipe

AUTO = "auto"


@dataclass(frozen=True)
class Considered:
    """What a base model has on labelled rows, each predicted by heads that have not seen it.

    Attributes:
        name: the model's.
        parameters: how many it has.
        log_loss: the mean of -log p(right label) in nats.
        behind: how much higher that is than the best model's.
        error: the standard error of `behind`.
        accuracy: the share of right answers.
    """

    name: str
    parameters: int
    log_loss: float
    behind: float
    error: float
    accuracy: float

    @property
    def as_good(self) -> bool:
        """Whether the best model may be better by chance."""
        return self.behind <= self.error


def named_models(text: str) -> list[str] | None:
    """The models among which a text leaves the choice: "auto", those at hand, or names with commas between them; None for a
    single name."""
    if text != AUTO and "," not in text:
        return None
    at_hand = [*([] if sentence_folder() is None else [SENTENCE_MODEL]), EMBEDDED_MODEL]
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise InputError(f"Expected models with commas between them, found {brief(text)}", argument="model")
    return list(dict.fromkeys(name for part in names for name in (at_hand if part == AUTO else [part])))


def choose_model(
    names: Sequence[str],
    task: Task,
    rows: Sequence[Row],
    dtype: str = "auto",
    progress: Progress | None = None,
    seed: int = 0,
    encoder: str = "auto",
) -> list[Considered]:
    """Base models on labelled rows: the chosen one first, then the others by log-loss.

    Heads on the models' hidden states (see `form_opinions`) are cross-validated on the rows; no vectors are trained. Of the
    models that are as good as the best one within a standard error, the smallest is chosen: it is the quickest.

        name = choose_model(["minilm", "smollm2"], task, rows)[0].name

    Args:
        names: language models and sentence encoders, as `load_base` takes them.
        task: with the same labels for all rows; if it has candidates, each language model chooses its wording.
        rows: labelled rows, training examples alone.
        dtype: the type of the weights, as `load_base` takes it.
        progress: told how it gets on.
        seed: decides the folds.
        encoder: the sentence encoder beside language models, as of `Recipe`.

    Raises:
        InputError: answers that differ from row to row, labels with single rows, or a model of another kind.
    """
    progress = progress or Progress()
    task.require_one_label()
    if task.labels is None or not can_balance(task):
        raise InputError(
            "Expected a task with the same labels for all rows, to choose a model by", "name one by", argument="model"
        )
    if len({task.label(row, number) for number, row in enumerate(rows, 1)}) < 2:
        raise InputError("Expected examples of at least two labels, found one; there is nothing to tell apart.")
    found: dict[str, tuple[int, np.ndarray, float]] = {}
    for name in names:
        progress.heading(name)
        count = parameter_count(name)
        held_out, labels = _held_out(name, task, rows, dtype, progress, seed, encoder)
        if held_out is None:
            raise InputError(
                "Expected several different rows of most labels, to choose a model by cross-validation, found labels with one",
                "name one by",
                argument="model",
            )
        losses = np.array(
            [-math.log(max(one.probabilities[y], 1e-12)) for one, y in zip(held_out, labels, strict=True)]
        )
        weights = task.weights(labels)
        losses *= np.array([weights.get(y, 1.0) for y in labels])
        accuracy = float(np.mean([one.best == y for one, y in zip(held_out, labels, strict=True)]))
        found[name] = count, losses, accuracy
    best = min((losses for _, losses, _ in found.values()), key=lambda losses: losses.mean())
    considered = []
    for name, (count, losses, accuracy) in found.items():
        behind = losses - best
        error = float(behind.std(ddof=1) / math.sqrt(len(behind)))
        considered.append(Considered(name, count, float(losses.mean()), float(behind.mean()), error, accuracy))
    chosen = min((one for one in considered if one.as_good), key=lambda one: one.parameters)
    return [chosen, *sorted((one for one in considered if one is not chosen), key=lambda one: one.log_loss)]


def _held_out(
    name: str, task: Task, rows: Sequence[Row], dtype: str, progress: Progress, seed: int, encoder: str
) -> tuple[list[Prediction] | None, list[str]]:
    """What a model's heads say to rows without having seen them, and the labels of these; None if rows cannot be divided."""
    if reads_sentences(name):
        forming = Forming(task, rows, [], 0, seed, progress, "")
        forming.fit_sentences(Sentences(name))
        return forming.together({SENTENCES: 1.0}), forming.known
    base, tokenizer = load_base(name, task.labels, dtype)
    if task_type(base) in HEADED:
        raise InputError(
            f"Expected language models and sentence encoders, found {brief(name)}, a {type(base).__name__}",
            "leave it out; see",
            argument="model",
        )
    from ia3.adapter.model import IA3Model

    recipe, readings = Recipe.for_model(name).changed(opinions=HEAD, encoder=encoder), Readings()
    task, _ = choose_wording(base, tokenizer, task, rows, recipe, progress, readings=readings)
    learner = Learner(IA3Model(base, {}), tokenizer, task, rows, recipe, seed, readings=readings)
    formed = form_opinions(progress, "", learner)
    return formed.held_out, formed.labels
