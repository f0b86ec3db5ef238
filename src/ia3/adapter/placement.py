"""Where a base model's weights are, if no device holds all: beside others (accelerate's `device_map`), or a share in each process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ia3.errors import InputError


def device_of(module: nn.Module) -> torch.device:
    """The device that gets a module's input: where its first weight is, or is brought to for the time of a pass."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)  # of accelerate's, for weights that are kept elsewhere
        for each in getattr(hook, "hooks", [hook]):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
        for parameter in part.parameters(recurse=False):
            return parameter.device
    return torch.device("cpu")


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate brings weights of a model to where they are needed, so that the model cannot be moved."""
    return any(getattr(module, "_hf_hook", None) is not None for module in model.modules())


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a share of a model's layers."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def shard(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Leave each of several processes a share of every layer of a transformers model (FSDP 2), in place of the whole layer.

    A layer is put together for the time of its passes. What is trained stays whole in each process, and so do embeddings and a
    language model's head. All processes then have to make the same passes through the model.

    Args:
        model: of the same kind in all processes, which are connected; adapted or not. The first process's weights count.
        device: where this process computes.

    Raises:
        InputError: the model does not say which layers it has, or its weights are elsewhere.
    """
    kinds = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise InputError(
            f"Expected a transformers model that names its layers (_no_split_modules), found a {type(model).__name__}; give each "
            f"process the whole model."
        )
    if is_spread(model):
        raise InputError(
            "Expected a model in main memory or on one device, found one with a device_map; load it without."
        )
    from torch.distributed.fsdp import fully_shard

    device = torch.device(device)
    mesh = torch.distributed.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in layers:
        _as_first(layer.to(device))
        divided: Any = fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=_learned(layer))
        # Memory that the first pass takes for the whole layer is taken again by all: inference mode must not own it.
        divided.unshard()
        divided.reshard()
    _as_first(model.to(device))


def _learned(layer: nn.Module) -> set[nn.Parameter]:
    """What adapters hold in a layer, and what else is trained of it."""
    found = {parameter for parameter in layer.parameters() if parameter.requires_grad}
    for module in layer.modules():
        for name in ("ia3_l", "modules_to_save"):
            found.update(getattr(module._modules.get(name), "parameters", tuple)())
    return found


def _as_first(module: nn.Module) -> None:
    """Take over the first process's weights: `accelerate launch` may let the others load none."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not hasattr(tensor, "device_mesh"):
            torch.distributed.broadcast(tensor.detach(), 0)


def require_whole(module: nn.Module) -> None:
    """Raise `InputError` for a module whose weights are not here, where they have to be read and not only multiplied by."""
    weights = [*module.parameters(recurse=False)]
    offloaded = is_spread(module) and any(weight.is_meta for weight in weights)
    if offloaded or any(hasattr(weight, "device_mesh") for weight in weights):
        where = "found them offloaded" if offloaded else "found a share of them"
        raise InputError(
            f"Expected the weights of a {type(module).__name__} in this process, {where}; for this, load the base model without "
            f"device_map."
        )
