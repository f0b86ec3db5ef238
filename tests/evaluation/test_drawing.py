"""Rows of a task's own sources."""

import itertools
import json

import pytest

from ia3 import InputError, Task
from ia3.evaluation.drawing import nested, read
from ia3.task.free_text import FreeText


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


ROWS = [{"text": f"{n}", "label": "pos" if n % 3 else "neg"} for n in range(30)]  # 10 of neg, 20 of pos


class TestNested:
    def test_parts_have_so_many_rows_of_each_label_and_hold_the_smaller_ones(self):
        its = Task(template="{{ text }} :", choices={"pos": "good", "neg": "bad"})
        parts = nested(its, ROWS, [12, 2, 5])
        assert [*parts] == [2, 5, 12]
        for size, rows in parts.items():
            labels = [row["label"] for row in rows]
            assert (labels.count("pos"), labels.count("neg")) == (size, min(size, 10))
            assert rows == [row for row in ROWS if row in rows]  # in their order
        names = [{row["text"] for row in rows} for rows in parts.values()]
        assert names[0] < names[1] < names[2]

    def test_rows_with_several_labels(self):
        its = Task(template="{{ text }} :", choices={name: name for name in "abc"}, multi_label=True)
        rows = [{"text": f"{n}", "label": [name for i, name in enumerate("abc") if n >> i & 1]} for n in range(40)]
        parts = nested(its, rows, [1, 2, 3, 4])
        counts = [{name: sum(name in row["label"] for row in some) for name in "abc"} for some in parts.values()]
        assert all(min(count.values()) >= size for size, count in zip(parts, counts, strict=True))
        names = [{row["text"] for row in some} for some in parts.values()]
        assert all(one < other for one, other in itertools.pairwise(names))
        assert any(not row["label"] for row in parts[1])

    def test_texts_are_counted_in_all(self):
        its = FreeText.create({"template": "{{ text }} :", "answer": "{{ label }}"})
        assert {size: len(rows) for size, rows in nested(its, ROWS, [4, 16]).items()} == {4: 4, 16: 16}

    @pytest.mark.parametrize("sizes", [[20], [0, 4], [4, 99]])
    def test_a_part_is_some_rows_and_not_all(self, sizes):
        its = Task(template="{{ text }} :", choices={"pos": "good", "neg": "bad"})
        with pytest.raises(InputError, match="fewer than all 30 examples") as found:
            nested(its, ROWS, sizes)
        assert found.value.argument == "learning_curve"
