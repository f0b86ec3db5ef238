"""Files: found here or on the hub, read with whatever they hold, and replaced in whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ia3.errors import InputError, brief, excerpt, reason, shown

# Of lists and mappings inside each other, and of values when YAML's aliases are followed. What people write stays far
# below; what goes beyond would exhaust the stack or the memory of whoever walks through it.
_DEEPEST = 50
_MOST_VALUES = 1_000_000

# What to do about a file that somebody else made.
_AGAIN = "copy or download it again"

T = TypeVar("T")

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
TORCH_WEIGHTS_NAME = "adapter_model.bin"

# What this module makes on the way to a result is named so, and nobody else's files are.
TEMPORARY = ".ia3-"

# The hidden folder of an adapter's files that are complete, and on their way to their places; see `replacing_adapter`.
PENDING = ".ia3-saved"
_STAGED = "save"

# Without locks, what was not touched for so many seconds is no writer's any more.
_ABANDONED = 3600

# Seconds to wait for another process that puts its files into the same folder, which takes milliseconds.
_PATIENCE = 60

# Often enough for a reader whom a writer keeps overtaking.
_ATTEMPTS = 100


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to it at the end, removed when anything goes wrong."""
    path = Path(path)
    with _temporary(path.parent, path.name, path.suffix) as temporary:
        yield temporary
        _settle(temporary)
        os.replace(temporary, path)
        _flush(path.parent)


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `path` to write to; renamed to it at the end, removed when anything goes wrong.

    Raises:
        OSError: `path` holds something already.
    """
    path = Path(os.path.abspath(path))
    with _temporary(path.parent, path.name) as temporary:
        yield temporary
        _settle(temporary)
        os.rename(temporary, path)
        _flush(path.parent)


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
    with _temporary(folder, _STAGED) as staged:
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
    _settle(Path(source))
    with alone(folder):
        _finish(folder, names)
        os.rename(source, folder / PENDING)
        _flush(folder)
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
            _flush(link)
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
    _flush(folder)
    with _temporary(folder, _STAGED) as gone:
        gone.rmdir()
        os.rename(pending, gone)
        _flush(folder)


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


def has_unfinished(folder: str | os.PathLike) -> bool:
    """Whether there is a folder that a killed writer left something unfinished in."""
    return os.path.isdir(folder) and any(name.startswith(TEMPORARY) for name in os.listdir(folder))


@contextmanager
def _temporary(parent: Path, name: str, suffix: str | None = None) -> Iterator[Path]:
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


def _settle(path: Path) -> None:
    """Let a file, or a folder and all within, be on the disk, and as readable as what is not made to be private."""
    umask = os.umask(0)
    os.umask(umask)
    for one in [*path.rglob("*"), path]:
        one.chmod((0o777 if one.is_dir() else 0o666) & ~umask)
        _flush(one)


def _flush(path: Path) -> None:
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


@functools.cache  # an answer is remembered, so that not each of an adapter's files costs a request more; an error is not
def _reach_hub() -> None:
    from huggingface_hub import constants, get_session

    get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)


def hub_answers() -> bool:
    """Whether the hub can be reached. Where it cannot, huggingface_hub would ask six times in half a minute for each
    file that is not on this machine, and log each failure; `local_files_only` spares that."""
    try:
        _reach_hub()
    except Exception:  # no network, no such host, a firewall, HF_HUB_OFFLINE: as the HTTP library of the day says it
        return False
    return True


def locate(path: str | os.PathLike, filename: str, subfolder: str | None = None, **hub_kwargs: Any) -> str:
    """The file of a local adapter folder, or of a hub repository, downloaded.

    Raises:
        InputError: there is no such folder, repository or file.
    """
    folder = Path(path, subfolder) if subfolder else Path(path)
    # `os.path` takes a name that no file can have for one that is not there; `pathlib` raises.
    for where in (current(folder), folder):
        if os.path.isfile(where / filename):
            return str(where / filename)
    if os.path.exists(folder):
        raise InputError(f"Can't find {filename!r} in {brief(str(folder))}: expected the folder of a saved adapter.")
    if folder.parent != Path() and os.path.isdir(folder.parent):  # a name mistyped beside others, no hub repository
        with reading(folder.parent, "a folder of adapters"):
            others = sorted(child.name for child in folder.parent.iterdir() if child.is_dir())
        raise InputError(
            f"Can't find the folder {brief(folder.name)} in {brief(str(folder.parent))}; there are {shown(others)}."
        )
    from huggingface_hub import hf_hub_download

    answers = hub_answers()
    if not answers:
        hub_kwargs["local_files_only"] = True
    try:
        return hf_hub_download(str(path), filename, subfolder=subfolder, **hub_kwargs)
    except Exception as error:  # whatever the hub, the network or the name's form raised, the user's answer is the same
        hub = f"answered: {reason(error)}" if answers else "cannot be reached."
        raise InputError(
            f"Can't find {filename!r} at {brief(str(path))}: no such folder here, and the hub {hub}"
        ) from error


def locate_beside(
    path: str | os.PathLike, filename: str, subfolder: str | None = None, **hub_kwargs: Any
) -> str | None:
    """A file that a hub repository may have beside an adapter, found as by `locate`; None where it has none.

    Raises:
        InputError: there is no such repository, or the hub does not say whether there is such a file.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return locate(path, filename, subfolder, **hub_kwargs)
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            return None
        # Without a network: what the hub said when the adapter was downloaded.
        name = f"{subfolder}/{filename}" if subfolder else filename
        known = {key: hub_kwargs[key] for key in ("cache_dir", "revision") if hub_kwargs.get(key)}
        if isinstance(cause, LocalEntryNotFoundError) and not isinstance(
            try_to_load_from_cache(str(path), name, **known), (str, type(None))
        ):
            return None
        raise


