"""The base model that suits labelled rows."""

import json

import numpy as np
import pytest

from ia3 import InputError, Task
from ia3.cli import main
from ia3.evaluation import choosing
from ia3.evaluation.choosing import choose_model, named_models
from ia3.evaluation.prediction import Prediction
from support import tiny, words
from support.sentences import write

ROWS = words.different(24, seed=3)
TASK = Task(name="teas", template=words.TEMPLATE, choices=words.CHOICES)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choosing")
    words.save_model(folder / "model")
    write(folder / "encoder")
    tiny.classifier(vocab_size=len(words.VOCABULARY)).save_pretrained(folder / "classifier")
    words.enclosing().save_pretrained(folder / "classifier")
    words.write_csv(folder / "train.csv", ROWS)
    return folder


def test_each_model_is_cross_validated_and_the_best_comes_first(place):
    names = [str(place / "model"), str(place / "encoder")]
    found = choose_model(names, TASK, ROWS)
    assert {one.name for one in found} == set(names)
    best = min(found, key=lambda one: one.log_loss)
    assert best.behind == 0 and best.as_good
    assert all(one.behind == pytest.approx(one.log_loss - best.log_loss) for one in found)
    chosen = found[0]
    assert chosen.as_good and not any(one.as_good and one.parameters < chosen.parameters for one in found)


@pytest.mark.parametrize(("probabilities", "chosen"), [((0.7, 0.72), "small"), ((0.6, 0.9), "large")])
def test_the_smaller_one_is_chosen_where_it_is_as_good(monkeypatch, probabilities, chosen):
    """Its losses vary by row, so a small difference is chance, and a large one is not."""
    chance = np.random.default_rng(0)

    def held_out(name, task, rows, *_):
        p = probabilities[name == "large"] + chance.normal(size=len(rows)) * 0.05
        said = [(one, row["label"]) for one, row in zip(p, rows, strict=True)]
        found = [
            Prediction.of({label: float(np.log(one if label == right else 1 - one)) for label in words.CHOICES})
            for one, right in said
        ]
        return found, [right for _, right in said]

    monkeypatch.setattr(choosing, "_held_out", held_out)
    monkeypatch.setattr(choosing, "parameter_count", {"small": 1, "large": 2}.get)
    assert choose_model(["large", "small"], TASK, ROWS)[0].name == chosen


def test_names(monkeypatch):
    assert named_models("smollm2") is None and named_models("owner/name") is None
    monkeypatch.setattr(choosing, "sentence_folder", lambda: None)
    assert named_models("auto") == ["smollm2"]
    monkeypatch.setattr(choosing, "sentence_folder", lambda: "folder")
    assert named_models("auto") == ["minilm", "smollm2"]
    assert named_models("my/model, auto") == ["my/model", "minilm", "smollm2"]
    with pytest.raises(InputError, match="Expected models with commas between them, found 'a,,b'"):
        named_models("a,,b")


def test_what_cannot_be_compared_is_refused(place):
    model = str(place / "model")
    with pytest.raises(InputError, match="Expected several different rows of most labels"):
        choose_model([model], TASK, ROWS[:2])
    with pytest.raises(InputError, match="same labels for all rows"):
        choose_model([model], Task(template=words.TEMPLATE, choices="{{ a }} ||| {{ b }}"), ROWS)
    with pytest.raises(InputError, match=r"Expected language models and sentence encoders, found .*classifier"):
        choose_model([str(place / "classifier")], TASK, ROWS)


def test_the_command_trains_the_chosen_one(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    command = [
        "train",
        "--data",
        "train.csv",
        "--template",
        words.TEMPLATE,
        "--model",
        "model,encoder",
        "--test-rows",
        "4",
    ]
    command += ["--examples-per-label", "8", "--steps", "4", "--output", "adapter", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    assert json.loads(out)["model"] in (str(place / "model"), str(place / "encoder"))
    assert "behind the best" in err
    with pytest.raises(SystemExit) as ended:
        main(["train", "--tasks", "rte,cb", "--model", "model,encoder"])
    assert ended.value.code == 2
