"""Files that a trainer adds to an adapter's folder: the task, the recipe, fingerprints of the training rows."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ia3.adapter.stored import METRICS_NAME, RECIPE_NAME, SEEN, TASK_NAME, TRAIN_LABELS, StoredAdapter, measured_in
from ia3.errors import InputError
from ia3.files import to_json
from ia3.task.task import Task

if TYPE_CHECKING:
    from ia3.task.kinds import AnyTask
    from ia3.training.recipe import Recipe


def label_counts(task: AnyTask, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """For metrics.json, how many training rows have each label; nothing where a task has no labels of its own."""
    if not isinstance(task, Task) or task.labels is None:
        return {}
    truths = (task.truth(row) for row in rows)
    found = Counter(label for its in truths for label in ([its] if isinstance(its, str) else its))
    return {TRAIN_LABELS: {label: found[label] for label in task.labels}}


def described(
    task: AnyTask, recipe: Recipe, rows: Sequence[Mapping[str, Any]], before: StoredAdapter | None = None
) -> StoredAdapter:
    """The other files of an adapter in training, which has no folder yet.

    Args:
        task: the task of the training.
        recipe: the recipe of the training.
        rows: the training rows.
        before: the adapter's previous files; if the task is the same, their training rows are kept too.
    """
    seen, counts = [task.fingerprint(row) for row in rows], label_counts(task, rows)
    texts = {TASK_NAME: task.to_yaml().encode(), RECIPE_NAME: recipe.to_yaml().encode()}
    with contextlib.suppress(InputError):  # training must not fail if the hub does not answer
        if before is not None and before.text(TASK_NAME) == texts[TASK_NAME]:
            earlier = measured_in(before.text(METRICS_NAME)).get(SEEN, [])
            if {*earlier} - {*seen}:
                counts = {}  # of what labels the earlier rows were is not known any more
            seen = list(dict.fromkeys([*earlier, *seen]))
    metrics = {"task": task.name, "recipe": recipe.name, "train_examples": len(seen), **counts, SEEN: seen}
    return StoredAdapter.unsaved(texts | {METRICS_NAME: to_json(metrics).encode()})