@contextmanager
def reading(path: str | os.PathLike, expected: str, advice: str = _AGAIN) -> Iterator[None]:
    """Within `with`, content that may come from anywhere is read; whatever its reader raises becomes an `InputError`.

    A damaged or hostile file makes a reader fail in ways of its own: `RecursionError` for what is nested too deep,
    `OverflowError` for a number, `MemoryError` for a size, `KeyError` for a field. To the user they are one: the file
    is not what it should be. An `InputError` raised inside passes as it is.

    Args:
        path: the file or folder, for the message.
        expected: what it should be.
        advice: what to do about it.
    """
    where = excerpt(os.fspath(path))
    try:
        yield
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"Expected UTF-8 text in {where}: {error.reason} at byte {error.start}.") from error
    except OSError as error:
        raise InputError(f"Cannot read {where}: {error.strerror or reason(error)}; expected {expected}.") from error
    except Exception as error:
        raise InputError(f"Expected {expected} in {where}: {reason(error)}; {advice}.") from error


def parse_json(data: bytes | str, path: str | os.PathLike, advice: str = _AGAIN) -> Any:
    """What JSON says.

    Args:
        data: the text.
        path: where it stands, for an error message.
        advice: what to do about it.

    Raises:
        InputError: no JSON, or values that this program could not walk through or print.
    """
    with reading(path, "JSON", advice):
        text = data if isinstance(data, str) else data.decode("utf-8")
        values = json.loads(text)
        # All are rare, and this is fast.
        if text.count("[") + text.count("{") > _DEEPEST or re.search(r"\\u[dD][89a-fA-F]|\d{300}", text):
            _measure(values, {})
        return values


def read_json(path: str | os.PathLike, advice: str = _AGAIN) -> dict[str, Any]:
    """The fields of a JSON file. Raises `InputError` as `parse_json` does, and when there is no object."""
    with reading(path, "JSON", advice):
        data = Path(path).read_bytes()
    values = parse_json(data, path, advice)
    if not isinstance(values, dict):
        raise InputError(
            f"Expected a JSON object in {excerpt(os.fspath(path))}, found {type(values).__name__}; {advice}."
        )
    return values


def read_fields(path: Path, loader: Any, such_as: str, data: bytes | None = None) -> dict[str, Any]:
    """The fields of a YAML file.

    Args:
        path: the file, which is there.
        loader: PyYAML's class for it.
        such_as: names of fields, for an error message.
        data: what was read from it already; None: read it.

    Raises:
        InputError: no YAML, no mapping, or values that this program could not walk through or print.
    """
    import yaml

    with reading(path, "YAML", "correct it"):
        text = (path.read_bytes() if data is None else data).decode("utf-8")
        try:
            values = yaml.load(text, Loader=loader)
        except yaml.YAMLError as error:  # which says in its last lines what is wrong, and where
            raise ValueError(" ".join(str(error).split())) from error
        if _measure(values, {})[0] > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES} values, aliases followed")
    if not isinstance(values, dict):
        raise InputError(f"Expected fields such as {such_as} in {excerpt(str(path))}, found {type(values).__name__}.")
    return values


def _measure(value: Any, known: dict[int, tuple[int, int]], depth: int = 0) -> tuple[int, int]:
    """How many values a value holds, itself included, and in how many levels.

    Args:
        value: of JSON or YAML, in which aliases make one list stand in many places, or within itself.
        known: what has been found, by the object's identity.
        depth: in how many levels it stands.

    Raises:
        ValueError: there are too many levels, or a text holds half a surrogate pair, which no file or terminal takes.
        OverflowError: an integer has hundreds of digits.
    """
    if isinstance(value, str):
        if not value.isascii():
            value.encode()
        return 1, 0
    if isinstance(value, int):
        float(value)
    if not isinstance(value, (dict, list, tuple, set)):
        return 1, 0
    count, levels = known.get(id(value), (0, 0))
    if depth + max(levels, 1) > _DEEPEST:
        raise ValueError(f"more than {_DEEPEST} levels of lists and mappings")
    if not count:
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        found = [_measure(part, known, depth + 1) for part in parts]
        count, levels = 1 + sum(part[0] for part in found), 1 + max((part[1] for part in found), default=0)
        known[id(value)] = count, levels
    return count, levels


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments that say where on the hub something is.

    Raises:
        InputError: one that `huggingface_hub.hf_hub_download` does not take.
    """
    if not kwargs:
        return {}
    from huggingface_hub import hf_hub_download

    known = {"subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download"}
    known |= {*inspect.signature(hf_hub_download).parameters} - {"repo_id", "filename"}
    unknown = [name for name in kwargs if name not in known]
    if unknown:
        raise InputError(
            f"Unknown arguments {shown(unknown)}; expected what the documentation of this function names, or what "
            f"huggingface_hub.hf_hub_download takes (revision, token, cache_dir, …)."
        )
    return {name: value for name, value in kwargs.items() if value is not None}


def upload(
    save: Callable[[str], Any], repo_id: str, private: bool | None = None, token: str | None = None, **kwargs: Any
) -> str:
    """Upload to a hub repository, made when it is not there, what `save` writes into a folder.

    Args:
        save: takes the folder.
        repo_id: owner/name.
        private: for a new repository.
        token: of the hub; None: the one that is logged in.
        **kwargs: as of `huggingface_hub.upload_folder`.

    Returns:
        The commit's address.
    """
    from huggingface_hub import HfApi

    known = inspect.signature(HfApi.upload_folder).parameters
    unknown = [name for name in kwargs if name not in known and "kwargs" not in known]
    if unknown:  # before a repository is made
        raise InputError(f"Unknown arguments {shown(unknown)}; expected those of huggingface_hub.upload_folder.")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs))
