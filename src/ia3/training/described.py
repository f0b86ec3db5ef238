"""Files that a trainer adds to an adapter's folder: the task, the recipe, fingerprints of the training rows."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ia3.adapter.stored import METRICS_NAME, RECIPE_NAME, SEEN, TASK_NAME, StoredAdapter, measured_in
from ia3.errors import InputError
from ia3.files import to_json

if TYPE_CHECKING:
    from ia3.task.kinds import AnyTask
    from ia3.training.recipe import Recipe


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
    seen = [task.fingerprint(row) for row in rows]
    texts = {TASK_NAME: task.to_yaml().encode(), RECIPE_NAME: recipe.to_yaml().encode()}
    with contextlib.suppress(InputError):  # training must not fail if the hub does not answer
        if before is not None and before.text(TASK_NAME) == texts[TASK_NAME]:
            seen = list(dict.fromkeys([*measured_in(before.text(METRICS_NAME)).get(SEEN, []), *seen]))
    metrics = {"task": task.name, "recipe": recipe.name, "train_examples": len(seen), SEEN: seen}
    return StoredAdapter.unsaved(texts | {METRICS_NAME: to_json(metrics).encode()})
