"""Probabilities: their temperature, what they are made of, and that the order of labels never changes a result."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss

from ia3 import (
    Calibration,
    IA3Config,
    IA3Model,
    InputError,
    Prediction,
    Recipe,
    Task,
    predict,
    score_choices,
)
from ia3.folder import AdapterFolder
from support import tiny, words

CHOICES = {"pos": "good", "neg": "not good", "none": "a tea"}
TASK = Task(template="review : {{ text }} answer :", choices=CHOICES)
some_scores = st.dictionaries(st.text(max_size=3), st.floats(-30, 0), min_size=2, max_size=6)


class TestPrediction:
    @given(some_scores, st.floats(0.05, 20))
    def test_the_softmax_by_its_formula(self, scores, temperature):
        found = Prediction.of(scores, temperature)
        powers = {label: math.exp((score - max(scores.values())) / temperature) for label, score in scores.items()}
        for label, power in powers.items():
            assert found.probabilities[label] == pytest.approx(power / sum(powers.values()), rel=1e-12)
        assert sum(found.probabilities.values()) == pytest.approx(1)
        assert scores[found.best] == pytest.approx(max(scores.values()), abs=1e-12 * temperature)
        assert found.label == found.best and found.scores == scores

    @given(some_scores, st.randoms())
    def test_the_order_of_labels_changes_nothing(self, scores, chance):
        items = list(scores.items())
        chance.shuffle(items)
        a, b = Prediction.of(scores), Prediction.of(dict(items))
        assert a.label == b.label and a.probabilities == b.probabilities

    def test_of_equal_ones_the_first_by_the_alphabet(self):
        assert Prediction.of({"b": -1.0, "a": -1.0, "c": -2.0}).label == "a"

    def test_abstention(self):
        scores = {"a": math.log(0.7), "b": math.log(0.3)}
        assert Prediction.of(scores, abstain_below=0.69).label == "a"
        found = Prediction.of(scores, abstain_below=0.71)
        assert found.label is None and found.best == "a" and found.probabilities["a"] == pytest.approx(0.7)


def sure(rows: int, right: float, score: float) -> tuple[list[Prediction], list[str]]:
    """Predictions that are all as sure, of which a part is right."""
    labels = ["a"] * round(rows * right) + ["b"] * (rows - round(rows * right))
    return [Prediction.of({"a": 0.0, "b": -score})] * rows, labels


class TestCalibration:
    def test_the_temperature_at_which_as_many_are_right_as_it_says(self):
        predictions, labels = sure(200, 0.8, 9.0)
        found = Calibration.fit(predictions, labels)
        assert 1 / (1 + math.exp(-9 / found.temperature)) == pytest.approx(0.8, abs=1e-4)
        assert found.calibration_error == pytest.approx(0, abs=1e-4)
        assert found.calibration_error_before == pytest.approx(1 / (1 + math.exp(-9)) - 0.8, abs=1e-9)
        assert found.rows == 200

    @given(st.lists(st.tuples(st.lists(st.floats(-9, 0), min_size=3, max_size=3), st.integers(0, 2)), min_size=3))
    def test_never_worse_and_as_scikit_learn_says(self, rows):
        labels = ["abc"[label] for _, label in rows]
        predictions = [Prediction.of(dict(zip("abc", scores, strict=True))) for scores, _ in rows]
        found = Calibration.fit(predictions, labels)
        before = [list(item.probabilities.values()) for item in predictions]
        assert found.log_loss_before == pytest.approx(log_loss(labels, before, labels=list("abc")), rel=1e-6, abs=1e-9)
        assert found.log_loss <= found.log_loss_before + 1e-9
        for other in np.geomspace(0.05, 20, 40):
            assert found.log_loss <= Calibration.quality(predictions, labels, other)["log_loss"] + 1e-4

    def test_the_best_answer_stays(self):
        predictions, labels = sure(50, 0.6, 3.0)
        temperature = Calibration.fit(predictions, labels).temperature
        assert all(Prediction.of(item.scores, temperature).best == item.best for item in predictions)

    def test_round_trip_and_damage(self, tmp_path):
        assert AdapterFolder(tmp_path).calibration is None
        found = Calibration.fit(*sure(20, 0.7, 2.0))
        AdapterFolder(tmp_path).calibrate(found)
        assert AdapterFolder(tmp_path).calibration == found
        for text in ("{", '{"temperature": 0}'):
            (tmp_path / "calibration.json").write_text(text)
            with pytest.raises(InputError, match="calibrate anew"):
                _ = AdapterFolder(tmp_path).calibration

    def test_bad_input(self):
        with pytest.raises(InputError, match="found 0 and 0"):
            Calibration.fit([], [])
        with pytest.raises(InputError, match="found 4 and 3"):
            Calibration.fit(sure(4, 0.5, 1.0)[0], ["a"] * 3)


def adapted() -> IA3Model:
    torch.manual_seed(0)
    return IA3Model(tiny.build("llama", vocab_size=len(words.VOCABULARY)), IA3Config(task_type="CAUSAL_LM"))


class TestPredict:
    def test_the_order_of_labels_changes_no_bit(self):
        model, rows = adapted(), words.rows(9)
        turned = TASK.model_copy(update={"choices": dict(reversed(CHOICES.items()))})
        a, b = (predict(model, words.tokenizer(), task, rows) for task in (TASK, turned))
        assert [item.label for item in a] == [item.label for item in b]
        assert [item.probabilities for item in a] == [item.probabilities for item in b]
        listed = [" good", " not good", " a tea"]
        first = score_choices(model, words.tokenizer(), ["review : tea answer :"], [listed])[0]
        second = score_choices(model, words.tokenizer(), ["review : tea answer :"], [listed[::-1]])[0]
        assert torch.equal(first, second.flip(0))

    def test_temperatures_and_thresholds(self):
        model, rows = adapted(), words.rows(4)
        plain = predict(model, words.tokenizer(), TASK, rows)
        warm = predict(model, words.tokenizer(), TASK, rows, temperature=[1.0, 2.0, 3.0, 4.0], abstain_below=0.9)
        for item, other, temperature in zip(plain, warm, (1.0, 2.0, 3.0, 4.0), strict=True):
            assert other.probabilities == pytest.approx(Prediction.of(item.scores, temperature).probabilities)
            assert other.label is None and other.best == item.best

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"temperature": 0.0}, "temperature above 0"),
            ({"temperature": [1.0]}, "temperature for each of the 2 rows"),
            ({"abstain_below": 1.5}, "from 0 to 1"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(InputError, match=message):
            predict(adapted(), words.tokenizer(), TASK, words.rows(2), **options)

    def test_the_recipes_length_normalization(self):
        model, rows = adapted(), words.rows(3)
        found = predict(model, words.tokenizer(), TASK, rows, recipe=Recipe(length_normalization=0.0))
        for item, row in zip(found, rows, strict=True):
            texts = [" " + text for text in CHOICES.values()]
            scores = score_choices(model, words.tokenizer(), [TASK.prompt(row)], [texts], length_normalization=0.0)
            assert list(item.scores.values()) == pytest.approx(scores[0].tolist(), abs=1e-6)
