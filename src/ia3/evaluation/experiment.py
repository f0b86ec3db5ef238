"""From labelled rows to adapters, and how much better they are than the untrained model: `Experiment`."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ia3.adapter.config import IA3Config
from ia3.adapter.pretrained import EMBEDDED_MODEL
from ia3.errors import InputError, brief, shown
from ia3.evaluation.checkpoints import checkpoint_of, settings_of
from ia3.evaluation.drawing import Draw, Source, drawn, read
from ia3.evaluation.progress import Progress
from ia3.evaluation.results import summary
from ia3.files import parse_bytes, write_json
from ia3.task.rows import as_rows
from ia3.task.task import Row, Task
from ia3.training.recipe import Recipe

T = TypeVar("T")

# What a task cannot be named when its adapter's folder stands beside these.
TAKEN = ("checkpoints", "metrics.json")


@dataclass(frozen=True)
class Trial:
    """One adapter of an experiment.

    Attributes:
        name: of its folder within the experiment's, such as "seed-0"; "" for a single adapter in that folder itself.
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
        """A text about this trial, with the name where there are several."""
        return f"{text} {self.name}".strip()


@dataclass(frozen=True)
class Outcome:
    """What came of an experiment.

    Attributes:
        folder: where the adapters are.
        trials: each one's results by its name.
        groups: names of trials that differ in the seed alone, by what they share.
        several: whether each adapter has its own folder in `folder`.
    """

    folder: Path
    trials: dict[str, dict[str, Any]]
    groups: dict[str, list[str]]
    several: bool

    @property
    def results(self) -> dict[str, Any]:
        """What metrics.json says: a single adapter's results; or those of all, and a summary over seeds."""
        if self.several:
            return {"members": self.trials, "summary": summary(self.trials, self.groups)}
        return self.trials[""]


