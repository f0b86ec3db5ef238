"""A task whose answer is a text: `FreeText`."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from ia3.errors import InputError, about, brief, shown, similar
from ia3.task.described import ANSWER, Described
from ia3.task.rows import as_rows
from ia3.task.template import Row, Template, columns_of, is_missing, parse, rendered
from ia3.task.text_metrics import TEXT_METRICS, is_function, text_metrics
from ia3.task.wording import Wording

# The default number of training examples.
_USUAL_EXAMPLES = 64


class FreeText(Described):
    """A task whose answer is a text.

    >>> task = FreeText.create({"template": "{{ review }} In short:", "answer": "{{ summary }}"})
    >>> task.wording({"review": "Stale, dented cans.", "summary": "Stale"}).answer
    'Stale'

    More attributes are in `Described`.

    Attributes:
        template: the prompt, a Jinja template as of `Template`.
        answer: the answer, a Jinja template that sees the columns of a labelled row.
        separator: the text between prompt and answer; none in a chat.
        chat: the prompt is a user's message and the answer the assistant's, in the tokenizer's chat template.
        max_new_tokens: the maximum of an answer's tokens; None: twice those of the longest training example.
        metric: the headline number: one of `TEXT_METRICS`, or a function's dotted name (see `text_metrics`).
        truncate: columns to shorten, in this order, if a prompt is longer than the model's context; empty: the longest
            column of a row.
        class_names: read class labels of hub data sets as names, otherwise as numbers.
        example: an example row for people.
    """

    template: str
    answer: str
    separator: str = " "
    chat: bool = False
    max_new_tokens: int | None = Field(default=None, ge=1)
    metric: str = "token_f1"
    truncate: list[str] = Field([])
    class_names: bool = True
    example: dict[str, Any] | None = None

    # The metrics that tasks of this kind have without a function.
    METRICS: ClassVar[tuple[str, ...]] = TEXT_METRICS

    # What other tasks have: this one has no labels.
    labels: ClassVar[None] = None
    multi_label: ClassVar[bool] = False
    label_column: ClassVar[None] = None
    aliases: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _has_no_choices(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for name in ("choices", "label_column", "templates"):
                if name in values:
                    raise ValueError(
                        f"expected a template and an answer without {name}, found it; {name} is for tasks with labels"
                    )
        return values

    @field_validator("template")
    @classmethod
    def _is_a_prompt(cls, value: str) -> str:
        made = Template(prompt=value)
        if made.sees_answers or made.says_answer or not made.columns:
            raise ValueError(
                "expected a prompt that names columns, without ||| and answer_choices, which are for tasks with labels"
            )
        return value

    @field_validator("answer")
    @classmethod
    def _parses(cls, value: str) -> str:
        parse(value)
        return value

    @field_validator("metric")
    @classmethod
    def _is_a_metric(cls, value: str) -> str:
        if value not in cls.METRICS and not is_function(value):
            raise ValueError(
                f"expected a metric of {', '.join(cls.METRICS)} or a function such as package.module.function, "
                f"found {brief(value)}"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        known = self.answer_columns
        if not known:
            raise ValueError("expected an answer that names a column, such as {{ summary }}, found none")
        if set(known) <= set(self.columns):
            raise ValueError(
                f"expected a prompt without the answer's column {shown(known)}, which gives the answer away; take it out of the "
                f"template"
            )
        for column in self.truncate:
            if column not in self.columns:
                raise ValueError(
                    f"expected columns of the template to truncate, found {brief(column)}; {similar(column, self.columns)}"
                )
        return self

    @functools.cached_property
    def templates(self) -> list[Template]:
        """The template, as the only one."""
        return [Template(prompt=self.template)]

    @functools.cached_property
    def columns(self) -> list[str]:
        """The columns that the prompt needs, in alphabetical order."""
        return list(self.templates[0].columns)

    @functools.cached_property
    def answer_columns(self) -> list[str]:
        """The columns that hold the answer, in alphabetical order."""
        return sorted(columns_of(self.answer))

    def answer_of(self, row: Row) -> str:
        """The answer of a labelled row.

        Raises:
            InputError: a column is missing, or there is no answer.
        """
        text = rendered(self.answer, row)
        if not text or all(is_missing(row[name]) for name in self.answer_columns):
            raise InputError(f"Expected an answer in {shown(self.answer_columns)}, found none", "fill or drop the row")
        return text

    def result(self, text: str, row: Row) -> Any:
        """What a generated text says about a row: the text itself."""
        return text.strip()

    def reference(self, row: Row, number: int | None = None) -> Any:
        """What `result` should be for a labelled row. Errors as of `answer_of`."""
        with about(row=number):
            return self.result(self.answer_of(row), row)

    def metrics(
        self, predictions: Sequence[Any], references: Sequence[Any], metric: str | None = None
    ) -> dict[str, float]:
        """The metrics of predictions; `metric` is another function's dotted name than the task's. See `text_metrics`."""
        return text_metrics(predictions, references, metric or self.metric)

    def wording(self, row: Any, number: int | None = None, template: int = 0) -> TextWording:
        """A row's wording; the arguments are those of `Wording`."""
        return TextWording(self, row, number)

    def wordings(self, rows: Any) -> list[TextWording]:
        """The wordings of rows, which may have any form that `as_rows` takes."""
        return [self.wording(row, number) for number, row in enumerate(as_rows(rows, self), 1)]

    def fingerprint(self, row: Row, number: int | None = None) -> str:
        """The fingerprint of a row's wording; see `TextWording`."""
        return self.wording(row, number).fingerprint

    def check(self, rows: Any, labelled: bool = True) -> None:
        """Raise the error of the first unusable row."""
        for _ in self.checked(rows, labelled):
            pass

    def checked(self, rows: Any, labelled: bool = True) -> Iterator[list[TextWording]]:
        """Check rows as `check` does; return the wording of each row in a list."""
        for wording in self.wordings(rows):
            _ = wording.prompt
            if labelled:
                _ = wording.answer
            yield [wording]


