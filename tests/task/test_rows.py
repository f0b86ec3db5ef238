"""Whatever rows come as, every function that takes rows reads them alike, or says in one line why it does not."""

import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from ia3 import (
    IA3Config,
    IA3Model,
    InputError,
    Member,
    Recipe,
    Scorer,
    Task,
    TFewTrainer,
    as_rows,
    cross_validate,
    draw_shots,
    few_shot,
    predict,
    predict_in_context,
    score_choices,
)
from ia3.evaluation.costs import measure
from ia3.evaluation.icl import shots_text
from ia3.evaluation.learner import fold_of_each
from ia3.training.pretrain import MixtureTrainer
from support import tiny, words

TEMPLATE = "review : {{ text }} answer :"
CHOICES = {"pos": "good", "neg": "not good"}
TASK = Task(template=TEMPLATE, choices=CHOICES)
PAIRS = Task(template="{{ first }} {{ second }}", choices=CHOICES)
ENDINGS = Task(template="{{ text }}", choices="{{ endings }}")
ROWS = words.rows(12)
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
RECIPE = Recipe.small().changed(steps=2, early_stopping=None)

FORMS = {
    "a list": lambda: ROWS,
    "a tuple": lambda: tuple(ROWS),
    "an iterator": lambda: iter(ROWS),
    "a generator": lambda: (row for row in ROWS),
    "a DataFrame": lambda: pd.DataFrame(ROWS),
    "a part of a DataFrame": lambda: pd.DataFrame(ROWS, index=range(100, 112)).astype({"label": "category"}),
    "the rows of a DataFrame": lambda: [row for _, row in pd.DataFrame(ROWS).iterrows()],
    "a Dataset": lambda: datasets.Dataset.from_list(ROWS),
    "a streamed Dataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "a Dataset with class labels": lambda: datasets.Dataset.from_list(ROWS).class_encode_column("label"),
    "a Dataset with a format": lambda: datasets.Dataset.from_list(ROWS).with_format("numpy"),
    "columns": lambda: COLUMNS,
    "columns as arrays": lambda: {name: np.array(column) for name, column in COLUMNS.items()},
    "columns as Series": lambda: {name: pd.Series(column, index=range(5, 17)) for name, column in COLUMNS.items()},
}


@pytest.fixture(params=FORMS)
def form(request):
    """Makes the same rows in each form in turn."""
    return FORMS[request.param]


@pytest.fixture(scope="module")
def tokenizer():
    return words.tokenizer()


def adapted(*names):
    base = tiny.build("llama", vocab_size=len(words.VOCABULARY))
    return IA3Model(base, {name: IA3Config(task_type="CAUSAL_LM") for name in names or ["default"]})


class TestForms:
    def test_are_the_same_rows(self, form):
        assert [dict(row) for row in as_rows(form(), TASK)] == ROWS

    def test_in_every_function_that_reads_tasks(self, form):
        assert Task.infer(form()).model_dump() == Task.infer(ROWS).model_dump()
        TASK.check(form())
        assert few_shot(form(), TASK, 3, seed=1) == few_shot(ROWS, TASK, 3, seed=1)
        assert draw_shots(form(), TASK, 4) == draw_shots(ROWS, TASK, 4)
        assert shots_text(TASK, form()) == shots_text(TASK, ROWS)
        assert fold_of_each(TASK, form(), 2) == fold_of_each(TASK, ROWS, 2)

    def test_in_every_function_that_answers(self, form, tokenizer):
        base = tiny.build("llama", vocab_size=len(words.VOCABULARY))
        expected = predict(base, tokenizer, TASK, ROWS)
        assert predict(base, tokenizer, TASK, form()) == expected
        assert predict(base, tokenizer, [TASK] * 12, form()) == expected
        assert measure(base, tokenizer, TASK, form()).predictions == expected
        scorer = Scorer(base, tokenizer)
        assert scorer.questions(TASK.wordings(form())) == scorer.questions(TASK.wordings(ROWS))
        shots = draw_shots(ROWS, TASK, 2)
        in_context = predict_in_context(base, tokenizer, TASK, ROWS, shots)
        assert predict_in_context(base, tokenizer, TASK, form(), pd.DataFrame(shots)) == in_context

    def test_in_every_trainer(self, form, tokenizer, tmp_path):
        arguments = RECIPE.training_arguments(tmp_path, save_strategy="no")
        found, expected = (
            TFewTrainer(adapted(), arguments, tokenizer, Member(TASK, make(), eval_rows=make()), RECIPE)
            for make in (form, lambda: ROWS)
        )
        assert found.train_dataset == expected.train_dataset and found.eval_dataset == expected.eval_dataset
        assert found.evaluate(form())["eval_loss"] == expected.evaluate()["eval_loss"]
        assert found.predict(form()).metrics["test_accuracy"] == expected.evaluate()["eval_accuracy"]
        fleet = TFewTrainer(
            adapted("one", "two"),
            arguments,
            tokenizer,
            [Member(TASK, form(), name, eval_rows=form()) for name in ("one", "two")],
        )
        assert [len(rows) for rows in fleet.eval_dataset.values()] == [12, 12]
        mixture = MixtureTrainer(adapted(), arguments, tokenizer, [(TASK, form())]).mixture
        assert [dict(row) for row in mixture.tasks[0][1]] == ROWS

    def test_in_cross_validation(self, form, tokenizer, tmp_path):
        some = [cross_validate(adapted(), tokenizer, TASK, make(), RECIPE, 2) for make in (form, lambda: ROWS)]
        assert some[0] == some[1]


