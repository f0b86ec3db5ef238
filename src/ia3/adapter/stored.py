"""The files of an adapter's folder: config, vectors and others, read and written together."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3.adapter.config import IA3Config
from ia3.errors import InputError, excerpt
from ia3.files import (
    CONFIG_NAME,
    TORCH_WEIGHTS_NAME,
    WEIGHTS_NAME,
    current,
    locate,
    locate_beside,
    parse_json,
    read_whole,
    replacing_adapter,
    to_json,
    version,
)

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

TASK_NAME = "task.yaml"
RECIPE_NAME = "recipe.yaml"
OPINIONS_NAME = "opinions.json"
HEAD_NAME = "head.safetensors"
SENTENCES_NAME = "sentences.safetensors"
WORDS_NAME = "words.safetensors"
CALIBRATION_NAME = "calibration.json"
METRICS_NAME = "metrics.json"
CARD_NAME = "README.md"
REPORT_NAME = "report.html"

OWN_NAMES = (
    CONFIG_NAME,
    WEIGHTS_NAME,
    TORCH_WEIGHTS_NAME,
    TASK_NAME,
    RECIPE_NAME,
    OPINIONS_NAME,
    HEAD_NAME,
    SENTENCES_NAME,
    WORDS_NAME,
    CALIBRATION_NAME,
    METRICS_NAME,
)
"""The files that are replaced together, and the model card unless a user wrote it."""

# The other files beside config and vectors, in the order of writing.
_BESIDE = (
    TASK_NAME,
    RECIPE_NAME,
    OPINIONS_NAME,
    HEAD_NAME,
    SENTENCES_NAME,
    WORDS_NAME,
    METRICS_NAME,
    CALIBRATION_NAME,
    CARD_NAME,
)

SEEN = "train_rows"
"""The key of the training rows' fingerprints in metrics.json."""

UNFINISHED = "unfinished"
"""The key that metrics.json has until all that the training makes is there."""

TRAIN_LABELS = "train_labels"
"""The key of what it has beside them: label → number of training rows."""

# The mark of a model card or report that this package wrote.
CARD_MARK = "<!-- Written by ia3, which replaces it with the adapter. Delete this line to keep a text of your own. -->"

# Entries of the safetensors header, which PEFT does not read: that the adapter rescales only the key and value part of
# fused projections, so that training can continue; and the base model, which names and shapes of tensors do not show.
KEY_VALUE_ONLY = "ia3_key_value_only"
_BASE = "ia3_base_model"

# Larger than any count or time of a run, and safe to calculate with.
_MOST = 10**15

Tensors = dict[str, "torch.Tensor"]


