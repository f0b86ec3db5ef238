"""Tasks of all kinds: which one a file describes."""

from __future__ import annotations

import os
from pathlib import Path

from ia3.task.described import ANSWER, FIELDS, read_yaml
from ia3.task.fields import Fields
from ia3.task.free_text import FreeText
from ia3.task.task import Task, embedded_tasks

AnyTask = Task | FreeText


def load_task(name: str | os.PathLike) -> AnyTask:
    """A built-in task by its name, or a task of any kind from a YAML file. Errors as of `Task.load`."""
    text = os.fspath(name)
    return Task.load(text) if text in embedded_tasks() or not os.path.isfile(text) else task_from(text)


def task_from(path: str | os.PathLike, data: bytes | None = None) -> AnyTask:
    """A task of any kind from a YAML file: with `answer` a `FreeText`, with `fields` a `Fields`, otherwise a `Task`.

    Args and errors: see `Task.from_file`.
    """
    values = read_yaml(Path(path), data)
    for field, kind in {FIELDS: Fields, ANSWER: FreeText}.items():
        if field in values:
            return kind.of_values(values, Path(path))
    return Task.from_file(path, data)
