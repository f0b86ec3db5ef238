"""Intervals of metrics: the values are the tasks' own, and the resamples are those of a plain bootstrap."""

import random

import numpy as np
import pytest
import scipy.stats

from ia3 import Task
from ia3.evaluation.intervals import bootstrap, interval, measures
from ia3.task.fields import Fields
from ia3.task.free_text import FreeText

NAMES = ["a", "b", "c"]
PLAIN = Task(template="{{ text }} is", choices={name: name for name in NAMES})
UNEQUAL = Task(template="{{ text }} is", choices=PLAIN.choices, grades=NAMES, costs={"a": {"b": 5, "c": 2}})
SETS = Task(template="{{ text }} is", choices=PLAIN.choices, multi_label=True)
TEXT = FreeText.create({"template": "{{ text }} In short:", "answer": "{{ summary }}"})
FIELDS = Fields.create({"template": "{{ text }} Details:", "fields": ["who", "when"]})


def some(task, count=40):
    """Answers that are right half of the time."""
    chance = random.Random(0)

    def one():
        if task is SETS:
            return tuple(name for name in NAMES if chance.random() < 0.4)
        if task is TEXT:
            return " ".join(chance.choices(["tea", "soup", "cake"], k=2))
        if task is FIELDS:
            return {"who": chance.choice([None, "Ann", ["Ann", "Bob"]]), "when": chance.choice([None, "today"])}
        return chance.choice(NAMES)

    truth = [one() for _ in range(count)]
    return truth, [its if chance.random() < 0.5 else one() for its in truth]


def metrics(task, truth, said):
    return task.metrics(said, truth) if isinstance(task, FreeText) else task.metrics(truth, said)


@pytest.mark.parametrize(
    "task", [PLAIN, UNEQUAL, SETS, TEXT, FIELDS], ids=["plain", "unequal", "sets", "text", "fields"]
)
def test_values_are_those_of_the_task_on_all_rows_and_on_each_resample(task):
    truth, said = some(task)
    found, expected = measures(task, truth, said), metrics(task, truth, said)
    assert len(found) >= 2
    assert {name: one.value for name, one in found.items()} == pytest.approx({name: expected[name] for name in found})
    values = bootstrap(found, resamples=150, seed=3)
    draws = np.random.default_rng(3).multinomial(40, np.full(40, 1 / 40), 100)[:12]
    for number, counts in enumerate(draws):
        rows = np.repeat(np.arange(40), counts)
        expected = metrics(task, [truth[i] for i in rows], [said[i] for i in rows])
        drawn = {name: value[number] for name, value in values.items()}
        assert drawn == pytest.approx({name: expected[name] for name in found})


def test_intervals_are_those_of_a_plain_bootstrap_and_of_scipys():
    truth, said = some(PLAIN, 200)
    low, high = interval(bootstrap(measures(PLAIN, truth, said), seed=1)["accuracy"])
    right = np.array([one == other for one, other in zip(truth, said, strict=True)], dtype=float)
    chance = np.random.default_rng(7)
    plain = [right[chance.integers(0, 200, 200)].mean() for _ in range(4000)]
    assert (low, high) == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.011)
    its = scipy.stats.bootstrap((right,), np.mean, method="percentile", rng=chance).confidence_interval
    assert (low, high) == pytest.approx(tuple(its), abs=0.011)
    assert low < right.mean() < high


def test_measures_share_their_draws_so_that_differences_are_paired():
    truth, said = some(PLAIN, 100)
    other = [*said[:-1], "c" if said[-1] != "c" else "a"]
    two = {"one": measures(PLAIN, truth, said)["accuracy"], "other": measures(PLAIN, truth, other)["accuracy"]}
    values = bootstrap(two)
    apart = interval(values["one"])
    together = interval(values["one"] - values["other"])
    assert together[1] - together[0] < (apart[1] - apart[0]) / 3  # a single row differs


def test_where_all_rows_are_right_the_bootstrap_knows_nothing():
    truth, _ = some(PLAIN)
    assert interval(bootstrap(measures(PLAIN, truth, truth))["accuracy"]) is None


def test_many_labels_and_rows_stay_small():
    names = [f"label {number}" for number in range(77)]
    task = Task(template="{{ text }} is", choices={name: name for name in names})
    chance = random.Random(0)
    truth, said = ([chance.choice(names) for _ in range(300)] for _ in range(2))
    values = bootstrap(measures(task, truth, said), resamples=250)
    assert {name: len(its) for name, its in values.items()} == {"accuracy": 250, "macro_f1": 250}
    assert bootstrap({}) == {}
