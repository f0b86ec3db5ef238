"""Which adapters act: one object, shared by every rescaled layer of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

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
        trained: the modules that adapters train in full.
        acting: for each of `vectors` its vectors by the layers' slots. Compiled code reads them here: to it names are
            constants and a switch of names is another program, a switch of tensors of one shape is not.
    """

    def __init__(self) -> None:
        self._slots: list[IA3Layer | None] = []
        self.trained: list[TrainedModule] = []
        self._tables: dict[str, list[Vector | None]] = {}
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
        self.acting = tuple(self._table(name) for name in self.vectors)

    @property
    def layers(self) -> list[IA3Layer]:
        """The layers that ask this object."""
        return [layer for layer in self._slots if layer is not None]

    def join(self, layer: IA3Layer) -> int:
        """Take a layer in; returns its place in a table."""
        if None in self._slots:
            slot = self._slots.index(None)
            self._slots[slot] = layer
            return slot
        self._slots.append(layer)
        return len(self._slots) - 1

    def leave(self, module: IA3Layer | TrainedModule) -> None:
        """Let go of a layer or trained module that has been taken out of the model."""
        if module in self.trained:
            self.trained.remove(module)  # type: ignore[arg-type]
        else:
            self._slots[self._slots.index(module)] = None  # type: ignore[arg-type]

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

    def _table(self, name: str) -> list[Vector | None]:
        if name not in self._tables:
            self._tables[name] = [None if layer is None else layer.find(name) for layer in self._slots]
        return self._tables[name]
