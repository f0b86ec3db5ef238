"""Copies of what is at an address that fsspec opens, such as s3://bucket/adapters, in the local cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ia3.errors import InputError, brief, reason
from ia3.files.atomic import TEMPORARY, replacing, temporary_in
from ia3.files.hub import at_revision, snapshot
from ia3.files.saves import CONFIG_NAME, PENDING, TORCH_WEIGHTS_NAME, WEIGHTS_NAME, current, take_over

# The file in a copied adapter's folder that holds the stamp of the files that it was copied from.
_STAMP_NAME = ".copied"

# The file that marks an adapter that a server's client has uploaded. At an address it names the digests of the other files.
UPLOADED = ".uploaded"

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
        unfinished: names of adapters that `put` had not written to the end at the last look, or that two wrote at the
            same time. What was copied of them before stays.

    Raises:
        InputError: the address is not one that fsspec opens, or needs a package that is not installed.
    """

    def __init__(self, address: str, names: Collection[str]) -> None:
        self.address, self._names = address, {*names, UPLOADED}
        self._files, root = self._opened()
        self._root = root.rstrip("/")
        self.folder = _place(address)
        self.unfinished: list[str] = []
        self._begun: list[str] = []  # uploads without all that makes an adapter, at the last look
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
            self.unfinished = [*self._begun]
            for start in range(0, len(news), _TOGETHER):
                self._copy({name: wanted[name] for name in news[start : start + _TOGETHER]}, stamps)
            for name in copied.keys() - wanted.keys():
                self._remove(self.folder / name)
            before, self._seen = self._seen, stamps
            return before != stamps

    def _opened(self) -> tuple[Any, str]:
        return opened(self.address)

    def put(self, name: str, folder: str | os.PathLike) -> bool:
        """Write an adapter to the address: the files of a folder, in place of those of an adapter with this name.

        No file system of objects replaces several files at once. So the first file to be written says what all of them
        will be, and mirrors leave the adapter as it was until it is true.

        Args:
            name: the adapter's name, its path below the address.
            folder: the folder with its files.

        Returns:
            Whether that is what the adapter is now; False: somebody else has written it, too.

        Raises:
            InputError: the address cannot be written to. The adapter stays as it was for all that have copied it.
        """
        sources = {each.name: each.read_bytes() for each in Path(folder).iterdir() if each.name in self._names}
        sources.pop(UPLOADED, None)
        mark = json.dumps({file: _hash(data) for file, data in sorted(sources.items())}).encode()
        last = (WEIGHTS_NAME, CONFIG_NAME)  # without them it is no adapter
        order = sorted(sources, key=lambda file: last.index(file) if file in last else -1)
        with _asking(self.address, "write to"):
            there = f"{self._root}/{name}"
            self._files.invalidate_cache()
            self._files.makedirs(there, exist_ok=True)
            for file, data in ((UPLOADED, mark), *((file, sources[file]) for file in order)):
                self._files.pipe_file(f"{there}/{file}", data)
            for file in self._listed().get(name, {}).keys() - {UPLOADED, *sources}:
                self._files.rm_file(f"{there}/{file}")
            return self._files.cat_file(f"{there}/{UPLOADED}") == mark

    def is_last(self, name: str) -> bool:
        """Whether there are no other adapters at the address, so that nobody could read it without this one."""
        with _asking(self.address):
            return self._listed().keys() <= {name}

    def delete(self, name: str) -> None:
        """Remove an adapter from the address, its config first.

        Raises:
            InputError: the address cannot be written to.
        """
        with _asking(self.address, "delete from"):
            for file in sorted(self._listed().get(name, ()), key=lambda file: file != CONFIG_NAME):
                self._files.rm_file(f"{self._root}/{name}/{file}")

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
        whole = {
            name: its
            for name, its in found.items()
            if CONFIG_NAME in its and (WEIGHTS_NAME in its or TORCH_WEIGHTS_NAME in its)
        }
        self._begun = [name for name, its in found.items() if UPLOADED in its and name not in whole]
        return whole

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
                if not _is_whole(staged / str(number)):
                    self.unfinished.append(name)
                    continue
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


def _is_whole(folder: Path) -> bool:
    """Whether the files in a folder are those that its mark names, if it has one."""
    with contextlib.suppress(FileNotFoundError):
        mark = (folder / UPLOADED).read_bytes()
        others = (each for each in folder.iterdir() if each.name not in (UPLOADED, _STAMP_NAME))
        try:  # a mark without content is of a folder that was copied here as a whole
            return not mark or json.loads(mark) == {each.name: _hash(each.read_bytes()) for each in others}
        except ValueError:  # half of it is written
            return False
    return True


class HubMirror(Mirror):
    """A local copy of the adapters in hub repositories, whose ids are the adapters' names.

    A repository holds one adapter, or several in subfolders: "owner/name", "owner/name/sub". huggingface_hub downloads and
    caches the files.

    Args:
        address: hub ids with commas between them, such as "owner/tickets@v1,owner/tone". Without a revision it is the
            newest of the branch "main", which `refresh` follows.
        names: as of `Mirror`.
    """

    def put(self, name: str, folder: str | os.PathLike) -> bool:
        """Raise `InputError`: who may push to a repository is not who may use a server."""
        raise InputError(f"Cannot write {brief(name)} to the hub; push it there: ia3 push ADAPTER OWNER/NAME.")

    def delete(self, name: str) -> None:
        """Raise `InputError`, as `put`."""
        raise InputError(f"Cannot delete {brief(name)} from the hub; start the server without it.")

    def _opened(self) -> tuple[Any, str]:
        from fsspec.implementations.local import LocalFileSystem

        return LocalFileSystem(), ""

    def _listed(self) -> dict[str, dict[str, dict[str, Any]]]:
        found = {}
        for hub_id in self.address.split(","):
            here = Path(snapshot(hub_id, [part + name for name in self._names for part in ("", "*/")]))
            for config in here.rglob(CONFIG_NAME):
                inside = config.parent.relative_to(here).as_posix()
                name = at_revision(hub_id)[0] + ("" if inside == "." else f"/{inside}")
                # In huggingface_hub's cache a file is a link to one that is named after its content.
                files = [config.parent / file for file in self._names if (config.parent / file).is_file()]
                found[name] = {file.name: {"name": os.path.realpath(file)} for file in files}
        return found


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
def _asking(address: str, what: str = "copy from") -> Iterator[None]:
    """Convert all errors of a file system in a `with` block, each has others, to `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"Cannot {what} {brief(address)}: {type(error).__name__}: {reason(error)}.") from error


def _place(address: str) -> Path:
    """The folder for copies from an address."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", address.rstrip("/"))[-60:].strip("-.")
    folder = cache_folder() / "addresses" / f"{name}-{stamp(address.rstrip('/'))[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def stamp(value: Any) -> str:
    """A stamp of what a file system says of files: sizes, times, checksums, whatever it has."""
    return _hash(repr(value).encode("utf-8", "backslashreplace"))


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()
