"""Files of rows to answer and the folder for the answered ones: which are done, and whether they belong to the same job."""

from __future__ import annotations

import hashlib
import os
import posixpath
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ia3.errors import InputError, brief, shown
from ia3.files import TEMPORARY, opened, parse_json, reading, replacing, stamp, to_json

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
"""The files that are read, and written."""

ERRORS_NAME = "errors.parquet"
"""The file of all rows that could not be answered: file, row and error."""

# The folder in the output folder with the job's settings, and with a record of each file that is done.
_JOB = ".job"
_SETTINGS_NAME = f"{_JOB}/job.json"
_DONE = f"{_JOB}/done/"

_MAGIC = "*?["


@dataclass(frozen=True)
class Source:
    """A file of rows.

    Attributes:
        files: fsspec's file system.
        path: the file's path there.
        name: what the answered file is called, below the output folder.
        stamp: what the file system said of it when the job began; another stamp means another content.
        within: the folder all of whose files are rows, however deep; None: only those of one folder are.
    """

    files: Any
    path: str
    name: str
    stamp: str
    within: str | None = None

    @property
    def suffix(self) -> str:
        """The suffix of its name, in small letters."""
        return posixpath.splitext(self.name)[1].lower()

    def require_unchanged(self) -> None:
        """Raise `InputError` if the file is another one by now, or gone."""
        with reading(self.path, "rows", "look at it"):
            if _stamp_of(self.files, self.path) != self.stamp:
                raise InputError(
                    f"Expected {brief(self.path)} to stay as it is while its rows are answered, found that it was changed; run this "
                    "again when nobody writes it."
                )

    @contextmanager
    def local(self) -> Iterator[str]:
        """The file's path on this machine: its own, or that of a copy for the time of a `with` block.

        Raises:
            InputError: the file is not as it was when the job began, before or after the block.
        """
        self.require_unchanged()
        if _is_local(self.files):
            yield self.path
        else:
            with tempfile.TemporaryDirectory() as folder:
                copy = os.path.join(folder, posixpath.basename(self.path))
                with reading(self.path, "rows", "look at it"):
                    self.files.get_file(self.path, copy)
                yield copy
        self.require_unchanged()


def sources_of(data: str) -> list[Source]:
    """The files that a path, a pattern such as dir/*.parquet or a folder means, here or at an address; sorted by name.

    Names are relative to the folder in front of the pattern.

    Raises:
        InputError: there are none, or some have another suffix.
    """
    files, path = opened(data)
    with reading(data, "files of rows", "look at it"):
        if any(sign in path for sign in _MAGIC):
            found = [one for one in files.glob(path) if not files.isdir(one)]
            first = next(place for place, part in enumerate(path.split("/")) if any(sign in part for sign in _MAGIC))
            root = "/".join(path.split("/")[:first])
        elif files.isdir(path):
            found = [one for one in files.find(path) if posixpath.splitext(one)[1].lower() in SUFFIXES]
            root = path.rstrip("/")
        else:
            found, root = [path] if files.exists(path) else [], posixpath.dirname(path)
        if not found:
            raise InputError(f"Expected files of rows at {brief(data)}, found none.")
        wrong = [one for one in found if posixpath.splitext(one)[1].lower() not in SUFFIXES]
        if wrong:
            raise InputError(f"Expected files that end in {', '.join(SUFFIXES)}, found {shown(wrong)}.")
        names = [one[len(root) :].lstrip("/") for one in found]
        if ERRORS_NAME in names:
            raise InputError(
                f"Expected files with other names than {ERRORS_NAME}, which lists errors; rename {brief(ERRORS_NAME)}."
            )
        pairs = sorted(zip(names, found, strict=True))
        within = root if "**" in path or files.isdir(path) else None
        return [Source(files, one, name, _stamp_of(files, one), within) for name, one in pairs]


