"""Zero-shot, examples in context and an adapter on a task whose answer is text: `TextComparison`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ia3.errors import InputError
from ia3.evaluation import costs
from ia3.evaluation.comparison import TRAINED, USUAL_SHOTS, ZERO_SHOT, Comparison
from ia3.evaluation.generation import bounded, generate, shots_before
from ia3.evaluation.results import OF_TEXTS, shown_metric
from ia3.scoring.question import row_length
from ia3.scoring.scorer import Scorer
from ia3.task.free_text import few_rows
from ia3.task.text_metrics import require_metric

if TYPE_CHECKING:
    from torch import nn

    from ia3.task.task import Row


@dataclass
class TextComparison(Comparison):
    """Compares methods on a task whose answer is text; all generate greedily. Examples in context are read again for each row.

    Attributes (more in `Comparison`):
        metric: another metric than the task's, as of `text_metrics`.

    Raises:
        InputError: the metric cannot be computed.
    """

    metric: str | None = None

    METHOD: ClassVar[str] = TRAINED
    COSTS_FROM: ClassVar[str] = "on all test rows, in batches; shots are read again for each"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric is not None:
            self.task = self.task.model_copy(update={"metric": self.metric})
        require_metric(self.headline)
        self._scorer = Scorer(self.base, self.tokenizer)
        self.task = bounded(self.task, self._scorer, self.examples)
        self.references = [self.task.reference(row) for row in self.test]

    @property
    def headline(self) -> str:
        return self.task.metric

    def shots(self, counts: Sequence[int] | None = None) -> dict[int, list[Row]]:
        found = {}
        for count in counts or [count for count in USUAL_SHOTS if count <= len(self.examples)]:
            some = few_rows(self.examples, self.task, count, self.seed)
            if self._fits(some):
                found[count] = some
            elif counts is not None:
                raise InputError(
                    f"Expected shots that fit into the model's context with the longest test row and its answer, found {count}",
                    "ask for fewer",
                    argument="shots",
                )
        return found

    def _fits(self, shots: Sequence[Row]) -> bool:
        limit = self._scorer.max_length
        if limit is None:
            return True
        room = limit - (0 if self._scorer.family.has_encoder else self.task.max_new_tokens or 0)
        before = shots_before(self.task, shots)
        longest = max((before + one.prompt for one in self.task.wordings(self.test)), key=len)
        return len(self._scorer.family.prompt_tokens([longest])[0]) <= room

    def zero_shot(self) -> dict[str, Any]:
        return self._generated(ZERO_SHOT, self.base)

    def in_context(self, shots: Sequence[Row]) -> dict[str, Any]:
        size = len(shots_before(self.task, shots).encode())
        return self._generated(f"{len(shots)}-shot", self.base, shots, examples=len(shots), disk_bytes=size)

    def _with_adapter(self, model: Any, **more: Any) -> dict[str, Any]:
        return self._generated(self.METHOD, model, **more)

    def _generated(
        self, method: str, model: nn.Module, shots: Sequence[Row] | None = None, **more: Any
    ) -> dict[str, Any]:
        stage = self._progress.stage(method, len(self.test))
        started = time.perf_counter()
        found = generate(
            model, self.tokenizer, self.task, self.test, lambda done: stage.advance(len(done)), shots=shots
        )
        seconds = (time.perf_counter() - started) / len(self.test)
        self._answers[method] = [one.result for one in found]
        scores = self.task.metrics(self._answers[method], self.references)
        stage.note(f"{OF_TEXTS.get(self.headline, self.headline)} {shown_metric(scores[self.headline])}")
        questions = [one.question for one in found]
        flops, tokens = costs.flops_of(Scorer(model, self.tokenizer), questions), map(row_length, questions)
        cost = costs.Cost(flops, statistics.mean(tokens), seconds)
        return {"method": method, **scores, **self._beside(cost), **more}
