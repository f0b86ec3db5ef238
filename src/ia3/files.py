"""Files: found here or on the hub, read with whatever they hold, and replaced in whole or not at all."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ia3.errors import InputError, brief, excerpt, reason, shown

# Of lists and mappings inside each other, and of values when YAML's aliases are followed. What people write stays far
# below; what goes beyond would exhaust the stack or the memory of whoever walks through it.
_DEEPEST = 50
_MOST_VALUES = 1_000_000

# What to do about a file that somebody else made.
_AGAIN = "copy or download it again"


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to it at the end, removed when anything goes wrong."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are private; a checkpoint is as readable as any file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    if os.path.isfile(folder / filename):
        return str(folder / filename)
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


def locate_beside(path: str | os.PathLike, filename: str) -> str | None:
    """A file that an adapter may have beside it, found as by `locate`; None where the folder or repository has none.

    Raises:
        InputError: there is no such folder or repository, or the hub does not say whether there is such a file.
    """
    if os.path.exists(path):
        return str(Path(path, filename)) if os.path.isfile(Path(path, filename)) else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return locate(path, filename)
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            return None
        # Without a network: what the hub said when the adapter was downloaded.
        if isinstance(cause, LocalEntryNotFoundError) and not isinstance(
            try_to_load_from_cache(str(path), filename), (str, type(None))
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


def read_fields(path: Path, loader: Any, such_as: str) -> dict[str, Any]:
    """The fields of a YAML file.

    Args:
        path: the file, which is there.
        loader: PyYAML's class for it.
        such_as: names of fields, for an error message.

    Raises:
        InputError: no YAML, no mapping, or values that this program could not walk through or print.
    """
    import yaml

    with reading(path, "YAML", "correct it"):
        text = path.read_text(encoding="utf-8")
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
    from huggingface_hub import hf_hub_download

    known = {"subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download"}
    known |= {*inspect.signature(hf_hub_download).parameters} - {"repo_id", "filename"}
    unknown = [name for name in kwargs if name not in known]
    if unknown:
        raise InputError(f"Unknown arguments {shown(unknown)}; expected those of huggingface_hub.hf_hub_download.")
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

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs))
