"""One adapter that is served, and what stands beside it in its folder: `Adapter`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ia3.config import CONFIG_NAME
from ia3.errors import InputError, reason

if TYPE_CHECKING:
    from ia3.tfew.recipe import Recipe
    from ia3.tfew.task import Task

TASK_NAME, RECIPE_NAME, CALIBRATION_NAME = "task.yaml", "recipe.yaml", "calibration.json"
WEIGHTS_NAME = "adapter_model.safetensors"

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
    _lock: Any = dataclasses.field(default_factory=threading.Lock)

    def settings(self) -> Settings:
        """Read once, on a thread that may block. Raises `InputError` for damaged files."""
        with self._lock:
            if self._settings is None:
                self._settings = read_settings(self.folder)
            return self._settings


def read_settings(folder: str) -> Settings:
    """The settings in an adapter's folder. Raises `InputError` for files that are damaged or cannot be read."""
    from ia3.tfew.calibration import Calibration
    from ia3.tfew.recipe import Recipe
    from ia3.tfew.task import Task

    task, recipe = Path(folder, TASK_NAME), Path(folder, RECIPE_NAME)
    try:
        calibration = Calibration.beside(folder)
        return Settings(
            task=Task.from_file(task) if task.is_file() else None,
            recipe=Recipe.load(recipe) if recipe.is_file() else Recipe(),
            temperature=1.0 if calibration is None else calibration.temperature,
            calibrated=calibration is not None,
        )
    except (OSError, RecursionError) as error:
        raise InputError(f"The files beside this adapter cannot be read: {reason(error)}.") from error


def stamp_of(folder: str) -> tuple | None:
    """Changes when an adapter's files do; None for a folder or files that are links, or without the vectors' file."""
    if os.path.realpath(folder) != folder:
        return None
    found = {}
    for name in FILES:
        with contextlib.suppress(OSError):
            status = os.lstat(os.path.join(folder, name))
            if not stat.S_ISREG(status.st_mode):
                return None
            found[name] = status.st_ino, status.st_size, status.st_mtime_ns
    return tuple(found.items()) if CONFIG_NAME in found and WEIGHTS_NAME in found else None
