"""Files: found here or on the hub, and replaced in whole or not at all."""

from __future__ import annotations

import functools
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ia3.errors import InputError, reason, shown


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
    if (folder / filename).is_file():
        return str(folder / filename)
    if folder.exists():
        raise InputError(f"Can't find {filename!r} in {str(folder)!r}: expected the folder of a saved adapter.")
    if folder.parent != Path() and folder.parent.is_dir():  # a name mistyped beside others, no hub repository
        others = sorted(child.name for child in folder.parent.iterdir() if child.is_dir())
        raise InputError(f"Can't find the folder {folder.name!r} in {str(folder.parent)!r}; there are {shown(others)}.")
    from huggingface_hub import hf_hub_download

    answers = hub_answers()
    if not answers:
        hub_kwargs["local_files_only"] = True
    try:
        return hf_hub_download(str(path), filename, subfolder=subfolder, **hub_kwargs)
    except Exception as error:  # whatever the hub, the network or the name's form raised, the user's answer is the same
        hub = f"answered: {reason(error)}" if answers else "cannot be reached."
        raise InputError(f"Can't find {filename!r} at {str(path)!r}: no such folder here, and the hub {hub}") from error


def locate_beside(path: str | os.PathLike, filename: str) -> str | None:
    """A file that an adapter may have beside it, found as by `locate`; None where the folder or repository has none.

    Raises:
        InputError: there is no such folder or repository, or the hub does not say whether there is such a file.
    """
    if Path(path).exists():
        return str(Path(path, filename)) if Path(path, filename).is_file() else None
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


def read_fields(path: Path, loader: Any, such_as: str) -> dict[str, Any]:
    """The fields of a YAML file.

    Args:
        path: the file, which is there.
        loader: PyYAML's class for it.
        such_as: names of fields, for an error message.

    Raises:
        InputError: no YAML, or no mapping.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"Expected UTF-8 text in {path}: {error.reason} at byte {error.start}.") from error
    try:
        values = yaml.load(text, Loader=loader)
    except Exception as error:  # a date that is none or a tag of another kind fails in its own way
        raise InputError(f"Expected YAML in {path}: {' '.join(str(error).split()) or reason(error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"Expected fields such as {such_as} in {path}, found {type(values).__name__}.")
    return values


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
