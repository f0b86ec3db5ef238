"""Training rows to look at again: flipped labels and duplicates are found, and others are not."""

import numpy as np
import pytest
from sklearn.datasets import make_blobs
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from ia3 import Prediction, Task
from ia3.evaluation.doubts import Doubt, HeldOut, doubts, duplicates
from ia3.task.free_text import FreeText

NAMES = ["a", "b", "c"]
FLIPPED = {3: 1, 20: 2, 41: 1}


def predictions(probabilities, thresholds=None):
    scores = np.log(probabilities) - (np.log1p(-probabilities) if thresholds else 0)
    return [Prediction.of(dict(zip(NAMES, row, strict=True)), thresholds=thresholds) for row in scores.tolist()]


def test_flipped_labels_are_found_and_no_others():
    states, y = make_blobs(60, centers=[[0, 0], [6, 0], [0, 6]], random_state=1)
    for row, shift in FLIPPED.items():
        y[row] = (y[row] + shift) % 3
    held_out = cross_val_predict(LogisticRegression(), states, y, cv=5, method="predict_proba")
    labels = [NAMES[label] for label in y]
    found = doubts(HeldOut(range(100, 160), predictions(held_out), labels))
    assert {one.row for one in found[:3]} == {100 + row for row in FLIPPED} and len(found) <= 5
    first = {one.row: one for one in found}
    for row, shift in FLIPPED.items():
        assert first[100 + row].label == labels[row]
        assert first[100 + row].other == NAMES[(y[row] - shift) % 3]
    gaps = [one.p_other - one.p_label for one in found]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] > 0


def test_flipped_labels_of_label_sets():
    chance = np.random.default_rng(0)
    has = chance.random((50, 3)) < 0.5
    held_out = np.where(has, 0.9, 0.1) + chance.uniform(-0.05, 0.05, has.shape)
    has[7, 1] = not has[7, 1]
    has[9, 2] = not has[9, 2]
    labels = [tuple(name for name, its in zip(NAMES, row, strict=True) if its) for row in has]
    found = doubts(HeldOut(range(50), predictions(held_out, dict.fromkeys(NAMES, 0.5)), labels))
    assert {(one.row, one.label or one.other) for one in found} == {(7, "b"), (9, "c")}, "and no others"
    for one in found:
        assert (one.label is None) == (not has[one.row, NAMES.index(one.label or one.other)])
        assert one.p_other == pytest.approx(1 - one.p_label) and one.p_other > 0.8


def test_an_unsure_prediction_contradicts_nothing():
    sure, unsure = [0.98, 0.01, 0.01], [0.4, 0.35, 0.25]
    held_out = predictions(np.array([sure, sure, unsure, [0.01, 0.98, 0.01]]))
    assert doubts(HeldOut(range(4), held_out, ["a", "a", "b", "b"])) == []
    assert doubts(HeldOut(range(3), held_out[:3], ["a", "a", "a"])) == []
    found = doubts(
        HeldOut(range(4), predictions(np.array([unsure, sure, sure, [0.01, 0.98, 0.01]])), ["a", "b", "a", "b"])
    )
    assert [type(one) for one in found] == [Doubt] and found[0].row == 1


def test_duplicates_aside_from_case_and_white_space_and_contradictions_first():
    task = Task(template="{{ text }} is", choices={"a": "one", "b": "two"})
    texts = ["Lovely tea", "soup", "lovely  TEA", "cake", "soup", "lovely tea"]
    rows = [{"text": text, "label": label} for text, label in zip(texts, "abaabb", strict=True)]
    first, *others = duplicates(task, rows)
    assert first.rows == [0, 2, 5] and first.labels == ["a", "a", "b"] and first.contradict
    assert [(one.rows, one.contradict) for one in others] == [([1, 4], False)]
    written = FreeText.create({"template": "{{ text }} In short:", "answer": "{{ label }}"})
    assert [one.rows for one in duplicates(written, rows)] == [[0, 2, 5], [1, 4]]


def test_rows_with_answers_of_their_own_differ_by_these_too():
    task = Task(template="{{ text }}", choices={"0": "{{ one }}", "1": "{{ two }}"})
    row = {"text": "It rains", "one": "wet", "two": "dry", "label": "0"}
    assert duplicates(task, [row, {**row, "two": "cold"}]) == []
    assert [one.rows for one in duplicates(task, [row, {**row, "label": "1"}])] == [[0, 1]]
