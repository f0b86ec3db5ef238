"""`ia3 raft`: the eleven tasks of RAFT, from their rows to a submission."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ia3.adapter.stored import SEEN, is_number
from ia3.cli.common import (
    MAX_SEED,
    BaseOption,
    DelimiterOption,
    DtypeOption,
    InitOption,
    JsonOption,
    RecipeOption,
    console,
    print_json,
    progress,
    quiet,
    recipe_for,
    table,
)
from ia3.cli.results import write, write_json
from ia3.cli.resume import RUN_NAME, fingerprint, require_same
from ia3.cli.run import cross_validated, train_alone, with_adapters
from ia3.errors import InputError, shown
from ia3.folder import AdapterFolder

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.adapter.model import IA3Model
    from ia3.task.raft import RaftTask
    from ia3.training.recipe import Recipe

_ADAPTER = "default"

_COMMAND = "ia3 raft"


def raft(
    tasks: str | None = typer.Option(
        None, "--tasks", help="Some of them: ade_corpus_v2,overruling. \\[default: all eleven]", show_default=False
    ),
    data: Path | None = typer.Option(
        None,
        "--data",
        "-d",
        help="Folder with TASK/train.csv and TASK/test_unlabeled.csv. \\[default: ought/raft on the hub]",
        show_default=False,
    ),
    delimiter: str | None = DelimiterOption,
    model: str = BaseOption,
    dtype: str = DtypeOption,
    recipe: str | None = RecipeOption,
    init: str | None = InitOption,
    folds: int = typer.Option(5, min=2, help="Cross-validate on the training rows in so many parts."),
    seed: int = typer.Option(0, min=0, max=MAX_SEED, help="Decides the parts, and the order of examples."),
    output: Path = typer.Option(Path("adapters", "raft"), "--output", "-o", help="Folder of results."),
    resume: bool = typer.Option(False, "--resume", help="Do not repeat the tasks that are finished in the folder."),
    json_output: bool = JsonOption,
) -> None:
    """Train and cross-validate on each task of the RAFT benchmark, and write predictions as its leaderboard takes them.

    Each task has 50 training rows. Macro-F1 is measured on them by cross-validation; the adapter that labels the test rows
    is trained on all of them, with all three terms of the loss, and all 77 answers of banking_77.

    Writes TASK/predictions.csv (columns ID and Label) and the adapter, as ia3 train does, into the output folder.
    """
    out = console(json_output)
    if output.is_file():
        raise InputError(f"Expected a folder for --output, found the file {str(output)!r}.")
    from ia3.evaluation.calibration import fold_of_each
    from ia3.task.raft import RAFT_TASKS, TRAIN_ROWS, RaftTask

    names = RAFT_TASKS if tasks is None else [part.strip() for part in tasks.split(",") if part.strip()]
    if not names or len(set(names)) < len(names):
        raise InputError(f"Expected different tasks with commas between them for --tasks, found {tasks!r}.")
    chosen = {name: RaftTask.load(name, data, delimiter) for name in names}
    for name, one in chosen.items():
        try:
            fold_of_each(one.task, one.train, folds, seed)
        except InputError as error:
            raise InputError(f"Cannot cross-validate on RAFT's {name} (--folds {folds}): {error}") from error
    plan = recipe_for(model, recipe, init=init)
    for name, one in chosen.items():
        if len(one.train) != TRAIN_ROWS:
            out.print(
                f"RAFT has {TRAIN_ROWS} training rows for each task, here {name} has {len(one.train)}: not comparable.",
                style="yellow",
                markup=False,
            )
    settings = {name: _settings(model, dtype, plan, folds, seed, one) for name, one in chosen.items()}
    finished: dict[str, dict[str, Any]] = {}
    if resume:
        finished = {name: _earlier(output / name, settings[name]) for name in names if _is_finished(output / name)}
        out.print(f"Finished before: {shown(finished, 11, room=400)}", markup=False, style="dim")
    for name in names:  # those of an earlier run too, whose settings --resume would find in place of this run's
        if name not in finished:
            (output / name / RUN_NAME).unlink(missing_ok=True)

    quiet()
    results: dict[str, dict[str, Any]] = {}
    try:
        bench = _Bench(out, model, dtype, plan, folds, seed)
        for name, one in chosen.items():
            if name not in finished:
                finished[name] = bench.run(one, output / name)
                write_json(output / name / RUN_NAME, settings[name])  # the last file: with it, a task is finished
            results[name] = finished[name]
    except KeyboardInterrupt:
        typer.echo("ia3: interrupted; finish the other tasks with the same command and --resume.", err=True)
        raise typer.Exit(130) from None
    means = {
        "macro_f1": statistics.mean(its["cross_validation"]["macro_f1"] for its in results.values()),
        "majority_macro_f1": statistics.mean(its["majority"]["macro_f1"] for its in results.values()),
    }
    summary = {"mean": means, "tasks": results}
    write_json(output / "metrics.json", summary)
    if json_output:
        print_json({"output": str(output), **summary})
        return
    _print_table(out, results, means, folds)
    out.print(
        f"\nSaved in {output}: TASK/predictions.csv is what RAFT's leaderboard takes.", markup=False, soft_wrap=True
    )


def _settings(model: str, dtype: str, recipe: Recipe, folds: int, seed: int, one: RaftTask) -> dict[str, Any]:
    """All that decides a task's result."""
    return {
        "model": model,
        "dtype": dtype,
        "recipe": recipe.model_dump(),
        "folds": folds,
        "seed": seed,
        "task": one.task.model_dump(),
        "training rows": fingerprint(one.train),
        "test rows": fingerprint(one.test),
    }


