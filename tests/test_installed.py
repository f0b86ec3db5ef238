"""The main job works where nothing but the package and what it needs is installed: tox.ini runs this on each interpreter."""

import csv
import json
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import numpy as np
import pytest
import torch

import ia3 as ia3_package  # `ia3` is a fixture
from ia3 import FewShotClassifier, IA3Model, Recipe, Task, load_base, predict
from support import tiny, words


def test_the_version_is_that_of_the_installation():
    done = subprocess.run([sys.executable, "-m", "ia3", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"ia3 {version('ia3')}\n"), done.stderr


def test_the_command_is_the_module():
    [command] = [point for point in entry_points(group="console_scripts") if point.name == "ia3"]
    assert command.value == "ia3.cli:main"
    done = subprocess.run([Path(sys.executable).parent / "ia3", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("train", "predict", "serve", "--install-completion"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and rows."""
    folder = tmp_path_factory.mktemp("installed")
    words.save_model(folder / "model")
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(words.rows(60))
    return folder


def test_train_predict_evaluate_compare(place, ia3, monkeypatch):
    monkeypatch.chdir(place)
    from_rows = {"model": "model", "data": "rows.csv", "examples_per_label": 8}
    code, _, err = ia3("train", "--folds", 2, **from_rows, steps=20, output="adapter")
    assert code == 0, err
    assert {"adapter_config.json", "task.yaml", "metrics.json", "report.html"} <= {
        file.name for file in (place / "adapter").iterdir()
    }
    code, out, err = ia3("predict", "adapter", "the tea was lovely today", "--json")
    assert code == 0 and json.loads(out)[0]["label"] in ("pos", "neg"), err
    code, out, err = ia3("evaluate", "adapter", "--data", "rows.csv", "--json")
    assert code == 0 and 0 <= json.loads(out)["accuracy"] <= 1, err
    code, _, err = ia3("compare", **from_rows, steps=2, shots="1", output="compared")
    assert code == 0 and (place / "compared" / "compare.json").exists(), err


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_an_adapter_is_saved_and_loaded(name, tmp_path):
    model = tiny.adapt(name, ia3_package)
    expected = tiny.logits(model, name)
    assert tiny.relative_error(tiny.logits(tiny.build(name), name), expected) > 1e-3
    model.save_pretrained(tmp_path)
    loaded = IA3Model.from_pretrained(tiny.build(name), tmp_path)
    torch.testing.assert_close(tiny.logits(loaded, name), expected)


def test_a_classifier_of_texts_and_one_of_columns(place):
    rows = words.rows(16)
    labels = [row["label"] for row in rows]
    settings = {"model": str(place / "model"), "recipe": Recipe(steps=3, warmup=0)}
    found = (
        FewShotClassifier(**settings).fit([row["text"] for row in rows], labels).predict(["the soup was stale today"])
    )
    assert found[0] in ("pos", "neg")
    cells = np.array([[row["text"], number] for number, row in enumerate(rows)], dtype=object)
    cells[3, 1] = np.nan
    assert len(FewShotClassifier(**settings).fit(cells, labels).predict(cells)) == len(rows)


def test_a_model_answers_untrained(place):
    model, tokenizer = load_base(str(place / "model"))
    task = Task(template=words.TEMPLATE, choices=words.CHOICES)
    assert predict(model, tokenizer, task, [{"text": "it was fresh"}])[0].best in words.CHOICES
