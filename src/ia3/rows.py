"""An adapter as one flat row of numbers: its layout, and the files that rows are read from.

The columns are in the order in which safetensors writes tensors of one dtype, names sorted, so that the data section of
an adapter's file is its row.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from io import BufferedRandom, BufferedReader
from typing import Any, NamedTuple, Protocol

import torch

from ia3.checkpoint import WEIGHTS_NAME, Tensors, check_tensors, locate_weights, read_weights
from ia3.config import CONFIG_NAME, IA3Config
from ia3.errors import InputError, reason, shown
from ia3.files import locate, replacing
from ia3.targets import Target, matches

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # by safetensors' names

_ENTRIES_KEY = "ia3_bank"  # in an archive's header
_SPILL_NAME = "ia3_bank.spill"
_REMEMBERED = 64  # configs and headers, so that many different ones take no memory


class Entry(NamedTuple):
    """One named slice of an adapter's flat row.

    Attributes:
        key: the tensor's name in a checkpoint.
        path: the module's path in the base model.
        parameter: None for a vector (`ia3_l`); else the key in the state of a module of `modules_to_save`.
        feedforward: of a vector, whether it scales the input.
        shape: the tensor's shape in a checkpoint.
        start: the first of its columns.
        size: the number of its columns.
    """

    key: str
    path: str
    parameter: str | None
    feedforward: bool
    shape: tuple[int, ...]
    start: int
    size: int

    def described(self) -> list:
        """Name, shape, and a vector's side, as an archive holds them."""
        return [self.key, list(self.shape), None if self.parameter is not None else self.feedforward]


class Layout:
    """The columns of a row, and how a row is filled. Rows are tensors (width,) of `dtype` in the CPU's memory.

    Args:
        entries: in order, without gaps.
        targets: what the vectors rescale; an adapter's config must agree on the sides.
        dtype: one of `DTYPES`.
    """

    def __init__(self, entries: Iterable[Entry], targets: Iterable[Target], dtype: torch.dtype) -> None:
        self.entries = tuple(entries)
        self.dtype = dtype
        self.width = sum(entry.size for entry in self.entries)
        self.row_bytes = self.width * dtype.itemsize
        self._sides = {target.path: target.feedforward for target in targets}
        self._shapes = {entry.key: entry.shape for entry in self.entries}
        self._header = {
            entry.key: _described(dtype, entry.shape, entry.start * dtype.itemsize) for entry in self.entries
        }
        self._known_configs: set[bytes] = set()  # raw bytes that were found good
        self._known_headers: set[bytes] = set()

    def tensors(self, row: torch.Tensor) -> Tensors:
        """The named tensors that a row consists of, as views."""
        return {entry.key: row[entry.start : entry.start + entry.size].view(entry.shape) for entry in self.entries}

    def check_finite(self, row: torch.Tensor, name: str) -> None:
        """Raise `InputError` when a row of adapter `name` holds NaN or infinite values."""
        # Both spread into the sum, which takes a quarter of the time; a sum may also overflow without them.
        if not math.isfinite(row.sum()) and not torch.isfinite(row).all():
            check_tensors(self._shapes, self.tensors(row), name)

    def pack(self, tensors: Mapping[str, torch.Tensor], row: torch.Tensor, name: str) -> None:
        """Fill a row with an adapter's tensors. Raises `InputError` unless they are exactly the layout's, and finite."""
        check_tensors(self._shapes, tensors, name)
        for key, part in self.tensors(row).items():
            part.copy_(tensors[key].detach())
        self.check_finite(row, name)  # a narrower dtype may overflow

    def read_folder(self, folder: str, row: torch.Tensor, name: str) -> tuple[int, ...]:
        """Fill a row from an adapter's folder.

        Returns:
            What changes when the file of tensors does.

        Raises:
            InputError: no adapter, not finite, another method, or other modules, sides or shapes.
        """
        self._check_config(folder, name)
        with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, WEIGHTS_NAME), "rb") as file:
            status = os.fstat(file.fileno())
            if self._is_row(file, status.st_size) and file.readinto(_bytes(row)) == self.row_bytes:
                self.check_finite(row, name)
                return _stamp(status)
        stamp = _stamp(os.stat(locate_weights(folder)))
        self.pack(read_weights(folder)[0], row, name)
        return stamp

    def _is_row(self, file: BufferedReader, size: int) -> bool:
        """Whether what follows the safetensors header, at which the file then stands, is exactly a row."""
        length = int.from_bytes(file.read(8), "little")
        if size != 8 + length + self.row_bytes:
            return False
        header = file.read(length)
        if header in self._known_headers:
            return True
        try:
            described = json.loads(header)
            described.pop("__metadata__", None)
        except (ValueError, AttributeError):
            return False
        if described != self._header:
            return False
        _remember(self._known_headers, header)
        return True

    def _check_config(self, folder: str, name: str) -> None:
        try:
            with open(os.path.join(folder, CONFIG_NAME), "rb") as file:
                data = file.read()
        except FileNotFoundError:
            path = locate(folder, CONFIG_NAME)  # says what is wrong, or the file has appeared
            with open(path, "rb") as file:
                data = file.read()
        if data in self._known_configs:
            return
        config = IA3Config.from_json(data, os.path.join(folder, CONFIG_NAME))
        named = config.feedforward_modules
        if named is not None:  # else the shapes tell
            wrong = [path for path, side in self._sides.items() if matches(path, named) is not side]
            if wrong:
                raise InputError(
                    f"Adapter {name!r} rescales another side (input, output) than the bank at {shown(wrong, 3)}: its "
                    f"feedforward_modules are {sorted(named) if isinstance(named, set) else named!r}. Use another bank."
                )
        _remember(self._known_configs, data)

    def check_described(self, found: Any, path: str) -> None:
        """Raise `InputError` unless an archive's description of its entries is this layout's."""
        expected = [entry.described() for entry in self.entries]
        if found != expected:
            found = found if isinstance(found, list) else []
            first = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
            if first is None:
                first = min(len(found), len(expected))
            theirs, ours = ((entries[first : first + 1] or ["none"])[0] for entries in (found, expected))
            raise InputError(
                f"The adapters in {path} are of another kind: expected {len(expected)} entries, found {len(found)}; the "
                f"first that differs is {theirs}, expected {ours}. Are they for another base model?"
            )


