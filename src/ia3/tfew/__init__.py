"""T-Few: train an adapter from a few dozen labelled examples, and score answer choices with it.

Names are loaded when they are first used: reading a task needs no torch, and predicting no trainer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ia3.tfew.calibration import Calibration, cross_validate
    from ia3.tfew.choices import pack, score_choices
    from ia3.tfew.fleet import FleetTrainer, Member
    from ia3.tfew.icl import Prefix, draw_shots, predict_in_context
    from ia3.tfew.losses import tfew_loss
    from ia3.tfew.prediction import Prediction, predict
    from ia3.tfew.prompts import read_prompts
    from ia3.tfew.reading import read_rows
    from ia3.tfew.recipe import EarlyStopping, Recipe
    from ia3.tfew.rows import as_rows
    from ia3.tfew.task import Task, few_shot
    from ia3.tfew.trainer import TFewTrainer

_HOMES = {
    "Calibration": "calibration",
    "EarlyStopping": "recipe",
    "FleetTrainer": "fleet",
    "Member": "fleet",
    "Prediction": "prediction",
    "Prefix": "icl",
    "Recipe": "recipe",
    "TFewTrainer": "trainer",
    "Task": "task",
    "as_rows": "rows",
    "cross_validate": "calibration",
    "draw_shots": "icl",
    "few_shot": "task",
    "pack": "choices",
    "predict": "prediction",
    "predict_in_context": "icl",
    "read_prompts": "prompts",
    "read_rows": "reading",
    "score_choices": "choices",
    "tfew_loss": "losses",
}

__all__ = [
    "Calibration",
    "EarlyStopping",
    "FleetTrainer",
    "Member",
    "Prediction",
    "Prefix",
    "Recipe",
    "TFewTrainer",
    "Task",
    "as_rows",
    "cross_validate",
    "draw_shots",
    "few_shot",
    "pack",
    "predict",
    "predict_in_context",
    "read_prompts",
    "read_rows",
    "score_choices",
    "tfew_loss",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"ia3.tfew.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ia3.tfew' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
