"""Training rows as a trainer uses them: `Example`, and batches of examples."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ia3.errors import InputError, shown
from ia3.scoring.question import Question
from ia3.task.free_text import FreeText
from ia3.task.task import Task

if TYPE_CHECKING:
    from ia3.scoring.scorer import Scorer
    from ia3.task.kinds import AnyTask
    from ia3.task.wording import Wording
    from ia3.training.recipe import Recipe

ONE = "default"
"""The name of a single member without a name."""


@dataclass(frozen=True)
class Example:
    """A labelled row, as a question for each template that may be drawn.

    Attributes:
        questions: one per template.
        key: decides, with the step, which question is drawn; it differs from row to row.
        member: the member that the example trains.
        weight: what its loss is multiplied by (see `class_weights`).
    """

    questions: tuple[Question, ...]
    key: str = ""
    member: str = ONE
    weight: float = 1.0

    def drawn(self, step: int) -> Question:
        """The question of a step. It does not depend on the batch."""
        if len(self.questions) == 1:
            return self.questions[0]
        return random.Random(f"{self.key} {step}").choice(self.questions)

    def of(self, member: str, adapter: str | None) -> Example:
        """The same example for a member, with questions for an adapter; None: for the active adapters."""
        questions = tuple(replace(question, adapter=adapter) for question in self.questions)
        return replace(self, questions=questions, member=member)


def training_examples(
    scorer: Scorer, task: AnyTask, rows: Any, recipe: Recipe, seed: int, known: Collection[str] | None = None
) -> list[Example]:
    """Labelled rows as training examples.

    Args:
        scorer: shortens prompts to the context of its model.
        task: the task of the rows.
        rows: labelled rows, as `as_rows` takes them.
        recipe: decides which templates are drawn.
        seed: decides the draw.
        known: the labels whose answers are choices; None: all, as in the paper. The answer of a label that no row has is wrong
            in every row, so that it is unlearned, and the base model's idea of it with that.

    Raises:
        InputError: rows do not fit the task (see `Scorer.questions`), there are none, or all have the same label.
    """
    wordings = [[*each] for its in task.checked(rows) for each in zip(*(one.each_label() for one in its), strict=True)]
    if isinstance(task, FreeText) and not wordings:
        raise InputError("Expected training rows, found none.")
    labels = [its[0].label for its in wordings]
    if len(set(labels)) < 2 and isinstance(task, Task):
        raise InputError(
            f"Expected training rows of at least two labels, found only {shown(set(labels))} in {len(wordings)} rows; T-Few "
            f"learns from the difference."
        )
    weights = task.weights(labels) if isinstance(task, Task) else {}
    templates = range(len(task.templates)) if recipe.templates == "random" else [0]
    asked = [scorer.questions([its[i] for its in wordings], long_prompts=recipe.long_prompts) for i in templates]
    if known is not None and scorer.family.reads_answers and task.labels is not None and len(known) < len(task.labels):
        for template, questions in zip(templates, asked, strict=True):
            kept = [[i for i, label in enumerate(its[template].answers) if label in known] for its in wordings]
            questions[:] = [question.only(some) for question, some in zip(questions, kept, strict=True)]
    if scorer.family.embeds:
        asked = [[*questions, *_answers(scorer, wordings[0][i])] for i, questions in zip(templates, asked, strict=True)]
        labels += sorted(wordings[0][0].answers)
    return [
        Example(tuple(questions), f"{seed} {number}", weight=weights.get(label, 1.0))
        for number, (label, *questions) in enumerate(zip(labels, *asked, strict=True))
    ]


def _answers(scorer: Scorer, wording: Wording) -> list[Question]:
    """The answers' texts as questions: each is one more text of its label, and says what the label means."""
    names, texts = [*wording.answers], [*wording.answers.values()]
    order = sorted(range(len(names)), key=names.__getitem__)  # so that the order of a task's labels changes nothing
    family, asked = scorer.family, [texts[i] for i in order]
    each = len(asked)
    return family.ask(
        asked, family.prompt_tokens(asked), [texts] * each, order, names=[names] * each, room=family.max_length
    )


def evaluation_examples(scorer: Scorer, task: AnyTask, rows: Any, recipe: Recipe) -> list[Example]:
    """Labelled rows as examples of the first template; arguments and errors are those of `training_examples`."""
    wordings = task.wordings(rows)
    if not wordings:
        raise InputError("Expected labelled rows to measure on, found none.")
    return [Example((question,)) for question in scorer.questions(wordings, long_prompts=recipe.long_prompts)]


def collate_examples(examples: Sequence[Example]) -> dict[str, Any]:
    """A batch of examples as a dictionary: `label` (B,), the index of each right choice; `questions` of the first
    template, which are packed later, with the model; `members`; `weights` of their losses; `counts`, the number of
    examples per member in the whole batch, kept when it is divided; and `examples`, if another template may be drawn."""
    questions = [example.questions[0] for example in examples]
    members = [example.member for example in examples]
    labels = [-100 if question.label is None else question.listed(question.label) for question in questions]
    batch = {"label": torch.tensor(labels), "questions": questions, "members": members, "counts": Counter(members)}
    batch["weights"] = [example.weight for example in examples]
    if any(len(example.questions) > 1 for example in examples):
        batch["examples"] = list(examples)
    return batch
