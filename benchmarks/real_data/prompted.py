"""Methods that ask the untrained model: zero-shot and in-context learning, as they are and balanced."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

from ia3.adapter.pretrained import EMBEDDED_MODEL, load_base
from ia3.evaluation.balance import Balance, balancing_rows, can_balance
from ia3.evaluation.icl import draw_shots, fitting, predict_in_context
from ia3.evaluation.prediction import Prediction, predict
from ia3.task.task import Row, Task

from .data import Data
from .judging import Found

# What the untrained model said to rows of any draw, and the CPU seconds that each took.
_KNOWN: dict[str, tuple[Prediction, float]] = {}


@functools.cache
def base_model() -> tuple[Any, Any]:
    """The model that nothing is put into, and its tokenizer."""
    return load_base(EMBEDDED_MODEL)


def zero_shot(data: Data, balanced: bool) -> Found:
    """The model as it is; balanced: its answers' frequency is that of the training rows' labels."""
    rows = data.train if balanced and can_balance(data.task) else []
    (test, outside, train), seconds = zip(
        *(_untrained(data.task, some) for some in (data.test, data.outside, balancing_rows(rows))), strict=True
    )
    details = {"cpu_seconds": sum(seconds)}
    if not rows:
        return Found(test, outside, details)
    balance = Balance.fit(train, [data.task.label(row) for row in balancing_rows(rows)])
    return Found(balance.balanced(test), balance.balanced(outside), details)


def _untrained(task: Task, rows: Sequence[Row]) -> tuple[list[Prediction], float]:
    """What the model says to rows, and the CPU seconds it took; each row is asked once in a process."""
    keys = [task.fingerprint(row) for row in rows]
    new = {key: row for key, row in zip(keys, rows, strict=True) if key not in _KNOWN}
    if new:
        model, tokenizer = base_model()
        started = time.process_time()
        found = predict(model, tokenizer, task, [*new.values()])
        each = (time.process_time() - started) / len(new)
        _KNOWN.update({key: (item, each) for key, item in zip(new, found, strict=True)})
    return [_KNOWN[key][0] for key in keys], sum(_KNOWN[key][1] for key in keys)


def in_context(data: Data, seed: int, count: int, balanced: bool) -> Found:
    """Shots before each row, as equally many of each label as possible; where not all fit with the longest row, as many as
    do. Balanced: on the other training rows."""
    model, tokenizer = base_model()
    shots = draw_shots(data.train, data.task, count, seed)
    shots = shots[: fitting(model, tokenizer, data.task, shots, [*data.test, *data.outside, *data.train])]

    def asked(rows: Sequence[Row]) -> list[Prediction]:
        return predict_in_context(model, tokenizer, data.task, rows, shots) if rows else []

    test, outside, details = asked(data.test), asked(data.outside), {"shots": len(shots)}
    if not balanced or not can_balance(data.task):
        return Found(test, outside, details)
    shown = {id(row) for row in shots}  # to which the model would only have to copy
    rows = balancing_rows([row for row in data.train if id(row) not in shown])
    balance = Balance.fit(asked(rows), [data.task.label(row) for row in rows])
    return Found(balance.balanced(test), balance.balanced(outside), details)
