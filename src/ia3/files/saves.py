"""An adapter's files, replaced together: what a reader finds is always of one save."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ia3.errors import InputError, shown
from ia3.files.atomic import TEMPORARY, alone, flush, settle, temporary_in

T = TypeVar("T")

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
TORCH_WEIGHTS_NAME = "adapter_model.bin"

# The hidden folder of an adapter's files that are complete, and on their way to their places; see `replacing_adapter`.
PENDING = ".ia3-saved"
_STAGED = "save"

# Often enough for a reader whom a writer keeps overtaking.
_ATTEMPTS = 100


@contextmanager
def replacing_adapter(folder: str | os.PathLike, names: Sequence[str]) -> Iterator[Path]:
    """A hidden folder within an adapter's folder to write files to; at the end they replace those of `names`, all or none.

    Renaming the hidden folder to `PENDING` is the one step that decides. Before it the old files are there, untouched.
    After it the new ones count: `current` sends readers to them until each has its place, and where the writer was
    killed in between, the next one finishes its work.

    Why not exchange the whole folder for a new one (`renameat2`): it may be a mount point, a link, somebody's working
    directory or a container's volume, all of which would go on seeing the old one. And it holds what is not ours, such as
    tokenizers, checkpoints, logs and other adapters, which would have to move one by one while others use it.

    Programs that do not know of `PENDING`, such as PEFT, see the files at their places alone. For them a config that
    changes goes before the other files change and comes back after them: they find all old files, all new ones, or no
    adapter, but no new file beside an old one.

    Args:
        folder: made when it is not there.
        names: what belongs to an adapter. A file that is not written is removed; others that are written join them.

    Raises:
        InputError: another process does not let go of the folder, or one of `names` is a folder.
    """
    folder = Path(folder)
    with temporary_in(folder, _STAGED) as staged:
        with alone(folder):
            _finish(folder, names)
        yield staged
        folders = [name for name in dict.fromkeys([*names, *os.listdir(staged)]) if (folder / name).is_dir()]
        if folders:
            raise InputError(f"Expected a file, or none, by the name of {shown(folders)} in {folder}, found a folder.")
        take_over(staged, folder, names)


def take_over(source: str | os.PathLike, folder: str | os.PathLike, names: Sequence[str]) -> None:
    """As `replacing_adapter`, with the files of another folder of the same file system, which goes."""
    folder = Path(folder)
    settle(Path(source))
    with alone(folder):
        _finish(folder, names)
        os.rename(source, folder / PENDING)
        flush(folder)
        _put_in_place(folder, names)


def _finish(folder: Path, names: Sequence[str]) -> None:
    """Do what a killed writer had left to do in a folder."""
    if current(folder) != folder:
        _put_in_place(folder, names)
    elif (folder / PENDING).exists():  # somebody else, such as PEFT, has saved here since
        shutil.rmtree(folder / PENDING)


def _put_in_place(folder: Path, names: Sequence[str]) -> None:
    """Let the files in `PENDING` take their places; those that have theirs already are left."""
    pending, links = folder / PENDING, {}
    for name in os.listdir(pending):
        source, target, link = pending / name, folder / name, pending / f"{TEMPORARY}{name}"
        if name.startswith(TEMPORARY) or (target.exists() and target.samefile(source)):
            continue
        link.unlink(missing_ok=True)
        try:
            os.link(source, link)  # so that the one in PENDING stays until all are in place
        except OSError:  # a file system without hard links
            shutil.copy2(source, link)
            flush(link)
        links[name] = link
    # As near to each other as can be, and the config last.
    core = (WEIGHTS_NAME, TORCH_WEIGHTS_NAME, CONFIG_NAME)
    for name in sorted({*names, *links}, key=lambda name: core.index(name) if name in core else -1):
        if name == core[0] and not _same(pending / CONFIG_NAME, folder / CONFIG_NAME):
            (folder / CONFIG_NAME).unlink(missing_ok=True)
        if name in links:
            os.replace(links[name], folder / name)
        elif not (pending / name).exists():
            (folder / name).unlink(missing_ok=True)
    flush(folder)
    with temporary_in(folder, _STAGED) as gone:
        gone.rmdir()
        os.rename(pending, gone)
        flush(folder)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.read_bytes() == other.read_bytes()
    except FileNotFoundError:
        return False


def current(folder: str | os.PathLike) -> Path:
    """Where the files of an adapter's folder are: in it, or until they have their places in `PENDING` within it."""
    pending = os.path.join(folder, PENDING)
    if not os.path.isdir(pending):
        return Path(folder)
    with contextlib.suppress(OSError):  # no config in place: it is on its way
        saved, found = (os.stat(os.path.join(where, CONFIG_NAME)) for where in (pending, folder))
        # Since a writer was killed, a program that knows nothing of PENDING has saved.
        if found.st_mtime_ns > saved.st_mtime_ns:
            return Path(folder)
    return Path(pending)


def version(folder: str | os.PathLike) -> tuple[Path, tuple[int, ...] | None]:
    """What tells one save into an adapter's folder from the next: where its files are, and its config's stamp."""
    where = current(folder)
    try:
        status = os.stat(where / CONFIG_NAME)  # which is a new file each time
    except OSError:
        return where, None
    return where, (status.st_ino, status.st_size, status.st_mtime_ns)


def read_whole(folder: str | os.PathLike, read: Callable[[], T]) -> T:
    """What `read` makes of an adapter's files, all of one save: it is called again when they are replaced meanwhile.

    Args:
        folder: the adapter's.
        read: opens the files where `current` says that they are.
    """
    for _ in range(_ATTEMPTS):
        before = version(folder)
        try:
            found = read()
        except Exception:
            if version(folder) == before:
                raise
        else:
            if version(folder) == before:
                return found
    raise InputError(f"The files in {os.fspath(folder)!r} are written again and again; read them when that has ended.")


def is_unused(folder: str | os.PathLike) -> bool:
    """Whether a folder is not there, or holds nothing but what killed writers left before they had all of it."""
    path = Path(folder)
    return not os.path.lexists(path) or (
        path.is_dir() and all(name.startswith(TEMPORARY) and name != PENDING for name in os.listdir(path))
    )
