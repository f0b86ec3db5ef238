"""Rows with several labels: what cells say, how rows are drawn, and metrics as scikit-learn's."""

from collections import Counter

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from ia3 import InputError, Task, few_shot
from ia3.task.label_sets import flag_of, labels_in, metrics_of_sets
from support import words

LABELS = ["hot", "new", "sweet"]
sets = st.lists(st.sampled_from(LABELS), unique=True).map(tuple)


def task(**fields):
    return Task.create({"template": words.TEMPLATE, "choices": LABELS, "multi_label": True, **fields})


@pytest.mark.parametrize(
    "cell, separator, expected",
    [
        (["hot", "new"], None, ["hot", "new"]),
        (("hot",), None, ["hot"]),
        ({"hot"}, None, ["hot"]),
        ('["hot", "new"]', None, ["hot", "new"]),
        ('["hot; new"]', ";", ["hot; new"]),
        ("hot; new ;hot;;", ";", ["hot", "new"]),
        ("hot and new", " and ", ["hot", "new"]),
        ("hot;new", None, ["hot;new"]),
        (" hot ", None, ["hot"]),
        ([3, 4.0, True], None, ["3", "4", "true"]),
        (4, ";", ["4"]),
        (np.array(["hot", "new"]), None, ["hot", "new"]),
        (np.array([1, 2]), None, ["1", "2"]),
        (np.array([], dtype=object), None, []),
        ([], None, []),
        ("[]", None, []),
        ("", ";", []),
        ("  ", None, []),
        (None, None, []),
        (float("nan"), ";", []),
    ],
)
def test_cells(cell, separator, expected):
    assert labels_in(cell, separator) == expected


@pytest.mark.parametrize(
    "cell", [["hot", None], ["hot", float("nan")], [["hot"]], [np.array(["hot", "new"])], {"hot": 1}, '{"hot": 1', [{}]]
)
def test_cells_that_are_no_list_of_labels(cell):
    with pytest.raises(InputError, match=r"Expected a (list of labels|known label)") as error:
        task().labels_of({"text": "tea", "label": cell}, 7)
    assert "row 7" in str(error.value)


@pytest.mark.parametrize("cell, expected", [(c, True) for c in (1, 1.0, "1", True, "yes", "True", np.int64(1))])
def test_flags(cell, expected):
    assert flag_of(cell, "hot") is True
    assert not any(flag_of(other, "hot") for other in (0, "0", False, "no", "", None, float("nan"), np.bool_(False)))
    with pytest.raises(InputError, match="Expected 1 or 0 in the label column 'hot', found 2"):
        flag_of(2, "hot")


class TestTask:
    def test_labels_are_sorted_and_aliases_apply(self):
        found = task(aliases={"warm": "hot"}).labels_of({"text": "tea", "label": ["sweet", "warm", "hot"]})
        assert found == ("hot", "sweet")

    def test_columns(self):
        its = Task.create({"template": words.TEMPLATE, "label_columns": LABELS})
        assert its.multi_label and its.labels == LABELS and its.metric == "macro_f1"
        row = {"text": "tea", "hot": "1", "new": 0, "sweet": "yes"}
        assert its.labels_of(row) == its.truth(row) == ("hot", "sweet")
        with pytest.raises(InputError, match="Expected a label column 'new', found"):
            its.labels_of({"text": "tea", "hot": 1})
        assert its.wording({**row, "hot": "?"}).prompt  # rows to predict need no labels
        with pytest.raises(InputError, match="without the label column 'hot'"):
            its.changed(templates=["{{ text }} {{ hot }}"])

    @pytest.mark.parametrize("unknown, said", [(["cold"], "found 'cold'"), (["cold", "dry"], "'cold', 'dry'")])
    def test_unknown_labels(self, unknown, said):
        with pytest.raises(InputError, match=said):
            task().check([{"text": "tea", "label": ["hot"]}, {"text": "tea", "label": ["new", *unknown]}])

    def test_one_label_is_not_asked_of_it(self):
        with pytest.raises(InputError, match="Expected a task with one label for each row"):
            task().label({"text": "tea", "label": ["hot"]})
        with pytest.raises(InputError, match="Expected one label, found"):
            task(multi_label=False).label({"text": "tea", "label": ["hot", "new"]})

    @pytest.mark.parametrize(
        "fields, said",
        [
            ({"grades": LABELS}, "one label for each row with grades"),
            ({"class_weight": "balanced"}, "one label for each row with class_weight"),
            ({"costs": {"hot": {"new": 2}}}, "one label for each row with costs"),
            ({"metric": "quadratic_kappa"}, "kappa"),
            ({"label_separator": ""}, "some text as label_separator"),
            ({"label_columns": ["hot", "new"]}, "a column for each label"),
            ({"label_columns": LABELS, "label_separator": ";"}, "label_columns or label_separator, one of the two"),
            ({"choices": "{{ text }}"}, "the same labels for all rows of a multi-label task"),
            ({"multi_label": False, "label_separator": ";"}, "multi_label with label_separator"),
            ({"multi_label": False, "metric": "micro_f1"}, "multi_label with the metric micro_f1"),
        ],
    )
    def test_fields_that_do_not_fit(self, fields, said):
        with pytest.raises(InputError, match=said):
            task(**fields)

    @pytest.mark.parametrize("how", [{}, {"label_separator": ";"}, {"label_columns": LABELS}])
    def test_a_file_gives_it_back(self, how, tmp_path):
        its = task(**how)
        its.save(tmp_path / "task.yaml")
        assert Task.load(tmp_path / "task.yaml") == its

    def test_with_one_label(self):
        its = task(label_columns=LABELS).with_one_label()
        assert not its.multi_label and its.label({"text": "tea", "label": "hot"}) == "hot"


