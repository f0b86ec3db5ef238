"""Read and set an adapter's tensors: `get_peft_model_state_dict`, `set_peft_model_state_dict`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ia3.adapter.adapted import find_adapted
from ia3.adapter.layer import IA3Layer
from ia3.adapter.merging import sync_weights
from ia3.adapter.pretrained import find_base
from ia3.adapter.targets import base_modules, embeddings, inside_wrappers, unwrapped, wrappers
from ia3.adapter.tensors import PREFIX, Tensors, check_tensors
from ia3.adapter.trained import TrainedModule
from ia3.errors import InputError, reason, shown


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> Tensors:
    """One adapter's tensors by their names in a checkpoint.

    Args:
        model: a `PeftModel`, an `IA3Model`, or a model with an injected adapter, whose names have no prefix; it may be
            compiled or wrapped for parallel training.
        state_dict: the model's state, if it is gathered already (by FSDP, DeepSpeed, …). Names may be those of the
            wrapped model.
        adapter_name: the adapter's name.
        unwrap_compiled: ignored, because names never contain the compiler's prefix.
        save_embedding_layers: include the model's input and output embeddings. "auto": include them, with a warning, if
            the vocabulary's size differs from that of the base model on disk or on the hub.

    Raises:
        InputError: there is no such adapter, or `state_dict` lacks one of its tensors.
    """
    base, outer = _base_of(model)
    state = None if state_dict is None else _State(state_dict)
    tensors = {}
    for path, layer in _layers(base):
        if adapter_name in layer.ia3_l:
            values = None if state is None else state[f"{path}.ia3_l.{adapter_name}"]
            # Save the effective vector: features that a fused projection's mask leaves out are ones.
            tensors[f"{outer}{path}.ia3_l"] = layer.vector(adapter_name, values).detach()
    for path, module in _trained(base):
        if adapter_name in module.modules_to_save:
            for key, value in module.modules_to_save[adapter_name].state_dict().items():
                name = f"{path}.modules_to_save.{adapter_name}.{key}"
                tensors[f"{outer}{path}.{clean_name(key)}"] = value if state is None else state[name]
    if not tensors:
        raise InputError(f"Adapter {adapter_name!r} does not exist in this {type(model).__name__}.")
    if save_embedding_layers == "auto":
        save_embedding_layers = _vocabulary_was_resized(base)
    if save_embedding_layers:
        for path, embedding in _embeddings(base).items():
            for key, value in embedding.state_dict().items():
                name = f"{outer}{path}.{key}"
                if name not in tensors:  # an adapter's own copy (modules_to_save) has priority
                    tensors[name] = value if state is None else state[f"{path}.{key}"]
    return tensors


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> _IncompatibleKeys:
    """Set an adapter's tensors from a checkpoint. All are checked first, so that none or all are set.

    Args:
        model: see `get_peft_model_state_dict`.
        peft_model_state_dict: the result of `get_peft_model_state_dict`. Embeddings among its tensors are set in the
            base model.
        adapter_name: the adapter's name.
        ignore_mismatched_sizes: leave out tensors whose shape differs from the model's, with a warning.
        low_cpu_mem_usage: ignored, because vectors on the meta device are always filled.

    Returns:
        Missing and unexpected keys, as in PEFT. Both are empty; otherwise an error is raised.

    Raises:
        InputError: there is no such adapter, or tensors are missing, surplus, of another shape, not floating-point, or
            not finite in the model's dtype.
    """
    base, outer = _base_of(model)
    found, originals = _divided(
        {_with_prefix(clean_name(key), outer): value for key, value in peft_model_state_dict.items()}
    )
    own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    embeddings = {
        f"{outer}{path}.{key}": value
        for path, embedding in _embeddings(base).items()
        for key, value in embedding.state_dict().items()
    }
    originals |= {key: found.pop(key) for key in list(found) if key in embeddings and key not in own}
    if not ignore_mismatched_sizes:
        _check_vocabulary(embeddings, originals)
    expected = {key: embeddings[key] for key in originals if key in embeddings}
    if ignore_mismatched_sizes:
        other = [key for key, value in own.items() if key in found and found[key].shape != value.shape]
        other += [key for key, value in expected.items() if originals[key].shape != value.shape]
        if other:
            warnings.warn(f"Left out, because their shapes differ from the model's: {shown(other, 3)}.", stacklevel=2)
        own = {key: value for key, value in own.items() if key not in other}
        expected = {key: value for key, value in expected.items() if key not in other}
        found = {key: value for key, value in found.items() if key not in other}
        originals = {key: value for key, value in originals.items() if key not in other}
    check_tensors(own, found, adapter_name, _buffers(base, outer, adapter_name))
    check_tensors(expected, originals, adapter_name)
    with torch.no_grad():
        for path, layer in _layers(base):
            if adapter_name in layer.ia3_l and f"{outer}{path}.ia3_l" in found:
                layer.fill(adapter_name, found[f"{outer}{path}.ia3_l"])
        for path, module in _trained(base):
            if adapter_name in module.modules_to_save:
                _fill(module.modules_to_save[adapter_name], f"{outer}{path}.", found)
        for path, embedding in _embeddings(base).items():
            _fill(embedding, f"{outer}{path}.", originals)
    for routing in {layer.routing for _, layer in _layers(base)}:
        sync_weights(routing)
    return _IncompatibleKeys([], [])


def _divided(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Separate an adapter's tensors from the base model's embeddings, which PEFT saves under the names of its wrappers.

    A module that an adapter trains in full also appears under `modules_to_save`.
    """
    found, originals = {}, {}
    for key, value in tensors.items():
        parts = key.split(".")
        if parts[-2:-1] in (["original_module"], ["base_layer"]):
            originals[".".join([*parts[:-2], parts[-1]])] = value
        elif parts[-2:-1] != ["modules_to_save"] or ".".join([*parts[:-2], parts[-1]]) not in tensors:
            found[key] = value
    return found, originals


