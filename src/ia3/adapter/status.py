"""The state of a model's adapters, with PEFT's fields: `get_layer_status`, `get_model_status`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from ia3.adapter import quantized
from ia3.adapter.adapted import find_adapted
from ia3.adapter.layer import IA3Layer
from ia3.adapter.model import count_parameters
from ia3.adapter.routing import Member
from ia3.errors import InputError

_Irregular = Literal["irregular"]


@dataclasses.dataclass
class TunerLayerStatus:
    """The state of one layer with adapters.

    Attributes:
        name: its path in the `IA3Model`.
        module_type: its type, such as "Linear".
        enabled: whether adapters are enabled.
        active_adapters: the active adapters, in this layer or others.
        merged_adapters: the adapters of this layer that are merged into the weights.
        requires_grad: adapter → whether its parameters here are trainable.
        available_adapters: the adapters that have parameters here.
        devices: adapter → the types of the devices of its parameters.
        quantization_backend: the library that quantized the base layer; None: none.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | _Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclasses.dataclass
class TunerModelStatus:
    """The state of all adapters of a model; "irregular" if layers differ.

    Attributes:
        base_model_type: the base model's class.
        adapter_model_type: "IA3Model"; "None" for adapters injected into a model.
        peft_types: adapter → method.
        trainable_params, total_params: numbers of parameters.
        num_adapter_layers: the number of layers that have adapters or are trained in full.
        enabled, active_adapters, merged_adapters, requires_grad, available_adapters, devices, quantization_backend:
            see `TunerLayerStatus`, for all layers.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | _Irregular
    active_adapters: list[str] | _Irregular
    merged_adapters: list[str] | _Irregular
    requires_grad: dict[str, bool | _Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of each layer with adapters.

    Args:
        model: a `PeftModel`, an `IA3Model`, or a model with an injected adapter.

    Raises:
        InputError: there are no such layers.
    """
    found = []
    for name, module in (find_adapted(model) or model).named_modules():
        if isinstance(module, Member):
            routing, held = module.routing, module.held
            parameters = {adapter: list(module.parameters_of(adapter)) for adapter in held}
            rescaled = isinstance(module, IA3Layer)
            found.append(
                TunerLayerStatus(
                    name=name,
                    module_type=type(module.base_layer).__name__ if rescaled else "ModulesToSaveWrapper",
                    enabled=routing.enabled,
                    active_adapters=list(routing.active),
                    merged_adapters=[adapter for adapter in routing.merged if adapter in held],
                    requires_grad={
                        adapter: _one([p.requires_grad for p in own]) for adapter, own in parameters.items()
                    },
                    available_adapters=sorted(held),
                    devices={adapter: sorted({p.device.type for p in own}) for adapter, own in parameters.items()},
                    quantization_backend=quantized.library(module.base_layer) if rescaled else None,
                )
            )
    if not found:
        raise InputError("No adapter layers found in the model; expected one with adapters in it (get_peft_model).")
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of all adapters of a model. Args and errors: see `get_layer_status`."""
    layers = get_layer_status(model)
    adapted = find_adapted(model)
    trainable, total = count_parameters(model)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    partly = any(set(layer.available_adapters) & set(merged) - set(layer.merged_adapters) for layer in layers)
    return TunerModelStatus(
        base_model_type=type(model if adapted is None else adapted.model).__name__,
        adapter_model_type="None" if adapted is None else type(adapted).__name__,
        peft_types={}
        if adapted is None
        else {name: config.peft_type.name for name, config in adapted.peft_config.items()},  # type: ignore[union-attr]
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_one([layer.enabled for layer in layers]),
        active_adapters=_one([layer.active_adapters for layer in layers]),
        merged_adapters="irregular" if partly else merged,
        requires_grad={
            name: _one([layer.requires_grad[name] for layer in layers if name in layer.requires_grad]) for name in names
        },
        available_adapters=names,
        devices={name: sorted({one for layer in layers for one in layer.devices.get(name, ())}) for name in names},
        quantization_backend=_one([layer.quantization_backend for layer in layers]),
    )


def _one(values: Sequence[Any]) -> Any:
    """The common value; "irregular" if the values differ."""
    return values[0] if all(value == values[0] for value in values) else "irregular"
