"""An adapter as one flat row of numbers: the position of each tensor, and how to fill a row.

The columns have the order in which safetensors writes tensors of one dtype, sorted by name. So the data section of an
adapter's file is its row.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ia3.adapter.adapted import Adapted
from ia3.adapter.config import CONFIG_NAME, IA3Config
from ia3.adapter.rules import find_rule
from ia3.adapter.stored import StoredAdapter
from ia3.adapter.targets import Target, base_modules, matches
from ia3.adapter.tensors import PREFIX, Tensors, check_tensors
from ia3.errors import InputError, about, brief, excerpt, shown
from ia3.files import WEIGHTS_NAME, current, read_whole, reading

T = TypeVar("T")

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # safetensors' names

_REMEMBERED = 64  # limit of cached configs and headers


class Entry(NamedTuple):
    """One named slice of an adapter's flat row.

    Attributes:
        key: the tensor's name in a checkpoint.
        path: the module's path in the base model.
        parameter: None for a vector (`ia3_l`); otherwise the key in the state of a module of `modules_to_save`.
        feedforward: for a vector, whether it rescales the input.
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
        """Name, shape and side, as an archive records them."""
        return [self.key, list(self.shape), None if self.parameter is not None else self.feedforward]


def resolve_entries(
    model: Adapted, targets: Iterable[Target], kept: Iterable[str]
) -> tuple[tuple[Entry, ...], Tensors]:
    """The columns of adapters that rescale `targets` and train the modules at `kept`, and the base model's tensors.

    Raises:
        InputError: a module of `modules_to_save` has state that is not floating-point, or on the meta device.
    """
    full = tuple(f"{path}." for path in (*kept, *model.ia3_trained_modules))
    modules = base_modules(model.model)
    paths: dict[nn.Module, str] = {}  # of several paths the first, as in a checkpoint
    for path, module in modules.items():
        if not path.startswith(full):
            paths.setdefault(module, path)
    parts: dict[str, tuple[str, str | None, bool, torch.Tensor]] = {}
    for target in targets:
        path, rule = paths[target.module], find_rule(target.module)
        assert rule is not None  # otherwise resolving had failed
        ones = torch.ones(rule.shape(target.module, target.feedforward), device="cpu")
        parts[f"{PREFIX}{path}.ia3_l"] = path, None, target.feedforward, ones
    for path in kept:
        for key, value in modules[path].state_dict().items():
            if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.is_meta:
                found = f"{value.dtype} on {value.device}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise InputError(
                    f"Expected modules_to_save whose state is floating-point numbers in memory, found {found} in "
                    f"'{path}.{key}'; a bank cannot hold such adapters."
                )
            parts[f"{PREFIX}{path}.{key}"] = path, key, False, value
    entries, start = [], 0
    for key, (path, parameter, feedforward, value) in sorted(parts.items(), key=lambda part: part[0]):
        entries.append(Entry(key, path, parameter, feedforward, tuple(value.shape), start, value.numel()))
        start += value.numel()
    return tuple(entries), {key: part[-1] for key, part in parts.items()}


