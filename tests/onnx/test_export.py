"""An exported folder answers as `ia3 predict` does, without this package; what cannot be exact is refused."""

import json
import subprocess
import sys

import pytest

from ia3 import FewShotClassifier, Recipe, Task
from ia3.cli import main
from ia3.cli import export as command
from ia3.onnx import export as exporting
from ia3.task.template import Template
from support import tiny, words

pytest.importorskip("onnxscript", reason="pip install 'ia3[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'ia3[onnx]'")

KINDS = ("start", "question", "bert", "sentence")
TEMPLATE = "review : {{ text }} answer : what is it ?"
TEXTS = ["the tea was lovely today", "the soup was stale", "a cake", "it is awful and broken and bitter and stale today"]


@pytest.fixture
def ia3(capsys, monkeypatch):
    """Runs the command line in this process: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code or 0, *capsys.readouterr()

    return run


def save_model(kind, folder):
    """A tiny model of a kind with its tokenizer."""
    size = len(words.VOCABULARY)
    if kind in ("start", "question"):
        words.save_model(folder)
    elif kind == "sentence":
        tiny.classifier(vocab_size=size).base_model.save_pretrained(folder)
        words.enclosing().save_pretrained(folder)
    else:
        tiny.classifier(vocab_size=size, num_labels=2).save_pretrained(folder)
        words.enclosing().save_pretrained(folder)


def trained(kind, folder, *more):
    """An adapter's folder: vectors that have moved, for one of the kinds."""
    save_model(kind, folder / "model")
    words.write_csv(folder / "train.csv", words.rows(60))
    arguments = ["train", "--model", folder / "model", "--data", folder / "train.csv", "--steps", "30", "--output", folder / "a"]
    arguments += ["--template", TEMPLATE, "--choices", "pos=good,neg=not good it is", "--opinions", "vectors", *more]
    if kind in ("start", "question"):
        arguments += ["--acts-from", kind]
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert not ended.value.code
    return folder / "a"


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_answers_as_predict_does(kind, ia3, tmp_path):
    adapter = trained(kind, tmp_path)
    (adapter / "calibration.json").write_text(
        '{"temperature": 0.6, "rows": 8, "log_loss": 0.5, "log_loss_before": 0.7, "calibration_error": 0.1, "calibration_error_before": 0.2}'
    )
    code, out, err = ia3("export", adapter, "--output", tmp_path / "onnx", "--json")
    assert code == 0, err
    assert json.loads(out)["difference"] < 1e-4
    code, out, err = ia3("predict", adapter, *TEXTS, "--json", "--dtype", "float32")
    assert code == 0, err
    # In a process that cannot import this package or torch.
    blocked = "import sys; sys.modules.update(dict.fromkeys(('ia3', 'torch', 'transformers')))\n"
    script = f"{blocked}import runpy; runpy.run_path(r'{tmp_path / 'onnx' / 'answer.py'}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script, *TEXTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert len({item["label"] for item in json.loads(out)}) == 2  # so that there is something to tell
    for one, other in zip(answers, json.loads(out), strict=True):
        assert one["label"] == other["label"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)