def _buffers(base: nn.Module, outer: str, adapter_name: str) -> set[str]:
    """The names of an adapter's buffers, in the modules that it trains in full."""
    return {
        f"{outer}{path}.{clean_name(key)}"
        for path, module in _trained(base)
        if adapter_name in module.modules_to_save
        for key, _ in module.modules_to_save[adapter_name].named_buffers()
    }


def _fill(module: nn.Module, prefix: str, tensors: Tensors) -> None:
    """Copy a checkpoint's tensors into a module's parameters and buffers."""
    for key, value in module.state_dict(keep_vars=True).items():
        if f"{prefix}{clean_name(key)}" in tensors:
            value.copy_(tensors[f"{prefix}{clean_name(key)}"])


# Names in a model, inside wrappers, and in a checkpoint.

_WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}


def clean_name(name: str) -> str:
    """A parameter's or module's name without the parts that FSDP, torch.compile and checkpointing add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _with_prefix(name: str, prefix: str) -> str:
    """A checkpoint's name for a model whose names have a prefix or not."""
    return prefix + name.removeprefix(PREFIX)


class _State:
    """A gathered state by paths of the base model, without the model's wrappers."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self.state = {clean_name(key): value for key, value in state.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        for prefix in (PREFIX, "model.", "", f"module.{PREFIX}", "module.model.", "module."):
            if prefix + name in self.state:
                return self.state[prefix + name]
        raise InputError(f"The state_dict has no {name!r}; expected the state of the whole model, with its adapters.")


def _base_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The base model, and the prefix of its names in a checkpoint."""
    adapted = find_adapted(model)
    return (inside_wrappers(model), "") if adapted is None else (adapted.model, PREFIX)


def _layers(base: nn.Module) -> list[tuple[str, IA3Layer]]:
    """The `IA3Layer`s by path in the base model, without parts of wrappers."""
    return [(clean_name(path), layer) for path, layer in wrappers(base)[0].items()]


def _trained(base: nn.Module) -> list[tuple[str, TrainedModule]]:
    """The modules trained in full, by the same paths."""
    return [(clean_name(path), module) for path, module in wrappers(base)[1].items()]


# Embeddings are saved with an adapter if the vocabulary has grown for it.


def _embeddings(base: nn.Module) -> dict[str, nn.Module]:
    """The input and output embeddings of a transformers model, by path."""
    wanted = [unwrapped(module) for module in embeddings(base) if module is not None]
    paths: dict[nn.Module, str] = {}  # a module may have several
    for path, module in base_modules(base).items():
        if any(module is one for one in wanted):
            paths.setdefault(module, clean_name(path))
    return {path: module for module, path in paths.items()}


def _vocabulary_was_resized(base: nn.Module) -> bool:
    """Whether the model's vocabulary differs in size from that of its source; if so, warn about the consequence."""
    config, name = getattr(base, "config", None), getattr(base, "name_or_path", "")
    size = vocabulary_size(config)
    if not size or not name:
        return False
    try:
        original = vocabulary_size(type(config).from_pretrained(find_base(name)[1]))  # type: ignore[union-attr]
    except Exception as error:  # moved, deleted or no network: the size is unknown
        warnings.warn(
            f"Cannot read the config of the base model {name!r} ({reason(error)}): the vocabulary is assumed to be "
            f"unchanged, and embeddings are not saved. If it was resized, give save_embedding_layers=True.",
            stacklevel=4,
        )
        return False
    if original in (None, size):
        return False
    warnings.warn(
        f"The vocabulary was resized from {original} to {size}: the adapter is saved with its embeddings.", stacklevel=4
    )
    return True


def vocabulary_size(config: Any) -> int | None:
    """The vocabulary size in a config; None if it has none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def _check_vocabulary(embeddings: Tensors, found: Tensors) -> None:
    """Raise if a checkpoint's embeddings differ in size from the base model's."""
    for key, value in embeddings.items():
        if key in found and len(found[key]) != len(value):
            raise InputError(
                f"The adapter was saved with embeddings of {len(found[key])} tokens, the base model has {len(value)}; call "
                f"base.resize_token_embeddings({len(found[key])}) first, as for training."
            )
