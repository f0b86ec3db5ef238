"""Thousands of adapters in one array, and a different adapter for each row of a batch: `AdapterBank`."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from ia3.adapter.adapted import Adapted
from ia3.adapter.config import CONFIG_NAME, IA3Config, adapter_folders
from ia3.adapter.placement import device_of
from ia3.adapter.rows import BASE
from ia3.adapter.stored import OWN_NAMES, StoredAdapter
from ia3.adapter.targets import Target, has_encoder, outside_decoder, resolve
from ia3.bank.archives import Archive, open_archive, write_archive
from ia3.bank.homes import Folder, Home, Record, SpillFile
from ia3.bank.layout import DTYPES, Layout, resolve_entries
from ia3.bank.residency import Residency
from ia3.errors import InputError, brief, shown, similar
from ia3.files import current, fetch, is_address, locate, parse_bytes

_RESERVED = (BASE, "__metadata__")  # safetensors does not allow the second name


@dataclasses.dataclass(frozen=True)
class BankStatistics:
    """Numbers of a bank.

    Attributes:
        resident: adapters in memory.
        known: adapters that can be used.
        capacity: the maximum of resident adapters; None: no limit but memory.
        pinned: adapters that stay resident.
        row_bytes: memory of one adapter.
        resident_bytes: memory of the resident adapters and the base model's row.
        hits: distinct names that a gather or pin found resident, summed over calls.
        misses: distinct names that it had to load.
        evictions: adapters that were evicted from memory.
        spilled: adapters in the spill file.
    """

    resident: int
    known: int
    capacity: int | None
    pinned: int
    row_bytes: int
    resident_bytes: int
    hits: int
    misses: int
    evictions: int
    spilled: int


class AdapterBank:
    """Adapters of one kind (the same modules, sides and `modules_to_save`) as rows of one array.

    Where the config's adapters act from the start, adapters of the same modules that act from the question on fit too; in
    an encoder-decoder, their rows have ones for the encoder.

    Row 0, with the name "__base__", is the base model: ones, and its own `modules_to_save`. An adapter is in memory or
    at
    its home: a folder, or a record of an archive or the spill file. It is loaded from there at its next use. Any
    number of threads may use a bank at the same time. A deep copy is the same bank.

    Args:
        model: the bank is attached to it.
        config: the adapters' config. None: that of the model's first active adapter, or of its first adapter.
        dtype: the array's dtype, torch.float32 or torch.bfloat16.
        budget: memory for the array, in bytes or such as "512MB" or "2GiB"; the least recently used adapters are
            evicted.
            None: the array grows.
        spill: a folder that only this bank uses, for evicted adapters that came as tensors or whose folder has changed.
            None: a temporary file.

    Attributes:
        config: the resolved config.
        entries: the columns.
        targets: the modules that vectors rescale.
        modules: the paths of the modules of `modules_to_save`.
        width: the number of columns.
        dtype, device: the array's dtype and device.

    Raises:
        InputError: the config does not fit the model, the budget is too small for an adapter, or `spill` is in use.
    """

    def __init__(
        self,
        model: Adapted,
        config: IA3Config | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        budget: int | str | None = None,
        spill: str | os.PathLike | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"Expected a dtype of {shown(map(str, DTYPES))}, found {dtype}.")
        if config is None:
            if not model.peft_config:
                raise InputError("Expected a config: the model has no adapter whose config the bank could take.")
            config = model.peft_config[next(iter([*model.active_adapters, *model.peft_config]))]
        found = resolve(model.model, config, key_value_only=False)
        self.config, self.modules = found.config, found.kept
        targets: dict[nn.Module, Target] = {}  # a module at several paths appears once
        for target in found.targets:
            targets.setdefault(target.module, target)
        self.targets = list(targets.values())
        entries, base = resolve_entries(model, self.targets, self.modules)
        reading = outside_decoder(model.model) if has_encoder(model.model) else ()
        self._layout = Layout(entries, self.targets, dtype, reading)
        self.entries, self.width, self.dtype = entries, self._layout.width, dtype
        device = device_of(model.model)
        self.device = torch.device("cpu") if device.type == "meta" else device
        capacity = None if budget is None else _rows(budget, self._layout.row_bytes) - 1

        # One writer at a time changes the known and resident adapters. Gathers wait for it only if they miss an
        # adapter.
        self._writer = threading.RLock()
        self._resident = Residency(self.width, dtype, self.device, capacity)
        self._stage = None if self.device.type == "cpu" else torch.empty(self.width, dtype=dtype, device="cpu")
        self._homes: dict[str, Home | None] = {}  # name → home, but for records of archives; None: only in memory
        self._roots: list[str] = []  # registered folders
        self._deleted: set[str] = set()  # deleted names that a registered folder still has
        self._archives: list[Archive] = []
        self._spill = None if spill is None else SpillFile(spill, self._layout)
        self._closed = False
        self._write(0, lambda layout, row, name: layout.pack(base, row, name), BASE)
        model.attach_adapter_bank(self, self.targets, self.modules)

    def __deepcopy__(self, memo: dict) -> AdapterBank:
        return self

    def __repr__(self) -> str:
        known = self.statistics
        room = "unlimited" if known.capacity is None else known.capacity
        return (
            f"AdapterBank({self.width} columns of {str(self.dtype).removeprefix('torch.')}; {known.resident} of "
            f"{known.known} adapters resident in {known.resident_bytes / 1e6:.1f} MB, capacity {room}, {known.pinned} "
            f"pinned, {known.spilled} spilled; {known.hits} hits, {known.misses} misses, {known.evictions} evictions)"
        )

    @property
    def statistics(self) -> BankStatistics:
        """Numbers of the bank."""
        resident = self._resident
        return BankStatistics(
            resident=len(resident.rows) - 1,
            known=len(self),
            capacity=resident.capacity,
            pinned=len(resident.pinned),
            row_bytes=self._layout.row_bytes,
            resident_bytes=len(resident.rows) * self._layout.row_bytes,
            hits=resident.hits,
            misses=resident.misses,
            evictions=resident.evictions,
            spilled=0 if self._spill is None else len(self._spill),
        )

    @property
    def names(self) -> list[str]:
        """The names of all known adapters, in memory or not; of registered folders, those that were seen.

        `len` and iteration over a bank make no list of them.
        """
        return list(self)

    def __len__(self) -> int:
        return len(self._homes) + sum(map(len, self._archives))

    def __iter__(self) -> Iterator[str]:
        return chain(list(self._homes), *map(iter, list(self._archives)))

    def __contains__(self, name: object) -> bool:
        """Whether `gather` knows the name, including "__base__"."""
        return name == BASE or (isinstance(name, str) and (name in self._homes or self._find(name) is not None))

    # Reading.

    def gather(self, names: Sequence[str]) -> torch.Tensor:
        """A copy of the adapters of a batch, one per row: (len(names), width). Adapters that are not resident are
        loaded.

        Raises:
            InputError: a name is unknown, an adapter cannot be loaded, or there are more than fit at once.
        """
        with self._leased(names) as (array, rows):
            index = torch.tensor([rows[name] for name in names], dtype=torch.int64, device=self.device)
            return torch.index_select(array, 0, index)

    def acts_from(self, name: str) -> str:
        """From where an adapter acts, as of `IA3Config`; those that came as tensors act as the bank's config says.

        Raises:
            InputError: there is no such adapter, or its config cannot be read.
        """
        home = self._homes.get(name) or (None if name in self._homes else self._find(name))
        return self.config.acts_from if home is None else home.acts_from or self.config.acts_from

    @property
    def segments(self) -> list[tuple[str, bool, int]]:
        """The columns of `matrix`: module path, whether for its input, and the number of columns."""
        return [(entry.path, entry.feedforward, entry.size) for entry in self.entries if entry.parameter is None]

    def matrix(self, names: Sequence[str]) -> tuple[torch.Tensor, dict[str, dict[str, torch.Tensor]]]:
        """The adapters of a batch, one per row: the vectors as columns, and the parameters of modules by path and name.

        Raises:
            InputError: see `gather`.
        """
        rows = self.gather(names)
        vectors: list[torch.Tensor] = []
        parameters: dict[str, dict[str, torch.Tensor]] = {}
        for entry, piece in zip(self.entries, rows.split([entry.size for entry in self.entries], 1), strict=True):
            if entry.parameter is None:
                vectors.append(piece)
            else:
                parameters.setdefault(entry.path, {})[entry.parameter] = piece.unflatten(1, entry.shape)
        return torch.cat(vectors, 1) if parameters else rows, parameters

    @contextmanager
    def _leased(self, names: Sequence[str]) -> Iterator[tuple[torch.Tensor, dict[str, int]]]:
        """The array, and each name's row, which is not overwritten during the `with` block."""
        distinct = dict.fromkeys(names)
        with self._resident.lease() as lease:
            yield self._resident.find(distinct, lease) or self._bring(names, distinct, lease)

    def _bring(
        self, names: Sequence[str], distinct: Mapping[str, Any], lease: set[int]
    ) -> tuple[torch.Tensor, dict[str, int]]:
        # Only the writer may wait for other leases while it holds one.
        with self._writing():
            for number, name in enumerate(names, 1):
                if name != BASE and not self._is_known(name):
                    raise InputError(
                        f"Unknown adapter {brief(name)}",
                        f"{self.close_to(str(name))}. Load or register it first",
                        row=number,
                    )
            self._resident.require_room(distinct)
            rows = self._resident.hold(distinct, lease)
            missing = [name for name in distinct if name not in rows]
            for name in missing:
                rows[name] = self._reload(name)
                lease.add(rows[name])
            self._resident.touch(distinct, len(missing))
            return self._resident.array, rows

    # Adding adapters.

    def load(
        self, path: str | os.PathLike, name: str | None = None, subfolder: str | None = None, **hub_kwargs: Any
    ) -> str:
        """Load an adapter from a folder or the hub, or refill the one of that name: gathers see the old or the new one.

        Args:
            path: the folder or hub id.
            name: the adapter's name; None: the folder's name, or the hub id.
            subfolder: a subfolder of the folder or repository.
            **hub_kwargs: `revision`, `token`, …

        Returns:
            The adapter's name.

        Raises:
            InputError: there is no adapter, or one of another kind than the bank's.
        """
        folder = os.path.abspath(os.path.join(path, subfolder or ""))
        given = os.path.basename(folder)
        if not os.path.isdir(folder):
            folder = os.path.dirname(os.path.abspath(StoredAdapter(path, subfolder, **hub_kwargs).vectors_file()))
            locate(path, CONFIG_NAME, subfolder=subfolder, **hub_kwargs)  # beside it
            given = f"{path}/{subfolder}" if subfolder else str(path)
        name = given if name is None else name
        _check_name(name)
        with self._writing():
            self._resident.require_room([name])
            home = Folder(folder)
            self._fill(name, home.read, home)
        return name

    def add(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add an adapter from tensors, as `get_peft_model_state_dict` returns them.

        Raises:
            InputError: the name is taken or not allowed, or the tensors are of another kind than the bank's.
        """
        _check_name(name)
        with self._writing():
            if name in self._homes or self._record(name) is not None:
                raise InputError(f"Adapter {brief(name)} already exists; choose another name or delete it.")
            self._resident.require_room([name])
            self._fill(name, lambda layout, row, name: layout.pack(tensors, row, name), None)

    def register(self, path: str | os.PathLike) -> Sequence[str]:
        """Register adapters without loading them. The first gather with an adapter loads it.

        Args:
            path: a folder, whose subfolders at any depth are adapters, with their relative path (with slashes) as name,
                also if they appear later; or an archive, of which only the index is read. Or the address of one of them,
                such as s3://bucket/adapters, which is copied to the local cache; registering it again copies what has
                changed.

        Returns:
            The found names. Those of an archive are read from it one by one, when they are asked for.

        Raises:
            InputError: the path is no folder or archive of the bank's kind, or a name is known from another place.
        """
        path = _local(path)
        with self._writing():
            if not os.path.isdir(path):
                return self._register_archive(path)[0].names
            folders = adapter_folders(path)
            self._add_homes({name: Folder(folder) for name, folder in folders.items()})
            if path not in self._roots:
                self._roots.append(path)
            return list(folders)

    def link(self, path: str | os.PathLike, name: str) -> None:
        """Register the adapter of one folder with a given name, without loading it; see `register`.

        Raises:
            InputError: the name is not allowed, or known from another place; or config and tensors are of another kind
                than the bank's. Numbers are not read.
        """
        with self._writing():
            self._layout.check_folder(os.path.abspath(path), name)
            self._add_homes({name: Folder(os.path.abspath(path))})

    def load_archive(self, path: str | os.PathLike) -> Sequence[str]:
        """Register an archive, and load as many of its adapters as fit without eviction.

        Returns:
            All names of the archive.

        Raises:
            InputError: a value is not finite; see also `register`.
        """
        path = _local(path)
        with self._writing():
            archive, former = self._register_archive(path)
            loaded: list[str] = []
            try:
                if self._resident.capacity is None:
                    self._resident.reserve(sum(name not in self._resident.rows for name in archive.names))
                for name in archive.names:
                    if name not in self._resident.rows:
                        if self._resident.is_full:
                            break
                        self._reload(name)
                        loaded.append(name)
            except BaseException:
                for name in loaded:
                    self._resident.drop(name)
                if former is None:
                    self._archives.remove(archive)
                    archive.close()
                else:
                    archive.hidden = former
                raise
        return archive.names

    def save_archive(self, path: str | os.PathLike, names: Iterable[str] | None = None) -> None:
        """Write adapters (None: all) to an archive: one safetensors file, with an index of their names.

        They may be more than fit into memory: adapters that are not resident are read from their homes.
        """
        names = sorted(set(self if names is None else names))
        with self._writing():
            self._require(names)
        places = {self.acts_from(name) for name in names} or {self.config.acts_from}
        if len(places) > 1:
            raise InputError(
                "Expected adapters that all act from the start of a text, or all from the question on (acts_from), found "
                "both; write an archive of each."
            )
        config = dataclasses.replace(self.config, acts_from=places.pop())
        row = torch.empty(self.width, dtype=self.dtype, device="cpu")

        def rows() -> Iterator[torch.Tensor]:
            for name in names:
                with self._writing():
                    self._require([name])
                    if name in self._resident.rows:
                        row.copy_(self._resident.array[self._resident.rows[name]])
                    else:
                        self._home(name).read(self._layout, row, name)
                yield row

        write_archive(path, self._layout, config, names, rows())

    def _register_archive(self, path: str | os.PathLike) -> tuple[Archive, set[str] | None]:
        """The registered archive, and its names that were hidden if it was registered before."""
        archive = open_archive(path, self._layout)
        before = next((each for each in self._archives if each == archive), None)
        try:
            for name in ("", *_RESERVED):
                if name in archive.names:
                    _check_name(name)
            others = [each for each in self._archives if each is not before]
            taken = [name for name in self._homes if name in archive.names]
            for other in others:
                taken += (name for name in archive.names.shared(other.names) if other.find(name) is not None)
            _require_new(taken)
        except InputError:
            archive.close()
            raise
        if before is None:
            self._archives.append(archive)
            return archive, None
        archive.close()
        former, before.hidden = before.hidden, set()
        return before, former

    def _add_homes(self, homes: Mapping[str, Home]) -> None:
        """Register all names, or none."""
        for name in homes:
            _check_name(name)
        known = {name: self._homes[name] for name in homes if name in self._homes}
        taken = [name for name, home in known.items() if homes[name] not in (home, getattr(home, "origin", None))]
        news = {name: home for name, home in homes.items() if name not in known}
        _require_new([*taken, *(name for name in news if self._record(name) is not None)])
        self._homes.update(news)
        self._deleted.difference_update(news)

    # Removing and pinning adapters.

    def delete(self, name: str) -> None:
        """Remove an adapter; its files stay. Running gathers end with the values that they started with."""
        with self._writing():
            self._require([name])
            self._resident.drop(name)
            self._release(self._homes.pop(name, None))
            self._hide(name)
            if self._find(name) is not None:
                self._deleted.add(name)

    def pin(self, *names: str) -> None:
        """Load adapters and keep them resident. Raises `InputError`, see `gather`."""
        with self._writing():
            self._require(names)
            with self._leased(names):
                self._resident.pin(names)

    def unpin(self, *names: str) -> None:
        """Allow adapters to be evicted again."""
        with self._writing():
            self._require(names)
            self._resident.unpin(names)

    def close(self) -> None:
        """Close all files and remove the spill file. Resident adapters can still be gathered, but nothing can
        change."""
        with self._writer:
            self._closed = True
            for file in (*self._archives, *([] if self._spill is None else [self._spill])):
                file.close()

    # Known adapters.

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._writer:
            if self._closed:
                raise InputError("This bank is closed; make another.")
            yield

    def close_to(self, name: str, *others: str) -> str:
        """Similar names for an error message; of an archive, only alphabetical neighbours are searched."""
        names = [*others, *self._homes]
        for archive in self._archives:
            names += (each for each in archive.names.near(name) if each not in archive.hidden)
        return similar(name, names, len(self) + len(others))

    def _is_known(self, name: str) -> bool:
        """Whether an adapter exists. A new one in a registered folder becomes known."""
        if name in self._homes or not isinstance(name, str):
            return name in self._homes
        home = self._find(name)
        if isinstance(home, Folder):
            self._add_homes({name: home})
        return home is not None

    def _find(self, name: str) -> Record | Folder | None:
        """The record of an adapter in an archive, or its folder in the first registered folder that has it."""
        record = self._record(name)
        if record is not None:
            return record
        parts = name.split("/")
        inside = not {"", ".", ".."}.intersection(parts) and "\\" not in name and not os.path.splitdrive(name)[0]
        if inside and name not in self._deleted:
            for root in self._roots:
                folder = os.path.join(root, *parts)
                if (current(folder) / CONFIG_NAME).is_file():
                    return Folder(folder)
        return None

    def _record(self, name: str) -> Record | None:
        """The record of an adapter in an archive."""
        return next((record for each in self._archives if (record := each.find(name)) is not None), None)

    def _hide(self, name: str) -> None:
        """Take an adapter no longer from the archive that has it."""
        for archive in self._archives:
            if name in archive.names:
                archive.hidden.add(name)

    def _require(self, names: Iterable[str]) -> None:
        for name in names:
            if not self._is_known(name):
                raise InputError(f"Unknown adapter {brief(name)}; {self.close_to(str(name))}.")

    # Filling rows; only the writer does this.

    def _home(self, name: str) -> Home:
        home = self._homes.get(name) or self._record(name)
        assert home is not None  # only a resident adapter can have no home
        return home

    def _reload(self, name: str) -> int:
        """Read an adapter from its home into a row."""
        return self._read(name, self._home(name).read)

    def _fill(self, name: str, read: Callable[[Layout, torch.Tensor, str], None], home: Home | None) -> None:
        """Read a new or changed adapter into a row, and record its new home."""
        self._read(name, read)
        self._release(self._homes.get(name))
        self._homes[name] = home
        self._hide(name)
        self._deleted.discard(name)

    def _read(self, name: str, read: Callable[[Layout, torch.Tensor, str], None]) -> int:
        """Read an adapter into a row, then assign the row to its name."""
        row, victim = self._resident.take(name)
        if victim is not None:
            self._keep(victim, row)
        try:
            self._write(row, read, name)
        except BaseException:
            self._resident.give_back(row)
            raise
        self._resident.put(name, row)
        return row

    def _write(self, row: int, read: Callable[[Layout, torch.Tensor, str], None], name: str) -> None:
        target = self._resident.array[row] if self._stage is None else self._stage
        read(self._layout, target, name)
        if target is self._stage:
            self._resident.synchronize()  # the device may still read rows after their lease has ended
            self._resident.array[row].copy_(target)

    def _keep(self, name: str, row: int) -> None:
        """Make sure that an adapter has a home before its row is overwritten; otherwise it stays."""
        if name not in self._homes:  # a record of an archive, which stays open
            return
        home = self._homes[name]
        try:
            if home is None or not home.holds():
                if self._spill is None:
                    self._spill = SpillFile(None, self._layout)
                self._homes[name] = self._spill.write(self._resident.array[row].cpu(), origin=home)
        except BaseException:
            self._resident.restore(name, row)
            raise

    def _release(self, home: Home | None) -> None:
        if self._spill is not None and isinstance(home, Record) and home.file is self._spill:
            self._spill.release(home)


def _rows(budget: int | str, row_bytes: int) -> int:
    """The number of rows that fit a budget, at least two."""
    size = parse_bytes(budget, "a budget")
    rows = int(size // row_bytes)
    if rows < 2:
        raise InputError(
            f"Expected a budget of at least {2 * row_bytes} bytes, found {budget!r}: one adapter needs {row_bytes}, and the "
            f"base model's row as much."
        )
    return rows


def _local(path: str | os.PathLike) -> str:
    """A path; for an address, that of its copy in the cache."""
    return fetch(str(path), OWN_NAMES) if is_address(path) else os.path.abspath(path)


def _require_new(taken: Sequence[str]) -> None:
    if taken:
        raise InputError(
            f"{shown(taken, 3)} of these adapters are known from another place; delete them from the bank or rename "
            f"the new ones."
        )


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name or name in _RESERVED:
        raise InputError(f"Expected an adapter name that is not empty, {shown(_RESERVED)}, found {brief(name)}.")
