"""Files and folders that are written in whole or not at all, whoever is killed meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ia3.errors import InputError

# What is made on the way to a result is named so, and nobody else's files are.
TEMPORARY = ".ia3-"

# Without locks, what was not touched for so many seconds is no writer's any more.
_ABANDONED = 3600

# Seconds to wait for another process that puts its files into the same folder, which takes milliseconds.
_PATIENCE = 60


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to it at the end, removed when anything goes wrong."""
    path = Path(path)
    with temporary_in(path.parent, path.name, path.suffix) as temporary:
        yield temporary
        settle(temporary)
        os.replace(temporary, path)
        flush(path.parent)


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `path` to write to; renamed to it at the end, removed when anything goes wrong.

    Raises:
        OSError: `path` holds something already.
    """
    path = Path(os.path.abspath(path))
    with temporary_in(path.parent, path.name) as temporary:
        yield temporary
        settle(temporary)
        os.rename(temporary, path)
        flush(path.parent)


def has_unfinished(folder: str | os.PathLike) -> bool:
    """Whether there is a folder that a killed writer left something unfinished in."""
    return os.path.isdir(folder) and any(name.startswith(TEMPORARY) for name in os.listdir(folder))


@contextmanager
def temporary_in(parent: Path, name: str, suffix: str | None = None) -> Iterator[Path]:
    """A new file (with a suffix) or folder (None) in `parent`, removed at the end unless it has been renamed.

    It is locked for as long, which tells it from what killed writers left there under the same name; that goes first.
    """
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{TEMPORARY}{name}."
    _remove_abandoned(parent, prefix, suffix or "")
    while True:
        if suffix is None:
            path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        else:
            handle, created = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=parent)
            os.close(handle)
            path = Path(created)
        with contextlib.ExitStack() as stack:
            if os.name == "posix":  # elsewhere what is open cannot be renamed
                try:
                    handle = os.open(path, os.O_RDONLY)
                except FileNotFoundError:  # another writer took it for abandoned
                    continue
                stack.callback(os.close, handle)
                if _lock(handle) is False or not path.exists():
                    continue
            try:
                yield path
            finally:
                _remove(path)
            return


def _remove_abandoned(parent: Path, prefix: str, suffix: str) -> None:
    for name in os.listdir(parent):
        if not (name.startswith(prefix) and name.endswith(suffix)):
            continue
        path = parent / name
        with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
            handle = os.open(path, os.O_RDONLY)
            try:
                locked = _lock(handle)
                if locked or (locked is None and time.time() - path.stat().st_mtime > _ABANDONED):
                    _remove(path)
            finally:
                os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lock(handle: int) -> bool | None:
    """Lock an open file or folder until it is closed. False: another has; None: there are no locks here."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows; a network's file system
        return None
    return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within `with`, no other process puts files in place in a folder."""
    if os.name != "posix":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _PATIENCE
        while _lock(handle) is False:
            if time.monotonic() > deadline:
                raise InputError(
                    f"Expected to write into {str(folder)!r}, found that another process holds its lock; end that first."
                )
            time.sleep(0.01)
        yield
    finally:
        os.close(handle)


def settle(path: Path) -> None:
    """Let a file, or a folder and all within, be on the disk, and as readable as what is not made to be private."""
    umask = os.umask(0)
    os.umask(umask)
    for one in [*path.rglob("*"), path]:
        one.chmod((0o777 if one.is_dir() else 0o666) & ~umask)
        flush(one)


def flush(path: Path) -> None:
    """Let what was written be on the disk, so that no later step is there before it when the power fails."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError:  # a file system that cannot
        pass
    finally:
        os.close(handle)
