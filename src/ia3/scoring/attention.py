"""Attention on a processor (`shared_keys`), and whether layers are computed twice (`recomputes`)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ia3.adapter.placement import device_of

# Says to transformers that torch's attention is to find out itself which query heads share keys and values.
_VARIABLE = "TRANSFORMERS_SDPA_FORCE_GQA"

# Measured with this version; whether an earlier one's kernel does this as fast is not known.
_ABLE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

_lock = threading.Lock()
_within = 0


def recomputes(model: nn.Module, base: nn.Module) -> bool:
    """Whether the base model's layers are computed again in the backward pass, without what was handed to them."""
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


@contextmanager
def shared_keys(base: nn.Module) -> Iterator[None]:
    """In a `with` block, query heads of a model on a processor read the keys and values that they share where they lie.

    Otherwise transformers copies them for each query head wherever there is a mask, because a mask makes GPUs compute grouped
    queries slowly. The result is the same to the bit. With 9 query heads, 3 key heads and rows of 16 tokens behind 164,
    attention and its gradients take 0.43 times as long.

    Layers that are computed again in the backward pass, which is outside of the block, do not: both must do the same.
    """
    again = torch.is_grad_enabled() and recomputes(base, base)
    if again or device_of(base).type != "cpu" or not _ABLE:
        yield
        return
    global _within
    with _lock:
        ours = _within > 0 or _VARIABLE not in os.environ  # what somebody has set stays
        if ours:
            _within += 1
            os.environ[_VARIABLE] = "1"
    try:
        yield
    finally:
        if ours:
            with _lock:
                _within -= 1
                if not _within:
                    del os.environ[_VARIABLE]
