"""Heads of rows with several labels: held-out scores in closed form, scores as the regression's, thresholds as the best."""

import itertools
import json

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import Ridge

from ia3 import InputError
from ia3.opinions import label_sets
from ia3.opinions.head import Head
from ia3.opinions.label_sets import decide, fit_label_sets
from ia3.opinions.opinions import Opinions
from ia3.opinions.words import Words

NAMES = ["a", "b", "c"]


def made(rows=40, width=12, seed=0, places=1):
    """States that tell labels, a little; label sets; and the labels as a matrix."""
    chance = np.random.default_rng(seed)
    y = chance.random((rows, 3)) < (0.5, 0.3, 0.4)
    y[0], y[1] = (True, True, True), (False, False, False)
    centers = chance.normal(size=(3, width))
    states = chance.normal(size=(rows, places, width)) + (y @ centers)[:, None]
    states /= np.linalg.norm(states, axis=2, keepdims=True)
    return states.astype(np.float32), [[n for n, its in zip(NAMES, row, strict=True) if its] for row in y], y


@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("penalty", [0.03, 1.0])
def test_what_is_held_out_is_what_a_regression_without_the_row_says(duplicates, penalty, monkeypatch):
    monkeypatch.setattr(label_sets, "_PENALTIES", (penalty,))
    states, _, y = made()
    features = states[:, 0].astype(np.float64)
    features -= features.mean(0)
    groups = [[i, i + 1, i + 2] if duplicates else [i] for i in range(0, len(y), 3 if duplicates else 1)]
    groups = [np.array([i for i in group if i < len(y)]) for group in groups]
    held_out = label_sets._fitted(features @ features.T, y.astype(float), groups).held_out
    for group in groups:
        others = np.setdiff1d(np.arange(len(y)), group)
        model = Ridge(alpha=penalty).fit(features[others], y[others].astype(float))
        np.testing.assert_allclose(held_out[group], model.predict(features[group]), atol=1e-9)


@pytest.mark.parametrize("choosing", [800, 15])
def test_heads_together_are_the_regression(choosing, monkeypatch):
    monkeypatch.setattr(label_sets, "_CHOOSING", choosing)  # all rows are fitted, however many choose
    states, sets, y = made(places=3)
    others, _, _ = made(seed=1, width=7)
    given = {"head": states, "sentences": others, "words": others[:, :, :5]}
    heads, _ = fit_label_sets(given, sets, [str(i) for i in range(len(y))])
    assert {"sentences", "words"} <= set(heads) <= set(given)
    assert all(head.labels == tuple(NAMES) and not head.single for head in heads.values())
    found = sum(head.scores(given[name]) for name, head in heads.items())

    def features(name, place, scale):
        some = given[name][:, place].astype(np.float64)
        some = some - some.mean(0)
        if name == "head":
            spread = some.std(0)
            some = some / (np.maximum(spread, 0.1 * np.median(spread)) + 1e-6) / np.sqrt(some.shape[1])
        return some * np.sqrt(scale)

    # One of the settings that may be chosen, and no other: a regression on all features beside each other.
    gaps = []
    for place, words, head, penalty in itertools.product(
        range(3), (0.25, 0.5, 1, 2), (0, 0.1, 0.3, 1), label_sets._PENALTIES
    ):
        some = [features("sentences", 0, 1), features("words", 0, words), features("head", place, head)]
        x = np.concatenate(some, axis=1)
        gaps.append(np.abs(Ridge(alpha=penalty).fit(x, y.astype(float)).predict(x) - found).max())
    assert min(gaps) < 1e-5


def test_places_that_tell_are_found():
    states, sets, y = made(rows=60, places=5)
    chance = np.random.default_rng(9)
    states[:, [0, 1, 2, 4]] = chance.normal(size=(60, 4, 12))
    heads, held_out = fit_label_sets({"head": states}, sets, [str(i) for i in range(60)])
    assert heads["head"].places == (3,)
    assert np.mean((held_out > 0.5) == y) > 0.8


