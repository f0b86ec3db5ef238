"""Find files on disk or on the Hugging Face hub."""

from __future__ import annotations

import functools
import inspect
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ia3.errors import InputError, brief, excerpt, reason, shown
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


def at_revision(path: str | os.PathLike) -> tuple[str, str | None]:
    """A hub id and its revision: "owner/name@v1" → "owner/name", "v1". A path that exists here, or can only be a path, has none."""
    found = re.fullmatch(r"(\w[\w.-]*(?:/[\w.-]+)*)@(\S+)", str(path))
    return (str(path), None) if found is None or os.path.exists(path) else (found[1], found[2])


def are_hub_ids(text: str) -> bool:
    """Whether a text can only be hub ids, "owner/name" or "owner/name@v1", with commas between them: there are no such paths or
    parent folders here."""
    return all(
        re.fullmatch(r"[\w.-]+/[\w.-]+(@\S+)?", path)
        and not os.path.exists(path)
        and not os.path.isdir(os.path.dirname(path.partition("@")[0]))
        for path in text.split(",")
    )


def _placed(path: str | os.PathLike, hub_kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A hub id without its revision, and the keyword arguments with it."""
    name, revision = at_revision(path)
    if revision is None:
        return name, dict(hub_kwargs)
    if hub_kwargs.get("revision") not in (None, revision):
        raise InputError(
            f"Expected one revision of {brief(name)}, found {revision!r} in its name and {hub_kwargs['revision']!r}."
        )
    return name, {**hub_kwargs, "revision": revision}


def _said_by(error: Exception) -> str:
    """What an error of huggingface_hub means for the user, without a full stop."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "the hub gives access only on request: ask on the repository's page, and log in (hf auth login)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "the hub has no such repository, or it is private: if it is yours, log in (hf auth login) or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub's repository has no such revision"
    if isinstance(error, errors.EntryNotFoundError):
        return "the hub's repository has no such file"
    if isinstance(error, errors.LocalTokenNotFoundError) or status in (401, 403):
        return "the hub refuses: log in (hf auth login) or set HF_TOKEN, with a token that may do this"
    if status is not None:
        return f"the hub answered: {reason(error)}"
    if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
        return f"the hub cannot be reached ({reason(error)})"
    return excerpt(str(error)).rstrip(".")


def locate(path: str | os.PathLike, filename: str, subfolder: str | None = None, **hub_kwargs: Any) -> str:
    """The path of a file in a local adapter folder, or downloaded from a hub repository ("owner/name", "owner/name@v1").

    Raises:
        InputError: the folder, repository, revision or file does not exist.
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

    name, hub_kwargs = _placed(path, hub_kwargs)
    answers = hub_answers()
    if not answers:
        hub_kwargs["local_files_only"] = True
    try:
        return hf_hub_download(name, filename, subfolder=subfolder, **hub_kwargs)
    except Exception as error:  # hub, network or invalid name: the user gets the same error
        hub = _said_by(error) if answers else "the hub cannot be reached"
        raise InputError(f"Can't find {filename!r} at {brief(str(path))}: no such folder here, and {hub}.") from error


def snapshot(name: str, patterns: Sequence[str], cache_dir: str | Path | None = None) -> str:
    """The folder, in huggingface_hub's cache, with files of a hub repository ("owner/name", "owner/name@v1").

    Without a network it is the one of an earlier download.

    Raises:
        InputError: the hub has no such repository or revision; or it cannot be reached, and nothing was downloaded before.
    """
    from huggingface_hub import snapshot_download

    repo_id, revision = at_revision(name)
    answers = hub_answers()
    try:
        return snapshot_download(
            repo_id, revision=revision, cache_dir=cache_dir, allow_patterns=[*patterns], local_files_only=not answers
        )
    except Exception as error:  # hub, network or invalid name: the user gets the same error
        hub = _said_by(error) if answers else "the hub cannot be reached"
        raise InputError(f"Expected a folder here or on the hub, found no {brief(name)} here, and {hub}.") from error


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
        repo_id, hub_kwargs = _placed(path, hub_kwargs)
        known = {key: hub_kwargs[key] for key in ("cache_dir", "revision") if hub_kwargs.get(key)}
        if isinstance(cause, LocalEntryNotFoundError) and not isinstance(
            try_to_load_from_cache(repo_id, name, **known), (str, type(None))
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
        The URL of the commit, or of the pull request.

    Raises:
        InputError: an unknown argument; or the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    known = inspect.signature(HfApi.upload_folder).parameters
    unknown = [name for name in kwargs if name not in known and "kwargs" not in known]
    if unknown:  # raise before a repository is created
        raise InputError(f"Unknown arguments {shown(unknown)}; expected those of huggingface_hub.upload_folder.")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if private and not api.repo_info(repo_id).private:
                raise InputError(
                    f"Expected a private repository, found that {brief(repo_id)} is public",
                    "make it private on the hub, or leave out",
                    argument="private",
                )
            branch = kwargs.get("revision")
            if branch not in (None, "main") and not kwargs.get("create_pr"):
                api.create_branch(repo_id, branch=branch, exist_ok=True)
            done = api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)
        except InputError:
            raise
        except Exception as error:  # network, hub, name or token: the user gets the same error
            raise InputError(f"Cannot upload to {brief(repo_id)}: {_said_by(error)}.") from error
    return str(getattr(done, "pr_url", None) or done)