class TextWording(Wording):
    """A row rendered by a `FreeText`'s template; see `Wording`."""

    task: FreeText  # type: ignore[assignment]
    closes = True

    def __init__(self, task: FreeText, row: Any, number: int | None = None) -> None:
        super().__init__(task, row, number)  # type: ignore[arg-type]
        self.chat = task.chat

    @property
    def separator(self) -> str:
        """The text between prompt and answer; none in a chat, whose template has it."""
        return "" if self.chat else self.task.separator

    @functools.cached_property
    def answer(self) -> str:
        """The row's answer. Errors as of `FreeText.answer_of`."""
        with about(row=self.number):
            return self.task.answer_of(self.row)

    @property
    def answers(self) -> dict[str, str]:  # type: ignore[override]
        """The row's answer, as the only choice."""
        return {ANSWER: self.answer}

    @property
    def label(self) -> str:  # type: ignore[override]
        """The only choice."""
        return ANSWER

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the prompt."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]

    def _read(self, row: Row) -> Row:
        """A row without the answer's columns, except those that the prompt names."""
        hidden = {*self.task.answer_columns} - {*self.template.columns}
        return {name: value for name, value in row.items() if name not in hidden}


def few_rows(rows: Any, task: FreeText, count: int | None = None, seed: int = 0) -> list[Row]:
    """Draw random rows, in random order.

    Args:
        rows: the rows to draw from, as `as_rows` takes them.
        task: the task of the rows.
        count: how many; None: 64, or all if there are fewer.
        seed: decides the draw.

    Raises:
        InputError: there are fewer rows than `count`.
    """
    rows = as_rows(rows, task)
    if count is not None and not 1 <= count <= len(rows):
        raise InputError(
            f"Expected from 1 to {len(rows)} training examples, found {count}",
            "take what there is, without",
            argument="examples",
        )
    return random.Random(seed).sample(rows, min(count or _USUAL_EXAMPLES, len(rows)))
