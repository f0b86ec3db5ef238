"""Shares of labels: counted, written by people, and estimated on rows without labels."""

import math

import numpy as np
import pytest
from scipy.special import log_softmax

from ia3 import InputError
from ia3.opinions.opinions import Opinions
from ia3.opinions.priors import estimated_prior, prior_of, shares_of

NAMES = ["a", "b", "c"]


def test_shares_leave_no_label_out():
    assert shares_of(["a", "a", "b"], NAMES) == pytest.approx({"a": 3 / 6, "b": 2 / 6, "c": 1 / 6})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("balanced", {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}),
        ("a=0.5,b=0.3,c=0.2", {"a": 0.5, "b": 0.3, "c": 0.2}),
        (" a = 0.5", {"a": 0.5, "b": 0.25, "c": 0.25}),
    ],
)
def test_people_write_shares(text, expected):
    assert prior_of(text, NAMES) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d=0.5", "Expected label=share with the labels 'a', 'b', 'c', found 'd=0.5'"),
        ("a", "Expected label=share"),
        ("a=1.5", "Expected one share between 0 and 1 for each label, found 'a=1.5'"),
        ("a=x", "Expected one share between 0 and 1"),
        ("a=0.2,a=0.3", "Expected one share between 0 and 1 for each label, found 'a=0.3'"),
        ("a=0.7,b=0.4", "Expected shares that add up to less than 1, found 1.1"),
        ("a=0.5,b=0.3,c=0.1", "Expected shares that add up to 1, found 0.9"),
    ],
)
def test_bad_shares_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        prior_of(text, NAMES)


def test_rows_without_labels_tell_how_frequent_labels_are():
    chance = np.random.default_rng(0)
    true = np.array([0.7, 0.25, 0.05])
    y = chance.choice(3, 2000, p=true)
    means = np.eye(3) * 2
    x = means[y] + chance.normal(size=(2000, 3))
    # A model that has seen the labels equally often: log p(label | x) by Bayes' rule.
    log_probs = log_softmax(-((x[:, None] - means) ** 2).sum(-1) / 2, axis=1)
    found = estimated_prior(log_probs, dict.fromkeys(NAMES, 1 / 3), NAMES)
    assert [found[name] for name in NAMES] == pytest.approx(true, abs=0.03)
    counted = np.bincount(log_probs.argmax(1), minlength=3) / 2000
    assert np.abs(counted - true).max() > np.abs([found[name] for name in NAMES] - true).max()
    # Moved there, its answers are better.
    opinions = Opinions().toward(found, dict.fromkeys(NAMES, 1 / 3))
    moved = [opinions.together([dict(zip(NAMES, row, strict=True))]) for row in log_probs.tolist()]
    best = [NAMES.index(max(row, key=row.get)) for row in moved]
    assert np.mean(best == y) > np.mean(log_probs.argmax(1) == y) + 0.01


def test_a_prior_moves_probabilities_by_its_ratio_and_back():
    seen, prior = {"a": 0.5, "b": 0.5}, {"a": 0.9, "b": 0.1}
    moved = Opinions().toward(prior, seen)
    scores = {"a": math.log(0.4), "b": math.log(0.6)}
    found = moved.together([scores])
    assert math.exp(found["a"] - found["b"]) == pytest.approx(0.4 / 0.6 * 9)
    assert moved.toward(seen).together([scores]) == pytest.approx(scores)
    with pytest.raises(InputError, match="Expected shares of the labels 'a', 'b', found 'a', 'c'"):
        moved.toward({"a": 0.5, "c": 0.5})
