"""An adapter on disk and on the hub, in PEFT's format: `save_adapter`, `load_adapter`."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.modules.module import _IncompatibleKeys

from ia3.config import CONFIG_NAME, IA3Config
from ia3.errors import InputError, shown
from ia3.files import hub_arguments, locate, replacing
from ia3.state_dict import PREFIX, Tensors, get_peft_model_state_dict, set_peft_model_state_dict

if TYPE_CHECKING:
    from ia3.model import IA3Model

WEIGHTS_NAME = "adapter_model.safetensors"
TORCH_WEIGHTS_NAME = "adapter_model.bin"

# In the safetensors header, where PEFT does not look: the adapter rescales only the key and value part of fused
# projections, so that training goes on as it began.
_KEY_VALUE_ONLY = "ia3_key_value_only"


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


def load_peft_weights(
    model_id: str | os.PathLike,
    device: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub_kwargs: Any,
) -> Tensors:
    """An adapter's tensors, by their names in the file.

    Args:
        model_id: a folder or a hub repository.
        device: where to put them; None: the processor's memory.
        key_mapping: regular expression → replacement, for the part of a name behind "base_model.model."; the first
            that matches counts.
        **hub_kwargs: `subfolder`, and the hub's `revision`, `token`, `cache_dir`, ….

    Raises:
        InputError: see `read_weights`.
    """
    tensors, _ = read_weights(model_id, **hub_arguments(hub_kwargs))
    return {_mapped(key, key_mapping or {}): value.to(device or "cpu") for key, value in tensors.items()}


def _mapped(key: str, mapping: Mapping[str, str]) -> str:
    name = key.removeprefix(PREFIX)
    for pattern, replacement in mapping.items():
        changed, count = re.subn(pattern, replacement, name)
        if count:
            return key.removesuffix(name) + changed
    return key


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
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> None:
    """Write one adapter's config and tensors into a folder. What stood there stays whole until both are written."""
    base = model.model
    config = dataclasses.replace(model.peft_config[adapter_name], inference_mode=True)
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    tensors = get_peft_model_state_dict(model, state_dict, adapter_name, save_embedding_layers=save_embedding_layers)
    key_value_only = any(adapter_name in layer.masks for layer in model.ia3_layers.values())
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
    autocast_adapter_dtype: bool = True,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    **where: Any,
) -> _IncompatibleKeys:
    """Add an adapter from a folder or the hub, or refill the one of that name. Nothing stays of one that does not fit.

    Args: see `IA3Model.load_adapter`; `where` has `subfolder`, and the hub's `revision`, `token`, ….

    Returns:
        See `set_peft_model_state_dict`.

    Raises:
        InputError: see `locate`, `read_weights`, `resolve_targets`, `set_peft_model_state_dict`.
    """
    config = config or IA3Config.from_pretrained(path, **where)
    tensors, header = read_weights(path, **where)
    tensors = {_mapped(key, key_mapping or {}): value for key, value in tensors.items()}
    known = adapter_name in model.peft_config
    if not known:
        config.inference_mode = not is_trainable
        model.add_adapter(
            adapter_name,
            config,
            low_cpu_mem_usage,
            autocast_adapter_dtype,
            key_value_only=_KEY_VALUE_ONLY in header,
        )
    try:
        return set_peft_model_state_dict(model, tensors, adapter_name, ignore_mismatched_sizes)
    except BaseException:
        if not known:
            model.delete_adapter(adapter_name)
        raise
