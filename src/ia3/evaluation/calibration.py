"""Calibrated probabilities: `Calibration`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.special import expit

from ia3.errors import InputError, excerpt, problems
from ia3.files import parse_json, reading

if TYPE_CHECKING:
    from ia3.evaluation.prediction import Prediction

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
