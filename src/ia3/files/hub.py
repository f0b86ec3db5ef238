"""Files found here or on the Hugging Face hub."""

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


HUB_ARGUMENTS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
"""Of a call's keyword arguments, those that say where on the hub an adapter is."""


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments that say where on the hub something is.

    Raises:
        InputError: one that `huggingface_hub.hf_hub_download` does not take.
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
