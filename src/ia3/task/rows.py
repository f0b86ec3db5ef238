"""Rows in Python: a data frame, a data set, dictionaries or texts. `as_rows` converts all to a list of dictionaries."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ia3.errors import InputError, shown
from ia3.task.template import Row

if TYPE_CHECKING:
    import datasets
    import pandas

    from ia3.task.kinds import AnyTask


def as_rows(rows: Any, task: AnyTask | None = None) -> list[Row]:
    """Rows as a list of dictionaries. Every public function that takes rows uses this function.

    Args:
        rows: a pandas DataFrame; a `datasets.Dataset`, whose class labels become names if the task knows them; a
            dictionary, which is one row, or columns if every value is a list; or an iterable of dictionaries or texts.
            Dictionaries are not copied.
        task: names the column of a text; it must read exactly one column.

    Raises:
        InputError: rows of another type.
    """
    return [as_row(item, task, number) for number, item in enumerate(items_of(rows, task), 1)]


def items_of(rows: Any, task: AnyTask | None = None) -> list[Any]:
    """The items that `as_row` converts to rows; arguments and errors are those of `as_rows`."""
    # If this is a library's object, the library is imported already. So no import is needed to check.
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")
    if pandas is not None and isinstance(rows, pandas.DataFrame):
        return _of_frame(rows)
    if pandas is not None and isinstance(rows, pandas.Series):
        columns = [] if task is None else task.columns
        return [rows] if columns and set(columns) <= set(rows.index) else rows.tolist()
    if datasets is not None and isinstance(rows, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise InputError(
            f"Expected rows, found a data set's splits {shown(rows)}; take one: data[{next(iter(rows))!r}]."
        )
    if datasets is not None and isinstance(rows, (datasets.Dataset, datasets.IterableDataset)):
        return of_dataset(rows, task=task)
    if isinstance(rows, Mapping):
        return _of_mapping(rows, task)
    if isinstance(rows, (str, bytes, os.PathLike)):
        raise InputError(
            f"Expected rows, found the single text {_brief(rows)}; put a text into a list, or read a file with read_rows."
        )
    if not isinstance(rows, Iterable):
        raise InputError(
            f"Expected rows, such as a list of dictionaries or a DataFrame, found a {type(rows).__name__}."
        )
    return list(rows)


def as_row(item: Any, task: AnyTask | None = None, number: int | None = None) -> Row:
    """One row as a dictionary; arguments and errors are those of `as_rows`. Errors name the row by `number`."""
    if isinstance(item, Mapping):
        return item
    if isinstance(item, str):
        columns = ["a column for each value"] if task is None else task.columns
        if task is not None and len(columns) == 1:
            return {columns[0]: item}
        wanted = "its columns" if task is None else f"the columns {shown(columns, 20)}"
        raise InputError(
            f"Expected a row with {wanted}, found a text alone, {_brief(item)}",
            "give a dictionary, column → value, or read a file with read_rows",
            row=number,
        )
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(item, pandas.Series):
        return _of_frame(item.to_frame().T)[0]
    if item is None or (isinstance(item, float) and item != item):  # how pandas reads an empty cell
        raise InputError("Expected some text, found it empty", "fill the row, or leave it out", row=number)
    raise InputError(
        f"Expected a row as a dictionary, column → value, or a text, found a {type(item).__name__}.", row=number
    )


def of_dataset(
    data: datasets.Dataset | datasets.IterableDataset, class_names: bool = True, task: AnyTask | None = None
) -> list[dict[str, Any]]:
    """The rows of a data set, with names for its class labels.

    Args:
        data: the data set.
        class_names: convert class labels from numbers to names.
        task: its `class_names` take precedence, and its label column becomes names only if the task knows one of them.
    """
    import datasets

    plain = isinstance(data, datasets.Dataset) and data.format["type"] != "custom"
    rows = data.to_list() if plain else [dict(row) for row in data]  # type: ignore[union-attr]
    if not (class_names if task is None else task.class_names):
        return rows
    for column, feature in (data.features or {}).items():
        if isinstance(feature, datasets.ClassLabel) and (
            task is None or column != task.label_column or {*(task.labels or ()), *task.aliases} & {*feature.names}
        ):
            for row in rows:
                if row[column] is not None and row[column] >= 0:
                    row[column] = feature.int2str(row[column])
    return rows


def _of_frame(frame: pandas.DataFrame) -> list[dict[str, Any]]:
    """The rows of a data frame, with Python values, and None for missing values."""
    names = [str(name) for name in frame.columns]
    if len(set(names)) < len(names):
        raise InputError(f"Expected a DataFrame whose columns differ, found {shown(names, 20)}.")
    cells = frame.astype(object).where(frame.notna(), None).set_axis(names, axis="columns")
    return [
        {name: value.tolist() if _is_array(value) else value for name, value in row.items()}
        for row in cells.to_dict("records")
    ]


def _of_mapping(rows: Mapping[Any, Any], task: AnyTask | None) -> list[Any]:
    """A dictionary as one row, or as columns if every value is a list."""
    values = list(rows.values())
    if rows and all(isinstance(value, Mapping) for value in values):
        raise InputError(
            f"Expected a row, column → value, found a dictionary of dictionaries, {shown(rows)}; give a list of rows."
        )
    if not rows or not all(isinstance(value, (list, tuple)) or _is_array(value) for value in values):
        return [rows]
    columns = {str(name): value.tolist() if _is_array(value) else list(value) for name, value in rows.items()}
    lengths = {name: len(value) for name, value in columns.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name!r}: {length}" for name, length in list(lengths.items())[:5])
        raise InputError(f"Expected columns of one length, found {found}; put a single row into a list.")
    if task is not None and task.labels is None:
        raise InputError(
            f"Expected rows, found a dictionary of lists, {shown(rows)}, which may be columns or one row, for this task's "
            f"rows hold lists themselves; give a list of rows."
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _is_array(value: Any) -> bool:
    """Whether a value is a column of numpy, pandas or torch."""
    return getattr(value, "ndim", None) == 1 and hasattr(value, "tolist")


def _brief(text: Any) -> str:
    shortened = str(text)[:80]
    return repr(shortened) + ("…" if len(str(text)) > len(shortened) else "")
