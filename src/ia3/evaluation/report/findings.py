"""What a report is made of: `Findings`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ia3.evaluation.doubts import HeldOut
from ia3.evaluation.prediction import Prediction
from ia3.task.kinds import AnyTask
from ia3.task.task import Row


@dataclass(frozen=True)
class Method:
    """What a method says to the test rows.

    Attributes:
        title: its name, for people.
        metrics: of its answers, as in metrics.json or compare.json.
        answers: one for each test row: predictions, whose temperature is 1, or what has no probabilities: labels, tuples of labels,
            texts or fields.
        seconds, flops: to answer a row; None: not measured.
        once_seconds, training_flops: before the first row; None: not measured.
    """

    title: str
    metrics: Mapping[str, float]
    answers: Sequence[Any]
    seconds: float | None = None
    flops: float | None = None
    once_seconds: float | None = None
    training_flops: float | None = None

    @property
    def said(self) -> list[Any]:
        """The label, the labels or the text of each test row."""
        return [one.best if isinstance(one, Prediction) else one for one in self.answers]

    @property
    def predictions(self) -> list[Prediction]:
        """The answers with their probabilities; empty if they have none."""
        return [one for one in self.answers if isinstance(one, Prediction)]


@dataclass(frozen=True)
class Point:
    """A point of a learning curve: what training on a part of the examples gives.

    Attributes:
        size: examples per label, or in all if the answer is text.
        examples: how many that are.
        metrics, answers: as of `Method`.
    """

    size: int
    examples: int
    metrics: Mapping[str, float]
    answers: Sequence[Any]


@dataclass(frozen=True)
class Findings:
    """What is known of an adapter, or of methods that are compared.

    Attributes:
        task: the task of the rows, of any kind.
        title: what was run, for people.
        facts: how: name → value.
        examples: the training rows.
        test: the test rows; empty: nothing was measured.
        methods: what was measured on them.
        chosen: the method that the parts about single rows are about; None: there is none.
        held_out: what cross-validation says to training rows; None: nothing was held out.
        points: of the learning curve, without that of all examples.
        moved: how far vectors are from ones, as of `ia3.adapter.moved`; empty: no vectors were trained.
        costs_from: where the costs of a row were measured, for people.
    """

    task: AnyTask
    title: str
    facts: Mapping[str, Any]
    examples: Sequence[Row]
    test: Sequence[Row]
    methods: Sequence[Method] = ()
    chosen: Method | None = None
    held_out: HeldOut | None = None
    points: Sequence[Point] = ()
    moved: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    costs_from: str = ""
