"""A task: templates that turn a row into a prompt, an answer text for each label, a metric."""

from __future__ import annotations

import functools
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from ia3.errors import InputError, about, brief, excerpt, shown, similar
from ia3.task.candidates import MOST_LISTED, candidates, made_template
from ia3.task.described import ANSWER, FIELDS, Described, as_yaml, read_yaml
from ia3.task.grades import Grade, Grades
from ia3.task.label_sets import flag_of, is_list, labels_in, metrics_of_sets
from ia3.task.rows import as_rows
from ia3.task.template import (
    Choices,
    Row,
    Template,
    as_text,
    choices_as_text,
    columns_of,
    is_missing,
    verbatim,
)
from ia3.task.unequal import ClassWeight, as_class_weight, as_costs, class_weights, mean_cost
from ia3.task.wording import Wording

logger = logging.getLogger(__name__)

Truth = Any
"""A row's label; or the tuple of its labels, where it may have several."""

# What may stand between several labels in a cell.
_SEPARATORS = ",;|/"

# The default number of training examples per label.
_USUAL_EXAMPLES = 16

# Limits of a task: the number of templates, and the characters of all templates together.
MOST_TEMPLATES, _MOST_WORDS = 256, 200_000


class _UnknownLabel(InputError):
    """A label is not one of the task's."""


def _label(value: Any) -> str:
    """A label as text. Several labels are refused, and so is none, which would become the text "None" or "nan"."""
    if isinstance(value, (list, tuple, set, dict)):
        raise _several(value)
    if value is None or value != value:  # NaN differs from itself
        raise InputError("Expected a label, found none", "fill or drop the row")
    return as_text(value)


def _several(found: Any) -> InputError:
    return InputError(
        f"Expected one label, found {brief(found)}",
        "a task whose rows have several is multi_label (ia3 train --multi-label)",
    )


def embedded_tasks() -> list[str]:
    """The names of the built-in tasks, in alphabetical order."""
    files = (resources.files("ia3.task") / "tasks").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


