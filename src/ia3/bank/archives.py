"""Archives: any number of adapters in one file, each found by name without reading the others: `Archive`.

An archive is a safetensors file. Its header has the layout and the config; its tensors are, in this order:

- `ends` (adapters,): the end of each name in `names`, in bytes; names are sorted by code point;
- `hashes` (adapters,): the names' hashes (`hash_of`), sorted;
- `order` (adapters,): the number of the name with each hash;
- `names`: the names in UTF-8, one behind the other;
- `rows` (adapters, width): the adapters in the order of their names.

All but the rows is the index. It is mapped into memory, so a look-up reads a few pages, and no name becomes a Python
object before somebody asks for it. Archives of earlier versions had one tensor for each adapter and no index.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BufferedReader
from typing import Any, overload

import numpy as np
import torch

from ia3.adapter.config import IA3Config
from ia3.bank.homes import Record, RowFile
from ia3.bank.layout import DTYPES, Layout, memory, tensor_header
from ia3.errors import InputError, brief, excerpt
from ia3.files import reading, replacing

# Keys of an archive's metadata. Archives of earlier versions have no digest of an index.
_ENTRIES_KEY, _DIGEST_KEY = "ia3_bank", "ia3_index"

# Names to read at once where all are asked for, and bytes to digest at once.
_TOGETHER, _BYTES = 10_000, 1 << 20

# The alphabetical neighbours, on each side, among which similar names are searched.
_NEAR = 100


def hash_of(name: str) -> int:
    """BLAKE2b of a name in UTF-8, as a signed number of 64 bits."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


