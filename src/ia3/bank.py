"""Thousands of adapters as the rows of one array, and a different one for each row of a batch: `AdapterBank`."""

from __future__ import annotations

import dataclasses
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ia3.checkpoint import PREFIX, locate_weights
from ia3.config import CONFIG_NAME, IA3Config
from ia3.errors import InputError, shown, similar
from ia3.files import locate
from ia3.rows import DTYPES, Entry, Folder, Home, Layout, Record, RowFile, SpillFile, open_archive, write_archive
from ia3.rules import find_rule
from ia3.targets import TASK_HEADS, Target, base_modules, resolve_targets

if TYPE_CHECKING:
    from ia3.model import IA3Model

__all__ = ["AdapterBank", "BankStatistics", "Entry"]

BASE = "__base__"
_RESERVED = (BASE, "__metadata__")  # the latter is no name in a safetensors file

_UNITS = {"": 1} | {
    prefix + infix: base**power
    for infix, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}


@dataclasses.dataclass(frozen=True)
class BankStatistics:
    """What a bank holds and has done.

    Attributes:
        resident: adapters in memory.
        known: adapters that can be asked for.
        capacity: how many can be resident at once; None: as many as memory holds.
        pinned: adapters that stay resident.
        row_bytes: memory for one.
        resident_bytes: memory of the resident ones and the base model's row.
        hits: distinct names that a gather or pin found resident, summed over calls.
        misses: those that it had to load.
        evictions: adapters that went out of memory to make room.
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

    Row 0, by the name "__base__", is the base model: ones, and its own `modules_to_save`. An adapter is in memory, or at
    its home (a folder, a record of an archive, of the spill file), from where it is loaded when it is asked for. Any number
    of threads may use a bank at the same time. A deep copy is the same bank.

    Args:
        model: gets the bank attached.
        config: the adapters'. None: that of the model's first active adapter, else of its first.
        dtype: of the array, torch.float32 or torch.bfloat16.
        budget: memory for the array, in bytes or such as "512MB" or "2GiB": the least recently used adapters make room
            for others. None: the array grows.
        spill: a folder of this bank's own, for evicted adapters that came as tensors or whose folder has changed. None:
            a temporary file.

    Attributes:
        config: what was resolved.
        entries: the columns.
        targets: the modules that vectors rescale.
        modules: paths of the modules of `modules_to_save`.
        width: the number of columns.
        dtype, device: of the array.

    Raises:
        InputError: the config does not fit the model, or the budget holds no adapter, or `spill` is in use.
    """

    def __init__(
        self,
        model: IA3Model,
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
        self.config = dataclasses.replace(config)
        heads = TASK_HEADS.get(config.task_type or "", ())
        self.config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads])) or None
        targets: dict[nn.Module, Target] = {}  # a module at several paths once
        for target in resolve_targets(model.model, self.config, key_value_only=False):
            targets.setdefault(target.module, target)
        self.targets = list(targets.values())
        self.modules = model._resolve_modules_to_save(self.config)
        model._check_nesting([target.path for target in self.targets], self.modules)
        parts = _parts(model, self.targets, self.modules)
        self._layout = Layout(_entries(parts), self.targets, dtype)
        self.entries, self.width, self.dtype = self._layout.entries, self._layout.width, dtype
        device = next(model.model.parameters()).device
        self.device = torch.device("cpu") if device.type == "meta" else device
        self._capacity = None if budget is None else _rows(budget, self._layout.row_bytes) - 1

        # One writer at a time changes which adapter is where; gathers that find all they need resident do not wait for
        # it. `_lock` guards what both look at, and is never held while anything is read, written or computed.
        self._writer = threading.RLock()
        self._lock = threading.Condition(threading.Lock())  # notified when a gather ends
        self._array = self._empty(16 if self._capacity is None else self._capacity + 1)
        self._stage = None if self.device.type == "cpu" else torch.empty(self.width, dtype=dtype, device="cpu")
        self._homes: dict[str, Home | None] = {}  # of all that can be asked for; None: only in memory
        self._rows = {BASE: 0}  # of the resident ones
        self._recent: OrderedDict[str, None] = OrderedDict()  # those that may be evicted, the next one first
        self._pinned: set[str] = set()
        self._leases: dict[int, set[int]] = {}  # rows that running gathers read, whatever becomes of their names
        self._free: list[int] = []
        self._top = 1  # the first row that was never used
        self._roots: list[str] = []  # registered folders
        self._deleted: set[str] = set()  # names that a registered folder still has
        self._files: list[RowFile] = []  # archives
        self._spill = None if spill is None else SpillFile(spill, self._layout)
        self._closed = False
        self._hits = self._misses = self._evictions = 0
        self._write(0, lambda _, row, name: self._layout.pack({part[0]: part[4] for part in parts}, row, name), BASE)
        model._attach_bank(self)

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
        """What the bank holds and has done."""
        with self._lock:
            return BankStatistics(
                resident=len(self._rows) - 1,
                known=len(self._homes),
                capacity=self._capacity,
                pinned=len(self._pinned),
                row_bytes=self._layout.row_bytes,
                resident_bytes=len(self._rows) * self._layout.row_bytes,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                spilled=0 if self._spill is None else len(self._spill),
            )

    @property
    def names(self) -> list[str]:
        """All adapters that can be asked for, in memory or not; of registered folders those that have been seen."""
        with self._lock:
            return list(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def __contains__(self, name: object) -> bool:
        """Whether `gather` would know the name; "__base__" too."""
        return name == BASE or (isinstance(name, str) and (name in self._homes or self._find(name) is not None))

    # Reading.

    def gather(self, names: Sequence[str]) -> torch.Tensor:
        """The adapters of a batch, one a row: a copy (len(names), width). What is not resident is loaded.

        Raises:
            InputError: a name is not known, an adapter cannot be loaded, or there are more than fit at once.
        """
        with self._leased(names) as (array, rows):
            index = torch.tensor([rows[name] for name in names], dtype=torch.int64, device=self.device)
            return torch.index_select(array, 0, index)

    @contextmanager
    def _leased(self, names: Sequence[str]) -> Iterator[tuple[torch.Tensor, dict[str, int]]]:
        """The array, and each name's row in it, which nobody overwrites within `with`."""
        lease: set[int] = set()
        try:
            yield self._lease(names, lease)
        finally:
            with self._lock:
                self._leases.pop(id(lease), None)
                self._lock.notify_all()

    def _lease(self, names: Sequence[str], lease: set[int]) -> tuple[torch.Tensor, dict[str, int]]:
        distinct = dict.fromkeys(names)
        with self._lock:
            try:
                rows = {name: self._rows[name] for name in distinct}
            except KeyError:
                rows = None
            else:
                lease.update(rows.values())
                self._leases[id(lease)] = lease
                self._asked(distinct)
                return self._array, rows
        # Only one thread at a time holds leases and waits for others': the writer.
        with self._writing():
            for position, name in enumerate(names):
                if name not in self._rows and not self._is_known(name):
                    raise InputError(
                        f"Unknown adapter {name!r} for row {position}; {similar(str(name), self.names)}. Load or "
                        f"register it first."
                    )
            self._require_room(distinct)
            with self._lock:
                rows = {name: self._rows[name] for name in distinct if name in self._rows}
                lease.update(rows.values())
                self._leases[id(lease)] = lease
            missing = [name for name in distinct if name not in rows]
            for name in missing:
                rows[name] = self._reload(name)
                lease.add(rows[name])
            with self._lock:
                self._asked(distinct, len(missing))
            return self._array, rows

    def _asked(self, names: Mapping[str, Any], missed: int = 0) -> None:
        self._hits += len(names) - missed - (BASE in names)
        self._misses += missed
        for name in names:
            if name in self._recent:
                self._recent.move_to_end(name)

    # Bringing adapters in.

    def load(
        self, path: str | os.PathLike, name: str | None = None, subfolder: str | None = None, **hub_kwargs: Any
    ) -> str:
        """Load an adapter from a folder or the hub, or refill the one of that name: gathers see the old or the new.

        Args:
            path: the folder or the hub's id.
            name: None: the folder's own name, or the hub's id.
            subfolder: in the folder or repository.
            **hub_kwargs: `revision`, `token`, …

        Returns:
            Its name.

        Raises:
            InputError: it is not there, or is no adapter of the bank's kind.
        """
        folder = os.path.abspath(os.path.join(path, subfolder or ""))
        given = os.path.basename(folder)
        if not os.path.isdir(folder):
            folder = os.path.dirname(os.path.abspath(locate_weights(path, subfolder, **hub_kwargs)))
            locate(path, CONFIG_NAME, subfolder=subfolder, **hub_kwargs)  # beside it
            given = f"{path}/{subfolder}" if subfolder else str(path)
        name = given if name is None else name
        _check_name(name)
        with self._writing():
            self._require_room([name])
            home = Folder(folder)
            self._fill(name, home.read, home)
        return name

    def add(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add an adapter from tensors such as `get_peft_model_state_dict` returns.

        Raises:
            InputError: the name is taken or not allowed, or the tensors are not those of the bank's kind.
        """
        _check_name(name)
        with self._writing():
            if name in self._homes:
                raise InputError(f"Adapter {name!r} already exists; choose another name or delete it.")
            self._require_room([name])
            self._fill(name, lambda layout, row, name: layout.pack(tensors, row, name), None)

    def register(self, path: str | os.PathLike) -> list[str]:
        """Make adapters known without loading them: the first gather that asks for one does.

        Args:
            path: a folder, in which every folder at any depth that holds an adapter is known by its relative path (with
                slashes), those that appear later too; or an archive.

        Returns:
            The names found.

        Raises:
            InputError: the path is no folder or archive of the bank's kind, or a name is known from another place.
        """
        path = os.path.abspath(path)
        with self._writing():
            if not os.path.isdir(path):
                return self._register_archive(path)
            folders = _adapter_folders(path)
            self._add_homes({name: Folder(folder) for name, folder in folders.items()})
            if path not in self._roots:
                self._roots.append(path)
            return list(folders)

    def load_archive(self, path: str | os.PathLike) -> list[str]:
        """Register an archive and load its adapters, as many as fit without evicting any.

        Returns:
            All its names.

        Raises:
            InputError: see `register`; or a value is not finite.
        """
        with self._writing():
            before = set(self._homes)
            names = self._register_archive(path)
            try:
                if self._capacity is None:
                    self._grow(self._top + len(names))
                for name in names:
                    if name not in self._rows:
                        if not self._free and self._top == len(self._array):
                            break
                        self._reload(name)
            except BaseException:
                for name in set(names) - before:
                    self.delete(name)
                raise
        return names

    def save_archive(self, path: str | os.PathLike, names: Iterable[str] | None = None) -> None:
        """Write adapters (None: all) into one safetensors file, each as a tensor (width,) under its name.

        It may be more than fits into memory: what is not resident is read from its home, and stays there.
        """
        names = self.names if names is None else list(dict.fromkeys(names))
        with self._writing():
            self._require(names)
        row = torch.empty(self.width, dtype=self.dtype, device="cpu")

        def rows() -> Iterator[torch.Tensor]:
            for name in names:
                with self._writing():
                    self._require([name])
                    if name in self._rows:
                        row.copy_(self._array[self._rows[name]])
                    else:
                        self._home(name).read(self._layout, row, name)
                yield row

        write_archive(path, self._layout, self.config, names, rows())

    def _register_archive(self, path: str | os.PathLike) -> list[str]:
        file, records = open_archive(path, self._layout)
        try:
            news = self._add_homes(records)
        except InputError:
            file.close()
            raise
        if news:
            self._files.append(file)
        else:
            file.close()
        return list(records)

    def _add_homes(self, homes: Mapping[str, Home]) -> bool:
        """Make all names known, or none. Returns whether any was not before."""
        for name in homes:
            _check_name(name)
        known = {name: self._homes[name] for name in homes if name in self._homes}
        taken = [name for name, home in known.items() if homes[name] not in (home, getattr(home, "origin", None))]
        if taken:
            raise InputError(
                f"{shown(taken, 3)} of these adapters are known from another place; delete them from the bank or rename "
                f"the new ones."
            )
        news = {name: home for name, home in homes.items() if name not in known}
        with self._lock:
            self._homes.update(news)
        self._deleted.difference_update(news)
        return bool(news)

    # Taking adapters out, and keeping them in.

    def delete(self, name: str) -> None:
        """Forget an adapter; its files stay. Gathers that are running end with the values that they began with."""
        with self._writing():
            self._require([name])
            with self._lock:
                home = self._homes.pop(name)
                self._recent.pop(name, None)
                self._pinned.discard(name)
                if name in self._rows:
                    self._free.append(self._rows.pop(name))
            self._release(home)
            if self._find(name) is not None:
                self._deleted.add(name)

    def pin(self, *names: str) -> None:
        """Load adapters and keep them resident. Raises `InputError` as `gather` does."""
        with self._writing():
            self._require(names)
            with self._leased(names), self._lock:
                for name in names:
                    self._pinned.add(name)
                    self._recent.pop(name, None)

    def unpin(self, *names: str) -> None:
        """Let adapters be evicted again, when their turn comes."""
        with self._writing():
            self._require(names)
            with self._lock:
                for name in self._pinned.intersection(names):
                    self._pinned.discard(name)
                    self._recent[name] = None

    def close(self) -> None:
        """Let go of all files and remove the spill file. What is resident can still be gathered, nothing be changed."""
        with self._writer:
            self._closed = True
            for file in (*self._files, *([] if self._spill is None else [self._spill])):
                file.close()

    # What is known.

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._writer:
            if self._closed:
                raise InputError("This bank is closed; make another.")
            yield

    def _is_known(self, name: str) -> bool:
        """Whether there is such an adapter; one that has appeared in a registered folder becomes known."""
        if name not in self._homes and isinstance(name, str):
            home = self._find(name)
            if home is not None:
                self._add_homes({name: home})
        return name in self._homes

    def _find(self, name: str) -> Folder | None:
        """The folder of an adapter by that name in the first registered folder that has one."""
        parts = name.split("/")
        inside = not {"", ".", ".."}.intersection(parts) and "\\" not in name and not os.path.splitdrive(name)[0]
        if inside and name not in self._deleted:
            for root in self._roots:
                folder = os.path.join(root, *parts)
                if os.path.isfile(os.path.join(folder, CONFIG_NAME)):
                    return Folder(folder)
        return None

    def _require(self, names: Iterable[str]) -> None:
        for name in names:
            if not self._is_known(name):
                raise InputError(f"Unknown adapter {name!r}; {similar(str(name), self.names)}.")

    def _home(self, name: str) -> Home:
        home = self._homes[name]
        assert home is not None  # only what is resident can do without
        return home

    # Rows. All of this is the writer's.

    def _reload(self, name: str) -> int:
        home = self._home(name)
        return self._fill(name, home.read, home)

    def _fill(self, name: str, read: Callable[[Layout, torch.Tensor, str], None], home: Home | None) -> int:
        """Read an adapter into a row, then let its name mean that row."""
        row = self._take(name)
        try:
            self._write(row, read, name)
        except BaseException:
            with self._lock:
                self._free.append(row)
            raise
        with self._lock:
            former, left = self._homes.get(name), self._rows.get(name)
            if left is not None:
                self._free.append(left)
            self._rows[name], self._homes[name] = row, home
            if name not in self._pinned:
                self._recent[name] = None
                self._recent.move_to_end(name)
        if former is not home:
            self._release(former)
        self._deleted.discard(name)
        return row

    def _write(self, row: int, read: Callable[[Layout, torch.Tensor, str], None], name: str) -> None:
        target = self._array[row] if self._stage is None else self._stage
        read(self._layout, target, name)
        if target is self._stage:
            self._synchronize()  # gathers that have ended here may still run there
            self._array[row].copy_(target)

    def _take(self, name: str) -> int:
        """A row that no gather reads, for an adapter to be read into; another is evicted when there is none."""
        if self._capacity is None and self._top == len(self._array) and not self._free:
            self._grow(len(self._array) * 3 // 2)
        with self._lock:
            while (found := self._pick(name)) is None:
                self._lock.wait()  # for gathers in other threads, which wait for nothing
        row, victim = found
        if victim is not None:
            self._keep(victim, row)
        return row

    def _pick(self, name: str) -> tuple[int, str | None] | None:
        """A row and whose it was; None while gathers read all that there are."""
        leased = set().union(*self._leases.values())
        for i in reversed(range(len(self._free))):
            if self._free[i] not in leased:
                return self._free.pop(i), None
        if self._top < len(self._array):
            self._top += 1
            return self._top - 1, None
        if self._capacity is not None:
            own = [name] if name in self._rows else []  # to refill an adapter, no other has to go
            for victim in chain(own, self._recent):
                if self._rows[victim] not in leased:
                    self._recent.pop(victim, None)
                    return self._rows.pop(victim), victim
        return None

    def _keep(self, name: str, row: int) -> None:
        """See to it that an adapter whose row is to be overwritten has a home; else it stays."""
        home = self._homes[name]
        try:
            if home is None or not home.holds():
                if self._spill is None:
                    self._spill = SpillFile(None, self._layout)
                self._homes[name] = self._spill.write(self._array[row].cpu(), origin=home)
        except BaseException:
            with self._lock:
                self._rows[name] = row
                if name not in self._pinned:
                    self._recent[name] = None
                    self._recent.move_to_end(name, last=False)
            raise
        with self._lock:
            self._evictions += 1

    def _release(self, home: Home | None) -> None:
        if self._spill is not None and isinstance(home, Record) and home.file is self._spill:
            self._spill.release(home)

    def _require_room(self, names: Iterable[str]) -> None:
        if self._capacity is None:
            return
        others = [name for name in names if name != BASE and name not in self._pinned]
        if len(self._pinned) + len(others) > self._capacity:
            raise InputError(
                f"Expected no more than {self._capacity} adapters at once, as the budget has room for, found "
                f"{len(others)} distinct ones beside {len(self._pinned)} that are pinned; give the bank a larger budget, "
                f"split the batch or unpin some."
            )

    def _empty(self, rows: int) -> torch.Tensor:
        """An array whose pages take memory when they are first written."""
        with torch.inference_mode(False):  # such tensors could not be changed outside of it
            return torch.empty(rows, self.width, dtype=self.dtype, device=self.device)

    def _grow(self, rows: int) -> None:
        """Move to a larger array; gathers that are running read the old one."""
        if rows > len(self._array):
            array = self._empty(rows)
            array[: self._top] = self._array[: self._top]
            self._synchronize()
            with self._lock:
                self._array = array

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _parts(
    model: IA3Model, targets: Iterable[Target], kept: Iterable[str]
) -> list[tuple[str, str, str | None, bool, torch.Tensor]]:
    """An adapter's tensors in the order of a row: name in a checkpoint, path, parameter, side, the base model's values."""
    modules = base_modules(model.model)
    full = tuple(f"{path}." for path in (*kept, *model.trained_modules))
    paths: dict[nn.Module, str] = {}
    for path, module in modules.items():
        if not path.startswith(full):
            paths.setdefault(module, path)
    parts = []
    for target in targets:
        path, rule = paths[target.module], find_rule(target.module)
        assert rule is not None  # or resolving had failed
        ones = torch.ones(rule.shape(target.module, target.feedforward), device="cpu")
        parts.append((f"{PREFIX}{path}.ia3_l", path, None, target.feedforward, ones))
    for path in kept:
        for key, value in modules[path].state_dict().items():
            if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.is_meta:
                found = f"{value.dtype} on {value.device}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise InputError(
                    f"Expected modules_to_save whose state is floating-point numbers in memory, found {found} in "
                    f"'{path}.{key}'; a bank cannot hold such adapters."
                )
            parts.append((f"{PREFIX}{path}.{key}", path, key, False, value.detach()))
    return sorted(parts, key=lambda part: part[0])


def _entries(parts: Iterable[tuple[str, str, str | None, bool, torch.Tensor]]) -> Iterator[Entry]:
    start = 0
    for key, path, parameter, feedforward, value in parts:
        yield Entry(key, path, parameter, feedforward, tuple(value.shape), start, value.numel())
        start += value.numel()


def _rows(budget: int | str, row_bytes: int) -> int:
    """How many rows a budget has room for, at least two."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]i?)?B?", str(budget), re.IGNORECASE)
    if match is None or not isinstance(budget, (int, str)):
        raise InputError(f"Expected a budget in bytes, or such as '512MB' or '2GiB', found {budget!r}.")
    size = float(match[1]) * _UNITS[(match[2] or "").capitalize()]
    rows = int(size // row_bytes)
    if rows < 2:
        raise InputError(
            f"Expected a budget of at least {2 * row_bytes} bytes, found {budget!r}: one adapter needs {row_bytes}, and the "
            f"base model's row as much."
        )
    return rows


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name or name in _RESERVED:
        raise InputError(f"Expected an adapter name that is not empty, {shown(_RESERVED)}, found {name!r}.")


def _adapter_folders(root: str) -> dict[str, str]:
    """Every folder below a folder that has an adapter's config, by its relative path with slashes, sorted."""
    found = {}
    waiting = [(root, "")]
    while waiting:
        folder, name = waiting.pop()
        with os.scandir(folder) as children:
            for child in children:
                path = f"{name}/{child.name}" if name else child.name
                if child.name == CONFIG_NAME:
                    if name:
                        found[name] = folder
                elif child.is_symlink():  # a link may lead back up: it is looked at, not into
                    if os.path.isfile(os.path.join(child.path, CONFIG_NAME)):
                        found[path] = child.path
                elif child.is_dir():
                    waiting.append((child.path, path))
    return dict(sorted(found.items()))
