"""Rows of a task's own sources."""

import json

import pytest

from ia3 import InputError, Task
from ia3.evaluation.drawing import read


@pytest.fixture
def source(tmp_path):
    rows = [{"text": "a", "label": label} for label in ("pos", "other", "p", "neg", None, "")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "rows.jsonl")


def task(source, **fields):
    choices = {"pos": "good", "neg": "bad"}
    return Task(template="{{ text }} :", choices=choices, aliases={"p": "pos"}, train=source, **fields)


def test_rows_with_other_labels_are_left_out_where_a_task_says_so(source):
    its = task(source, only_choices=True)
    assert [row["label"] for row in read(source, its)] == ["pos", "p", "neg"]
    its.check(read(source, its))


def test_otherwise_they_are_an_error(source):
    its = task(source)
    assert len(read(source, its)) == 6
    with pytest.raises(InputError, match="Expected a known label"):
        its.check(read(source, its))


def test_rows_of_somebody_else_stay(source, tmp_path):
    its = task("elsewhere.jsonl", only_choices=True)
    assert len(read(source, its)) == 6
