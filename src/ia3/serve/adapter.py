"""One adapter that is served, and what stands beside it in its folder: `Adapter`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from ia3.adapter.config import CONFIG_NAME
from ia3.adapter.stored import CALIBRATION_NAME, RECIPE_NAME, TASK_NAME
from ia3.errors import InputError, reason
from ia3.files import WEIGHTS_NAME, current
from ia3.folder import AdapterFolder

if TYPE_CHECKING:
    from ia3.task.task import Task
    from ia3.training.recipe import Recipe

FILES = {WEIGHTS_NAME: True, CONFIG_NAME: True, TASK_NAME: False, RECIPE_NAME: False, CALIBRATION_NAME: False}
"""Names of an adapter's files, and whether they have to be there."""


class Settings(NamedTuple):
    """What stands beside an adapter.

    Attributes:
        task: None: it is for completions only.
        recipe: the paper's, where there is none.
        temperature: of its calibration; 1 where there is none.
        calibrated: whether there is one.
    """

    task: Task | None
    recipe: Recipe
    temperature: float
    calibrated: bool


@dataclasses.dataclass(eq=False)
class Adapter:
    """One content of an adapter; when its files are replaced, another one takes its name.

    Attributes:
        name: what clients call it.
        key: what the engine calls it.
        folder: where it is.
        stamp: changes when its files do.
        users: requests that are under way with it.
        retired: it is served no more; the engine forgets it when its last user has gone.
    """

    name: str
    key: str
    folder: str
    stamp: tuple
    users: int = 0
    retired: bool = False
    _settings: Settings | None = None
    _acts_from: str | None = None
    _lock: Any = dataclasses.field(default_factory=threading.Lock)

    def settings(self) -> Settings:
        """Read once, on a thread that may block. Raises `InputError` for damaged files."""
        with self._lock:
            if self._settings is None:
                self._settings = read_settings(self.folder)
            return self._settings

    def acts_from(self) -> str:
        """Where its vectors act, see `IA3Config`. Read as `settings` are."""
        with self._lock:
            if self._acts_from is None:
                self._acts_from = AdapterFolder(self.folder).config.acts_from
            return self._acts_from


def read_settings(folder: str) -> Settings:
    """The settings in an adapter's folder. Raises `InputError` for files that are damaged or cannot be read."""
    try:
        found = AdapterFolder(folder)
        return Settings(found.task, found.recipe, found.temperature, calibrated=found.calibration is not None)
    except (OSError, RecursionError) as error:
        raise InputError(f"The files beside this adapter cannot be read: {reason(error)}.") from error


def stamp_of(folder: str) -> tuple | None:
    """Changes when an adapter's files do; None for a folder or files that are links, or without the vectors' file."""
    if os.path.realpath(folder) != folder:
        return None
    found, where = {}, current(folder)
    for name in FILES:
        with contextlib.suppress(OSError):
            status = os.lstat(where / name)
            if not stat.S_ISREG(status.st_mode):
                return None
            found[name] = status.st_ino, status.st_size, status.st_mtime_ns
    return tuple(found.items()) if CONFIG_NAME in found and WEIGHTS_NAME in found else None
