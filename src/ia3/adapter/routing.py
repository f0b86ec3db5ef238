"""Which adapters act: one object, shared by every rescaled layer of a model."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional as F

from ia3.adapter.rows import BASE, Rows, Sides

if TYPE_CHECKING:
    from ia3.adapter.layer import IA3Layer, TrainedModule
    from ia3.bank import AdapterBank


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


class _Local(threading.local):
    def __init__(self) -> None:
        self.rows: Rows | None = None  # each thread's own: compiled code would not look again at the class's

    def __reduce__(self) -> tuple:
        return _Local, ()  # what a forward pass is at is no part of a copied or stored model


class Routing:
    """The state that all `IA3Layer`s of one model ask. Switching or disabling adapters is one assignment here.

    Attributes:
        active: names of the adapters in effect; the vectors of several multiply.
        enabled: False switches every adapter off, so that the model's outputs are the base model's.
        merged: names of the adapters that are multiplied into the base weights at the moment.
        vectors: names of the adapters whose vectors a forward pass multiplies by: none while some are merged.
        modules: names of the adapters whose own copies of `modules_to_save` are used.
        bank: adapters that the layers do not hold themselves.
        rows: which adapter acts on which row, in this thread; None: the `vectors` and `modules` act on all.
        acting_vectors, acting_modules: for each of `vectors` and `modules` what it has in each slot. Compiled code
            looks here: to it names are constants and a switch of names is another program, a switch of tensors of one
            shape is not.
    """

    def __init__(self) -> None:
        self._slots: list[IA3Layer | TrainedModule | None] = []
        self._tables: dict[str, list[Any]] = {}
        self._segments: dict[tuple[int, bool], int] = {}
        self._local = _Local()
        self.bank: AdapterBank | None = None
        self._banked: dict[str, int] = {}
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
    def rows(self) -> Rows | None:
        """Which adapter acts on which row, in this thread."""
        return self._local.rows

    @rows.setter
    def rows(self, rows: Rows | None) -> None:
        self._local.rows = rows

    @property
    def layers(self) -> list[IA3Layer]:
        """The rescaled layers that ask this object."""
        from ia3.adapter.layer import IA3Layer

        return [member for member in self._slots if isinstance(member, IA3Layer)]

    @property
    def trained(self) -> list[TrainedModule]:
        """The modules trained in full that ask this object."""
        from ia3.adapter.layer import TrainedModule

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
        self._segments = {}
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

    # Rows of different adapters.

    def attach(self, bank: AdapterBank | None, slots: Mapping[str, int]) -> None:
        """Let rows be of adapters in a bank; `slots` says which each path of its entries has."""
        self.bank = bank
        self._banked = dict(slots)
        self.refresh()

    def serves_bank(self, member: IA3Layer | TrainedModule) -> bool:
        """Whether adapters in the bank rescale a layer, or have a module of their own in its place."""
        return member.slot in self._banked.values()

    def gather(self, names: Sequence[str], own: Container[str]) -> Rows:
        """The vectors of a batch with an adapter for each row: one matrix (B, all features), sliced by slot and side.

        Args:
            names: of adapters, or `BASE`.
            own: the adapters that layers hold themselves; the others are in the bank.

        Raises:
            InputError: see `AdapterBank.gather`.
        """
        self._segments = self._segments or self._find_segments()
        distinct = list(dict.fromkeys(names))
        banked = dict.fromkeys(name for name in distinct if name not in own and name != BASE)
        modules = {name: self._table(name) for name in distinct if name not in banked}
        found: dict[str, torch.Tensor] = {}
        if self.bank is not None and banked:
            # As they come, when all rows are the bank's: then nothing has to be copied once more.
            asked = names if not any(name in own for name in distinct) else [*banked, BASE]
            vectors, parameters = self._divide(self.bank, self.bank.gather(asked).to(self._device))
            first = {name: row for row, name in reversed(list(enumerate(asked)))}
            for name in banked:
                modules[name] = self._modules(self.bank, parameters, first[name])
            if asked is names:
                return Rows(names, self._by_slot(vectors), modules)
            found = dict(zip(asked, vectors, strict=True))
        rows = [found[name] if name in found else self._flat(name) for name in distinct]
        dtype = functools.reduce(torch.promote_types, [row.dtype for row in rows])
        matrix = torch.stack([row.to(dtype) for row in rows])
        if len(distinct) < len(names):
            places = {name: row for row, name in enumerate(distinct)}
            matrix = matrix[torch.tensor([places[name] for name in names], device=matrix.device)]
        return Rows(names, self._by_slot(matrix), modules)

    def _find_segments(self) -> dict[tuple[int, bool], int]:
        """How many numbers the flat vector holds for each slot and side: first as in the bank's rows, then the rest."""
        entries = () if self.bank is None else self.bank.entries
        segments = {
            (self._banked[entry.path], entry.feedforward): entry.size for entry in entries if entry.parameter is None
        }
        for layer in self.layers:
            for name, vector in layer.ia3_l.items():
                segments.setdefault((layer.slot, layer.feedforward[name]), vector.numel())
        return segments

    def _flat(self, name: str) -> torch.Tensor:
        """An adapter as one vector, ones where it has none: differentiable."""
        table = self._table(name)
        parts, device = [], self._device
        for (slot, feedforward), size in self._segments.items():
            vector = table[slot]
            if vector is not None and vector.feedforward is feedforward:
                parts.append(vector.effective().flatten().to(device))
            else:
                parts.append(torch.ones(size, device=device))
        return torch.cat(parts) if parts else torch.ones(0)

    @property
    def _device(self) -> torch.device | None:
        """Where the vectors of a batch are put together."""
        layers = self.layers
        return layers[0].vector_device if layers else None

    def _by_slot(self, matrix: torch.Tensor) -> list[Sides]:
        vectors: list[Sides] = [(None, None)] * len(self._slots)
        # One split: its gradient is one matrix too, not a matrix for each slice.
        pieces = matrix.split(list(self._segments.values()), 1)
        for (slot, feedforward), piece in zip(self._segments, pieces, strict=True):
            before, after = vectors[slot]
            vectors[slot] = (piece, after) if feedforward else (before, piece)
        return vectors

    def _divide(self, bank: AdapterBank, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, dict[str, torch.Tensor]]]:
        """The bank's rows as vectors of all segments, and the parameters of modules by path and name."""
        pieces = rows.split([entry.size for entry in bank.entries], 1)
        parameters: dict[str, dict[str, torch.Tensor]] = {}
        for entry, piece in zip(bank.entries, pieces, strict=True):
            if entry.parameter is not None:
                parameters.setdefault(entry.path, {})[entry.parameter] = piece.unflatten(1, entry.shape)
        if parameters:
            rows = torch.cat(
                [piece for entry, piece in zip(bank.entries, pieces, strict=True) if entry.parameter is None], 1
            )
        return F.pad(rows, (0, sum(self._segments.values()) - rows.shape[1]), value=1.0), parameters

    def _modules(
        self, bank: AdapterBank, parameters: Mapping[str, Mapping[str, torch.Tensor]], row: int
    ) -> list[Callable | None]:
        """What stands for the modules that an adapter of the bank trained in full, by slot."""
        modules: list[Callable | None] = [None] * len(self._slots)
        for path, values in parameters.items():
            slot = self._banked[path]
            module: TrainedModule = self._slots[slot]  # type: ignore[assignment]
            modules[slot] = module.standing_in({key: value[row] for key, value in values.items()})
        return modules
