"""(IA)³: adapt a pretrained transformer to a task from a few dozen labelled examples (arXiv:2205.05638).

Names are loaded when they are first used, so that `import ia3` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ia3.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from ia3.bank import AdapterBank
    from ia3.checkpoint import load_peft_weights
    from ia3.config import IA3Config, PeftType, TaskType
    from ia3.config import IA3Config as PeftConfig
    from ia3.errors import InputError
    from ia3.layers import IA3Layer
    from ia3.model import IA3Model
    from ia3.peft import (
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
        get_layer_status,
        get_model_status,
        get_peft_config,
        get_peft_model,
        inject_adapter_in_model,
        prepare_model_for_kbit_training,
        set_base_model_state_dict,
    )
    from ia3.pretrained import load_base
    from ia3.rules import Rule, WeightRule, register_rule
    from ia3.state_dict import get_peft_model_state_dict, set_peft_model_state_dict

_NAMES = {
    "auto": (
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "bank": ("AdapterBank",),
    "checkpoint": ("load_peft_weights",),
    "config": ("IA3Config", "PeftType", "TaskType"),
    "errors": ("InputError",),
    "layers": ("IA3Layer",),
    "model": ("IA3Model",),
    "peft": (
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
        "get_layer_status",
        "get_model_status",
        "get_peft_config",
        "get_peft_model",
        "inject_adapter_in_model",
        "prepare_model_for_kbit_training",
        "set_base_model_state_dict",
    ),
    "pretrained": ("load_base",),
    "rules": ("Rule", "WeightRule", "register_rule"),
    "state_dict": ("get_peft_model_state_dict", "set_peft_model_state_dict"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "AdapterBank",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "IA3Config",
    "IA3Layer",
    "IA3Model",
    "InputError",
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
    "Rule",
    "TaskType",
    "WeightRule",
    "cast_mixed_precision_params",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_base",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "register_rule",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]


def __getattr__(name: str) -> Any:
    if name == "PeftConfig":  # there is one kind of config here
        return import_module("ia3.config").IA3Config
    if name in _HOMES:
        return getattr(import_module(f"ia3.{_HOMES[name]}"), name)
    if name == "tfew":
        return import_module("ia3.tfew")
    raise AttributeError(f"module 'ia3' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "tfew"])
