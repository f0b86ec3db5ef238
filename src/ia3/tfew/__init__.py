"""T-Few: train an adapter from a few dozen labelled examples, and score answer choices with it."""

from ia3.tfew.calibration import Calibration, cross_validate
from ia3.tfew.choices import pack, score_choices
from ia3.tfew.fleet import FleetTrainer, Member
from ia3.tfew.icl import Prefix, draw_shots, predict_in_context
from ia3.tfew.losses import tfew_loss
from ia3.tfew.predict import Prediction, predict
from ia3.tfew.prompts import read_prompts
from ia3.tfew.reading import read_rows
from ia3.tfew.recipe import EarlyStopping, Recipe
from ia3.tfew.task import Task, few_shot
from ia3.tfew.trainer import TFewTrainer

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