class TestTexts:
    @pytest.mark.parametrize(
        "texts",
        [
            ["the tea was awful", "tea"],
            iter(["the tea was awful", "tea"]),
            np.array(["the tea was awful", "tea"]),
            pd.Series(["the tea was awful", "tea"], index=[7, 3]),
            [{"text": "the tea was awful"}, "tea"],
        ],
        ids=lambda texts: type(texts).__name__,
    )
    def test_are_rows_of_a_task_that_reads_one_column(self, texts, tokenizer):
        base = tiny.build("llama", vocab_size=len(words.VOCABULARY))
        expected = predict(base, tokenizer, TASK, [{"text": "the tea was awful"}, {"text": "tea"}])
        assert predict(base, tokenizer, TASK, texts) == expected

    def test_each_of_its_own_task(self, tokenizer):
        base = tiny.build("llama", vocab_size=len(words.VOCABULARY))
        other = Task(template="{{ review }} :", choices=CHOICES)
        found = predict(base, tokenizer, [TASK, other], ["tea", "soup"])
        assert found[1].scores == pytest.approx(predict(base, tokenizer, other, [{"review": "soup"}])[0].scores)

    def test_a_task_reads_one(self):
        assert TASK.prompt("tea") == "review : tea answer :"
        assert TASK.answers("tea") == CHOICES and TASK.fingerprint("tea") == TASK.fingerprint({"text": "tea"})

    @pytest.mark.parametrize(
        "task, message",
        [
            (PAIRS, r"a row with the columns 'first', 'second', found a text alone, 'tea' \(row 1\)"),
            (None, r"a row with its columns, found a text alone, 'tea' \(row 1\)"),
        ],
    )
    def test_are_not_enough_for_several_columns(self, task, message):
        with pytest.raises(InputError, match=message):
            as_rows(["tea"], task)

    def test_have_no_labels(self, tokenizer, tmp_path):
        with pytest.raises(InputError, match="label column 'label', found the columns 'text'"):
            few_shot(["tea", "soup"], TASK, 1)
        with pytest.raises(InputError, match="label column 'label', found the columns 'text'"):
            TFewTrainer(adapted(), RECIPE.training_arguments(tmp_path), tokenizer, Member(TASK, ["tea", "soup"]))
        with pytest.raises(InputError, match="label column 'label', found the columns 'text'"):
            TASK.label("tea")
        with pytest.raises(InputError, match="found a text alone"):
            Task.infer(["tea", "soup"])


class TestOneRow:
    @pytest.mark.parametrize(
        "row",
        [
            {"text": "tea", "label": "pos"},
            {"text": ["good tea", "and soup"], "label": "pos"},  # a cell can be a list
            pd.Series({"text": "tea", "label": "pos"}),
            pd.DataFrame([{"text": "tea", "label": "pos"}]).iloc[0],
        ],
        ids=str,
    )
    def test_is_a_list_of_one(self, row):
        assert [dict(found) for found in as_rows(row, TASK)] == [dict(row)]
        assert TASK.prompt(row) == TASK.prompt(dict(row)) and TASK.label(row) == "pos"

    def test_is_labelled(self, tokenizer):
        base = tiny.build("llama", vocab_size=len(words.VOCABULARY))
        assert predict(base, tokenizer, TASK, {"text": "tea"}) == predict(base, tokenizer, TASK, [{"text": "tea"}])

    def test_dictionaries_are_not_copied(self):
        assert all(found is row for found, row in zip(as_rows(iter(ROWS)), ROWS, strict=True))


