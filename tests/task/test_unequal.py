"""Labels that do not count the same: weights as scikit-learn's, and decisions as Bayes'."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from ia3 import InputError, Task
from ia3.evaluation.prediction import Prediction
from ia3.task.unequal import class_weights, cost_of, least_costly, mean_cost
from support import words

LABELS = ["a", "b", "c"]
costs = st.dictionaries(st.sampled_from(LABELS), st.dictionaries(st.sampled_from(LABELS), st.floats(0, 50)))
shares = st.lists(st.floats(0.001, 1), min_size=3, max_size=3).map(lambda some: np.array(some) / sum(some))


def task(**fields):
    return Task.create({"template": words.TEMPLATE, "choices": words.CHOICES, **fields})


@given(st.lists(st.sampled_from(LABELS), min_size=1))
def test_balanced_is_scikit_learns(labels):
    names = sorted(set(labels))
    expected = compute_class_weight("balanced", classes=np.array(names), y=labels)
    assert class_weights("balanced", labels) == pytest.approx(dict(zip(names, expected, strict=True)))


@given(
    st.lists(st.sampled_from(LABELS), min_size=1),
    st.dictionaries(st.sampled_from(LABELS), st.floats(0.01, 99)),
    st.floats(0.1, 9),
)
def test_only_the_ratios_of_weights_count(labels, weights, factor):
    found = class_weights(weights, labels)
    assert sum(found[label] for label in labels) == pytest.approx(len(labels))
    for label in found:
        expected = weights.get(label, 1.0) / weights.get(labels[0], 1.0)
        assert found[label] / found[labels[0]] == pytest.approx(expected)
    every = {label: factor * weights.get(label, 1.0) for label in LABELS}
    assert class_weights(every, labels) == pytest.approx(found)


@given(shares, costs)
def test_the_least_costly_label_is_that_of_the_matrix(p, given):
    matrix = np.array([[cost_of(given, truth, label) for label in LABELS] for truth in LABELS])
    expected = p @ matrix
    found = least_costly(dict(zip(LABELS, p.tolist(), strict=True)), given)
    assert expected[LABELS.index(found)] == pytest.approx(expected.min(), abs=1e-9)


@given(shares)
def test_without_costs_it_is_the_most_probable_one(p):
    probabilities = dict(zip(LABELS, p.tolist(), strict=True))
    assert probabilities[least_costly(probabilities, {})] == max(p)
    every = {truth: {label: float(truth != label) for label in LABELS} for truth in LABELS}
    assert probabilities[least_costly(probabilities, every)] == pytest.approx(max(p))


def test_ties_do_not_depend_on_the_order_of_labels():
    assert least_costly({"b": 0.5, "a": 0.5}, {}) == least_costly({"b": 0.5, "a": 0.5}, {"a": {"b": 1}}) == "a"


def test_a_prediction_is_decided_by_costs_at_its_temperature():
    scores = {"fraud": math.log(0.02), "fine": math.log(0.98)}
    given = {"fraud": {"fine": 20}}
    found = Prediction.of(scores, costs=given)
    assert (found.label, found.probabilities["fine"]) == ("fine", pytest.approx(0.98))
    assert found.at(2.0).label == "fraud" and Prediction.of(scores, 2.0).label == "fine"
    # p(fraud) is 1 / 8 then, and that is what the threshold asks for.
    assert Prediction.of(scores, 2.0, 0.12, given).label == "fraud"
    assert Prediction.of(scores, 2.0, 0.13, given).label is None


def test_the_mean_cost_is_among_the_metrics():
    its = task(costs={"pos": {"neg": 20}})
    assert its.metrics(["pos", "pos", "neg", "neg"], ["pos", "neg", "pos", "neg"])["mean_cost"] == (20 + 1) / 4
    assert mean_cost({"pos": {"pos": 3}}, ["pos"], ["pos"]) == 3
    assert "mean_cost" not in task().metrics(["pos"], ["pos"])


def test_a_file_keeps_both(tmp_path):
    (tmp_path / "task.yaml").write_text(
        "template: '{{ text }}'\nchoices: {1: good, 2: bad}\nclass_weight: {2: 5}\ncosts:\n  1: {2: 0.5}\n"
    )
    its = Task.load(tmp_path / "task.yaml")
    assert (its.class_weight, its.costs) == ({"2": 5.0}, {"1": {"2": 0.5}})
    its.changed(class_weight="balanced").save(tmp_path / "again.yaml")
    again = Task.load(tmp_path / "again.yaml")
    assert (again.class_weight, again.costs) == ("balanced", its.costs)
    assert (
        Task.create({"template": "{{ text }}", "choices": {1: "a", 2: "b"}, "costs": {1: {2: 0.5}}}).costs == its.costs
    )


def test_a_changed_task_keeps_its_candidates():
    inferred = Task.infer(words.rows(8))
    assert inferred.changed(class_weight="balanced").candidates == inferred.candidates


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"costs": {"po": {"neg": 2}}}, "expected costs of the task's labels, found 'po'; close to it: 'pos'"),
        ({"costs": {"pos": {"none": 2}}}, "expected costs of the task's labels, found 'none'"),
        ({"costs": {"pos": {"neg": -1}}}, "expected a number of 0 or more for 'pos' taken for 'neg', found -1"),
        ({"costs": {"pos": {"neg": "nan"}}}, "expected a number of 0 or more for 'pos' taken for 'neg', found 'nan'"),
        ({"costs": {"pos": {"neg": "much"}}}, "found 'much'"),
        ({"costs": {"pos": 3}}, "expected costs as truth: {given: cost}, found"),
        ({"costs": [1, 2]}, "expected costs as truth: {given: cost}, found"),
        ({"class_weight": "balance"}, "expected 'balanced' or label: weight, found 'balance'"),
        ({"class_weight": {"pos": 0}}, "expected a number above 0 for 'pos', found 0"),
        ({"class_weight": {"pos": float("inf")}}, "expected a number above 0 for 'pos', found inf"),
        ({"class_weight": {"other": 2}}, "expected class_weight of the task's labels, found 'other'"),
        ({"class_weight": "balanced", "choices": "{{ endings }}"}, "expected the same labels for all rows with class_weight"),
        ({"costs": {"0": {"1": 2}}, "choices": "{{ endings }}"}, "expected the same labels for all rows with costs"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line(fields, message):
    with pytest.raises(InputError) as raised:
        task(**fields)
    assert message in str(raised.value) and "\n" not in str(raised.value)