class TestInferred:
    def test_from_lists(self):
        its = Task.infer([{"text": "a", "tags": ["x", "y_z"]}, {"text": "b", "tags": []}], label_column="tags")
        assert its.multi_label and its.choices == {"x": "x", "y_z": "y z"}

    def test_from_arrays_of_a_frame(self):
        frame = pandas.DataFrame({"text": ["a", "b"], "label": [np.array(["x", "y"]), np.array(["x"])]})
        assert Task.infer(frame).labels == ["x", "y"]

    def test_from_a_separator_and_from_columns(self):
        rows = [{"text": "a", "label": "x; y"}, {"text": "b", "label": ""}]
        assert Task.infer(rows, label_separator=";").labels == ["x", "y"]
        assert not Task.infer([*rows[:1], {"text": "b", "label": "z"}]).multi_label
        its = Task.infer([{"text": "a", "x": 1, "y": 0}], label_columns=["x", "y"])
        assert its.labels == ["x", "y"] and its.columns == ["text"]

    def test_what_is_wrong(self):
        rows = [{"text": "a", "label": "x,y"}, {"text": "b", "label": "x,y"}]
        with pytest.raises(InputError, match="at least two labels in column 'label', found 'x,y'"):
            Task.infer(rows, multi_label=True)
        with pytest.raises(InputError, match="Expected a column for each label, found no 'z'"):
            Task.infer(rows, label_columns=["z"])
        with pytest.raises(InputError, match="found a label column as well"):
            Task.infer(rows, label_columns=["label"], label_column="label")
        with pytest.raises(InputError, match="row 2"):
            Task.infer([{"text": "a", "label": ["x"]}, {"text": "b", "label": ["x", None]}])


@given(st.lists(st.tuples(sets, sets), min_size=1))
def test_metrics_are_scikit_learns(pairs):
    truth, said = zip(*pairs, strict=True)
    names = sorted({label for its in (*truth, *said) for label in its})
    measured = metrics_of_sets(truth, said)
    assert measured == task().metrics(truth, said)
    assert measured["accuracy"] == np.mean([set(a) == set(b) for a, b in pairs])
    # Scikit-learn takes a single column as that of two classes.
    more = [*names, *("" for _ in range(2 - len(names)))]
    right, found = (np.array([[name in its for name in more] for its in some]) for some in (truth, said))
    f1 = f1_score(right, found, average=None, zero_division=0)
    assert measured["macro_f1"] == pytest.approx(f1[: len(names)].mean() if names else 0)
    assert measured["micro_f1"] == pytest.approx(f1_score(right, found, average="micro", zero_division=0))


def test_one_of_several_labels_leaves_the_others_out():
    wording = task().wording({"text": "tea", "label": ["hot", "sweet"]}, 3)
    first, second = wording.each_label()
    assert (first.label, set(first.answers)) == ("hot", {"hot", "new"})
    assert (second.label, set(second.answers)) == ("sweet", {"new", "sweet"})
    assert first.prompt == wording.prompt and first.number == 3
    assert task().wording({"text": "tea", "label": []}).each_label() == []
    listing = task(template="{{ text }} {{ answer_choices | join(' ') }} ?").wording({"text": "tea", "label": ["hot"]})
    assert [one.prompt for one in listing.each_label()] == ["tea hot new sweet ?"]
    single = task(multi_label=False).wording({"text": "tea", "label": "hot"})
    assert single.each_label() == [single]


class TestDraw:
    rows = tuple({"text": f"tea {i}", "label": LABELS[: i % 4]} for i in range(80))

    def test_each_label_and_none_are_drawn(self):
        drawn = few_shot(self.rows, task(), 5, seed=1)
        counts = Counter(label for row in drawn for label in row["label"] or ["none"])
        assert min(counts[label] for label in (*LABELS, "none")) >= 5
        # No row is drawn that no label needs: the scarcest, which comes with all others, has just so many.
        assert counts["sweet"] == counts["none"] == 5 and len(drawn) < 25
        assert drawn == few_shot(self.rows, task(), 5, seed=1) != few_shot(self.rows, task(), 5, seed=2)

    def test_too_few(self):
        with pytest.raises(InputError, match="Expected 21 training examples for each label, found fewer for 1 of 3"):
            few_shot(self.rows, task(), 21)
        assert len(few_shot(self.rows[:4], task())) == 4


def test_labels_that_differ_only_in_case_are_said(caplog):
    rows = [{"text": text, "label": label} for text, label in {"a": "Billing", "b": "shipping", "c": "billing"}.items()]
    assert Task.infer(rows).labels == ["Billing", "billing", "shipping"]
    assert "The labels 'Billing' and 'billing' are different ones here" in caplog.text
    caplog.clear()
    Task.infer(rows[:2])
    assert not caplog.text


def test_a_separator_that_nobody_named_is_said(caplog):
    rows = [{"text": text, "label": label} for text, label in {"a": "pin; new", "b": "pin", "c": "new"}.items()]
    assert Task.infer(rows).labels == ["new", "pin", "pin; new"]
    assert "say that ';' stands between them" in caplog.text
    caplog.clear()
    Task.infer(rows, label_separator=";")
    Task.infer([{"text": "a", "label": "and/or"}, {"text": "b", "label": "not"}])  # no label by itself
    assert not caplog.text