class TestValues:
    def test_of_a_frame_are_pythons_own(self):
        frame = pd.DataFrame(
            {
                "text": ["tea", None, "soup"],
                "label": pd.array([1, None, 0], dtype="Int64"),
                "score": [0.5, float("nan"), 2.0],
                "endings": [np.array(["a", "b"]), ["c"], None],
                3: [True, False, True],
            }
        )
        found = as_rows(frame)
        assert found[0] == {"text": "tea", "label": 1, "score": 0.5, "endings": ["a", "b"], "3": True}
        assert found[1] == {"text": None, "label": None, "score": None, "endings": ["c"], "3": False}
        assert all(type(value) in (str, int, float, list, bool, type(None)) for row in found for value in row.values())

    def test_missing_ones_are_named(self):
        frame = pd.DataFrame({"text": ["tea", pd.NA], "label": ["pos", "neg"]})
        with pytest.raises(InputError, match=r"found it empty \(row 2\)"):
            TASK.check(frame)
        frame = pd.DataFrame({"text": ["tea", "soup"], "label": ["pos", None]})
        with pytest.raises(InputError, match=r"Expected a label, found none \(row 2\)"):
            TASK.check(frame)

    def test_class_labels_stay_numbers_for_a_task_that_knows_numbers(self):
        data = datasets.Dataset.from_list(ROWS).class_encode_column("label")
        numbers = [{**row, "label": int(row["label"] == "pos")} for row in ROWS]
        for task in (
            Task(template=TEMPLATE, choices={"0": "not good", "1": "good"}),
            Task(template=TEMPLATE, choices=CHOICES, class_names=False),
        ):
            assert as_rows(data, task) == numbers
        assert as_rows(data, Task(template=TEMPLATE, choices=["good", "bad"], aliases={"pos": "good"})) == ROWS


@pytest.mark.parametrize(
    "rows, task, message",
    [
        (
            "tea",
            TASK,
            "Expected rows, found the single text 'tea'; put a text into a list, or read a file with read_rows",
        ),
        ("x" * 500, TASK, "found the single text 'x{80}'…;"),
        (b"tea", TASK, "single text"),
        (3, TASK, "Expected rows, such as a list of dictionaries or a DataFrame, found a int"),
        (None, TASK, "found a NoneType"),
        ([None], TASK, r"Expected some text, found it empty \(row 1\); fill the row, or leave it out"),
        ([{"text": "tea"}, ("tea", "pos")], TASK, r"found a tuple \(row 2\)"),
        ([SimpleNamespace(text="tea")], TASK, r"found a SimpleNamespace \(row 1\)"),
        (np.array([["tea", "pos"]]), TASK, r"found a ndarray \(row 1\)"),
        ({"text": ["tea", "soup"], "label": ["pos"]}, TASK, "columns of one length, found 'text': 2, 'label': 1"),
        ({"text": {0: "tea"}, "label": {0: "pos"}}, TASK, "found a dictionary of dictionaries, 'text', 'label'"),
        ({"text": ["tea"], "endings": ["a"]}, ENDINGS, "may be columns or one row"),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), TASK, "DataFrame whose columns differ"),
        (
            datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
            TASK,
            r"splits 'train'; take one: data\['train'\]",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_are_no_rows(rows, task, message):
    with pytest.raises(InputError, match=message) as error:
        as_rows(rows, task)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_trainer_of_several_tasks_measures_no_rows(tokenizer, tmp_path):
    members = [Member(TASK, ROWS, name) for name in ("one", "two")]
    fleet = TFewTrainer(adapted("one", "two"), RECIPE.training_arguments(tmp_path), tokenizer, members)
    with pytest.raises(InputError, match="give each member its eval_rows"):
        fleet.evaluate(ROWS)
    alone = TFewTrainer(adapted("one", "two"), RECIPE.training_arguments(tmp_path), tokenizer, members[1:])
    assert alone.evaluate(pd.DataFrame(ROWS))["eval_accuracy"] >= 0
    with pytest.raises(InputError, match="Expected labelled rows to measure on, found none"):
        alone.evaluate([])


def test_pandas_is_not_imported_for_it():
    code = """
import sys
from ia3 import Task, few_shot
task = Task.infer({"text": ["a", "b"], "label": ["x", "y"]})
few_shot(iter([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]), task, 1)
print([name for name in ("pandas", "datasets", "numpy", "torch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "prompts", [pd.Series(["the tea was", "the soup is"], index=[4, 2]), iter(["the tea was", "the soup is"])]
)
def test_prompts_come_in_any_form_too(prompts, tokenizer):
    base = tiny.build("llama", vocab_size=len(words.VOCABULARY))
    choices = [["good", "bad"]] * 2
    found = score_choices(base, tokenizer, prompts, iter(choices))
    expected = score_choices(base, tokenizer, ["the tea was", "the soup is"], choices)
    assert all(map(torch.equal, found, expected))
    with pytest.raises(InputError, match="Expected a list of prompts"):
        score_choices(base, tokenizer, "the tea was", choices)


def test_labels_of_columns():
    assert Counter(row["label"] for row in few_shot(COLUMNS, TASK, 2)) == {"pos": 2, "neg": 2}
