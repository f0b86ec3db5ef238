"""Which adapters act: one object, shared by every rescaled layer of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from ia3.layers import IA3Layer, TrainedModule


class Vector(NamedTuple):
    """One adapter's vector in one layer.

    Attributes:
        parameter: of the layer's stored shape.
        feedforward: whether it scales the input, not the output.
        mask: which entries count, the others being ones; None: all.
    """

    parameter: torch.Tensor
    feedforward: bool
    mask: torch.Tensor | None

    def effective(self) -> torch.Tensor:
        """The vector that multiplies, in its stored shape."""
        if self.mask is None:
            return self.parameter
        return torch.where(self.mask.to(self.parameter.device), self.parameter, 1.0)


class Routing:
    """The state that all `IA3Layer`s of one model ask. Switching or disabling adapters is one assignment here.

    Attributes:
        active: names of the adapters in effect; the vectors of several multiply.
        enabled: False switches every adapter off, so that the model's outputs are the base model's.
        merged: names of the adapters that are multiplied into the base weights at the moment.
        vectors: names of the adapters whose vectors a forward pass multiplies by: none while some are merged.
        modules: names of the adapters whose own copies of `modules_to_save` are used, best first.
        acting_vectors, acting_modules: for each of `vectors` and `modules` what it has in each slot. Compiled code
            looks here: to it names are constants and a switch of names is another program, a switch of tensors of one
            shape is not.
    """

    def __init__(self) -> None:
        self._slots: list[IA3Layer | TrainedModule | None] = []
        self._tables: dict[str, list[Any]] = {}
        self.switch(active=(), enabled=True, merged=())

    def switch(
        self, active: Iterable[str] | None = None, enabled: bool | None = None, merged: Iterable[str] | None = None
    ) -> None:
        """Change what is given, and leave the rest."""
        if active is not None:
            self.active = tuple(active)
        if enabled is not None:
            self.enabled = enabled
        if merged is not None:
            self.merged = tuple(merged)
        self.vectors = () if self.merged or not self.enabled else self.active
        self.modules = (self.merged or self.active) if self.enabled else ()
        self.acting_vectors = tuple(self._table(name) for name in self.vectors)
        self.acting_modules = tuple(self._table(name) for name in self.modules)

    @property
    def layers(self) -> list[IA3Layer]:
        """The rescaled layers that ask this object."""
        from ia3.layers import IA3Layer

        return [member for member in self._slots if isinstance(member, IA3Layer)]

    @property
    def trained(self) -> list[TrainedModule]:
        """The modules trained in full that ask this object."""
        from ia3.layers import TrainedModule

        return [member for member in self._slots if isinstance(member, TrainedModule)]

    def join(self, member: IA3Layer | TrainedModule) -> int:
        """Take a layer or a trained module in; returns its slot."""
        if None in self._slots:
            slot = self._slots.index(None)
            self._slots[slot] = member
            return slot
        self._slots.append(member)
        return len(self._slots) - 1

    def leave(self, member: IA3Layer | TrainedModule) -> None:
        """Let go of one that has been taken out of the model."""
        self._slots[member.slot] = None

    def refresh(self) -> None:
        """Look all vectors up again: some were added, removed or replaced."""
        self._tables.clear()
        self.switch()

    def sync_weights(self) -> list[float]:
        """Make the base weights hold what is merged: nothing while adapters are off.

        Returns:
            For each layer the relative error that its weight took; see `IA3Layer.merge`.
        """
        return [layer.merge(self.merged if self.enabled else ()) for layer in self.layers]

    def _table(self, name: str) -> list[Any]:
        if name not in self._tables:
            self._tables[name] = [None if member is None else member.find(name) for member in self._slots]
        return self._tables[name]
