"""Labels in an order: values, expected values, and metrics."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from ia3 import InputError, Task
from ia3.task.grades import Grades

STARS = {"template": "{{ text }} stars:", "choices": ["1", "2", "3", "4", "5"], "grades": ["1", "2", "3", "4", "5"]}


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        (["1", "2", "3"], [1, 2, 3]),
        (["-1", "0", "2.5"], [-1, 0, 2.5]),
        (["low", "medium", "high"], [1, 2, 3]),
        (["3", "2", "1"], [1, 2, 3]),  # numbers that fall are names
        (["1", "nan"], [1, 2]),
    ],
)
def test_values(labels, values):
    assert list(Grades(labels).values.values()) == values


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6))
def test_the_expected_value_and_its_spread(weights):
    labels = [chr(97 + index) for index in range(len(weights))]
    shares = np.array(weights) / sum(weights)
    found = Grades(labels).of(dict(zip(labels, shares.tolist(), strict=True)))
    values = np.arange(1, len(labels) + 1)
    assert found.expected == pytest.approx(shares @ values)
    assert found.spread == pytest.approx(math.sqrt(shares @ (values - shares @ values) ** 2), abs=1e-7)


def test_metrics():
    task = Task(**STARS)
    labels, found = ["1", "5", "3", "2", "2"], ["2", "5", "3", "1", "5"]
    metrics = task.metrics(labels, found)
    assert metrics["mean_absolute_error"] == pytest.approx((1 + 0 + 0 + 1 + 3) / 5)
    assert metrics["quadratic_kappa"] == pytest.approx(
        cohen_kappa_score([*map(int, labels)], [*map(int, found)], weights="quadratic")
    )
    assert task.metrics(["2", "2"], ["2", "2"])["quadratic_kappa"] == 0
    assert set(Task(**{**STARS, "grades": []}).metrics(labels, found)) == {"accuracy", "macro_f1"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"grades": ["1", "2"]},
            "expected each label once among the grades, found '1', '2' for '1', '2', '3', '4', '5'",
        ),
        ({"grades": ["1", "2", "3", "4", "4"]}, "expected each label once"),
        ({"choices": "{{ a }} ||| {{ b }}"}, "for answers that differ from row to row"),
        ({"grades": [], "metric": "quadratic_kappa"}, "expected grades for the metric quadratic_kappa, found none"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Task.create({**STARS, **fields})


def test_a_file_keeps_them(tmp_path):
    Task(**STARS).save(tmp_path / "task.yaml")
    assert Task.from_file(tmp_path / "task.yaml").grades == STARS["grades"]
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 2}]
    assert Task.infer(rows, grades=["1", "2"]).grade({"1": 0.25, "2": 0.75}).expected == 1.75
