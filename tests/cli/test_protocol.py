"""The paper's protocol and calibrated probabilities through the command line."""

import csv
import json
import statistics

import pytest
import yaml

from ia3 import Task, few_shot, read_rows
from support import words

WORDINGS = ["review : {{ text }} answer :", "{{ text }} , what is it ?", "is it good ? {{ text }}"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and rows."""
    folder = tmp_path_factory.mktemp("place")
    words.save_model(folder / "model")
    for name, rows in (("train", words.rows(40)), ("test", words.rows(24, seed=1))):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


@pytest.fixture
def task(place, tmp_path):
    """A task in three templates."""
    made = Task(name="three", templates=WORDINGS, choices={"pos": "good", "neg": "not good"})
    made.train, made.test = str(place / "train.csv"), str(place / "test.csv")
    made.save(tmp_path / "three.yaml")
    return tmp_path / "three.yaml"


def train(ia3, place, task, folder, *flags, **options):
    options = {"model": place / "model", "task": task, "steps": 4, "examples_per_label": 8, "output": folder, **options}
    options.setdefault("opinions", "vectors")  # the paper's protocol
    return ia3("train", *flags, "--json", **options)


def test_several_seeds_in_all_templates(ia3, place, task, tmp_path):
    code, out, err = train(ia3, place, task, tmp_path / "out", "--all-templates", seeds="0,1,2")
    assert code == 0, err
    found = json.loads(out)
    for results in found["members"].values():
        assert len(results["templates"]) == 3
        for method in ("zero_shot", "trained"):
            for metric in ("accuracy", "macro_f1"):
                values = [template[method][metric] for template in results["templates"]]
                assert results[method][metric] == statistics.median(values)
    accuracies = [results["trained"]["accuracy"] for results in found["members"].values()]
    summary = found["summary"][""]["trained"]["accuracy"]
    assert summary["median"] == statistics.median(accuracies)
    assert 0 <= summary["interquartile_range"] <= max(accuracies) - min(accuracies)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["summary"] == found["summary"]


def test_templates_that_list_their_answers_in_another_order(ia3, place, tmp_path):
    """As in published collections, whose templates say themselves which of their answers is right: the same words with
    the answers turned round are as often answered rightly."""
    answers = ["good ||| not good", "not good ||| good"]
    right = ["0 if label == 'pos' else 1", "1 if label == 'pos' else 0"]
    templates = [
        {"prompt": f"review : {{{{ text }}}} ||| {{{{ answer_choices[{place}] }}}}", "choices": choices}
        for place, choices in zip(right, answers, strict=True)
    ]
    made = Task(name="turned", templates=templates, train=str(place / "train.csv"), test=str(place / "test.csv"))
    made.save(tmp_path / "turned.yaml")
    (tmp_path / "fast.yaml").write_text("steps: 30\nlearning_rate: 0.1\n")
    options = {"steps": None, "recipe": tmp_path / "fast.yaml"}
    code, out, err = train(ia3, place, tmp_path / "turned.yaml", tmp_path / "out", "--all-templates", **options)
    assert code == 0, err
    one, other = json.loads(out)["templates"]
    assert one["trained"]["accuracy"] > 0.7
    assert one["trained"] == other["trained"] and one["zero_shot"] == other["zero_shot"]


def test_several_tasks_end_in_a_mean(ia3, place, task, tmp_path):
    values = yaml.safe_load(task.read_text())
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**values, "name": "two", "templates": WORDINGS[:2]}))
    options = {
        "model": place / "model",
        "steps": 2,
        "examples_per_label": 4,
        "test_rows": 6,
        "output": tmp_path / "out",
    }
    code, out, err = ia3("train", tasks=f"{task},{tmp_path / 'two.yaml'}", seeds="0,1", **options)
    assert code == 0, err
    assert "three median (IQR)" in out and "two median (IQR)" in out and "mean of all" in out


def test_all_rows_as_they_are(ia3, place, task, tmp_path):
    code, out, err = train(ia3, place, task, tmp_path / "out", examples_per_label=0, steps=1)
    assert code == 0, err
    assert json.loads(out)["train_examples"] == len(read_rows(place / "train.csv"))


def test_folds_calibrate(ia3, place, task, tmp_path):
    folder = tmp_path / "out"
    code, out, err = train(ia3, place, task, folder, folds=4)
    assert code == 0, err
    found = json.loads(out)
    stored = json.loads((folder / "calibration.json").read_text())
    assert stored == found["calibration"] and stored["rows"] == found["train_examples"] == 16
    assert 0 <= found["cross_validation"]["accuracy"] <= 1
    assert stored["log_loss"] <= stored["log_loss_before"] + 1e-9

    rows = tmp_path / "rows.csv"
    rows.write_text("text\ntea fine\nbad soup\n")
    code, out, _ = ia3("predict", folder, "--json", data=rows)
    calibrated = json.loads(out)
    (folder / "calibration.json").unlink()
    code, out, _ = ia3("predict", folder, "--json", data=rows)
    for a, b in zip(calibrated, json.loads(out), strict=True):
        powers = {label: value ** (1 / stored["temperature"]) for label, value in b["probabilities"].items()}
        for label, power in powers.items():
            assert a["probabilities"][label] == pytest.approx(power / sum(powers.values()), rel=1e-6)
    # An adapter that is trained anew is not calibrated by an earlier one's rows.
    (folder / "calibration.json").write_text(json.dumps(stored))
    assert train(ia3, place, task, folder)[0] == 0
    assert not (folder / "calibration.json").exists()


def test_calibrating_on_other_rows(ia3, place, task, tmp_path):
    folder = tmp_path / "out"
    assert train(ia3, place, task, folder)[0] == 0
    learned = few_shot(read_rows(place / "train.csv"), Task.load(task), 8, 0)
    known = {row["text"] for row in learned}
    others = [row for row in words.different(60) if row["text"] not in known]
    for name, rows in (("others", others), ("both", others + learned), ("learned", learned)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = ia3("evaluate", folder, "--calibrate", "--json", data=tmp_path / "both.jsonl")
    assert code == 0, err
    said = f"{len(learned)} of {len(others) + len(learned)} rows duplicate training examples"
    assert f"{said}; probabilities are calibrated without them." in err
    fitted = json.loads(out)["calibration"]
    (folder / "calibration.json").unlink()
    code, out, err = ia3("evaluate", folder, "--calibrate", "--json", data=tmp_path / "others.jsonl")
    assert code == 0 and "duplicate" not in err
    found = json.loads(out)
    assert found["calibration"] == fitted and fitted["rows"] == len(others)
    assert found["temperature"] == 1.0 and found["log_loss"] == pytest.approx(found["calibration"]["log_loss_before"])
    code, out, err = ia3("evaluate", folder, "--json", data=tmp_path / "both.jsonl")
    assert code == 0 and f"{said}." in err
    code, out, err = ia3("evaluate", folder, "--calibrate", "--json", data=tmp_path / "learned.jsonl")
    assert (code, out) == (2, "") and "rows for --calibrate that the adapter was not trained on" in err
    code, out, _ = ia3("evaluate", folder, "--json", data=tmp_path / "others.jsonl")
    again = json.loads(out)
    assert again["temperature"] == found["calibration"]["temperature"]
    assert again["log_loss"] == pytest.approx(found["calibration"]["log_loss"])
    assert again["accuracy"] == found["accuracy"]


def test_abstention(ia3, place, task, tmp_path):
    folder = tmp_path / "out"
    assert train(ia3, place, task, folder, steps=1)[0] == 0
    code, out, _ = ia3("predict", folder, "tea fine", "--json", abstain_below=1.0)
    (row,) = json.loads(out)
    assert code == 0 and row["label"] is None and sum(row["probabilities"].values()) == pytest.approx(1)
    rows = tmp_path / "rows.csv"
    rows.write_text("text\ntea fine\nbad soup\n")
    assert ia3("predict", folder, data=rows, abstain_below=1.0, output=tmp_path / "found.csv")[0] == 0
    with (tmp_path / "found.csv").open() as file:
        assert [row["prediction"] for row in csv.DictReader(file)] == ["", ""]
    code, out, _ = ia3("predict", folder, "tea fine", abstain_below=1.0)
    assert code == 0 and "—" in out


@pytest.mark.parametrize(
    "options, message",
    [
        ({"folds": 1}, "(--folds 1): Expected from 2 folds to as many as there are different rows"),
        # 16 examples, but in fewer different words.
        ({"folds": 16}, "(--folds 16): Expected from 2 folds to as many as there are different rows"),
        ({"folds": 2, "examples_per_label": 1}, "at least two labels beside each of 2 folds"),
        ({"folds": 2, "examples_per_label": 1, "seeds": "0,1"}, "Cannot cross-validate seed-0 (--folds 2)"),
    ],
)
def test_folds_that_cannot_be(ia3, place, task, tmp_path, options, message, monkeypatch):
    monkeypatch.setattr("ia3.adapter.pretrained.load_base", lambda *args: pytest.fail("loaded a model"))
    code, out, err = train(ia3, place, task, tmp_path / "out", **options)
    assert code == 2 and message in err and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "out").exists()


def test_an_interrupted_cross_validation_leaves_the_adapters(ia3, place, task, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    assert train(ia3, place, task, tmp_path / "whole", seeds="0,1")[0] == 0
    monkeypatch.setattr("ia3.evaluation.learner.Learner.held_out", interrupted)
    assert train(ia3, place, task, tmp_path / "out", seeds="0,1", folds=4)[0] == 130
    for name in ("seed-0", "seed-1"):
        whole, cut = (tmp_path / folder / name for folder in ("whole", "out"))
        # The report comes last, with what cross-validation says.
        names = sorted(path.name for path in cut.iterdir())
        assert sorted([*names, "report.html"]) == sorted(path.name for path in whole.iterdir())
        assert (cut / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
        assert "calibration" not in json.loads((cut / "metrics.json").read_text())


def test_the_recipe_is_stored_and_chosen(ia3, place, task, tmp_path):
    (tmp_path / "fast.yaml").write_text("steps: 30\nlearning_rate: 0.2\n")
    (tmp_path / "mine.yaml").write_text("steps: 3\nlearning_rate: 0.01\nlength_normalization: 0.5\n")
    code, out, err = train(ia3, place, task, tmp_path / "out", recipe=tmp_path / "mine.yaml", steps=2)
    assert code == 0, err
    stored = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert (stored["name"], stored["steps"], stored["learning_rate"]) == ("mine", 2, 0.01)
    assert json.loads(out)["steps"] == 2 and json.loads(out)["recipe"] == "mine"
    code, _, err = train(ia3, place, task, tmp_path / "out2", recipe="papr")
    assert code == 2 and "close to it: 'paper'" in err
    base = json.loads(out)["zero_shot"]
    assert train(ia3, place, task, tmp_path / "far", recipe=tmp_path / "fast.yaml")[0] == 0
    code, out, _ = train(ia3, place, task, tmp_path / "out3", init=tmp_path / "far", steps=1)
    found = json.loads(out)
    assert code == 0 and found["recipe"] == "small"
    assert found["zero_shot"] == base != found["trained"]  # zero-shot is the base model's, not the other adapter's
    code, _, err = train(ia3, place, task, tmp_path / "out4", init=tmp_path / "nowhere", steps=1)
    assert code == 2 and "nowhere" in err and err.count("\n") == 1


def test_two_draws_differ_and_one_is_stable(place, task):
    made = Task.from_file(task)
    rows = read_rows(place / "train.csv")
    turned = made.model_copy(update={"choices": dict(reversed(made.choices.items()))})
    assert few_shot(rows, made, 4, 0) == few_shot(rows, turned, 4, 0) != few_shot(rows, made, 4, 1)


@pytest.mark.parametrize("seeds", ["-1", "0,4294967296"])
def test_seeds_that_no_generator_takes(ia3, place, task, tmp_path, seeds):
    code, out, err = train(ia3, place, task, tmp_path / "out", seeds=seeds)
    assert (code, out) == (2, "")
    assert err == f"ia3: Expected --seeds from 0 to 4294967295, found {seeds!r}.\n"
    assert not (tmp_path / "out").exists()
