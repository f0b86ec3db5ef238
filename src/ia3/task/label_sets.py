"""Rows with several labels each: what their cells say, and their metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ia3.errors import InputError, brief
from ia3.task.template import as_text, is_missing, items_of

_YES, _NO = {"1", "1.0", "true", "yes", "y", "x"}, {"", "0", "0.0", "false", "no", "n"}


def labels_in(cell: Any, separator: str | None = None) -> list[str]:
    """The labels in a cell: a list, a list as JSON, labels with a separator between them, one label, or none.

    >>> labels_in('["pin", "new"]'), labels_in("pin;new", ";"), labels_in("")
    (['pin', 'new'], ['pin', 'new'], [])
    """
    items = list(cell) if isinstance(cell, (tuple, set, frozenset)) else items_of(cell)
    if (
        items is None and hasattr(cell, "tolist") and getattr(cell, "ndim", 0) == 1
    ):  # an array, as Parquet files have them
        items = cell.tolist()
    if items is None:
        if is_missing(cell):
            return []
        if isinstance(cell, dict):
            raise InputError(f"Expected a list of labels, found {brief(cell)}.")
        items = as_text(cell).split(separator) if separator else [cell]
    for item in items:
        if isinstance(item, (list, tuple, set, dict)) or item is None or item != item:  # NaN differs from itself
            raise InputError(f"Expected a list of labels, found {brief(item)} in it.")
    found = [as_text(item).strip() for item in items]
    return list(dict.fromkeys(label for label in found if label))


def is_list(cell: Any) -> bool:
    """Whether a cell holds a list."""
    return isinstance(cell, (tuple, set, frozenset)) or items_of(cell) is not None or getattr(cell, "ndim", 0) == 1


def flag_of(cell: Any, column: str) -> bool:
    """What a cell says of its column's label: 1 or 0, true or false, yes or no; an empty one says no."""
    text = "" if is_missing(cell) else as_text(cell).strip().lower()
    if text in _YES or text in _NO:
        return text in _YES
    raise InputError(f"Expected 1 or 0 in the label column {column!r}, found {brief(cell)}.")


def metrics_of_sets(labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Accuracy, the share of rows whose labels are all right and none too many; F1 averaged over the labels that occur, and that
    of all decisions together."""
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.preprocessing import MultiLabelBinarizer

    maker = MultiLabelBinarizer().fit([*labels, *predictions])
    if not len(maker.classes_):  # no label anywhere
        return {"accuracy": 1.0, "macro_f1": 0.0, "micro_f1": 0.0}
    right, found = maker.transform(labels), maker.transform(predictions)
    f1 = {name: float(f1_score(right, found, average=name, zero_division=0)) for name in ("macro", "micro")}  # type: ignore[arg-type]
    return {"accuracy": float(accuracy_score(right, found)), "macro_f1": f1["macro"], "micro_f1": f1["micro"]}
