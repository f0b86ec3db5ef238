"""Which modules of a model an adapter rescales, and on which side: `resolve_targets`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ia3.config import IA3Config
from ia3.errors import InputError, shown
from ia3.layers import IA3Layer, TrainedModule, find_rule

# Sibling projections that make keys and values.
_KEY_VALUE_PAIRS = (("k_proj", "v_proj"), ("key", "value"), ("k", "v"))

# The feed-forward's second projection, and the sibling that must stand beside its parent where the name alone is not
# enough (BERT's attention has an `output.dense` too).
_SECOND_FEEDFORWARD = {"down_proj": None, "fc2": None, "wo": None, "mlp.c_proj": None, "output.dense": "intermediate"}

# Architectures that these names cover whole: every attention and every feed-forward block.
_COVERED = frozenset(
    "bart bert gemma gemma2 gemma3_text gpt2 llama mbart mistral mt5 opt qwen2 qwen3 roberta smollm3 t5 umt5 "  # noqa: SIM905
    "xlm-roberta".split()
)

# Names of classification heads, which SEQ_CLS and TOKEN_CLS adapters train in full.
CLASSIFICATION_HEADS = ("classifier", "score")


@dataclass(frozen=True)
class Target:
    """A module to rescale.

    Attributes:
        path: its dotted path in the base model.
        module: the module itself, without any wrapper of ours.
        feedforward: whether its input is rescaled, not its output.
        rescaled: for a fused projection, a boolean mask of the features that are; None when all are.
    """

    path: str
    module: nn.Module
    feedforward: bool
    rescaled: torch.Tensor | None = None


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The base model's modules by their path, as if no adapter were there."""
    modules: dict[str, nn.Module] = {}

    def visit(path: str, module: nn.Module) -> None:
        module = unwrapped(module)
        modules[path] = module
        for name, child in module.named_children():
            visit(f"{path}.{name}" if path else name, child)

    visit("", model)
    del modules[""]
    return modules


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without the wrapper that an adapter put around it."""
    if isinstance(module, IA3Layer):
        return module.base_layer
    return module.original_module if isinstance(module, TrainedModule) else module


def matches(path: str, pattern: Iterable[str] | str) -> bool:
    """Whether a module path is meant: by regular expression (a string), or by whole trailing components (a list)."""
    if isinstance(pattern, str):
        try:
            return re.fullmatch(pattern, path) is not None
        except re.error as error:
            raise InputError(
                f"Expected a regular expression, found {pattern!r}: {error}; for one name, use a list."
            ) from error
    return any(path == entry or path.endswith(f".{entry}") for entry in pattern)


def resolve_targets(model: nn.Module, config: IA3Config, key_value_only: bool | None = None) -> list[Target]:
    """The modules that a config names in a model, in the model's order.

    The config is completed: what it left open (`target_modules`, `feedforward_modules`) is filled with names that
    PEFT reads in the same way, `fan_in_fan_out` is corrected, with a warning, when it contradicts the layers.

    Args:
        model: the base model, adapted already or not.
        config: see `IA3Config`.
        key_value_only: rescale only the key and value part of fused projections. None: exactly when the config
            leaves the choice of modules to the architecture.

    Raises:
        InputError: no module matches, a module's type cannot be rescaled, or the architecture is not known.
    """
    modules = base_modules(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    default = _DefaultTargets(modules, model_type)
    config.chosen_by_architecture |= config.target_modules is None
    if key_value_only is None:
        key_value_only = config.chosen_by_architecture
    kept = config.modules_to_save or []
    excluded = [path for path in modules if matches(path, config.exclude_modules or ()) or _inside(path, kept)]

    if config.target_modules is None:
        paths = default.require()
    elif _is_all_linear(config):
        paths = _all_linear(model, modules, config)
    else:
        paths = [path for path in modules if matches(path, config.target_modules)]
    asked = config.target_modules if config.target_modules is not None else f"the keys and values of {model_type}"
    chosen = [path for path in paths if path not in excluded]
    if not chosen:
        what = "exclude_modules leaves none of the" if paths else "No module matches the"
        raise InputError(
            f"{what} target_modules {sorted(asked) if isinstance(asked, set) else asked!r}"
            + (f" (exclude_modules {config.exclude_modules!r})" if paths else "")
            + f"; modules that can be rescaled: {_candidates(modules)}."
        )
    for path in chosen:
        if find_rule(modules[path]) is None:
            raise InputError(
                f"Cannot rescale {path!r}, a {type(modules[path]).__name__}; expected a Linear or Conv1D. Narrow "
                f"target_modules or exclude it."
            )

    if config.feedforward_modules is None:
        expected = default.require_feedforward() if config.target_modules is not None else default.feedforward
        feedforward = [path for path in chosen if path in expected]
    else:
        feedforward = [path for path in chosen if matches(path, config.feedforward_modules)]
    _complete(config, chosen, feedforward, modules)
    return [
        Target(path, modules[path], path in feedforward, default.mask(path) if key_value_only else None)
        for path in chosen
    ]


def shortest_names(paths: Iterable[str], others: Iterable[str]) -> set[str]:
    """The shortest trailing components that name the paths and none of the others."""
    others = list(others)
    names: set[str] = set()
    for path in paths:
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[-length:])
            if name in names or not any(matches(other, [name]) for other in others):
                names.add(name)
                break
    return names


class _DefaultTargets:
    """The paper's choice for an architecture: keys, values, and the second feed-forward projection's input."""

    def __init__(self, modules: dict[str, nn.Module], model_type: str | None) -> None:
        self.modules = modules
        self.model_type = model_type
        self.key_value = [path for path in modules if self._is_key_or_value(path)]
        self.feedforward = [path for path in modules if self._is_second_feedforward(path)]

    def require(self) -> list[str]:
        """Keys, values and feed-forwards, or an error when the architecture is not known."""
        self._check("target_modules")
        chosen = {*self.key_value, *self.feedforward}
        return [path for path in self.modules if path in chosen]

    def require_feedforward(self) -> list[str]:
        """The feed-forwards alone, or an error when the architecture is not known."""
        self._check("feedforward_modules")
        return self.feedforward

    def mask(self, path: str) -> torch.Tensor | None:
        """For a fused projection, which of its outputs are keys or values."""
        module = self.modules[path]
        if not (isinstance(module, Conv1D) and path.endswith("c_attn")):
            return None
        width, out = module.weight.shape
        if out != 3 * width:  # GPT-2's cross-attention: [keys | values], nothing else
            return None
        return torch.arange(out) >= width  # [queries | keys | values]

    def _check(self, field: str) -> None:
        if self.model_type not in _COVERED:
            raise InputError(
                f"Please specify `{field}` in the config: there is no default for the architecture "
                f"{self.model_type!r} (there is for {shown(sorted(_COVERED), 99)}). Modules that can be rescaled: "
                f"{_candidates(self.modules)}."
            )

    def _sibling(self, path: str, name: str) -> str:
        parent = path.rpartition(".")[0]
        return f"{parent}.{name}" if parent else name

    def _is_key_or_value(self, path: str) -> bool:
        name = path.rpartition(".")[2]
        if name == "c_attn":
            return True
        return any(
            name in pair and all(self._sibling(path, other) in self.modules for other in pair)
            for pair in _KEY_VALUE_PAIRS
        )

    def _is_second_feedforward(self, path: str) -> bool:
        for name, beside in _SECOND_FEEDFORWARD.items():
            if matches(path, [name]):
                return beside is None or self._sibling(path.rpartition(".")[0], beside) in self.modules
        return False


def _is_all_linear(config: IA3Config) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _all_linear(model: nn.Module, modules: dict[str, nn.Module], config: IA3Config) -> list[str]:
    """Every Linear and Conv1D but the output layer and, for a classifier, its head."""
    get_output: Callable = getattr(model, "get_output_embeddings", lambda: None)
    output = get_output()
    output = None if output is None else unwrapped(output)
    heads = CLASSIFICATION_HEADS if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else ()
    return [
        path
        for path, module in modules.items()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output and not _inside(path, heads)
    ]


def _inside(path: str, names: Iterable[str]) -> bool:
    """Whether a path is one of the named modules or lies in one."""
    names = list(names)
    parts = path.split(".")
    return any(matches(".".join(parts[: i + 1]), names) for i in range(len(parts)))


def _complete(config: IA3Config, chosen: list[str], feedforward: list[str], modules: dict[str, nn.Module]) -> None:
    """Write into the config what was resolved, in names that resolve to the same again."""
    if config.target_modules is None or _is_all_linear(config):
        # As two lists of names, so that one is a subset of the other, as PEFT demands.
        config.feedforward_modules = shortest_names(feedforward, set(modules) - set(feedforward))
        first = shortest_names(set(chosen) - set(feedforward), set(modules) - set(chosen))
        config.target_modules = first | config.feedforward_modules
    elif config.feedforward_modules is None:
        others = set(chosen) - set(feedforward)
        if isinstance(config.target_modules, str):
            config.feedforward_modules = shortest_names(feedforward, others)
        else:
            second = {name for name in config.target_modules if not any(matches(path, [name]) for path in others)}
            if not all(matches(path, second) for path in feedforward):
                second |= shortest_names(feedforward, set(modules) - set(feedforward))
            config.feedforward_modules = {name for name in second if any(matches(path, [name]) for path in feedforward)}
            config.target_modules = set(config.target_modules) | config.feedforward_modules
    transposed = {isinstance(modules[path], Conv1D) for path in chosen}
    if config.fan_in_fan_out not in transposed:
        kind = "Conv1D" if True in transposed else "torch.nn.Linear"
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is `{kind}`. "
            f"Setting fan_in_fan_out to {not config.fan_in_fan_out}.",
            stacklevel=3,
        )
        config.fan_in_fan_out = not config.fan_in_fan_out


def _candidates(modules: dict[str, nn.Module]) -> str:
    """Module names that could be targets, for an error message."""
    names = {
        re.sub(r"(^|\.)\d+\.", ".", path).rpartition(".")[2] for path, module in modules.items() if find_rule(module)
    }
    return shown(sorted(names), 12)
