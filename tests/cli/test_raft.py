"""`ia3 raft`: from rows in the benchmark's columns to its leaderboard's files, on a tiny model."""

import contextlib
import csv
import io
import json
import random
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ia3 import Task, TFewTrainer
from ia3.cli import main
from ia3.task.raft import RAFT_TASKS, RaftTask, write_predictions
from support import tiny, words

FILES = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "calibration.json",
    "metrics.json",
    "predictions.csv",
    "recipe.yaml",
    "run.json",
    "task.yaml",
]


def rows(task: Task, count: int, first: int = 0, labelled: bool = True) -> list[dict[str, str]]:
    """Rows in the benchmark's columns; one word of a text tells the label."""
    chance = random.Random(f"{task.name} {first}")
    telling = [*words.GOOD, *words.BAD, *words.OTHER]
    made = []
    for i in range(first, first + count):
        which = i % len(task.labels)
        text = f"the {chance.choice(['tea', 'soup'])} was" + 12 * f" {telling[which % len(telling)]}"
        row = dict.fromkeys(task.columns, text) | {"ID": str(i)}
        made.append(row | {"Label": task.labels[which]} if labelled else row)
    return made


def write_task(folder, name, train=50, test=12, unlabelled=None):
    task = Task.embedded(name)
    words.write_csv(folder / name / "train.csv", rows(task, train))
    test_rows = rows(task, test, first=train, labelled=False)
    words.write_csv(folder / name / "test_unlabeled.csv", [row | (unlabelled or {}) for row in test_rows])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model that knows the benchmark's words, the data of four tasks, and a recipe."""
    folder = tmp_path_factory.mktemp("raft")
    for name in ("overruling", "semiconductor_org_types", "banking_77"):
        write_task(folder / "data", name)
    write_task(folder / "data", "twitter_complaints", unlabelled={"Label": "Unlabeled"})
    texts = [words.VOCABULARY]
    for name in RAFT_TASKS:
        task = Task.embedded(name)
        texts += [task.prompt(rows(task, 1)[0]).split(), *(text.split() for text in task.answers({}).values())]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(word for text in texts for word in text))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("pad_token", "eos_token", "unk_token"), words.SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder / "model")
    tiny.build("llama", vocab_size=len(vocabulary)).save_pretrained(folder / "model")
    (folder / "quick.yaml").write_text("steps: 3\nbatch_size: 4\n")
    return folder


def usual(place, output) -> dict:
    """Options of a short run of two tasks."""
    return {
        "model": place / "model",
        "data": place / "data",
        "tasks": "overruling,twitter_complaints",
        "recipe": place / "quick.yaml",
        "folds": 2,
        "output": output,
    }


@pytest.fixture
def raft(ia3, place, tmp_path):
    """`ia3 raft` on the tiny model; options as keywords, None leaves one out."""

    def run(*more, **options):
        return ia3("raft", *more, **{**usual(place, tmp_path / "out"), **options})

    return run


