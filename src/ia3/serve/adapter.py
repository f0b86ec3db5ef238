"""A served adapter, and the other files of its folder: `Adapter`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from ia3.adapter.config import CONFIG_NAME
from ia3.adapter.stored import (
    CALIBRATION_NAME,
    HEAD_NAME,
    OPINIONS_NAME,
    RECIPE_NAME,
    SENTENCES_NAME,
    TASK_NAME,
    WORDS_NAME,
)
from ia3.errors import InputError, about, reason
from ia3.files import WEIGHTS_NAME, current
from ia3.folder import AdapterFolder
from ia3.opinions.sentences import Sentences

if TYPE_CHECKING:
    from ia3.opinions.opinions import Opinions
    from ia3.task.task import Task
    from ia3.training.recipe import Recipe

FILES = {
    WEIGHTS_NAME: True,
    CONFIG_NAME: True,
    TASK_NAME: False,
    RECIPE_NAME: False,
    OPINIONS_NAME: False,
    HEAD_NAME: False,
    SENTENCES_NAME: False,
    WORDS_NAME: False,
    CALIBRATION_NAME: False,
}
"""Name of an adapter's file → whether it is required."""


class Settings(NamedTuple):
    """The settings in an adapter's folder.

    Attributes:
        task: the adapter's task; None: the adapter is only for completions.
        recipe: the adapter's recipe; the paper's if there is none.
        temperature: the calibration's temperature; 1 if there is none.
        calibrated: whether the adapter has a calibration.
        opinions: what answers, and how much each part counts.
    """

    task: Task | None
    recipe: Recipe
    temperature: float
    calibrated: bool
    opinions: Opinions


@dataclasses.dataclass(eq=False)
class Adapter:
    """One version of an adapter. If its files are replaced, a new object takes its name.

    Attributes:
        name: its name for clients.
        key: its name for the engine.
        folder: its folder.
        stamp: changes when its files change.
        users: the number of running requests that use it.
        retired: it is no longer served; the engine drops it after its last request.
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
        """The settings, read once, on a thread that may block. Raises `InputError` for damaged files."""
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
    """The settings in an adapter's folder. Raises `InputError` for damaged or unreadable files."""
    try:
        found = AdapterFolder(folder)
        calibrated = found.calibration is not None
        if found.opinions.encoder is not None:
            # Here, where it may take long, and not on the model's thread, where all wait.
            with about("The sentence encoder"):
                Sentences.found(found.opinions.encoder)
        return Settings(found.task, found.recipe, found.temperature, calibrated, found.opinions)
    except (OSError, RecursionError) as error:
        raise InputError(f"The files beside this adapter cannot be read: {reason(error)}.") from error


def stamp_of(folder: str) -> tuple | None:
    """A stamp that changes with an adapter's files; None if the folder or files are links, or the vectors are
    missing."""
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
