"""Save and load adapters in PEFT's format, on disk and on the hub: `save_adapter`, `load_adapter`."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.modules.module import _IncompatibleKeys

from ia3.adapter.adapted import Adapted
from ia3.adapter.card import model_card
from ia3.adapter.config import IA3Config
from ia3.adapter.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from ia3.adapter.stored import CARD_NAME, KEY_VALUE_ONLY, StoredAdapter
from ia3.adapter.tensors import PREFIX, Tensors
from ia3.files import hub_arguments


def load_peft_weights(
    model_id: str | os.PathLike,
    device: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub_kwargs: Any,
) -> Tensors:
    """An adapter's tensors, by their names in the file.

    Args:
        model_id: a folder or a hub repository.
        device: the tensors' device; None: the CPU.
        key_mapping: regular expression → replacement, for the part of a name after "base_model.model."; only the first
            match is replaced.
        **hub_kwargs: `subfolder`, and the hub's `revision`, `token`, `cache_dir`, ….

    Raises:
        InputError: see `StoredAdapter.vectors`.
    """
    _, tensors, _ = StoredAdapter.whole(model_id, config=False, **hub_arguments(hub_kwargs))
    return {key: value.to(device or "cpu") for key, value in _renamed(tensors, key_mapping).items()}


def _renamed(tensors: Tensors, mapping: Mapping[str, str] | None) -> Tensors:
    """Rename tensors; `mapping`: see `key_mapping` of `load_peft_weights`."""

    def renamed(key: str) -> str:
        name = key.removeprefix(PREFIX)
        for pattern, replacement in (mapping or {}).items():
            changed, count = re.subn(pattern, replacement, name)
            if count:
                return key.removesuffix(name) + changed
        return key

    return {renamed(key): value for key, value in tensors.items()}


def save_adapter(
    model: Adapted,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    safe_serialization: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    beside: Callable[[int], Mapping[str, bytes]] | None = None,
) -> None:
    """Write one adapter to a folder, with the other files that the model keeps for it; see `StoredAdapter.write`.

    Args:
        model: the model with the adapter.
        folder: the adapter's folder.
        adapter_name: the adapter's name.
        safe_serialization: write safetensors; False: use `torch.save`.
        state_dict: the model's state, if it is gathered already.
        beside: files instead of those that the model keeps, see `StoredAdapter.write`.
    """
    base = model.model
    config = dataclasses.replace(model.peft_config[adapter_name], inference_mode=True)
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    tensors = get_peft_model_state_dict(model, state_dict, adapter_name, save_embedding_layers=save_embedding_layers)
    key_value_only = any(
        adapter_name in layer.held and layer.held[adapter_name].mask is not None for layer in model.ia3_layers.values()
    )
    texts: dict[str, bytes] = {}
    if beside is None:
        if adapter_name == "default" or Path(folder, CARD_NAME).exists():
            texts[CARD_NAME] = model_card(model, adapter_name).encode()
        if adapter_name in model.adapter_folders:
            texts |= model.adapter_folders[adapter_name].beside(tensors)
    StoredAdapter.write(folder, config, tensors, beside or texts, safe_serialization, key_value_only)


def load_adapter(
    model: Adapted,
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
    """Add an adapter from a folder or the hub, or refill the one of that name. If it does not fit, nothing changes.

    The model keeps the other files of the folder, for `save_adapter`.

    Args: see `IA3Model.load_adapter`; `where` has `subfolder`, and the hub's `revision`, `token`, ….

    Returns:
        See `set_peft_model_state_dict`.

    Raises:
        InputError: see `StoredAdapter.whole`, `resolve`, `set_peft_model_state_dict`.
    """
    own = config is None
    folder, tensors, header = StoredAdapter.whole(path, config=own, **where)
    tensors = _renamed(tensors, key_mapping)
    known = adapter_name in model.peft_config
    if not known:
        config = dataclasses.replace(folder.config if config is None else config, inference_mode=not is_trainable)
        model.add_adapter(
            adapter_name,
            config,
            low_cpu_mem_usage,
            autocast_adapter_dtype,
            key_value_only=KEY_VALUE_ONLY in header,
        )
    try:
        result = set_peft_model_state_dict(model, tensors, adapter_name, ignore_mismatched_sizes)
    except BaseException:
        if not known:
            model.delete_adapter(adapter_name)
        raise
    if own:
        folder.check_base(header)
    model.adapter_folders[adapter_name] = folder
    return result
