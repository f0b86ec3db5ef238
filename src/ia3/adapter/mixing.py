"""Refuse batches with a different adapter per row if the model moves rows during the forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ia3.adapter.adapted import Adapted
from ia3.adapter.architectures import DOUBLED, TOWER, uneven_media
from ia3.errors import InputError


def check_generation(model: Adapted, names: Sequence[str], kwargs: Mapping[str, Any]) -> None:
    """Refuse generation that moves rows, if they have different adapters."""
    if len({*names}) < 2:
        return
    if hasattr(model, "_maybe_reduce_batch"):
        raise InputError(
            f"{type(model.model).__name__} drops finished rows from the batch, so rows cannot have different "
            f"adapters; give the model one adapter at a time (set_adapter)."
        )
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    scale = kwargs.get("guidance_scale", getattr(config, "guidance_scale", None))
    guided = scale not in (None, 1) or kwargs.get("generation_mode") == "image"
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if guided and kind in DOUBLED:
        raise InputError(
            f"Guided generation ({kind}) appends a second batch to the first, so rows cannot have different "
            f"adapters; give the model one adapter at a time (set_adapter), or guidance_scale=1."
        )


def check_media(model: Adapted, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse rows with different adapters and different numbers of images, videos or sounds for an adapted tower."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    media = ("pixel_values", "image", "video", "audio", "input_features", "input_values")
    given = any(isinstance(value, torch.Tensor) and name.startswith(media) for name, value in kwargs.items())
    if len({*names}) < 2 or not given or not isinstance(tokens, torch.Tensor):
        return
    kind = uneven_media(getattr(model, "config", None), tokens)
    tower = next((path for path in model.ia3_layers if TOWER.search(path)), None) if kind else None
    if tower is not None:
        raise InputError(
            f"Rows have different amounts of {kind} input, which {tower!r} gets one after the other, so that they "
            f"cannot have different adapters; give the model one adapter at a time (set_adapter)."
        )
