"""RAFT (Alex et al. 2021, arXiv:2109.14076): its eleven tasks, their rows, and predictions for its leaderboard."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ia3.errors import InputError, about, brief, shown, similar
from ia3.files import replacing
from ia3.task.reading import read_rows
from ia3.task.task import Row, Task

RAFT_TASKS = (
    "ade_corpus_v2",
    "banking_77",
    "neurips_impact_statement_risks",
    "one_stop_english",
    "overruling",
    "semiconductor_org_types",
    "systematic_review_inclusion",
    "tai_safety_research",
    "terms_of_service",
    "tweet_eval_hate",
    "twitter_complaints",
)

# The number of training rows of every task.
TRAIN_ROWS = 50

PREDICTIONS_NAME = "predictions.csv"

_HUB = "hf://datasets/ought/raft/data"
_ID = "ID"


@dataclass(frozen=True)
class RaftTask:
    """A task of the benchmark.

    Attributes:
        task: the task of the rows.
        train: labelled rows.
        test: rows to predict, with a column `ID`; their labels are not public.
    """

    task: Task
    train: list[Row]
    test: list[Row]

    @classmethod
    def load(cls, name: str, data: str | os.PathLike | None = None, delimiter: str | None = None) -> RaftTask:
        """Read a task's rows.

        Args:
            name: one of `RAFT_TASKS`.
            data: a folder with NAME/train.csv and NAME/test_unlabeled.csv, such as the `data` folder of the hub's
                `ought/raft`; None: the hub's.
            delimiter: the delimiter of these files, see `read_rows`.

        Raises:
            InputError: a task, file or column is missing, a label is unknown, or test rows have missing or equal IDs.
        """
        if name not in RAFT_TASKS:
            raise InputError(f"Expected a task of RAFT, found {name!r}; {similar(name, RAFT_TASKS)}.")
        if data is not None and not Path(data).is_dir():
            raise InputError(f"Expected a folder with RAFT's data, found no {os.fspath(data)!r}.")
        source = _HUB if data is None else os.fspath(data)
        task = Task.embedded(name)
        files = (f"{source}/{name}/{file}" for file in ("train.csv", "test_unlabeled.csv"))
        train, test = (read_rows(file, delimiter=delimiter) for file in files)
        for what, rows, labelled in (("training", train, True), ("test", test, False)):
            with about(f"RAFT's {name}, {what} rows"):
                task.check(rows, labelled)
        with about(f"RAFT's {name}, test rows"):
            _check_ids(test)
        return cls(task, list(train), list(test))


def _check_ids(rows: Sequence[Row]) -> None:
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        if _ID not in row:
            raise InputError(f"Expected a column {_ID!r}, found {shown(row, 20)}.", row=number)
        value = str(row[_ID]).strip()
        if not value or value in seen:
            found = f"{brief(value)} twice" if value else "an empty one"
            raise InputError(f"Expected IDs that differ, found {found}.", row=number)
        seen.add(value)


def write_predictions(path: str | os.PathLike, rows: Iterable[Row], labels: Iterable[str]) -> None:
    """Write the submission file of a task, atomically: columns `ID` and `Label`, a line per test row.

    Args:
        path: the file; the leaderboard expects TASK/predictions.csv.
        rows: the test rows, with a column `ID`.
        labels: the class name of each.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([_ID, "Label"])
        writer.writerows([str(row[_ID]).strip(), label] for row, label in zip(rows, labels, strict=True))