@dataclass
class Experiment:
    """Draw examples, measure the untrained model, train, measure again, save; what `ia3 train` does.

        outcome = Experiment(task, rows, folder="adapters/tickets").run()
        outcome.results["zero_shot"], outcome.results["trained"], outcome.folder

    A list of tasks (with a list of each one's rows), of seeds or of learning rates trains an adapter for each
    combination, all at once, in a folder of its own within `folder`, such as "seed-0" or "rte/seed-0-lr-0.001".

    Attributes:
        task: what the rows mean.
        rows: labelled rows to draw examples from, as `as_rows` takes them; None: those that the task names.
        test: labelled rows to measure on; None: the rows that training leaves over, or, without `rows`, those that the
            task names.
        folder: where the results go.
        model: the base model, as `load_base` takes it.
        dtype: of its weights, as `load_base` takes it.
        memory: what is kept of texts that are read once takes at most so much, see `Readings`.
        recipe: how to train; None: the one for a model of that size.
        examples_per_label: how many are drawn; None: 16, or as many as there are; 0: all rows as they are.
        test_rows: measure on at most so many, drawn at random; 0: on all.
        seed: decides which examples are drawn, and their order.
        learning_rate: None: the recipe's.
        folds: cross-validate on the examples in so many parts, and calibrate by them; 0: do not.
        all_templates: measure with each of a task's templates and report the median, not with the first alone.
    """

    task: Task | Sequence[Task]
    rows: Any = None
    test: Any = None
    folder: str | os.PathLike = field(kw_only=True)
    model: str = EMBEDDED_MODEL
    dtype: str = "auto"
    recipe: Recipe | None = None
    examples_per_label: int | None = None
    test_rows: int = 200
    seed: int | Sequence[int] = 0
    learning_rate: float | Sequence[float] | None = None
    folds: int = 0
    all_templates: bool = False
    memory: int | str = "2GiB"

    @property
    def several(self) -> bool:
        """Whether each adapter gets a folder of its own."""
        return any(map(_is_list, (self.task, self.seed, self.learning_rate)))

    @functools.cached_property
    def sources(self) -> list[Source]:
        """Each task with its rows.

        Raises:
            InputError: not as many rows and test rows as tasks, or tasks whose names cannot name folders.
        """
        if not _is_list(self.task):
            return [source_of(self.task, self.rows, self.test)]  # type: ignore[arg-type]
        tasks = _listed(self.task)
        names = [task.name for task in tasks]
        bad = [name for name in names if names.count(name) > 1 or not names_a_folder(name) or name in TAKEN]
        if bad or not tasks:
            raise InputError(f"Expected tasks with different names that can name folders, found {shown(bad)}.")
        rows, test = ([None] * len(tasks) if its is None else list(its) for its in (self.rows, self.test))
        if not len(rows) == len(test) == len(tasks):
            raise InputError(
                f"Expected rows and test rows of each of {len(tasks)} tasks, found {len(rows)} and {len(test)}."
            )
        return [source_of(*its) for its in zip(tasks, rows, test, strict=True)]

    @functools.cached_property
    def draws(self) -> list[list[Draw]]:
        """For each task a draw with each seed. Raises `InputError` for rows that do not fit their task, or are too few."""
        found = []
        for source in self.sources:
            source.check()
            seeds = _listed(self.seed)
            found.append([drawn(source, self.examples_per_label, self.test_rows, seed) for seed in seeds])
        return found

    @functools.cached_property
    def trials(self) -> list[Trial]:
        """The adapters: a trial for each task, seed and learning rate; errors as of `sources` and `draws`."""
        found = []
        for source, draws in zip(self.sources, self.draws, strict=True):
            for seed, draw in zip(_listed(self.seed), draws, strict=True):
                for rate in _listed(self.learning_rate):
                    task_part = source.task.name if _is_list(self.task) else ""
                    seed_part = f"seed-{seed}" if _is_list(self.seed) else ""
                    rate_part = f"lr-{rate}" if _is_list(self.learning_rate) else ""
                    name = _joined("/", task_part, _joined("-", seed_part, rate_part))
                    shared = _joined("/", task_part, rate_part)
                    found.append(Trial(name, shared, source.task, seed, rate, draw.examples, draw.test))
        return found

    @property
    def folders(self) -> list[Path]:
        """All folders that results go into."""
        folder = Path(self.folder)
        paths = [path for trial in self.trials for path in (folder / trial.name, (folder / trial.name).parent, folder)]
        return list(dict.fromkeys(paths))

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return Path(self.folder) / "checkpoints"

    @functools.cached_property
    def chosen_recipe(self) -> Recipe:
        """How all adapters are trained."""
        return Recipe.for_model(self.model) if self.recipe is None else self.recipe

    def settings(self) -> dict[str, Any]:
        """All that decides the result."""
        members = {
            trial.name: {
                "task": trial.task,
                "seed": trial.seed,
                "learning_rate": trial.learning_rate,
                "examples": trial.examples,
            }
            for trial in self.trials
        }
        return settings_of(
            model=self.model,
            dtype=self.dtype,
            recipe=self.chosen_recipe,
            examples_per_label=self.examples_per_label,
            members=members,
        )

    def checkpoint(self) -> str:
        """The checkpoint to go on from.

        Raises:
            InputError: there is none, or it is of a run with other settings.
        """
        return checkpoint_of(self.checkpoints, self.settings(), "members")

    def check(self) -> None:
        """Raise `InputError` for what cannot be run, before a model is loaded."""
        files = [str(path) for path in self.folders if path.is_file()]
        if files:
            raise InputError(f"Expected a folder for the results, found the file {files[0]!r}.")
        parse_bytes(self.memory, "memory for readings")
        if self.chosen_recipe.init is not None:
            IA3Config.from_pretrained(self.chosen_recipe.init)
        if self.folds:
            from ia3.evaluation.calibration import fold_of_each

            for trial in self.trials:
                fold_of_each(trial.task, trial.examples, self.folds, trial.seed)

    def run(self, progress: Progress | None = None, resume: bool = False) -> Outcome:
        """Do all of it.

        Args:
            progress: told how it gets on.
            resume: go on from the last checkpoint of an interrupted run.

        Raises:
            InputError: see `check`, `checkpoint` and `load_base`.
            Interrupted: on a keyboard interrupt while adapters are trained.
        """
        from ia3.evaluation.running import Running

        self.check()
        checkpoint = self.checkpoint() if resume else None
        running = Running(self, progress or Progress())
        before = running.zero_shot()
        metrics, seconds = running.train(checkpoint)
        after = running.trained()
        found = {
            trial.name: running.results(trial, before[trial.name], after[trial.name], metrics, seconds)
            for trial in self.trials
        }
        # Before they are cross-validated: what has been trained is not lost to what comes after it.
        results = {trial.name: running.save(trial, found[trial.name]) for trial in self.trials}
        if self.folds:
            for trial in self.trials:
                found[trial.name]["cross_validation"], calibration = running.cross_validate(trial)
                results[trial.name] = running.save(trial, found[trial.name], calibration)
        groups: dict[str, list[str]] = {}
        for trial in self.trials:
            groups.setdefault(trial.shared, []).append(trial.name)
        outcome = Outcome(Path(self.folder), results, groups, self.several)
        if self.several:
            write_json(outcome.folder / "metrics.json", outcome.results)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        return outcome


def source_of(task: Task, rows: Any = None, test: Any = None) -> Source:
    """A task and its rows; arguments as of `Experiment`. Raises `InputError` where there are no rows."""
    if rows is None:
        if task.train is None:
            raise InputError(
                f"Expected training rows for {brief(task.name)}: it names none (`train:`), and none are given."
            )
        rows = read(task.train, task)
        if test is None and task.test is not None:
            test = read(task.test, task)
    return Source(task, as_rows(rows, task), None if test is None else as_rows(test, task))


def names_a_folder(name: str) -> bool:
    """Whether a task's name can name its adapter's folder."""
    return Path(name).name == name and not name.startswith(".")


def _joined(separator: str, *parts: str) -> str:
    return separator.join(part for part in parts if part)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence)


def _listed(value: T | Sequence[T]) -> list[T]:
    return list(value) if _is_list(value) else [value]  # type: ignore[arg-type,list-item]
