"""A task: templates that turn a row into a prompt, an answer text for each label, a metric."""

from __future__ import annotations

import functools
import logging
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from ia3.errors import InputError, brief, excerpt, shown, similar
from ia3.task.candidates import MOST_LISTED, candidates, made_template
from ia3.task.described import ANSWER, FIELDS, Described, as_yaml, read_yaml
from ia3.task.grades import Grade, Grades
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
from ia3.task.wording import Wording

logger = logging.getLogger(__name__)

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
        "tasks with several labels a row are not supported: make a yes/no task of each label",
    )


def embedded_tasks() -> list[str]:
    """The names of the built-in tasks, in alphabetical order."""
    files = (resources.files("ia3.task") / "tasks").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


class Task(Described):
    """A classification task.

    Attributes (more in `Described`):
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
    separator: str = " "
    metric: Literal["accuracy", "macro_f1", "quadratic_kappa"] = "accuracy"
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
        if isinstance(values, Mapping) and "template" in values:
            if "templates" in values:
                raise ValueError("expected template or templates, one of the two, found both")
            values = {**values, "templates": [values["template"]]}
            del values["template"]
        if isinstance(values, Mapping) and isinstance(values.get("templates"), Sequence):
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
            if self.label_column in named and not template.says_answer:
                which = repr(template.name) if template.name else f"template {number}"
                raise ValueError(
                    f"expected prompts and choices without the label column {self.label_column!r}, which gives the answer "
                    f"away, found it in {which}; take it out, or say which column holds the label (label_column)"
                )
        if self.grades and (not isinstance(known, list) or sorted(self.grades) != known):
            theirs = shown(known) if isinstance(known, list) else "answers that differ from row to row"
            raise ValueError(f"expected each label once among the grades, found {shown(self.grades)} for {theirs}")
        if self.metric == "quadratic_kappa" and not self.grades:
            raise ValueError("expected grades for the metric quadratic_kappa, found none")
        if isinstance(known, list):
            all_labels = set(known)
            for alias, label in self.aliases.items():
                if label not in all_labels or alias in all_labels:
                    raise ValueError(
                        f"expected aliases of the labels {brief(known)}, found {brief(alias)} for {brief(label)}"
                    )
        return self

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
        label_column = column_of(label_column, columns, "label", "label_column", [])
        own, others = choices is not None, []
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
            if len(labels) < 2:
                raise InputError(
                    f"Expected at least two labels in column {label_column!r}, found {shown(labels)}; there is nothing "
                    f"to tell apart."
                )
            choices = {label: verbatim(label.replace("_", " ").strip()) for label in labels}
        if template is None:
            asked = [text_column] if text_column is None or isinstance(text_column, str) else list(text_column)
            texts = [column_of(each, columns, "text", "text_column", [label_column]) for each in asked]
            if label_column in texts:
                raise InputError(
                    f"Expected two columns for text and label, found {label_column!r} for both", argument="text_column"
                )
            template = made_template(texts, label_column, [choices[label] for label in sorted(choices)])
            others = candidates(rows, texts, label_column, choices, own, name)
        values = {"name": name, "template": template, "label_column": label_column, "choices": dict(choices)}
        values["grades"] = list(grades)
        made = cls.create(values)
        made._candidates = others
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
        return self.wording(row, number, template).answers

    def label(self, row: Row, number: int | None = None, template: int = 0) -> str:
        """A row's label; see `Wording`."""
        return self.wording(row, number, template).label

    def fingerprint(self, row: Row, number: int | None = None) -> str:
        """The fingerprint of a row's wording in the first template; see `Wording`."""
        return self.wording(row, number).fingerprint

    def known_label(self, row: Row, answers: Mapping[str, str]) -> str:
        """The label in the label column, as one of the labels of `answers`; errors are those of `Wording.label`."""
        if self.label_column not in row:
            raise InputError(f"Expected a label column {self.label_column!r}, found the columns {shown(row, 20)}.")
        label = _label(row[self.label_column])
        label = self.aliases.get(label, label)
        if label not in answers:
            several = [part.strip() for part in re.split(r"[,;|/]", label)]
            if len(several) > 1 and all(self.aliases.get(part, part) in answers for part in several):
                raise _several(label)
            hint = similar(label, answers) if len(answers) > MOST_LISTED else f"there are {shown(answers, 20)}"
            raise _UnknownLabel(f"Expected a known label in {self.label_column!r}, found {brief(label)}", hint)
        return label

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
            _ = wording.label
        except _UnknownLabel as error:
            if self.labels is None:
                raise
            values = (row.get(self.label_column) for row in rows)
            found = dict.fromkeys(as_text(value) for value in values if not is_missing(value))
            unknown = [label for label in found if self.aliases.get(label, label) not in self.labels]
            if len(unknown) < 2:
                raise
            hint = f"{error.advice}. Unknown in all rows together: {shown(unknown, 20)}"
            raise InputError(error.message, hint, row=error.row) from error

    def metrics(self, labels: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        """Accuracy, and F1 averaged over the labels that occur, both between 0 and 1; for grades also those of `Grades`."""
        from sklearn.metrics import accuracy_score, f1_score

        f1 = f1_score(labels, predictions, average="macro", zero_division=0)  # type: ignore[arg-type]
        return {
            "accuracy": float(accuracy_score(labels, predictions)),
            "macro_f1": float(f1),
            **(Grades(self.grades).metrics(labels, predictions) if self.grades else {}),
        }

    def grade(self, probabilities: Mapping[str, float]) -> Grade | None:
        """The expected value of a row's label, and its spread; None for labels without an order."""
        return Grades(self.grades).of(probabilities) if self.grades else None


def few_shot(rows: Any, task: Task, per_label: int | None = None, seed: int = 0) -> list[Row]:
    """Draw the same number of random rows for each label, in random order.

    Args:
        rows: the rows to draw from, as `as_rows` takes them.
        task: the task of the rows.
        per_label: rows per label; None: 16, or all if a label has fewer.
        seed: decides the draw.

    Raises:
        InputError: a label has fewer rows than `per_label`.
    """
    if per_label is not None and per_label < 1:
        raise InputError(f"Expected at least one training example for each label (per_label), found {per_label}.")
    rows, chance, wanted = as_rows(rows, task), random.Random(seed), per_label or _USUAL_EXAMPLES
    found = [task.label(row, number) for number, row in enumerate(rows, 1)]
    # By label in alphabetical order, so that the draw does not depend on how a task lists them.
    by_label: dict[str, list[Row]] = {label: [] for label in sorted({*(task.labels or ()), *found})}
    for label, row in zip(found, rows, strict=True):
        by_label[label].append(row)
    scarce = {label: len(its) for label, its in by_label.items() if len(its) < wanted}
    if scarce:
        fewest = min(scarce, key=scarce.__getitem__)
        which = f"{len(scarce)} of {len(by_label)} labels, the fewest for {brief(fewest, 80)}: {scarce[fewest]}"
        if per_label is not None:
            raise InputError(
                f"Expected {per_label} training examples for each label, found fewer for {which}",
                "ask for fewer, or take what there is, without",
                argument="per_label",
            )
        logger.warning("Fewer than %d training examples for %s; all of these are taken.", wanted, which)
    chosen = [row for its in by_label.values() for row in chance.sample(its, min(wanted, len(its)))]
    chance.shuffle(chosen)
    return chosen


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