class Names(Sequence[str]):
    """Different names, sorted, in arrays that may be in a file. A name is read when it is asked for.

    Args:
        ends, hashes, order, data: see above; `data` are the bytes of `names`.
        intact: called before the arrays are read; raises an error if they no longer can be.
    """

    def __init__(
        self,
        ends: np.ndarray,
        hashes: np.ndarray,
        order: np.ndarray,
        data: np.ndarray,
        intact: Callable[[], None] = lambda: None,
    ) -> None:
        self._ends, self._hashes, self._order, self._data, self._intact = ends, hashes, order, data, intact

    @classmethod
    def of(cls, names: Sequence[str]) -> Names:
        """Names that are sorted and different already. Raises `InputError` if one cannot be written as UTF-8."""
        try:
            encoded = [name.encode() for name in names]
        except UnicodeEncodeError as error:
            raise InputError(
                f"Expected names that can be written as UTF-8, found {error.object[error.start :][:1]!r}."
            ) from error
        hashes = np.fromiter(map(hash_of, names), np.int64, len(names))
        order = np.argsort(hashes, kind="stable")
        ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(names)))
        return cls(ends, hashes[order], order.astype(np.int64), np.frombuffer(b"".join(encoded), np.uint8))

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by the names of their tensors, in their order in a file."""
        return {"ends": self._ends, "hashes": self._hashes, "order": self._order, "names": self._data}

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _TOGETHER):
            yield from self[start : start + _TOGETHER]

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        try:
            return self._bytes(number).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"Expected names in UTF-8, found {brief(self._bytes(number))}; write it again.") from error

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.number(name) is not None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        more = ", …" if len(self) > 3 else ""
        return f"<{len(self)} names: {', '.join(map(repr, self[:3]))}{more}>"

    def number(self, name: str) -> int | None:
        """The place of a name; None if it is not among these."""
        try:
            data, sought = name.encode(), np.int64(hash_of(name))
        except UnicodeEncodeError:
            return None
        self._intact()
        for place in range(int(np.searchsorted(self._hashes, sought)), len(self)):
            if self._hashes[place] != sought:
                break
            number = int(self._order[place])
            if self._bytes(number) == data:
                return number
        return None

    def near(self, name: str) -> list[str]:
        """The alphabetical neighbours of a name."""
        place = bisect_left(self, name)
        return self[max(0, place - _NEAR) : place + _NEAR]

    def shared(self, other: Names) -> list[str]:
        """The names that both have."""
        places = np.flatnonzero(np.isin(self._hashes, other._hashes))
        return [name for name in (self[int(self._order[place])] for place in places) if name in other]

    def require_index(self) -> None:
        """Raise `ValueError` unless the arrays are as `of` makes them, for those of a file whose writer is unknown.

        The order of the names, which only similar names need, and each hash are not computed again.
        """
        size = len(self)
        ends, hashes, order = self._ends, self._hashes, self._order
        if size and not (
            ends[0] >= 0
            and ends[-1] <= len(self._data)
            and (ends[1:] >= ends[:-1]).all()
            and (hashes[1:] >= hashes[:-1]).all()
            and (np.bincount(order[(order >= 0) & (order < size)], minlength=size) == 1).all()
        ):
            raise ValueError("its index of names is damaged")
        for place in np.flatnonzero(hashes[1:] == hashes[:-1]):
            one, other = (self[int(order[place + step])] for step in (0, 1))
            if one == other:
                raise ValueError(f"it has two adapters with the name {brief(one)}")

    def _bytes(self, number: int) -> bytes:
        self._intact()
        return self._data[int(self._ends[number - 1]) if number else 0 : int(self._ends[number])].tobytes()


class Archive(RowFile):
    """An open archive. Any thread may search it; one at a time may read rows.

    Attributes:
        names: all names in the file.
        hidden: names whose record here is not to be used.
    """

    def __init__(
        self,
        file: BufferedReader,
        path: str,
        dtype: torch.dtype,
        acts_from: str,
        names: Names,
        start: int,
        record_bytes: int,
        records: Sequence[int],
    ) -> None:
        super().__init__(file, path, dtype, acts_from=acts_from)
        self.names, self.hidden = names, set[str]()
        self._start, self._record_bytes, self._records = start, record_bytes, records

    def __len__(self) -> int:
        return len(self.names) - len(self.hidden)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.names if name not in self.hidden) if self.hidden else iter(self.names)

    def find(self, name: str) -> Record | None:
        """The record of an adapter; None: there is none, or it is hidden."""
        number = None if name in self.hidden else self.names.number(name)
        return None if number is None else Record(self, self._start + self._records[number] * self._record_bytes)


def write_archive(
    path: str | os.PathLike,
    layout: Layout,
    config: IA3Config,
    names: Sequence[str],
    rows: Iterable[torch.Tensor],
) -> None:
    """Write adapters to an archive.

    Args:
        path: the file; it is replaced atomically.
        layout: the layout of the rows, recorded in the header, so that only banks with this layout read the file.
        config: the adapters' config, recorded in the header.
        names: the adapters' names, sorted and different.
        rows: one row per name; each is written before the next is requested.
    """
    arrays = Names.of(names).arrays
    arrays["names"] = np.pad(arrays["names"], (0, -len(arrays["names"]) % 8))  # so that rows are aligned
    digest = hashlib.blake2b()
    for array in arrays.values():
        digest.update(array.data)
    metadata = {
        "format": "pt",
        _ENTRIES_KEY: json.dumps([entry.described() for entry in layout.entries]),
        _DIGEST_KEY: digest.hexdigest(),
        "config": config.to_json(),
    }
    described = _described(len(names), len(arrays["names"]), layout.dtype, layout.width)
    data = json.dumps({"__metadata__": metadata} | described, ensure_ascii=False).encode()
    data += b" " * (-len(data) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        for array in arrays.values():
            file.write(array.data)
        for row in rows:
            file.write(memory(row))


def open_archive(path: str | os.PathLike, layout: Layout) -> Archive:
    """Open a file of `write_archive`, or of an earlier version.

    Raises:
        InputError: the file does not exist, is no archive, is cut short or damaged, or has another layout.
    """
    path = os.path.abspath(path)
    with reading(path, "an archive of adapters"):
        file = open(path, "rb")  # noqa: SIM115
    try:
        with reading(path, "an archive that AdapterBank.save_archive wrote"):
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 + length:
                raise InputError(f"Expected a whole safetensors file, {path} is none or cut short; copy it again.")
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__")
            layout.check_described(json.loads(metadata[_ENTRIES_KEY]), path)
            acts_from = IA3Config.from_json(metadata["config"].encode(), path).acts_from
            if _DIGEST_KEY not in metadata:
                return _earlier(file, path, header, 8 + length, size, layout.width, acts_from)
            dtype = _dtype_of(path, header, lambda one: _described(*_sizes(header), one, layout.width))
            count, names_bytes = _sizes(header)
            start, record_bytes = 8 + length + 24 * count + names_bytes, layout.width * dtype.itemsize
            _require_size(path, size, start, count, record_bytes)
            if _digest(file, 8 + length, start) != metadata[_DIGEST_KEY]:
                raise ValueError("its index of names is damaged")

            def intact() -> None:
                # What is mapped must stay in the file: reading behind its end would end the process.
                if not file.closed and os.fstat(file.fileno()).st_size < start:
                    raise InputError(f"{excerpt(path)} has been cut short since it was opened; copy it again.")

            mapped = np.asarray(np.memmap(file, np.uint8, "r", shape=(start,)))[8 + length :]
            ends, hashes, order = mapped[: 24 * count].view(np.int64).reshape(3, count)
            names = Names(ends, hashes, order, mapped[24 * count :], intact)
            names.require_index()
            return Archive(file, path, dtype, acts_from, names, start, record_bytes, range(count))
    except BaseException:
        file.close()
        raise


def _earlier(
    file: BufferedReader, path: str, header: Mapping[str, Any], start: int, size: int, width: int, acts_from: str
) -> Archive:
    """An archive of an earlier version: a tensor (width,) for each adapter, under its name."""
    dtype = _dtype_of(
        path,
        header,
        lambda one: {name: tensor_header(one, [width], i * width * one.itemsize) for i, name in enumerate(header)},
    )
    _require_size(path, size, start, len(header), width * dtype.itemsize)
    records = sorted(range(len(header)), key=list(header).__getitem__)
    return Archive(file, path, dtype, acts_from, Names.of(sorted(header)), start, width * dtype.itemsize, records)


def _described(count: int, names_bytes: int, dtype: torch.dtype, width: int) -> dict[str, Any]:
    """An archive's tensors in its header."""
    shapes = {"ends": ("I64", count, 8), "hashes": ("I64", count, 8), "order": ("I64", count, 8)}
    sizes = {**shapes, "names": ("U8", names_bytes, 1)}
    ends = list(itertools.accumulate((size * each for _, size, each in sizes.values()), initial=0))
    found: dict[str, Any] = {
        name: {"dtype": kind, "shape": [size], "data_offsets": ends[i : i + 2]}
        for i, (name, (kind, size, _)) in enumerate(sizes.items())
    }
    return found | {"rows": tensor_header(dtype, [count, width], ends[-1])}


def _sizes(header: Mapping[str, Any]) -> tuple[int, int]:
    """The number of adapters and of the bytes of their names, as a header says."""
    return header["ends"]["shape"][0], header["names"]["shape"][0]


def _dtype_of(
    path: str, header: Mapping[str, Any], expected: Callable[[torch.dtype], Mapping[str, Any]]
) -> torch.dtype:
    """The type with which a header is the expected one."""
    for dtype in DTYPES:
        if list(header.items()) == list(expected(dtype).items()):
            return dtype
    raise InputError(f"The rows in {path} are not as AdapterBank.save_archive writes them; write it again.")


def _require_size(path: str, size: int, start: int, count: int, record_bytes: int) -> None:
    if size != start + record_bytes * count:
        raise InputError(
            f"Expected {count} adapters of {record_bytes} bytes in {path}, found {max(0, size - start)} bytes; it "
            f"is cut short or damaged, copy it again."
        )


def _digest(file: BufferedReader, start: int, end: int) -> str:
    digest = hashlib.blake2b()
    file.seek(start)
    while start < end and (data := file.read(min(_BYTES, end - start))):
        digest.update(data)
        start += len(data)
    return digest.hexdigest()
