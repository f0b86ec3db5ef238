"""Predictions of rows with several labels, their calibration and report."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.metrics import log_loss, precision_recall_fscore_support

from ia3 import InputError, Recipe, Task
from ia3.evaluation import label_sets
from ia3.evaluation.calibration import Calibration
from ia3.evaluation.label_sets import by_answers, centred, require_label_sets
from ia3.evaluation.learner import fold_of_each
from ia3.evaluation.prediction import Prediction
from ia3.evaluation.results import majority, report
from support import words

LABELS = ["hot", "new", "sweet"]
TASK = Task.create({"template": words.TEMPLATE, "choices": LABELS, "multi_label": True})
THRESHOLDS = {"hot": 0.2, "new": 0.5, "sweet": 0.3}

scores = st.lists(st.floats(-900, 900), min_size=3, max_size=3).map(lambda s: dict(zip(LABELS, s, strict=True)))


@given(scores, st.floats(0.1, 9))
def test_each_label_is_decided_by_its_threshold_at_any_temperature(some, temperature):
    found = Prediction.of(some, temperature, thresholds=THRESHOLDS)
    assert found.probabilities == pytest.approx({name: expit(s / temperature) for name, s in some.items()}, abs=1e-300)
    assert found.label == tuple(name for name in LABELS if some[name] >= logit(THRESHOLDS[name]))
    assert found.at(1.0) == Prediction.of(some, thresholds=THRESHOLDS)


def test_it_abstains_where_a_decision_is_unsure():
    some = {"hot": logit(0.9), "new": logit(0.02), "sweet": logit(0.4)}
    sure = Prediction.of(some, abstain_below=0.39, thresholds=THRESHOLDS)
    assert sure.label == ("hot", "sweet") and sure.sureness == pytest.approx(0.4)
    unsure = Prediction.of(some, abstain_below=0.41, thresholds=THRESHOLDS)
    assert unsure.label is None and unsure.best == ("hot", "sweet")
    none = Prediction.of(dict.fromkeys(LABELS, -3.0), abstain_below=0.9, thresholds=THRESHOLDS)
    assert none.label == () and none.sureness == pytest.approx(expit(3))


def made(rows=60, seed=0):
    chance = np.random.default_rng(seed)
    y = chance.random((rows, 3)) < (0.5, 0.2, 0.4)
    values = (2 * y - 1) + chance.normal(size=y.shape)
    found = [Prediction.of(dict(zip(LABELS, row, strict=True)), thresholds=THRESHOLDS) for row in values.tolist()]
    return found, [tuple(np.array(LABELS)[row].tolist()) for row in y], y, values


def test_calibration_is_that_of_all_decisions():
    found, labels, y, values = made()
    fitted = Calibration.fit(found, labels)
    losses = {
        t: log_loss(y.ravel(), expit(values.ravel() / t)) for t in (fitted.temperature * np.linspace(0.8, 1.2, 21))
    }
    assert fitted.log_loss == pytest.approx(min(losses.values()), abs=1e-4)
    as_it_is = Calibration.as_it_is(found, labels)
    assert as_it_is.temperature == 1 and as_it_is.log_loss == pytest.approx(log_loss(y.ravel(), expit(values.ravel())))


def test_the_report_is_scikit_learns():
    found, labels, y, values = made()
    said = values >= [logit(THRESHOLDS[name]) for name in LABELS]
    result = report(TASK, found, labels, 1.0)
    assert result["accuracy"] == pytest.approx((said == y).all(1).mean())
    for name, *expected in zip(LABELS, *precision_recall_fscore_support(y, said, average=None), strict=True):
        assert list(result["labels"][name].values()) == pytest.approx(expected)
    assert majority([("hot",), (), ()]) == ()


def test_folds_keep_two_labels_beside_each():
    rows = [{"text": f"tea {i % 12}", "label": LABELS[: i % 3]} for i in range(24)]
    folds = fold_of_each(TASK, rows, 3)
    assert folds[:12] == folds[12:] and set(folds) == {0, 1, 2}  # duplicates stay together
    with pytest.raises(InputError, match="rows of at least two labels beside each of 2 folds"):
        fold_of_each(TASK, [{"text": "tea", "label": ["hot", "new"]}, {"text": "soup", "label": []}], 2)


def test_shifts_take_off_what_each_template_prefers():
    some = [np.random.default_rng(seed).normal([3.0, -1.0], size=(5, 2)) for seed in range(2)]
    balance, mean = centred(some, ["a", "b"])
    np.testing.assert_allclose(mean.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(mean, sum(one - one.mean(0) for one in some) / 2)
    for shift, one in zip(balance, some, strict=True):
        assert shift == pytest.approx({"a": -one[:, 0].mean(), "b": -one[:, 1].mean()})


def test_answers_alone_are_decided_by_thresholds_of_the_labelled_rows():
    _, labels, y, values = made()
    opinions = by_answers(values, LABELS, labels)
    assert set(opinions.weights) == {"vectors"} and set(opinions.thresholds) == set(LABELS)
    row = dict(zip(LABELS, values[0].tolist(), strict=True))
    expected = {
        name: opinions.bias + opinions.vectors * (row[name] - values[:, k].mean()) for k, name in enumerate(LABELS)
    }
    assert opinions.together([row]) == pytest.approx(expected)
    calibrated = expit([[*opinions.together([dict(zip(LABELS, r, strict=True))]).values()] for r in values.tolist()])
    assert calibrated.mean() == pytest.approx(y.mean(), abs=0.01)


@pytest.mark.parametrize("labels", [[[], []], [["hot"], ["hot"]], [["hot", "new"], ["new", "hot"]], [["hot"], []]])
def test_rows_that_teach_nothing(labels):
    with pytest.raises(
        InputError, match=r"Expected training rows with different labels, of at least two, found .* in 2 rows"
    ):
        require_label_sets(TASK, [{"text": "tea", "label": its} for its in labels], Recipe())


def test_more_rows_than_heads_take(monkeypatch):
    monkeypatch.setattr(label_sets, "MOST_ROWS", 2)
    rows = [{"text": f"tea {i}", "label": its} for i, its in enumerate((["hot"], ["new"], []))]
    require_label_sets(TASK, rows, Recipe())  # whose vectors answer alone
    with pytest.raises(InputError, match=r"Expected at most 2 training rows for heads .*, found 3; take fewer"):
        require_label_sets(TASK, rows, Recipe.small())


def test_rows_that_are_all_the_same():
    rows = [{"text": "tea", "label": its} for its in (["hot"], ["new"], [])]
    with pytest.raises(InputError, match="Expected training rows with different texts, found the same one in all"):
        require_label_sets(TASK, rows, Recipe())
