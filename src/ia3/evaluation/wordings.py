"""The wording by the rows: candidates are tried untrained on labelled rows, and the best are taken (`choose_wording`)."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ia3.adapter.pretrained import HEADED, task_type
from ia3.errors import InputError
from ia3.evaluation.balance import shift_of
from ia3.evaluation.progress import Progress
from ia3.evaluation.start import Start
from ia3.scoring.batch import pass_tokens
from ia3.scoring.family import base_of
from ia3.scoring.question import row_length
from ia3.scoring.readings import Readings
from ia3.scoring.scorer import Scorer
from ia3.task.candidates import are_codes
from ia3.task.task import Task
from ia3.task.template import Row, Template
from ia3.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# Rows and labels that a search looks at, at most. With more labels, these stand for all.
_MOST_ROWS, _MOST_LABELS = 64, 8

# So many passes through the model may a search take, of as many tokens as a pass is best of.
_PASSES = 10

# The first round has 2 rows of each label and at least 8. Each round keeps a third of the candidates, the last one at least 4.
_FIRST_EACH, _FIRST, _KEPT, _LAST = 2, 8, 3, 4

_FOLDS = 4

# Templates that training draws from, at most.
_TAKEN = 3


@dataclass(frozen=True)
class Ranked:
    """How well a candidate does on labelled rows, untrained, with its answers balanced on other rows.

    Attributes:
        template: the candidate.
        log_loss: the mean over labels of -log p(right label) in nats; guessing has log K.
        error: the standard error of `log_loss`.
        accuracy: the mean over labels of the share of right answers.
        rows: how many rows it was measured on. Better candidates get more.
        labels: how many labels these have.
    """

    template: Template
    log_loss: float
    error: float
    accuracy: float
    rows: int
    labels: int

    @property
    def bound(self) -> float:
        """The log-loss and one standard error: what decides, so that luck on few rows does not."""
        return self.log_loss + self.error

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        answers = self.template.choices
        return {
            "template": self.template.prompt,
            **({} if answers is None else {"choices": answers}),
            "log_loss": self.log_loss,
            "error": self.error,
            "accuracy": self.accuracy,
            "rows": self.rows,
            "labels": self.labels,
        }


def choose_wording(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    recipe: Recipe | None = None,
    progress: Progress | None = None,
    title: str = "Wordings",
    readings: Readings | None = None,
) -> tuple[Task, list[Ranked]]:
    """The task with the wordings that suit labelled rows best, and the ranking of all.

    A task of `Task.infer` has candidates. Each is tried on some rows, the better ones on more (successive halving), behind
    one reading of each text. The balance of the answers is estimated on other rows than those it is measured on.

    Args:
        model: the base model, without an acting adapter.
        tokenizer: its tokenizer.
        task: a task whose wording was given, or a classifier's, stays as it is. Where the recipe starts from an adapter of the same
            labels, its wording is taken.
        rows: labelled rows, training examples alone.
        recipe: decides length normalization and what to do about long prompts; None: the paper's.
        progress: told how the search gets on.
        title: of its stage.
        readings: keeps the texts for what follows.
    """
    progress = progress or Progress()
    if not task.candidates or not rows:
        return task, []
    if recipe is not None and recipe.init is not None:
        kept = Start(recipe.init).worded(task)
        if kept is not None:
            progress.say(f"The wording is that of {recipe.init}, which its vectors know; --template sets another.")
            return kept, []
    if task_type(base_of(model)) in HEADED:
        progress.say("This model reads no answers, so the wording stays plain.")
        return task, []
    scorer = Scorer(model, tokenizer, readings or Readings())
    asked, each = task, list(rows)
    if task.multi_label:  # each label of a row is right
        asked = task.with_one_label()
        each = [{**row, task.label_column: label} for row in rows for label in task.labels_of(row)]
    found = rank(scorer, asked, each, recipe or Recipe(), progress, title)
    best = found[0]
    if best.bound > math.log(best.labels):
        progress.say(
            "Untrained, no wording is clearly better than guessing. If you know a better one, give --template."
        )
    # The others must not be clearly worse.
    taken = itertools.takewhile(lambda one: one.log_loss <= best.bound, found[:_TAKEN])
    return with_templates(task, [one.template for one in taken]), found


def with_templates(task: Task, templates: Sequence[Template]) -> Task:
    """A task in other words; the first measures. It has no candidates any more."""
    first = task.choices if templates[0].choices is None else templates[0].choices
    said = []
    for template in templates:
        own = task.choices if template.choices is None else template.choices
        said.append(template.model_copy(update={"choices": None if own == first else own}).model_dump())
    return Task.create({**task.model_dump(), "choices": first, "templates": said})


def rank(
    scorer: Scorer, task: Task, rows: Sequence[Row], recipe: Recipe, progress: Progress, title: str
) -> list[Ranked]:
    """A task's candidates that were tried, the best first; the arguments are those of `choose_wording`."""
    rows = _some(task, rows)
    labels = sorted({task.label(row) for row in rows})
    right = np.array([labels.index(task.label(row)) for row in rows])
    trial = _restricted(task, task.candidates, labels)
    if are_codes(labels):
        progress.say("The labels are numbers or codes, which no wording can name. Answer texts (--choices) would.")
    if min(Counter(right.tolist()).values()) < 2:
        progress.say("A label has one example, so wordings are compared without cross-validation.")
    tried: list[int] = []
    lengths: list[int] = []
    unusable: InputError | None = None
    for number in range(len(trial.templates)):
        try:
            question = scorer.question(trial.wording(rows[0], template=number), False, recipe.long_prompts)
        except InputError as error:  # its answers are the same to this tokenizer
            unusable = error
            continue
        tried.append(number)
        lengths.append(row_length(question) - question.read)  # tokens that go through the model when the text is read
    if not tried and unusable is not None:
        raise unusable
    budget = _PASSES * pass_tokens(scorer.model)
    texts = [one.read for one in scorer.questions(trial.wordings(rows, tried[0]), False, recipe.long_prompts)]
    rows = rows[: max(2 * _FIRST, int(np.searchsorted(np.cumsum(texts), budget, side="right")))]
    rounds = _rounds(lengths, len(rows), len(labels), budget)
    stage = progress.stage(title, sum(count * (size - before) for count, size, before in rounds))
    scores = np.empty((len(trial.templates), len(rows), len(labels)))
    order, found = tried, {}
    for count, size, before in rounds:
        order = order[:count]
        asked = [one for number in order for one in trial.wordings(rows[before:size], number)]
        made = scorer.score(
            scorer.questions(asked, False, recipe.long_prompts),
            recipe.length_normalization,
            on_progress=lambda done: stage.advance(len(done)),
        )
        scores[order, before:size] = np.reshape(
            [one.tolist() for one in made], (len(order), size - before, len(labels))
        )
        for number in order:
            found[number] = _measured(task.candidates[number], scores[number, :size], right[:size])
        order.sort(key=lambda number: found[number].bound)
    # What was dropped early stands behind what was kept.
    return sorted(found.values(), key=lambda one: (-one.rows, one.bound))


