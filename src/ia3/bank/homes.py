"""The homes of adapters: folders, records of files, the spill file."""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from io import BufferedRandom, BufferedReader
from typing import NamedTuple, Protocol

import torch

from ia3.adapter.stored import StoredAdapter
from ia3.bank.layout import Layout, file_stamp, memory
from ia3.errors import InputError

_SPILL_NAME = "ia3_bank.spill"


class Home(Protocol):
    """The place to read an adapter from again."""

    def read(self, layout: Layout, row: torch.Tensor, name: str) -> None:
        """Fill a row. Raises `InputError` if the adapter no longer exists or does not fit."""

    def holds(self) -> bool:
        """Whether it still holds the adapter that was read last."""
        ...

    @property
    def acts_from(self) -> str | None:
        """From where the adapter acts, as of `IA3Config`; None where nothing says it."""
        ...


class Folder:
    """An adapter's folder as its home."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._stamp: tuple[int, ...] | None = None
        self._acts_from: str | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and other.path == self.path

    def read(self, layout: Layout, row: torch.Tensor, name: str) -> None:
        """See `Home.read`."""
        self._stamp = layout.read_folder(self.path, row, name)
        self._acts_from = StoredAdapter(self.path).config.acts_from  # now: the folder may go while the row is in use

    def holds(self) -> bool:
        """Whether the file of tensors is the one that was read."""
        try:
            return file_stamp(os.stat(StoredAdapter(self.path).vectors_file())) == self._stamp
        except (InputError, OSError):
            return False

    @property
    def acts_from(self) -> str:
        """See `Home.acts_from`: of what was read last."""
        found = self._acts_from
        if found is None:
            found = self._acts_from = StoredAdapter(self.path).config.acts_from
        return found


class Record(NamedTuple):
    """A record of a file of rows as an adapter's home.

    Attributes:
        file: the file of rows.
        start: the record's first byte.
        origin: for a spilled adapter, the home that no longer holds it.
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

    @property
    def acts_from(self) -> str | None:
        """See `Home.acts_from`."""
        return self.file.acts_from if self.origin is None else self.origin.acts_from


class RowFile:
    """An open file of rows of one dtype. One thread at a time may use it.

    Attributes:
        path: where it is.
        acts_from: from where all its adapters act; None: nothing says it.
    """

    def __init__(
        self,
        file: BufferedReader | BufferedRandom,
        path: str,
        dtype: torch.dtype,
        scratch: str | None = None,
        acts_from: str | None = None,
    ) -> None:
        self.path, self.acts_from = path, acts_from
        self._file = file
        self._dtype = dtype
        self._finish = weakref.finalize(self, _discard, file, scratch)

    def __eq__(self, other: object) -> bool:
        # The same file on disk, opened twice.
        return isinstance(other, RowFile) and file_stamp(os.fstat(other._file.fileno())) == file_stamp(
            os.fstat(self._file.fileno())
        )

    def read(self, start: int, row: torch.Tensor) -> None:
        """Fill a row from the bytes at `start`. It is cast if the file's dtype differs."""
        buffer = row if row.dtype == self._dtype else torch.empty(row.shape, dtype=self._dtype, device="cpu")
        self._file.seek(start)
        data = memory(buffer)
        if self._file.readinto(data) != data.nbytes:
            raise InputError(f"{self.path} has been cut short since it was opened; copy it again.")
        if buffer is not row:
            row.copy_(buffer)

    def close(self) -> None:
        """Close the file, and remove it if it is a scratch file."""
        self._finish()


class SpillFile(RowFile):
    """A scratch file for evicted adapters without another home. It is removed when it is closed or the process ends.

    Args:
        folder: created if it does not exist. None: the system's temporary folder.
        layout: the layout of the rows.

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
        """Write a row into a free record."""
        start = self._free[-1] if self._free else self._end
        self._file.seek(start)
        self._file.write(memory(row))
        self._file.flush()
        if self._free:
            self._free.pop()
        else:
            self._end += self._record_bytes
        return Record(self, start, origin)

    def release(self, record: Record) -> None:
        """Free a record for another adapter."""
        self._free.append(record.start)


def _open_alone(path: str) -> BufferedRandom:
    """Open a new file that no other process or bank has opened with this function."""
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
