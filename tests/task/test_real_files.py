"""Published few-shot files read as they are."""

import json

import pytest

from ia3 import Task, few_shot, read_rows
from support.paths import DATA

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the data sets of the paper in {DATA} (IA3_TEST_DATA)")


@pytest.mark.parametrize("name", ["rte", "cb", "copa", "sst2", "anli-r1", "wsc"])
def test_the_papers_few_shot_splits(name):
    task = Task.load(name.replace("-", "_"))
    paths = sorted((DATA / "tfew" / "few_shot" / name).rglob("*.jsonl"))
    assert len(paths) >= 5  # seeds
    for path in paths:
        rows = read_rows(path)
        task.check(rows)
        assert {task.label(row) for row in rows} <= set(task.labels or ())


@pytest.mark.parametrize(
    "name, column, text, label",
    [
        ("rte", "hypothesis", "Yasser Arafat succeeded Abbas.", "not_entailment"),
        ("cb", "hypothesis", "they're all bad", "contradiction"),
        ("copa", "choice2", "The speaker won the debate.", "choice2"),
        ("sst2", "sentence", "deserve better . ", "negative"),
        ("wsc", "span1_text", "the intruder", "True"),
    ],
)
def test_labels_mean_the_same_in_the_papers_files(name, column, text, label):
    """The label of a row that a reader knows."""
    rows = [row for path in (DATA / "tfew" / "few_shot" / name).rglob("*.jsonl") for row in read_rows(path)]
    assert {Task.load(name).label(row) for row in rows if row[column] == text} == {label}


def test_raft_prompts_are_laid_out_as_the_benchmarks():
    fields, instructions = map(
        json.loads, (DATA / "raft" / "prompt_construction_settings.jsonl").read_text().splitlines()
    )
    assert len(fields) == 11
    for name, columns in fields.items():
        task = Task.load(name)
        assert task.columns == sorted(columns) and task.example is not None
        prompt = "\n".join(line.rstrip() for line in task.prompt(task.example).splitlines())
        assert prompt.startswith("\n".join(line.rstrip() for line in instructions[name].splitlines()))
        assert prompt.endswith("".join(f"\n{column}: {task.example[column]}" for column in columns) + "\nLabel:")
        shown = (DATA / "raft" / "example_prompts" / f"{name}.txt").read_text()
        listed = shown.split("Possible labels:\n")[1].split("\n\n")[0].splitlines()
        assert sorted(line.split(". ", 1)[1] for line in listed) == sorted(task.labels or ())
        assert name == "banking_77" or "\n".join(["Possible labels:", *listed, ""]) in prompt


def test_banking77():
    rows = read_rows(DATA / "banking77" / "train.csv")
    task = Task.infer(rows, label_column="category")
    assert list(task.choices) == sorted(json.loads((DATA / "banking77" / "categories.json").read_text()))
    assert len(few_shot(rows, task, 3)) == 231
