"""Write files and folders atomically, even if the process is killed."""

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

# The prefix of temporary files and folders. No other files have it.
TEMPORARY = ".ia3-"

# Without locks: a temporary file that was not changed for this many seconds has no writer any more.
_ABANDONED = 3600

# Seconds to wait for another process that puts its files into the same folder, which takes milliseconds.
_PATIENCE = 60


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path` to write to. It is renamed to `path` at the end, or removed after an error."""
    path = Path(path)
    with temporary_in(path.parent, path.name, path.suffix) as temporary:
        yield temporary
        settle(temporary)
        os.replace(temporary, path)
        flush(path.parent)


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `path` to write to. It is renamed to `path` at the end, or removed after an error.

    Raises:
        OSError: `path` is not empty.
    """
    path = Path(os.path.abspath(path))
    with temporary_in(path.parent, path.name) as temporary:
        yield temporary
        settle(temporary)
        os.rename(temporary, path)
        flush(path.parent)


def has_unfinished(folder: str | os.PathLike) -> bool:
    """Whether a folder holds unfinished files of a killed writer."""
    return os.path.isdir(folder) and any(name.startswith(TEMPORARY) for name in os.listdir(folder))


@contextmanager
def temporary_in(parent: Path, name: str, suffix: str | None = None) -> Iterator[Path]:
    """A new file (with a suffix) or folder (None) in `parent`, removed at the end unless it was renamed.

    It is locked during that time. This distinguishes it from leftovers of killed writers, which are removed first.
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
            if os.name == "posix":  # elsewhere open files cannot be renamed
                try:
                    handle = os.open(path, os.O_RDONLY)
                except FileNotFoundError:  # another writer removed it as a leftover
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
        with contextlib.suppress(OSError):  # removed meanwhile, or of another user
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
    """Lock an open file or folder until it is closed. False: it is locked already; None: locks are not supported."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a network file system
        return None
    return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from replacing files in a folder during a `with` block."""
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
    """Flush a file, or a folder and its content, to disk, and give it the permissions of ordinary files."""
    umask = os.umask(0)
    os.umask(umask)
    for one in [*path.rglob("*"), path]:
        one.chmod((0o777 if one.is_dir() else 0o666) & ~umask)
        flush(one)


def flush(path: Path) -> None:
    """Flush to disk, so that after a power failure no later step is on disk without this one."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError:  # the file system does not support it
        pass
    finally:
        os.close(handle)
