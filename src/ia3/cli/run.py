"""The work of `ia3 train`: measure, train all adapters at once, measure again, save."""

from __future__ import annotations

import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ia3.cli.common import progress
from ia3.cli.results import write
from ia3.cli.resume import begin, checkpoint_of, fingerprint, say_interrupted
from ia3.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from transformers import PreTrainedModel

    from ia3.adapter.model import IA3Model
    from ia3.evaluation.calibration import Calibration
    from ia3.task.task import Row, Task
    from ia3.training.fleet import FleetTrainer
    from ia3.training.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """An adapter to train.

    Attributes:
        name: of its folder within the output folder, such as "seed-0"; "" for a single adapter in that folder itself.
        shared: the same without the seed.
        task: what its rows mean.
        seed: decided which examples were drawn, and decides their order.
        learning_rate: None: the recipe's.
        examples: what it learns from.
        test: what it is measured on; none: not at all.
    """

    name: str
    shared: str
    task: Task
    seed: int
    learning_rate: float | None
    examples: Sequence[Row]
    test: Sequence[Row]

    def titled(self, text: str) -> str:
        """A progress bar's title, with the name where there are several."""
        return f"{text} {self.name}".strip()


@dataclass(frozen=True)
class Run:
    """One run of the command: jobs of different names, all on one base model.

    Attributes:
        model: the base model's name.
        jobs: the adapters.
        recipe: how all of them are trained.
        examples_per_label: how many were asked for.
        folder: where results go.
        folds: cross-validate on the examples in so many parts, and calibrate by them; 0: do not.
        all_templates: measure with each of a task's templates, not with the first alone.
        dtype: of the base model's weights, as `load_base` takes it.
    """

    model: str
    jobs: Sequence[Job]
    recipe: Recipe
    examples_per_label: int | None
    folder: Path
    folds: int = 0
    all_templates: bool = False
    dtype: str = "auto"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the result."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "recipe": self.recipe.model_dump(),
            "examples_per_label": self.examples_per_label,
            "members": {
                job.name: {
                    "task": job.task.model_dump(),
                    "seed": job.seed,
                    "learning_rate": job.learning_rate,
                    "examples": fingerprint(job.examples),
                }
                for job in self.jobs
            },
        }

    def checkpoint(self) -> str:
        """The checkpoint to go on from.

        Raises:
            InputError: there is none, or it is of a run with other settings.
        """
        return checkpoint_of(self.checkpoints, self.settings, "members")


