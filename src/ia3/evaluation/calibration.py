"""Calibrated probabilities: `cross_validate`, `Calibration`."""

from __future__ import annotations

import itertools
import json
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.special import expit

from ia3.errors import InputError, excerpt, problems, shown
from ia3.files import parse_json, reading
from ia3.task.rows import as_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.adapter.model import IA3Model
    from ia3.evaluation.prediction import Prediction
    from ia3.evaluation.progress import Stage
    from ia3.scoring.readings import Readings
    from ia3.task.task import Task
    from ia3.training.recipe import Recipe

# The range to search for the temperature. It is wide because an adapter that memorized its examples is overconfident.
_LOWEST, _HIGHEST = 0.05, 20.0

# Bins of the expected calibration error, as in Guo et al. 2017.
_BINS = 15


class Calibration(BaseModel):
    """A temperature for the probabilities, and their quality (Guo et al. 2017, arXiv:1706.04599).

    p = softmax(scores / temperature). The temperature does not change the best answer.

    Attributes:
        temperature: above 1 if the adapter is overconfident.
        rows: the number of labelled rows that it was fitted on, none of them training rows.
        log_loss, log_loss_before: mean of -log p(right label) in nats, with the temperature and with 1.
        calibration_error, calibration_error_before: the expected calibration error of the best label's probability, in
            15 bins, from 0 to 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(gt=0, allow_inf_nan=False)
    rows: int = Field(ge=1)
    log_loss: float
    log_loss_before: float
    calibration_error: float
    calibration_error_before: float

    @classmethod
    def as_it_is(cls, predictions: Sequence[Prediction], labels: Sequence[str]) -> Calibration:
        """What N predictions are worth whose probabilities are fitted already, as opinions' are; the temperature is 1."""
        found = cls.quality(predictions, labels, 1.0)
        before = {f"{name}_before": value for name, value in found.items()}
        return cls(temperature=1.0, rows=len(labels), **found, **before)

    @classmethod
    def fit(cls, predictions: Sequence[Prediction], labels: Sequence[str]) -> Calibration:
        """Fit the temperature with the lowest log-loss on N rows.

        Args:
            predictions: N predictions for rows that the adapter was not trained on.
            labels: N right labels; tuples of labels where rows may have several.

        Raises:
            InputError: there are no rows, or the numbers of predictions and labels differ.
        """
        from scipy.optimize import minimize_scalar

        scores = [prediction.scores for prediction in predictions]
        if not scores or len(scores) != len(labels):
            raise InputError(f"Expected predictions and as many labels, found {len(scores)} and {len(labels)}.")

        def log_loss(log_temperature: float) -> float:
            return _log_loss(scores, labels, float(np.exp(log_temperature)))

        found = minimize_scalar(log_loss, bounds=(np.log(_LOWEST), np.log(_HIGHEST)), method="bounded")
        temperature = float(np.exp(found.x))
        if log_loss(0.0) <= found.fun:
            temperature = 1.0
        before = {f"{name}_before": value for name, value in cls.quality(predictions, labels, 1.0).items()}
        return cls(temperature=temperature, rows=len(labels), **cls.quality(predictions, labels, temperature), **before)

    @staticmethod
    def quality(predictions: Sequence[Prediction], labels: Sequence[str], temperature: float) -> dict[str, float]:
        """`log_loss` and `calibration_error` of predictions at a temperature."""
        scores = [prediction.scores for prediction in predictions]
        return {
            "log_loss": _log_loss(scores, labels, temperature),
            "calibration_error": _calibration_error(scores, labels, temperature),
        }

    @classmethod
    def from_json(cls, data: bytes, path: str | os.PathLike) -> Calibration:
        """The calibration in the content of `path`. Raises `InputError` for a damaged file."""
        advice = "calibrate anew"
        with reading(path, "a calibration", advice):
            try:
                return cls.model_validate(parse_json(data, path, advice))
            except ValidationError as error:
                where = excerpt(os.fspath(path))
                raise InputError(f"Cannot use {where}: {problems(error, 'calibration')}; {advice}.") from error

    def to_json(self) -> str:
        """The JSON that `from_json` reads."""
        return json.dumps(self.model_dump(), indent=2) + "\n"


