"""Tasks whose answers are texts, from the command line."""

import csv
import json

import peft
import pytest
import torch
import transformers

from ia3 import AdapterFolder, FewShotClassifier, IA3Model, InputError, PeftModel, load_base
from ia3.cli import main
from ia3.evaluation.generation import generate
from ia3.task.free_text import FreeText
from support import tiny, words

TASK = 'name: said\ntrain: rows.jsonl\ntemplate: "review : {{ text }} answer :"\nanswer: "{{ said }}"\n'
ROWS = [{"text": row["text"], "said": "good" if row["label"] == "pos" else "not good"} for row in words.different(40)]
TEXT = "the tea was lovely today"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, a task, rows, and an adapter trained on them."""
    folder = tmp_path_factory.mktemp("place")
    words.save_model(folder / "model")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "task.yaml").write_text(TASK)
    arguments = [
        "train",
        "--task",
        folder / "task.yaml",
        "--model",
        folder / "model",
        "--steps",
        "4",
        "--examples",
        "24",
    ]
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in [*arguments, "--output", folder / "adapters" / "said"]])
    assert not ended.value.code
    return folder


@pytest.fixture
def train(ia3, place, tmp_path):
    def run(*more, **changes):
        options = {"task": place / "task.yaml", "model": place / "model", "steps": 4, "output": tmp_path / "out"}
        return ia3("train", *more, **{**options, **changes})

    return run


def test_what_is_trained_is_an_adapters_folder(place):
    folder = AdapterFolder(place / "adapters" / "said")
    task = folder.any_task
    # Twice the longest answer, "not good" and the end of the text.
    assert isinstance(task, FreeText) and task.max_new_tokens == 6 and folder.task is None
    assert folder.recipe.name == "generate" and folder.recipe.unlikelihood == 0
    metrics = folder.metrics
    assert metrics["train_examples"] == 24 and metrics["test_rows"] == 16
    assert {*metrics["zero_shot"]} == {*metrics["trained"]} == {"exact_match", "token_f1", "rouge_l"}
    assert sum(map(folder.seen(), ROWS)) == 24
    card = (place / "adapters" / "said" / "README.md").read_text()
    assert "| 16 test rows | exact match | token F1 | ROUGE-L |" in card and "The answer: `{{ said }}`" in card
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    ours = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    theirs = peft.PeftModel.from_pretrained(base, place / "adapters" / "said")
    mine = PeftModel.from_pretrained(ours, place / "adapters" / "said")
    ids = torch.arange(3, 9)[None]
    torch.testing.assert_close(theirs(input_ids=ids).logits, mine(input_ids=ids).logits)


def test_predict_generates(ia3, place, tmp_path):
    code, out, err = ia3("predict", place / "adapters" / "said", TEXT, "--json", "--zero-shot")
    assert not code, err
    [said] = json.loads(out)
    base, tokenizer = load_base(str(place / "model"))
    task = AdapterFolder(place / "adapters" / "said").any_task
    assert said["zero_shot_prediction"] == generate(base, tokenizer, task, [TEXT])[0].result
    adapted = IA3Model.from_pretrained(base, place / "adapters" / "said")
    found = generate(adapted, tokenizer, task, [TEXT])[0]
    assert (said["prediction"], said["finished"]) == (found.result, found.finished)

    for name, read in {
        "out.csv": lambda path: list(csv.DictReader(path.open())),
        "out.jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
    }.items():
        code, out, err = ia3(
            "predict", place / "adapters" / "said", data=place / "rows.jsonl", output=tmp_path / name, max_new_tokens=3
        )
        assert not code and "answers are cut off" in " ".join((out + err).split())
        rows = read(tmp_path / name)
        assert len(rows) == 40 and {*rows[0]} == {"text", "said", "prediction"} and rows[3]["said"] == ROWS[3]["said"]
        expected = [one.result for one in generate(adapted, tokenizer, task, ROWS, max_new_tokens=3)]
        assert [row["prediction"] for row in rows] == expected
    texts = [
        ia3("predict", place / "adapters" / "said", TEXT, "--json", temperature=2.0, seed=seed)[1]
        for seed in (1, 1, 2, 3)
    ]
    assert texts[0] == texts[1] and len({*texts}) > 1


def test_evaluate_measures(ia3, place, tmp_path, monkeypatch):
    code, out, err = ia3("evaluate", place / "adapters" / "said", "--json", data=place / "rows.jsonl")
    assert not code, err
    found = json.loads(out)
    assert {*found} == {"exact_match", "token_f1", "rouge_l", "rows", "unfinished"} and found["rows"] == 40
    assert "24 of 40 rows duplicate training examples" in err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_length.py").write_text(
        "def mean(predictions, references):\n    return sum(map(len, references)) / 40\n"
    )
    code, out, err = ia3("evaluate", place / "adapters" / "said", data=place / "rows.jsonl", metric="own_length.mean")
    assert not code and "own_length.mean" in out and " 6 " in out, err


def test_the_code_that_a_folder_names_runs_only_if_it_is_asked_for(ia3, place, train, tmp_path, monkeypatch):
    (tmp_path / "own_evil.py").write_text("def run(predictions, references):\n    return 0.25\n")
    monkeypatch.chdir(tmp_path)
    assert not train(metric="own_evil.run", test_rows=4, examples=8)[0]
    assert AdapterFolder(tmp_path / "out").metrics["trained"]["own_evil.run"] == 0.25
    code, out, err = ia3("evaluate", tmp_path / "out", "--json", data=place / "rows.jsonl")
    assert not code and "own_evil.run" not in out and "runs only with --metric own_evil.run" in err
    common = {"adapter": tmp_path / "out", "shots": 1, "test_rows": 2, "output": tmp_path / "compared"}
    code, out, err = ia3("compare", "--json", **common)
    assert not code and "own_evil.run" not in out, err
    code, out, err = ia3("compare", "--json", metric="own_evil.run", **common)
    assert not code and json.loads(out)["rows"][0]["own_evil.run"] == 0.25, err
    code, _, err = ia3("compare", "--chat", **common)
    assert code == 2 and "Expected --adapter or --chat" in err


def test_compare_sets_examples_in_context_beside(ia3, place, tmp_path):
    code, out, err = ia3(
        "compare", "--json", adapter=place / "adapters" / "said", shots="1,2", test_rows=4, output=tmp_path
    )
    assert not code, err
    rows = json.loads(out)["rows"]
    assert [row["method"] for row in rows] == ["zero-shot", "1-shot", "2-shot", "trained"]
    assert all(0 <= row["token_f1"] <= 1 and row["seconds"] > 0 for row in rows)
    assert rows[0]["inference_flops"] < rows[1]["inference_flops"] < rows[2]["inference_flops"]
    assert rows[0]["training_flops"] == 0 < rows[3]["training_flops"]  # as the adapter's folder records it
    assert json.loads((tmp_path / "compare.json").read_text())["rows"] == rows
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = ia3(
        *("compare", "--examples", 8),
        task=place / "task.yaml",
        model=place / "model",
        shots="1",
        test_rows=4,
        steps=2,
        output=tmp_path,
    )
    assert not code and "1-shot" in out and "token F1" in out and "training FLOPs" in out, err


def test_a_metric_that_cannot_be_is_refused_before_training(ia3, train, place, tmp_path, monkeypatch):
    def load_base(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr("ia3.adapter.pretrained.load_base", load_base)
    code, _, err = train(metric="no_such.metric", examples=8)
    assert code == 2 and "Cannot import the metric 'no_such.metric'" in err


def test_several_adapters_train_at_once(train, tmp_path):
    code, out, err = train(seeds="0,1", test_rows=4, examples=8)
    assert not code and "Exact match (token F1)" in out, err
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {*results["members"]} == {"seed-0", "seed-1"} and "rouge_l" in results["summary"][""]["trained"]
    assert AdapterFolder(tmp_path / "out" / "seed-1").any_task.name == "said"


def test_an_interrupted_run_goes_on(train, place, tmp_path, monkeypatch):
    from ia3.training.trainer import TFewTrainer

    assert not train(steps=8, test_rows=1, output=tmp_path / "whole")[0]
    step = TFewTrainer.training_step

    def interrupted(self, *given):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(TFewTrainer, "training_step", interrupted)
    code, _, err = train(steps=8, test_rows=1)
    assert code == 130 and "--resume" in err
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", "200")
    code, _, err = train("--resume", steps=8, test_rows=1)
    assert not code, err
    its, whole = (AdapterFolder(tmp_path / name).vectors()[0] for name in ("out", "whole"))
    assert all(torch.equal(its[name], whole[name]) for name in whole)


def test_a_chat_is_kept_with_the_adapter(ia3, train, place, tmp_path):
    from training.test_free_text import CHAT

    tiny.build("llama", vocab_size=len(words.VOCABULARY)).save_pretrained(tmp_path / "instruct")
    words.tokenizer(chat_template=CHAT).save_pretrained(tmp_path / "instruct")
    assert not train("--chat", model=tmp_path / "instruct", test_rows=2)[0]
    assert AdapterFolder(tmp_path / "out").any_task.chat
    assert not ia3("predict", tmp_path / "out", TEXT)[0]
    code, _, err = train("--chat")
    assert (
        code == 2
        and err.count("\n") == 1
        and "Expected a model with a chat template" in err
        and "leave out --chat" in err
    )


@pytest.mark.parametrize(
    "more, error",
    [
        (
            {"label_column": "said"},
            "Expected options that apply to the task 'said', whose answer is text, found '--label-column'",
        ),
        ({"opinions": "head"}, "found '--opinions'"),
        ({"folds": 2}, "found '--folds'"),
        ({"examples_per_label": 4}, "found '--examples-per-label'"),
        ({"acts_from": "question"}, "an adapter that acts from the start"),
        ({"model": "auto"}, "Expected one model"),
        ({"metric": "accuracy"}, "expected a metric of exact_match"),
        ({"template": "{{ said }}"}, "gives the answer away"),
        (
            {"examples": 400},
            "Expected from 1 to 40 training examples, found 400; take what there is, without --examples",
        ),
    ],
)
def test_options_that_do_not_apply(train, more, error):
    code, _, err = train(**more)
    assert code == 2 and error in err and err.count("\n") == 1


def test_what_is_for_texts_is_refused_elsewhere(ia3, place, tmp_path):
    labelled = words.write_csv(tmp_path / "labelled.csv", words.rows(40))
    code, _, err = ia3("train", "--chat", data=labelled, model=place / "model", steps=1, output=tmp_path / "out")
    assert code == 2 and "which has labels, found '--chat'" in err
    code, _, err = ia3("predict", place / "adapters", TEXT, "--all-adapters")
    assert code == 2 and "Expected a task with choices" in err and err.count("\n") == 1
    code, _, err = ia3("predict", place / "adapters" / "said", TEXT, abstain_below=0.5)
    assert code == 2 and "found '--abstain-below'" in err
    code, _, err = ia3("evaluate", place / "adapters" / "said", "--calibrate", data=place / "rows.jsonl")
    assert code == 2 and "found '--calibrate'" in err
    code, _, err = ia3("tasks", "show", place / "task.yaml")
    assert code == 2 and "whose answer is text" in err
    with pytest.raises(InputError, match="whose answer is text"):
        FewShotClassifier.load(place / "adapters" / "said")


def test_rows_that_cannot_be_used(ia3, train, place, tmp_path):
    bad = tmp_path / "bad.jsonl"
    for row, error in {
        '{"text": "tea", "said": ""}': "Expected an answer in 'said', found none (row 2)",
        '{"text": "", "said": "x"}': "Expected some text in 'text'",
        '{"said": "x"}': "The template names 'text'",
    }.items():
        bad.write_text(json.dumps(ROWS[0]) + "\n" + row)
        code, _, err = train(data=bad)
        assert code == 2 and error in err and err.count("\n") == 1


def test_an_encoder_is_refused_before_it_is_loaded(ia3, train, place, tmp_path):
    tiny.classifier(vocab_size=len(words.VOCABULARY)).base_model.save_pretrained(tmp_path / "encoder")
    words.enclosing().save_pretrained(tmp_path / "encoder")
    for run in (
        train,
        lambda **given: ia3("compare", task=place / "task.yaml", examples=4, test_rows=2, output=tmp_path, **given),
    ):
        code, _, err = run(model=tmp_path / "encoder")
        assert code == 2 and "found the sentence encoder" in err.splitlines()[-1] and "generates none" in err


def test_fields_are_found(ia3, tmp_path):
    TOKENIZER = words.byte_level()

    tiny.build("llama", vocab_size=len(TOKENIZER), max_position_embeddings=256).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    rows = [
        {"text": f"call {who} {when}", "who": who, "when": when} for who in ("Ann", "Bob") for when in ("today", "now")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text("name: f\ntrain: rows.jsonl\ntemplate: '{{ text }}: '\nfields: [who, when]\n")
    common = {"model": tmp_path / "model", "steps": 2, "output": tmp_path / "out"}
    code, out, err = ia3("train", task=tmp_path / "task.yaml", test_data=tmp_path / "rows.jsonl", **common)
    assert not code and "micro-F1" in out, err
    code, out, err = ia3("predict", tmp_path / "out", "--json", data=tmp_path / "rows.jsonl")
    for row, said in zip(rows, json.loads(out), strict=True):
        assert {*said["prediction"]} == {"who", "when"}
        assert all(
            value is None or value in row["text"] for value in said["prediction"].values() if type(value) is not list
        )
    code, out, err = ia3("predict", tmp_path / "out", data=tmp_path / "rows.jsonl", output=tmp_path / "out.csv")
    cells = [row["prediction"] for row in csv.DictReader((tmp_path / "out.csv").open())]
    assert not code and all({*json.loads(cell)} == {"who", "when"} for cell in cells)
    code, out, err = ia3("evaluate", tmp_path / "out", "--json", data=tmp_path / "rows.jsonl")
    assert {"micro_f1", "exact_match", "f1: who", "f1: when"} <= {*json.loads(out)}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"text": "x", "who": "y"}])))
    code, _, err = ia3("train", task=tmp_path / "task.yaml", **common)
    assert code == 2 and "Expected a value of 'who' that is a part of the row's text, found 'y' (row 5)" in err
    words.save_model(tmp_path / "words")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = ia3("train", task=tmp_path / "task.yaml", **{**common, "model": tmp_path / "words"})
    assert code == 2 and "a tokenizer without { }" in err and err.count("\n") == 1