class Home(Protocol):
    """Where an adapter can be read from again."""

    def read(self, layout: Layout, row: torch.Tensor, name: str) -> None:
        """Fill a row. Raises `InputError` when the adapter is not there any more or does not fit."""

    def holds(self) -> bool:
        """Whether it still holds what was read last."""
        ...


class Folder:
    """An adapter's own folder as its home."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._stamp: tuple[int, ...] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and other.path == self.path

    def read(self, layout: Layout, row: torch.Tensor, name: str) -> None:
        """See `Home.read`."""
        self._stamp = layout.read_folder(self.path, row, name)

    def holds(self) -> bool:
        """Whether the file of tensors is the one that was read."""
        try:
            return _stamp(os.stat(locate_weights(self.path))) == self._stamp
        except (InputError, OSError):
            return False


class Record(NamedTuple):
    """A record of a file of rows as an adapter's home.

    Attributes:
        file: where.
        start: its first byte.
        origin: of a spilled adapter, the home that no longer holds it.
    """

    file: RowFile
    start: int
    origin: Home | None = None

    def read(self, layout: Layout, row: torch.Tensor, name: str) -> None:
        """See `Home.read`."""
        self.file.read(self.start, row)
        layout.check_finite(row, name)

    def holds(self) -> bool:
        """Always: the file stays open."""
        return True


class RowFile:
    """An open file of rows of one dtype. One thread at a time may use it."""

    def __init__(
        self, file: BufferedReader | BufferedRandom, path: str, dtype: torch.dtype, scratch: str | None = None
    ) -> None:
        self.path = path
        self._file = file
        self._dtype = dtype
        self._finish = weakref.finalize(self, _discard, file, scratch)

    def __eq__(self, other: object) -> bool:
        # The same file on disk, opened twice.
        return isinstance(other, RowFile) and _stamp(os.fstat(other._file.fileno())) == _stamp(
            os.fstat(self._file.fileno())
        )

    def read(self, start: int, row: torch.Tensor) -> None:
        """Fill a row from the bytes at `start`, cast when the file's dtype is another."""
        buffer = row if row.dtype == self._dtype else torch.empty(row.shape, dtype=self._dtype, device="cpu")
        self._file.seek(start)
        data = _bytes(buffer)
        if self._file.readinto(data) != data.nbytes:
            raise InputError(f"{self.path} has been cut short since it was opened; copy it again.")
        if buffer is not row:
            row.copy_(buffer)

    def close(self) -> None:
        """Let go of the file, and remove it when it is a scratch file."""
        self._finish()


