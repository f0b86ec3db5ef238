"""Rows with several labels each: what their cells say, and their metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ia3.errors import InputError, brief
from ia3.task.template import as_text, is_missing, items_of

if TYPE_CHECKING:
    import numpy as np

_YES, _NO = {"1", "1.0", "true", "yes", "y", "x"}, {"", "0", "0.0", "false", "no", "n"}


def labels_in(cell: Any, separator: str | None = None) -> list[str]:
    """The labels in a cell: a list, a list as JSON, labels with a separator between them, one label, or none.

    >>> labels_in('["pin", "new"]'), labels_in("pin;new", ";"), labels_in("")
    (['pin', 'new'], ['pin', 'new'], [])
    """
    items = _items(cell)
    if items is None:
        if is_missing(cell):
            return []
        if isinstance(cell, dict):
            raise InputError(f"Expected a list of labels, found {brief(cell)}.")
        items = as_text(cell).split(separator) if separator else [cell]
    for item in items:
        if (
            isinstance(item, (list, tuple, set, dict)) or getattr(item, "ndim", 0) or item is None or item != item
        ):  # NaN
            raise InputError(f"Expected a list of labels, found {brief(item)} in it.")
    found = [as_text(item).strip() for item in items]
    return list(dict.fromkeys(label for label in found if label))


def is_list(cell: Any) -> bool:
    """Whether a cell holds a list."""
    return _items(cell) is not None


def _items(cell: Any) -> list[Any] | None:
    """The items of a cell that is a list of any kind, or a list as JSON; otherwise None."""
    if isinstance(cell, (tuple, set, frozenset)):
        return list(cell)
    return cell.tolist() if getattr(cell, "ndim", 0) == 1 else items_of(cell)  # an array, as data frames have them


def flag_of(cell: Any, column: str) -> bool:
    """What a cell says of its column's label: 1 or 0, true or false, yes or no; an empty one says no."""
    text = "" if is_missing(cell) else as_text(cell).strip().lower()
    if text in _YES or text in _NO:
        return text in _YES
    raise InputError(f"Expected 1 or 0 in the label column {column!r}, found {brief(cell)}.")


def indicators(label_sets: Sequence[Sequence[str]], names: Sequence[str]) -> np.ndarray:
    """Whether each row has each label: (N, K), 1 or 0."""
    import numpy as np

    return np.array([[name in its for name in names] for its in label_sets], dtype=float)


def metrics_of_sets(labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Accuracy, the share of rows whose labels are all right and none too many; F1 averaged over the labels that occur, and that
    of all decisions together."""
    import numpy as np
    from sklearn.preprocessing import MultiLabelBinarizer

    maker = MultiLabelBinarizer().fit([*labels, *predictions])
    # Not scikit-learn's metrics, which take the column of a single label as that of two classes.
    right, found = (np.asarray(maker.transform(some)) for some in (labels, predictions))
    both, all_given = 2 * (right & found).sum(0), (right + found).sum(0)
    return {
        "accuracy": float((right == found).all(1).mean()),
        "macro_f1": float((both / all_given).mean()) if len(both) else 0.0,
        "micro_f1": float(both.sum() / max(all_given.sum(), 1)),
    }
