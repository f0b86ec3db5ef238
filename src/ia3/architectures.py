"""Interim."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from transformers.pytorch_utils import Conv1D

from ia3.errors import InputError, shown
from ia3.rules import find_rule

PAIRS = (("k_proj", "v_proj"), ("key", "value"), ("k", "v"))
SECOND = {"down_proj": None, "fc2": None, "wo": None, "mlp.c_proj": None, "output.dense": "intermediate"}
COVERED = frozenset(
    [
        "bart",
        "bert",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "llama",
        "mbart",
        "mistral",
        "mt5",
        "opt",
        "qwen2",
        "qwen3",
        "roberta",
        "smollm3",
        "t5",
        "umt5",
        "xlm-roberta",
    ]
)
READS_WEIGHTS = frozenset({"MultiheadAttention", "TransformerEncoderLayer", "WavLMAttention"})


@dataclass(frozen=True)
class Site:
    path: str
    feedforward: bool
    rescaled: torch.Tensor | None = None


def candidates(modules):
    names = {
        re.sub(r"(^|\.)\d+\.", ".", path).rpartition(".")[2] for path, module in modules.items() if find_rule(module)
    }
    return shown(sorted(names), 12)


def _sib(path, name):
    parent = path.rpartition(".")[0]
    return f"{parent}.{name}" if parent else name


def _mask(module, path):
    if not (isinstance(module, Conv1D) and path.endswith("c_attn")):
        return None
    width, out = module.weight.shape
    if out != 3 * width:
        return None
    return torch.arange(out) >= width


def default_sites(modules, config, field="target_modules"):
    model_type = getattr(config, "model_type", None)
    if model_type not in COVERED:
        raise InputError(
            f"Please specify `{field}` in the config: there is no default for the architecture "
            f"{model_type!r} (there is for {shown(sorted(COVERED), 99)}). Modules that can be rescaled: "
            f"{candidates(modules)}."
        )
    sites = []
    for path, module in modules.items():
        name = path.rpartition(".")[2]
        if name == "c_attn" or any(name in pair and all(_sib(path, o) in modules for o in pair) for pair in PAIRS):
            sites.append(Site(path, False, _mask(module, path)))
            continue
        for second, beside in SECOND.items():
            if (path == second or path.endswith("." + second)) and (
                beside is None or _sib(path.rpartition(".")[0], beside) in modules
            ):
                sites.append(Site(path, True, None))
    return sites


def feedforward_sites(modules, config):
    return [s for s in default_sites(modules, config, "feedforward_modules") if s.feedforward]