def _is_finished(folder: Path) -> bool:
    return (folder / RUN_NAME).is_file()


def _earlier(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A finished task's results, when its settings are the same."""
    from ia3.task.raft import PREDICTIONS_NAME

    require_same(folder / RUN_NAME, dict(settings))
    if not (folder / PREDICTIONS_NAME).is_file():
        raise InputError(f"Expected the {PREDICTIONS_NAME} of a finished task in {str(folder)!r}; delete the folder.")
    error = InputError(f"Expected the results of a finished task in {str(folder)!r}; delete the folder.")
    try:
        found = AdapterFolder(folder).metrics
        numbers = [found[key]["macro_f1"] for key in ("cross_validation", "majority")]
        numbers += [found["test_rows"], found["seconds"]]
    except (InputError, KeyError, TypeError) as cause:
        raise error from cause
    # Another command's adapter in the same folder is measured otherwise, and has labelled no test rows.
    if found.get("command") != _COMMAND or not all(map(is_number, numbers)):
        raise error
    return {key: value for key, value in found.items() if key != SEEN}


class _Bench:
    """A model that tasks are run on, one after the other; loaded once, but for a classifier, whose head is a task's."""

    def __init__(self, out: Console, model: str, dtype: str, recipe: Recipe, folds: int, seed: int) -> None:
        self.out, self.name, self.dtype = out, model, dtype
        self.recipe, self.folds, self.seed = recipe, folds, seed
        self.base: Any = None
        self.tokenizer: Any = None

    def run(self, one: RaftTask, folder: Path) -> dict[str, Any]:
        """Cross-validate, train, predict, save; returns the results."""
        from transformers import set_seed

        from ia3.evaluation.prediction import predict
        from ia3.task.raft import PREDICTIONS_NAME, write_predictions

        task, recipe = one.task, self.recipe
        started = time.perf_counter()
        self.out.print(
            f"{task.name}: {len(one.train)} training rows, {len(one.test)} test rows, {len(task.labels or ())} labels",
            style="bold",
            markup=False,
        )
        with self.out.status("Loading the model …"):
            model = self._adapted(task.labels)
        with progress(self.out) as bars:
            set_seed(self.seed)
            scores, calibration = cross_validated(
                bars,
                "Cross-validation",
                model,
                self.tokenizer,
                task,
                one.train,
                recipe,
                self.folds,
                self.seed,
                folder,
            )
            trainer, trained, train_seconds = train_alone(
                bars, "Training", model, self.tokenizer, task, one.train, recipe, self.seed, folder
            )

            bar = bars.add_task("Predicting", total=len(one.test), note="")
            found = predict(
                model, self.tokenizer, task, one.test, lambda done: bars.advance(bar, len(done)), recipe=recipe
            )
        labels = [task.label(row) for row in one.train]
        majority = min(Counter(labels).items(), key=lambda pair: (-pair[1], pair[0]))[0]
        results = {
            "command": _COMMAND,
            "cross_validation": {**scores, "folds": self.folds},
            "majority": task.metrics(labels, [majority] * len(labels)),
            "seconds": round(time.perf_counter() - started, 2),
            "train_seconds": round(train_seconds, 2),
            "train_loss": trained[f"train_loss/{_ADAPTER}"],
            "recipe": recipe.name,
            "steps": trainer.steps_of(_ADAPTER),
            "seed": self.seed,
            "train_examples": len(one.train),
            "test_rows": len(one.test),
            "trainable_parameters": sum(parameter.numel() for parameter in model.adapter_parameters(_ADAPTER)),
            "model": self.base.name_or_path,
            "task": task.name,
        }
        results = write(folder, model, _ADAPTER, task, recipe, results, one.train, calibration)
        write_predictions(folder / PREDICTIONS_NAME, one.test, [prediction.best for prediction in found])
        return results

    def _adapted(self, labels: list[str] | None) -> IA3Model:
        """The base model with an adapter that has learned nothing."""
        from ia3.adapter.config import TaskType
        from ia3.adapter.pretrained import load_base, task_type

        if self.base is None or task_type(self.base) == TaskType.SEQ_CLS:
            self.base, self.tokenizer = load_base(self.name, labels, self.dtype)
            self.model: Any = None
        if self.model is not None:
            self.base = self.model.unload()
        self.model = with_adapters(self.base, [_ADAPTER], self.recipe.init)
        return self.model


def _print_table(out: Console, results: Mapping[str, dict[str, Any]], means: Mapping[str, float], folds: int) -> None:
    title = f"RAFT: macro-F1 on training rows, {folds}-fold cross-validated"
    shown_results = table("task", "macro-F1", "majority class", "test rows", "seconds", title=title)
    for name, its in results.items():
        scores = (its["cross_validation"]["macro_f1"], its["majority"]["macro_f1"])
        shown_results.add_row(
            name, *(f"{score:.1%}" for score in scores), str(its["test_rows"]), f"{its['seconds']:.0f}"
        )
    rows, seconds = (sum(its[key] for its in results.values()) for key in ("test_rows", "seconds"))
    shown_means = (f"{means[key]:.1%}" for key in ("macro_f1", "majority_macro_f1"))
    shown_results.add_row("mean (and sums)", *shown_means, str(rows), f"{seconds:.0f}", style="bold")
    out.print(shown_results)
