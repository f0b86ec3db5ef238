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
    from ia3.checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
    from ia3.config import IA3Config, PeftType, TaskType
    from ia3.config import IA3Config as PeftConfig
    from ia3.errors import InputError
    from ia3.layers import IA3Layer
    from ia3.model import IA3Model, PeftModel, get_peft_model, inject_adapter_in_model
    from ia3.pretrained import load_base
    from ia3.rules import Rule, WeightRule, register_rule

_HOMES = {
    "AdapterBank": "bank",
    "AutoPeftModel": "auto",
    "AutoPeftModelForCausalLM": "auto",
    "AutoPeftModelForFeatureExtraction": "auto",
    "AutoPeftModelForQuestionAnswering": "auto",
    "AutoPeftModelForSeq2SeqLM": "auto",
    "AutoPeftModelForSequenceClassification": "auto",
    "AutoPeftModelForTokenClassification": "auto",
    "IA3Config": "config",
    "PeftType": "config",
    "TaskType": "config",
    "InputError": "errors",
    "IA3Layer": "layers",
    "IA3Model": "model",
    "PeftModel": "model",
    "get_peft_model": "model",
    "inject_adapter_in_model": "model",
    "get_peft_model_state_dict": "checkpoint",
    "set_peft_model_state_dict": "checkpoint",
    "load_base": "pretrained",
    "Rule": "rules",
    "WeightRule": "rules",
    "register_rule": "rules",
}

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
    "PeftConfig",
    "PeftModel",
    "PeftType",
    "Rule",
    "TaskType",
    "WeightRule",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_base",
    "register_rule",
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
