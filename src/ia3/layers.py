"""(IA)³ itself: the rescaled layer, and the rule for each module type.

A learned vector l multiplies the output of a key or value projection, l ⊙ (W x + b), or the input of the second
feed-forward projection, W (l ⊙ x) + b (Liu et al. 2022, equation 1 and the paragraph below it).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ia3.errors import InputError
from ia3.routing import Routing


@dataclass(frozen=True)
class Rule:
    """How a vector scales modules of one type: the axes of the weight that hold input and output features.

    Those of the activations are the last ones.
    """

    weight_in: int
    weight_out: int

    def features(self, module: nn.Module, feedforward: bool) -> int:
        """How long the vector is: the module's input features for a feed-forward, else its output features."""
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        return weight.shape[self.weight_in if feedforward else self.weight_out]

    def stored_shape(self, module: nn.Module, feedforward: bool) -> tuple[int, ...]:
        """The vector's shape in a checkpoint and as a parameter: (1, in) on the input side, (out, 1) on the other."""
        length = self.features(module, feedforward)
        return (1, length) if feedforward else (length, 1)

    def scale(self, activation: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """The activation times a flat vector along the last axis, in the activation's dtype."""
        return (activation * vector).to(activation.dtype)

    def scale_weight(self, weight: torch.Tensor, vector: torch.Tensor, feedforward: bool) -> torch.Tensor:
        """The weight that does alone what `weight` does with the vector on its input or output side."""
        shape = [1] * weight.dim()
        shape[self.weight_in if feedforward else self.weight_out] = -1
        return (weight * vector.view(shape)).to(weight.dtype)


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: Rule(weight_in=1, weight_out=0),
    Conv1D: Rule(weight_in=0, weight_out=1),
}


def find_rule(module: nn.Module) -> Rule | None:
    """The rule of a module's type or of the nearest type that it derives from; None when there is none."""
    return next((RULES[cls] for cls in type(module).__mro__ if cls in RULES), None)


class IA3Layer(nn.Module):
    """A module of the base model with one vector for each adapter that targets it.

    Args:
        base_layer: the module to rescale; its type must have a rule.
        routing: the model's one `Routing`, which says whose vectors act.

    Attributes:
        ia3_l: adapter name → vector, a float32 parameter of shape (out, 1), or (1, in) on the input side.
        feedforward: adapter name → whether its vector scales the input.
    """

    def __init__(self, base_layer: nn.Module, routing: Routing) -> None:
        super().__init__()
        rule = find_rule(base_layer)
        if rule is None:
            known = ", ".join(sorted(cls.__name__ for cls in RULES))
            raise InputError(f"Cannot rescale a {type(base_layer).__name__}; (IA)³ vectors are known for: {known}.")
        self.base_layer = base_layer
        self.ia3_l = nn.ParameterDict()
        self.feedforward: dict[str, bool] = {}
        self.routing = routing
        self.rule = rule
        self.masks: dict[str, torch.Tensor] = {}
        self._originals: dict[str, torch.Tensor] = {}
        self.train(base_layer.training)

    def add(
        self, name: str, feedforward: bool, ones: bool = True, rescaled: torch.Tensor | None = None, meta: bool = False
    ) -> None:
        """Give an adapter its vector here.

        Args:
            name: the adapter.
            feedforward: scale the input, not the output.
            ones: start from ones; False: from a normal distribution.
            rescaled: a boolean mask over the features, when only some are rescaled (the key and value part of a
                fused projection). The others count as ones whatever the parameter holds.
            meta: leave the vector without memory until a checkpoint fills it.
        """
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        shape = self.rule.stored_shape(self.base_layer, feedforward)
        # A base on the meta device is filled later; the vector then waits with it.
        device = torch.device("meta") if meta else weight.device
        vector = torch.ones(shape, device=device) if ones else torch.randn(shape, device=device)
        self.feedforward[name] = feedforward
        if rescaled is not None:
            self.masks[name] = rescaled.view(shape)
        self.ia3_l[name] = nn.Parameter(vector)

    def remove(self, name: str) -> None:
        """Take an adapter's vector away."""
        del self.ia3_l[name], self.feedforward[name]
        self.masks.pop(name, None)

    def vector(self, name: str, values: torch.Tensor | None = None) -> torch.Tensor:
        """An adapter's effective vector, in its stored shape; of other `values` than the parameter's when given."""
        vector: torch.Tensor = self.ia3_l[name] if values is None else values
        mask = self.masks.get(name)
        return vector if mask is None else torch.where(mask.to(vector.device), vector, 1.0)

    def scaling(self, names: Iterable[str], feedforward: bool) -> torch.Tensor | None:
        """The product of the named adapters' vectors on one side, flat; None when none has a vector there."""
        product = None
        for name in names:
            if self.feedforward.get(name) is feedforward:
                vector = self.vector(name).flatten()
                product = vector if product is None else product * vector
        return product

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer between the acting adapters' input and output scalings."""
        names = self.routing.vectors
        before, after = self.scaling(names, True), self.scaling(names, False)
        if before is not None:
            x = self.rule.scale(x, before)
        result = self.base_layer(x, *args, **kwargs)
        return result if after is None else self.rule.scale(result, after)

    @torch.no_grad()
    def rescaled_parameters(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Those of the base layer's parameters that change, with the named adapters (and no others) multiplied in."""
        names = [name for name in names if name in self.ia3_l]
        if not names:
            return {}
        original = {
            key: self._originals.get(key, parameter.data)
            for key, parameter in self.base_layer._parameters.items()
            if parameter is not None
        }
        weight = original["weight"]
        before, after = self.scaling(names, True), self.scaling(names, False)
        if before is not None:
            weight = self.rule.scale_weight(weight, before, True)
        if after is None:
            return {"weight": weight}
        changed = {"weight": self.rule.scale_weight(weight, after, False)}
        if "bias" in original:
            changed["bias"] = (original["bias"] * after).to(original["bias"].dtype)
        return changed

    @torch.no_grad()
    def merge(self, names: Iterable[str], keep_originals: bool = True) -> None:
        """Multiply adapters into the base weights, in place of any that are merged already."""
        for key, value in self.rescaled_parameters(names).items():
            parameter: nn.Parameter = self.base_layer._parameters[key]  # type: ignore[assignment]
            if keep_originals:
                self._originals.setdefault(key, parameter.data)
            parameter.data = value

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base layer its original weights back, bit for bit."""
        for key, value in self._originals.items():
            parameter: nn.Parameter = self.base_layer._parameters[key]  # type: ignore[assignment]
            parameter.data = value.to(parameter.device, parameter.dtype)  # the model may have moved in between
        self._originals.clear()

    def __getattr__(self, name: str) -> Any:
        # Models read `weight`, `in_features`, … of the modules that they own.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)


class TrainedModule(nn.Module):
    """A module of `modules_to_save`: the original, and a trained copy for each adapter that saves one."""

    def __init__(self, original_module: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.routing = routing
        self.train(original_module.training)

    def add(self, name: str) -> None:
        """Give an adapter a copy of the original."""
        module = copy.deepcopy(self.original_module)
        module.requires_grad_(True)
        self.modules_to_save[name] = module

    def remove(self, name: str) -> None:
        """Take an adapter's copy away."""
        del self.modules_to_save[name]

    @property
    def current(self) -> nn.Module:
        """The copy of the first acting adapter that has one, else the original."""
        name = next((name for name in self.routing.modules if name in self.modules_to_save), None)
        return self.original_module if name is None else self.modules_to_save[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the current module returns."""
        return self.current(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save", "routing"):
                raise
            return getattr(self.current, name)
