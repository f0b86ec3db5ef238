"""Zero-shot, examples in context and an adapter on a task whose answer is text: `TextComparison`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3.adapter.checkpoint import save_adapter
from ia3.adapter.model import IA3Model
from ia3.adapter.moved import moved
from ia3.adapter.stored import REPORT_NAME
from ia3.errors import InputError
from ia3.evaluation.comparison import USUAL_SHOTS
from ia3.evaluation.generation import bounded, generate, shots_before
from ia3.evaluation.progress import Progress
from ia3.evaluation.report.findings import Findings, Method
from ia3.evaluation.report.page import page_of
from ia3.evaluation.results import OF_TEXTS, shown_metric
from ia3.evaluation.running import train_alone, with_adapters
from ia3.files import WEIGHTS_NAME, replacing, write_json
from ia3.scoring.scorer import Scorer
from ia3.task.free_text import few_rows

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ia3.adapter.stored import StoredAdapter
    from ia3.task.free_text import FreeText
    from ia3.task.task import Row
    from ia3.training.recipe import Recipe

TRAINED = "trained"


@dataclass
class TextComparison:
    """Methods on one base model and the test rows of a task whose answer is text. All generate greedily.

    Attributes:
        base: the base model.
        tokenizer: its tokenizer.
        task: the task.
        examples: labelled rows to train on and to draw shots from.
        test: labelled rows to measure on.
        recipe: how to train.
        seed: decides the draw of shots and the order of examples.
        metric: another metric than the task's, as of `text_metrics`.
        adapter: a trained adapter to measure; None: train one.
    """

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: FreeText
    examples: Sequence[Row]
    test: Sequence[Row]
    recipe: Recipe
    seed: int = 0
    metric: str | None = None
    adapter: StoredAdapter | None = None

    def __post_init__(self) -> None:
        scorer = Scorer(self.base, self.tokenizer)
        self.task = bounded(self.task, scorer, self.examples)
        self.references = [self.task.reference(row) for row in self.test]
        self._scorer, self._progress = scorer, Progress()
        self._answers: dict[str, list[Any]] = {}
        self._moved: dict[str, dict[int, float]] = {}

    def shots(self, counts: Sequence[int] | None = None) -> dict[int, list[Row]]:
        """Number of shots → the shots. By default, those of the usual numbers that fit.

        Raises:
            InputError: a given number does not fit into the model's context.
        """
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

    def run(self, shots: Mapping[int, Sequence[Row]], progress: Progress | None = None) -> list[dict[str, Any]]:
        """Metrics and costs, one dictionary per method.

        Args:
            shots: number of shots → the shots; see `shots`.
            progress: shows the progress.
        """
        self._progress = progress or Progress()
        rows = [self._row("zero-shot", self.base)]
        for count, some in shots.items():
            size = len(shots_before(self.task, some).encode())
            rows.append(self._row(f"{count}-shot", self.base, some, examples=count, disk_bytes=size))
        model, more = self._adapted()
        self._moved = moved(model, model.active_adapters[0])
        return [*rows, self._row(TRAINED, model, **more)]

    def _adapted(self) -> tuple[Any, dict[str, Any]]:
        """The model with the given adapter, or with one that is trained here."""
        if self.adapter is not None:
            size = Path(self.adapter.vectors_file()).stat().st_size
            examples = self.adapter.metrics.get("train_examples")
            return IA3Model.from_pretrained(self.base, self.adapter), {"disk_bytes": size, "examples": examples}
        model = with_adapters(self.base, {"default": self.recipe.place(self.base, self.task)}, self.recipe)
        with tempfile.TemporaryDirectory() as scratch:
            trainer, _, seconds = train_alone(
                self._progress,
                "training",
                model,
                self.tokenizer,
                self.task,
                self.examples,
                self.recipe,
                self.seed,
                scratch,
            )
            save_adapter(model, scratch)
            size = Path(scratch, WEIGHTS_NAME).stat().st_size
        steps = trainer.steps_of("default")
        more = {"disk_bytes": size, "examples": len(self.examples), "once_seconds": seconds, "steps": steps}
        return model.eval(), more

    def _row(self, method: str, model: nn.Module, shots: Sequence[Row] | None = None, **more: Any) -> dict[str, Any]:
        stage = self._progress.stage(method, len(self.test))
        started = time.perf_counter()
        found = generate(
            model, self.tokenizer, self.task, self.test, lambda done: stage.advance(len(done)), shots=shots
        )
        seconds = (time.perf_counter() - started) / len(self.test)
        self._answers[method] = [one.result for one in found]
        scores = self.task.metrics(self._answers[method], self.references, self.metric)
        headline = self.metric or self.task.metric
        stage.note(f"{OF_TEXTS.get(headline, headline)} {shown_metric(scores[headline])}")
        costs = {"seconds": seconds, "once_seconds": 0.0, "disk_bytes": 0, "examples": 0}
        return {"method": method, **scores, **costs, **more}

    def findings(self, rows: Sequence[Mapping[str, Any]]) -> Findings:
        """What the report on the result of `run` is made of."""
        costs = {"seconds", "once_seconds", "disk_bytes", "examples", "steps", "method"}
        methods = [
            Method(
                row["method"],
                {name: value for name, value in row.items() if name not in costs},
                self._answers[row["method"]],
                row["seconds"],
                once_seconds=row["once_seconds"] or None,
            )
            for row in rows
        ]
        facts = {
            "base model": Path(str(self.base.name_or_path)).name,
            "recipe": self.recipe.name,
            "training examples": len(self.examples),
            "test rows": len(self.test),
            "seed": self.seed,
        }
        title, timed = f"{self.task.name}: methods compared", "on all test rows, in batches"
        given = self.task, title, facts, self.examples, self.test, methods, methods[-1]
        return Findings(*given, moved=self._moved, costs_from=timed)

    def save(self, folder: Path, rows: Sequence[Mapping[str, Any]], report: Path | None = None) -> None:
        """Write the result of `run` to a folder: the numbers, compare.json, and a report; arguments as of `Comparison.save`."""
        page = page_of(self.findings(rows))
        with replacing(report or folder / REPORT_NAME) as path:
            path.write_text(page, encoding="utf-8")
            settings = {"model": self.base.name_or_path, "task": self.task.name}
            write_json(folder / "compare.json", {**settings, "rows": rows})
