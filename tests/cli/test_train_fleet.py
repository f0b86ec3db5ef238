"""`ia3 train` of many adapters at once: folders, numbers and errors of each as of a plain run."""

import json
import shutil
import statistics

import pytest
import torch
from safetensors.torch import load_file

from ia3 import Task, TFewTrainer
from support import words

FILES = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "metrics.json",
    "recipe.yaml",
    "report.html",
    "task.yaml",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, rows, and two tasks, of which one has its own test rows."""
    folder = tmp_path_factory.mktemp("place")
    words.save_model(folder / "model")
    for name, rows in (("train", words.different(40)), ("test", words.rows(24, seed=1))):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = {"template": "review : {{ text }} answer :", "train": "train.jsonl"}
    teas = Task(name="teas", choices={"pos": "good", "neg": "not good"}, test="test.jsonl", **shared)
    teas.save(folder / "teas.yaml")
    Task(name="soups.v1", choices={"pos": "fine", "neg": "bad"}, **shared).save(folder / "soups.yaml")
    return folder


@pytest.fixture
def train(ia3, place, tmp_path):
    """`ia3 train` on the tiny model; options as keywords, None leaves one out."""

    def run(*more, **options):
        options = {
            "model": place / "model",
            "steps": 6,
            "examples_per_label": 8,
            "output": tmp_path / "out",
            "opinions": "vectors",
            **({} if "tasks" in options or "data" in options else {"task": place / "teas.yaml"}),
            **options,
        }
        return ia3("train", *more, **options)

    return run


def both(place) -> str:
    return f"{place / 'teas.yaml'},{place / 'soups.yaml'}"


def test_each_seed_is_the_plain_runs(train, ia3, tmp_path):
    code, out, _ = train(seeds="3,4")
    assert code == 0
    for text in ("Training seed-3", "Training seed-4", "Trained seed-4", "median (IQR)", "2 adapters", "ia3 predict"):
        assert text in out
    assert out.count("Zero-shot") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "seed-3", "seed-4"]
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())["members"]
    assert list(results) == ["seed-3", "seed-4"]
    for seed in (3, 4):
        assert train(seed=seed, output=tmp_path / "alone")[0] == 0
        folder = tmp_path / "out" / f"seed-{seed}"
        assert sorted(path.name for path in folder.iterdir()) == FILES
        ours, alone = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "alone"))
        assert all(torch.allclose(ours[key], alone[key], atol=1e-5) for key in alone)
        ours, alone = (json.loads((place / "metrics.json").read_text()) for place in (folder, tmp_path / "alone"))
        assert len(ours.pop("train_rows")) == 16 == len(alone.pop("train_rows"))
        assert results[f"seed-{seed}"] == ours and ours.pop("trained_at_once") == 2
        assert ours.pop("train_loss") == pytest.approx(alone.pop("train_loss"), rel=1e-4)
        assert ours.pop("train_seconds") > 0 < alone.pop("train_seconds")
        assert ours == alone
        for name in ("adapter_config.json", "task.yaml"):
            assert (folder / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
        assert "2 adapters at once" in (folder / "README.md").read_text()
    trained = [100 * results[name]["trained"]["accuracy"] for name in results]
    spread = f" ± {statistics.stdev(trained):.1f}" if len(set(trained)) > 1 else ""
    assert f"{statistics.mean(trained):.1f}{spread}%" in out
    assert ia3("predict", tmp_path / "out" / "seed-3", "the tea was lovely")[0] == 0
    code, _, err = ia3("predict", tmp_path / "out", "the tea was lovely")
    assert code == 2 and "holds several" in err and "seed-4" in err


def test_the_product_of_tasks_seeds_and_learning_rates(train, ia3, place, tmp_path, monkeypatch):
    import ia3.evaluation.prediction

    asked, real = [], ia3.evaluation.prediction.predict

    def counted(model, tokenizer, tasks, rows, on_progress=None, adapter_names=None, **kwargs):
        asked.append((len(rows), adapter_names and len(set(adapter_names))))
        return real(model, tokenizer, tasks, rows, on_progress, adapter_names, **kwargs)

    monkeypatch.setattr(ia3.evaluation.prediction, "predict", counted)
    code, out, err = train("--json", tasks=both(place), seeds="0,1", learning_rates="3e-3,0.05")
    assert code == 0, err
    found = json.loads(out)
    names = [
        f"{task}/seed-{seed}-lr-{rate}" for task in ("teas", "soups.v1") for seed in (0, 1) for rate in (0.003, 0.05)
    ]
    assert found["output"] == str(tmp_path / "out") and list(found["members"]) == names
    assert "Zero-shot soups.v1" in err
    assert list(found["summary"]) == ["teas/lr-0.003", "teas/lr-0.05", "soups.v1/lr-0.003", "soups.v1/lr-0.05"]
    # The first task has its own test rows; of the second's 40, each seed leaves 24 over: each row is scored once.
    left = asked[0][0] - 24
    # So are the training examples, of which seeds share some, to balance the answers.
    trained = asked[1][0]
    assert 24 <= left <= 40 and 32 <= trained <= 64
    assert asked == [(24 + left, None), (trained, None), (8 * 24, 8)]
    for name in names:
        assert sorted(path.name for path in (tmp_path / "out" / name).iterdir()) == FILES
        one = found["members"][name]
        assert one["learning_rate"] == float(name.rpartition("-")[2]) and one["task"] == name.partition("/")[0]
    fast, slow = (load_file(tmp_path / "out" / name / "adapter_model.safetensors") for name in (names[1], names[0]))
    assert sum(float((fast[key] - slow[key]).abs().sum()) for key in fast) > 0.1


def test_one_learning_rate_is_a_fleet_too(train, tmp_path):
    code, out, _ = train("--json", learning_rates="0.001")
    assert code == 0 and list(json.loads(out)["members"]) == ["lr-0.001"]
    assert (tmp_path / "out" / "lr-0.001" / "adapter_model.safetensors").is_file()


def test_rows_in_the_words_of_examples_are_said_once_for_all_seeds(train, place, tmp_path):
    rows = words.different(40)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, *rows])))
    code, out, err = train(
        "--json", data=tmp_path / "rows.jsonl", choices="pos=good,neg=not good", template="{{ text }}", seeds="0,1,2"
    )
    assert code == 0, err
    examples = {}
    for seed in (0, 1, 2):
        folder = tmp_path / "out" / f"seed-{seed}"
        examples[seed] = set(json.loads((folder / "metrics.json").read_text())["train_rows"])
    # Of 80 rows, twice 40, those are left whose words were not drawn; the other halves of drawn ones are left out.
    for seed, drawn in examples.items():
        assert json.loads(out)["members"][f"seed-{seed}"]["test_rows"] == 80 - 2 * len(drawn)
    counts = [2 * len(drawn) - 16 for drawn in examples.values()]
    span = " to ".join(dict.fromkeys(map(str, (min(counts), max(counts)))))
    assert err.count("duplicate") == 1 and f"{span} duplicates of training examples are left out" in err


def test_without_test_rows(train, place, tmp_path):
    for name in ("train.jsonl", "soups.yaml"):
        shutil.copy(place / name, tmp_path)
    code, out, _ = train(task=tmp_path / "soups.yaml", examples_per_label=20, seeds="0,1")
    assert code == 0 and "2 adapters" in out and "Trained" not in out and "median" not in out


def test_interrupted_and_resumed_ends_as_uninterrupted(train, tmp_path, monkeypatch):
    options = {"steps": 8, "seeds": "0,1"}
    assert train(**options, output=tmp_path / "whole")[0] == 0
    step = TFewTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(TFewTrainer, "training_step", interrupted)
    code, _, err = train(**options, output=tmp_path / "cut")
    assert code == 130 and "checkpoint-4 with the same command and --resume" in err
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoints"]
    monkeypatch.setattr(TFewTrainer, "training_step", step)
    for changes, message in (
        ({"seeds": "0,2"}, "'members'"),
        ({"seeds": None}, "'members'"),
        ({"examples_per_label": 9}, "'examples_per_label', 'examples'"),
    ):
        code, _, err = train("--resume", **{**options, **changes}, output=tmp_path / "cut")
        assert code == 2 and message in err
    code, out, _ = train("--resume", **options, output=tmp_path / "cut")
    assert code == 0 and "Going on from" in out
    for seed in (0, 1):
        name = f"seed-{seed}/adapter_model.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert not (tmp_path / "cut" / "checkpoints").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 1, "seeds": "0,1"}, "--seed or --seeds, one of the two"),
        ({"tasks": "a.yaml", "task": "a.yaml"}, "--task or --tasks"),
        ({"tasks": "a.yaml", "data": "rows.csv"}, "--data or --tasks"),
        ({"tasks": "a.yaml", "template": "{{ text }}"}, "--template or --tasks"),
        ({"tasks": "nowhere.yaml"}, "no 'nowhere.yaml'"),
        ({"tasks": " , "}, "tasks with commas"),
        ({"seeds": "0,one"}, "--seeds as different numbers with commas between them, found '0,one'"),
        ({"seeds": "0,1,0"}, "--seeds as different numbers"),
        ({"seeds": ""}, "--seeds as different numbers"),
        ({"learning_rates": "0.1,-1"}, "--learning-rates above 0"),
        ({"learning_rates": "nan"}, "--learning-rates above 0"),
        ({"seeds": "0,1", "examples_per_label": 30}, "Expected 30 training examples for each label"),
    ],
)
def test_bad_options(train, tmp_path, changes, message):
    code, _, err = train(**changes)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, message",
    [
        ("teas", "names that differ, found 'teas' twice"),
        ("a/b", "name a folder, found 'a/b'"),
        ("..", "name a folder"),
        ("checkpoints", "name a folder"),
    ],
)
def test_names_of_tasks_name_folders(train, place, tmp_path, name, message):
    other = Task.from_file(place / "soups.yaml").model_copy(update={"name": name})
    other.save(tmp_path / "other.yaml")
    code, _, err = train(tasks=f"{place / 'teas.yaml'},{tmp_path / 'other.yaml'}")
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "..", "a/b"])
def test_a_name_does_not_lead_out_of_the_default_folder(ia3, place, tmp_path, monkeypatch, command, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Task.from_file(place / "teas.yaml").model_copy(update={"name": name}).save("task.yaml")
    code, out, err = ia3(command, "--json", model=place / "model", task="task.yaml", steps=1, examples_per_label=4)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"a task's name that can name a folder, found {name!r}; change it, or give --output" in err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "task.yaml"]


def test_the_task_that_does_not_fit_the_model_is_named(train, place, tmp_path):
    other = Task.from_file(place / "soups.yaml").model_copy(
        update={"name": "other", "choices": {"pos": "x", "neg": "y"}}
    )
    other.save(tmp_path / "other.yaml")
    code, out, err = train("--json", tasks=f"{place / 'teas.yaml'},{tmp_path / 'other.yaml'}")
    assert (code, out) == (2, "") and "ia3: 'other': The answers 'x' and 'y' are the same" in err.splitlines()[-1]


def test_a_file_where_a_folder_has_to_be(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "seed-1").touch()
    code, _, err = train(seeds="0,1")
    assert code == 2 and "found the file" in err and "seed-1" in err


def test_help_shows_the_defaults(ia3):
    code, out, _ = ia3("train", "--help")
    assert code == 0
    for text in (
        "--seeds",
        "--tasks",
        "--learning-rates",
        "[default: 0]",
        "[default: the task's]",
        "[default: adapters/",
    ):
        assert text in out
