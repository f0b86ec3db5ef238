"""The RAFT benchmark (Alex et al. 2021, arXiv:2109.14076), from rows to a submission: `Raft`."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3.adapter.stored import SEEN, StoredAdapter, is_number
from ia3.errors import InputError
from ia3.evaluation.checkpoints import RUN_NAME, require_same, settings_of
from ia3.evaluation.progress import Progress
from ia3.evaluation.results import majority_metrics
from ia3.evaluation.saving import save_trained
from ia3.files import write_json
from ia3.task.raft import PREDICTIONS_NAME, RaftTask, write_predictions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.adapter.model import IA3Model
    from ia3.task.task import Task
    from ia3.training.recipe import Recipe

_ADAPTER = "default"

# In metrics.json and model cards.
_COMMAND = "ia3 raft"


@dataclass
class Raft:
    """Cross-validate and train on tasks, and label their test rows; this is what `ia3 raft` does.

    Attributes:
        tasks: name → task with its rows.
        folder: the folder for results, with a subfolder per task.
        model: the base model, as `load_base` takes it.
        recipe: how to train.
        dtype: the type of the base model's weights.
        folds: the number of cross-validation parts.
        seed: decides the parts, and the order of examples.
    """

    tasks: Mapping[str, RaftTask]
    folder: str | os.PathLike
    model: str
    recipe: Recipe
    dtype: str = "auto"
    folds: int = 5
    seed: int = 0
    _loaded: tuple[IA3Model, PreTrainedTokenizerBase] | None = field(default=None, init=False, repr=False)

    def settings(self, name: str) -> dict[str, Any]:
        """All settings that decide a task's result."""
        one = self.tasks[name]
        fields = {"task": one.task, "training rows": one.train, "test rows": one.test}
        return settings_of(
            model=self.model, dtype=self.dtype, recipe=self.recipe, folds=self.folds, seed=self.seed, **fields
        )

    def finished(self) -> dict[str, dict[str, Any]]:
        """The results of tasks that an earlier run has finished in the folder.

        Raises:
            InputError: a task was run with other settings, or lacks files.
        """
        return {name: self._earlier(name) for name in self.tasks if Path(self.folder, name, RUN_NAME).is_file()}

    def run(self, progress: Progress | None = None, resume: bool = False) -> dict[str, Any]:
        """Run all tasks; return the results of each ("tasks") and their mean.

        Args:
            progress: shows the progress.
            resume: skip tasks that are `finished`.
        """
        finished = self.finished() if resume else {}
        for name in self.tasks:  # an earlier run may have other settings
            if name not in finished:
                Path(self.folder, name, RUN_NAME).unlink(missing_ok=True)
        results = {}
        for name in self.tasks:
            if name not in finished:
                finished[name] = self.run_task(name, progress or Progress())
                # This is the last file; it marks the task as finished.
                write_json(Path(self.folder, name, RUN_NAME), self.settings(name))
            results[name] = finished[name]
        means = {
            "macro_f1": statistics.mean(its["cross_validation"]["macro_f1"] for its in results.values()),
            "majority_macro_f1": statistics.mean(its["majority"]["macro_f1"] for its in results.values()),
        }
        summary = {"mean": means, "tasks": results}
        write_json(Path(self.folder, "metrics.json"), summary)
        return summary

    def run_task(self, name: str, progress: Progress) -> dict[str, Any]:
        """Cross-validate, train, predict and save; return the results."""
        from transformers import set_seed

        from ia3.evaluation.learner import Learner
        from ia3.evaluation.prediction import predict
        from ia3.evaluation.running import cross_validated

        one, folder, recipe = self.tasks[name], Path(self.folder, name), self.recipe
        task, started = one.task, time.perf_counter()
        progress.heading(
            f"{task.name}: {len(one.train)} training rows, {len(one.test)} test rows, {len(task.labels or ())} labels"
        )
        with progress.waiting("Loading the model …"):
            model, tokenizer = self._with_new_adapter(task)
        set_seed(self.seed)
        learner = Learner(model, tokenizer, task, one.train, recipe, self.seed, folder)
        scores, calibration, _ = cross_validated(progress, "Cross-validation", learner, self.folds)
        trainer, trained, train_seconds = learner.train(progress, "Training")
        stage = progress.stage("Predicting", len(one.test))
        found = predict(model, tokenizer, task, one.test, lambda done: stage.advance(len(done)), recipe=recipe)
        results = {
            "command": _COMMAND,
            "cross_validation": {**scores, "folds": self.folds},
            "majority": majority_metrics(task, [task.label(row) for row in one.train]),
            "seconds": round(time.perf_counter() - started, 2),
            "train_seconds": round(train_seconds, 2),
            "train_loss": trained["train_loss"],
            "recipe": recipe.name,
            "steps": trainer.steps_of(_ADAPTER),
            "seed": self.seed,
            "train_examples": len(one.train),
            "test_rows": len(one.test),
            "trainable_parameters": sum(parameter.numel() for parameter in model.adapter_parameters(_ADAPTER)),
            "model": model.model.name_or_path,
            "task": task.name,
        }
        results = save_trained(folder, model, _ADAPTER, task, recipe, results, one.train, calibration)
        write_predictions(folder / PREDICTIONS_NAME, one.test, [prediction.best for prediction in found])
        return results

    def _with_new_adapter(self, task: Task) -> tuple[IA3Model, PreTrainedTokenizerBase]:
        """The base model with an untrained adapter. It is loaded once; an encoder once per task, because its head has
        the task's labels."""
        from ia3.adapter.pretrained import HEADED, load_base, task_type
        from ia3.evaluation.running import with_adapters

        base: Any
        if self._loaded is None or task_type(self._loaded[0].model) in HEADED:
            self._loaded = None  # frees memory before the next one is loaded
            base, tokenizer = load_base(self.model, task.labels, self.dtype)
        else:
            adapted, tokenizer = self._loaded
            base = adapted.unload()
        self._loaded = with_adapters(base, {_ADAPTER: self.recipe.place(base, task)}, self.recipe), tokenizer
        return self._loaded

    def _earlier(self, name: str) -> dict[str, Any]:
        """A finished task's results, if its settings are the same."""
        folder = Path(self.folder, name)
        require_same(folder / RUN_NAME, self.settings(name))
        if not (folder / PREDICTIONS_NAME).is_file():
            raise InputError(
                f"Expected the {PREDICTIONS_NAME} of a finished task in {str(folder)!r}; delete the folder."
            )
        error = InputError(f"Expected the results of a finished task in {str(folder)!r}; delete the folder.")
        try:
            found = StoredAdapter(folder).metrics
            numbers = [found[key]["macro_f1"] for key in ("cross_validation", "majority")]
            numbers += [found["test_rows"], found["seconds"]]
        except (InputError, KeyError, TypeError) as cause:
            raise error from cause
        # An adapter of another command has other metrics and no predictions.
        if found.get("command") != _COMMAND or not all(map(is_number, numbers)):
            raise error
        return {key: value for key, value in found.items() if key != SEEN}