def test_duplicates_are_held_out_together():
    """By itself, a row's duplicate would give its labels away."""
    chance = np.random.default_rng(0)
    states = np.repeat(chance.normal(size=(40, 1, 30)), 2, axis=0).astype(np.float32)
    y = np.repeat(chance.random((40, 2)) < 0.5, 2, axis=0)
    sets = [[n for n, its in zip("ab", row, strict=True) if its] for row in y]
    right = {}
    for how, groups in (("together", [str(i // 2) for i in range(80)]), ("alone", [str(i) for i in range(80)])):
        _, held_out = fit_label_sets({"sentences": states}, sets, groups)
        right[how] = np.mean((held_out > 0.5) == y)
    assert right["alone"] > 0.75 and right["together"] < 0.65


class TestDecide:
    def test_thresholds_are_half_of_the_best_expected_f1(self):
        chance = np.random.default_rng(0)
        probabilities = chance.random((9, 2)) ** 2
        found = label_sets._best_expected(probabilities)
        for k in range(2):
            p = probabilities[:, k]
            best = max(
                2 * (p * given).sum() / (sum(given) + p.sum())
                for given in map(np.array, itertools.product((0, 1), repeat=9))
                if given.any()
            )
            assert found[k] == pytest.approx(best)
            # And the rows above half of it are those that reach it (Lipton et al. 2014).
            above = p > best / 2
            assert 2 * p[above].sum() / (above.sum() + p.sum()) == pytest.approx(best)

    def test_probabilities_are_calibrated_and_thresholds_theirs(self):
        chance = np.random.default_rng(1)
        y = chance.random((400, 3)) < (0.5, 0.1, 0.02)
        held_out = {"head": y + 0.7 * chance.normal(size=y.shape), "vectors": 3 * y + 9 * chance.normal(size=y.shape)}
        found = decide(held_out, y.astype(float))
        assert set(found.weights) == {"head", "vectors"} and found.weights["head"] > found.weights["vectors"] > 0
        logits = found.bias + sum(weight * held_out[name] for name, weight in found.weights.items())
        assert expit(logits).sum() == pytest.approx(y.sum(), rel=0.02)
        expected = np.clip(label_sets._best_expected(expit(logits)) / 2, 0.02, 0.5)
        np.testing.assert_allclose(found.thresholds, expected)

    def test_an_opinion_that_errs_is_not_heard(self):
        chance = np.random.default_rng(2)
        y = (chance.random((200, 2)) < 0.4).astype(float)
        found = decide({"head": y + chance.normal(size=y.shape), "vectors": chance.normal(size=y.shape) - y}, y)
        assert set(found.weights) == {"head"}
        assert decide({"vectors": -y}, y).weights["vectors"] > 0  # somebody has to answer


class TestFiles:
    def opinions(self):
        heads, _ = fit_label_sets(
            {"words": Words().embeddings(["good tea", "bad soup", "good bad", "tea"])},
            [["a"], ["b"], ["a", "b"], []],
            list("1234"),
        )
        return Opinions.of({"words": 2.0}, heads, bias=-1.5, thresholds={"a": 0.4, "b": 0.3})

    def test_they_give_it_back(self):
        its = self.opinions()
        files = its.files()
        assert set(files) == {"opinions.json", "words.safetensors"}
        again = Opinions.from_json(
            files["opinions.json"], "opinions.json", lambda name: Head.from_bytes(files[f"{name}.safetensors"], name)
        )
        assert again.model_dump() == its.model_dump() and not again.heads["words"].single
        row = Words().embeddings(["good tea"])[0]
        said = again.heads["words"].said(row)
        assert said == its.heads["words"].said(row) and said["a"] > said["b"]
        assert again.together([{"a": 0.0, "b": 0.0}], {"words": said}) == {k: -1.5 + 2 * v for k, v in said.items()}

    @pytest.mark.parametrize(
        "change",
        [
            {"thresholds": {"a": 0}},
            {"thresholds": {"a": 2}},
            {"bias": "x"},
            {"bias": 1e9},
            {"words": -1},
            {"thresholds": {"a": 0.5}, "seen": {"a": 0.5}, "prior": {"a": 0.5}},
        ],
    )
    def test_damaged(self, change):
        its = self.opinions()
        data = json.loads(its.files()["opinions.json"]) | change
        with pytest.raises(InputError, match=r"opinions.json: .*; train anew\."):
            Opinions.from_json(json.dumps(data).encode(), "opinions.json", its.heads.get)


def test_words_are_counted_alike_in_any_company():
    done: list[int] = []
    texts = ["Lovely tea.", "", "Тёплый чай", "tea"]
    found = Words().embeddings(texts, done.extend)
    assert found.shape == (4, 1, 8192) and found.dtype == np.float32 and done == [0, 1, 2, 3]
    np.testing.assert_allclose(np.linalg.norm(found[:, 0], axis=1), [1, 0, 1, 1], rtol=1e-6)
    np.testing.assert_array_equal(Words().embeddings(texts[2:3])[0], found[2])
    assert found[0, 0] @ found[3, 0] > found[0, 0] @ found[2, 0]