class Layout:
    """The columns of a row, and how a row is filled. Rows are tensors (width,) of `dtype` in the CPU's memory.

    Args:
        entries: the columns, in order and without gaps.
        targets: the modules that the vectors rescale; an adapter's config must have the same sides.
        dtype: one of `DTYPES`.
        reading: the paths of modules, such as an encoder's, for which adapters that act from the question on have no
            vectors. Their rows hold ones there.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        targets: Iterable[Target],
        dtype: torch.dtype,
        reading: Collection[str] = (),
    ) -> None:
        self.entries = tuple(entries)
        self.dtype = dtype
        self.width = sum(entry.size for entry in self.entries)
        self.row_bytes = self.width * dtype.itemsize
        self._sides = {target.path: target.feedforward for target in targets}
        self._reading = {entry.key: entry.path for entry in self.entries if entry.path in reading}
        self._expected = {entry.key: torch.empty(entry.shape, dtype=dtype, device="meta") for entry in self.entries}
        self._header = {
            entry.key: tensor_header(dtype, entry.shape, entry.start * dtype.itemsize) for entry in self.entries
        }
        self._known_configs: dict[bytes, str] = {}  # raw bytes of valid configs → from where they act
        self._known_headers: dict[bytes, bool] = {}

    def tensors(self, row: torch.Tensor) -> Tensors:
        """The named tensors of a row, as views."""
        return {entry.key: row[entry.start : entry.start + entry.size].view(entry.shape) for entry in self.entries}

    def check_finite(self, row: torch.Tensor, name: str) -> None:
        """Raise `InputError` if a row of adapter `name` holds NaN or infinite values."""
        # Both spread into the sum, which takes a quarter of the time. A sum may also overflow without them.
        if not math.isfinite(row.sum()) and not torch.isfinite(row).all():
            check_tensors(self._expected, self.tensors(row), name)

    def pack(self, tensors: Mapping[str, torch.Tensor], row: torch.Tensor, name: str, acts_from: str = "start") -> None:
        """Fill a row with an adapter's tensors. Raises `InputError` unless they are exactly the layout's, and
        finite."""
        absent = self._reading if acts_from == "question" else ()
        check_tensors({key: value for key, value in self._expected.items() if key not in absent}, tensors, name)
        for key, part in self.tensors(row).items():
            part.fill_(1.0) if key in absent else part.copy_(tensors[key].detach())

    def read_folder(self, folder: str, row: torch.Tensor, name: str) -> tuple[int, ...]:
        """Fill a row from an adapter's folder.

        Returns:
            A stamp that changes with the file of tensors.

        Raises:
            InputError: there is no adapter, it has another method, other modules, sides or shapes, or is not finite.
        """
        with reading(folder, "an adapter"):
            return read_whole(folder, lambda: self._read_folder(folder, row, name))

    def check_folder(self, folder: str, name: str) -> None:
        """Raise the errors of `read_folder`, except for numbers that are not finite. Numbers are read only if the file
        has another layout."""
        with reading(folder, "an adapter"):
            if read_whole(folder, lambda: self._open(folder, name, lambda file, status: True)):
                return
        self.read_folder(folder, torch.empty(self.width, dtype=self.dtype), name)

    def _open(self, folder: str, name: str, use: Callable[[BufferedReader, os.stat_result], T]) -> T | None:
        """The result of `use` for an adapter's file whose data is a row; None if it is not."""
        where = current(folder)
        if not (where / CONFIG_NAME).is_file():
            _ = StoredAdapter(folder).config  # raises the error
        if self._check_config(where / CONFIG_NAME, name) == "question" and self._reading:
            return None
        with contextlib.suppress(FileNotFoundError), open(where / WEIGHTS_NAME, "rb") as file:
            status = os.fstat(file.fileno())
            if self._is_row(file, status.st_size):
                return use(file, status)
        return None

    def _read_folder(self, folder: str, row: torch.Tensor, name: str) -> tuple[int, ...]:
        def fill(file: BufferedReader, status: os.stat_result) -> tuple[int, ...] | None:
            if file.readinto(memory(row)) != self.row_bytes:
                return None
            self.check_finite(row, name)
            return file_stamp(status)

        stamp = self._open(folder, name, fill)
        if stamp is None:
            its = StoredAdapter(folder)
            stamp = file_stamp(os.stat(its.vectors_file()))
            self.pack(its.vectors()[0], row, name, its.config.acts_from)
        return stamp

    def _is_row(self, file: BufferedReader, size: int) -> bool:
        """Whether the data after the safetensors header is exactly a row. Moves the file to that position."""
        length = int.from_bytes(file.read(8), "little")
        if size != 8 + length + self.row_bytes:
            return False
        header = file.read(length)
        if header in self._known_headers:
            return True
        try:
            tensors = json.loads(header)
            tensors.pop("__metadata__", None)
        except Exception:  # the reader of all other files raises the error
            return False
        if tensors != self._header:
            return False
        _remember(self._known_headers, header, True)
        return True

    def _check_config(self, path: Path, name: str) -> str:
        """From where the adapter of a config acts. Raises `InputError` if it is not of the layout's kind."""
        with open(path, "rb") as file:
            data = file.read()
        if data in self._known_configs:
            return self._known_configs[data]
        owner = f"Adapter {brief(name)}"
        with about(owner):
            config = IA3Config.from_json(data, path)
        named = config.feedforward_modules
        if named is not None:  # otherwise the shapes decide
            absent = set(self._reading.values()) if config.acts_from == "question" else ()
            wrong = [
                path for path, side in self._sides.items() if path not in absent and matches(path, named) is not side
            ]
            if wrong:
                raise InputError(
                    f"rescales another side (input, output) than the adapters here at {shown(wrong, 3)}: its "
                    f"feedforward_modules are {brief(sorted(named) if isinstance(named, set) else named)}",
                    "keep it apart from them",
                    owner=owner,
                )
        _remember(self._known_configs, data, config.acts_from)
        return config.acts_from

    def check_described(self, found: Any, path: str) -> None:
        """Raise `InputError` unless an archive's description of its entries is this layout's."""
        expected = [entry.described() for entry in self.entries]
        if found != expected:
            found = found if isinstance(found, list) else []
            both = min(len(found), len(expected))
            place = next((i for i in range(both) if found[i] != expected[i]), both)
            theirs, ours = (brief(each[place]) if place < len(each) else "none" for each in (found, expected))
            raise InputError(
                f"The adapters in {excerpt(path)} are of another kind: expected {len(expected)} entries, found "
                f"{len(found)}; the first that differs is {theirs}, expected {ours}. Are they for another base model?"
            )


def tensor_header(dtype: torch.dtype, shape: Sequence[int], start: int) -> dict[str, Any]:
    """A tensor's entry in a safetensors header; `start` is its first byte in the data section."""
    end = start + math.prod(shape) * dtype.itemsize
    return {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}


def memory(row: torch.Tensor) -> Any:
    """A row's memory, for reading and writing files."""
    return row.view(torch.uint8).numpy()


def file_stamp(status: os.stat_result) -> tuple[int, ...]:
    """A stamp that differs between files, and changes when a file is written."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _remember(known: dict[bytes, T], data: bytes, value: T) -> None:
    if len(known) >= _REMEMBERED:
        known.clear()
    known[data] = value
