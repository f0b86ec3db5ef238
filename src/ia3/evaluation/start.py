"""The adapter that training starts from (`Recipe.init`): `Start`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ia3.adapter.pretrained import HEADED, task_type
from ia3.adapter.stored import SEEN, TASK_NAME, StoredAdapter, Tensors
from ia3.errors import InputError
from ia3.scoring.family import base_of
from ia3.task.candidates import in_words
from ia3.task.task import Row, Task
from ia3.task.template import verbatim

if TYPE_CHECKING:
    import torch

    from ia3.adapter.model import IA3Model


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

    def load(self, model: IA3Model, name: str) -> None:
        """Add the adapter to a model, to train it on. If it has a head for other labels than the model, the rows of the labels that
        both have stay, and others begin at 0."""
        places = getattr(base_of(model).config, "label2id", None)
        stored = self.stored
        if task_type(base_of(model)) in HEADED and self.task is not None and self.task.labels is not None and places:
            before = sorted(self.task.labels)
            if before != sorted(places):
                stored = _Relabelled(self.stored.path)
                stored.rows = [
                    before.index(label) if label in before else None for label in sorted(places, key=places.get)
                ]
                stored.before = len(before)
        model.load_adapter(stored, name, is_trainable=True)

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
        answers = [_answers(task, known.choices_of(number)) for number in range(len(known.templates))]
        templates = [
            {**template.model_dump(), "choices": None if own == answers[0] else own}
            for template, own in zip(known.templates, answers, strict=True)
        ]
        fields = {"separator": known.separator, "truncate": known.truncate, "choices": answers[0]}
        return Task.create({**task.model_dump(), **fields, "templates": templates})


class _Relabelled(StoredAdapter):
    """An adapter whose head has other labels than the model that it is loaded into.

    Attributes:
        rows: for each label of the model, the row of the stored head; None: there is none.
        before: the number of labels of the stored head.
    """

    rows: Sequence[int | None]
    before: int

    def vectors(self, pickled: bool = True) -> tuple[Tensors, dict[str, str]]:
        """The tensors, those of the head with the model's labels."""
        tensors, header = super().vectors(pickled)
        return {
            name: value if "ia3_l" in name or value.shape[0] != self.before else self._moved(value)
            for name, value in tensors.items()
        }, header

    def _moved(self, value: torch.Tensor) -> torch.Tensor:
        made = value.new_zeros((len(self.rows), *value.shape[1:]))
        for row, old in enumerate(self.rows):
            if old is not None:
                made[row] = value[old]
        return made


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
