"""A head is what scikit-learn's regressions on its places say together, and its held-out answers are honest."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from ia3 import InputError
from ia3.opinions.head import USUAL_SURENESS, Head, fit_head


def made(rows=48, places=9, width=8, labels=3, seed=0, telling=(0, 2, 3, 6, 8)):
    """States of which some places tell the label, and the labels."""
    chance = np.random.default_rng(seed)
    y = np.arange(rows) % labels
    states = chance.normal(size=(rows, places, width)) * 3 + 5
    centers = chance.normal(size=(labels, width)) * 6
    for place in telling:
        states[:, place] += centers[y]
    return states.astype(np.float32), [f"label {index}" for index in y]


def folds_of(labels, count=4):
    seen: dict[str, int] = {}
    found = []
    for label in labels:
        found.append(seen.get(label, 0) % count)
        seen[label] = seen.get(label, 0) + 1
    return found


def accuracy(log_probs, labels):
    names = sorted(set(labels))
    return np.mean([names[best] == label for best, label in zip(log_probs.argmax(1), labels, strict=True)])


def test_it_reads_the_places_that_tell():
    states, labels = made()
    head, held_out = fit_head(states, labels, folds_of(labels))
    assert accuracy(head.log_probs(states), labels) == 1
    assert head.places == (0, 2, 3, 6, 8)
    assert accuracy(held_out, labels) > 0.95
    np.testing.assert_allclose(np.exp(held_out).sum(1), 1)


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("folds", [True, False])
def test_it_is_the_mean_of_regressions_times_a_number(labels, folds):
    states, names = made(labels=labels)
    head, _ = fit_head(states, names, folds_of(names) if folds else None)
    total = 0.0
    for place in head.places:
        some = states[:, place].astype(np.float64)
        some = (some - some.mean(0)) / (some.std(0) + 1e-6) / np.sqrt(some.shape[1])
        model = LogisticRegression(C=10, max_iter=200).fit(some, names)
        total = total + model.predict_log_proba(some) / len(head.places)
    found = head.log_probs(states)
    np.testing.assert_allclose(np.exp(found).sum(1), 1)
    # Up to one number, the same for all rows, and the last digits of regressions that have converged.
    ratio = np.median((found[:, 1] - found[:, 0]) / (total[:, 1] - total[:, 0]))
    np.testing.assert_allclose(found, log_softmax(total * ratio, axis=1), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("labels", [2, 3])
def test_class_weights_are_scikit_learns(labels):
    states, names = made(labels=labels, places=1, telling=(0,))
    weights = {"label 0": 0.2, "label 1": 3.0, "label 2": 1.0}
    head, _ = fit_head(states, names, class_weight=weights)
    some = states[:, 0].astype(np.float64)
    some = (some - some.mean(0)) / (some.std(0) + 1e-6) / np.sqrt(some.shape[1])
    given = {name: weights[name] for name in sorted(set(names))}
    model = LogisticRegression(C=10, max_iter=200, class_weight=given).fit(some, names)
    expected = log_softmax(model.predict_log_proba(some) * USUAL_SURENESS, axis=1)
    np.testing.assert_allclose(head.log_probs(states), expected, rtol=0.01, atol=0.01)


def test_what_is_held_out_knows_nothing_of_labels_by_chance():
    losses = []
    for seed in range(4):
        states, labels = made(telling=(), labels=2, places=30, rows=32, seed=seed)
        _, held_out = fit_head(states, labels, folds_of(labels))
        names = sorted(set(labels))
        losses.append(-np.mean([row[names.index(label)] for row, label in zip(held_out, labels, strict=True)]))
    assert np.mean(losses) > 0.97 * np.log(2)


def test_a_label_with_a_single_row_is_fitted_too():
    states, labels = made()
    labels[0] = "once"
    folds = folds_of(labels)
    head, held_out = fit_head(states, labels, folds)
    assert head.labels == ("label 0", "label 1", "label 2", "once")
    assert np.isfinite(held_out).all() and np.isfinite(head.log_probs(states)).all()
    # The fold that holds its only row has never seen it.
    assert held_out[0].argmax() != 3


@settings(max_examples=20, deadline=None)
@given(
    arrays.arrays(np.float32, (3, 2, 4), elements=st.floats(-9, 9, width=32)),
    st.lists(st.text(min_size=1), min_size=3, max_size=3, unique=True),
)
def test_a_file_gives_it_back(weight, labels):
    head = Head(tuple(labels), (1, 5), weight, weight[:, 0, 0], of=8)
    again = Head.from_bytes(head.to_bytes(), "head.safetensors")
    assert (again.labels, again.places, again.of) == (head.labels, head.places, head.of)
    np.testing.assert_array_equal(again.weight, head.weight)
    np.testing.assert_array_equal(again.bias, head.bias)


def test_states_of_another_model_are_refused():
    states, labels = made()
    head, _ = fit_head(states, labels)
    with pytest.raises(
        InputError, match="of 9 places of width 8, on which the head was fitted, found 4 places of width 8"
    ):
        head.log_probs(states[:, :4])


def test_damaged_files_are_refused():
    states, labels = made()
    head, _ = fit_head(states, labels)
    data = head.to_bytes()
    nan = Head(head.labels, head.places, head.weight * np.nan, head.bias, head.of).to_bytes()
    fewer = Head(head.labels[:2], head.places, head.weight, head.bias, head.of).to_bytes()
    outside = Head(head.labels, head.places, head.weight, head.bias, of=2).to_bytes()
    no_header = json.dumps({"__metadata__": {}}).encode()
    for bad in (b"", b"x" * 40, data[:-3], nan, fewer, outside, len(no_header).to_bytes(8, "little") + no_header):
        with pytest.raises(InputError, match=r"Cannot read head.safetensors as a head: .*; train anew\."):
            Head.from_bytes(bad, "head.safetensors")
