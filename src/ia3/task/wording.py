"""A row rendered by a template: `Wording`."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ia3.errors import InputError, about, brief, shown
from ia3.task.rows import as_row
from ia3.task.template import Row, answers_of, is_missing, require

if TYPE_CHECKING:
    from ia3.task.task import Task


class Wording:
    """A row rendered by one of its task's templates. Each part is rendered once, at its first use.

    Args:
        task: the task of the row.
        row: column → value; or a text, if the task reads one column.
        number: the row's number in its file, for errors.
        template: the index of one of the task's templates.
        learns: of a row with several labels, the one to learn; the others are then neither right nor wrong, so they are no
            answers.

    Attributes:
        row: column → value.
        chat: the prompt is a user's message in a chat.
        closes: the answer closes the text, and its end is predicted too.
    """

    chat = False
    closes = False

    def __init__(
        self, task: Task, row: Any, number: int | None = None, template: int = 0, learns: str | None = None
    ) -> None:
        self.task, self.number, self.learns = task, number, learns
        self.template, self._place = task.templates[template], template
        self.row: Row = as_row(row, task, number)

    @property
    def separator(self) -> str:
        """The text between prompt and answer."""
        return self.task.separator

    @functools.cached_property
    def answers(self) -> dict[str, str]:
        """Label → answer text.

        Raises:
            InputError: the row lacks a column that the choices name, an answer is empty, or two are equal.
        """
        if self.learns is None:
            return self._listed
        others = {*self.labels} - {self.learns}
        return {label: text for label, text in self._listed.items() if label not in others}

    @functools.cached_property
    def _listed(self) -> dict[str, str]:
        """Label → answer text, of all labels. It is the task's own dictionary where all rows have the same answers."""
        with about(row=self.number):
            return answers_of(self.task.choices_of(self._place), self._read(self.row))

    @functools.cached_property
    def prompt(self) -> str:
        """The prompt.

        Raises:
            InputError: the row lacks a column that the template names, or all these columns are empty.
        """
        names = self.template.columns
        with about(row=self.number):
            require(self.row, names)
            if names and all(is_missing(self.row[name]) for name in names):
                raise InputError(f"Expected some text in {shown(names)}, found it empty", "fill or drop the row")
            text = self.filled(self.row)
            if not text:
                raise InputError("The template gives an empty prompt", "fill or drop the row")
            return text

    def filled(self, row: Row) -> str:
        """The prompt of a row with other cells, such as shorter ones, but with the same answers."""
        with about(row=self.number):
            return self.template.fill(self._read(row), self._seen)

    def text_of(self, prompt: str) -> str:
        """What stands before the question in a prompt that the template made of the row; nothing where it asks first.

        >>> Wording(task, "Lovely tea.").text_of("Lovely tea. All in all, it was")
        'Lovely tea.'
        """
        question = self.template.question(self._seen)
        return prompt[: -len(question)] if question and prompt.endswith(question) else ""

    @property
    def _seen(self) -> Iterable[str]:
        """The answers, where the template sees them."""
        return self._listed.values() if self.template.sees_answers else ()

    @functools.cached_property
    def label(self) -> str:
        """The row's label.

        Raises:
            InputError: the column is missing, the label is unknown, or there are several.
        """
        with about(row=self.number):
            if self.learns is not None:
                return self.learns
            if not self.template.says_answer:
                return self.task.known_label(self.row, self.answers)
            text = self.template.right_answer(self.row, self.answers.values())
            found = {answer: label for label, answer in self.answers.items()}
            if text not in found:
                raise InputError(f"Expected a right answer of {shown(found, 20)}, found {brief(text)}.")
            return found[text]

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """The labels of a row of a multi-label task, in alphabetical order.

        Raises:
            InputError: the column is missing, or a label is unknown.
        """
        with about(row=self.number):
            return self.task.known_labels(self.row)

    @property
    def truth(self) -> Any:
        """The row's label, or its labels where it may have several."""
        return self.labels if self.task.multi_label else self.label

    def each_label(self) -> list[Wording]:
        """The wordings that a row teaches by: itself; of a row with several labels, one for each."""
        if not self.task.multi_label:
            return [self]
        return [Wording(self.task, self.row, self.number, self._place, label) for label in self.labels]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the prompt and answers. A model cannot distinguish rows with equal fingerprints; labels may
        differ."""
        return hashlib.sha256(json.dumps([self.prompt, *self.answers.values()]).encode()).hexdigest()[:16]

    def _read(self, row: Row) -> Row:
        """A row without its label, so that a template that prints the whole row does not reveal it."""
        columns = self.task.answer_columns
        if self.template.says_answer or not any(column in row for column in columns):
            return row
        return {name: value for name, value in row.items() if name not in columns}
