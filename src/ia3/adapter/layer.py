"""(IA)³ itself: the rescaled layer.

A learned vector l multiplies the output of a key or value projection, l ⊙ (W x + b), or the input of the second
feed-forward projection, W (l ⊙ x) + b (Liu et al. 2022, equation 1 and the paragraph below it).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ia3.adapter import quantized
from ia3.adapter.routing import Routing, Vector
from ia3.adapter.rows import Sides
from ia3.adapter.rules import find_rule, rule_types
from ia3.errors import InputError, shown


class IA3Layer(nn.Module):
    """A module of the base model with one vector for each adapter that targets it.

    Args:
        base_layer: the module to rescale; its type must have a rule.
        routing: the model's one `Routing`, which says whose vectors act.
        weights_read: other modules read the base layer's parameters in place of calling it; what they read is then
            rescaled too.
        row_axis: the axis of its activations that holds the rows of a batch; None: none does.

    Attributes:
        ia3_l: adapter name → vector, a float32 parameter of the rule's shape.
        feedforward: adapter name → whether its vector scales the input.
        masks: adapter name → which entries of its vector count, where not all do.

    Raises:
        InputError: no rule for the module's type.
    """

    def __init__(
        self, base_layer: nn.Module, routing: Routing, weights_read: bool = False, row_axis: int | None = 0
    ) -> None:
        super().__init__()
        rule = find_rule(base_layer)
        if rule is None:
            raise InputError(
                f"Cannot rescale a {type(base_layer).__name__}; there are rules for {shown(rule_types(), 99, room=400)} and "
                f"what derives from them. Choose other target_modules, or add a rule: ia3.register_rule."
            )
        self.base_layer = base_layer
        self.ia3_l = nn.ParameterDict()
        self.feedforward: dict[str, bool] = {}
        self.masks: dict[str, torch.Tensor] = {}
        self.rule = rule
        self.weights_read = weights_read or rule.axis is None
        self.row_axis = row_axis
        self.routing = routing
        self.slot = routing.join(self)
        self._originals: dict[str, Any] = {}
        self.register_load_state_dict_pre_hook(_require_unmerged)
        self.register_load_state_dict_post_hook(_look_up_again)
        self.train(base_layer.training)

    def add(
        self,
        name: str,
        feedforward: bool,
        ones: bool = True,
        rescaled: torch.Tensor | None = None,
        meta: bool = False,
        float32: bool = True,
    ) -> None:
        """Give an adapter its vector here. `Routing.refresh` makes it known.

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
        device = torch.device("meta") if meta else base.device
        dtype = torch.float32 if float32 or not base.is_floating_point() else base.dtype
        vector = (torch.ones if ones else torch.randn)(shape, device=device, dtype=dtype)
        self.feedforward[name] = feedforward
        if rescaled is not None:
            self.masks[name] = rescaled.view(shape)
        self.ia3_l[name] = nn.Parameter(vector)

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
        return [name for name in self.routing.merged if name in self.ia3_l]

    @property
    def merged(self) -> bool:
        """Whether there are any."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are switched off."""
        return not self.routing.enabled

    @property
    def vector_device(self) -> torch.device:
        """Where its vectors are put."""
        return next(self.base_layer.parameters()).device

    def remove(self, name: str) -> None:
        """Take an adapter's vector away. `Routing.refresh` makes it known."""
        del self.ia3_l[name], self.feedforward[name]
        self.masks.pop(name, None)

    @torch.no_grad()
    def fill(self, name: str, values: torch.Tensor) -> None:
        """Give an adapter's vector other values, of its shape. `Routing.refresh` makes it known."""
        parameter = self.ia3_l[name]
        if name in self.masks and not torch.equal(self.vector(name, values), values):
            del self.masks[name]  # trained over the full width
        if parameter.is_meta:
            self.ia3_l[name] = nn.Parameter(values.to(self.vector_device, parameter.dtype), parameter.requires_grad)
        else:
            parameter.copy_(values)

    def find(self, name: str) -> Vector | None:
        """An adapter's vector here; None when it does not target this module."""
        if name not in self.feedforward:
            return None
        return Vector(self._vectors[name], self.feedforward[name], self.masks.get(name))

    @property
    def _vectors(self) -> nn.ParameterDict:
        # As `ia3_l`, past `__getattr__`: what is looked up in each forward pass is looked up directly.
        return self._modules["ia3_l"]  # type: ignore[return-value]

    def vector(self, name: str, values: torch.Tensor | None = None) -> torch.Tensor:
        """An adapter's effective vector, in its stored shape; of other `values` than the parameter's when given."""
        vector = Vector(self.ia3_l[name] if values is None else values, self.feedforward[name], self.masks.get(name))
        return vector.effective()

    def _acting(self) -> Sequence[Vector | None]:
        if torch.compiler.is_compiling():
            return [table[self.slot] for table in self.routing.acting_vectors]
        # The parameters that the module holds now: FSDP puts others in their place for the time of a forward pass.
        return [self.find(name) for name in self.routing.vectors]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base layer returns, with the acting adapters' vectors on its input and output."""
        rows = self.routing.rows
        before, after = _sides(self._acting()) if rows is None else rows.vectors[self.slot]
        if self.rule.axis is not None:
            if before is not None:
                args = (self._scale(args[0], before), *args[1:])
            result = self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]
            return result if after is None else self._scale(result, after)
        if rows is None:
            return self._run_rescaled((before, after), args, kwargs)

        def run(group: int, *args: Any, **kwargs: Any) -> Any:
            first = rows.groups[group][0]
            sides = (None if before is None else before[first], None if after is None else after[first])
            return self._run_rescaled(sides, args, kwargs)

        return rows.apart(run, args, kwargs, self.rule.rows(self.base_layer))

    def _scale(self, activation: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        if vector.dim() == 1 or self.row_axis == 0:
            return self.rule.scale(activation, vector)
        if self.row_axis is None:
            raise InputError(
                f"An expert ({type(self.base_layer).__name__}) gets tokens of all rows, so that rows cannot have different "
                f"adapters; give the model one adapter at a time (set_adapter)."
            )
        return self.rule.scale(activation.transpose(0, 1), vector).transpose(0, 1)

    def _run_rescaled(self, sides: Sides, args: Any, kwargs: Any) -> Any:
        return torch.func.functional_call(self.base_layer, self._rescaled(sides)[0], args, kwargs)

    def _rescaled(self, sides: Sides) -> tuple[dict[str, Any], float]:
        """What of the base layer changes with vectors multiplied in, by name; and the relative error of doing so."""
        before, after = sides
        if before is None and after is None:
            return {}, 0.0
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
        vectors = [self.find(name) for name in names]
        if not all(_is_finite(vector.parameter) for vector in vectors if vector is not None):
            return "vector"  # of a packed weight one could not tell
        return next((key for key, value in self._rescaled(_sides(vectors))[0].items() if not _is_finite(value)), None)

    @torch.no_grad()
    def merge(self, names: Iterable[str], keep_originals: bool = True) -> float:
        """Multiply adapters into the base layer, in place of any that are merged already.

        Returns:
            The relative error that quantized weights took, 0.0 where the vector went into their scales.
        """
        self.unmerge()
        changed, error = self._rescaled(_sides([self.find(name) for name in names]))
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

    def _apply(self, fn: Callable, recurse: bool = True) -> IA3Layer:
        super()._apply(fn, recurse)  # may put new parameters in place of the old
        self.routing.refresh()
        return self

    def __getattr__(self, name: str) -> Any:
        # Models read `weight`, `in_features`, … of the modules that they own.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "weights_read"):
                raise
        base: nn.Module = super().__getattr__("base_layer")  # type: ignore[assignment]
        if self.weights_read and name in base._parameters:
            if self.routing.rows is not None and self.routing.rows.vectors[self.slot] != (None, None):
                raise InputError(
                    f"Another module reads the {name} of a {type(base).__name__} in place of calling it, so that rows "
                    f"cannot have different adapters; give the model one adapter at a time (set_adapter)."
                )
            return self._rescaled(_sides(self._acting()))[0].get(name, base._parameters[name])
        return getattr(base, name)


def _require_unmerged(layer: IA3Layer, *_: Any) -> None:
    if layer._originals:  # which would come back when it is unmerged, whatever is loaded
        raise InputError("Expected a model without merged adapters to load a state into; call unmerge_adapter() first.")


def _look_up_again(layer: IA3Layer, _: Any) -> None:
    layer.routing.refresh()  # `load_state_dict(…, assign=True)` puts new parameters in place of the old


def _sides(vectors: Iterable[Vector | None]) -> Sides:
    """What scales the input and the output: the products of the vectors on each side, flat; None for none."""
    before = after = None
    for vector in vectors:
        if vector is not None:
            flat = vector.effective().flatten()
            if vector.feedforward:
                before = flat if before is None else before * flat
            else:
                after = flat if after is None else after * flat
    return before, after


def _is_finite(value: Any) -> bool:
    return not (torch.is_tensor(value) and value.is_floating_point()) or bool(torch.isfinite(value).all())


class TrainedModule(nn.Module):
    """A module of `modules_to_save`: the original, and a trained copy for each adapter that saves one."""

    def __init__(self, original_module: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.routing = routing
        self.slot = routing.join(self)
        self.train(original_module.training)

    def add(self, name: str) -> None:
        """Give an adapter a copy of the original."""
        module = copy.deepcopy(self.original_module)
        module.requires_grad_(True)
        self.modules_to_save[name] = module

    def remove(self, name: str) -> None:
        """Take an adapter's copy away."""
        del self.modules_to_save[name]

    def find(self, name: str) -> nn.Module | None:
        """An adapter's copy; None when it has none."""
        return self.modules_to_save._modules.get(name)

    @property
    def current(self) -> nn.Module:
        """The copy of the acting adapter that has one, else the original."""
        if torch.compiler.is_compiling():
            copies = [table[self.slot] for table in self.routing.acting_modules]
        else:
            copies = [self.find(name) for name in self.routing.modules]
        return next((module for module in copies if module is not None), self.original_module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the current module returns; in a mixed batch, of each row its own adapter's."""
        rows = self.routing.rows
        if rows is None:
            return self.current(*args, **kwargs)

        def run(group: int, *args: Any, **kwargs: Any) -> Any:
            return (rows.modules[group][self.slot] or self.original_module)(*args, **kwargs)

        return rows.apart(run, args, kwargs)

    def standing_in(self, parameters: Mapping[str, torch.Tensor]) -> Callable:
        """The original as a function, with other parameters and buffers in it."""
        own = self.original_module.state_dict(keep_vars=True)
        values = {key: value.to(own[key]) for key, value in parameters.items()}
        return lambda *args, **kwargs: torch.func.functional_call(self.original_module, values, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save", "routing"):
                raise
        rows = self.routing.rows
        if rows is None:
            return getattr(self.current, name)
        modules = [group[self.slot] or self.original_module for group in rows.modules]
        if isinstance(modules[0], nn.Module) and all(module is modules[0] for module in modules):
            return getattr(modules[0], name)
        value = getattr(self.original_module, name)
        if isinstance(value, (torch.Tensor, nn.Module)):
            raise InputError(
                f"Another module reads the {name} of a {type(self.original_module).__name__} in place of calling it, so "
                f"that rows cannot each have their own adapter's; give the model one adapter at a time (set_adapter)."
            )
        return value
