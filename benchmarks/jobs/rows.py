"""The rows of the suite: what is done, on how much of the whole job it is measured, and by whom.

Texts are food reviews, cut to a length; labels are made up, because speed does not depend on which answer is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

COLUMNS = {
    "ours": "ia3",
    "bfloat16": "ia3 in bfloat16",
    "peft": "PEFT + Trainer",
    "authors": "T-Few's authors",
    "adapterhub": "AdapterHub",
    "floor": "floor",
}

_FEW = {2: ["great", "not great"], 6: ["joy", "anger", "sadness", "fear", "surprise", "no emotion"]}

# Words of a review: about 60 tokens, and a short query where there are many choices.
_LONG, _SHORT = 45, 12


@dataclass(frozen=True)
class Phase:
    """A part of a job.

    Attributes:
        measured: on how many units (examples, rows, adapters).
        whole: how many the whole job has; the seconds are scaled to it. A phase without units takes what it takes.
        unit: what is counted.
    """

    measured: int = 1
    whole: int = 1
    unit: str = ""


@dataclass(frozen=True)
class Row:
    """A row of the suite.

    Attributes:
        name: for `--only`.
        title: what the whole job is.
        kind: the method of `peers.Column` that does it; None: a command, see `commands`.
        columns: who does it.
        phases: its parts; a curve's are its points, from left to right.
        settings: numbers for `job`.
        curve: what its points are against; empty: not a curve.
        commands: column → Python code, run in a process of its own.
    """

    name: str
    title: str
    kind: str | None
    columns: tuple[str, ...]
    phases: dict[str, Phase] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    curve: str = ""
    commands: dict[str, str] = field(default_factory=dict)

    @property
    def sample(self) -> str:
        """What is measured where that is less than the whole job, in words; empty: all of it."""
        parts = [
            f"{phase.measured} of {phase.whole} {phase.unit}"
            for phase in self.phases.values()
            if phase.measured != phase.whole
        ]
        return " and ".join(parts)

    def job(self, reviews: Sequence[str]) -> dict[str, Any]:
        """What a worker has to know, as JSON. Depends on the row and the reviews alone."""
        if self.kind is None:
            return {}
        job: dict[str, Any] = {"kind": self.kind, **self.settings}
        if self.kind == "train":
            count, size = self.settings["choices"], self.settings["batch_size"]
            job["steps"] = self.phases["train"].measured // size
            job["task"] = task_of(count)
            job["points"] = [asked(reviews, count, 32)]
            job["tested"] = asked(reviews[::-1], count, self.phases["evaluate"].measured)
        elif self.kind == "score":
            job["points"] = [
                {"name": name, **asked(reviews, count, rows, bool(self.curve))}
                for name, (rows, count) in self.settings["points"].items()
            ]
        elif self.kind == "mixed":
            job["prompts"] = cut(reviews, self.settings["rows"], _LONG)
            job["points"] = [{"name": name, "resident": count} for name, count in self.settings["points"].items()]
        elif self.kind == "generate":
            job["prompts"] = cut(reviews, self.settings["rows"], _LONG)
        return job


def cut(reviews: Sequence[str], count: int, words: int) -> list[str]:
    """So many reviews of so many words; shorter ones go on from their beginning."""
    made = []
    for number in range(count):
        found = reviews[number % len(reviews)].split()
        made.append(" ".join((found * words)[:words]))
    return made


def task_of(count: int, intents: bool = False) -> dict[str, Any]:
    """The fields of a task with so many labels: words for a few; for many, or when asked for, intents of banking_77."""
    from ia3.task.task import Task

    few = _FEW.get(count) if not intents else None
    texts = few or [*Task.embedded("banking_77").answers({"Query": ""}).values()][:count]
    template = "Review: {{ text }}\nThis is" if few else "Query: {{ text }}\nIntent:"
    choices = dict(zip(texts, texts, strict=True))
    return {"name": f"{count} choices", "label_column": "label", "template": template, "choices": choices}


def asked(reviews: Sequence[str], count: int, rows: int, intents: bool = False) -> dict[str, Any]:
    """So many rows with so many choices, for ours as rows of a task, for others as the same texts.

    With intents rows are short queries, otherwise reviews.
    """
    from ia3.task.task import Task

    task = Task.create(task_of(count, intents))
    texts = task.labels or []
    words = _SHORT if intents or count not in _FEW else _LONG
    made = [{"text": text, "label": texts[number % count]} for number, text in enumerate(cut(reviews, rows, words))]
    return {
        "rows": made,
        "prompts": [task.prompt(row) for row in made],
        "choices": [task.separator + text for text in texts],
        "labels": [number % count for number in range(rows)],
    }


_ALL = ("ours", "bfloat16", "peft", "authors", "adapterhub", "floor")
_LIBRARIES = ("ours", "peft", "adapterhub")


def _training(count: int, examples: int, tested: int, batch_size: int) -> Row:
    return Row(
        f"train-{count}",
        f"train on 32 examples for 40 steps of 8, evaluate 200 rows, {count} choices",
        "train",
        _ALL,
        {"setup": Phase(), "train": Phase(examples, 320, "examples"), "evaluate": Phase(tested, 200, "rows")},
        {"choices": count, "batch_size": batch_size},
    )


def _scoring(count: int, rows: int) -> Row:
    phases = {"score": Phase(rows, 1000, "rows")}
    return Row(
        f"score-{count}",
        f"score 1,000 rows, {count} choices",
        "score",
        _ALL,
        phases,
        {"points": {"score": (rows, count)}},
    )


def _curve(name: str, title: str, against: str, columns: tuple[str, ...], points: dict[str, tuple[int, int]]) -> Row:
    return Row(name, title, "score", columns, {point: Phase() for point in points}, {"points": points}, against)


def suite(whole: bool = False) -> dict[str, Row]:
    """All rows by name.

    Args:
        whole: do whole jobs; hours.
    """
    # Of examples and rows as many as the slowest column can do in the time; and the batch size.
    training = {2: (320, 200, 8), 77: (320, 200, 8)} if whole else {2: (8, 4, 8), 77: (1, 1, 1)}
    scoring = {2: 1000, 6: 1000, 77: 1000} if whole else {2: 8, 6: 4, 77: 1}
    resident = [1, 16, 64, 256]
    made = [
        Row(
            "import",
            "import the package",
            None,
            (*_LIBRARIES, "floor"),
            {"whole": Phase()},
            commands={"ours": "import ia3", "peft": "import peft", "adapterhub": "import adapters", "floor": "pass"},
        ),
        Row(
            "help",
            "ia3 --help",
            None,
            ("ours", "floor"),
            {"whole": Phase()},
            commands={"ours": "import sys; from ia3.cli import main; main(['--help'])", "floor": "import typer"},
        ),
        Row(
            "load", "load the model, add an adapter", "load_model", (*_LIBRARIES, "authors", "floor"), {"load": Phase()}
        ),
        *(_training(count, *size) for count, size in training.items()),
        *(_scoring(count, size) for count, size in scoring.items()),
        Row(
            "generate",
            "generate 64 tokens for 16 rows of 16",
            "generate",
            (*_LIBRARIES, "floor"),
            {"generate": Phase()},
            {"rows": 16, "length": 16, "new": 64},
        ),
        Row(
            "mixed",
            "score a batch of 64 rows of 16 tokens with 64 adapters",
            "mixed",
            (*_LIBRARIES, "floor"),
            {"batch": Phase()},
            {"rows": 64, "length": 16, "points": {"batch": 64}},
        ),
        Row(
            "load-adapter",
            "load 20 adapters from disk",
            "load_adapter",
            (*_LIBRARIES, "floor"),
            {"load": Phase()},
            {"adapters": 20},
        ),
        Row("switch-adapter", "switch 20 times", "switch_adapter", _LIBRARIES, {"switch": Phase()}, {"adapters": 20}),
        _curve(
            "curve-rows",
            "score rows of 2 choices",
            "rows",
            ("ours", "floor"),
            {str(count): (count, 2) for count in (2, 4, 8, 16)},
        ),
        _curve(
            "curve-choices",
            "score 2 short rows",
            "choices",
            ("ours", "floor"),
            {str(count): (2, count) for count in (2, 6, 20, 40, 77)},
        ),
        Row(
            "curve-adapters",
            "score a batch of 64 rows of 8 tokens",
            "mixed",
            ("ours", "floor"),
            {str(count): Phase() for count in resident},
            {"rows": 64, "length": 8, "points": {str(count): count for count in resident}},
            "adapters in memory",
        ),
    ]
    return {row.name: row for row in made}
