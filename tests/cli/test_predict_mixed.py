"""`ia3 predict --adapter-column`: each row gets its own adapter's answer, and bad columns, names and folders one line."""

import csv
import json
import math
import shutil

import pytest
import torch

from ia3 import Task
from ia3.cli import main
from ia3.evaluation.calibration import Calibration
from ia3.folder import AdapterFolder
from support import words


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, and in `all` adapters of two tasks with different labels, in folders of two depths."""
    folder = tmp_path_factory.mktemp("place")
    words.save_model(folder / "model")
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, words.rows(40))))
    shared = {"template": "review : {{ text }} answer :", "train": "train.jsonl"}
    Task(name="teas", choices={"pos": "good", "neg": "not good"}, **shared).save(folder / "teas.yaml")
    Task(name="soups", choices={"pos": "fine", "neg": "bad"}, **shared).save(folder / "soups.yaml")
    for task, seeds, output in (("teas", "0,1", "all/teas"), ("soups", None, "all/soups")):
        arguments = ["train", "--model", folder / "model", "--task", folder / f"{task}.yaml", "--test-rows", "1"]
        arguments += ["--steps", "6", "--output", folder / output, *(["--seeds", seeds] if seeds else [])]
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert not ended.value.code
    return folder


NAMES = ["teas/seed-1", "soups", "teas/seed-0", "soups", "teas/seed-1", "teas/seed-0"]


@pytest.fixture
def mixed(place, tmp_path):
    """Rows of different adapters, as a CSV file."""
    path = tmp_path / "mixed.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tenant", "text"])
        writer.writerows([name, row["text"]] for name, row in zip(NAMES, words.rows(6, seed=3), strict=True))
    return path


def test_each_row_gets_its_own_adapters_answer(ia3, place, mixed):
    code, out, err = ia3("predict", place / "all", "--data", mixed, "--adapter-column", "tenant", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [item["adapter"] for item in found] == NAMES
    for name in set(NAMES):
        code, out, _ = ia3("predict", place / "all" / name, "--data", mixed, "--json")
        for item, alone, other in zip(found, json.loads(out), NAMES, strict=True):
            if other == name:
                assert list(item["probabilities"]) == list(alone["probabilities"])
                assert item["label"] == alone["label"]
                for label, value in alone["probabilities"].items():
                    assert item["probabilities"][label] == pytest.approx(value, abs=1e-5)


def test_writes_all_labels_and_prints_which_adapter(ia3, place, mixed, tmp_path):
    options = ("--data", mixed, "--adapter-column", "tenant")
    for name in ("out.csv", "out.jsonl"):
        assert ia3("predict", place / "all", *options, "--output", tmp_path / name)[0] == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row, line, name in zip(rows, lines, NAMES, strict=True):
        assert row["tenant"] == line["tenant"] == name and row["prediction"] == line["prediction"]
        for label, value in line["probabilities"].items():
            assert float(row[f"probability_{label}"]) == pytest.approx(value, abs=1e-6)
    _, out, _ = ia3("predict", place / "all", *options)
    assert "adapter" in out and "teas/seed-1" in out


def test_labels_of_other_tasks_stay_empty(ia3, place, mixed, tmp_path):
    shutil.copytree(place / "all", tmp_path / "all")
    path = tmp_path / "all" / "soups" / "task.yaml"
    path.write_text(path.read_text().replace("pos:", "warm:").replace("neg:", "cold:"))
    (path.parent / "opinions.json").unlink()  # they know the old labels
    _, _, err = ia3(
        "predict", tmp_path / "all", "--data", mixed, "--adapter-column", "tenant", "-o", tmp_path / "o.csv"
    )
    rows = list(csv.DictReader((tmp_path / "o.csv").open()))
    assert rows, err
    for row, name in zip(rows, NAMES, strict=True):
        soup = name == "soups"
        assert (row["prediction"] in ("warm", "cold")) is soup
        assert (row["probability_warm"] != "") is soup and (row["probability_pos"] == "") is soup


def change(path, old, new):
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: change(f / "mixed.csv", "tenant", "customer"), "Expected a column 'tenant', found 'customer', 'text' (row 1)"),
        (lambda f: change(f / "mixed.csv", "soups", "sops"), "found 'sops' (row 2); close to it: 'soups'"),
        (lambda f: change(f / "mixed.csv", "soups", "soup"), "close to it: 'soups'"),
        (lambda f: change(f / "mixed.csv", "soups", "../place"), "found '../place' (row 2); there are"),
        (lambda f: change(f / "mixed.csv", "soups,", ","), "found '' (row 2); there are"),
        (lambda f: (f / "all" / "soups" / "task.yaml").unlink(), "Expected a task.yaml beside the adapter"),
        (
            lambda f: change(f / "all/soups/adapter_config.json", '"base_model_name_or_path": "', '"base_model_name_or_path": "x'),
            "Expected adapters of one base model",
        ),
        (
            lambda f: change(f / "all/soups/adapter_config.json", '"feedforward_modules": [\n    "down_proj"', '"feedforward_modules": [\n    "v_proj"'),
            "soups",
        ),
        (lambda f: (f / "all/soups/adapter_model.safetensors").write_bytes(b"short"), "soups"),
        (lambda f: shutil.rmtree(f / "all"), "Expected a folder of adapters with --adapter-column"),
        (lambda f: (shutil.rmtree(f / "all"), (f / "all").mkdir()), "Expected adapters in subfolders"),
    ],

)  # fmt: skip
def test_bad_input_is_one_line(ia3, place, mixed, tmp_path, spoil, message):
    shutil.copytree(place / "all", tmp_path / "all")
    spoil(tmp_path)
    output = tmp_path / "out.csv"
    code, _, err = ia3("predict", tmp_path / "all", "--data", mixed, "--adapter-column", "tenant", "-o", output)
    assert code == 2 and len(err.strip().splitlines()) == 1 and message in err, err
    assert not output.exists()


def test_texts_have_no_column(ia3, place):
    code, _, err = ia3("predict", place / "all", "some text", "--adapter-column", "tenant")
    assert code == 2 and "--data with --adapter-column" in err


def test_the_given_base_model_is_used_for_all(ia3, place, mixed, tmp_path):
    shutil.copytree(place / "all", tmp_path / "all")
    change(tmp_path / "all/soups/adapter_config.json", '"base_model_name_or_path": "', '"base_model_name_or_path": "x')
    options = ("--data", mixed, "--adapter-column", "tenant", "--json")
    code, out, err = ia3("predict", tmp_path / "all", *options, "--model", place / "model")
    assert code == 0, err
    assert torch.is_grad_enabled() and len(json.loads(out)) == len(NAMES)


def test_each_row_has_its_own_adapters_temperature(ia3, place, mixed, tmp_path):
    shutil.copytree(place / "all", tmp_path / "all")
    options = ("--data", mixed, "--adapter-column", "tenant", "--json")
    before = json.loads(ia3("predict", tmp_path / "all", *options)[1])
    quality = dict.fromkeys(("log_loss", "log_loss_before", "calibration_error", "calibration_error_before"), 0.1)
    temperatures = {"teas/seed-1": 3.0, "soups": 0.5, "teas/seed-0": 1.0}
    for name in ("teas/seed-1", "soups"):
        calibration = Calibration(temperature=temperatures[name], rows=9, **quality)
        AdapterFolder(tmp_path / "all" / name).calibrate(calibration)
    found = json.loads(ia3("predict", tmp_path / "all", *options)[1])
    for name, old, new in zip(NAMES, before, found, strict=True):
        odds, others = ([math.log(p) for p in item["probabilities"].values()] for item in (old, new))
        assert others[0] - others[1] == pytest.approx((odds[0] - odds[1]) / temperatures[name], abs=1e-6)


def test_each_row_is_scored_by_its_own_adapters_recipe(ia3, place, mixed, tmp_path):
    shutil.copytree(place / "all", tmp_path / "all")
    change(tmp_path / "all/soups/recipe.yaml", "long_prompts: truncate", "long_prompts: refuse")
    change(tmp_path / "all/teas/seed-1/recipe.yaml", "length_normalization: 1.0", "length_normalization: 0.0")
    options = ("--data", mixed, "--adapter-column", "tenant", "--json")
    before, found = (json.loads(ia3("predict", folder / "all", *options)[1]) for folder in (place, tmp_path))
    for name, old, new in zip(NAMES, before, found, strict=True):
        _, out, _ = ia3("predict", tmp_path / "all" / name, "--data", mixed, "--json")
        assert any(new["probabilities"] == pytest.approx(its["probabilities"], abs=1e-5) for its in json.loads(out))
        same = new["probabilities"] == pytest.approx(old["probabilities"], abs=1e-3)
        assert same is (name != "teas/seed-1")
