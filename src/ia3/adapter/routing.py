"""Which adapters act, and by what each layer multiplies: one object, shared by all rescaled layers of a model."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code
from torch.nn import functional as F

from ia3.adapter.placement import device_of
from ia3.adapter.rows import BASE, Rows, Sides, Starts
from ia3.errors import InputError


@dataclass(slots=True, eq=False)
class Held:
    """What an adapter holds in one member of a `Routing`.

    Attributes:
        value: the parameter, or the module, that stands there now.
    """

    value: Any


@dataclass(slots=True, eq=False)
class Vector(Held):
    """One adapter's vector in one layer.

    Attributes:
        value: of the layer's stored shape.
        feedforward: whether it scales the input, not the output.
        mask: which entries count, the others being ones; None: all.
    """

    value: torch.Tensor
    feedforward: bool
    mask: torch.Tensor | None

    def effective(self) -> torch.Tensor:
        """The vector that multiplies, in its stored shape."""
        if self.mask is None:
            return self.value
        return torch.where(self.mask.to(self.value.device), self.value, 1.0)


class Watched(dict):
    """A module's `_parameters` or `_modules` by adapter: what takes another's place becomes what the adapter holds.

    FSDP puts others there for the time of a forward pass, as `functional_call` does, and `.to("meta")` or
    `load_state_dict(assign=True)` for good.
    """

    held: Mapping[str, Held] = MappingProxyType({})  # while it is unpickled, items come first

    def __init__(self, held: Mapping[str, Held]) -> None:
        super().__init__()
        self.held = held

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if name in self.held:
            self.held[name].value = value


class Member(nn.Module):
    """A wrapper around a module of the base model, which asks a `Routing` what acts.

    Attributes:
        routing: the model's one.
        slot: its place there.
        held: what each adapter holds here.
    """

    _inner: ClassVar[str]
    _container: ClassVar[str]

    def __init__(self, module: nn.Module, container: Callable[[dict], nn.Module], routing: Routing) -> None:
        super().__init__()
        self.held: dict[str, Any] = {}
        self._modules.update({self._inner: module, self._container: container(self.held)})
        self.routing = routing
        self.slot = routing.join(self)
        self.train(module.training)

    @property
    def wrapped(self) -> nn.Module:
        """The base model's own module."""
        return self._modules[self._inner]  # type: ignore[return-value]

    @property
    def container(self) -> Any:
        """Adapter name → what it holds here, as torch sees it."""
        return self._modules[self._container]

    def parameters_of(self, name: str) -> Iterator[nn.Parameter]:
        """An adapter's parameters here."""
        value = self.container[name] if name in self.held else None
        return value.parameters() if isinstance(value, nn.Module) else iter(() if value is None else (value,))

    def _hold(self, name: str, held: Held) -> None:
        self.held[name] = held
        self.container[name] = held.value
        self.routing.put(self.slot, name, held)

    def remove(self, name: str) -> None:
        """Take away what an adapter holds here."""
        del self.container[name], self.held[name]
        self.routing.put(self.slot, name, None)

    def _replicate_for_data_parallel(self) -> Member:
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        replica.routing = self.routing.lent(replica)
        return replica


class _OfReplica:
    """In place of a table, what an adapter holds in one of `nn.DataParallel`'s replicas, on the replica's device."""

    def __init__(self, member: Member, name: str) -> None:
        self.member, self.name = member, name

    def __getitem__(self, slot: int) -> Held | None:
        held = self.member.held.get(self.name)
        return None if held is None else replace(held, value=self.member.container[self.name])


class Bank(Protocol):
    """Adapters that no layer holds, but that rows can have."""

    def close_to(self, name: str, *others: str) -> str:
        """For an error message about an unknown name: similar ones among those in the bank and `others`."""
        ...

    @property
    def segments(self) -> Sequence[tuple[str, bool, int]]:
        """The columns of its matrices: for which module, by its path, and whether for the input; and how many."""
        ...

    def acts_from(self, name: str) -> str:
        """From where an adapter acts, as of `IA3Config`."""
        ...

    def __contains__(self, name: object) -> bool: ...

    def matrix(self, names: Sequence[str]) -> tuple[torch.Tensor, Mapping[str, Mapping[str, torch.Tensor]]]:
        """The vectors of a batch, an adapter (or `BASE`) a row, in the columns of `segments`.

        And for each path of a module that these adapters train in full its parameters by name, (rows, …).

        Raises:
            InputError: an adapter cannot be had.
        """
        ...


class _Local(threading.local):
    def __init__(self) -> None:
        self.rows: Rows | None = None  # each thread's own: compiled code would not look again at the class's
        self.starts: Starts | None = None

    def __reduce__(self) -> tuple:
        return _Local, ()  # what a forward pass is at is no part of a copied or stored model


