"""`ia3 pretrain`: a mixture of task files to an adapter that `ia3 train --init` starts from."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ia3 import Recipe, Task
from ia3.training.pretrain import MixtureTrainer
from support import tiny, words

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "metrics.json", "recipe.yaml"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and two tasks of different sizes."""
    folder = tmp_path_factory.mktemp("place")
    words.save_model(folder / "model")
    for name, rows in (("teas", words.rows(30)), ("soups", words.rows(10, seed=1))):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    teas = ["review : {{ text }} answer :", "{{ text }} is"]
    Task(name="teas", templates=teas, choices={"pos": "good", "neg": "not good"}, train="teas.jsonl").save(
        folder / "teas.yaml"
    )
    Task(name="soups", template="{{ text }} ?", choices={"pos": "fine", "neg": "bad"}, train="soups.jsonl").save(
        folder / "soups.yaml"
    )
    return folder


@pytest.fixture
def pretrain(ia3, place, tmp_path):
    """`ia3 pretrain` on the tiny model; options as keywords, None leaves one out."""

    def run(*more, **options):
        options = {
            "model": place / "model",
            "tasks": f"{place / 'teas.yaml'},{place / 'soups.yaml'}",
            "steps": 8,
            "output": tmp_path / "out",
            **options,
        }
        return ia3("pretrain", *more, **options)

    return run


def test_from_tasks_to_a_start_for_training(pretrain, ia3, place, tmp_path):
    (tmp_path / "out").mkdir()
    for name in (
        "adapter_config.json",
        "task.yaml",
        "calibration.json",
    ):  # of an adapter that was trained into this folder
        (tmp_path / "out" / name).write_text("old")
    code, out, err = pretrain("--json", cap=20)
    assert code == 0, err
    assert "Pre-training" in err and "loss" in err and " 66.7% teas" in err and " 33.3% soups" in err
    found = json.loads(out)
    assert found.pop("output") == str(tmp_path / "out")
    assert found == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert list(found["tasks"]) == ["soups", "teas"] and found["tasks"]["teas"]["rows"] == 30
    assert sum(its["drawn"] for its in found["tasks"].values()) == 8 * 16
    assert found["tasks"]["teas"]["share"] == pytest.approx(2 / 3) and found["final_loss"] > 0
    recipe = Recipe.load(tmp_path / "out" / "recipe.yaml")
    assert (recipe.steps, recipe.batch_size, recipe.length_normalized, recipe.unlikelihood) == (8, 16, 0, 0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "8 steps of 16 examples" in card and f"| soups | 10 | {found['tasks']['soups']['drawn']} |" in card
    vectors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(float((value - 1).abs().sum()) for value in vectors.values()) > 0.01

    # One step at a rate of next to nothing ends where it started.
    (tmp_path / "still.yaml").write_text("steps: 1\nlearning_rate: 1.0e-12\n")
    code, _, err = ia3(
        "train",
        model=place / "model",
        task=place / "teas.yaml",
        init=tmp_path / "out",
        recipe=tmp_path / "still.yaml",
        examples_per_label=4,
        output=tmp_path / "trained",
    )
    assert code == 0, err
    trained = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert all(torch.allclose(trained[key], vectors[key], atol=1e-6) for key in vectors)
    assert "starting from `out`" in (tmp_path / "trained" / "README.md").read_text()


def test_goes_on_from_other_vectors(pretrain, tmp_path):
    assert pretrain()[0] == 0
    (tmp_path / "more.yaml").write_text(f"init: {tmp_path / 'out'}\nsteps: 1\nlearning_rate: 1.0e-12\n")
    code, out, _ = pretrain(recipe=tmp_path / "more.yaml", steps=None, output=tmp_path / "more")
    assert code == 0 and f"ia3 train --init {tmp_path / 'more'}" in out
    first, more = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "more"))
    assert all(torch.allclose(first[key], more[key], atol=1e-6) for key in first)
    assert "starting from" in (tmp_path / "more" / "README.md").read_text()


