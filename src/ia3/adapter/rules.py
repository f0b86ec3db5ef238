"""How a vector rescales a module of each type: `Rule`, the table of them, and `register_rule`.

A rule knows the vector's length, the activation that it multiplies, and the parameters that have the same effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ia3.errors import InputError

Parameters = dict[str, torch.Tensor]


class RowLayout(NamedTuple):
    """How a module's arguments hold the rows of a batch.

    Attributes:
        axis: the axis of rows, or of adjacent blocks per row, in the first argument and in the results.
        divide: arguments of the same length along the axis, or with consecutive tokens, can be divided among adapters;
            False: the module must run on the whole batch for each adapter.
        copies: the number of consecutive copies of the batch along the axis.
        results: the axis of rows in each of several results, if it is not always `axis`.
    """

    axis: int = 0
    divide: bool = True
    copies: int = 1
    results: tuple[int, ...] = ()


class Rule:
    """How modules of one type are rescaled. Derive a class from it, or use `WeightRule`, and call `register_rule`.

    Attributes:
        axis: the features' axis of the module's input and output, from the end (-1 for the last). None: the activations
            are not accessible from outside, so the forward pass runs with rescaled parameters.
    """

    axis: int | None = None

    def shape(self, module: nn.Module, feedforward: bool) -> tuple[int, ...]:
        """The vector's shape, as a parameter and in a checkpoint.

        Args:
            module: the module to rescale.
            feedforward: whether the vector is on the input side, instead of the output side.

        Raises:
            InputError: modules of this type cannot be rescaled on that side.
        """
        raise NotImplementedError

    def rescale(
        self, module: nn.Module, parameters: Mapping[str, torch.Tensor], vector: torch.Tensor, feedforward: bool
    ) -> Parameters:
        """The changed parameters, multiplied by the vector; differentiable, in the parameters' dtype.

        Args:
            module: the module to rescale.
            parameters: name → parameter, to use instead of the module's own.
            vector: the flat vector.
            feedforward: whether the vector is on the input side.
        """
        raise NotImplementedError

    def scale(self, activation: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """The activation times a vector along `axis`, in the activation's dtype.

        Args:
            activation: (…, features, …).
            vector: flat; or (B, features) for a batch of B rows with different adapters. The activation's first axis
                then has the rows, or adjacent blocks of equal size per row (beams, tokens).

        Raises:
            InputError: the axis cannot be divided among the rows.
        """
        assert self.axis is not None
        return (_multiply if vector.dim() == 1 else _multiply_rows)(activation, vector, self.axis)

    def rows(self, module: nn.Module) -> RowLayout:
        """How the module's arguments hold the rows of a batch with different adapters; used if `axis` is None.

        Raises:
            InputError: the arguments do not hold rows, so a batch can have only one adapter.
        """
        raise InputError(
            f"Rows of a {type(module).__name__} cannot have different adapters; give the model one adapter at a time "
            f"(set_adapter)."
        )


def check_rows(length: int, rows: int) -> None:
    """Raise unless an axis of this length divides into blocks of equal size for the rows of a mixed batch."""
    if length % rows:
        raise InputError(
            f"Expected a module's input to hold {rows} rows, or blocks of them, found {length}: this model mixes rows on "
            f"the way, so that they cannot have different adapters; give it one adapter at a time (set_adapter)."
        )


def _multiply(tensor: torch.Tensor, vector: torch.Tensor, axis: int) -> torch.Tensor:
    """A tensor times a vector along one axis (counted from the end), in the tensor's dtype."""
    if axis != -1:
        vector = vector.view(-1, *[1] * (-axis - 1))
    return (tensor * vector.to(tensor.device)).to(tensor.dtype)