class Routing:
    """The state that all `IA3Layer`s of one model ask. Switching or disabling adapters is one assignment here.

    Each member has a slot, and each adapter a table of what it holds in each. Compiled code looks there as well: to it
    names are constants and a switch of names is another program, a switch of tensors of one shape is not.

    Attributes:
        active: names of the adapters in effect; the vectors of several multiply.
        enabled: False switches every adapter off, so that the model's outputs are the base model's.
        merged: names of the adapters that are multiplied into the base weights at the moment.
        vectors: tables of the adapters whose vectors a forward pass multiplies by: none while some are merged.
        modules: tables of the adapters whose own copies of `modules_to_save` are used.
        bank: adapters that the layers do not hold themselves.
        from_question: names of the adapters that act from a place of each row on (`IA3Config.acts_from`); not an
            encoder-decoder's, which have no vectors in the encoder.
        waits: whether one of them is among those whose vectors act; compiled code looks at it, and not at names.
        rows: which adapter acts on which row, in this thread; None: the `vectors` and `modules` act on all.
        starts: from which place of each row on they act, in this thread; None: on all places.
    """

    def __init__(self) -> None:
        self._slots: list[Member | None] = []
        self._tables: dict[str, list[Held | None]] = {}
        self._segments: dict[tuple[int, bool], int] = {}
        self._local = _Local()
        self.bank: Bank | None = None
        self._banked: dict[str, int] = {}
        self.from_question: set[str] = set()
        self.switch(active=(), enabled=True, merged=())

    # What a forward pass asks.

    def factors(self, layer: Member) -> Sides:
        """What multiplies a layer's input, and what its output, in the pass at hand; None: nothing."""
        rows = self._local.rows
        if rows is not None:
            return rows.factors[layer.slot]
        return multiplied([table[layer.slot] for table in self.vectors])

    def module(self, member: Member) -> nn.Module | None:
        """The acting adapters' copy of a module of `modules_to_save`; None: the original acts."""
        for table in self.modules:
            held = table[member.slot]
            if held is not None:
                return held.value
        return None

    @property
    def rows(self) -> Rows | None:
        """Which adapter acts on which row, in this thread."""
        return self._local.rows

    @property
    def starts(self) -> Starts | None:
        """From which place of each row on adapters act, in this thread."""
        return self._local.starts

    @contextmanager
    def passing(self, rows: Rows | None, starts: Starts | None) -> Iterator[None]:
        """Within `with`, this thread's passes through the model have these `rows` and `starts`."""
        local = self._local
        before = local.rows, local.starts
        local.rows, local.starts = rows, starts
        try:
            yield
        finally:
            local.rows, local.starts = before

    skip_code(passing.__wrapped__.__code__)  # type: ignore[attr-defined]  # dynamo compiles no generators

    def act_everywhere(self, *_: Any) -> None:
        """Let adapters act on all places from here on, as in passes behind the first one of a generation."""
        self._local.starts = None

    # Switching.

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
        vectors, modules = self._acting
        self.waits = not self.from_question.isdisjoint(vectors)
        self.vectors: Sequence[Any] = tuple(self._table(name) for name in vectors)
        self.modules: Sequence[Any] = tuple(self._table(name) for name in modules)

    @property
    def _acting(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The adapters whose vectors act, and those whose modules do."""
        if not self.enabled:
            return (), ()
        return () if self.merged else self.active, self.merged or self.active

    # Members, and what adapters hold in them.

    @property
    def members(self) -> list[Member]:
        """The rescaled layers, and the modules trained in full, that ask this object."""
        return [member for member in self._slots if member is not None]

    def join(self, member: Member) -> int:
        """Take a member in; returns its slot."""
        if None in self._slots:
            slot = self._slots.index(None)
            self._slots[slot] = member
            return slot
        self._slots.append(member)
        for table in self._tables.values():
            table.append(None)
        return len(self._slots) - 1

    def leave(self, member: Member) -> None:
        """Let go of one that has been taken out of the model."""
        self._slots[member.slot] = None
        for name in member.held:
            self.put(member.slot, name, None)

    def put(self, slot: int, name: str, held: Held | None) -> None:
        """Let an adapter hold something in a slot, in place of what it held; None: nothing any more."""
        known = name in self._tables
        table = self._table(name)
        table[slot] = held
        self._segments = {}
        if not any(table):
            del self._tables[name]
        if (name in self._tables) is not known:
            self.switch()

    def _table(self, name: str) -> list[Held | None]:
        if name not in self._tables:
            self._tables[name] = [None] * len(self._slots)
        return self._tables[name]

    def lent(self, replica: Member) -> Routing:
        """The same for a replica of a member, whose parameters and modules are on a device of its own."""
        lent = copy.copy(self)
        lent.vectors, lent.modules = ([_OfReplica(replica, name) for name in names] for names in self._acting)
        return lent

    # Rows of different adapters.

    def attach(self, bank: Bank | None, slots: Mapping[str, int]) -> None:
        """Let rows be of adapters in a bank; `slots` says which each path of its modules has."""
        self.bank = bank
        self._banked = dict(slots)
        self._segments = {}

    def serves_bank(self, member: Member) -> bool:
        """Whether adapters in the bank rescale a layer, or have a module of their own in its place."""
        return member.slot in self._banked.values()

    def gather(self, names: Sequence[str], own: Container[str]) -> Rows:
        """The vectors of a batch with an adapter for each row: one matrix (B, all features), sliced by slot and side.

        Args:
            names: of adapters, or `BASE`.
            own: the adapters that layers hold themselves; the others are in the bank.

        Raises:
            InputError: see `Bank.matrix`.
        """
        self._segments = self._segments or self._find_segments()
        distinct = list(dict.fromkeys(names))
        banked = dict.fromkeys(name for name in distinct if name not in own and name != BASE)
        modules = {name: self._modules_of(name) for name in distinct if name not in banked}
        found: dict[str, torch.Tensor] = {}
        if self.bank is not None and banked:
            # As they come, when all rows are the bank's: then nothing has to be copied once more.
            asked = names if not any(name in own for name in distinct) else [*banked, BASE]
            vectors, parameters = self.bank.matrix(asked)
            vectors = F.pad(vectors.to(self._device), (0, sum(self._segments.values()) - vectors.shape[1]), value=1.0)
            first = {name: row for row, name in reversed(list(enumerate(asked)))}
            for name in banked:
                modules[name] = self._banked_modules(parameters, first[name])
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
        """How many numbers the flat vector holds for each slot and side: first as in the bank's matrix, then the rest."""
        banked = () if self.bank is None else self.bank.segments
        segments = {(self._banked[path], feedforward): size for path, feedforward, size in banked}
        for table in self._tables.values():
            for slot, held in enumerate(table):
                if isinstance(held, Vector):
                    segments.setdefault((slot, held.feedforward), held.value.numel())
        return segments

    def _flat(self, name: str) -> torch.Tensor:
        """An adapter as one vector, ones where it has none: differentiable."""
        table = self._tables.get(name)
        parts, device = [], self._device
        for (slot, feedforward), size in self._segments.items():
            held = None if table is None else table[slot]
            if isinstance(held, Vector) and held.feedforward is feedforward:
                parts.append(held.effective().flatten().to(device))
            else:
                parts.append(torch.ones(size, device=device))
        return torch.cat(parts) if parts else torch.ones(0)

    @property
    def _device(self) -> torch.device | None:
        """Where the vectors of a batch are put together: beside the first layer's weight."""
        slot = min((slot for slot, _ in self._segments), default=None)
        member = None if slot is None else self._slots[slot]
        return None if member is None else device_of(member.wrapped)

    def _by_slot(self, matrix: torch.Tensor) -> list[Sides]:
        factors: list[Sides] = [(None, None)] * len(self._slots)
        # One split: its gradient is one matrix too, not a matrix for each slice.
        pieces = matrix.split(list(self._segments.values()), 1)
        for (slot, feedforward), piece in zip(self._segments, pieces, strict=True):
            before, after = factors[slot]
            factors[slot] = (piece, after) if feedforward else (before, piece)
        return factors

    def _modules_of(self, name: str) -> list[Callable | None]:
        """An adapter's own modules, by slot."""
        table = self._tables.get(name) or [None] * len(self._slots)
        return [None if held is None or isinstance(held, Vector) else held.value for held in table]

    def _banked_modules(self, parameters: Mapping[str, Mapping[str, torch.Tensor]], row: int) -> list[Callable | None]:
        """What stands for the modules that an adapter of the bank trained in full, by slot."""
        modules: list[Callable | None] = [None] * len(self._slots)
        for path, values in parameters.items():
            slot = self._banked[path]
            member = self._slots[slot]
            assert member is not None
            modules[slot] = _standing_in(member.wrapped, {key: value[row] for key, value in values.items()})
        return modules


def multiplied(vectors: Iterable[Vector | None]) -> Sides:
    """The products of vectors on the input and on the output of one layer, flat; None for none."""
    before = after = None
    for vector in vectors:
        if vector is not None:
            flat = vector.effective().flatten()
            if vector.feedforward:
                before = flat if before is None else before * flat
            else:
                after = flat if after is None else after * flat
    return before, after


def _standing_in(module: nn.Module, parameters: Mapping[str, torch.Tensor]) -> Callable:
    """A module as a function, with other parameters and buffers in it."""
    own = module.state_dict(keep_vars=True)
    values = {key: value.to(own[key]) for key, value in parameters.items()}
    return lambda *args, **kwargs: torch.func.functional_call(module, values, args, kwargs)


class SameRows:
    """A checkpointing function whose second pass, in the backward pass, has the rows of the first."""

    def __init__(self, function: Callable, routing: Routing) -> None:
        self.function, self.routing = function, routing

    def __call__(self, module: Callable, *args: Any, **kwargs: Any) -> Any:
        rows, starts = self.routing.rows, self.routing.starts
        several = rows is not None or starts is not None
        if several and torch.is_grad_enabled() and getattr(self.function, "keywords", {}).get("use_reentrant"):
            raise InputError(
                "Gradients of rows with different adapters cannot go through layers that are checkpointed by reentrance; "
                "give gradient_checkpointing_enable the gradient_checkpointing_kwargs {'use_reentrant': False}."
            )

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.routing.passing(rows, starts):
                return module(*args, **kwargs)

        return self.function(run, *args, **kwargs)
