"""Replace an adapter's files together, so that readers always find the files of one save."""

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

# The hidden folder of complete files that are not in their places yet; see `replacing_adapter`.
PENDING = ".ia3-saved"
_STAGED = "save"

# Number of attempts of a reader while writers keep replacing the files.
_ATTEMPTS = 100


@contextmanager
def replacing_adapter(folder: str | os.PathLike, names: Sequence[str]) -> Iterator[Path]:
    """A hidden folder in an adapter's folder to write files to. At the end they replace the files of `names`, all or
    none.

    One step decides: renaming the hidden folder to `PENDING`. Before it, the old files are valid and unchanged. After
    it,
    the new files are valid: `current` directs readers to them until each is in its place. If the writer is killed in
    between, the next writer finishes its work.

    Why not replace the whole folder (`renameat2`)? It may be a mount point, a link, a working directory or a
    container's volume, which would still show the old folder. And it holds other files, such as tokenizers,
    checkpoints, logs and other adapters, which would have to move one by one while they are in use.

    Programs that do not know `PENDING`, such as PEFT, see only the files in their places. For them, a changed config is
    removed before the other files change and appears after them. They find all old files, all new files, or no adapter,
    but never a mixture.

    Args:
        folder: created if it does not exist.
        names: the names of an adapter's files. Those that are not written are removed; other written files are added.

    Raises:
        InputError: another process keeps the folder locked, or one of `names` is a folder.
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
    """The same as `replacing_adapter`, with the files of another folder on the same file system, which is removed."""
    folder = Path(folder)
    settle(Path(source))
    with alone(folder):
        _finish(folder, names)
        os.rename(source, folder / PENDING)
        flush(folder)
        _put_in_place(folder, names)


def _finish(folder: Path, names: Sequence[str]) -> None:
    """Finish the work of a killed writer in a folder."""
    if current(folder) != folder:
        _put_in_place(folder, names)
    elif (folder / PENDING).exists():  # another program, such as PEFT, has saved here since
        shutil.rmtree(folder / PENDING)


def _put_in_place(folder: Path, names: Sequence[str]) -> None:
    """Move the files in `PENDING` to their places, except those that are there already."""
    pending, links = folder / PENDING, {}
    for name in os.listdir(pending):
        source, target, link = pending / name, folder / name, pending / f"{TEMPORARY}{name}"
        if name.startswith(TEMPORARY) or (target.exists() and target.samefile(source)):
            continue
        link.unlink(missing_ok=True)
        try:
            os.link(source, link)  # so that the file in PENDING stays until all are in place
        except OSError:  # a file system without hard links
            shutil.copy2(source, link)
            flush(link)
        links[name] = link
    # As quickly as possible, and the config last.
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
    """The folder with an adapter's valid files: its folder, or `PENDING` in it until they are in their places."""
    pending = os.path.join(folder, PENDING)
    if not os.path.isdir(pending):
        return Path(folder)
    with contextlib.suppress(OSError):  # without a config in its place, PENDING is valid
        saved, found = (os.stat(os.path.join(where, CONFIG_NAME)) for where in (pending, folder))
        # After a writer was killed, a program that does not know PENDING has saved.
        if found.st_mtime_ns > saved.st_mtime_ns:
            return Path(folder)
    return Path(pending)


def version(folder: str | os.PathLike) -> tuple[Path, tuple[int, ...] | None]:
    """An identifier of a save in an adapter's folder: the place of its files, and its config's stamp."""
    where = current(folder)
    try:
        status = os.stat(where / CONFIG_NAME)  # each save makes a new file
    except OSError:
        return where, None
    return where, (status.st_ino, status.st_size, status.st_mtime_ns)


def read_whole(folder: str | os.PathLike, read: Callable[[], T]) -> T:
    """The result of `read` for an adapter's files, all of one save. It is called again if they are replaced meanwhile.

    Args:
        folder: the adapter's folder.
        read: reads the files in the folder that `current` returns.
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
    """Whether a folder does not exist, or holds only incomplete files of killed writers."""
    path = Path(folder)
    return not os.path.lexists(path) or (
        path.is_dir() and all(name.startswith(TEMPORARY) and name != PENDING for name in os.listdir(path))
    )
