"""Runs that can be interrupted: the checkpoint to go on from, and whether it is of the same run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ia3.cli.results import write_json
from ia3.errors import InputError, shown
from ia3.files import read_json

# Settings that a resumed run must share with the one that was interrupted.
RUN_NAME = "run.json"


def fingerprint(rows: Sequence[Any]) -> str:
    """What differs when rows do."""
    return hashlib.sha256(json.dumps(list(rows), default=str).encode()).hexdigest()


def begin(checkpoints: Path, settings: dict[str, Any]) -> None:
    """Forget the checkpoints of an earlier run, and store the settings of this one."""
    shutil.rmtree(checkpoints, ignore_errors=True)
    write_json(checkpoints / RUN_NAME, settings)


def checkpoint_of(checkpoints: Path, settings: dict[str, Any], parts: str) -> str:
    """The checkpoint to go on from.

    Args:
        checkpoints: their folder.
        settings: all that decides the result.
        parts: the one of them that holds settings by name, such as "members".

    Raises:
        InputError: there is none, or it is of a run with other settings.
    """
    from ia3.trainer import last_checkpoint

    found = last_checkpoint(checkpoints) if checkpoints.is_dir() else None
    if found is None:
        raise InputError(f"Expected a checkpoint in {str(checkpoints)!r}, found none; start anew without --resume.")
    require_same(checkpoints / RUN_NAME, settings, parts)
    return found


def require_same(path: Path, settings: dict[str, Any], parts: str = "") -> None:
    """Refuse to go on with a run whose stored settings are others (`InputError`); arguments as of `checkpoint_of`."""
    try:
        earlier = read_json(path)
    except InputError as error:
        raise InputError(
            f"Expected the interrupted run's settings in {str(path)!r}; start anew without --resume."
        ) from error
    different = _differences(earlier, json.loads(json.dumps(settings)), parts)
    if different:
        raise InputError(
            f"Expected the settings of the interrupted run, found another {shown(different)}; repeat its options, or "
            f"start anew without --resume."
        )


def _differences(earlier: dict[str, Any], now: dict[str, Any], parts: str) -> list[str]:
    """The settings in which two runs differ, by name."""
    different = [key for key in now if key != parts and earlier.get(key) != now[key]]
    before, after = earlier.get(parts, {}), now.get(parts, {})
    if not isinstance(before, dict) or list(before) != list(after):
        return [*different, parts]
    pairs = [(before[name] if isinstance(before[name], dict) else {}, after[name]) for name in after]
    return different + list(dict.fromkeys(key for a, b in pairs for key in b if a.get(key) != b[key]))


def say_interrupted(checkpoints: Path) -> None:
    """Say how to go on."""
    from ia3.trainer import last_checkpoint

    whole = last_checkpoint(checkpoints)
    way = (
        f"go on from {whole} with the same command and --resume" if whole else "start again: there is no checkpoint yet"
    )
    typer.echo(f"ia3: interrupted; {way}.", err=True)
