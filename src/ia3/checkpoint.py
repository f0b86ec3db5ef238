"""An adapter on disk and on the hub, in PEFT's format: `save_adapter`, `load_adapter`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ia3.cards import model_card
from ia3.config import IA3Config
from ia3.errors import InputError, shown
from ia3.folder import CARD_NAME, KEY_VALUE_ONLY, AdapterFolder, Tensors
from ia3.targets import wrappers

if TYPE_CHECKING:
    from ia3.model import IA3Model

PREFIX = "base_model.model."


def get_peft_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None, adapter_name: str = "default"
) -> Tensors:
    """One adapter's tensors by their names in a checkpoint.

    Args:
        model: an `IA3Model`, or a model with an adapter injected into it; the latter's names have no prefix.
        state_dict: the model's state, when it has been gathered already (by FSDP, DeepSpeed, …).
        adapter_name: which adapter.

    Raises:
        InputError: there is no such adapter.
    """
    base, inner, outer = _parts(model)
    layers, trained = wrappers(base)
    tensors = {}
    for path, layer in layers.items():
        if adapter_name in layer.ia3_l:
            values = None if state_dict is None else state_dict[f"{inner}{path}.ia3_l.{adapter_name}"]
            # The effective vector: what a fused projection's mask holds at one is one in the file.
            tensors[f"{outer}{path}.ia3_l"] = layer.vector(adapter_name, values).detach()
    for path, module in trained.items():
        if adapter_name in module.modules_to_save:
            for key, value in module.modules_to_save[adapter_name].state_dict().items():
                name = f"{inner}{path}.modules_to_save.{adapter_name}.{key}"
                tensors[f"{outer}{path}.{key}"] = value if state_dict is None else state_dict[name]
    if not tensors:
        raise InputError(f"Adapter {adapter_name!r} does not exist in this {type(model).__name__}.")
    return tensors


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
) -> _IncompatibleKeys:
    """Fill an adapter of the model from a checkpoint's tensors. All are checked first, so that none or all are set.

    Args:
        model: an `IA3Model`, or a model with an adapter injected into it.
        peft_model_state_dict: as `get_peft_model_state_dict` returns it.
        adapter_name: which adapter.
        low_cpu_mem_usage: accepted for PEFT's sake; vectors without memory are filled in any case.

    Returns:
        Missing and unexpected keys, as PEFT does; there are none, or an error is raised.

    Raises:
        InputError: no such adapter, or tensors are missing, surplus, not finite, or of another shape.
    """
    tensors = peft_model_state_dict
    expected = get_peft_model_state_dict(model, adapter_name=adapter_name)
    check_tensors({key: value.shape for key, value in expected.items()}, tensors, adapter_name)
    base, _, outer = _parts(model)
    layers, trained = wrappers(base)
    with torch.no_grad():
        for path, layer in layers.items():
            if adapter_name in layer.ia3_l:
                layer.fill(adapter_name, tensors[f"{outer}{path}.ia3_l"])
        for path, module in trained.items():
            if adapter_name in module.modules_to_save:
                copied = module.modules_to_save[adapter_name]
                copied.load_state_dict({key: tensors[f"{outer}{path}.{key}"] for key in copied.state_dict()})
    for routing in {layer.routing for layer in layers.values()}:
        routing.refresh()
        routing.sync_weights()
    return _IncompatibleKeys([], [])


def _parts(model: nn.Module) -> tuple[nn.Module, str, str]:
    """The base model, and the prefixes of its names in the model's state and in a checkpoint."""
    from ia3.model import IA3Model

    return (model.model, "model.", PREFIX) if isinstance(model, IA3Model) else (model, "", "")


def check_tensors(shapes: Mapping[str, Sequence[int]], found: Mapping[str, torch.Tensor], adapter_name: str) -> None:
    """Raise `InputError` unless `found` has exactly these names and shapes, and finite values."""
    missing, surplus = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
    if missing or surplus:
        raise InputError(
            f"Adapter {adapter_name!r} does not fit this model: expected {len(shapes)} tensors, found {len(found)}; "
            f"missing: {shown(missing, 3)}; surplus: {shown(surplus, 3)}. Is it for another base model?"
        )
    wrong = [
        f"{key} is {tuple(found[key].shape)}, expected {tuple(shape)}"
        for key, shape in shapes.items()
        if tuple(found[key].shape) != tuple(shape)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(
            f"Adapter {adapter_name!r} has other shapes than this model: {'; '.join(wrong[:3])}{more}. Is it for another "
            f"base model?"
        )
    broken = [key for key, value in found.items() if not torch.isfinite(value).all()]
    if broken:
        raise InputError(
            f"Adapter {adapter_name!r} holds NaN or infinite values in {shown(broken, 3)}; train it again."
        )


def save_adapter(
    model: IA3Model,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    safe_serialization: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    beside: Callable[[int], Mapping[str, bytes]] | None = None,
) -> None:
    """Write one adapter into a folder, with what the model knows to belong beside it; see `AdapterFolder.write`.

    Args:
        model: has the adapter.
        folder: where.
        adapter_name: which.
        safe_serialization: as safetensors; False: `torch.save`.
        state_dict: the model's state, when it has been gathered already.
        beside: other files than those that the model knows of, as of `AdapterFolder.write`.
    """
    base = model.model
    config = dataclasses.replace(model.peft_config[adapter_name], inference_mode=True)
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    tensors = get_peft_model_state_dict(model, state_dict, adapter_name)
    key_value_only = any(adapter_name in layer.masks for layer in model.layers.values())
    texts: dict[str, bytes] = {}
    if beside is None:
        if adapter_name == "default" or Path(folder, CARD_NAME).exists():
            texts[CARD_NAME] = model_card(model, adapter_name).encode()
        if adapter_name in model.folders:
            texts |= model.folders[adapter_name].beside(tensors)
    AdapterFolder.write(folder, config, tensors, beside or texts, safe_serialization, key_value_only)


def load_adapter(
    model: IA3Model,
    path: str | os.PathLike,
    adapter_name: str,
    is_trainable: bool = False,
    config: IA3Config | None = None,
    low_cpu_mem_usage: bool = False,
    subfolder: str | None = None,
    **hub_kwargs: Any,
) -> None:
    """Add an adapter from a folder or the hub, or refill the one of that name. Nothing stays of one that does not fit.

    The model keeps what belongs beside it, for `save_adapter`.

    Raises:
        InputError: see `AdapterFolder.whole`, `resolve_targets`, `set_peft_model_state_dict`.
    """
    folder, tensors, header = AdapterFolder.whole(path, subfolder, config is None, **hub_kwargs)
    if config is None:
        folder.check_base(header)
    if adapter_name in model.peft_config:
        set_peft_model_state_dict(model, tensors, adapter_name)
        model.folders[adapter_name] = folder
        return
    config = dataclasses.replace(folder.config) if config is None else config
    config.inference_mode = not is_trainable
    model.add_adapter(
        adapter_name, config, low_cpu_mem_usage=low_cpu_mem_usage, key_value_only=KEY_VALUE_ONLY in header
    )
    try:
        set_peft_model_state_dict(model, tensors, adapter_name)
    except BaseException:
        model.delete_adapter(adapter_name)
        raise
    model.folders[adapter_name] = folder