@pytest.fixture(scope="module")
def finished(place):
    """The folder of such a run, which no test changes, and what the run printed."""
    folder = place / "finished"
    arguments = [str(part) for key, value in usual(place, folder).items() for part in (f"--{key}", value)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main(["raft", *arguments])
    assert not ended.value.code
    return folder, out.getvalue()


def test_from_rows_to_a_submission(raft, ia3, place, tmp_path):
    (tmp_path / "learning.yaml").write_text("steps: 30\nlearning_rate: 0.1\n")
    code, out, err = raft(
        "--json", tasks="overruling,semiconductor_org_types", recipe=tmp_path / "learning.yaml", seed=3, folds=3
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["output"] == str(tmp_path / "out") and list(found["tasks"]) == [
        "overruling",
        "semiconductor_org_types",
    ]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {
        "mean": found["mean"],
        "tasks": found["tasks"],
    }
    for name, its in found["tasks"].items():
        folder = tmp_path / "out" / name
        assert sorted(path.name for path in folder.iterdir()) == FILES
        task = Task.load(folder / "task.yaml")
        # A word tells the label: rows that no fold's adapter has seen and test rows are labelled rightly.
        right = [row["Label"] for row in rows(task, 12, first=50)]
        lines = (folder / "predictions.csv").read_bytes().decode().split("\n")
        assert lines[0] == "ID,Label" and lines[-1] == "" and len(lines) == 14
        ids, labels = zip(*(line.split(",") for line in lines[1:-1]), strict=True)
        assert ids == tuple(str(50 + i) for i in range(12)) and set(labels) <= set(task.labels)
        assert task.metrics(right, labels)["accuracy"] > 0.9
        assert its["cross_validation"]["macro_f1"] > 0.9 and its["cross_validation"]["folds"] == 3
        counts = Counter(row["Label"] for row in rows(task, 50)).most_common()
        share = counts[0][1] / 50  # F1 of the majority is 2p / (1 + p), of the others 0
        assert its["majority"]["macro_f1"] == pytest.approx(2 * share / (1 + share) / len(counts))
        assert (its["train_examples"], its["test_rows"], its["seed"]) == (50, 12, 3) and its["task"] == name
        assert "by `ia3 raft`" in (folder / "README.md").read_text() and f"{name}: 50 training rows" in err
    scores = [its["cross_validation"]["macro_f1"] for its in found["tasks"].values()]
    assert found["mean"]["macro_f1"] == pytest.approx(sum(scores) / 2)

    # The adapter is the one that `ia3 train` makes of these rows, and `ia3 predict` says the same with it.
    name = "semiconductor_org_types"
    code, _, err = ia3(
        "train",
        model=place / "model",
        task=name,
        data=place / "data" / name / "train.csv",
        examples_per_label=0,
        recipe=tmp_path / "learning.yaml",
        seed=3,
        output=tmp_path / "trained",
    )
    assert code == 0, err
    ours, alone = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "out" / name, tmp_path / "trained")
    )
    assert all(torch.equal(ours[key], alone[key]) for key in alone)
    test = place / "data" / name / "test_unlabeled.csv"
    code, out, _ = ia3("predict", tmp_path / "out" / name, "--json", data=test)
    predicted = list(csv.DictReader((tmp_path / "out" / name / "predictions.csv").open()))
    assert code == 0 and [item["label"] for item in json.loads(out)] == [row["Label"] for row in predicted]


def test_all_77_answers_and_all_three_terms(raft, tmp_path, monkeypatch):
    """50 rows have 50 different labels: no folds can be stratified, and every question has all 77 choices."""
    seen, weights, real = [], [], TFewTrainer.training_step

    def counted(self, model, inputs, *args):
        seen.extend(len(question.choices) for question in inputs["questions"])
        weights.append(self._loss_weights)
        return real(self, model, inputs, *args)

    monkeypatch.setattr(TFewTrainer, "training_step", counted)
    code, out, err = raft("--json", tasks="banking_77", folds=5)
    assert code == 0, err
    assert seen == [77] * (3 * 4 * 6)  # steps, rows, five folds and the whole
    assert {tuple(its.values()) for its in weights} == {(1.0, 1.0, 1.0, 1.0)}
    found = json.loads(out)["tasks"]["banking_77"]
    assert 0 <= found["cross_validation"]["macro_f1"] <= 1 and found["majority"]["accuracy"] == 0.02
    task = Task.load(tmp_path / "out" / "banking_77" / "task.yaml")
    labels = [row["Label"] for row in csv.DictReader((tmp_path / "out" / "banking_77" / "predictions.csv").open())]
    assert len(labels) == 12 and set(labels) <= set(task.labels) and "Refund_not_showing_up" in task.labels


def test_finished_tasks_are_not_repeated(raft, place, finished, tmp_path, monkeypatch):
    train = TFewTrainer.train

    def interrupted(self, *args, **kwargs):
        if "twitter_complaints" in str(self.args.output_dir):
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    monkeypatch.setattr(TFewTrainer, "train", interrupted)
    code, _, err = raft()
    assert code == 130 and "same command and --resume" in err
    first = {path: path.read_bytes() for path in (tmp_path / "out" / "overruling").iterdir()}
    assert sorted(path.name for path in first) == FILES
    assert not (tmp_path / "out" / "twitter_complaints" / "predictions.csv").exists()
    trained = []
    monkeypatch.setattr(TFewTrainer, "train", lambda self, *a, **k: trained.append(self) or train(self, *a, **k))
    for changes, message in (({"folds": 3}, "'folds'"), ({"seed": 1}, "'seed'"), ({"recipe": "small"}, "'recipe'")):
        code, _, err = raft("--resume", **changes)
        assert code == 2 and f"found another {message};" in err
    shutil.copytree(place / "data", tmp_path / "data")
    write_task(tmp_path / "data", "overruling", train=49, test=11)
    code, _, err = raft("--resume", data=tmp_path / "data")
    assert code == 2 and "'training rows', 'test rows'" in err and trained == []
    code, out, _ = raft("--resume", "--json")
    assert code == 0 and len(trained) == 2 and list(json.loads(out)["tasks"]) == ["overruling", "twitter_complaints"]
    assert {path: path.read_bytes() for path in (tmp_path / "out" / "overruling").iterdir()} == first
    whole, out = finished
    for text in ("2-fold", "overruling", "twitter_complaints", "majority class", "mean", "24", "Training", "loss"):
        assert text in out
    assert "not comparable" not in out
    for name in ("predictions.csv", "adapter_model.safetensors", "calibration.json"):
        both = (folder / "twitter_complaints" / name for folder in (tmp_path / "out", whole))
        assert len({path.read_bytes() for path in both}) == 1
    # Another task can join, and without --resume all are done anew.
    before = len(trained)
    assert raft("--resume", tasks="semiconductor_org_types,overruling")[0] == 0 and len(trained) == before + 2
    assert raft(tasks="overruling")[0] == 0 and len(trained) == before + 4