def _log_loss(scores: Sequence[Mapping[str, float]], labels: Sequence[str], temperature: float) -> float:
    losses: list[Any] = []
    for row, label in zip(scores, labels, strict=True):
        if isinstance(label, tuple):  # each label is decided by itself
            signs = np.array([-1 if name in label else 1 for name in row])
            losses.append(np.logaddexp(0, signs * np.array([*row.values()]) / temperature).mean())
            continue
        values = np.array(sorted(row.values())) / temperature
        losses.append(np.logaddexp.reduce(values) - row[label] / temperature)
    return float(np.mean(losses))


def _calibration_error(scores: Sequence[Mapping[str, float]], labels: Sequence[str], temperature: float) -> float:
    """Σ over bins of |accuracy - mean probability| · share of the rows."""
    from ia3.evaluation.prediction import Prediction

    if isinstance(labels[0], tuple):  # each label is decided by itself
        sure = expit(np.array([[*row.values()] for row in scores]).ravel() / temperature)
        right = np.array([name in its for row, its in zip(scores, labels, strict=True) for name in row], dtype=float)
    else:
        found = [Prediction.of(row, temperature) for row in scores]
        sure = np.array([item.probabilities[item.best] for item in found])
        right = np.array([item.best == label for item, label in zip(found, labels, strict=True)], dtype=float)
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    gaps = [abs(right[bins == b].mean() - sure[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


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
    from ia3.evaluation.prediction import predict
    from ia3.scoring.readings import Readings

    rows, readings = as_rows(rows, task), Readings() if readings is None else readings
    given = model, tokenizer, task, rows, recipe, folds, seed, output_dir, stage, readings, known
    with trained_on_others(*given) as names:
        return predict(model, tokenizer, task, rows, adapter_names=names, recipe=recipe, readings=readings)


@contextmanager
def trained_on_others(
    model: IA3Model,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Any,
    recipe: Recipe,
    folds: int,
    seed: int,
    output_dir: str | os.PathLike,
    stage: Stage | None,
    readings: Readings,
    known: Collection[str] | None = None,
) -> Iterator[list[str]]:
    """In a `with` block, the name of an adapter for each row that was trained without it; `cross_validate` has the arguments."""
    from transformers import TrainerCallback

    from ia3.adapter.config import IA3Config
    from ia3.adapter.pretrained import task_type
    from ia3.evaluation.start import Start
    from ia3.scoring.family import base_of
    from ia3.training.members import Member
    from ia3.training.trainer import TFewTrainer

    rows = as_rows(rows, task)
    each = fold_of_each(task, rows, folds, seed)
    free = (name for name in (f"fold{number}" for number in itertools.count()) if name not in model.peft_config)
    names = list(itertools.islice(free, folds))
    base = base_of(model)
    start = None if recipe.init is None else Start(recipe.init)
    if start is None:
        config = IA3Config(
            task_type=task_type(base), acts_from=recipe.place(base, task), target_modules=recipe.target_modules
        )
    else:
        config = replace(start.stored.config, inference_mode=False)
    # An adapter that was trained on held-out rows knows them already.
    anew = start is None or any(map(start.has_seen, rows))
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
            members = [
                Member(
                    task, [row for row, its in zip(rows, by_fold, strict=True) if its != name], name, seed, known=known
                )
                for name in names
            ]
            arguments = recipe.training_arguments(output_dir, seed=seed, save_strategy="no", disable_tqdm=True)
            trainer = TFewTrainer(model, arguments, tokenizer, members, recipe, readings)
            trainer.silence()

            class Steps(TrainerCallback):
                def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                    if stage is not None:
                        stage.reach(state.global_step)

            trainer.add_callback(Steps())
            trainer.train()
            yield by_fold
        finally:
            for name in added:
                model.delete_adapter(name)


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