class SpillFile(RowFile):
    """A scratch file for evicted adapters that have no other home; gone when it is closed or the process ends.

    Args:
        folder: made when it is not there. None: the system's temporary folder.
        layout: of the rows.

    Raises:
        InputError: another bank uses the folder.
    """

    def __init__(self, folder: str | os.PathLike | None, layout: Layout) -> None:
        self._record_bytes = layout.row_bytes
        self._free: list[int] = []
        self._end = 0
        path = None if folder is None else os.path.join(os.path.abspath(folder), _SPILL_NAME)
        file = _open_alone(path) if path else tempfile.TemporaryFile(prefix="ia3_bank_")  # noqa: SIM115
        super().__init__(file, path or "the bank's temporary file", layout.dtype, scratch=path)

    def __len__(self) -> int:
        """The number of records in use."""
        return self._end // self._record_bytes - len(self._free)

    def write(self, row: torch.Tensor, origin: Home | None) -> Record:
        """Write a row into a record that is free."""
        start = self._free[-1] if self._free else self._end
        self._file.seek(start)
        self._file.write(_bytes(row))
        self._file.flush()
        if self._free:
            self._free.pop()
        else:
            self._end += self._record_bytes
        return Record(self, start, origin)

    def release(self, record: Record) -> None:
        """Let a record be used for another adapter."""
        self._free.append(record.start)


def _open_alone(path: str) -> BufferedRandom:
    """A new file that no other process or bank has open by this function."""
    try:
        import fcntl
    except ImportError:
        raise InputError(
            "A spill folder of your choice needs POSIX file locks, which this system lacks; leave `spill` out to use a "
            "temporary file."
        ) from None
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InputError(
            f"Expected a spill folder of its own for each bank; {os.path.dirname(path)!r} is in use by another bank. "
            f"Choose another."
        ) from error
    file.truncate(0)
    return file


def _discard(file: BufferedReader | BufferedRandom, path: str | None) -> None:
    if path is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # while it is locked
    file.close()


def write_archive(
    path: str | os.PathLike, layout: Layout, config: IA3Config, names: Iterable[str], rows: Iterable[torch.Tensor]
) -> None:
    """Write adapters into one safetensors file, each as a tensor (width,) under its name.

    Args:
        path: replaced in whole or not at all.
        layout: of the rows; noted in the header, so that the file is read by banks of this layout alone.
        config: the adapters', noted in the header.
        names: theirs.
        rows: as many; each is written before the next is asked for.
    """
    metadata = {
        "format": "pt",
        _ENTRIES_KEY: json.dumps([entry.described() for entry in layout.entries]),
        "config": config.to_json(),
    }
    header = {"__metadata__": metadata} | {
        name: _described(layout.dtype, [layout.width], i * layout.row_bytes) for i, name in enumerate(names)
    }
    try:
        data = json.dumps(header, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"Expected names that can be written as UTF-8, found {error.object[error.start :][:1]!r}."
        ) from error
    data += b" " * (-len(data) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        for row in rows:
            file.write(_bytes(row))


def open_archive(path: str | os.PathLike, layout: Layout) -> tuple[RowFile, dict[str, Record]]:
    """The file that `write_archive` wrote, and where each adapter is in it.

    Raises:
        InputError: it is not there, no archive, cut short, or of adapters with another layout.
    """
    path = os.path.abspath(path)
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"Expected an archive of adapters, cannot open {path}: {reason(error)}.") from error
    try:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            raise InputError(f"Expected a whole safetensors file, {path} is none or cut short; copy it again.")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__")
            entries = json.loads(metadata[_ENTRIES_KEY])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(
                f"Expected an archive that AdapterBank.save_archive wrote, {path} is another kind of file."
            ) from error
        layout.check_described(entries, path)
        for dtype in DTYPES:
            row_bytes = layout.width * dtype.itemsize
            expected = [_described(dtype, [layout.width], i * row_bytes) for i in range(len(header))]
            if list(header.values()) == expected:
                break
        else:
            raise InputError(f"The rows in {path} are not as AdapterBank.save_archive writes them; write it again.")
        if size != 8 + length + row_bytes * len(header):
            raise InputError(
                f"Expected {len(header)} adapters of {row_bytes} bytes in {path}, found {size - 8 - length} bytes; it is cut "
                f"short or damaged, copy it again."
            )
    except BaseException:
        file.close()
        raise
    rows = RowFile(file, path, dtype)
    return rows, {name: Record(rows, 8 + length + i * row_bytes) for i, name in enumerate(header)}


def _described(dtype: torch.dtype, shape: Sequence[int], start: int) -> dict[str, Any]:
    """A tensor's entry in a safetensors header; `start` is its first byte in the data section."""
    end = start + math.prod(shape) * dtype.itemsize
    return {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}


def _bytes(row: torch.Tensor) -> Any:
    """A row's memory, to read into and write from."""
    return row.view(torch.uint8).numpy()


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _remember(known: set[bytes], data: bytes) -> None:
    if len(known) >= _REMEMBERED:
        known.clear()
    known.add(data)