def run_jobs(out: Console, run: Run, checkpoint: str | None) -> dict[str, dict[str, Any]]:
    """Do the work; returns the results of each job by its name.

    Args:
        out: where people read.
        run: what to do.
        checkpoint: of an interrupted run, to go on from.
    """
    jobs = run.jobs
    with out.status("Loading the model …"):
        from transformers import set_seed

        from ia3.adapter.pretrained import load_base
        from ia3.training.fleet import FleetTrainer, Member

        base, tokenizer = load_base(run.model, jobs[0].task.labels, run.dtype)
        # Names in the model may hold neither the dots nor the slashes that names of folders may.
        adapters = ["default"] if len(jobs) == 1 else [f"member{number}" for number in range(len(jobs))]
        model = with_adapters(base, adapters, run.recipe.init)

    with progress(out) as bars:
        arguments = run.recipe.training_arguments(
            run.checkpoints,
            seed=jobs[0].seed,
            save_strategy="steps",
            save_steps=max(1, min(10, run.recipe.steps // 4)),
            save_total_limit=2,
            disable_tqdm=True,
        )
        set_seed(jobs[0].seed)
        members = [
            Member(adapter, job.task, job.examples, job.seed, job.learning_rate)
            for adapter, job in zip(adapters, jobs, strict=True)
        ]
        callback = bars_callback(bars, {a: job.titled("Training") for a, job in zip(adapters, jobs, strict=True)})
        try:
            trainer = FleetTrainer(model, arguments, tokenizer, members, run.recipe, callbacks=[callback])
        except InputError as error:  # says whose rows do not fit
            text = str(error)
            for adapter, job in zip(adapters, jobs, strict=True):
                text = text.replace(f"Member {adapter!r}", repr(job.name))
            raise InputError(text) from error
        trainer.silence()

        predicted = functools.partial(_predicted, bars, model, tokenizer, run.recipe)
        with model.disable_adapter():  # which may have been trained on other tasks
            zero_shot = _in_each_template(run, lambda some, template: _zero_shot(bars, some, predicted, template))
        if checkpoint is None:  # a new run forgets the checkpoints of an earlier one
            begin(run.checkpoints, run.settings)
        started = time.perf_counter()
        try:
            trained = trainer.train(resume_from_checkpoint=checkpoint)
        except KeyboardInterrupt:
            bars.stop()
            say_interrupted(run.checkpoints)
            raise typer.Exit(130) from None
        seconds = time.perf_counter() - started
        names = {job.name: adapter for adapter, job in zip(adapters, jobs, strict=True)}
        after = _in_each_template(run, lambda some, template: _trained(bars, some, names, predicted, template))
        found: dict[str, dict[str, Any]] = {}
        for adapter, job, before, then in zip(adapters, jobs, zero_shot, after, strict=True):
            found[job.name] = _measured(run, job, before, then) | {
                "train_seconds": round(seconds, 2),
                "train_loss": trained.metrics[f"train_loss/{adapter}"],
                "recipe": run.recipe.name,
                "steps": trainer.steps_of(adapter),
                "seed": job.seed,
                **({} if job.learning_rate is None else {"learning_rate": job.learning_rate}),
                **({} if len(jobs) == 1 else {"trained_at_once": len(jobs)}),
                "train_examples": len(job.examples),
                "test_rows": len(job.test),
                "trainable_parameters": sum(parameter.numel() for parameter in model.adapter_parameters(adapter)),
                "model": base.name_or_path,
                "task": job.task.name,
            }

        def save(adapter: str, job: Job, calibration: Calibration | None = None) -> dict[str, Any]:
            its = found[job.name]
            return write(run.folder / job.name, model, adapter, job.task, run.recipe, its, job.examples, calibration)

        # Before they are cross-validated: what has been trained is not lost to what comes after it.
        results = {job.name: save(adapter, job) for adapter, job in zip(adapters, jobs, strict=True)}
        if run.folds:
            for adapter, job in zip(adapters, jobs, strict=True):
                found[job.name]["cross_validation"], calibration = _cross_validated(bars, model, tokenizer, run, job)
                results[job.name] = save(adapter, job, calibration)
    return results


def _measured(
    run: Run, job: Job, zero_shot: Sequence[dict[str, float]], trained: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """What was measured on a job's test rows, in each template; nothing without them."""
    if not job.test:
        return {}
    # The majority of the training rows says nothing when they are balanced; the test rows' own is the fair bar.
    labels = [job.task.label(row) for row in job.test]
    majority = Counter(labels).most_common(1)[0][0]
    found: dict[str, Any] = {
        "zero_shot": _median(zero_shot),
        "trained": _median(trained),
        "majority": job.task.metrics(labels, [majority] * len(labels)),
    }
    if run.all_templates:
        pairs = zip(job.task.templates, zero_shot, trained, strict=True)
        found["templates"] = [{"name": template.name, "zero_shot": a, "trained": b} for template, a, b in pairs]
    return found


def _in_each_template(
    run: Run, measure: Callable[[Sequence[Job], int], list[dict[str, float] | None]]
) -> list[list[dict[str, float]]]:
    """For each job its metrics with each template that it is to be measured with; none without test rows."""
    found: dict[str, list[dict[str, float]]] = {job.name: [] for job in run.jobs}
    count = max(len(job.task.templates) for job in run.jobs) if run.all_templates else 1
    for template in range(count):
        some = [job for job in run.jobs if template < len(job.task.templates)]
        for job, scores in zip(some, measure(some, template), strict=True):
            found[job.name] += [] if scores is None else [scores]
    return list(found.values())


def _median(some: Sequence[dict[str, float]]) -> dict[str, float]:
    """Each metric's median over templates, the paper's way to measure (Liu et al. 2022, section 3.1)."""
    return {metric: statistics.median(scores[metric] for scores in some) for metric in some[0]}


def _cross_validated(
    bars: Progress, model: Any, tokenizer: Any, run: Run, job: Job
) -> tuple[dict[str, float], Calibration]:
    recipe = run.recipe.changed(learning_rate=job.learning_rate)
    title = job.titled("Cross-validation")
    return cross_validated(
        bars, title, model, tokenizer, job.task, job.examples, recipe, run.folds, job.seed, run.checkpoints
    )


def cross_validated(
    bars: Progress,
    title: str,
    model: IA3Model,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row],
    recipe: Recipe,
    folds: int,
    seed: int,
    folder: Path,
) -> tuple[dict[str, float], Calibration]:
    """The metrics of labelled rows, each predicted by an adapter that has not seen it, and what they calibrate.

    Args:
        bars: where progress is shown.
        title: of its bar.
        model, tokenizer, task, rows, recipe, folds, seed: as of `cross_validate`.
        folder: its `output_dir`.
    """
    from ia3.evaluation.calibration import Calibration, cross_validate

    bar = bars.add_task(title, total=recipe.steps, note="")
    labels = [task.label(row) for row in rows]
    found = cross_validate(
        model,
        tokenizer,
        task,
        rows,
        recipe,
        folds,
        seed,
        folder,
        lambda done, total: bars.update(bar, completed=done, total=total),
    )
    scores = task.metrics(labels, [prediction.best for prediction in found])
    [shown] = [one for one in bars.tasks if one.id == bar]
    bars.update(bar, total=shown.completed)  # full, also where all folds stopped early
    _note(bars, title, task, [scores])
    return scores, Calibration.fit(found, labels)


def train_alone(
    bars: Progress,
    title: str,
    model: IA3Model,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row],
    recipe: Recipe,
    seed: int,
    folder: Path | str,
) -> tuple[FleetTrainer, dict[str, float], float]:
    """Train a model's active adapter as `ia3 train` does, without checkpoints.

    Args:
        bars: where progress is shown.
        title: of its bar.
        model: what `with_adapters` makes of a base model.
        tokenizer, task, rows, recipe, seed: as of `FleetTrainer` and its `Member`.
        folder: the trainer's; nothing is written to it.

    Returns:
        The trainer, its metrics, and the seconds that training took.
    """
    from transformers import set_seed

    from ia3.training.fleet import FleetTrainer, Member

    [adapter] = model.active_adapters
    arguments = recipe.training_arguments(folder, seed=seed, save_strategy="no", disable_tqdm=True)
    set_seed(seed)
    callback = bars_callback(bars, {adapter: title})
    members = [Member(adapter, task, rows, seed)]
    trainer = FleetTrainer(model, arguments, tokenizer, members, recipe, callbacks=[callback])
    trainer.silence()
    started = time.perf_counter()
    metrics = trainer.train().metrics
    return trainer, metrics, time.perf_counter() - started


def with_adapters(base: PreTrainedModel, adapters: Sequence[str], init: str | None) -> IA3Model:
    """A base model with adapters to train, the first one active.

    Args:
        base: the model.
        adapters: their names.
        init: an adapter that all start from; None: ones.
    """
    from ia3.adapter.config import IA3Config
    from ia3.adapter.model import IA3Model
    from ia3.adapter.pretrained import task_type

    if init is None:
        config = {"task_type": task_type(base), "base_model_name_or_path": base.name_or_path}
        return IA3Model(base, {adapter: IA3Config(**config) for adapter in adapters})
    model = IA3Model(base, {})
    for adapter in adapters:
        model.load_adapter(init, adapter, is_trainable=True)
        model.peft_config[adapter].base_model_name_or_path = base.name_or_path
    model.set_adapter(adapters[0])
    return model


_Predicted = Callable[..., dict[str, list[str]]]


def _zero_shot(
    bars: Progress, jobs: Sequence[Job], predicted: _Predicted, template: int
) -> list[dict[str, float] | None]:
    """The untrained model's metrics on each job's test rows; a row of several jobs' goes through the model once."""
    tasks = {id(job.task): job.task for job in jobs}
    rows = {key: {id(row): row for job in jobs if id(job.task) == key for row in job.test} for key in tasks}
    titles = {key: f"Zero-shot {task.name}" if len(tasks) > 1 else "Zero-shot" for key, task in tasks.items()}
    titles = {key: _in_words(title, template) for key, title in titles.items()}
    asked = {titles[key]: [(task, row) for row in rows[key].values()] for key, task in tasks.items()}
    found = predicted(asked, template)
    labels = {key: dict(zip(rows[key], found[titles[key]], strict=True)) for key in tasks}
    scores = [_scores(job, [labels[id(job.task)][id(row)] for row in job.test], template) for job in jobs]
    for key, task in tasks.items():
        _note(bars, titles[key], task, [score for job, score in zip(jobs, scores, strict=True) if job.task is task])
    return scores


def _trained(
    bars: Progress, jobs: Sequence[Job], adapters: Mapping[str, str], predicted: _Predicted, template: int
) -> list[dict[str, float] | None]:
    """The metrics of each job's adapter on its test rows."""
    titles = [_in_words(job.titled("Trained"), template) for job in jobs]
    asked = {title: [(job.task, row) for row in job.test] for title, job in zip(titles, jobs, strict=True)}
    names = [adapters[job.name] for job in jobs for _ in job.test]
    found = predicted(asked, template, names if len(adapters) > 1 else None)
    scores = [_scores(job, found[title], template) for title, job in zip(titles, jobs, strict=True)]
    for title, job, score in zip(titles, jobs, scores, strict=True):
        _note(bars, title, job.task, [score])
    return scores


def _in_words(title: str, template: int) -> str:
    return f"{title}, template {template + 1}" if template else title


def _predicted(
    bars: Progress,
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    asked: Mapping[str, Sequence[tuple[Task, Row]]],
    template: int,
    adapters: Sequence[str] | None = None,
) -> dict[str, list[str]]:
    """The label of each row, by the title of its bar; rows of all titles share batches."""
    from ia3.evaluation.prediction import predict

    titles = [title for title, pairs in asked.items() for _ in pairs]
    pairs = [pair for some in asked.values() for pair in some]
    found: dict[str, list[str]] = {title: [] for title in asked}
    if pairs:
        ids = {title: bars.add_task(title, total=len(some), note="") for title, some in asked.items() if some}

        def advance(done: list[int]) -> None:
            for title, count in Counter(titles[index] for index in done).items():
                bars.advance(ids[title], count)

        tasks, rows = zip(*pairs, strict=True)
        items = predict(model, tokenizer, tasks, rows, advance, adapters, template=template, recipe=recipe)
        for title, item in zip(titles, items, strict=True):
            found[title].append(item.best)
    return found


def _scores(job: Job, predictions: list[str], template: int) -> dict[str, float] | None:
    """A job's metrics; a template that says itself which answer is right may list its answers in an order of its own."""
    labels = [job.task.label(row, template=template) for row in job.test]
    return job.task.metrics(labels, predictions) if labels else None


def _note(bars: Progress, title: str, task: Task, scores: Sequence[dict[str, float] | None]) -> None:
    """Show the headline number, a mean where jobs were measured on different rows, beside a bar that is full."""
    values = [score[task.metric] for score in scores if score is not None]
    for bar in bars.tasks:
        if values and bar.description == title:
            bars.update(bar.id, note=f"{task.metric.replace('_', '-')} {statistics.mean(values):.1%}")


def bars_callback(bars: Progress, titles: Mapping[str, str]) -> Any:
    """A trainer's callback that shows each member's steps and loss."""
    from transformers import TrainerCallback

    class Bars(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            done, total = state.global_step, state.max_steps
            self.ids = {a: bars.add_task(title, total=total, completed=done, note="") for a, title in titles.items()}

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            for adapter, bar in self.ids.items():
                if logs and f"loss/{adapter}" in logs:
                    loss = float(logs[f"loss/{adapter}"])
                    bars.update(bar, completed=state.global_step, note=f"loss {loss:.3f}")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for bar in bars.tasks:
                if bar.id in self.ids.values() and bar.completed < (bar.total or 0):  # stopped early
                    bars.update(bar.id, total=bar.completed, note=f"{bar.fields['note']}, learned by heart")

    return Bars()
