"""Runs that can be interrupted and resumed: their settings and checkpoints."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ia3.errors import InputError, shown
from ia3.files import read_json, write_json
from ia3.processes import is_first

# The file of settings that a resumed run must share with the interrupted one.
RUN_NAME = "run.json"


class Interrupted(KeyboardInterrupt):
    """A run was interrupted during training.

    Attributes:
        checkpoint: the checkpoint to resume from; None: there is none yet.
    """

    def __init__(self, checkpoint: str | None) -> None:
        super().__init__()
        self.checkpoint = checkpoint


def settings_of(**settings: Any) -> dict[str, Any]:
    """All settings that decide a run's result, as JSON. Tasks and recipes become their fields, a list of rows becomes a
    fingerprint."""
    return {name: _stored(value) for name, value in settings.items()}


def _stored(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {name: _stored(its) for name, its in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return hashlib.sha256(json.dumps(list(value), default=str).encode()).hexdigest()
    return value


@contextmanager
def interruptible(checkpoints: Path, settings: dict[str, Any], checkpoint: str | None) -> Iterator[None]:
    """Allow a run to train and save checkpoints in a `with` block.

    Args:
        checkpoints: the folder of checkpoints.
        settings: all settings that decide the result; they are stored beside the checkpoints.
        checkpoint: the checkpoint to resume from; None: start again and delete the checkpoints of an earlier run.

    Raises:
        Interrupted: on a keyboard interrupt.
    """
    if checkpoint is None and is_first():
        shutil.rmtree(checkpoints, ignore_errors=True)
        write_json(checkpoints / RUN_NAME, settings)
    with resumable(checkpoints):
        yield


@contextmanager
def resumable(checkpoints: Path) -> Iterator[None]:
    """In a `with` block: a keyboard interrupt says what there is to go on from (`Interrupted`)."""
    from ia3.trainer import last_checkpoint

    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(last_checkpoint(checkpoints) if checkpoints.is_dir() else None) from None


def checkpoint_of(checkpoints: Path, settings: dict[str, Any], parts: str) -> str:
    """The checkpoint to resume from.

    Args:
        checkpoints: the folder of checkpoints.
        settings: all settings that decide the result.
        parts: the key of the settings of each adapter or task by name, such as "members".

    Raises:
        InputError: there is none, or it belongs to a run with other settings.
    """
    from ia3.trainer import last_checkpoint

    found = last_checkpoint(checkpoints) if checkpoints.is_dir() else None
    if found is None:
        raise InputError(
            f"Expected a checkpoint in {str(checkpoints)!r}, found none", "start anew without", argument="resume"
        )
    require_same(checkpoints / RUN_NAME, settings, parts)
    return found


def require_same(path: Path, settings: dict[str, Any], parts: str = "") -> None:
    """Raise `InputError` if the stored settings of a run differ; the arguments are those of `checkpoint_of`."""
    try:
        earlier = read_json(path)
    except InputError as error:
        raise InputError(
            f"Expected the interrupted run's settings in {str(path)!r}", "start anew without", argument="resume"
        ) from error
    different = _differences(earlier, json.loads(json.dumps(settings)), parts)
    if different:
        raise InputError(
            f"Expected the settings of the interrupted run, found another {shown(different)}",
            "repeat its settings, or start anew without",
            argument="resume",
        )


def _differences(earlier: dict[str, Any], now: dict[str, Any], parts: str) -> list[str]:
    """The names of the settings in which two runs differ."""
    different = [key for key in now if key != parts and earlier.get(key) != now[key]]
    before, after = earlier.get(parts, {}), now.get(parts, {})
    if not isinstance(before, dict) or list(before) != list(after):
        return [*different, parts]
    pairs = [(before[name] if isinstance(before[name], dict) else {}, after[name]) for name in after]
    return different + list(dict.fromkeys(key for a, b in pairs for key in b if a.get(key) != b[key]))