def test_one_that_is_done_anew_is_unfinished_until_it_is_done(raft, finished, tmp_path, monkeypatch):
    import ia3.evaluation.prediction

    shutil.copytree(finished[0], tmp_path / "out")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    predictions = tmp_path / "out" / "overruling" / "predictions.csv"
    text = predictions.read_bytes()
    predictions.unlink()
    code, _, err = raft("--resume", tasks="overruling")
    assert code == 2 and "predictions.csv of a finished task" in err and err.count("\n") == 1
    predictions.write_bytes(text)
    monkeypatch.setattr(ia3.evaluation.prediction, "predict", interrupted)
    assert (tmp_path / "out" / "overruling" / "run.json").exists()
    assert raft(tasks="overruling")[0] == 130
    assert not (tmp_path / "out" / "overruling" / "run.json").exists()


def test_results_of_an_earlier_run_do_not_hinder_resuming(raft, finished, tmp_path, monkeypatch):
    """A run with other settings in a finished folder, interrupted in its first task, goes on with the second too."""
    import ia3.evaluation.prediction

    shutil.copytree(finished[0], tmp_path / "out")
    real = ia3.evaluation.prediction.predict

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ia3.evaluation.prediction, "predict", interrupted)
    assert raft(seed=1)[0] == 130
    monkeypatch.setattr(ia3.evaluation.prediction, "predict", real)
    code, out, err = raft("--resume", "--json", seed=1)
    assert code == 0, err
    assert {its["seed"] for its in json.loads(out)["tasks"].values()} == {1}


@pytest.mark.parametrize(
    "damage", ["{}", "[]", "null", "{", "cross_validation", "majority", "test_rows", "seconds", "command"]
)
def test_results_that_are_none(raft, finished, tmp_path, damage):
    """What is no JSON, or no results, or lacks a part of them."""
    shutil.copytree(finished[0] / "overruling", tmp_path / "out" / "overruling")
    path = tmp_path / "out" / "overruling" / "metrics.json"
    if damage.isidentifier() and damage != "null":
        results = json.loads(path.read_text())
        del results[damage]
        damage = json.dumps(results)
    path.write_text(damage)
    code, out, err = raft("--resume", "--json", tasks="overruling")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "Expected the results of a finished task in" in err and "delete the folder" in err


def test_an_adapter_of_another_command_in_a_finished_folder(raft, ia3, place, finished, tmp_path):
    folder = tmp_path / "out" / "overruling"
    shutil.copytree(finished[0] / "overruling", folder)
    rows = place / "data" / "overruling" / "train.csv"
    options = {"model": place / "model", "data": rows, "examples_per_label": 0, "steps": 1, "folds": 2}
    assert ia3("train", task="overruling", output=folder, **options)[0] == 0
    code, out, err = raft("--resume", "--json", tasks="overruling")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "Expected the results of a finished task in" in err


@pytest.mark.parametrize("damage", ["[]", "null", "1", "{"])
def test_settings_that_are_none(raft, finished, tmp_path, damage):
    shutil.copytree(finished[0] / "overruling", tmp_path / "out" / "overruling")
    (tmp_path / "out" / "overruling" / "run.json").write_text(damage)
    code, out, err = raft("--resume", "--json", tasks="overruling")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "Expected the interrupted run's settings in" in err


def test_another_number_of_rows_is_said(raft, tmp_path):
    write_task(tmp_path / "data", "overruling", train=20)
    code, out, _ = raft(tasks="overruling", data=tmp_path / "data")
    assert code == 0 and "RAFT has 50 training rows for each task, here overruling has 20: not comparable." in out