class Output:
    """The folder for answered files, here or at an address. Each file appears in whole.

    Args:
        folder: a path or an address.
        settings: all that decides the answers, as JSON.
    """

    def __init__(self, folder: str, settings: Mapping[str, Any]) -> None:
        self._files, root = opened(folder)
        self._root, self._folder = root.rstrip("/"), folder
        self.settings = dict(settings)

    def done(self, sources: Sequence[Source]) -> dict[str, dict[str, Any]]:
        """The records of the files that are done, by name.

        Raises:
            InputError: the folder belongs to another job, or holds something else, or is inside that of the sources; a source was
                changed since it was answered.
        """
        for source in sources:
            is_row = source.path == self._path(source.name)
            becomes_one = source.within is not None and f"{self._root}/".startswith(f"{source.within}/")
            if type(self._files) is type(source.files) and (is_row or becomes_one):
                raise InputError(
                    f"Expected a folder outside that of the rows, found {brief(self._folder)}, whose files would be rows, too",
                    "take another one by",
                    argument="output",
                )
        with reading(self._folder, "a folder", "look at it"):
            self._files.invalidate_cache()
            if self._files.isfile(self._root):
                raise InputError(f"Expected a folder, found the file {brief(self._folder)}", argument="output")
            if not self._files.isdir(self._root):
                return {}
            if not self._files.exists(self._path(_SETTINGS_NAME)):
                if self._files.ls(self._root, detail=False):
                    raise InputError(
                        f"Expected a new or empty folder, or this job's, found others' files in {brief(self._folder)}",
                        "take another one by",
                        argument="output",
                    )
                return {}
            earlier = self._read(_SETTINGS_NAME)
            different = [name for name, value in self.settings.items() if earlier.get(name) != value]
            if different:
                raise InputError(
                    f"Expected the folder of this job, found that of one with another {shown(different)} in {brief(self._folder)}",
                    "repeat its options, or take another folder by",
                    argument="output",
                )
            place = self._path(_DONE)
            paths = self._files.find(place) if self._files.isdir(place) else []
            names = {posixpath.relpath(path, place).removesuffix(".json") for path in paths}
            found = {}
            for source in sources:
                if source.name not in names or not self._files.exists(self._path(source.name)):
                    continue
                record = self._read(f"{_DONE}{source.name}.json")
                if record["stamp"] != source.stamp:
                    raise InputError(
                        f"Expected {brief(source.path)} as it was when it was answered, found that it was changed; remove "
                        f"{brief(self._path(source.name))}, or take another folder."
                    )
                found[source.name] = record
            return found

    def begin(self) -> None:
        """Write the settings."""
        self._write_json(_SETTINGS_NAME, self.settings)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A file on this machine to write in a `with` block; at its end it appears in the folder, or not at all after an error."""
        target = self._path(name)
        if _is_local(self._files):
            with replacing(target) as temporary:
                yield temporary
            return
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, posixpath.basename(name))
            yield temporary
            parent, base = posixpath.split(target)
            beside = f"{parent}/{TEMPORARY}{base}"
            self._files.makedirs(parent, exist_ok=True)
            self._files.put_file(str(temporary), beside)
            self._files.mv(beside, target)

    def finish(self, source: Source, record: Mapping[str, Any]) -> None:
        """Record that a file is done, which is in the folder by now."""
        self._write_json(f"{_DONE}{source.name}.json", {**record, "stamp": source.stamp})

    def write_errors(self, records: Mapping[str, Mapping[str, Any]]) -> int:
        """Write the errors of all files that are done, given their records; returns the number. Without errors there is no file."""
        import pyarrow
        from pyarrow import parquet

        rows = [(name, row, error) for name, record in records.items() for row, error in record["errors"]]
        if rows:
            columns = [list(column) for column in zip(*rows, strict=True)]
            with self.writing(ERRORS_NAME) as temporary:
                parquet.write_table(pyarrow.table(columns, names=["file", "row", "error"]), temporary)
        elif self._files.exists(self._path(ERRORS_NAME)):
            self._files.rm(self._path(ERRORS_NAME))
        return len(rows)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _read(self, name: str) -> dict[str, Any]:
        return parse_json(self._files.cat_file(self._path(name)), self._path(name), "take another folder")

    def _write_json(self, name: str, value: Any) -> None:
        with self.writing(name) as temporary:
            temporary.write_text(to_json(value), encoding="utf-8")


def digest_of(adapters: Mapping[str, Mapping[str, bytes]]) -> str:
    """A fingerprint of adapters: name → name of a file → content."""
    found = hashlib.sha256()
    for name, contents in sorted(adapters.items()):
        for file, data in sorted(contents.items()):
            found.update(repr((name, file, hashlib.sha256(data).hexdigest())).encode())
    return found.hexdigest()


def _stamp_of(files: Any, path: str) -> str:
    files.invalidate_cache()
    return stamp(files.info(path))


def _is_local(files: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(files, LocalFileSystem)
