"""A batch whose rows have an adapter each: whose vectors act on which row, and modules that run adapter by adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ia3.adapter.rules import RowLayout, check_rows
from ia3.errors import InputError

BASE = "__base__"
"""The name of no adapter, in a batch whose rows have one each."""

Sides = tuple[torch.Tensor | None, torch.Tensor | None]
"""What scales a layer's input, and what its output: a vector (features,), or one for each row (B, features)."""


@dataclass(frozen=True)
class Starts:
    """From which place on adapters act in each of the rows of a batch.

    Attributes:
        places: (rows,), counted from 0.
        length: how many places a row has.
    """

    places: torch.Tensor
    length: int

    def apply(self, activation: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
        """The activation before each row's place, the scaled one from there on.

        Args:
            activation: (B, L, features) with B rows, or adjacent blocks of equal size for each (beams); or (B · L, features).
            scaled: the same.

        Raises:
            InputError: it has other places.
        """
        rows = len(activation) if activation.dim() == 3 else len(activation) // self.length
        if (
            activation[:1].numel() == 0
            or activation.shape[:-1].numel() != rows * self.length
            or rows % len(self.places)
        ):
            raise InputError(
                f"Expected activations of {len(self.places)} rows of {self.length} places for an adapter that acts from the "
                f"question on, found {tuple(activation.shape)}: this model mixes places on the way; use acts_from='start'."
            )
        places = self.places.to(activation.device).repeat_interleave(rows // len(self.places))
        acting = torch.arange(self.length, device=activation.device) >= places[:, None]
        return torch.where(acting.view(*activation.shape[:-1], 1), scaled, activation)


_Function = TypeVar("_Function", bound=Callable)


def uncompiled(function: _Function) -> _Function:
    """A function, or method, that `torch.compile` leaves alone."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


class Rows:
    """Which adapter acts on each of the B rows of a batch.

    Attributes:
        factors: for each slot of the model's `Routing` the rows' factors.
        groups: for each different adapter the rows that are its, a tensor of indices.
        modules: for each of `groups` and each slot, what stands for a module of `modules_to_save`; None for the
            original.
    """

    def __init__(
        self, names: Sequence[str], factors: Sequence[Sides], modules: Mapping[str, Sequence[Callable | None]]
    ) -> None:
        self.factors = factors
        members: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            members.setdefault(name, []).append(row)
        self.groups = [torch.tensor(rows) for rows in members.values()]
        self.modules = [modules[name] for name in members]
        self._count = len(names)

    @uncompiled  # how many groups there are, and of how many rows, differs from batch to batch
    def apart(self, call: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], layout: RowLayout | None = None):
        """What a module returns whose rows have to go through it adapter by adapter.

        Args:
            call: takes a group's number and the module's arguments.
            args: its arguments.
            kwargs: the same.
            layout: how they hold the rows.

        Raises:
            InputError: rows cannot be told apart, or adapters' results differ in shape.
        """
        if len(self.groups) == 1:
            return call(0, *args, **kwargs)
        axis, divide, copies, results = layout or RowLayout()
        axes = results or (axis,)
        values = [*args, *kwargs.values()]
        for value in values:
            _require_plain(value)
        first = next(value for value in values if isinstance(value, torch.Tensor))
        length = first.shape[axis]
        check_rows(length, self._count * copies)

        def places(length: int, rows: torch.Tensor) -> torch.Tensor:
            return torch.arange(length).view(copies, self._count, -1)[:, rows].flatten().to(first.device)

        divided = {length, length * first.shape[1] if first.dim() > 2 and axis == 0 else length} if divide else set()

        def part_of(value: Any, rows: torch.Tensor) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(part_of(each, rows) for each in value)
            if isinstance(value, torch.Tensor) and value.dim() > axis and value.shape[axis] in divided:
                return value.index_select(axis, places(value.shape[axis], rows))
            return value

        parts = []
        for group, rows in enumerate(self.groups):
            chosen = [part_of(value, rows) for value in values]
            part = call(group, *chosen[: len(args)], **dict(zip(kwargs, chosen[len(args) :], strict=True)))
            parts.append(part if divide else _selected(part, places(length, rows), axes))
        order = torch.cat([places(length, rows) for rows in self.groups]).argsort()
        return _joined(parts, order, axes)


def _require_plain(value: Any) -> None:
    """Raise for an argument that cannot be divided among adapters, such as a cache that a module writes into."""
    if isinstance(value, (tuple, list)):
        for each in value:
            _require_plain(each)
    elif not isinstance(value, (torch.Tensor, torch.dtype, str, int, float, type(None))):
        raise InputError(
            f"Expected tensors as the arguments of a module that rows have to go through adapter by adapter, found a "
            f"{type(value).__name__}; give the model one adapter at a time (set_adapter), or try use_cache=False."
        )


def _axis_of_each(axes: tuple[int, ...], results: Sequence[Any]) -> list[tuple[int, ...]]:
    """The axis of rows in each of several results; the last one given counts for all behind it."""
    return [axes[i : i + 1] or axes[-1:] for i in range(len(results))]


def _selected(result: Any, place: torch.Tensor, axes: tuple[int, ...]) -> Any:
    if isinstance(result, (tuple, list)):
        parts = zip(result, _axis_of_each(axes, result), strict=True)
        return type(result)(_selected(part, place, own) for part, own in parts)
    return result.index_select(axes[0], place) if isinstance(result, torch.Tensor) else result


def _joined(parts: Sequence[Any], order: torch.Tensor, axes: tuple[int, ...]) -> Any:
    """The groups' results as one, in the order of the rows."""
    first = parts[0]
    if isinstance(first, (tuple, list)):
        several = zip(zip(*parts, strict=True), _axis_of_each(axes, first), strict=True)
        return type(first)(_joined(part, order, own) for part, own in several)
    axis = axes[0]
    if first is None:
        return None
    if not isinstance(first, torch.Tensor):
        raise InputError(
            f"Expected a module that returns tensors, found a {type(first).__name__}: rows of different adapters cannot "
            f"be put together; give the model one adapter at a time (set_adapter)."
        )
    shapes = list(dict.fromkeys(str(tuple(part.movedim(axis, 0).shape[1:])) for part in parts))
    if len(shapes) > 1:
        raise InputError(
            f"Expected adapters whose own modules (modules_to_save) return rows of one shape, found "
            f"{', '.join(shapes)}: a batch takes those with as many labels."
        )
    if sum(part.shape[axis] for part in parts) != len(order):
        raise InputError(
            f"Expected a module that returns a result for each of {len(order)} rows, found "
            f"{sum(part.shape[axis] for part in parts)}: rows of different adapters cannot be put together; give the "
            f"model one adapter at a time (set_adapter)."
        )
    return torch.cat(list(parts), axis).index_select(axis, order)


def row_shape(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """How many rows of how many tokens a model's arguments hold; None when they do not say."""
    tokens = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs"), kwargs.get("inputs_embeds"))
    found = next((value for value in tokens if isinstance(value, torch.Tensor) and value.dim() > 1), None)
    return None if found is None else (found.shape[0], found.shape[1])


def row_count(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """How many rows a model's arguments hold; None when they do not say."""
    names = ("inputs", "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "attention_mask")
    values = [*args[:1], *(kwargs.get(name) for name in names), *kwargs.values()]
    return next((len(value) for value in values if isinstance(value, torch.Tensor) and value.dim()), None)
