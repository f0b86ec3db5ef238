"""(IA)³ itself: the rescaled layer.

A learned vector l multiplies the output of a key or value projection, l ⊙ (W x + b), or the input of the second
feed-forward projection, W (l ⊙ x) + b (Liu et al. 2022, equation 1 and the paragraph below it).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ia3.adapter import quantized
from ia3.adapter.placement import device_of, require_whole
from ia3.adapter.routing import Held, Member, Routing, Vector, Watched, multiplied
from ia3.adapter.rows import Sides
from ia3.adapter.rules import find_rule, rule_types
from ia3.errors import InputError, shown


class IA3Layer(Member):
    """A module of the base model with one vector for each adapter that targets it.

    Args:
        base_layer: the module to rescale; its type must have a rule.
        routing: the model's one `Routing`, which says what acts.
        weights_read: other modules read the base layer's parameters in place of calling it; what they read is then
            rescaled too.
        row_axis: the axis of its activations that holds the rows of a batch; None: none does.

    Attributes:
        ia3_l: adapter name → vector, a float32 parameter of the rule's shape.
        held: adapter name → `Vector`, which has its side and its mask too.

    Raises:
        InputError: no rule for the module's type.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """y = l ⊙ (W x + b) for vectors on the output, y = W (l ⊙ x) + b for those on the input."""
        if self.rule.axis is None:
            return self._forward_inside(args, kwargs)
        before, after = self.routing.factors(self)
        if before is not None:
            args = (self._scale(before, args[0]), *args[1:])
        y = self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]
        return y if after is None else self._scale(after, y)

    def _scale(self, vector: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
        """l ⊙ x: one vector (features,) for all rows, or (B, features) for B rows with an adapter each."""
        if self.row_axis == 0 or (vector.dim() == 1 and self.routing.starts is None):
            return self._from_start(activation, self.rule.scale(activation, vector))
        if self.row_axis is None:
            raise InputError(
                f"An expert ({type(self.base_layer).__name__}) gets tokens of all rows, so that rows cannot have different "
                f"adapters; give the model one adapter at a time (set_adapter)."
            )
        rows = activation.transpose(0, 1)
        return self._from_start(rows, self.rule.scale(rows, vector)).transpose(0, 1)

    def _from_start(self, activation: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
        """l ⊙ x from the place on where each row's question begins, and x before it, for adapters that act from there."""
        starts = self.routing.starts
        return scaled if starts is None else starts.apply(activation, scaled)

    def _forward_inside(self, args: Any, kwargs: Any) -> Any:
        """The same for a module whose activations cannot be reached from outside: its forward pass, rescaled weights."""
        rows, (before, after) = self.routing.rows, self.routing.factors(self)
        self._require_all_places()
        if rows is None:
            return self._run_rescaled((before, after), args, kwargs)

        def run(group: int, *args: Any, **kwargs: Any) -> Any:
            first = rows.groups[group][0]
            sides = (None if before is None else before[first], None if after is None else after[first])
            return self._run_rescaled(sides, args, kwargs)

        return rows.apart(run, args, kwargs, self.rule.rows(self.base_layer))

    # What adapters hold.

    _inner, _container = "base_layer", "ia3_l"

    base_layer: nn.Module
    ia3_l: nn.ParameterDict
    held: dict[str, Vector]

    def __init__(
        self, base_layer: nn.Module, routing: Routing, weights_read: bool = False, row_axis: int | None = 0
    ) -> None:
        rule = find_rule(base_layer)
        if rule is None:
            raise InputError(
                f"Cannot rescale a {type(base_layer).__name__}; there are rules for {shown(rule_types(), 99, room=400)} and "
                f"what derives from them. Choose other target_modules, or add a rule: ia3.register_rule."
            )
        super().__init__(base_layer, _Vectors, routing)
        self.rule = rule
        self.weights_read = weights_read or rule.axis is None
        self.row_axis = row_axis
        self._originals: dict[str, Any] = {}
        self.register_load_state_dict_pre_hook(_require_unmerged)

    def add(
        self,
        name: str,
        feedforward: bool,
        ones: bool = True,
        rescaled: torch.Tensor | None = None,
        meta: bool = False,
        float32: bool = True,
    ) -> None:
        """Give an adapter its vector here.

        Args:
            name: the adapter.
            feedforward: scale the input, not the output.
            ones: start from ones; False: from a normal distribution.
            rescaled: a boolean mask over the features, when only some are rescaled (the key and value part of a
                fused projection). The others count as ones whatever the parameter holds.
            meta: leave the vector without memory until a checkpoint fills it.
            float32: whatever the base layer's dtype; False: in that, where it is a floating-point dtype.
        """
        shape = self.rule.shape(self.base_layer, feedforward)
        base = next(self.base_layer.parameters())
        # A base on the meta device is filled later; the vector then waits with it.
        device = torch.device("meta") if meta else device_of(self.base_layer)
        dtype = torch.float32 if float32 or not base.is_floating_point() else base.dtype
        vector = nn.Parameter((torch.ones if ones else torch.randn)(shape, device=device, dtype=dtype))
        self._hold(name, Vector(vector, feedforward, None if rescaled is None else rescaled.view(shape)))

    @torch.no_grad()
    def fill(self, name: str, values: torch.Tensor) -> None:
        """Give an adapter's vector other values, of its shape."""
        held = self.held[name]
        if held.mask is not None and not torch.equal(self.vector(name, values), values):
            held.mask = None  # trained over the full width
        parameter = held.value
        if parameter.is_meta:
            device = device_of(self.base_layer)
            self.ia3_l[name] = nn.Parameter(values.to(device, parameter.dtype), parameter.requires_grad)
        else:
            parameter.copy_(values)

    def vector(self, name: str, values: torch.Tensor | None = None) -> torch.Tensor:
        """An adapter's effective vector, in its stored shape; of other `values` than the parameter's when given."""
        held = self.held[name]
        return (held if values is None else replace(held, value=values)).effective()

    # What PEFT's layers say of themselves.

    adapter_layer_names = ("ia3_l",)

    def get_base_layer(self) -> nn.Module:
        """The module that is rescaled."""
        return self.base_layer

    @property
    def active_adapters(self) -> list[str]:
        """The adapters in effect, in this layer or others."""
        return list(self.routing.active)

    @property
    def merged_adapters(self) -> list[str]:
        """Those of this layer that are multiplied into its weight."""
        return [name for name in self.routing.merged if name in self.held]

    @property
    def merged(self) -> bool:
        """Whether there are any."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are switched off."""
        return not self.routing.enabled

    # Its weights with vectors multiplied in.

    def _run_rescaled(self, sides: Sides, args: Any, kwargs: Any) -> Any:
        return torch.func.functional_call(self.base_layer, self._rescaled(sides)[0], args, kwargs)

    def _rescaled(self, sides: Sides) -> tuple[dict[str, Any], float]:
        """What of the base layer changes with vectors multiplied in, by name; and the relative error of doing so."""
        before, after = sides
        if before is None and after is None:
            return {}, 0.0
        require_whole(self.base_layer)
        if quantized.is_quantized(self.base_layer):
            return quantized.rescaled(self.base_layer, before, after)
        own = {name: value for name, value in self.base_layer._parameters.items() if value is not None}
        changed: dict[str, Any] = {}
        for vector, feedforward in ((before, True), (after, False)):
            if vector is not None:
                changed |= self.rule.rescale(self.base_layer, own | changed, vector, feedforward)
        return changed, 0.0

    @torch.no_grad()
    def broken(self, names: Iterable[str]) -> str | None:
        """The first parameter that would hold NaN or infinity with adapters merged; None when none would.

        Call it while the base layer holds no others.
        """
        vectors = [self.held[name] for name in names if name in self.held]
        if not all(_is_finite(vector.value) for vector in vectors):
            return "vector"  # of a packed weight one could not tell
        changed = self._rescaled(multiplied(vectors))[0]
        return next((key for key, value in changed.items() if not _is_finite(value)), None)

    @torch.no_grad()
    def merge(self, names: Iterable[str], keep_originals: bool = True) -> float:
        """Multiply adapters into the base layer, in place of any that are merged already.

        Returns:
            The relative error that quantized weights took, 0.0 where the vector went into their scales.
        """
        self.unmerge()
        changed, error = self._rescaled(multiplied(self.held[name] for name in names if name in self.held))
        for key, value in changed.items():
            original = getattr(self.base_layer, key)
            if isinstance(original, nn.Parameter) and not isinstance(value, nn.Parameter):
                # A new parameter, not new values in the old one, which may be tied to another module's.
                value = nn.Parameter(value, requires_grad=original.requires_grad)
            setattr(self.base_layer, key, value)
            if keep_originals:
                self._originals[key] = original
        return error

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base layer back what it had before merging, bit for bit."""
        for key, original in self._originals.items():
            merged = getattr(self.base_layer, key)
            if isinstance(original, nn.Parameter) and (original.dtype, original.device) != (
                merged.dtype,
                merged.device,
            ):
                original.data = original.data.to(merged.device, merged.dtype)  # the model has moved in between
            setattr(self.base_layer, key, original)
        self._originals.clear()

    def _require_all_places(self) -> None:
        if self.routing.starts is not None:
            raise InputError(
                f"The vectors of a {type(self.base_layer).__name__} are multiplied into its weights, so that they cannot act "
                f"from the question on; train an adapter that acts from the start."
            )

    def __getattr__(self, name: str) -> Any:
        # Models read `weight`, `in_features`, … of the modules that they own.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "weights_read"):
                raise
        base: nn.Module = super().__getattr__("base_layer")  # type: ignore[assignment]
        if self.weights_read and name in base._parameters:
            factors = self.routing.factors(self)
            self._require_all_places()
            if any(factor is not None and factor.dim() == 2 for factor in factors):
                raise InputError(
                    f"Another module reads the {name} of a {type(base).__name__} in place of calling it, so that rows "
                    f"cannot have different adapters; give the model one adapter at a time (set_adapter)."
                )
            return self._rescaled(factors)[0].get(name, base._parameters[name])
        return getattr(base, name)


def _require_unmerged(layer: IA3Layer, *_: Any) -> None:
    if layer._originals:  # which would come back when it is unmerged, whatever is loaded
        raise InputError("Expected a model without merged adapters to load a state into; call unmerge_adapter() first.")


def _is_finite(value: Any) -> bool:
    return not (torch.is_tensor(value) and value.is_floating_point()) or bool(torch.isfinite(value).all())


class _Vectors(nn.ParameterDict):
    def __init__(self, held: dict[str, Held]) -> None:
        super().__init__()
        self._parameters = Watched(held)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # FSDP deletes a parameter and puts a plain tensor there, which `_parameters` does not get to see.
        held = getattr(self.__dict__.get("_parameters"), "held", {})
        if name in held:
            held[name].value = value
