"""The adapters in the rows of an array, leases of readers, and eviction: `Residency`."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from ia3.adapter.rows import BASE
from ia3.errors import InputError, reason


class Residency:
    """Rows of an array by adapter name, for any number of readers and one writer at a time.

    A reader leases the rows that it reads. Leased rows are not overwritten, even if their names change. One lock guards
    the tables; it is never held while rows are read, written or moved. `hold` and the methods below it are for the
    writer; the caller makes sure, with another lock, that there is only one.

    Args:
        width: the number of columns.
        dtype, device: the array's dtype and device.
        capacity: the maximum of adapters; None: the array grows.

    Attributes:
        array: (rows, width). Growing replaces it; leased rows stay unchanged in the old array.
        rows: name → row.
        pinned: names that are never evicted.
        hits, misses, evictions: see `BankStatistics`.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device, capacity: int | None) -> None:
        self.capacity = capacity
        self.array = _empty(16 if capacity is None else capacity + 1, width, dtype, device)
        self.rows = {BASE: 0}
        self.pinned: set[str] = set()
        self.hits = self.misses = self.evictions = 0
        self._lock = threading.Condition(threading.Lock())  # notified when a lease ends
        self._leases: dict[int, set[int]] = {}
        self._recent: OrderedDict[str, None] = OrderedDict()  # names that may be evicted, the next one first
        self._free: list[int] = []
        self._top = 1  # the first row that was never used

    # For readers.

    @contextmanager
    def lease(self) -> Iterator[set[int]]:
        """A set of rows, filled by `find` or `hold`, that are not overwritten during the `with` block."""
        lease: set[int] = set()
        try:
            yield lease
        finally:
            with self._lock:
                self._leases.pop(id(lease), None)
                self._lock.notify_all()

    def find(self, names: Mapping[str, Any], lease: set[int]) -> tuple[torch.Tensor, dict[str, int]] | None:
        """Lease the rows of distinct names if all are resident; return the array and each name's row, otherwise
        None."""
        with self._lock:
            try:
                rows = {name: self.rows[name] for name in names}
            except KeyError:
                return None
            self._hold(rows, lease)
            self._touch(names, 0)
            return self.array, rows

    # For the writer.

    def hold(self, names: Mapping[str, Any], lease: set[int]) -> dict[str, int]:
        """Lease the rows of the resident names. The writer may add rows to the lease."""
        with self._lock:
            rows = {name: self.rows[name] for name in names if name in self.rows}
            self._hold(rows, lease)
            return rows

    def touch(self, names: Mapping[str, Any], missed: int) -> None:
        """Record the use of distinct names, `missed` of which were loaded. They become the last to be evicted."""
        with self._lock:
            self._touch(names, missed)

    def require_room(self, names: Iterable[str]) -> None:
        """Raise `InputError` unless all distinct names can be resident at once, beside the pinned ones."""
        if self.capacity is None:
            return
        others = sum(name != BASE and name not in self.pinned for name in names)
        if len(self.pinned) + others > self.capacity:
            raise InputError(
                f"Expected no more than {self.capacity} adapters at once, as the budget has room for, found {others} "
                f"distinct ones beside {len(self.pinned)} that are pinned; give the bank a larger budget, split the batch "
                f"or unpin some."
            )

    def take(self, name: str) -> tuple[int, str | None]:
        """A row without readers, to fill for an adapter, and the adapter that was evicted from it, if any.

        If all rows that could be evicted are leased, it waits for other threads. Call `require_room` first.
        """
        if self.capacity is None and self.is_full:
            self.reserve(len(self.array) // 2)
        with self._lock:
            while (found := self._pick(name)) is None:
                self._lock.wait()
            return found

    def _pick(self, name: str) -> tuple[int, str | None] | None:
        leased = set().union(*self._leases.values())
        for i in reversed(range(len(self._free))):
            if self._free[i] not in leased:
                return self._free.pop(i), None
        if self._top < len(self.array):
            self._top += 1
            return self._top - 1, None
        if self.capacity is not None:
            own = [name] if name in self.rows else []  # refilling an adapter needs no eviction
            for victim in chain(own, self._recent):
                if self.rows[victim] not in leased:
                    self._recent.pop(victim, None)
                    self.evictions += 1
                    return self.rows.pop(victim), victim
        return None

    def restore(self, name: str, row: int) -> None:
        """Undo an eviction."""
        with self._lock:
            self.evictions -= 1
            self.rows[name] = row
            if name not in self.pinned:
                self._recent[name] = None
                self._recent.move_to_end(name, last=False)

    def put(self, name: str, row: int) -> None:
        """Assign a row of `take` to a name."""
        with self._lock:
            if name in self.rows:
                self._free.append(self.rows[name])
            self.rows[name] = row
            if name not in self.pinned:
                self._recent[name] = None
                self._recent.move_to_end(name)

    def give_back(self, row: int) -> None:
        """Free a row of `take`."""
        with self._lock:
            self._free.append(row)

    def drop(self, name: str) -> None:
        """Remove a name, resident or not."""
        with self._lock:
            self._recent.pop(name, None)
            self.pinned.discard(name)
            if name in self.rows:
                self._free.append(self.rows.pop(name))

    def pin(self, names: Iterable[str]) -> None:
        """Never evict these resident names."""
        with self._lock:
            for name in names:
                self.pinned.add(name)
                self._recent.pop(name, None)

    def unpin(self, names: Iterable[str]) -> None:
        """Allow these names to be evicted again."""
        with self._lock:
            for name in names:
                if name in self.pinned:
                    self.pinned.discard(name)
                    if name in self.rows:
                        self._recent[name] = None

    @property
    def is_full(self) -> bool:
        """Whether no row is free."""
        return not self._free and self._top == len(self.array)

    def reserve(self, more: int) -> None:
        """Add `more` unused rows to the array."""
        array = _empty(self._top + more, self.array.shape[1], self.array.dtype, self.array.device)
        array[: self._top] = self.array[: self._top]
        self.synchronize()
        with self._lock:
            self.array = array

    def synchronize(self) -> None:
        """Wait until the device has finished, because a lease ends before its reads do."""
        if self.array.is_cuda:
            torch.cuda.synchronize(self.array.device)

    # Under the lock.

    def _hold(self, rows: Mapping[str, int], lease: set[int]) -> None:
        lease.update(rows.values())
        self._leases[id(lease)] = lease

    def _touch(self, names: Mapping[str, Any], missed: int) -> None:
        self.hits += len(names) - missed - (BASE in names)
        self.misses += missed
        for name in names:
            if name in self._recent:
                self._recent.move_to_end(name)


def _empty(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An array whose pages take memory at their first write."""
    try:
        with torch.inference_mode(False):  # inference tensors could not be changed outside of it
            return torch.empty(rows, width, dtype=dtype, device=device)
    except RuntimeError as error:
        raise InputError(
            f"Expected memory on {device} for {rows} rows of {width * dtype.itemsize} bytes, there is too little: "
            f"{reason(error)}. Give the bank a smaller budget."
        ) from error
