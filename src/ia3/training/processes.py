"""Several processes that train together: each has a part of every batch, and what they find is added up once a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def add_up(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The sum of each tensor over all processes, in one exchange. All have tensors of the same shapes, in the same order."""
    flat = torch.cat([value.detach().float().reshape(-1) for value in values])
    torch.distributed.all_reduce(flat)
    sizes = [value.numel() for value in values]
    parts = zip(flat.split(sizes), values, strict=True)
    return [part.reshape(value.shape).to(value.dtype) for part, value in parts]


def add_up_gradients(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Add up the gradients of parameters, and some more values, of which it returns the sums.

    A gradient that no process has stays None.
    """
    have = torch.tensor([float(one.grad is not None) for one in parameters], device=parameters[0].device)
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    some, *rest = add_up([have, *gradients, *values])
    for parameter, count, gradient in zip(parameters, some.tolist(), rest, strict=False):
        parameter.grad = gradient if count else None
    return rest[len(parameters) :]
