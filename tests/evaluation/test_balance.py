"""Scores without the answers' own frequency: `Balance`."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from ia3 import Prediction, Task
from ia3.evaluation.balance import Balance, balancing_rows, can_balance, shift_of


def scored(count, bias, noise=1.0, seed=0):
    """Scores of `count` rows, whose right labels take turns, of a model that prefers some answers."""
    chance, answers = np.random.default_rng(seed), len(bias)
    right = np.arange(count) % answers
    return np.eye(answers)[right] * 2 + chance.normal(size=(count, answers)) * noise + bias, right


@pytest.mark.parametrize("prior", [None, [0.5, 0.3, 0.2]])
def test_balanced_answers_have_the_prior_on_average(prior):
    scores, _ = scored(300, np.array([4.0, 0.0, -3.0]))
    prior = None if prior is None else np.array(prior)
    shift = shift_of(scores, prior)
    found = softmax(scores + shift, axis=1).mean(axis=0)
    assert np.allclose(found, 1 / 3 if prior is None else prior, atol=0.01)
    assert abs(shift.mean()) < 1e-9
    assert not np.allclose(softmax(scores, axis=1).mean(axis=0), found, atol=0.2)


def test_rows_may_count_more():
    scores, right = scored(300, np.array([4.0, 0.0, -3.0]))
    weights = np.array([1.0, 5.0, 0.5])[right]
    found = softmax(scores + shift_of(scores, np.array([0.5, 0.3, 0.2]), weights), axis=1)
    assert np.allclose(np.average(found, axis=0, weights=weights), [0.5, 0.3, 0.2], atol=0.01)


def test_the_model_s_preference_is_found_and_taken_away():
    bias = np.array([3.0, 0.0, -3.0])
    known, _ = scored(30, bias)
    scores, right = scored(300, bias, seed=1)
    assert (scores.argmax(axis=1) == right).mean() < 0.6
    assert ((scores + shift_of(known)).argmax(axis=1) == right).mean() > 0.8
    assert np.allclose(shift_of(known), -bias, atol=1)


def test_a_constant_in_each_row_changes_nothing():
    scores, _ = scored(20, np.array([1.0, 0.0]))
    moved = scores + np.arange(20)[:, None] * 10
    assert np.allclose(shift_of(scores), shift_of(moved), atol=1e-4)
    assert np.allclose(shift_of(log_softmax(scores, axis=1)), shift_of(scores), atol=1e-4)


def test_a_row_that_is_sure_gives_no_boundless_shift():
    assert np.abs(shift_of(np.array([[0.0, -60.0]]))).max() < 60
    assert np.isfinite(shift_of(np.random.default_rng(0).normal(size=(2, 150)) * 20)).all()


def test_predictions_are_balanced_by_label():
    def said(scores):
        return [Prediction.of(dict(zip(("pos", "neg"), row, strict=True))) for row in scores.tolist()]

    scores, right = scored(40, np.array([5.0, 0.0]))
    labels = [("pos", "neg")[index] for index in right]
    balance = Balance.fit(said(scores[:20]), labels[:20])
    assert balance.shift["pos"] < 0 < balance.shift["neg"]
    found = balance.balanced(said(scores[20:]))
    plain = said(scores[20:])
    hits = [sum(one.best == label for one, label in zip(its, labels[20:], strict=True)) for its in (plain, found)]
    assert hits[0] == 10 < hits[1]
    assert found[0].scores["pos"] == plain[0].scores["pos"] + balance.shift["pos"]
    # The share of a label among the rows is the share that it gets.
    frequent = Balance.fit(said(scores[:20]), ["pos"] * 20)
    assert frequent.shift["pos"] > balance.shift["pos"]


def test_answers_that_differ_from_row_to_row_have_no_balance():
    assert not can_balance(Task.load("copa"))
    assert can_balance(Task.load("rte"))
    own = {"template": "{{ text }} is", "choices": {"a": "{{ first }}", "b": "b"}}
    assert not can_balance(Task.create(own))
    marks = [{"text": "tea", "label": label} for label in ("x{%", "{{y")]
    assert can_balance(Task.infer(marks))


def test_some_of_many_rows_are_enough():
    rows = [{"text": str(number)} for number in range(1000)]
    assert len(balancing_rows(rows)) == 256 and balancing_rows(rows) == balancing_rows(rows)
    assert balancing_rows(rows[:9]) == rows[:9]