def _multiply_rows(tensor: torch.Tensor, vectors: torch.Tensor, axis: int) -> torch.Tensor:
    """Each row, or block of rows, of a tensor times its vector of (B, features) along one axis."""
    count, length = len(vectors), tensor.shape[0]
    vectors = vectors.to(tensor.device).view(count, *[1] * (tensor.dim() + axis - 1), -1, *[1] * (-axis - 1))
    if length == count:
        return (tensor * vectors).to(tensor.dtype)
    check_rows(length, count)
    blocks = tensor.unflatten(0, (count, length // count))
    return (blocks * vectors.unsqueeze(1)).to(tensor.dtype).flatten(0, 1)


@dataclass(frozen=True)
class WeightRule(Rule):
    """A module y = f(W, x) + b that is linear in x, with a parameter `weight` and optionally a `bias` on the output.

    Args:
        inputs: the module's attribute with the number of input features; None: the input has no features to rescale.
        outputs: the attribute with the number of output features.
        weight_in: the weight's axis of input features, from the end.
        weight_out: the weight's axis of output features, from the end.
        axis: the activations' axis of features, from the end. The axes after it are spatial.
    """

    inputs: str | None
    outputs: str
    weight_in: int
    weight_out: int
    axis: int = -1

    def shape(self, module: nn.Module, feedforward: bool) -> tuple[int, ...]:
        """PEFT's shapes: (1, in) and (out, 1); (1, channels, 1, …) on both sides if the features are channels."""
        name = self.inputs if feedforward else self.outputs
        if name is None:
            raise InputError(
                f"The input of a {type(module).__name__} cannot be rescaled, only its output; leave it out of "
                f"feedforward_modules."
            )
        features: int = getattr(module, name)
        if self.axis != -1:
            return (1, features, *[1] * (-self.axis - 1))
        return (1, features) if feedforward else (features, 1)

    def rescale(
        self, module: nn.Module, parameters: Mapping[str, torch.Tensor], vector: torch.Tensor, feedforward: bool
    ) -> Parameters:
        """See `Rule.rescale`."""
        weight = parameters["weight"]
        if not feedforward:
            changed = {"weight": _multiply(weight, vector, self.weight_out)}
            if "bias" in parameters:
                changed["bias"] = _multiply(parameters["bias"], vector, -1)
            return changed
        groups: int = getattr(module, "groups", 1)
        if groups == 1:
            return {"weight": _multiply(weight, vector, self.weight_in)}
        # The outputs of a grouped convolution depend only on their group's inputs: weight (out, in / groups, …).
        outputs, inputs = weight.shape[:2]
        seen = vector.view(groups, 1, inputs).expand(-1, outputs // groups, -1).reshape(outputs, inputs)
        return {"weight": (weight * seen.view(outputs, inputs, *[1] * (weight.dim() - 2))).to(weight.dtype)}


class _KeyValueRule(Rule):
    """An attention whose projections are its own parameters; the vector is [keys | values]."""

    def shape(self, module: nn.Module, feedforward: bool) -> tuple[int, ...]:
        if feedforward:
            raise InputError(
                f"A {type(module).__name__} has keys and values to rescale, no feed-forward input; leave it out of "
                f"feedforward_modules."
            )
        return (2 * self.width(module), 1)

    def width(self, module: nn.Module) -> int:
        """The number of features of the keys and of the values."""
        raise NotImplementedError


class MultiheadAttentionRule(_KeyValueRule):
    """`nn.MultiheadAttention`, with a packed input projection [q | k | v] or separate ones."""

    def width(self, module: nn.Module) -> int:
        return module.embed_dim  # type: ignore[return-value]

    def rescale(
        self, module: nn.Module, parameters: Mapping[str, torch.Tensor], vector: torch.Tensor, feedforward: bool
    ) -> Parameters:
        key, value = vector.chunk(2)
        packed = torch.cat([torch.ones_like(key), vector])
        # name → its factor, and the factor's axis; bias_k and bias_v are an additional key and value.
        factors = {
            "in_proj_weight": (packed, -2),
            "in_proj_bias": (packed, -1),
            "k_proj_weight": (key, -2),
            "v_proj_weight": (value, -2),
            "bias_k": (key, -1),
            "bias_v": (value, -1),
        }
        return {name: _multiply(parameters[name], *factors[name]) for name in factors if name in parameters}

    def rows(self, module: nn.Module) -> RowLayout:
        # Masks have their rows on other axes, the returned weights always on the first.
        return RowLayout(0 if module.batch_first else 1, divide=False, results=(0 if module.batch_first else 1, 0))


class XLNetAttentionRule(_KeyValueRule):
    """XLNet's relative attention: parameters `k` and `v` of shape (hidden, heads, head_dim)."""

    def width(self, module: nn.Module) -> int:
        return module.n_head * module.d_head  # type: ignore[operator]

    def rescale(
        self, module: nn.Module, parameters: Mapping[str, torch.Tensor], vector: torch.Tensor, feedforward: bool
    ) -> Parameters:
        key, value = vector.view(2, *parameters["k"].shape[1:])
        return {name: (parameters[name] * part).to(parameters[name].dtype) for name, part in (("k", key), ("v", value))}

    def rows(self, module: nn.Module) -> RowLayout:
        return RowLayout(1, divide=False, results=(1, 1, 2))  # both streams, and their attention weights


@dataclass(frozen=True)
class ExpertsRule(Rule):
    """Experts that are slices of one parameter, with a vector for each expert's intermediate activation.

    Args:
        parameter: the second feed-forward projections of all experts, of shape (experts, out, in), or
            (experts, in, out) if the module or the shape of the first projections says so; or (experts · in, out).
        sorted: the module gets the tokens sorted by expert.
        copied: the module gets a copy of all tokens for each expert.
    """

    parameter: str = "down_proj"
    sorted: bool = False
    copied: bool = False

    def shape(self, module: nn.Module, feedforward: bool) -> tuple[int, ...]:
        """(experts, 1, in); (1, experts · in) if the parameter has only two axes."""
        if not feedforward:
            raise InputError(
                f"A {type(module).__name__} (experts as one parameter) can be rescaled only on the input side of the "
                f"second projection; add it to feedforward_modules."
            )
        weight: torch.Tensor = getattr(module, self.parameter)
        length = weight.shape[self._axis(module)]
        return (1, length) if weight.dim() == 2 else (weight.shape[0], 1, length)

    def _axis(self, module: nn.Module) -> int:
        weight: torch.Tensor = getattr(module, self.parameter)
        if weight.dim() == 2:
            return -2
        gate_up = getattr(module, "gate_up_proj", None)
        if gate_up is not None:  # (experts, hidden, 2 · in) beside (experts, in, hidden): transposed
            transposed = gate_up.shape[2] == 2 * weight.shape[1] and gate_up.shape[1] == weight.shape[2]
        else:
            transposed = bool(getattr(module, "is_transposed", False))
        return -2 if transposed else -1

    def rescale(
        self, module: nn.Module, parameters: Mapping[str, torch.Tensor], vector: torch.Tensor, feedforward: bool
    ) -> Parameters:
        weight = parameters[self.parameter]
        axis = self._axis(module)
        if weight.dim() == 3:
            vector = vector.view(len(weight), *((1, -1) if axis == -1 else (-1, 1)))
            return {self.parameter: (weight * vector).to(weight.dtype)}
        return {self.parameter: _multiply(weight, vector, axis)}

    def rows(self, module: nn.Module) -> RowLayout:
        """See `Rule.rows`. The router's choices are arguments of the same length as the tokens."""
        if self.sorted:
            return super().rows(module)
        weight: torch.Tensor = getattr(module, self.parameter)
        return RowLayout(copies=len(weight) if self.copied else 1)


def _convolution(dimensions: int) -> WeightRule:
    return WeightRule("in_channels", "out_channels", -1 - dimensions, -2 - dimensions, axis=-1 - dimensions)


_EXPERTS = ExpertsRule()

# By type, or by the name of a type in transformers' modeling files, to avoid importing them all.
RULES: dict[type[nn.Module] | str, Rule] = {
    nn.Linear: WeightRule("in_features", "out_features", weight_in=-1, weight_out=-2),
    Conv1D: WeightRule("nx", "nf", weight_in=-2, weight_out=-1),
    nn.Conv1d: _convolution(1),
    nn.Conv2d: _convolution(2),
    nn.Conv3d: _convolution(3),
    nn.Embedding: WeightRule(None, "embedding_dim", weight_in=-2, weight_out=-1),
    nn.MultiheadAttention: MultiheadAttentionRule(),
    "XLNetRelativeAttention": XLNetAttentionRule(),
    "JetMoeParallelExperts": ExpertsRule("weight", sorted=True),
    "Llama4TextExperts": ExpertsRule(copied=True),
    "DbrxExpertGLU": ExpertsRule("w2", sorted=True),
}


def register_rule(module_type: type[nn.Module], rule: Rule) -> None:
    """Allow modules of a type, and of its subclasses, as targets.

    Args:
        module_type: the type; an existing rule is replaced.
        rule: a `WeightRule` for modules y = f(W, x) + b; otherwise an object of your class derived from `Rule`.
    """
    RULES[module_type] = rule


def find_rule(module: nn.Module) -> Rule | None:
    """The rule of a module's type or of its nearest base class; None if there is none.

    Experts have a different class in each architecture; their three-dimensional `down_proj` identifies them.
    """
    for cls in type(module).__mro__:
        if cls in RULES or cls.__name__ in RULES:
            return RULES[cls] if cls in RULES else RULES[cls.__name__]
    down = module._parameters.get(_EXPERTS.parameter)
    return _EXPERTS if down is not None and down.dim() == 3 else None


def rule_types() -> list[str]:
    """The names of types with a rule, for an error message."""
    names = [key if isinstance(key, str) else key.__name__ for key in RULES]
    return [*names, "experts with a three-dimensional down_proj"]
