"""An exported folder answers as `ia3 predict` does, without this package; what cannot be exact is refused."""

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys

import pytest

from ia3 import Task
from ia3.cli import main
from ia3.onnx import export as exporting
from ia3.task.template import Template
from support import tiny, words
from support.paths import ROOT

EXTRA = ("onnx", "onnxruntime", "onnxscript")
needs_extra = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, EXTRA)), reason='needs the extra: pip install "ia3[onnx]"'
)
KINDS = ("start", "question", "bert", "sentence")
TEMPLATE = 'review : {{ text }} answer : {{ "what" }} is it {{ row["text"] }} ?'
TEXTS = [
    "the tea was lovely today",
    "the soup was stale",
    "a cake",
    "it is awful and broken and bitter and stale today",
]
CALIBRATION = {"temperature": 0.6, "rows": 8, "log_loss": 0.5, "log_loss_before": 0.7}
CALIBRATION |= {"calibration_error": 0.1, "calibration_error_before": 0.2}


@pytest.fixture
def ia3(capsys, monkeypatch):
    """Runs the command line in this process: exit code, standard output, standard error in one line."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, " ".join(err.split())

    return run


def save_model(kind, folder):
    """A tiny model of a kind, with its tokenizer."""
    size = len(words.VOCABULARY)
    if kind in ("bert", "sentence"):
        model = tiny.classifier(vocab_size=size, num_labels=2, num_hidden_layers=1)
        (model if kind == "bert" else model.base_model).save_pretrained(folder)
        words.enclosing().save_pretrained(folder)
    else:
        name = "t5" if kind == "t5" else "llama"
        tiny.build(name, vocab_size=size, max_position_embeddings=64, **tiny.ONE_LAYER[name]).save_pretrained(folder)
        (words.closing() if kind == "t5" else words.tokenizer()).save_pretrained(folder)


def trained(kind, folder, *more):
    """The folder of an adapter that was trained on a model of a kind."""
    save_model(kind, folder / "model")
    words.write_csv(folder / "train.csv", words.rows(40))
    arguments = ["train", "--model", folder / "model", "--data", folder / "train.csv", "--output", folder / "adapter"]
    arguments += ["--choices", "pos=good,neg=not good it is", *more]
    if "head" not in more:
        arguments += ["--steps", "12"]
    if kind in ("start", "question"):
        arguments += ["--acts-from", kind]
    for option, value in {"--opinions": "vectors", "--template": TEMPLATE}.items():
        arguments += [] if option in more else [option, value]
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert not ended.value.code
    return folder / "adapter"


@needs_extra
@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_answers_as_predict_does(kind, ia3, tmp_path):
    adapter = trained(kind, tmp_path)
    (adapter / "calibration.json").write_text(json.dumps(CALIBRATION))
    task = Task.from_file(adapter / "task.yaml").changed(costs={"neg": {"pos": 3.0}})
    task.save(adapter / "task.yaml")
    code, out, err = ia3("export", adapter, "--output", tmp_path / "onnx", "--json")
    assert code == 0, err
    assert json.loads(out)["difference"] < 1e-4
    code, out, err = ia3("predict", adapter, *TEXTS, "--json", "--dtype", "float32")
    assert code == 0, err
    expected = json.loads(out)
    shares = [one["probabilities"]["pos"] for one in expected]
    assert max(shares) - min(shares) > 0.01  # there is something to tell

    # In a process that cannot import this package, torch or transformers.
    blocked = "import sys; sys.modules.update(dict.fromkeys(('ia3', 'torch', 'transformers')))"
    script = f"{blocked}\nimport runpy; runpy.run_path({str(tmp_path / 'onnx' / 'answer.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script, *TEXTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for one, other in zip(json.loads(done.stdout), expected, strict=True):
        assert one["label"] == other["label"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)

    if kind == "start":
        for given, said in {
            "tea " * 60: "Expected at most",
            " ": "Expected some text",
            '{"words": "tea"}': "found none of ['text']",
        }.items():
            done = subprocess.run([sys.executable, "-c", script, given], capture_output=True, text=True)
            assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


@needs_extra
def test_the_page_of_the_docs(ia3, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    train, export, answer = page.partition("<!-- example: export -->\n```sh\n")[2].partition("\n```")[0].splitlines()
    monkeypatch.chdir(tmp_path)
    save_model("question", tmp_path / "model")
    rows = [{"message": row["text"], "queue": row["label"]} for row in words.rows(40)]
    words.write_csv(tmp_path / "tickets.csv", rows)
    for command in (f"{train} --model model --steps 2", export):
        code, _, err = ia3(*shlex.split(command)[1:])
        assert code == 0, err
    done = subprocess.run([sys.executable, *shlex.split(answer)[1:]], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)[0]["label"] in ("neg", "pos"), done.stderr
    script = [sys.executable, "tickets-onnx/answer.py"]
    rows = ["{urgent} my tea", json.dumps({"message": "my tea"})]
    done = subprocess.run([*script, *rows], capture_output=True, text=True)
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 2, done.stderr
    done = subprocess.run([*script, "--data", "tickets.csv"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Expected texts, for example")


@needs_extra
def test_what_would_answer_otherwise_is_refused(ia3, tmp_path, monkeypatch):
    """Each with one line that says what to do, and without a folder."""
    adapter = trained("start", tmp_path)

    def refused(said, folder=adapter):
        code, _, err = ia3("export", folder, "--output", tmp_path / "onnx")
        assert code == 2 and said in err and not (tmp_path / "onnx").exists(), err

    task = Task.from_file(adapter / "task.yaml")
    for said, changes in {
        "Expected a template of text and columns alone": {"template": "{{ text | upper }} it is"},
        "answers that 'train' takes from columns": {"choices": {"pos": "good {{ text }}", "neg": "bad"}},
    }.items():
        other = shutil.copytree(adapter, tmp_path / said[:30].replace(" ", "-"))
        values = {"name": "train", "label_column": "label", "choices": task.choices, "template": TEMPLATE, **changes}
        Task.create(values).save(other / "task.yaml")
        refused(said, other)
    (adapter / "opinions.json").write_text(json.dumps({"balance": [{"pos": 0.0, "neg": 0.1}] * 2}))
    task.changed(templates=[*task.templates, "it is {{ text }} :"]).save(adapter / "task.yaml")
    refused("asked in one template, found 2; train it with --opinions vectors")
    (adapter / "opinions.json").write_text(json.dumps({"balance": [{"pos": 0.0, "neg": 0.1}]}))
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)  # so that any answer is too far away
    refused("gives probabilities that differ by")
    monkeypatch.setattr(exporting.trials, "packs", lambda family, questions: False)
    refused("Expected a model that reads a prompt's answers in one row, found a LlamaForCausalLM")


@needs_extra
def test_heads_and_encoder_decoders_are_refused(ia3, tmp_path):
    heads = trained("question", tmp_path, "--opinions", "head")
    code, _, err = ia3("export", heads, "--output", tmp_path / "onnx")
    assert code == 2 and "found the opinions 'head'" in err and "train it with --opinions vectors" in err
    t5 = trained("t5", tmp_path / "t5")
    code, _, err = ia3("export", t5, "--output", tmp_path / "onnx")
    assert code == 2 and "found the encoder-decoder T5ForConditionalGeneration" in err
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    {
        "{{ text }} It was": [{"column": "text"}, " It was"],
        'In {{ row["a b"] }}:\n{{ row.c }}  ': ["In ", {"column": "a b"}, ":\n", {"column": "c"}, "  "],
        "{{ text }} {{ '{{' }} ||| {{ text }}": [{"column": "text"}, " ", "{{", " "],
        "{{ a }}? {% for it in answer_choices %}{{ it }};{% endfor %}": [{"column": "a"}, "? ", "good;bad;"],
        "{{ text | upper }}": None,
        "{% if text %}{{ text }}{% endif %}": None,
        "{% set text = 'a' %}{{ text }}": None,
        "{{ text }}{{ row }}": None,
    }.items(),
)
def test_a_template_without_jinja(prompt, expected):
    template = Template(prompt=prompt)
    pieces = template.pieces(["good", "bad"])
    assert pieces == expected
    if pieces is not None:
        row = {"text": "tea {{ x }}", "a b": "b", "c": "", "a": "[1]"}
        whole = "".join(piece if isinstance(piece, str) else row[piece["column"]] for piece in pieces)
        assert whole.rstrip() == template.fill(row, ["good", "bad"])