def test_interrupted_and_resumed_ends_as_uninterrupted(pretrain, place, tmp_path, monkeypatch):
    assert pretrain(output=tmp_path / "whole")[0] == 0
    step = MixtureTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(MixtureTrainer, "training_step", interrupted)
    code, _, err = pretrain(output=tmp_path / "cut")
    assert code == 130 and "checkpoint-4 with the same command and --resume" in err
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoints"]
    monkeypatch.setattr(MixtureTrainer, "training_step", step)
    shutil.copytree(place, tmp_path / "other")
    (tmp_path / "other" / "teas.jsonl").write_text("\n".join(map(json.dumps, words.rows(30, seed=5))))
    settings = tmp_path / "cut" / "checkpoints" / "run.json"
    whole = settings.read_text()
    for damage, message in (
        ("[]", "Expected the interrupted run's settings in"),
        ("null", "Expected the interrupted run's settings in"),
        (json.dumps({**json.loads(whole), "tasks": ["teas", "soups"]}), "found another 'tasks';"),
        (json.dumps({**json.loads(whole), "tasks": dict.fromkeys(json.loads(whole)["tasks"])}), "'task', 'rows';"),
    ):
        settings.write_text(damage)
        code, _, err = pretrain("--resume", output=tmp_path / "cut")
        assert code == 2 and message in err and err.count("\n") == 1
    settings.write_text(whole)
    for changes, message in (
        ({"steps": 9}, "'recipe'"),
        ({"cap": 3}, "'cap'"),
        ({"seed": 1}, "'seed'"),
        ({"tasks": place / "teas.yaml"}, "'tasks'"),
        ({"tasks": f"{tmp_path / 'other' / 'teas.yaml'},{place / 'soups.yaml'}"}, "'task', 'rows'"),
    ):
        code, _, err = pretrain("--resume", **changes, output=tmp_path / "cut")
        assert code == 2 and f"found another {message};" in err
    # The order in which tasks are named means nothing.
    tasks = f"{place / 'soups.yaml'},{place / 'teas.yaml'}"
    code, out, _ = pretrain("--resume", tasks=tasks, output=tmp_path / "cut")
    assert code == 0 and "Going on from" in out
    whole, cut = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    whole, cut = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "cut"))
    assert whole.pop("train_seconds") > 0 < cut.pop("train_seconds") and whole == cut
    assert not (tmp_path / "cut" / "checkpoints").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": " , "}, "tasks with commas between them for --tasks"),
        ({"tasks": "nowhere"}, "found 'nowhere'"),
        ({"tasks": "nowhere.yaml"}, "no 'nowhere.yaml'"),
        ({"tasks": "food-reviews,food-reviews"}, "found 'food-reviews' twice"),
        ({"recipe": "huge"}, "recipe of paper, small"),
        ({"model": "./nowhere"}, "no './nowhere' here"),
    ],
)
def test_bad_options(pretrain, tmp_path, changes, message):
    code, _, err = pretrain(**changes)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_to_resume(pretrain):
    code, _, err = pretrain("--resume")
    assert code == 2 and "found none; start anew without --resume" in err


def test_tasks_without_rows_or_with_bad_ones(pretrain, place, tmp_path):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    task = Task.load(tmp_path / "soups.yaml")
    task.model_copy(update={"train": None}).save(tmp_path / "soups.yaml")
    code, _, err = pretrain(tasks=tmp_path / "soups.yaml")
    assert code == 2 and "no `train:` in" in err
    (tmp_path / "soups.jsonl").write_text('{"text": "tea", "label": "pos"}\n{"text": "tea", "label": "so-so"}')
    task.model_copy(update={"train": str(tmp_path / "soups.jsonl")}).save(tmp_path / "soups.yaml")
    code, _, err = pretrain(tasks=tmp_path / "soups.yaml")
    assert code == 2 and "Task 'soups'" in err and "'so-so' (row 2)" in err and err.count("\n") == 1
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_an_encoder_is_refused(pretrain, tmp_path):
    tiny.classifier(vocab_size=len(words.VOCABULARY)).base_model.save_pretrained(tmp_path / "bert")
    words.enclosing().save_pretrained(tmp_path / "bert")
    code, _, err = pretrain(model=tmp_path / "bert")
    assert code == 2 and "classification head" in err and err.count("\n") == 1
