"""This project's own job, as a person runs it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ia3 import Experiment, IA3Model, load_base
from ia3.adapter.pretrained import EMBEDDED_MODEL
from ia3.evaluation.balance import can_balance
from ia3.evaluation.prediction import Prediction, predict
from ia3.folder import AdapterFolder
from ia3.task.task import Row, Task
from ia3.training.recipe import Recipe

from .data import Data
from .judging import Found


def ours(data: Data, seed: int, name: str) -> Found:
    """`ia3 train` with no more than the training rows and the columns' names. Where answers differ from row to row there is no
    task to make from labels: the task is given."""
    if not can_balance(data.task):
        return job(data, seed, data.task)
    file = name.partition("@")[0]
    return job(data, seed, Task.infer(data.train, data.task.label_column, data.columns, name=file))


def job(data: Data, seed: int, task: Task, recipe: Recipe | None = None) -> Found:
    """Train an adapter on all training rows, and ask its folder. The seconds are those of the job."""
    with tempfile.TemporaryDirectory() as scratch:
        wall, started = time.perf_counter(), time.process_time()
        experiment = Experiment(
            task,
            data.train,
            data.test,
            folder=Path(scratch, "adapter"),
            model=EMBEDDED_MODEL,
            recipe=recipe,
            examples_per_label=0,
            test_rows=0,
            seed=seed,
        )
        outcome = experiment.run()
        seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - started}
        folder, results = AdapterFolder(outcome.folder), outcome.results
        base, tokenizer = load_base(EMBEDDED_MODEL)
        model, told = IA3Model.from_pretrained(base, folder), folder.required_task()

        def asked(rows: Sequence[Row]) -> list[Prediction]:
            its = {"temperature": folder.temperature, "recipe": folder.recipe, "opinions": folder.opinions}
            return predict(model, tokenizer, told, rows, **its) if rows else []

        kept = ["trained", "opinions", "zero_shot", "zero_shot_balanced", "steps", "train_seconds"]
        details = {key: results[key] for key in kept if key in results}
        details["wordings"] = [one["template"] for one in results.get("wordings", [])]
        return Found(asked(data.test), asked(data.outside), {**details, **seconds})
