"""Train adapters on labelled rows and compare them with the untrained model: `Experiment`."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ia3 import processes
from ia3.adapter.config import IA3Config
from ia3.adapter.pretrained import EMBEDDED_MODEL
from ia3.adapter.stored import TASK_NAME, UNFINISHED
from ia3.errors import InputError, about, brief, shown
from ia3.evaluation.checkpoints import checkpoint_of, resumable, settings_of
from ia3.evaluation.drawing import Draw, Source, drawn, nested, read
from ia3.evaluation.progress import Progress
from ia3.evaluation.results import summary
from ia3.files import parse_bytes, write_json
from ia3.opinions.opinions import VECTORS, Opinions
from ia3.opinions.priors import BALANCED
from ia3.scoring import MEMORY
from ia3.task.free_text import FreeText
from ia3.task.kinds import AnyTask, task_from
from ia3.task.rows import as_rows
from ia3.task.task import Row
from ia3.training.recipe import Recipe

T = TypeVar("T")

CHECKPOINTS = "checkpoints"

# Names that a task cannot have, because its adapter's folder is beside these.
TAKEN = (CHECKPOINTS, "metrics.json")


@dataclass(frozen=True)
class Trial:
    """One task, seed and learning rate of an experiment. It produces one adapter.

    Attributes:
        name: its subfolder in the experiment's folder, such as "seed-0"; "" for a single adapter in the folder itself.
        shared: the name without the seed.
        task: the task of its rows, of any kind.
        seed: decides which examples are drawn, and their order.
        learning_rate: the learning rate; None: the recipe's.
        examples: the training examples.
        test: the test rows; empty: the trial is not evaluated.
        shares: as of `Draw`.
        part: the size of a part of another trial's examples (see `nested`), if this is a point of its learning curve, which is
            measured and not saved; None: it is not.
        of: the name of that trial.
    """

    name: str
    shared: str
    task: Any
    seed: int
    learning_rate: float | None
    examples: Sequence[Row]
    test: Sequence[Row]
    shares: Mapping[str, float] | None = None
    part: int | None = None
    of: str | None = None

    def titled(self, text: str) -> str:
        """A text about this trial, with the trial's name if there are several."""
        return f"{text} {self.name}".strip()


@dataclass(frozen=True)
class Outcome:
    """The outcome of an experiment.

    Attributes:
        folder: the folder of the adapters.
        trials: name of a trial → its results.
        groups: groups of trials that differ only in the seed: what they share → their names.
        several: whether each adapter has a subfolder of `folder`.
    """

    folder: Path
    trials: dict[str, dict[str, Any]]
    groups: dict[str, list[str]]
    several: bool

    @property
    def results(self) -> dict[str, Any]:
        """The content of metrics.json: a single adapter's results, or those of all adapters with a summary over
        seeds."""
        if self.several:
            return {"members": self.trials, "summary": summary(self.trials, self.groups)}
        return self.trials[""]


