"""A task whose answer is a JSON object of a text's details: `Fields`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import field_validator, model_validator
from typing_extensions import Self

from ia3.errors import InputError, brief, shown
from ia3.task.free_text import FreeText, TextWording
from ia3.task.rows import as_rows
from ia3.task.template import Row, is_missing, items_of
from ia3.task.text_metrics import by_function


class Fields(FreeText):
    """A task that finds details of a text: each field is a part of the text, several parts, or nothing.

    >>> task = Fields.create({"template": "{{ text }} Details:", "fields": ["date", "person_name"]})
    >>> task.wording({"text": "Book it for Ann tomorrow", "date": "tomorrow", "person_name": "Ann"}).answer
    '{"date": "tomorrow", "person_name": "Ann"}'
    >>> task.result('{"date": "tomorrow"}', {})
    {'date': 'tomorrow', 'person_name': None}

    A model writes the fields that a text has, in this order, as JSON; what is generated holds parts of the prompt's columns
    alone (see `FieldsProcessor`).

    More attributes are in `FreeText`.

    Attributes:
        fields: the columns of labelled rows that hold a value, a list of values, or nothing. Each value is in one of the
            template's columns; white space may differ.
        metric: "micro_f1", "exact_match" or a function (see `field_metrics`).
    """

    fields: list[str]
    answer: str = ""
    metric: str = "micro_f1"

    METRICS: ClassVar[tuple[str, ...]] = ("micro_f1", "exact_match")

    @model_validator(mode="before")
    @classmethod
    def _has_no_answer(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("answer"):
            raise ValueError("expected answer or fields, one of the two, found both")
        return values

    @field_validator("fields")
    @classmethod
    def _are_fields(cls, value: list[str]) -> list[str]:
        if not value or not all(map(str.strip, value)) or len({*value}) < len(value):
            raise ValueError(f"expected fields, names of columns that differ, found {shown(value)}")
        return value

    @model_validator(mode="after")
    def _prompt_has_no_fields(self) -> Self:
        given = [name for name in self.fields if name in self.columns]
        if given:
            raise ValueError(f"expected a prompt without the fields, which it gives away, found {shown(given)} in it")
        return self

    @property
    def answer_columns(self) -> list[str]:  # type: ignore[override]
        """The columns that hold the fields."""
        return self.fields

    def texts(self, row: Row) -> list[str]:
        """The texts of a row whose parts values are."""
        return [str(row[name]) for name in self.columns if name in row and not is_missing(row[name])]

    def answer_of(self, row: Row) -> str:
        """The fields of a labelled row that are not empty, as JSON.

        Raises:
            InputError: a value is not in the row's texts.
        """
        texts = self.texts(row)
        found = {name: [_in_text(name, value, texts) for value in _values(row.get(name))] for name in self.fields}
        return json.dumps({name: _one_or_several(its) for name, its in found.items() if its}, ensure_ascii=False)

    def result(self, text: str, row: Row) -> dict[str, Any]:
        """Field → its value, a list of several, or None. Of JSON that is cut off, what is complete."""
        found = _parsed(text.strip())
        return {name: _one_or_several(_values(found.get(name))) for name in self.fields}

    def metrics(
        self, predictions: Sequence[Any], references: Sequence[Any], metric: str | None = None
    ) -> dict[str, float]:
        """See `field_metrics`."""
        return field_metrics(predictions, references, self.fields) | by_function(
            metric or self.metric, predictions, references
        )

    def checked(self, rows: Any, labelled: bool = True) -> Iterator[list[TextWording]]:
        """Check rows as `FreeText` does. Labelled rows must have a column of each field, if not all of them."""
        rows = as_rows(rows, self)
        missing = [name for name in self.fields if not any(name in row for row in rows)]
        if rows and labelled and missing:
            raise InputError(
                f"Expected a column of each field in some row, found none for {shown(missing)}; name the columns like their fields, or "
                f"leave these out of the task's fields."
            )
        yield from super().checked(rows, labelled)


def _values(cell: Any) -> list[str]:
    """The values in a cell."""
    items = items_of(cell)
    return [str(item).strip() for item in ([cell] if items is None else items) if not is_missing(item)]


def _one_or_several(values: Sequence[str]) -> Any:
    return list(values) if len(values) > 1 else values[0] if values else None


def _in_text(name: str, value: str, texts: Sequence[str]) -> str:
    """A value as it stands in one of the texts, whose white space may differ. Raises `InputError` if it does not."""
    pattern = r"\s+".join(map(re.escape, value.split()))
    for text in texts:
        match = re.search(pattern, text)
        if match:
            return match[0]
    raise InputError(
        f"Expected a value of {name!r} that is a part of the row's text, found {brief(value, 80)}",
        "write it as the text does, or drop it",
    )


def _parsed(text: str) -> dict[str, Any]:
    """The object in a JSON text, which may be cut off: then what stands before its last commas."""
    whole = text
    while whole:
        for end in ("", "}", "]}"):
            try:
                found = json.loads(whole + end)
            except (ValueError, RecursionError):
                continue
            return found if isinstance(found, dict) else {}
        whole = whole.rpartition(', "')[0]
    return {}


def field_metrics(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], fields: Sequence[str]
) -> dict[str, float]:
    """How well values of fields agree with the right ones, both compared as text without regard to white space.

    - micro_f1, precision, recall: over all values of all rows and fields; F1 = 2 · right / (found + right ones).
    - exact_match: the part of rows whose fields are all right.
    - "f1: NAME": the F1 of each field that has values.

    If there is nothing to find and nothing is found, F1, precision and recall are 1.
    """
    right, said, known = Counter[str](), Counter[str](), Counter[str]()
    exact = 0
    for prediction, reference in zip(predictions, references, strict=True):
        its = agreement(prediction, reference, fields)
        for counts, more in zip((right, said, known), its, strict=True):
            counts.update(more)
        exact += its[0] == its[1] == its[2]
    hits, found, wanted = right.total(), said.total(), known.total()
    return {
        "micro_f1": _share(2 * hits, found + wanted),
        "exact_match": _share(exact, len(references)),
        "precision": _share(hits, found),
        "recall": _share(hits, wanted),
        **{
            f"f1: {name}": _share(2 * right[name], said[name] + known[name])
            for name in fields
            if said[name] or known[name]
        },
    }


def agreement(
    prediction: Mapping[str, Any], reference: Mapping[str, Any], fields: Sequence[str]
) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """How many values of each field of a row are right, found, and to be found."""
    right, said, known = Counter[str](), Counter[str](), Counter[str]()
    for name in fields:
        its, true = (Counter(" ".join(v.split()) for v in _values(one.get(name))) for one in (prediction, reference))
        right[name], said[name], known[name] = (its & true).total(), its.total(), true.total()
    return right, said, known


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