class Task(Described):
    """A classification task.

    More attributes are in `Described`.

    Attributes:
        templates: one or more templates; a text is a prompt. `template` instead sets a single one.
        label_column: the column with the label.
        choices: label → answer text; or a list of labels that are their own answer texts. Labels are compared as text;
            their order does not matter. An answer text can be a Jinja template, if answers are in columns:
            `{{ choice1 }}`. A single text is a Jinja template that gives all answers of a row, separated by `|||` or
            as a
            list: `{{ endings }}`. Their labels are their positions, "0", "1", …. None: every template has its own.
        aliases: a label's name in other copies of the data → label.
        grades: the labels from the lowest to the highest, for labels that have an order (see `Grades`); empty: they have
            none.
        multi_label: each row has any number of the labels, also none. The label column holds a list, a list as JSON, or text
            (see `label_separator`).
        label_separator: the text between a row's labels, of multi-label tasks whose cells are no lists.
        label_columns: a column for each label, that says whether a row has it (1 or 0, true or false, yes or no), instead of
            the label column; the columns' names are the labels.
        class_weight: how much a row of each label counts in training, as scikit-learn's: "balanced", n / (k · n_label), or
            label → weight (see `class_weights`); None: all the same.
        costs: true label → label that is given → cost. Predictions give the label with the least expected cost (see
            `least_costly`); a pair that is left out costs 1, a right label 0. Empty: the most probable label.
        separator: the text between prompt and answer text.
        metric: the metric to show during training.
        truncate: columns to shorten, in this order, if a prompt is longer than the model's context; empty: the longest
            column of a row.
        only_choices: leave out rows of the sources below whose label is not among the choices; otherwise they are an error.
        class_names: read class labels of hub data sets as names, otherwise as numbers.
        example: an example row for people.
    """

    label_column: str = "label"
    choices: Choices | None = None
    aliases: dict[str, str] = Field({})
    grades: list[str] = Field([])
    multi_label: bool = False
    label_separator: str | None = None
    label_columns: list[str] = Field([])
    class_weight: ClassWeight | None = None
    costs: dict[str, dict[str, float]] = Field({})
    separator: str = " "
    metric: Literal["accuracy", "macro_f1", "micro_f1", "quadratic_kappa"] = "accuracy"
    truncate: list[str] = Field([])
    only_choices: bool = False
    class_names: bool = True
    templates: list[Template] = Field(min_length=1)
    example: dict[str, Any] | None = None

    # Other wordings than the one that `infer` made; not in the file.
    _candidates: list[Template] = PrivateAttr([])

    @model_validator(mode="before")
    @classmethod
    def _one_template(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        if "template" in values:
            if "templates" in values:
                raise ValueError("expected template or templates, one of the two, found both")
            values = {**values, "templates": [values["template"]]}
            del values["template"]
        if values.get("label_columns") or values.get("label_separator") is not None:
            values = {"multi_label": True, **values}
        if values.get("label_columns"):
            values = {"choices": list(values["label_columns"]), **values}
        if values.get("multi_label") not in (None, False, "false"):
            values = {"metric": "macro_f1", **values}
        if isinstance(values.get("templates"), Sequence):
            # Each template is compiled, which takes longer than reading it.
            length = sum(len(str(template)) for template in values["templates"])
            if len(values["templates"]) > MOST_TEMPLATES or length > _MOST_WORDS:
                raise ValueError(
                    f"expected at most {MOST_TEMPLATES} templates of {_MOST_WORDS} characters together, found "
                    f"{len(values['templates'])} of {length}"
                )
        return values

    @field_validator("choices", mode="before")
    @classmethod
    def _choices_are_text(cls, value: Any) -> Any:
        return choices_as_text(value)

    @field_validator("aliases", mode="before")
    @classmethod
    def _aliases_are_text(cls, value: Any) -> Any:
        return {as_text(a): as_text(b) for a, b in value.items()} if isinstance(value, Mapping) else value

    @field_validator("grades", mode="before")
    @classmethod
    def _grades_are_text(cls, value: Any) -> Any:
        return [as_text(each) for each in value] if isinstance(value, (list, tuple)) else value

    @field_validator("class_weight", mode="before")
    @classmethod
    def _weights_are_numbers(cls, value: Any) -> Any:
        return as_class_weight(value)

    @field_validator("costs", mode="before")
    @classmethod
    def _costs_are_numbers(cls, value: Any) -> Any:
        return as_costs(value)

    @model_validator(mode="after")
    def _fits_together(self) -> Task:
        known: list[str] | str | None = None
        for template in self.templates:
            own = self.choices if template.choices is None else template.choices
            if own is None:
                which = repr(template.name) if template.name else f"template {self.templates.index(template) + 1}"
                raise ValueError(f"expected choices, or each template's own, found none for {which}")
            # If answers differ from row to row, so may their number, so any labels fit.
            labels = sorted(own) if isinstance(own, dict) else "places"
            if known is not None and labels != known:
                theirs, mine = (shown(each) if isinstance(each, list) else each for each in (known, labels))
                raise ValueError(f"expected the same labels in all templates, found {theirs} and {mine}")
            known = labels
        columns = sorted({column for template in self.templates for column in template.columns})
        for column in self.truncate:
            if column not in columns:
                raise ValueError(
                    f"expected columns of the templates to truncate, found {brief(column)}; {similar(column, columns)}"
                )
        for number, template in enumerate(self.templates, 1):
            named = {*template.columns, *columns_of(self.choices_of(number - 1))}
            given_away = sorted(named & {*self.answer_columns})
            if given_away and not template.says_answer:
                which = repr(template.name) if template.name else f"template {number}"
                raise ValueError(
                    f"expected prompts and choices without the label column {given_away[0]!r}, which gives the answer "
                    f"away, found it in {which}; take it out, or say which column holds the label (label_column)"
                )
        if self.grades and (not isinstance(known, list) or sorted(self.grades) != known):
            theirs = shown(known) if isinstance(known, list) else "answers that differ from row to row"
            raise ValueError(f"expected each label once among the grades, found {shown(self.grades)} for {theirs}")
        if self.metric == "quadratic_kappa" and not self.grades:
            raise ValueError("expected grades for the metric quadratic_kappa, found none")
        self._check_unequal(known if isinstance(known, list) else None)
        if self.multi_label:
            self._fits_label_sets(known)
        elif self.metric == "micro_f1":
            raise ValueError("expected multi_label with the metric micro_f1, found it false")
        elif self.label_separator is not None or self.label_columns:
            raise ValueError("expected multi_label with label_separator or label_columns, found it false")
        if isinstance(known, list):
            all_labels = set(known)
            for alias, label in self.aliases.items():
                if label not in all_labels or alias in all_labels:
                    raise ValueError(
                        f"expected aliases of the labels {brief(known)}, found {brief(alias)} for {brief(label)}"
                    )
        return self

    def _fits_label_sets(self, labels: list[str] | str | None) -> None:
        """Raise `ValueError` if a multi-label task's fields do not fit together."""
        if not isinstance(labels, list):
            raise ValueError("expected the same labels for all rows of a multi-label task, found answers of each row")
        if any(template.says_answer for template in self.templates):
            raise ValueError("expected templates that leave the labels to the label column, found one with an answer")
        if self.label_columns and self.label_separator is not None:
            raise ValueError("expected label_columns or label_separator, one of the two, found both")
        if self.label_columns and sorted(self.label_columns) != labels:
            raise ValueError(
                f"expected a column for each label, found columns {shown(self.label_columns)} for the labels "
                f"{shown(labels)}"
            )
        if self.label_separator == "":
            raise ValueError("expected some text as label_separator, found none")
        for field in ("grades", "class_weight", "costs"):
            if getattr(self, field):
                raise ValueError(f"expected one label for each row with {field}, found multi_label")
        if self.metric not in ("accuracy", "macro_f1", "micro_f1"):
            raise ValueError(f"expected a metric of accuracy, macro_f1, micro_f1 for multi_label, found {self.metric}")

    def _check_unequal(self, known: list[str] | None) -> None:
        """Raise `ValueError` for class weights or costs of labels that the task does not have."""
        weights = self.class_weight if isinstance(self.class_weight, dict) else {}
        given = {label for row in self.costs.values() for label in row}
        for field, named in {"class_weight": [*weights], "costs": [*self.costs, *sorted(given)]}.items():
            if getattr(self, field) and known is None:
                raise ValueError(
                    f"expected the same labels for all rows with {field}, found answers that differ from row to row"
                )
            for label in named:
                if known is not None and label not in known:
                    raise ValueError(
                        f"expected {field} of the task's labels, found {brief(label)}; {similar(label, known)}"
                    )

    @classmethod
    def load(cls, name: str | os.PathLike) -> Task:
        """Load a built-in task by its name, or a task from a YAML file.

        Raises:
            InputError: there is no such task or file; see also `from_file`.
        """
        text = os.fspath(name)
        if text in embedded_tasks():
            return cls.embedded(text)
        if not Path(text).suffix and not os.path.exists(text):
            raise InputError(
                f"Expected a task's file or a built-in task, found {brief(text)}; {similar(text, embedded_tasks())}; see ia3 "
                f"tasks."
            )
        return cls.from_file(text)

    @classmethod
    def from_file(cls, path: str | os.PathLike, data: bytes | None = None) -> Task:
        """Read a task from YAML, or a published collection of prompts (see `read_prompts`).

        Paths in a task are relative to its folder.

        Args:
            path: the file.
            data: the file's content, if it was read already; None: read it.

        Raises:
            InputError: the file does not exist or is not YAML, or a field is missing, unknown or of the wrong type.
        """
        path = Path(path)
        values = read_yaml(path, data)
        if isinstance(values.get("templates"), dict):
            from ia3.task.prompts import task_of

            return task_of(values, path)
        if ANSWER in values or FIELDS in values:
            raise InputError(
                f"Expected a task with choices, found one whose answer is text (see {excerpt(str(path))}); ia3 train, predict, "
                f"evaluate and compare take it."
            )
        return cls.of_values(values, path)

    @classmethod
    def embedded(cls, name: str) -> Task:
        """A built-in task."""
        file = resources.files("ia3.task") / "tasks" / f"{name}.yaml"
        with resources.as_file(file) as path:
            return cls.from_file(path)

    @classmethod
    def infer(
        cls,
        rows: Any,
        label_column: str | None = None,
        text_column: str | Sequence[str] | None = None,
        choices: Mapping[str, str] | None = None,
        template: str | None = None,
        name: str = "task",
        grades: Sequence[str] = (),
        multi_label: bool = False,
        label_separator: str | None = None,
        label_columns: Sequence[str] = (),
    ) -> Task:
        """Make a task from labelled rows. Column names and labels replace missing arguments.

        Without a template, the task gets a plain one, and `candidates`, of which training takes the best.

        Args:
            rows: at least one row, as `as_rows` takes them.
            label_column: the column with the label; None: "label".
            text_column: one or several columns for the prompt. None: "text", or the only column beside the label. Not
                needed with a template.
            choices: label → answer text; None: each label, with spaces instead of underscores.
            template: the prompt; None: the text, or each column's name and text, a question that lists the labels, and
                "Answer:".
            name: the task's name.
            grades: the labels from the lowest to the highest, if they have an order.
            multi_label: see the class; a label column of lists makes a multi-label task, too.
            label_separator: see the class.
            label_columns: see the class.

        Raises:
            InputError: a column is missing, or all labels are equal.
        """
        rows = as_rows(rows)
        if not rows:
            raise InputError("Expected labelled rows, found none.")
        columns = list(rows[0])
        if template is None and len(columns) < 2:
            raise InputError(
                f"Expected a column for the text and one for the label, found {shown(columns)}",
                "in a file, another character may separate them: see",
                argument="delimiter",
            )
        own, others = choices is not None, []
        if label_columns:
            missing = [name for name in label_columns if name not in columns]
            if missing or label_column is not None:
                found = f"no {shown(missing)} among {shown(columns, 20)}" if missing else "a label column as well"
                raise InputError(f"Expected a column for each label, found {found}", argument="label_columns")
            label_column, multi_label = "label", True
            answer_columns = [*label_columns]
            choices = choices or _answers_for(label_columns)
        else:
            label_column = column_of(label_column, columns, "label", "label_column", [])
            answer_columns = [label_column]
        cells = [row.get(label_column) for row in rows]
        if label_separator is None and choices is None:
            _say_joined(cells)
        multi_label = multi_label or label_separator is not None or any(is_list(cell) for cell in cells)
        if choices is None and multi_label:
            known: set[str] = set()
            for number, cell in enumerate(cells, 1):
                with about(row=number):
                    known |= {*labels_in(cell, label_separator)}
            if len(known) < 2:
                raise InputError(
                    f"Expected at least two labels in column {label_column!r}, found {shown(sorted(known))}; if a cell holds "
                    f"several, say what stands between them",
                    argument="label_separator",
                )
            choices = _answers_for(sorted(known))
        if choices is None:
            found = {number: row.get(label_column) for number, row in enumerate(rows, 1)}
            labels = sorted({_label(value) for value in found.values() if not is_missing(value)})
            for number, value in found.items():
                if str(value).strip().lower() == "nan":  # pandas writes missing values so
                    raise InputError(
                        f"Expected a label in column {label_column!r}, found {str(value)!r}",
                        "fill or drop the row, or name the labels with",
                        row=number,
                        argument="choices",
                    )
            _say_alike(labels)
            if len(labels) < 2:
                raise InputError(
                    f"Expected at least two labels in column {label_column!r}, found {shown(labels)}; there is nothing "
                    f"to tell apart."
                )
            choices = _answers_for(labels)
        if template is None:
            asked = [text_column] if text_column is None or isinstance(text_column, str) else list(text_column)
            texts = [column_of(each, columns, "text", "text_column", answer_columns) for each in asked]
            shared = [name for name in texts if name in answer_columns]
            if shared:
                raise InputError(
                    f"Expected two columns for text and label, found {shared[0]!r} for both", argument="text_column"
                )
            template = made_template(texts, label_column, [choices[label] for label in sorted(choices)])
            others = candidates(rows, texts, label_column, choices, own, name)
        values = {"name": name, "template": template, "label_column": label_column, "choices": dict(choices)}
        values |= {"grades": list(grades), "multi_label": multi_label, "label_columns": list(label_columns)}
        values |= {"label_separator": label_separator}
        made = cls.create(values)
        made._candidates = others
        return made

    def changed(self, **changes: Any) -> Task:
        """The task with other values for some fields. Raises `InputError` for wrong ones."""
        made = self.create({**self.model_dump(), **changes})
        made._candidates = self._candidates
        return made

    @property
    def candidates(self) -> list[Template]:
        """Wordings to choose from, if `infer` made this task without one; otherwise none. A file does not keep them."""
        return self._candidates

    def to_yaml(self) -> str:
        """The YAML that `from_file` reads."""
        values = self.model_dump(exclude_defaults=True) | {"name": self.name}
        if self.templates == [Template(prompt=self.templates[0].prompt)]:
            del values["templates"]
            values["template"] = self.templates[0].prompt
        return as_yaml(values)

    @functools.cached_property
    def labels(self) -> list[str] | None:
        """The labels; None if answers differ from row to row and their labels are positions."""
        own = self.choices_of(0)
        return None if isinstance(own, str) else list(own)

    @functools.cached_property
    def columns(self) -> list[str]:
        """The columns that prompts and answers need, in alphabetical order."""
        own = (self.choices_of(template) for template in range(len(self.templates)))
        prompts = (template.columns for template in self.templates)
        return sorted({name for names in (*prompts, *map(columns_of, own)) for name in names})

    def choices_of(self, template: int) -> Choices:
        """The choices of a template, by its index."""
        own = self.templates[template].choices
        return self.choices if own is None else own  # type: ignore[return-value]

    def wording(self, row: Any, number: int | None = None, template: int = 0) -> Wording:
        """A row's wording; the arguments are those of `Wording`."""
        return Wording(self, row, number, template)

    def wordings(self, rows: Any, template: int = 0) -> list[Wording]:
        """The wordings of rows, which may have any form that `as_rows` takes."""
        return [self.wording(row, number, template) for number, row in enumerate(as_rows(rows, self), 1)]

    def prompt(self, row: Row, number: int | None = None, template: int = 0) -> str:
        """The prompt of a row; see `Wording`."""
        return self.wording(row, number, template).prompt

    def answers(self, row: Row, number: int | None = None, template: int = 0) -> dict[str, str]:
        """Label → answer text, for a row; see `Wording`."""
        return dict(self.wording(row, number, template).answers)

    def label(self, row: Row, number: int | None = None, template: int = 0) -> str:
        """A row's label; see `Wording`."""
        return self.wording(row, number, template).label

    def labels_of(self, row: Row, number: int | None = None) -> tuple[str, ...]:
        """The labels of a row of a multi-label task; see `Wording`."""
        return self.wording(row, number).labels

    def truth(self, row: Row, number: int | None = None, template: int = 0) -> Truth:
        """A row's label, or its labels where it may have several; see `Wording`."""
        return self.wording(row, number, template).truth

    def taught(self, rows: Iterable[Row]) -> set[str]:
        """The labels that rows have."""
        truths = [self.truth(row, number) for number, row in enumerate(rows, 1)]
        return {label for its in truths for label in its} if self.multi_label else {*truths}

    def fingerprint(self, row: Row, number: int | None = None) -> str:
        """The fingerprint of a row's wording in the first template; see `Wording`."""
        return self.wording(row, number).fingerprint

    def with_one_label(self) -> Task:
        """A multi-label task as one with a label for each row, in its label column."""
        values = {"multi_label": False, "label_separator": None, "label_columns": [], "metric": "accuracy"}
        found = self.create({**self.model_dump(), **values})
        found._candidates = self._candidates
        return found

    def require_one_label(self) -> None:
        """Raise `InputError` for a multi-label task, where only one label for each row will do."""
        if self.multi_label:
            raise InputError(
                f"Expected a task with one label for each row, found the multi-label task {brief(self.name)}",
                "take a task without multi_label",
            )

    @property
    def answer_columns(self) -> list[str]:
        """The columns that say which labels a row has."""
        return self.label_columns or [self.label_column]

    def known_labels(self, row: Row) -> tuple[str, ...]:
        """The labels of a row of a multi-label task, in alphabetical order; errors are those of `Wording.labels`."""
        missing = [name for name in self.answer_columns if name not in row]
        if missing:
            raise InputError(f"Expected a label column {missing[0]!r}, found the columns {shown(row, 20)}.")
        if self.label_columns:
            return tuple(sorted(name for name in self.label_columns if flag_of(row[name], name)))
        known = self.labels or []
        found = set()
        for label in labels_in(row[self.label_column], self.label_separator):
            label = self.aliases.get(label, label)
            if label not in known:
                raise self._unknown(label, known)
            found.add(label)
        return tuple(sorted(found))

    def known_label(self, row: Row, answers: Mapping[str, str]) -> str:
        """The label in the label column, as one of the labels of `answers`; errors are those of `Wording.label`."""
        self.require_one_label()
        if self.label_column not in row:
            raise InputError(f"Expected a label column {self.label_column!r}, found the columns {shown(row, 20)}.")
        label = _label(row[self.label_column])
        label = self.aliases.get(label, label)
        if label not in answers:
            if not label.strip():
                raise InputError(f"Expected a label in {self.label_column!r}, found it empty", "fill or drop the row")
            several = [part.strip() for part in re.split(f"[{_SEPARATORS}]", label)]
            if len(several) > 1 and all(self.aliases.get(part, part) in answers for part in several):
                raise _several(label)
            raise self._unknown(label, answers)
        return label

    def _unknown(self, label: str, known: Iterable[str]) -> _UnknownLabel:
        known = list(known)
        hint = similar(label, known) if len(known) > MOST_LISTED else f"there are {shown(known, 20)}"
        return _UnknownLabel(f"Expected a known label in {self.label_column!r}, found {brief(label)}", hint)

    def check(self, rows: Any, labelled: bool = True) -> None:
        """Raise the error of the first unusable row, in the file's order: an error of `prompt`, `answers` or `label` in
        any template. If a label is unknown, the error names all unknown labels of the rows."""
        for _ in self.checked(rows, labelled):
            pass

    def checked(self, rows: Any, labelled: bool = True) -> Iterator[list[Wording]]:
        """Check rows as `check` does; return the wordings of each row, one per template."""
        rows = as_rows(rows, self)
        for number, row in enumerate(rows, 1):
            wordings = [self.wording(row, number, template) for template in range(len(self.templates))]
            for wording in wordings:
                _ = wording.prompt, wording.answers
                if labelled:
                    self._check_label(rows, wording)
            yield wordings

    def _check_label(self, rows: Sequence[Row], wording: Wording) -> None:
        try:
            _ = wording.truth
        except _UnknownLabel as error:
            if self.labels is None:
                raise
            values = [row.get(self.label_column) for row in rows]
            if self.multi_label:
                values = [label for value in values for label in labels_in(value, self.label_separator)]
            found = dict.fromkeys(as_text(value) for value in values if not is_missing(value))
            unknown = [label for label in found if self.aliases.get(label, label) not in self.labels]
            if len(unknown) < 2:
                raise
            hint = f"{error.advice}. Unknown in all rows together: {shown(unknown, 20)}"
            raise InputError(error.message, hint, row=error.row) from error

    def metrics(self, labels: Sequence[Truth], predictions: Sequence[Truth]) -> dict[str, float]:
        """Accuracy, and F1 averaged over the labels that occur, both between 0 and 1; for grades also those of `Grades`, and with
        costs their mean; for multi-label tasks see `metrics_of_sets`."""
        if self.multi_label:
            return metrics_of_sets(labels, predictions)
        from sklearn.metrics import accuracy_score, f1_score

        f1 = f1_score(labels, predictions, average="macro", zero_division=0)  # type: ignore[arg-type]
        return {
            "accuracy": float(accuracy_score(labels, predictions)),
            "macro_f1": float(f1),
            **(Grades(self.grades).metrics(labels, predictions) if self.grades else {}),
            **({"mean_cost": mean_cost(self.costs, labels, predictions)} if self.costs else {}),
        }

    def weights(self, labels: Iterable[str] | Mapping[str, float]) -> dict[str, float]:
        """Label → how much each of its rows counts among rows with these labels; empty: all the same (see `class_weights`)."""
        return class_weights(self.class_weight, labels)

    def grade(self, probabilities: Mapping[str, float]) -> Grade | None:
        """The expected value of a row's label, and its spread; None for labels without an order."""
        return Grades(self.grades).of(probabilities) if self.grades else None


def few_shot(rows: Any, task: Task, per_label: int | None = None, seed: int = 0) -> list[Row]:
    """Draw the same number of random rows for each label, in random order.

    Args:
        rows: the rows to draw from, as `as_rows` takes them.
        task: the task of the rows.
        per_label: rows per label; None: 16, or all if a label has fewer. A label without any rows is told by a warning.
        seed: decides the draw.

    Raises:
        InputError: a label that has rows has fewer than `per_label`.
    """
    if per_label is not None and per_label < 1:
        raise InputError(f"Expected at least one training example for each label (per_label), found {per_label}.")
    rows, chance, wanted = as_rows(rows, task), random.Random(seed), per_label or _USUAL_EXAMPLES
    if task.multi_label:
        return _few_of_each(rows, task, wanted, per_label, chance)
    found = [task.label(row, number) for number, row in enumerate(rows, 1)]
    # By label in alphabetical order, so that the draw does not depend on how a task lists them.
    by_label: dict[str, list[Row]] = {label: [] for label in sorted({*(task.labels or ()), *found})}
    for label, row in zip(found, rows, strict=True):
        by_label[label].append(row)
    _say_scarce({label: len(its) for label, its in by_label.items()}, wanted, per_label)
    chosen = [row for its in by_label.values() for row in chance.sample(its, min(wanted, len(its)))]
    chance.shuffle(chosen)
    return chosen


def _few_of_each(
    rows: Sequence[Row], task: Task, wanted: int, per_label: int | None, chance: random.Random
) -> list[Row]:
    """Random rows, until so many have each label, and as many have none."""
    counts: Counter[str] = Counter()
    chosen = []
    for index in chance.sample(range(len(rows)), len(rows)):
        its = task.labels_of(rows[index], index + 1) or ("",)
        if any(counts[label] < wanted for label in its):
            chosen.append(rows[index])
            counts.update(its)
    _say_scarce({label: counts[label] for label in task.labels or ()}, wanted, per_label)
    return chosen


def _say_scarce(counts: Mapping[str, int], wanted: int, per_label: int | None) -> None:
    """Warn that labels have fewer rows than wanted, or none; raise `InputError` if somebody asked for so many of those that have."""
    unknown = [label for label, count in counts.items() if not count]
    if unknown:
        logger.warning("No training examples for %s: only answer texts say what such labels mean.", shown(unknown))
    scarce = {label: count for label, count in counts.items() if 0 < count < wanted}
    if not scarce:
        return
    fewest = min(scarce, key=scarce.__getitem__)
    which = f"{len(scarce)} of {len(counts)} labels, the fewest for {brief(fewest, 80)}: {scarce[fewest]}"
    if per_label is not None:
        raise InputError(
            f"Expected {per_label} training examples for each label, found fewer for {which}",
            "ask for fewer, or take what there is, without",
            argument="per_label",
        )
    logger.warning("Fewer than %d training examples for %s; all of these are taken.", wanted, which)


def _say_joined(cells: Iterable[Any]) -> None:
    """Warn that cells seem to hold several labels with something between them."""
    texts = {cell.strip() for cell in cells if isinstance(cell, str) and not is_list(cell)}
    for separator in _SEPARATORS:
        parts = {text: [part.strip() for part in text.split(separator)] for text in texts if separator in text}
        joined = [text for text, its in parts.items() if {*its} <= texts]
        if joined:
            logger.warning(
                "Cells such as %r seem to hold several labels of a row; if they do, say that %r stands between them.",
                min(joined),
                separator,
                extra={"argument": "label_separator"},
            )
            return


def _say_alike(labels: Sequence[str]) -> None:
    """Warn of labels that are one but for case and white space."""
    alike: dict[str, list[str]] = {}
    for label in labels:
        alike.setdefault(" ".join(label.casefold().split()), []).append(label)
    for its in alike.values():
        if len(its) > 1:
            logger.warning(
                "The labels %s are different ones here; if they are one, write them alike.",
                " and ".join(map(repr, its)),
            )


def _answers_for(labels: Iterable[str]) -> dict[str, str]:
    """Label → itself as an answer's text."""
    return {label: verbatim(label.replace("_", " ").strip()) for label in labels}


def column_of(asked: str | None, columns: list[str], usual: str, argument: str, taken: list[str]) -> str:
    if asked is None:
        rest = [column for column in columns if column not in taken]
        asked = usual if usual in rest else rest[0] if len(rest) == 1 else None
        if asked is None:
            which = argument.replace("_", " ")
            raise InputError(
                f"Expected the name of the {which}: the columns are {shown(rest, 20)}", "give", argument=argument
            )
    elif asked not in columns:
        raise InputError(f"Expected a column {asked!r}, found the columns {shown(columns, 20)}", argument=argument)
    return asked
