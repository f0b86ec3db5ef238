"""The steps of an experiment on tasks whose answers are texts: `RunningText`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ia3.errors import InputError
from ia3.evaluation.costs import RowCost
from ia3.evaluation.generation import bounded, generate
from ia3.evaluation.report.gathered import Gathered
from ia3.evaluation.results import OF_TEXTS, shown_metric
from ia3.evaluation.running import Running, Scores
from ia3.processes import count, dealt
from ia3.scoring.family import passes_in_step
from ia3.scoring.scorer import Scorer
from ia3.scoring.spans import require_json
from ia3.task.fields import Fields
from ia3.task.text_metrics import require_metric

if TYPE_CHECKING:
    from ia3.evaluation.experiment import Experiment, Trial
    from ia3.evaluation.progress import Progress


class RunningText(Running):
    """An experiment on tasks whose answers are texts; see `Running`.

    Answers of test rows are generated greedily, and measured by the task's metrics.
    """

    def __init__(self, experiment: Experiment, progress: Progress) -> None:
        from ia3.adapter.pretrained import load_base

        self.experiment, self.progress, self.recipe = experiment, progress, experiment.chosen_recipe
        for trial in experiment.trials:
            require_metric(trial.task.metric)  # before training
        self.gathered = defaultdict(Gathered)
        with progress.waiting("Loading the model …"):
            base, self.tokenizer = load_base(experiment.model, dtype=experiment.dtype, device_map=experiment.device_map)
        scorer = Scorer(base, self.tokenizer)
        if any(isinstance(trial.task, Fields) for trial in experiment.trials):
            require_json(self.tokenizer)  # before training
        self.trials = [replace(one, task=bounded(one.task, scorer, one.examples)) for one in experiment.members]
        self.rankings = {trial.name: [] for trial in self.trials}
        self.forms_opinions = {trial.name: False for trial in self.trials}
        self._adapt(base)
        if self.model.waits_for_question():
            raise InputError(
                "Expected initial vectors that act from the start for a task whose answer is text, found ones that act from the "
                "question on",
                "take others, or leave out",
                argument="init",
            )

    def zero_shot(self) -> dict[str, list[Scores]]:
        with self.model.disable_adapter():
            return {trial.name: self._generated(trial, "Zero-shot", "zero_shot") for trial in self.own}

    def trained(self) -> dict[str, list[Scores]]:
        return {
            trial.name: self._generated(trial, "Trained", "trained", self.adapters[trial.name]) for trial in self.trials
        }

    def measured(self, trial: Trial, zero_shot: Sequence[Scores], trained: Sequence[Scores]) -> dict[str, Any]:
        pairs = {"zero_shot": zero_shot, "trained": trained}
        return {name: scores for name, its in pairs.items() for scores in its}

    def _measure_costs(self, trial: Trial, opinions: Any) -> None:
        """Nothing: the time that each text took is known, and its FLOPs are not counted."""

    def _generated(self, trial: Trial, title: str, method: str, adapter: str | None = None) -> list[Scores]:
        """The metrics of what an adapter, or the untrained model, generates for a trial's test rows; nothing without them."""
        task: Any = trial.task
        if not trial.test:
            return []
        stage = self.progress.stage(trial.titled(title), len(trial.test))

        def generated(some: list[int]) -> list[Any]:
            rows = [trial.test[index] for index in some]
            names = [adapter] * len(some) if adapter is not None and len(self.trials) > 1 else None
            return generate(self.model, self.tokenizer, task, rows, lambda done: stage.advance(len(done)), names)

        started = time.perf_counter()
        found = dealt(len(trial.test), generated, passes_in_step(self.model))
        if not self.experiment.several:
            gathered, shared = self.gathered[trial.name], 1 if passes_in_step(self.model) else count()
            seconds = shared * (time.perf_counter() - started) / len(trial.test)
            gathered.costs = {**gathered.costs, method: RowCost(seconds, 0.0)}
            gathered.costs_from = "on all test rows, in batches"
        self._keep(trial, method, [one.result for one in found])
        scores = task.metrics([one.result for one in found], [task.reference(row) for row in trial.test])
        stage.note(f"{OF_TEXTS.get(task.metric, task.metric)} {shown_metric(scores[task.metric])}")
        return [scores]
