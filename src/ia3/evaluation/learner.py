"""Train a model on labelled rows, and ask it about rows that it was not trained on: `Learner`, `cross_validate`."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ia3.errors import InputError, shown
from ia3.evaluation.progress import Progress, Stage, training_stages
from ia3.processes import dealt
from ia3.task.rows import as_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from ia3.adapter.config import IA3Config
    from ia3.adapter.model import IA3Model
    from ia3.evaluation.prediction import Prediction
    from ia3.scoring.readings import Readings
    from ia3.task.task import Task
    from ia3.training.recipe import Recipe
    from ia3.training.trainer import TFewTrainer


@dataclass(frozen=True)
class Learner:
    """A model, and what it is to learn.

    Attributes:
        model: with the adapters that it has.
        tokenizer: the model's tokenizer.
        task: the task of the rows; a task whose answer is text can be trained, but not divided into folds.
        rows: N labelled rows.
        recipe: how to train.
        seed: decides the folds, and the order of examples in training.
        output_dir: the trainer's output folder; nothing is written to it.
        readings: keeps what is read of the rows' texts, from call to call; None: during each call.
        known: as of `Member`.
    """

    model: IA3Model
    tokenizer: PreTrainedTokenizerBase
    task: Any
    rows: Sequence[Any]
    recipe: Recipe
    seed: int = 0
    output_dir: str | os.PathLike = "cross-validation"
    readings: Readings | None = None
    known: Collection[str] | None = None

    def train(self, progress: Progress, title: str) -> tuple[TFewTrainer, dict[str, float], float]:
        """Train the active adapter on all rows as an `Experiment` does, without checkpoints.

        Args:
            progress: told of the steps.
            title: of its stage.

        Returns:
            The trainer, its metrics, and the seconds that training took.
        """
        from transformers import set_seed

        set_seed(self.seed)
        trainer = self._trainer({None: self.rows})
        trainer.add_callback(training_stages(progress, {"loss": title}))
        started = time.perf_counter()
        metrics = trainer.train().metrics
        return trainer, metrics, time.perf_counter() - started

    def held_out(
        self, folds: int, stage: Stage | None = None, templates: Sequence[int] = (0,)
    ) -> list[list[Prediction]]:
        """For each template, a prediction of each row by an adapter that was trained on the other folds: N of them.

        Args:
            folds, stage: as of `trained_on_others`.
            templates: the indices of some of the task's templates.
        """
        from ia3.evaluation.prediction import predict
        from ia3.scoring.family import passes_in_step
        from ia3.scoring.readings import Readings

        its = self if self.readings is not None else replace(self, readings=Readings())
        found = []
        with its.trained_on_others(folds, stage) as by_fold:
            for template in templates:

                def said_to(some: list[int], template: int = template) -> list[Prediction]:
                    how: dict[str, Any] = {"template": template, "recipe": its.recipe, "readings": its.readings}
                    how["adapter_names"] = [by_fold[index] for index in some]
                    return predict(its.model, its.tokenizer, its.task, [its.rows[index] for index in some], **how)

                found.append(dealt(len(its.rows), said_to, passes_in_step(its.model)))
        return found

    @contextmanager
    def trained_on_others(self, folds: int, stage: Stage | None = None) -> Iterator[list[str]]:
        """In a `with` block, for each row the name of an adapter that was trained without the row's fold (see `fold_of_each`).

        The adapters train all at once, with the results of separate runs. The model's own adapters stay as they are, trainable
        and active or not.

        Args:
            folds: how many adapters are added, and removed at the end.
            stage: shows the progress in steps.

        Raises:
            InputError: see `fold_of_each`.
        """
        from ia3.evaluation.start import Start

        model, recipe = self.model, self.recipe
        each = fold_of_each(self.task, self.rows, folds, self.seed)
        free = (name for name in (f"fold{number}" for number in itertools.count()) if name not in model.peft_config)
        names = list(itertools.islice(free, folds))
        start = None if recipe.init is None else Start(recipe.init)
        config = self._config() if start is None else replace(start.stored.config, inference_mode=False)
        # An adapter that was trained on held-out rows knows them already.
        anew = start is None or any(map(start.has_seen, self.rows))
        by_fold = [names[fold] for fold in each]
        added: list[str] = []
        with _kept_as_it_is(model):
            try:
                for name in names:
                    if anew or start is None:
                        model.add_adapter(name, replace(config))
                    else:
                        start.load(model, name)
                    added.append(name)
                others = {
                    name: [row for row, its in zip(self.rows, by_fold, strict=True) if its != name] for name in names
                }
                trainer = self._trainer(others)
                if stage is not None:
                    trainer.add_callback(_steps(stage))
                trainer.train()
                yield by_fold
            finally:
                for name in added:
                    model.delete_adapter(name)

    def _config(self) -> IA3Config:
        """Of a new adapter."""
        from ia3.adapter.config import IA3Config
        from ia3.adapter.pretrained import task_type
        from ia3.scoring.family import base_of

        base = base_of(self.model)
        place = self.recipe.place(base, self.task)
        return IA3Config(task_type=task_type(base), acts_from=place, target_modules=self.recipe.target_modules)

    def _trainer(self, rows_of: Mapping[Any, Sequence[Any]]) -> TFewTrainer:
        """Of adapters, name → rows; None is the active one."""
        from ia3.training.members import Member
        from ia3.training.trainer import TFewTrainer

        members = [Member(self.task, rows, name, known=self.known) for name, rows in rows_of.items()]
        how = {"seed": self.seed, "save_strategy": "no", "disable_tqdm": True}
        arguments = self.recipe.training_arguments(self.output_dir, **how)
        trainer = TFewTrainer(self.model, arguments, self.tokenizer, members, self.recipe, self.readings)
        trainer.silence()
        return trainer


def cross_validate(
    model: IA3Model,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Any,
    recipe: Recipe,
    folds: int = 5,
    seed: int = 0,
    output_dir: str | os.PathLike = "cross-validation",
    stage: Stage | None = None,
    readings: Readings | None = None,
    known: Collection[str] | None = None,
) -> list[Prediction]:
    """Predict each fold of the labelled rows with an adapter that is trained on the other folds.

    `fold_of_each` describes the folds. The adapters train all at once, with the results of separate runs, and are
    removed at the end.

    Args:
        model: gets an adapter per fold during the call; its own adapters stay as they are, trainable and active or not.
        tokenizer: the model's tokenizer.
        task: the task of the rows.
        rows: N labelled rows, as `as_rows` takes them.
        recipe: how to train.
        folds: the number of folds.
        seed: decides the folds, and the order of examples in training.
        output_dir: the trainer's output folder; nothing is written to it.
        stage: shows the progress in steps.
        readings: keeps the rows' texts, which all folds share; None: kept during this call.
        known: as of `Member`.

    Returns:
        N predictions, in the rows' order.

    Raises:
        InputError: see `fold_of_each`.
    """
    learner = Learner(model, tokenizer, task, as_rows(rows, task), recipe, seed, output_dir, readings, known)
    return learner.held_out(folds, stage)[0]


def fold_of_each(task: Task, rows: Any, folds: int, seed: int = 0) -> list[int]:
    """The fold of each labelled row in `cross_validate`, from 0. Nothing is trained or loaded.

    Folds are stratified if a label has at least as many rows as there are folds. Duplicate rows share a fold, because
    an adapter that has seen one of them has seen all.

    Raises:
        InputError: more folds than distinct rows, fewer than two folds, or a fold whose other rows have only one label.
    """
    from sklearn.model_selection import KFold, StratifiedKFold

    rows = as_rows(rows, task)
    words = [task.fingerprint(row, number) for number, row in enumerate(rows, 1)]
    found = [task.truth(row, number) for number, row in enumerate(rows, 1)]
    label_of = dict(zip(words, found, strict=True))
    if not 2 <= folds <= len(label_of):
        raise InputError(
            f"Expected from 2 folds to as many as there are different rows ({len(label_of)}), found {folds}."
        )
    labels = list(label_of.values())
    # If all labels have fewer rows than there are folds, the folds cannot be balanced.
    stratified = not task.multi_label and max(Counter(labels).values()) >= folds
    kind = StratifiedKFold if stratified else KFold
    with warnings.catch_warnings():  # a label with fewer rows than folds is missing in some folds, which is fine
        warnings.simplefilter("ignore", UserWarning)
        parts = kind(folds, shuffle=True, random_state=seed).split(labels, labels)
        different = list(label_of)
        fold_of = {different[i]: number for number, (_, held_out) in enumerate(parts) for i in held_out}
    each = [fold_of[key] for key in words]
    for number in range(folds):
        left = {label for label, fold in zip(found, each, strict=True) if fold != number}
        left = {label for its in left for label in its} if task.multi_label else left
        if len(left) < 2:
            raise InputError(
                f"Expected rows of at least two labels beside each of {folds} folds, to train on, found only {shown(left)} "
                f"beside one of them; give more rows of each label."
            )
    return each


def _steps(stage: Stage) -> TrainerCallback:
    """A trainer callback that shows steps."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stage.reach(state.global_step)

    return Steps()


@contextmanager
def _kept_as_it_is(model: IA3Model) -> Iterator[None]:
    """Restore the active, trainable and frozen adapters after a `with` block that adds and removes others."""
    active, modes = model.active_adapters, [(module, module.training) for module in model.modules()]
    trainable = {
        name: [(parameter, parameter.requires_grad) for parameter in model.adapter_parameters(name)]
        for name in model.peft_config
    }
    try:
        yield
    finally:
        model.set_adapter(active)
        for module, mode in modes:
            module.training = mode
        for name, parameters in trainable.items():
            model.set_requires_grad(name, any(learns for _, learns in parameters))  # so that the model's record agrees
            for parameter, learns in parameters:
                parameter.requires_grad_(learns)
