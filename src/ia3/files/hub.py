"""Find files on disk or on the Hugging Face hub."""

from __future__ import annotations

import functools
import inspect
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ia3.errors import InputError, brief, reason, shown
from ia3.files.formats import reading
from ia3.files.saves import current


@functools.cache  # caches the answer to save requests, but not an error
def _reach_hub() -> None:
    from huggingface_hub import constants, get_session

    get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)


def hub_answers() -> bool:
    """Whether the hub can be reached. If not, `local_files_only` is set; otherwise huggingface_hub would try six times
    in half a minute for each missing file, and log each failure."""
    try:
        _reach_hub()
    except Exception:  # no network, no such host, a firewall, HF_HUB_OFFLINE: each HTTP library has other errors
        return False
    return True


def locate(path: str | os.PathLike, filename: str, subfolder: str | None = None, **hub_kwargs: Any) -> str:
    """The path of a file in a local adapter folder, or downloaded from a hub repository.

    Raises:
        InputError: the folder, repository or file does not exist.
    """
    folder = Path(path, subfolder) if subfolder else Path(path)
    # For a name that no file can have, `os.path` says that it does not exist; `pathlib` raises.
    for where in (current(folder), folder):
        if os.path.isfile(where / filename):
            return str(where / filename)
    if os.path.exists(folder):
        raise InputError(f"Can't find {filename!r} in {brief(str(folder))}: expected the folder of a saved adapter.")
    if folder.parent != Path() and os.path.isdir(folder.parent):  # a mistyped local name, not a hub id
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
    except Exception as error:  # hub, network or invalid name: the user gets the same error
        hub = f"answered: {reason(error)}" if answers else "cannot be reached."
        raise InputError(
            f"Can't find {filename!r} at {brief(str(path))}: no such folder here, and the hub {hub}"
        ) from error


def locate_beside(
    path: str | os.PathLike, filename: str, subfolder: str | None = None, **hub_kwargs: Any
) -> str | None:
    """The path of an optional file beside an adapter, as `locate` finds it; None if it does not exist.

    Raises:
        InputError: the repository does not exist, or the hub does not answer.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return locate(path, filename, subfolder, **hub_kwargs)
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            return None
        # Without a network, use the hub's answer from the adapter's download.
        name = f"{subfolder}/{filename}" if subfolder else filename
        known = {key: hub_kwargs[key] for key in ("cache_dir", "revision") if hub_kwargs.get(key)}
        if isinstance(cause, LocalEntryNotFoundError) and not isinstance(
            try_to_load_from_cache(str(path), name, **known), (str, type(None))
        ):
            return None
        raise


HUB_ARGUMENTS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
"""Keyword arguments for an adapter's place on the hub."""


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for the hub, checked.

    Raises:
        InputError: `huggingface_hub.hf_hub_download` does not take an argument.
    """
    if not kwargs:
        return {}
    from huggingface_hub import hf_hub_download

    known = {*HUB_ARGUMENTS, *inspect.signature(hf_hub_download).parameters} - {"repo_id", "filename"}
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
    """Upload the files that `save` writes to a hub repository, which is created if it does not exist.

    Args:
        save: a function that writes the files to a folder.
        repo_id: owner/name.
        private: whether a new repository is private.
        token: the hub's token; None: that of the login.
        **kwargs: arguments of `huggingface_hub.upload_folder`.

    Returns:
        The URL of the commit.
    """
    from huggingface_hub import HfApi

    known = inspect.signature(HfApi.upload_folder).parameters
    unknown = [name for name in kwargs if name not in known and "kwargs" not in known]
    if unknown:  # raise before a repository is created
        raise InputError(f"Unknown arguments {shown(unknown)}; expected those of huggingface_hub.upload_folder.")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs))