@dataclass
class Experiment:
    """Draw examples, evaluate the untrained model, train, evaluate again, save; this is what `ia3 train` does.

        outcome = Experiment(task, rows, folder="adapters/tickets").run()
        outcome.results["zero_shot"], outcome.results["trained"], outcome.folder

    Lists of tasks (with a list of rows for each), of seeds or of learning rates train one adapter for each combination.
    All train at once. Under `torchrun` or `accelerate launch`, processes share batches and test rows; the first one writes.
    Each adapter gets a subfolder of `folder`, such as "seed-0" or "rte/seed-0-lr-0.001".

    Attributes:
        task: the task of the rows. If `Task.infer` made it without a template, the training examples choose its wording.
        rows: labelled rows to draw examples from, as `as_rows` takes them; None: those that the task names.
        test: labelled test rows; None: the rows that are not used for training, or, without `rows`, the test rows that
            the task names.
        folder: the folder for the results.
        model: the base model, as `load_base` takes it.
        dtype: the type of its weights, as `load_base` takes it.
        device_map: where they go, as `load_base` takes it; None: "shards" if `accelerate launch` was told so, otherwise one device.
        memory: the maximum that `Readings` keep, in bytes or such as "2GiB".
        recipe: how to train; None: the one for a model of that size.
        examples_per_label: examples to draw per label; None: 16, or all if a label has fewer; 0: all rows. If the answer is text,
            examples in all; None: 64, or all if there are fewer.
        test_rows: the maximum of test rows, drawn at random; 0: all.
        seed: decides which examples are drawn, and their order.
        learning_rate: the learning rate; None: the recipe's.
        folds: the number of cross-validation parts of the examples, to weigh opinions by, or to calibrate the
            probabilities; 0: as few as opinions need (see `form_opinions`).
        all_templates: evaluate each of a task's templates and report the median, instead of the first template only;
            the vectors answer alone.
        prior: how frequent labels are where predictions will be made: "file", as in the rows to draw from; "balanced"; or
            label → share, of all labels. Opinions move their probabilities there.
        unlabelled: rows without labels; the prior is estimated on them (see `estimated_prior`), and heads learn from them where
            cross-validation agrees (see `self_train`).
        learning_curve: sizes of parts of the examples to train on, too, and to measure on the same test rows: examples per label, or
            in all if the answer is text.
        report: the file for the report; None: report.html in the adapter's folder.
    """

    task: AnyTask | Sequence[AnyTask]
    rows: Any = None
    test: Any = None
    folder: str | os.PathLike = field(kw_only=True)
    model: str = EMBEDDED_MODEL
    dtype: str = "auto"
    device_map: str | None = field(default=None, kw_only=True)
    recipe: Recipe | None = None
    examples_per_label: int | None = None
    test_rows: int = 200
    seed: int | Sequence[int] = 0
    learning_rate: float | Sequence[float] | None = None
    folds: int = 0
    all_templates: bool = False
    memory: int | str = MEMORY
    prior: str | Mapping[str, float] = "file"
    unlabelled: Any = None
    learning_curve: Sequence[int] = ()
    report: str | os.PathLike | None = None

    @property
    def generates(self) -> bool:
        """Whether the answers are texts. Raises `InputError` if only those of some tasks are."""
        kinds = {isinstance(task, FreeText) for task in _listed(self.task)}
        if len(kinds) > 1:
            raise InputError(
                "Expected tasks with choices or tasks whose answer is text, found both", "train them apart"
            )
        return kinds == {True}

    @property
    def several(self) -> bool:
        """Whether each adapter gets a subfolder."""
        return any(map(_is_list, (self.task, self.seed, self.learning_rate)))

    @functools.cached_property
    def sources(self) -> list[Source]:
        """Each task with its rows.

        Raises:
            InputError: the numbers of tasks, rows and test rows differ, or a task's name cannot name a folder.
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
        """For each task, the draw of each seed. Raises `InputError` if rows do not fit their task or are too few."""
        found = []
        for source in self.sources:
            source.check()
            seeds = _listed(self.seed)
            found.append([drawn(source, self.examples_per_label, self.test_rows, seed) for seed in seeds])
        return found

    @functools.cached_property
    def trials(self) -> list[Trial]:
        """A trial for each task, seed and learning rate. The errors are those of `sources` and `draws`."""
        found = []
        for source, draws in zip(self.sources, self.draws, strict=True):
            for seed, draw in zip(_listed(self.seed), draws, strict=True):
                for rate in _listed(self.learning_rate):
                    task_part = source.task.name if _is_list(self.task) else ""
                    seed_part = f"seed-{seed}" if _is_list(self.seed) else ""
                    rate_part = f"lr-{rate}" if _is_list(self.learning_rate) else ""
                    name = _joined("/", task_part, _joined("-", seed_part, rate_part))
                    shared = _joined("/", task_part, rate_part)
                    found.append(Trial(name, shared, source.task, seed, rate, draw.examples, draw.test, draw.shares))
        return found

    @functools.cached_property
    def points(self) -> list[Trial]:
        """A trial for each point of each trial's learning curve. Raises `InputError` for sizes that its examples have not."""
        found = []
        unit = "examples" if self.generates else "per label"
        for trial in self.trials if self.learning_curve else ():
            with about(trial.name or None):
                parts = nested(trial.task, trial.examples, self.learning_curve)
            for size, rows in parts.items():
                name = _joined(" ", trial.name, f"{size} {unit}")
                found.append(replace(trial, name=name, shared=name, examples=rows, part=size, of=trial.name))
        return found

    @property
    def members(self) -> list[Trial]:
        """All that train together: the trials, and the points of their learning curves."""
        return [*self.trials, *self.points]

    @property
    def folders(self) -> list[Path]:
        """All folders for results."""
        folder = Path(self.folder)
        paths = [path for trial in self.trials for path in (folder / trial.name, (folder / trial.name).parent, folder)]
        return list(dict.fromkeys(paths))

    @functools.cached_property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return Path(self.folder) / CHECKPOINTS

    @functools.cached_property
    def whole(self) -> list[Trial]:
        """All trials of the experiment that this is, or of which this is a part; together they decide what is trained."""
        return self.trials

    def part(self, names: Collection[str], checkpoints: Path) -> Experiment:
        """The same experiment with some of its trials, which `measured` can run apart from the others.

        Args:
            names: of the trials.
            checkpoints: the part's own folder of checkpoints.
        """
        found = copy.copy(self)
        found.whole, found.checkpoints = self.whole, checkpoints
        found.trials = [trial for trial in self.whole if trial.name in names]
        found.points = [point for point in self.points if point.of in names]
        return found

    @functools.cached_property
    def chosen_recipe(self) -> Recipe:
        """The recipe of all adapters."""
        chosen = Recipe.for_model(self.model, self.generates) if self.recipe is None else self.recipe
        return chosen.likelihood_only if self.generates else chosen

    def settings(self) -> dict[str, Any]:
        """All settings that decide the result."""
        members = {
            trial.name: {
                "task": trial.task,
                "seed": trial.seed,
                "learning_rate": trial.learning_rate,
                "examples": trial.examples,
            }
            for trial in self.members
        }
        return settings_of(
            model=self.model,
            dtype=self.dtype,
            recipe=self.chosen_recipe,
            examples_per_label=self.examples_per_label,
            members=members,
        )

    def checkpoint(self) -> str:
        """The checkpoint to resume from.

        Raises:
            InputError: there is none, or it belongs to a run with other settings.
        """
        return checkpoint_of(self.checkpoints, self.settings(), "members")

    def check(self) -> None:
        """Raise `InputError` if the experiment cannot run, before a model is loaded."""
        files = [str(path) for path in self.folders if path.is_file()]
        if files:
            raise InputError(f"Expected a folder for the results, found the file {files[0]!r}.")
        from ia3.opinions.sentences import Sentences

        parse_bytes(self.memory, "memory for readings")
        if self.generates:
            self._check_generates()
        self._check_prior()
        if self.chosen_recipe.init is not None:
            IA3Config.from_pretrained(self.chosen_recipe.init)
        if self.chosen_recipe.opinions != VECTORS:
            Sentences.found(self.chosen_recipe.encoder)
        for trial in self.members:
            if trial.task.multi_label:
                self._check_label_sets(trial)
        self.check_report()
        if self.folds:
            from ia3.evaluation.learner import fold_of_each

            for trial in self.members:
                with about(trial.name or None):
                    fold_of_each(trial.task, trial.examples, self.folds, trial.seed)

    def check_report(self) -> None:
        """Raise `InputError` for a learning curve or a report that cannot be; warn of what a report lacks."""
        from ia3.evaluation.report.plots import can_draw

        if self.learning_curve and self.all_templates:
            raise InputError(
                "Expected the first template alone for a learning curve, found all of them",
                "leave out",
                argument="learning_curve",
            )
        untested = [trial for trial in self.trials if not trial.test]
        if self.learning_curve and untested:
            raise InputError(
                "Expected test rows to measure a learning curve on, found none", "leave out", argument="learning_curve"
            )
        if self.report is not None and self.several:
            raise InputError("Expected one adapter for a report, found several", "leave out", argument="report")
        require_page(self.report)
        can_draw()

    def _check_label_sets(self, trial: Trial) -> None:
        """Raise `InputError` for what a multi-label task cannot have."""
        from ia3.evaluation.label_sets import require_label_sets

        require_label_sets(trial.task, trial.examples, self.chosen_recipe)
        self._refuse(
            f"Expected a task with one label for each row, found the multi-label task {brief(trial.task.name)}",
            all_templates=self.all_templates,
            unlabelled=self.unlabelled is not None,
            prior=self.prior != "file",
        )

    def _check_generates(self) -> None:
        """Raise `InputError` for settings and models that need labels."""
        self._refuse(
            "Expected tasks with choices, found one whose answer is text",
            folds=bool(self.folds),
            all_templates=self.all_templates,
            unlabelled=self.unlabelled is not None,
            prior=self.prior != "file",
        )
        from ia3.evaluation.generation import require_generator

        require_generator(self.model)
        for trial in self.trials:
            self.chosen_recipe.place(None, trial.task)

    @staticmethod
    def _refuse(why: str, **given: bool) -> None:
        """Raise `InputError` for the first argument that was given."""
        for argument, was_given in given.items():
            if was_given:
                raise InputError(why, "leave out", argument=argument)

    def _check_prior(self) -> None:
        """Raise `InputError` for a prior that does not fit the tasks."""
        if isinstance(self.prior, str) and self.prior not in ("file", BALANCED):
            raise InputError(f'Expected a prior "file", "balanced" or label → share, found {brief(self.prior)}.')
        for trial in self.trials:
            if not isinstance(self.prior, str):
                Opinions().toward(self.prior, dict.fromkeys(trial.task.labels or (), 1.0))
            if self.unlabelled is not None:
                if not len(self.unlabelled):
                    raise InputError("Expected rows without labels, found none.")
                for number, row in enumerate(as_rows(self.unlabelled, trial.task), 1):
                    with about("The rows without labels"):
                        _ = trial.task.wording(row, number).prompt

    def run(self, progress: Progress | None = None, resume: bool = False) -> Outcome:
        """Run the experiment.

        Args:
            progress: shows the progress.
            resume: continue from the last checkpoint of an interrupted run.

        Raises:
            InputError: see `check`, `checkpoint` and `load_base`.
            Interrupted: on a keyboard interrupt during training.
        """
        self.check()
        checkpoint = self.checkpoint() if resume else None
        rows = {trial.name: trial.test for trial in self.trials}
        if processes.sharded_by_launcher() and self.device_map is None:
            self.device_map = "shards"
        processes.connect([self.settings(), rows, self.prior, self.unlabelled, self.device_map])
        progress = progress or Progress()
        self._say_replaced(progress)
        return self.finish(self.measured(progress, checkpoint))

    def _say_replaced(self, progress: Progress) -> None:
        """Say which folders have an adapter of another task."""
        for trial in self.trials:
            file = Path(self.folder, trial.name, TASK_NAME)
            if not file.is_file():
                continue
            with contextlib.suppress(InputError):  # a damaged one is no loss
                earlier = task_from(file)
                if {*(earlier.labels or ())} != {*(trial.task.labels or ())}:
                    progress.say(
                        f"{str(file.parent)!r} holds an adapter of another task, {brief(earlier.name)}; it is replaced as soon as "
                        f"this one is trained."
                    )

    def measured(self, progress: Progress, checkpoint: str | None = None) -> dict[str, dict[str, Any]]:
        """Measure, train, measure again and save each trial; returns their results, by name.

        Args:
            progress: shows the progress.
            checkpoint: the checkpoint to go on from; None: begin.

        Raises:
            Interrupted: on a keyboard interrupt during training.
        """
        from ia3.evaluation.running import Running
        from ia3.evaluation.running_text import RunningText

        running = (RunningText if self.generates else Running)(self, progress)
        before = running.zero_shot()
        metrics, seconds = running.train(checkpoint)
        after = running.trained()
        found = {
            trial.name: running.results(trial, before[trial.name], after[trial.name], metrics, seconds)
            for trial in running.own
        }
        # Before cross-validation, so that the trained adapters are not lost if it fails.
        results = {}
        if running.recipe.opinions != "head":
            results = {trial.name: running.save(trial, found[trial.name] | {UNFINISHED: True}) for trial in running.own}
        with resumable(self.checkpoints):
            for trial in running.points:
                curve = found[str(trial.of)].setdefault("learning_curve", [])
                curve.append(running.point(trial, after[trial.name]))
            for trial in running.own:
                more, opinions, calibration = {}, None, None
                if running.forms_opinions[trial.name]:
                    more, opinions, calibration = running.opinions(trial)
                elif self.folds:
                    more, calibration = running.cross_validate(trial)
                found[trial.name].update(more)
                results[trial.name] = running.save(trial, found[trial.name], calibration, opinions, reported=True)
        return results

    def finish(self, results: Mapping[str, dict[str, Any]]) -> Outcome:
        """Write what belongs to all trials, given the results of each, and remove the checkpoints."""
        groups: dict[str, list[str]] = {}
        for trial in self.trials:
            groups.setdefault(trial.shared, []).append(trial.name)
        each = {trial.name: results[trial.name] for trial in self.trials}
        outcome = Outcome(Path(self.folder), each, groups, self.several)
        if processes.is_first():
            if self.several:
                write_json(outcome.folder / "metrics.json", outcome.results)
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        return outcome


def require_page(path: str | os.PathLike | None) -> None:
    """Raise `InputError` for a report's file that cannot be one; None is the usual one."""
    if path is not None and (Path(path).suffix != ".html" or Path(path).is_dir()):
        raise InputError(
            f"Expected a file that ends in .html for the report, found {brief(os.fspath(path))}",
            "change",
            argument="report",
        )
    if path is not None:
        there = next(parent for parent in Path(path).absolute().parents if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise InputError(
                f"Expected a report's file in a folder that can be written to, found {brief(os.fspath(path))}",
                "change",
                argument="report",
            )


def source_of(task: AnyTask, rows: Any = None, test: Any = None) -> Source:
    """A task and its rows; the arguments are those of `Experiment`. Raises `InputError` if there are no rows."""
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