def test_an_encoder_gets_a_head_for_each_task(raft, place, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place / "model")
    tokenizer.save_pretrained(tmp_path / "bert")
    bert = tiny.classifier(vocab_size=len(tokenizer), max_position_embeddings=128)
    bert.base_model.save_pretrained(tmp_path / "bert")
    (tmp_path / "once.yaml").write_text("steps: 1\n")
    options = {"tasks": "overruling,semiconductor_org_types", "recipe": tmp_path / "once.yaml"}
    code, _, err = raft(model=tmp_path / "bert", **options)
    assert code == 0, err
    for name, count in (("overruling", 2), ("semiconductor_org_types", 3)):
        assert sorted(path.name for path in (tmp_path / "out" / name).iterdir()) == FILES
        heads = [value.shape[0] for value in load_file(tmp_path / "out" / name / "adapter_model.safetensors").values()]
        assert count in heads


def test_starts_from_other_vectors(raft, finished, tmp_path):
    (tmp_path / "still.yaml").write_text("steps: 1\nlearning_rate: 1.0e-12\n")
    start = finished[0] / "overruling"
    assert raft(recipe=tmp_path / "still.yaml", init=start)[0] == 0
    first = load_file(start / "adapter_model.safetensors")
    for name in ("overruling", "twitter_complaints"):  # the second starts anew, not where the first ended
        found = load_file(tmp_path / "out" / name / "adapter_model.safetensors")
        assert all(torch.allclose(found[key], first[key], atol=1e-6) for key in first)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": "ade_corpus"}, "Expected a task of RAFT, found 'ade_corpus'; close to it: 'ade_corpus_v2'"),
        ({"tasks": ", "}, "different tasks with commas"),
        ({"tasks": "overruling,overruling"}, "different tasks with commas"),
        ({"data": "nowhere"}, "folder with RAFT's data, found no 'nowhere'"),
        ({"tasks": "ade_corpus_v2"}, "ade_corpus_v2/train.csv'"),
        ({"recipe": "huge"}, "recipe of paper, small"),
        ({"folds": 51}, "RAFT's overruling (--folds 51): Expected from 2 folds to as many as there are different rows"),
        ({"model": "./nowhere"}, "no './nowhere' here"),
    ],
)
def test_bad_options(raft, tmp_path, changes, message):
    code, _, err = raft(**changes)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_all_tasks_are_read_before_one_is_run(raft):
    code, _, err = raft(tasks=None)
    assert code == 2 and "ade_corpus_v2" in err and err.count("\n") == 1


def without(name):
    return lambda row: {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("train.csv", without("Sentence"), "RAFT's overruling, training rows: The template names 'Sentence'"),
        ("train.csv", without("Label"), "training rows: Expected a label column 'Label'"),
        ("train.csv", lambda row: row | {"Label": "Unlabeled"}, "found 'Unlabeled' (row 1)"),
        ("test_unlabeled.csv", without("Sentence"), "test rows: The template names 'Sentence'"),
        ("test_unlabeled.csv", without("ID"), "test rows: Expected a column 'ID', found 'Sentence'"),
        ("test_unlabeled.csv", lambda row: row | {"ID": ""}, "IDs that differ, found an empty one (row 1)"),
        ("test_unlabeled.csv", lambda row: row | {"ID": "7"}, "IDs that differ, found '7' twice (row 2)"),
    ],
)
def test_bad_files(raft, tmp_path, file, change, message):
    write_task(tmp_path / "data", "overruling")
    path = tmp_path / "data" / "overruling" / file
    words.write_csv(path, [change(row) for row in csv.DictReader(path.open())])
    code, _, err = raft(tasks="overruling", data=tmp_path / "data")
    assert code == 2 and message in err and err.count("\n") == 1
    path.unlink()
    code, _, err = raft(tasks="overruling", data=tmp_path / "data")
    assert code == 2 and f"{file}'" in err


def test_in_python(place, tmp_path):
    one = RaftTask.load("twitter_complaints", place / "data")
    assert (len(one.train), len(one.test)) == (50, 12) and one.task.metric == "macro_f1"
    labels = ["complaint, perhaps", *["no complaint"] * 11]
    write_predictions(tmp_path / "twitter_complaints" / "predictions.csv", one.test, labels)
    text = (tmp_path / "twitter_complaints" / "predictions.csv").read_text()
    assert text.startswith('ID,Label\n50,"complaint, perhaps"\n51,no complaint\n') and text.endswith(
        "61,no complaint\n"
    )
    assert len(RAFT_TASKS) == len(set(RAFT_TASKS)) == 11
    for name in RAFT_TASKS:
        assert Task.embedded(name).label_column == "Label"
