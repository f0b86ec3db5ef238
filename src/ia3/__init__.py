"""(IA)³: make a classifier from a pretrained transformer and a few dozen labelled examples (arXiv:2205.05638).

Names are loaded at their first use, so that `import ia3` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ia3.adapter.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from ia3.adapter.checkpoint import load_peft_weights
    from ia3.adapter.config import IA3Config, PeftType, TaskType
    from ia3.adapter.config import IA3Config as PeftConfig
    from ia3.adapter.layer import IA3Layer
    from ia3.adapter.model import IA3Model
    from ia3.adapter.peft import (
        NoMatchingPeftModuleError,
        PeftError,
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        PeftWarning,
        cast_mixed_precision_params,
        get_base_model_state_dict,
        get_peft_config,
        get_peft_model,
        inject_adapter_in_model,
        prepare_model_for_kbit_training,
        set_base_model_state_dict,
    )
    from ia3.adapter.pretrained import load_base
    from ia3.adapter.rules import Rule, WeightRule, register_rule
    from ia3.adapter.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
    from ia3.adapter.status import get_layer_status, get_model_status
    from ia3.bank import AdapterBank
    from ia3.classifier import FewShotClassifier
    from ia3.errors import InputError
    from ia3.evaluation.calibration import Calibration
    from ia3.evaluation.choosing import choose_model
    from ia3.evaluation.experiment import Experiment
    from ia3.evaluation.generation import Generated, generate
    from ia3.evaluation.icl import draw_shots, predict_in_context
    from ia3.evaluation.learner import cross_validate
    from ia3.evaluation.prediction import Prediction, Respondent, predict, predict_each
    from ia3.folder import AdapterFolder
    from ia3.scoring.decoder import pack
    from ia3.scoring.prefix import Prefix
    from ia3.scoring.readings import Readings
    from ia3.scoring.scorer import Scorer, score_choices
    from ia3.task.fields import Fields
    from ia3.task.free_text import FreeText
    from ia3.task.kinds import load_task
    from ia3.task.prompts import read_prompts
    from ia3.task.reading import read_rows
    from ia3.task.rows import as_rows
    from ia3.task.task import Task, few_shot
    from ia3.training.losses import tfew_loss
    from ia3.training.members import Member
    from ia3.training.recipe import EarlyStopping, Recipe
    from ia3.training.trainer import TFewTrainer

_NAMES = {
    "adapter.auto": (
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "adapter.checkpoint": ("load_peft_weights",),
    "adapter.config": ("IA3Config", "PeftType", "TaskType"),
    "adapter.layer": ("IA3Layer",),
    "adapter.model": ("IA3Model",),
    "adapter.peft": (
        "NoMatchingPeftModuleError",
        "PeftError",
        "PeftModel",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
        "PeftWarning",
        "cast_mixed_precision_params",
        "get_base_model_state_dict",
        "get_peft_config",
        "get_peft_model",
        "inject_adapter_in_model",
        "prepare_model_for_kbit_training",
        "set_base_model_state_dict",
    ),
    "adapter.pretrained": ("load_base",),
    "adapter.rules": ("Rule", "WeightRule", "register_rule"),
    "adapter.state_dict": ("get_peft_model_state_dict", "set_peft_model_state_dict"),
    "adapter.status": ("get_layer_status", "get_model_status"),
    "bank": ("AdapterBank",),
    "classifier": ("FewShotClassifier",),
    "errors": ("InputError",),
    "evaluation.calibration": ("Calibration",),
    "evaluation.choosing": ("choose_model",),
    "evaluation.experiment": ("Experiment",),
    "evaluation.generation": ("Generated", "generate"),
    "evaluation.icl": ("draw_shots", "predict_in_context"),
    "evaluation.learner": ("cross_validate",),
    "evaluation.prediction": ("Prediction", "Respondent", "predict", "predict_each"),
    "folder": ("AdapterFolder",),
    "scoring.decoder": ("pack",),
    "scoring.prefix": ("Prefix",),
    "scoring.readings": ("Readings",),
    "scoring.scorer": ("Scorer", "score_choices"),
    "task.fields": ("Fields",),
    "task.free_text": ("FreeText",),
    "task.kinds": ("load_task",),
    "task.prompts": ("read_prompts",),
    "task.reading": ("read_rows",),
    "task.rows": ("as_rows",),
    "task.task": ("Task", "few_shot"),
    "training.losses": ("tfew_loss",),
    "training.members": ("Member",),
    "training.recipe": ("EarlyStopping", "Recipe"),
    "training.trainer": ("TFewTrainer",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "AdapterBank",
    "AdapterFolder",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "Calibration",
    "EarlyStopping",
    "Experiment",
    "FewShotClassifier",
    "Fields",
    "FreeText",
    "Generated",
    "IA3Config",
    "IA3Layer",
    "IA3Model",
    "InputError",
    "Member",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftError",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "Prediction",
    "Prefix",
    "Readings",
    "Recipe",
    "Respondent",
    "Rule",
    "Scorer",
    "TFewTrainer",
    "Task",
    "TaskType",
    "WeightRule",
    "as_rows",
    "cast_mixed_precision_params",
    "choose_model",
    "cross_validate",
    "draw_shots",
    "few_shot",
    "generate",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_base",
    "load_peft_weights",
    "load_task",
    "pack",
    "predict",
    "predict_each",
    "predict_in_context",
    "prepare_model_for_kbit_training",
    "read_prompts",
    "read_rows",
    "register_rule",
    "score_choices",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "tfew_loss",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("ia3")
    if name == "PeftConfig":  # this package has only one config class
        return import_module("ia3.adapter.config").IA3Config
    if name in _HOMES:
        return getattr(import_module(f"ia3.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ia3' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
