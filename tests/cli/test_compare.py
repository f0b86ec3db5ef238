"""`ia3 compare` end to end on a tiny model: its rows, its picture, and what it says about bad input."""

import json

import pytest
import transformers

from ia3 import Task, few_shot
from ia3.cli import main
from ia3.evaluation import comparison
from ia3.evaluation.icl import draw_shots, shots_text
from support import tiny, words

CHOICES = "pos=good,neg=not good"
KEYS = {
    "method",
    "accuracy",
    "macro_f1",
    "inference_flops",
    "inference_flops_uncached",
    "inference_flops_estimate",
    "training_flops",
    "training_flops_estimate",
    "kv_cache_bytes",
    "disk_bytes",
    "seconds",
    "once_seconds",
    "tokens",
    "examples",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tiny models, rows, and a task."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("llama", "gpt2", "t5", "bert"):
        tiny.build(name, vocab_size=len(words.VOCABULARY)).save_pretrained(folder / name)
        words.tokenizer().save_pretrained(folder / name)
    words.write_csv(folder / "train.csv", words.rows(40))
    words.write_csv(folder / "test.csv", words.rows(30, seed=1))
    return folder


@pytest.fixture
def run(ia3, place, tmp_path):
    """`ia3 compare` on a tiny model with usual options, some of them changed; None leaves one out."""

    def run(*more, **changes):
        options = {
            "model": place / "llama",
            "data": place / "train.csv",
            "test_data": place / "test.csv",
            "template": words.TEMPLATE,
            "choices": CHOICES,
            "shots": "2,4",
            "steps": 3,
            "output": tmp_path / "out",
            **changes,
        }
        return ia3("compare", *more, **options)

    return run


def test_json_has_a_row_for_each_method(run, place, tmp_path):
    code, out, err = run("--json", seed=5)
    assert code == 0, err
    assert set(json.loads(out)) == {"rows"}
    rows = {row["method"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["zero-shot", "2-shot", "4-shot", "t-few"]
    for row in rows.values():
        assert set(row) >= KEYS
        assert all(isinstance(row[key], (int, float)) for key in KEYS - {"method"})
        assert 0 <= row["macro_f1"] <= row["accuracy"] + 0.5 and row["accuracy"] <= 1 and row["seconds"] > 0
    zero, two, four, trained = rows.values()
    assert trained["balanced"] is None
    assert all(set(row["balanced"]) == {"accuracy", "macro_f1"} for row in (zero, two, four))
    # Keys and values of 2 layers, 2 heads of 8 numbers in float32, for every token.
    token = 2 * 2 * 2 * 8 * 4
    prompt = len(words.TEMPLATE.replace("{{ text }}", "the tea was lovely today").split())
    assert zero["tokens"] == trained["tokens"] == prompt + 1  # and "not" of "not good"
    assert zero["kv_cache_bytes"] == trained["kv_cache_bytes"] == token * (prompt + 1)
    parameters = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(place / "llama").parameters())
    assert zero["inference_flops_estimate"] == 2 * parameters * (prompt + 1)
    assert (zero["disk_bytes"], zero["training_flops"], zero["examples"]) == (0, 0, 0)
    # An adapter's vectors are no matrix product.
    assert trained["inference_flops"] == zero["inference_flops"] == zero["inference_flops_uncached"]
    assert trained["training_flops"] > 3 * 8 * zero["inference_flops"] and trained["steps"] == 3
    assert trained["training_flops_estimate"] == 3 * 3 * 8 * zero["inference_flops_estimate"]
    assert trained["disk_bytes"] > 2 * (16 + 16 + 48) * 4 and trained["examples"] == 32
    # Shots come from the rows that T-Few learns from.
    task = Task(template=words.TEMPLATE, choices={"pos": "good", "neg": "not good"})
    train = [dict(row) for row in words.rows(40)]
    examples = few_shot(train, task, 16, 5)
    for row, count in ((two, 2), (four, 4)):
        text = shots_text(task, draw_shots(examples, task, count, 5))
        assert row["disk_bytes"] == len(text.encode()) and row["examples"] == count
        assert row["tokens"] == len(words.tokenizer()(text)["input_ids"]) + zero["tokens"]
        assert row["kv_cache_bytes"] == token * row["tokens"]
        assert zero["inference_flops"] < row["inference_flops"] < row["inference_flops_uncached"]
        assert row["inference_flops_estimate"] == 2 * parameters * row["tokens"]
        assert row["training_flops"] == 0
    saved = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert saved["rows"] == json.loads(out)["rows"] and saved["test_rows"] == 30 and saved["train_examples"] == 32
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.json", "compare.png", "report.html"]


def test_table_with_an_adapter_that_is_trained_already(run, ia3, place, tmp_path):
    shared = {"model": place / "llama", "data": place / "train.csv", "test_data": place / "test.csv"}
    shared |= {"template": words.TEMPLATE, "choices": CHOICES}
    code, _, err = ia3("train", **shared, steps=3, output=tmp_path / "adapter")
    assert code == 0, err
    code, out, err = run("--json", output=tmp_path / "new")
    trained = json.loads(out)["rows"][-1]
    code, out, err = run(
        adapter=tmp_path / "adapter", model=None, steps=None, template=None, choices=None, output=tmp_path / "out"
    )
    assert code == 0, err
    for text in ("zero-shot", "2-shot", "4-shot", "t-few", "training FLOPs", "keys and values", "paper's"):
        assert text in out
    row = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"][-1]
    # The same training, so the same costs and the same answers.
    for key in KEYS - {"seconds", "once_seconds"}:
        assert row[key] == trained[key], key
    # Of adapters that were trained at once, each took a part of the time.
    metrics = json.loads((tmp_path / "adapter" / "metrics.json").read_text()) | {
        "train_seconds": 6,
        "trained_at_once": 4,
    }
    (tmp_path / "adapter" / "metrics.json").write_text(json.dumps(metrics))
    code, out, err = run("--json", adapter=tmp_path / "adapter", steps=None, template=None, choices=None)
    assert json.loads(out)["rows"][-1]["once_seconds"] == 1.5
    for damage in (
        "{",
        "[]",
        '{"train_seconds": "x"}',
        '{"steps": "x"}',
        '{"train_rows": 3}',
        '{"train_examples": "x"}',
    ):
        (tmp_path / "adapter" / "metrics.json").write_text(damage)
        code, _, err = run("--json", adapter=tmp_path / "adapter", steps=None, template=None, choices=None)
        assert code == 2 and "metrics.json" in err.splitlines()[-1] and err.splitlines()[-1].endswith("delete it.")
    (tmp_path / "adapter" / "metrics.json").unlink()
    code, out, err = run("--json", adapter=tmp_path / "adapter", steps=None, template=None, choices=None)
    row = json.loads(out)["rows"][-1]
    assert row["training_flops"] is None and row["training_flops_estimate"] is None
    assert row["accuracy"] == trained["accuracy"]


def test_answers_are_balanced_on_training_rows_that_are_no_shots(run, monkeypatch):
    asked, predict = [], comparison.predict

    def spied(model, tokenizer, task, rows, *args, prefix=None, **kwargs):
        asked.append((prefix, rows))
        return predict(model, tokenizer, task, rows, *args, prefix=prefix, **kwargs)

    monkeypatch.setattr(comparison, "predict", spied)
    code, out, err = run(shots="4,8", examples_per_label=4)
    assert code == 0, err
    zero, four, eight = asked
    assert zero[0] is None and len(zero[1]) == 8
    assert len(four[1]) == 4
    assert len(eight[1]) == 8  # all examples are shots
    assert {row["text"] for row in zero[1]} >= {row["text"] for row in four[1]}
    assert "balanced accuracy" in out and "Balanced: without" in out


def test_answers_of_their_own_have_no_balance(run, place, tmp_path):
    rows = [{**row, "good": "lovely", "bad": "stale"} for row in words.rows(24)]
    words.write_csv(tmp_path / "own.csv", rows)
    options = {"data": tmp_path / "own.csv", "test_data": None, "choices": "pos={{ good }},neg={{ bad }}"}
    code, out, err = run(**options, examples_per_label=4)
    assert code == 0 and "balanced" not in out.lower(), err
    code, out, _ = run("--json", **options, examples_per_label=4)
    assert code == 0 and all(row["balanced"] is None for row in json.loads(out)["rows"])


def test_the_examples_choose_a_wording_for_all_methods(run, tmp_path):
    code, out, err = run("--json", template=None, choices=None)
    found = json.loads(out)
    assert code == 0 and len(found["wordings"]) > 20, err
    code, out, err = run(template=None, choices=None)
    assert code == 0 and "the best of" in out and found["wordings"][0]["template"].splitlines()[-1] in out, err


def test_costs_are_of_the_examples_that_training_sees(run, place):
    code, out, err = run("--json", shots="2", examples_per_label=1)
    assert code == 0, err
    zero, _, few = json.loads(out)["rows"]
    assert few["examples"] == 2 and few["steps"] == 3
    assert few["training_flops_estimate"] == 3 * 3 * 2 * zero["inference_flops_estimate"]
    assert few["training_flops"] < 3 * 3 * 2 * zero["inference_flops"]


def test_shots_are_read_without_counting_when_they_are_timed(run, monkeypatch):
    from torch.utils._python_dispatch import _get_current_dispatch_mode as mode

    from ia3.scoring import prefix

    read, modes = prefix.read, []
    monkeypatch.setattr(prefix, "read", lambda *args: modes.append(mode()) or read(*args))
    code, _, err = run("--json", shots="2")
    assert code == 0, err
    assert modes[0] is None and modes[1] is not None


def test_an_adapters_training_rows_are_shown_and_are_no_test_rows(run, ia3, place, tmp_path, monkeypatch):
    """They are those of another seed than compare's."""
    from ia3.evaluation import icl

    rows = words.different(60)
    data = words.write_csv(tmp_path / "rows.csv", rows)
    shared = {"model": place / "llama", "data": data, "template": words.TEMPLATE, "choices": CHOICES}
    assert ia3("train", **shared, steps=1, output=tmp_path / "adapter", seed=7)[0] == 0
    options = {"data": data, "test_data": None, "adapter": tmp_path / "adapter", "seed": 0}
    options |= dict.fromkeys(("steps", "template", "choices"))
    shown, draw = [], icl.draw_shots
    monkeypatch.setattr(icl, "draw_shots", lambda *a: shown.extend(found := draw(*a)) or found)
    code, out, err = run("--json", **options)
    assert code == 0, err
    task = Task(template=words.TEMPLATE, choices={"pos": "good", "neg": "not good"})
    seen = {row["text"] for row in few_shot(rows, task, 16, 7)}
    assert len(shown) == 2 + 4 and {row["text"] for row in shown} <= seen
    saved = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (saved["train_examples"], saved["test_rows"]) == (32, 28)
    # Its own words say what it has seen, whatever words it is asked in.
    code, out, err = run("--json", **{**options, "template": "{{ text }} , what is it ?", "choices": CHOICES})
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["test_rows"] == 28
    # Given test rows are measured on as they are.
    code, out, err = run("--json", **{**options, "test_data": data})
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["test_rows"] == 60
    assert f"{len(seen)} test rows duplicate training examples." in err
    # An adapter that does not say what it has seen.
    metrics = json.loads((tmp_path / "adapter" / "metrics.json").read_text())
    del metrics["train_rows"]
    (tmp_path / "adapter" / "metrics.json").write_text(json.dumps(metrics))
    code, out, err = run("--json", **options)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "Expected test rows that the adapter has not seen (--test-data)" in err
    assert run("--json", **{**options, "test_data": place / "test.csv"})[0] == 0


@pytest.mark.parametrize(
    "model, per_label, methods",
    [("llama", 16, ["8-shot", "16-shot"]), ("llama", 5, ["8-shot"]), ("gpt2", 16, [])],  # 32 examples, 10, 64 tokens
)
def test_usual_shots_are_those_that_fit(run, place, model, per_label, methods):
    code, out, err = run("--json", shots=None, model=place / model, examples_per_label=per_label, steps=1)
    assert code == 0, err
    assert [row["method"] for row in json.loads(out)["rows"]] == ["zero-shot", *methods, "t-few"]
    missing = [f"no {count} examples" for count in ("8", "16") if f"{count}-shot" not in methods]
    said = [line for line in err.splitlines() if "examples in context:" in line]
    assert len(said) == bool(missing)
    assert all(f"o {text.split()[1]}" in said[0] and f"there are {2 * per_label}," in said[0] for text in missing)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shots": "33"}, "--shots from 1 to 32, the training examples, found 33"),
        ({"shots": "0"}, "--shots from 1 to 32, the training examples, found 0"),
        ({"shots": "4,x"}, "--shots as different numbers"),
        ({"shots": "4,4"}, "--shots as different numbers"),
        ({"label_column": "stars"}, "Expected a column 'stars'"),
        ({"template": "{{ review }}"}, "The template names 'review'"),
        ({"examples_per_label": 30}, "Expected 30 training examples for each label"),
        ({"test_data": None, "examples_per_label": 0}, "rows to measure on (--test-data)"),
        ({"recipe": "large"}, "Expected a recipe of paper, small"),
        ({"adapter": "somewhere"}, "--adapter or --steps, one of the two"),
        ({"adapter": "/no/adapter", "steps": None}, "'/no/adapter'"),
        ({"model": "/no/such/model"}, "found no '/no/such/model'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(run, tmp_path, changes, message):
    code, out, err = run("--json", **changes)
    assert code == 2 and out == "" and message in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_shots_that_do_not_fit_into_the_context(run, place, tmp_path):
    code, out, err = run("--json", model=place / "gpt2", shots="4,8")
    assert code == 2 and out == "" and "found 8, of which 5 fit; ask for fewer" in err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_encoder_decoder(run, place):
    code, out, err = run("--json", model=place / "t5", shots="4")
    assert code == 0, err
    zero, shot, trained = json.loads(out)["rows"]
    # Shots are read with each prompt, so there is no cheaper way.
    assert shot["inference_flops"] == shot["inference_flops_uncached"] > 2 * zero["inference_flops"]
    parameters = sum(
        p.numel() for p in transformers.T5ForConditionalGeneration.from_pretrained(place / "t5").parameters()
    )
    assert shot["inference_flops_estimate"] == parameters * shot["tokens"] and trained["disk_bytes"] > 0


def test_a_classifier_reads_no_examples(run, place):
    code, out, err = run("--json", model=place / "bert")
    assert code == 2 and out == "" and "a classifier cannot read examples" in err
    code, out, err = run("--json", model=place / "bert", shots=None)
    assert code == 0, err
    assert [row["method"] for row in json.loads(out)["rows"]] == ["zero-shot", "t-few"]


def test_an_output_that_is_a_file(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run(output=tmp_path / "file")
    assert code == 2 and "Expected a folder for --output" in err


@pytest.mark.parametrize("where", ["zero_shot", "_train", "draw"])
def test_interruption_leaves_nothing(run, tmp_path, monkeypatch, where):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison if where == "draw" else comparison.Comparison, where, interrupt)
    code, out, _ = run("--json")
    assert code == 130 and out == ""
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob("out/.*"))


@pytest.mark.slow
def test_the_embedded_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--json", "--steps", "2", "--test-rows", "6", "--shots", "2"])
    assert not ended.value.code
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in rows] == ["zero-shot", "2-shot", "t-few"]
    assert (tmp_path / "comparisons" / "courses" / "compare.png").is_file()