def _some(task: Task, rows: Sequence[Row]) -> list[Row]:
    """Rows to search on, of each label as many, in turns; of some labels, where there are many."""
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(task.label(row), []).append(row)
    # The most frequent labels, because they have rows.
    names = sorted(by_label, key=lambda label: (-len(by_label[label]), label))[:_MOST_LABELS]
    least = min(len(by_label[name]) for name in names)
    each = min(max(_MOST_ROWS // len(names), 1), max(least, 2))
    return [by_label[name][turn] for turn in range(each) for name in names if turn < len(by_label[name])]


def _restricted(task: Task, candidates: Sequence[Template], labels: Sequence[str]) -> Task:
    """The task with candidates as templates, and with some of its labels."""

    def part(choices: Any) -> Any:
        return None if choices is None else {label: choices[label] for label in labels}

    templates = [{**one.model_dump(), "choices": part(one.choices)} for one in candidates]
    # What names labels that are left out, and decides nothing here.
    others = {"aliases": {}, "grades": [], "metric": "accuracy", "costs": {}, "class_weight": None}
    return Task.create({**task.model_dump(), **others, "choices": part(task.choices), "templates": templates})


def _rounds(lengths: Sequence[int], rows: int, labels: int, budget: int) -> list[tuple[int, int, int]]:
    """How many candidates are tried on how many rows, of which how many are known: one of each round.

    Args:
        lengths: tokens that each candidate takes on a row.
        rows: how many there are.
        labels: how many there are.
        budget: tokens of all.
    """
    mean = sum(lengths) / len(lengths)
    first = min(rows, max(_FIRST, _FIRST_EACH * labels))
    count = max(_LAST, min(len(lengths), math.floor(budget / 2 / mean / first)))
    found, known, spent = [], 0, 0.0
    size = first
    while True:
        count = min(count, len(lengths))
        found.append((count, size, known))
        spent += count * (size - known) * mean
        if size == rows or spent >= budget:
            return found
        known, count = size, max(_LAST, math.ceil(count / _KEPT))
        size = min(rows, 2 * size)


def _measured(template: Template, scores: np.ndarray, right: np.ndarray) -> Ranked:
    """A candidate's measures, from scores (N, K) and the right answers (N,)."""
    from scipy.special import log_softmax

    balanced = np.empty_like(scores)
    for held_out, others in _parts(right):
        balanced[held_out] = log_softmax(scores[held_out] + shift_of(scores[others]), axis=1)
    counts = np.bincount(right, minlength=scores.shape[1])
    weights = 1 / (np.count_nonzero(counts) * counts[right])  # each label has the same
    losses = -balanced[np.arange(len(right)), right]
    mean = float(weights @ losses)
    error = math.sqrt(float(weights**2 @ (losses - mean) ** 2))
    hits = balanced.argmax(axis=1) == right
    return Ranked(template, mean, error, float(weights @ hits), len(right), scores.shape[1])


def _parts(right: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to measure on, and those to estimate a balance on: the turns of each label, dealt to folds."""
    turns = np.array([np.count_nonzero(right[:index] == label) for index, label in enumerate(right)])
    least = np.bincount(right)
    folds = min(_FOLDS, least[least > 0].min())
    if folds < 2:
        return [(np.arange(len(right)), np.arange(len(right)))]
    return [(np.flatnonzero(turns % folds == one), np.flatnonzero(turns % folds != one)) for one in range(folds)]
