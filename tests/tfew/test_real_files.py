"""Published few-shot files read as they are."""

import json
import os
from pathlib import Path

import pytest

from ia3.tfew import Task, few_shot, read_rows

DATA = Path(os.environ.get("IA3_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the data sets of the paper in {DATA} (IA3_TEST_DATA)")


def test_the_papers_few_shot_splits():
    task = Task(
        template="{{ premise }}\nQuestion: {{ hypothesis }} True or false?\nAnswer:", choices={0: "true", 1: "false"}
    )
    for path in sorted((DATA / "tfew" / "few_shot" / "rte").rglob("*.jsonl")):
        rows = read_rows(path)
        assert len(rows) == 32 and {task.label(row) for row in rows} == {"0", "1"}
        assert all(task.prompt(row).endswith("Answer:") for row in rows)


def test_banking77():
    rows = read_rows(DATA / "banking77" / "train.csv")
    task = Task.infer(rows, label_column="category")
    assert list(task.choices) == sorted(json.loads((DATA / "banking77" / "categories.json").read_text()))
    assert len(few_shot(rows, task, 3)) == 231
