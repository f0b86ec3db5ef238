"""The adapter that training starts from (`Recipe.init`): `Start`."""

from __future__ import annotations

import functools
from pathlib import Path

from ia3.adapter.stored import SEEN, TASK_NAME, StoredAdapter
from ia3.errors import InputError
from ia3.task.candidates import in_words
from ia3.task.task import Row, Task
from ia3.task.template import verbatim


class Start:
    """What is known of the training of an adapter that another training starts from.

    Args:
        path: its folder or hub id.
    """

    def __init__(self, path: str) -> None:
        self.stored = StoredAdapter(path)

    @functools.cached_property
    def task(self) -> Task | None:
        """Its task; None if it has none, such as an adapter of ia3 pretrain."""
        data = self.stored.text(TASK_NAME)
        return None if data is None else Task.from_file(Path(self.stored.path, TASK_NAME), data)

    @functools.cached_property
    def _seen(self) -> set[str]:
        return set(self.stored.metrics.get(SEEN, []))

    def has_seen(self, row: Row) -> bool:
        """Whether it was trained on a row, in the words of its own task."""
        task = self.task
        if task is None or not self._seen or not row.keys() >= {*task.columns}:
            return False
        try:
            return task.fingerprint(row) in self._seen
        except InputError:  # its task cannot use the row
            return False

    def worded(self, task: Task) -> Task | None:
        """A task without a wording in the words that the adapter knows; None if it was trained on another task.

        Vectors act on a prompt that they have learned with. The task is the same one if it has all labels of the adapter's, and
        its columns. A new label, and one whose answer text was given, has the task's answer text.
        """
        known = self.task
        if not task.candidates or known is None or known.labels is None or task.labels is None:
            return None
        if not {*known.labels} <= {*task.labels} or not {*known.columns} <= {*task.columns}:
            return None
        templates = []
        for number, template in enumerate(known.templates):
            choices = _answers(task, known.choices_of(number))
            templates.append({**template.model_dump(), "choices": choices})
        fields = {"separator": known.separator, "truncate": known.truncate}
        return Task.create({**task.model_dump(), **fields, "choices": templates[0]["choices"], "templates": templates})


def _answers(task: Task, known: object) -> dict[str, str]:
    """Label → answer text, for a task whose other labels have known ones."""
    assert isinstance(known, dict) and isinstance(task.choices, dict)
    # Labels in words, as the candidates of `Task.infer` have them.
    words = all(text == verbatim(in_words(label)) for label, text in known.items())
    found = {}
    for label, text in task.choices.items():
        usual = text == verbatim(label.replace("_", " ").strip())
        found[label] = known.get(label, verbatim(in_words(label)) if words else text) if usual else text
    return found
