"""An adapter on disk and on the hub, in PEFT's format: `save_adapter`, `load_adapter`."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.modules.module import _IncompatibleKeys

from ia3.config import CONFIG_NAME, IA3Config
from ia3.errors import InputError, brief
from ia3.files import hub_arguments, locate, reading, replacing
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