class StoredAdapter:
    """The files of an adapter's folder, on disk or on the hub. They are read at first use.

        stored = StoredAdapter("adapters/tickets")
        stored.config, stored.text("task.yaml")
        tensors, header = stored.vectors()

    The small files of a local folder are read together, so that all belong to one save, even if another process writes.
    All functions that take the path of an adapter's folder also take this object. `ia3.folder` interprets the files
    beside the vectors.

    Args:
        path: the folder or hub id.
        subfolder: a subfolder of it.
        **hub_kwargs: the hub's `revision`, `token`, …
    """

    def __init__(self, path: str | os.PathLike, subfolder: str | None = None, **hub_kwargs: Any) -> None:
        self.path = path
        self._place = {"subfolder": subfolder, **hub_kwargs}
        self._digest: str | None = None
        self._folder = Path(path, subfolder or "")
        self._on_hub = not self._folder.exists()
        self._texts: dict[str, bytes | None] = {}
        self._version: tuple[int, ...] | None = None
        if not self._on_hub:
            self._texts, self._version = read_whole(self._folder, self._read_texts)

    def _read_texts(self) -> tuple[dict[str, bytes | None], tuple[int, ...] | None]:
        where, stamp = version(self._folder)
        names = (CONFIG_NAME, *_BESIDE)
        return {name: (where / name).read_bytes() for name in names if (where / name).is_file()}, stamp

    @classmethod
    def unsaved(cls, texts: Mapping[str, bytes]) -> Self:
        """The other files of an adapter that has no folder yet: name → content."""
        stored = cls.__new__(cls)
        stored.path, stored._place, stored._folder = "", {}, Path()
        stored._on_hub, stored._version, stored._digest = False, None, None
        stored._texts = {**texts}
        return stored

    @classmethod
    def whole(
        cls,
        path: str | os.PathLike,
        subfolder: str | None = None,
        config: bool = True,
        pickled: bool = True,
        **hub_kwargs: Any,
    ) -> tuple[Self, Tensors, dict[str, str]]:
        """A folder, its tensors and the header's entries, all of one save.

        Args:
            path: the folder or hub id; or an object of this class, which is returned.
            subfolder: a subfolder of it.
            config: require the folder's config.
            pickled: also accept tensors of `torch.save`.
            **hub_kwargs: the hub's `revision`, `token`, …

        Raises:
            InputError: see `config` and `vectors`.
        """

        def read() -> tuple[Any, Tensors, dict[str, str]]:
            folder = path if isinstance(path, StoredAdapter) else cls(path, subfolder, **hub_kwargs)
            if config:
                _ = folder.config
            tensors, header = folder.vectors(pickled)
            return folder, tensors, header

        if isinstance(path, StoredAdapter):
            return read()
        return read_whole(Path(path, subfolder or ""), read)

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def text(self, name: str) -> bytes | None:
        """A file's content; None if the file does not exist."""
        if self._on_hub and name not in self._texts:
            found = locate_beside(self.path, name, **self._place)
            self._texts[name] = None if found is None else Path(found).read_bytes()
        return self._texts.get(name)

    def _named(self, name: str) -> Path:
        """A file's path, for error messages and for paths relative to it."""
        return self._folder / name

    @functools.cached_property
    def config(self) -> IA3Config:
        """The adapter's config. Raises `InputError` if it is missing or of another method."""
        data = None if self._on_hub else self._texts.get(CONFIG_NAME)
        if data is None:
            return IA3Config.from_pretrained(self.path, **self._place)
        return IA3Config.from_json(data, self._named(CONFIG_NAME))

    @functools.cached_property
    def metrics(self) -> dict[str, Any]:
        """The metrics, and the fingerprints of the training rows; empty if the folder has no metrics.json.

        Raises:
            InputError: the file has another format.
        """
        data, path = self.text(METRICS_NAME), self._named(METRICS_NAME)
        if data is None:
            return {}
        found = parse_json(data, path, "delete it")
        fields = found if isinstance(found, dict) else {SEEN: None}
        seen = fields.get(SEEN, [])
        numbers = [fields.get(key, 0) for key in ("steps", "train_examples", "train_seconds", "trained_at_once")]
        if (
            not isinstance(seen, list)
            or not all(isinstance(key, str) for key in seen)
            or not all(map(is_number, numbers))
        ):
            raise InputError(f"Expected metrics of ia3 train in {excerpt(str(path))}, found something else; delete it.")
        return fields

    def copy_to(self, folder: str | os.PathLike) -> None:
        """Copy the adapter's files, all of one save, into an empty folder. Raises `InputError` as `config` and `vectors_file`."""
        _ = self.config
        file = self.vectors_file()
        shutil.copyfile(file, Path(folder, Path(file).name))
        for name in (CONFIG_NAME, *_BESIDE):
            data = self.text(name)
            if data is not None:
                Path(folder, name).write_bytes(data)
        self.require_unchanged()

    def vectors(self, pickled: bool = True) -> tuple[Tensors, dict[str, str]]:
        """The adapter's tensors by their names in the file, and the safetensors header's entries.

        Args:
            pickled: also accept a file of `torch.save`.

        Raises:
            InputError: the file is missing, cut short or holds anything but tensors; or the adapter was replaced after
                this object was made.
        """
        from ia3.adapter.tensors import read_tensors

        file = self.vectors_file(pickled)
        tensors, header = read_tensors(file)
        self.require_unchanged()
        measured = {OPINIONS_NAME, CALIBRATION_NAME, METRICS_NAME} & set(self._texts)
        self._digest = _digest(tensors) if self._on_hub or measured else None
        return tensors, header

    def require_unchanged(self) -> None:
        """Raise `InputError` if the folder's adapter was replaced after this object was made."""
        if not self._on_hub and version(self._folder)[1] != self._version:
            raise InputError(f"The adapter in {str(self)!r} was replaced while it was being used; run this again.")

    def contents(self) -> dict[str, bytes]:
        """Name → content of the files that say what the adapter answers, all of one save.

        Raises:
            InputError: the config or the vectors are missing, or the adapter was replaced after this object was made.
        """
        _ = self.config
        file = Path(self.vectors_file())
        names = [name for name in (CONFIG_NAME, *_BESIDE) if name not in (METRICS_NAME, CARD_NAME)]
        found = {name: data for name in names if (data := self.text(name)) is not None}
        found[file.name] = file.read_bytes()
        self.require_unchanged()
        return found

    def vectors_file(self, pickled: bool = True) -> str:
        """The file of an adapter's tensors: safetensors, else `torch.save`'s. Raises `InputError` if there is none."""
        names = (WEIGHTS_NAME, TORCH_WEIGHTS_NAME) if pickled else (WEIGHTS_NAME,)
        if not self._on_hub:
            where = current(self._folder)
            for name in names:
                if (where / name).is_file():
                    return str(where / name)
            raise InputError(f"Can't find {WEIGHTS_NAME!r} in {str(self)!r}: expected the folder of a saved adapter.")
        try:
            return locate(self.path, WEIGHTS_NAME, **self._place)
        except InputError as missing:
            for name in names[1:]:
                with contextlib.suppress(InputError):
                    return locate(self.path, name, **self._place)
            raise missing

    def check_base(self, header: Mapping[str, str]) -> None:
        """Warn if the entries of the vectors' header show that the config is from another save.

        Other modules or sides raise an error when tensors are set, but vectors can fit another base model.
        """
        named, saved = self.config.base_model_name_or_path, header.get(_BASE)
        if named and saved and Path(named).name != Path(saved).name:  # it may have moved
            warnings.warn(
                f"{CONFIG_NAME} in {str(self)!r} names the base model {named!r}, but its vectors were saved for {saved!r}: "
                f"they may belong to two adapters.",
                stacklevel=4,
            )

    def beside(self, tensors: Tensors) -> dict[str, bytes]:
        """The other files to save with tensors. If the tensors differ from the folder's, what was found out with those is left
        out: metrics, opinions, calibration."""
        try:
            texts = {name: data for name in _BESIDE if (data := self.text(name)) is not None}
        except InputError as error:  # save the vectors in any case; training may have taken hours
            warnings.warn(f"Saved without task, recipe and calibration: {error}", stacklevel=4)
            return {}
        measured = measured_in(texts.pop(METRICS_NAME, None))
        if self._digest is not None and _digest(tensors) != self._digest:
            measured = {SEEN: measured[SEEN]} if SEEN in measured else {}
            for name in (OPINIONS_NAME, HEAD_NAME, SENTENCES_NAME, WORDS_NAME, CALIBRATION_NAME, CARD_NAME):
                texts.pop(name, None)
        if CARD_MARK.encode() not in texts.get(CARD_NAME, b""):  # a user's card stays where it is
            texts.pop(CARD_NAME, None)
        return texts | ({METRICS_NAME: to_json(measured).encode()} if measured else {})

    @staticmethod
    def write(
        path: str | os.PathLike,
        config: IA3Config,
        tensors: Tensors,
        beside: Mapping[str, bytes] | Callable[[int], Mapping[str, bytes]] | None = None,
        safe_serialization: bool = True,
        key_value_only: bool = False,
    ) -> None:
        """Write an adapter and the other files of its folder, atomically; see `replacing_adapter`.

        The files of an earlier adapter are removed. A user's files stay: README.md, report.html or metrics.json, all other files,
        and task.yaml and recipe.yaml if the folder had no adapter.

        Args:
            path: the folder; created if it does not exist.
            config: the adapter's config.
            tensors: name in a checkpoint → tensor.
            beside: name → content of the other files; or a function that returns them for the size of the tensors'
                file.
            safe_serialization: write safetensors; False: use `torch.save`.
            key_value_only: record that only the key and value part of fused projections is rescaled.
        """
        # safetensors accepts neither views nor tensors that share memory.
        tensors = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
        metadata = {"format": "pt"}
        if config.base_model_name_or_path:
            metadata[_BASE] = config.to_dict()["base_model_name_or_path"]
        if key_value_only:
            metadata[KEY_VALUE_ONLY] = "true"
        folder = Path(path)
        with replacing_adapter(folder, replaced_in(folder)) as staged:
            (staged / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")
            file = staged / (WEIGHTS_NAME if safe_serialization else TORCH_WEIGHTS_NAME)
            _write_tensors(tensors, file, metadata, folder)
            texts = beside(file.stat().st_size) if callable(beside) else beside or {}
            for name, data in {**_staying(folder), **texts}.items():
                if name not in (CARD_NAME, REPORT_NAME) or is_ours(folder / name):
                    (staged / name).write_bytes(data)


def replaced_in(folder: Path) -> tuple[str, ...]:
    """The names of the files in a folder that another adapter replaces: a report of ours, too, for it is about other vectors."""
    return (*OWN_NAMES, REPORT_NAME) if is_ours(folder / REPORT_NAME) else OWN_NAMES


def is_number(value: Any) -> bool:
    """Whether a value of metrics.json is a number that a run can write."""
    return isinstance(value, (int, float)) and 0 <= value <= _MOST


def is_ours(path: Path) -> bool:
    """Whether a model card or report may be replaced: it does not exist, or this package wrote it."""
    try:
        return CARD_MARK.encode() in path.read_bytes()
    except FileNotFoundError:
        return True


def _staying(folder: Path) -> dict[str, bytes]:
    """The files with our names in a folder that are not from an adapter of ours."""
    found = {}
    if not (folder / CONFIG_NAME).exists():
        found = {name: (folder / name).read_bytes() for name in (TASK_NAME, RECIPE_NAME) if (folder / name).is_file()}
    if (folder / METRICS_NAME).is_file():
        data = (folder / METRICS_NAME).read_bytes()
        if not measured_in(data):
            found[METRICS_NAME] = data
    return found


def measured_in(data: bytes | None) -> dict[str, Any]:
    """The content of our metrics.json; empty for another file or none."""
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    ours = isinstance(found, dict) and ("adapter_bytes" in found or isinstance(found.get(SEEN), list))
    return found if ours else {}


def _write_tensors(tensors: Tensors, file: Path, metadata: dict[str, str], folder: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if file.name == TORCH_WEIGHTS_NAME:
        torch.save(tensors, file)
        return
    try:
        save_file(tensors, file, metadata=metadata)
    except SafetensorError as error:  # its error for a refusal of the operating system
        raise OSError(f"Cannot write {folder / file.name}: {error}") from error
    # safetensors writes the header's entries in random order. Sort them, so that equal adapters have equal bytes.
    with open(file, "r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = metadata
        opened.seek(8)
        opened.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def _digest(tensors: Tensors) -> str:
    """A hash of vectors that does not depend on their dtype."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.detach().cpu()
        found.update(name.encode())
        found.update(values.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
