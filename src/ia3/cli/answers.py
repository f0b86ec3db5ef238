"""What adapters answered to rows, for `ia3 predict`: as a file, as JSON, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ia3.answering import Answer, columns_of, to_csv, to_lines, with_answers, with_cells
from ia3.cli.common import table

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.evaluation.prediction import Prediction
    from ia3.task.task import Row

# Characters of a text in a table.
_TEXT_WIDTH = 60


def write(path: Path, rows: Sequence[Row], answers: Sequence[Sequence[Answer]], each: bool, delimiter: str) -> None:
    """Rows with their answers as .csv or .jsonl, in whole or not at all; arguments as of `to_json`."""
    if path.suffix.lower() == ".jsonl":
        found = with_answers(rows, answers, each)
    else:
        found = with_cells(rows, answers, each, columns_of(answers, each))
    write_rows(path, found, delimiter)


def write_rows(path: Path, rows: Sequence[Row], delimiter: str) -> None:
    """Rows as .csv or .jsonl, in whole or not at all. A .csv has all columns of all rows."""
    from ia3.files import replacing

    with replacing(path) as temporary:
        if path.suffix.lower() == ".jsonl":
            text = to_lines(rows)
        else:
            text = to_csv(rows, list(dict.fromkeys(name for row in rows for name in row)), delimiter)
        temporary.write_text(text, encoding="utf-8")


def delimiter_like(data: str | None, delimiter: str | None) -> str:
    """The delimiter of the CSV file to write: that of the CSV file that was read."""
    from ia3.task.reading import as_delimiter, delimiter_of

    if data is None or Path(data).suffix.lower() != ".csv":
        return ","
    return delimiter_of(data) if delimiter is None else as_delimiter(delimiter)


def print_table(out: Console, rows: Sequence[Row], answers: Sequence[Sequence[Answer]], named: bool) -> None:
    """A line for each answer; `named` says whose it is."""
    from rich.markup import escape

    pairs = [(row, answer) for row, its in zip(rows, answers, strict=True) for answer in its]
    found = [answer.found for _, answer in pairs]
    # With many labels, or different ones, or ones that leave no room, the best label's probability says enough.
    labels = list(found[0].probabilities)
    width = sum(max(len(name), len("100.0%")) + 3 for name in (*labels, max(labels, key=len)))
    few = len(labels) <= 6 and width + _TEXT_WIDTH // 2 <= out.width
    few = few and all(list(item.probabilities) == labels for item in found)
    names = (["adapter"] if named else []) + ["text", "label"]
    beside = any(answer.zero_shot is not None for _, answer in pairs)
    graded = any(answer.task.grades for _, answer in pairs)
    numbers = [
        *(labels if few else ["probability"]),
        *(["expected"] if graded else []),
        *(["zero-shot"] if beside else []),
    ]
    shown_rows = table(*names, *numbers, left=len(names))
    shown_rows.columns[len(names) - 1].style = "bold"
    for row, answer in pairs:
        item = answer.found
        values = item.probabilities.values() if few else [item.sureness]
        text = text_of(answer.task.columns, row)
        cells = [escape(answer.adapter)] if named else []
        cells += [escape(text), escape(_named(item)), *(f"{value:.1%}" for value in values)]
        if graded:
            grade = answer.task.grade(item.probabilities)
            cells.append("–" if grade is None else f"{grade.expected:.2f} ± {grade.spread:.2f}")
        if answer.zero_shot is not None:
            base = answer.zero_shot
            cells.append(f"{escape(_named(base))} {base.sureness:.1%}")
        shown_rows.add_row(*cells)
    out.print(shown_rows)


def _named(found: Prediction) -> str:
    """A label, or several, in a table."""
    return "—" if found.labels is None else ", ".join(found.labels) or "none"


def text_of(columns: Sequence[str], row: Row) -> str:
    """The first of these columns that a row has, shortened for a table."""
    column = next((name for name in columns if name in row), next(iter(row), ""))
    return shortened(str(row.get(column, "")))


def shortened(text: str) -> str:
    """A text on one line; a long one without its middle. Its start and end distinguish it from others."""
    text = " ".join(text.split())
    beginning = _TEXT_WIDTH * 2 // 3
    return text if len(text) <= _TEXT_WIDTH else f"{text[:beginning]} … {text[beginning + 3 - _TEXT_WIDTH :]}"
