"""An adapter on disk and on the hub, in PEFT's format: `save_adapter`, `load_adapter`."""

from __future__ import annotations

import dataclasses
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ia3.config import CONFIG_NAME, IA3Config
from ia3.errors import InputError, brief, shown
from ia3.files import locate, reading, replacing
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

# What a checkpoint may hold for a parameter of any of these types; of another type it is cast to.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        InputError: the file is missing; or see `read_tensors`.
    """
    return read_tensors(locate_weights(path, subfolder, **hub_kwargs))


def read_tensors(file: str) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file, or of one that `torch.save` wrote, by name; and the former's header entries.

    Raises:
        InputError: the file is cut short, or holds more than tensors that it has all numbers of. Nothing in it is run.
    """
    if not file.endswith(".safetensors"):
        return _read_torch_weights(file), {}
    from safetensors import safe_open

    with reading(file, "a whole safetensors file"), safe_open(file, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def _read_torch_weights(file: str) -> Tensors:
    expected = "a flat dictionary of tensors and nothing that runs code"
    with reading(file, expected, "is it cut short? Save it as safetensors"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of an odd pickle; the error is enough
        # torch also reads what others have compressed, and a small file then fills the memory.
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(file):
                    raise ValueError("it is compressed")
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # whose text says how to read it unsafely
            raise ValueError("it is damaged or holds something else") from error
        if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
            raise TypeError("it holds something else")
        for key, value in tensors.items():
            if not isinstance(value, torch.Tensor) or not _is_plain(value):
                raise TypeError(f"{brief(key)} is no tensor with all its numbers in the file")
        return dict(tensors)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a number in memory for each element; an expanded one claims any number of them."""
    return (
        (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        and not (tensor.is_nested or tensor.is_quantized)
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


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
        InputError: no such adapter, or tensors are missing, surplus, of another shape, no floating-point numbers, or not
            finite in the type that the model holds them in.
    """
    tensors = peft_model_state_dict
    expected = get_peft_model_state_dict(model, adapter_name=adapter_name)
    check_tensors(expected, tensors, adapter_name)
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


def check_tensors(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], adapter_name: str) -> None:
    """Raise `InputError` unless `found` fits.

    Args:
        expected: by name, of the shape and type that the model holds; no matter with which values, or none.
        found: has to have exactly these names and shapes, and values that are finite in these types.
        adapter_name: for the message.
    """
    missing, surplus = sorted(set(expected) - set(found)), sorted(set(found) - set(expected), key=str)
    if missing or surplus:
        raise InputError(
            f"Adapter {brief(adapter_name)} does not fit this model: expected {len(expected)} tensors, found "
            f"{len(found)}; missing: {shown(missing, 3)}; surplus: {shown(surplus, 3)}. Is it for another base model?"
        )
    wrong = [
        f"{key} is {brief(tuple(found[key].shape))}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if found[key].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(
            f"Adapter {brief(adapter_name)} has other shapes than this model: {'; '.join(wrong[:3])}{more}. Is it for "
            f"another base model?"
        )
    problem = wrong_values(found, {key: value.dtype for key, value in expected.items()})
    if problem:
        raise InputError(f"Adapter {brief(adapter_name)} holds {problem}; train it again.")


def check_vector(name: str, tensor: torch.Tensor) -> None:
    """Raise `InputError` unless all numbers of a tensor, one at least, lie along one of its dimensions."""
    if not tensor.numel() or max(tensor.shape, default=0) != tensor.numel():
        raise InputError(f"Expected a vector, found {brief(name)} of shape {brief(tuple(tensor.shape))}.")


def wrong_values(found: Mapping[str, torch.Tensor], held: Mapping[str, torch.dtype]) -> str | None:
    """What is wrong with tensors' values, for an error message; None when they can be used.

    Args:
        found: as a file has them.
        held: the type that each will be held in. A value that is finite in the file can be infinite in it.
    """
    foreign = {key: value.dtype for key, value in found.items() if value.dtype != held[key]}
    foreign = {key: dtype for key, dtype in foreign.items() if not {dtype, held[key]} <= set(_FLOATS)}
    if foreign:
        key = next(iter(foreign))
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        return f"{foreign[key]} in {brief(key)}{more} where {held[key]} is expected"
    infinite = [key for key, value in found.items() if not _is_finite(value.to(held[key]))]
    in_file = [key for key in infinite if not _is_finite(found[key])]
    if in_file:
        return f"NaN or infinite values in {shown(in_file, 3)}"
    if infinite:
        return f"values in {shown(infinite, 3)} that are infinite in {held[infinite[0]]}, which they are held in"
    return None


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.is_floating_point() and tensor.dtype not in _FLOATS:  # 8-bit floats know no `isfinite`
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


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
