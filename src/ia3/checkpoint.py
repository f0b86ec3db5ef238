"""An adapter on disk and on the hub, in PEFT's format: `save_adapter`, `load_adapter`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ia3.config import CONFIG_NAME, IA3Config
from ia3.errors import InputError, shown
from ia3.files import locate, replacing
from ia3.targets import wrappers

if TYPE_CHECKING:
    from ia3.model import IA3Model

WEIGHTS_NAME = "adapter_model.safetensors"
TORCH_WEIGHTS_NAME = "adapter_model.bin"
PREFIX = "base_model.model."

# In the safetensors header, where PEFT does not look: the adapter rescales only the key and value part of fused
# projections, so that training goes on as it began.
_KEY_VALUE_ONLY = "ia3_key_value_only"

Tensors = dict[str, torch.Tensor]


def locate_weights(path: str | os.PathLike, subfolder: str | None = None, **hub_kwargs: Any) -> str:
    """The file of an adapter's tensors: safetensors, else `torch.save`'s. Raises `InputError` when there is neither."""
    try:
        return locate(path, WEIGHTS_NAME, subfolder=subfolder, **hub_kwargs)
    except InputError as missing:
        try:
            return locate(path, TORCH_WEIGHTS_NAME, subfolder=subfolder, **hub_kwargs)
        except InputError:
            raise missing from None


def read_weights(path: str | os.PathLike, subfolder: str | None = None, **hub_kwargs: Any) -> tuple[Tensors, dict]:
    """The tensors of an adapter, by the name in the file, and the safetensors header's own entries.

    Raises:
        InputError: the file is missing, cut short, or holds more than tensors.
    """
    from safetensors import SafetensorError, safe_open

    file = locate_weights(path, subfolder, **hub_kwargs)
    if file.endswith(TORCH_WEIGHTS_NAME):
        return _read_torch_weights(file), {}
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            f"Cannot read {file}: {error}. Expected a whole safetensors file; copy or download it again."
        ) from error


def _read_torch_weights(file: str) -> Tensors:
    try:
        tensors = dict(torch.load(file, map_location="cpu", weights_only=True))
        if not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise TypeError("not all values are tensors")
    except Exception as error:  # a damaged pickle makes the reader stumble anywhere
        raise InputError(
            f"Expected a dictionary of tensors in {file}, and nothing that runs code; it cannot be read so. "
            f"Save the adapter as safetensors."
        ) from error
    return tensors


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
) -> None:
    """Write one adapter's config and tensors into a folder. What stood there stays whole until both are written."""
    base = model.model
    config = dataclasses.replace(model.peft_config[adapter_name], inference_mode=True)
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    tensors = get_peft_model_state_dict(model, state_dict, adapter_name)
    key_value_only = any(adapter_name in layer.masks for layer in model.layers.values())
    write_adapter(folder, config, tensors, safe_serialization, key_value_only)


def write_adapter(
    folder: str | os.PathLike,
    config: IA3Config,
    tensors: Tensors,
    safe_serialization: bool = True,
    key_value_only: bool = False,
) -> None:
    """Write a config and tensors as an adapter's folder.

    Args:
        folder: where; made when it is not there.
        config: the adapter's.
        tensors: by their names in a checkpoint.
        safe_serialization: as safetensors; False: `torch.save`.
        key_value_only: note that only the key and value part of fused projections is rescaled.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Safetensors takes neither views nor one memory under two names.
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    metadata = {"format": "pt", **({_KEY_VALUE_ONLY: "true"} if key_value_only else {})}
    folder = Path(folder)
    name = WEIGHTS_NAME if safe_serialization else TORCH_WEIGHTS_NAME
    with replacing(folder / name) as weights, replacing(folder / CONFIG_NAME) as description:
        description.write_text(config.to_json(), encoding="utf-8")
        if not safe_serialization:
            torch.save(tensors, weights)
        else:
            try:
                save_file(tensors, weights, metadata=metadata)
            except SafetensorError as error:  # its own word for what the operating system refused
                raise OSError(f"Cannot write {folder / name}: {error}") from error
    # An earlier save in the other format would be read in place of this one.
    (folder / (TORCH_WEIGHTS_NAME if safe_serialization else WEIGHTS_NAME)).unlink(missing_ok=True)


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

    Raises:
        InputError: see `locate`, `read_weights`, `resolve_targets`, `set_peft_model_state_dict`.
    """
    config = config or IA3Config.from_pretrained(path, subfolder=subfolder, **hub_kwargs)
    tensors, header = read_weights(path, subfolder=subfolder, **hub_kwargs)
    if adapter_name in model.peft_config:
        set_peft_model_state_dict(model, tensors, adapter_name)
        return
    config.inference_mode = not is_trainable
    model.add_adapter(
        adapter_name, config, low_cpu_mem_usage=low_cpu_mem_usage, key_value_only=_KEY_VALUE_ONLY in header
    )
    try:
        set_peft_model_state_dict(model, tensors, adapter_name)
    except BaseException:
        model.delete_adapter(adapter_name)
        raise
