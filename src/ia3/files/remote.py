"""Copies of what is at an address that fsspec opens, such as s3://bucket/adapters, in the local cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ia3.errors import InputError, brief, reason
from ia3.files.atomic import TEMPORARY, replacing, temporary_in
from ia3.files.saves import CONFIG_NAME, PENDING, TORCH_WEIGHTS_NAME, WEIGHTS_NAME, current, take_over

# The file in a copied adapter's folder that holds the stamp of the files that it was copied from.
_STAMP_NAME = ".copied"

# Adapters to copy together; asynchronous file systems fetch their files at the same time.
_TOGETHER = 64


def cache_folder() -> Path:
    """The folder for what can be made or downloaded again: the environment variable IA3_CACHE, or the user's cache."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("IA3_CACHE", user_cache_path("ia3")))


def is_address(path: object) -> bool:
    """Whether a path is an address for fsspec: a protocol before "://"."""
    return isinstance(path, str) and re.match(r"[A-Za-z][A-Za-z0-9+.:-]+://", path) is not None


def fetch(address: str, names: Collection[str]) -> str:
    """The local copy, made or brought up to date, of a file or of the adapters below a folder; see `Mirror`."""
    files, root = opened(address)
    with _asking(address):
        files.invalidate_cache()
        info = files.info(root) if files.isfile(root) else None
    if info is None:
        mirror = Mirror(address, names)
        mirror.refresh()
        return str(mirror.folder)
    folder = _place(address)
    # A copy that somebody has open stays as it is: another content is another file.
    copy = folder / f"{stamp(info)[:16]}-{os.path.basename(root)}"
    if not copy.exists():
        with _asking(address), replacing(copy) as temporary:
            files.get_file(root, str(temporary))
    for name in os.listdir(folder):
        if name != copy.name and not name.startswith(TEMPORARY):
            (folder / name).unlink(missing_ok=True)
    return str(copy)


class Mirror:
    """A local copy of the adapters below an address, at any depth, or of the one that is there.

    Other mirrors of the same address, of this process or another, have the same folder. Nobody else may write into it.

    Args:
        address: the folder's address.
        names: the names of an adapter's files to copy, the same for all mirrors of an address.

    Attributes:
        address: the address.
        folder: the copy.

    Raises:
        InputError: the address is not one that fsspec opens, or needs a package that is not installed.
    """

    def __init__(self, address: str, names: Collection[str]) -> None:
        self.address, self._names = address, names
        self._files, root = opened(address)
        self._root = root.rstrip("/")
        self.folder = _place(address)
        self._lock = threading.Lock()
        self._seen: dict[str, str] = {}  # name → stamp of the adapters at the end of the last look

    def refresh(self) -> bool:
        """Copy new and changed adapters, and remove those that are gone, each adapter's files together.

        Returns:
            Whether the adapters are others than after the last call that returned; at first, whoever copied them.

        Raises:
            InputError: the address cannot be read, or has no adapters. What was copied before stays.
        """
        with self._lock, _asking(self.address):
            wanted, copied = self._listed(), self._copied()
            if not wanted:
                raise InputError(
                    f"Expected adapters at {brief(self.address)}, each with {CONFIG_NAME} and {WEIGHTS_NAME}, found none."
                )
            stamps = {name: stamp([info for _, info in sorted(its.items())]) for name, its in wanted.items()}
            news = [name for name in wanted if copied.get(name) != stamps[name]]
            for start in range(0, len(news), _TOGETHER):
                self._copy({name: wanted[name] for name in news[start : start + _TOGETHER]}, stamps)
            for name in copied.keys() - wanted.keys():
                self._remove(self.folder / name)
            before, self._seen = self._seen, stamps
            return before != stamps

    def _listed(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Name of an adapter → name of a file → what the file system says of it."""
        self._files.invalidate_cache()
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for path, info in self._files.find(self._root, detail=True).items():
            if path.startswith(f"{self._root}/") and info["type"] == "file":
                name, _, file = path[len(self._root) + 1 :].rpartition("/")
                parts = name.split("/") if name else []
                inside = not any(
                    part in ("", ".", "..") or part.startswith(TEMPORARY) or "\\" in part for part in parts
                )
                if inside and file in self._names:
                    found.setdefault(name, {})[file] = {**info, "name": path}
        return {
            name: its
            for name, its in found.items()
            if CONFIG_NAME in its and (WEIGHTS_NAME in its or TORCH_WEIGHTS_NAME in its)
        }

    def _copied(self) -> dict[str, str]:
        """Name of a copied adapter → its stamp."""
        found = {}
        for where, folders, _ in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(TEMPORARY)]
            stored = current(where) / _STAMP_NAME
            if stored.is_file():
                name = os.path.relpath(where, self.folder).replace(os.sep, "/")
                found["" if name == "." else name] = stored.read_text(encoding="utf-8")
        return found

    def _copy(self, adapters: Mapping[str, Mapping[str, dict[str, Any]]], stamps: Mapping[str, str]) -> None:
        with temporary_in(self.folder, "copy") as staged:
            sources, targets = [], []
            for number, (name, its) in enumerate(adapters.items()):
                (staged / str(number)).mkdir()
                (staged / str(number) / _STAMP_NAME).write_text(stamps[name], encoding="utf-8")
                for file, info in its.items():
                    sources.append(info["name"])
                    targets.append(str(staged / str(number) / file))
            self._files.get(sources, targets)
            for number, name in enumerate(adapters):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
                take_over(staged / str(number), self.folder / name, sorted(self._names))

    def _remove(self, folder: Path) -> None:
        """Remove an adapter's files at once, and its folder unless other adapters are below it."""
        with temporary_in(self.folder, "gone") as gone:
            for name in (PENDING, CONFIG_NAME, *os.listdir(folder)):  # without its config it is none
                if name == PENDING or (folder / name).is_file():
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(folder / name, gone / name)
        while folder != self.folder and not os.listdir(folder):
            folder.rmdir()
            folder = folder.parent


def opened(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, or of a path here, and the path there. Raises `InputError` if it cannot be opened."""
    from fsspec.core import url_to_fs

    protocol = address.partition("://")[0]
    try:
        return url_to_fs(address)
    except ImportError as error:
        missing = reason(error)
        raise InputError(
            f"Expected a package that opens {protocol}:// addresses, found none", missing[:1].lower() + missing[1:]
        ) from error
    except Exception as error:
        raise InputError(
            f"Expected an address that fsspec opens, such as s3://bucket/adapters, found {brief(address)}: {reason(error)}."
        ) from error


@contextmanager
def _asking(address: str) -> Iterator[None]:
    """Convert all errors of a file system in a `with` block, each has others, to `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"Cannot copy from {brief(address)}: {type(error).__name__}: {reason(error)}.") from error


def _place(address: str) -> Path:
    """The folder for copies from an address."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", address.rstrip("/"))[-60:].strip("-.")
    folder = cache_folder() / "addresses" / f"{name}-{stamp(address.rstrip('/'))[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def stamp(value: Any) -> str:
    """A stamp of what a file system says of files: sizes, times, checksums, whatever it has."""
    return hashlib.blake2b(repr(value).encode("utf-8", "backslashreplace"), digest_size=32).hexdigest()
