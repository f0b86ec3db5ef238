"""`python -m benchmarks.real_data`: rows are drawn as it says, numbers mean what the tables say, and runs go on."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.real_data import __main__ as command
from benchmarks.real_data import adapters, baselines, jobs, prompted, table
from benchmarks.real_data.cells import SEEDS, append, in_order, read_cells
from benchmarks.real_data.data import TASKS, TEST_ROWS, Data, load
from benchmarks.real_data.judging import Found, Unsuited, abstention, judged, of_probabilities
from benchmarks.real_data.methods import METHODS, QUICK, TooEarly, measured
from ia3 import Task
from support import words
from support.paths import DATA

real = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the data sets in {DATA} (IA3_TEST_DATA)")


@pytest.fixture(scope="module")
def toy():
    """A task of 12 training rows and 8 test rows, and 4 rows outside of it."""
    rows = words.rows(100, seed=1)
    rows = [*{row["text"]: row for row in rows}.values()]
    task = Task.infer(rows, template="{{ text }}\nanswer :", choices={"pos": "good", "neg": "bad"})
    train = [row for label in ("pos", "neg") for row in [one for one in rows if one["label"] == label][:6]]
    test = [row for row in rows if row not in train][:8]
    return Data(task, ["text"], train, test, [{"text": text} for text in ("tea", "soup", "cake", "bill")])


@pytest.fixture
def small(tmp_path_factory, monkeypatch):
    """A tiny model in place of SmolLM2."""
    folder = tmp_path_factory.mktemp("real") / "model"
    words.save_model(folder)
    for module in (prompted, adapters, jobs):
        monkeypatch.setattr(module, "EMBEDDED_MODEL", str(folder))
    monkeypatch.setattr(prompted, "_KNOWN", {})
    prompted.base_model.cache_clear()
    yield
    prompted.base_model.cache_clear()


# Rows.


@real
@pytest.mark.parametrize("name", TASKS)
def test_rows_of_a_task(name):
    """No test row is a training row in any draw, labels are names, and draws differ."""
    drawn = []
    for seed in SEEDS[:2]:
        data = load(name, seed, DATA)
        asked = [data.task.fingerprint(row) for row in data.train]
        assert not {*asked} & {data.task.fingerprint(row) for row in data.test}
        assert 0 < len(data.test) <= TEST_ROWS and {*data.labels, *data.train_labels} <= {*data.task.labels}
        assert all({*row} == {*data.columns, data.task.label_column} for row in [*data.train, *data.test])
        assert not any(row[data.task.label_column].isdigit() for row in data.train)
        if "@" in name:
            assert {*Counter(data.train_labels).values()} == {int(name.partition("@")[2])}
        drawn.append(frozenset(asked))
    assert len({*drawn}) == 2
    assert bool(data.outside) == (name == "clinc150@3")


@real
def test_a_seed_draws_the_same_rows_again():
    assert load("irony", 1, DATA) == load("irony", 1, DATA)
    assert load("clinc10@16", 0, DATA).task == load("clinc10@16", 1, DATA).task


@real
def test_a_persons_task_is_made_of_names():
    """What `ours` is told is no more than columns and labels."""
    data = load("rte", 0, DATA)
    task = Task.infer(data.train, data.task.label_column, data.columns)
    assert task.labels == ["entailment", "not_entailment"]
    assert "Question" in data.task.templates[0].prompt and data.task.templates[0] not in [
        *task.templates,
        *task.candidates,
    ]


# Numbers.


def test_what_a_record_measures(toy):
    sure = of_probabilities(["neg", "pos"], [[0.1, 0.9] if label == "pos" else [0.9, 0.1] for label in toy.labels])
    found = judged(toy, Found(sure))
    assert (found["accuracy"], found["macro_f1"]) == (1, 1)
    assert found["log_loss"] == pytest.approx(0.1053605) and found["calibration_error"] == pytest.approx(0.1)


def test_abstention():
    """20 rows outside: one may pass, so the threshold is the second highest."""
    inside = of_probabilities(["a", "b"], [[0.95, 0.05], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]])
    outside = of_probabilities(["a", "b"], [[0.99, 0.01], [0.3, 0.7], *[[0.5, 0.5]] * 18])
    found = abstention(["a", "b", "a", "b"], inside, outside)
    assert found["accepted_right"] == 0.5  # 0.95 and 0.8; 0.7 is no higher than the threshold
    assert found["outside_auroc"] == pytest.approx((19 + 19 + 18.5 + 18) / 80)


# Methods.


@pytest.mark.parametrize(
    "method", ["most-frequent", "tfidf", "zero-shot", "zero-shot-balanced", "icl-8", "icl-16-balanced"]
)
def test_methods_that_train_little(method, toy, small):
    if method == "icl-16-balanced":
        toy = replace(toy, train=[*toy.train, *[{**row, "text": f"the {row['text']}"} for row in toy.train]])
    record = measured("toy", method, 0, toy, {})
    assert record.get("shots", 0) == {"icl-8": 8, "icl-16-balanced": 16}.get(method, 0)
    assert 0 <= record["accuracy"] <= 1 and 0 <= record["outside_auroc"] <= 1 and record["log_loss"] > 0
    assert (record["task"], record["method"], record["seed"], record["test_rows"]) == ("toy", method, 0, 8)
    json.dumps(record)


def test_a_baseline_learns(toy):
    assert measured("toy", "tfidf", 0, toy, {})["accuracy"] == 1
    record = measured("toy", "most-frequent", 0, toy, {})
    assert record["accuracy"] == max(Counter(toy.labels).values()) / 8


def test_one_row_of_a_label_leaves_nothing_to_choose_by(toy):
    few = replace(toy, train=[toy.train[0], toy.train[-1]])
    assert baselines.tfidf(few, 0).details["strength"] == baselines._USUAL_STRENGTH


def test_balancing_gives_each_label_its_share(toy, small):
    test = prompted.zero_shot(replace(toy, test=toy.train), balanced=True).predictions
    assert sum(one.probabilities["pos"] for one in test) / len(test) == pytest.approx(0.5, abs=0.02)


def test_a_row_is_asked_once(toy, small, monkeypatch):
    first = prompted.zero_shot(toy, balanced=False)
    monkeypatch.setattr(prompted, "predict", None)
    again = prompted.zero_shot(toy, balanced=False)
    assert again.predictions == first.predictions and again.details == first.details


@pytest.mark.parametrize("method", ["ours", "ours-worded", "tfew", "lora"])
def test_methods_that_train(method, toy, small, monkeypatch):
    monkeypatch.setattr(adapters, "_LEARNING_RATES", [1e-3, 3e-3])
    record = measured("toy", method, 0, toy, {})
    assert record["steps"] > 0 and record["train_seconds"] > 0 and record["cpu_seconds"] > 0
    assert ("opinions" in record) == method.startswith("ours")
    if method != "lora":  # its folder answers as the job has measured
        assert record["trained"] == {key: record[key] for key in ("accuracy", "macro_f1")}
    assert bool(record.get("wordings")) == (method == "ours")
    if method == "lora":
        rates = record["held_out"]
        assert record["learning_rate"] == min(rates, key=rates.__getitem__) and len(rates) == 2


def test_peft_ia3_makes_the_steps_that_tfew_made(toy, small):
    with pytest.raises(TooEarly, match="tfew"):
        measured("toy", "peft-ia3", 0, toy, {})
    assert measured("toy", "peft-ia3", 0, toy, {("toy", "tfew", 0): {"steps": 3}})["steps"] == 3


@real
def test_answers_of_a_rows_own(small):
    data = load("copa", 0, DATA)
    for method in ("tfidf", "minilm", "setfit"):
        with pytest.raises(Unsuited):
            measured("copa", method, 0, data, {})


# Cells and tables.


def test_order():
    cells = [*in_order(["rte", "cb"], ["icl-8", "ours", "tfidf"], [0, 1])]
    assert cells[:4] == [("rte", "tfidf", 0), ("rte", "tfidf", 1), ("cb", "tfidf", 0), ("cb", "tfidf", 1)]
    assert cells[4:8] == [("rte", "ours", 0), ("cb", "ours", 0), ("rte", "icl-8", 0), ("cb", "icl-8", 0)]
    assert len({*cells}) == len(cells) == 12 and list(METHODS)[: len(QUICK)] == list(QUICK)


@real
def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    file = tmp_path / "cells.jsonl"
    append(file, {"task": "cb", "method": "tfidf", "seed": 0, "accuracy": 0.25})
    options = [
        "--results",
        str(file),
        "--data",
        str(DATA),
        "--tasks",
        "cb",
        "--methods",
        "tfidf,peft-ia3",
        "--seeds",
        "0,1",
    ]
    command.main(options)
    cells = read_cells(file)
    assert [*cells] == [("cb", "tfidf", 0), ("cb", "tfidf", 1)] and cells["cb", "tfidf", 0]["accuracy"] == 0.25
    assert "left out, tfew is not there" in capsys.readouterr().out


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match=r"Expected some of rte, .*, found 'sst'"):
        command.main(["--tasks", "rte,sst"])


def record(name, method, seed, accuracy):
    measures = dict.fromkeys(table.MEASURES, 0.5)
    return (name, method, seed), {**measures, "accuracy": accuracy}


def test_tables():
    cells = dict(
        [
            *(record("rte", "ours", seed, value) for seed, value in zip(SEEDS, (0.6, 0.7, 0.8), strict=True)),
            *(record("rte", "minilm", seed, value) for seed, value in zip(SEEDS, (0.5, 0.7, 0.6), strict=True)),
            record("rte", "lora", 32, 0.9),
            record("cb", "ours", 0, 0.5),
            record("cb", "minilm", 0, 0.6),
        ]
    )
    lines = table.table(cells, "accuracy").splitlines()
    assert lines[2].startswith("| minilm | 60.0 ± 10.0 | 60.0 (1) | – |") and lines[2].endswith("| – | – |")
    assert lines[3].startswith("| ours | 70.0 ± 10.0 | 50.0 (1) |") and lines[4].startswith("| lora | 90.0 (1) | – |")
    # Paired: LoRA's only draw is compared with ours on the same.
    assert table.against_best(cells).splitlines()[2:] == [
        "| rte | 80.0 | lora | 90.0 | -10.0 (1) |",
        "| cb | 50.0 | minilm | 60.0 | -10.0 (1) |",
        "| mean |  |  |  | -10.0 |",
    ]
    assert table.against_each(cells).splitlines()[2:] == [
        "| lora | -10.0 | 1 | 0 | 1 |",
        "| minilm | +0.0 | 2 | 1 | 1 |",
    ]


def test_a_mean_needs_all_tasks():
    cells = dict(record(name, "minilm", seed, 0.5) for name in TASKS if name != "copa" for seed in SEEDS)
    assert table.table(cells, "accuracy").splitlines()[2].endswith("| – | 50.0 |")
