"""Rows with several labels, from training to the service: lists, a separator, a column for each label."""

import contextlib
import csv
import io
import json
import random
import shutil

import pytest

from ia3 import AdapterFolder, Task, TFewTrainer
from ia3.cli import main
from ia3.serve.adapter import FILES
from support import tiny, words
from support.serving import Running

LABELS = ["neg", "pos", "tea"]
TEXTS = ["the tea was lovely", "the soup was awful and fresh", "the cake was it"]


def rows(count, seed=0):
    """Words tell the labels, each its own."""
    chance, made = random.Random(seed), []
    for i in range(count):
        labels = [name for name in LABELS if chance.random() < 0.45]
        said = [chance.choice(its) for name, its in (("pos", words.GOOD), ("neg", words.BAD)) if name in labels]
        what = "tea" if "tea" in labels else chance.choice(["soup", "cake"])
        made.append({"text": f"the {what} was {' and '.join(said) or 'it'} today {i}", "label": labels})
    return made


def write(path, some):
    path.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, some)))
    words.write_csv(path.with_suffix(".csv"), [{**row, "label": "; ".join(row["label"])} for row in some])
    flags = [{"text": row["text"], **{name: int(name in row["label"]) for name in LABELS}} for row in some]
    words.write_csv(path.with_name(f"{path.name}-columns.csv"), flags)


OPTIONS = {"model": "model", "template": words.TEMPLATE, "steps": 4, "encoder": "none"}
HOW = {
    "lists": {"data": "rows.jsonl", "test_data": "test.jsonl"},
    "separated": {"data": "rows.csv", "test_data": "test.csv", "label_separator": ";", "opinions": "vectors"},
    "columns": {"data": "rows-columns.csv", "test_data": "test-columns.csv", "label_columns": "pos,neg,tea", "opinions": "head", "steps": None},
    "single": {"data": "single.csv"},
}  # fmt: skip


def options(**given):
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    said = io.StringIO()
    words.save_model(folder / "model")
    tiny.classifier(vocab_size=len(words.VOCABULARY)).base_model.save_pretrained(folder / "encoder")
    words.enclosing().save_pretrained(folder / "encoder")
    write(folder / "rows", rows(40))
    write(folder / "test", [{**row, "text": f"{row['text']} ?"} for row in rows(24, seed=1)])
    words.write_csv(folder / "single.csv", words.different(24))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        for name, given in HOW.items():
            with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(said):
                main(["train", *options(output=f"adapters/{name}", **{**OPTIONS, **given})])
            assert not ended.value.code
    (folder / "said.txt").write_text(said.getvalue())
    return folder


@pytest.fixture
def run(place, monkeypatch, ia3):
    monkeypatch.chdir(place)

    def run(*arguments, code=0, **options):
        found, out, err = ia3(*arguments, **options)
        assert found == code, err
        if code:
            assert len([line for line in err.strip().splitlines() if "Fewer than 16" not in line]) == 1, err
        return err if code else out

    return run


def said(run, name, *arguments, **options):
    return json.loads(run("predict", f"adapters/{name}", *TEXTS, "--json", *arguments, **options))


def test_each_label_is_decided_by_itself(run):
    for name in ("lists", "columns"):
        found = said(run, name)
        assert [one["labels"] for one in found] == [["pos", "tea"], ["neg", "pos"], []]
        opinions = AdapterFolder(f"adapters/{name}").opinions
        for one in found:
            likely = {label for label, p in one["probabilities"].items() if p >= opinions.thresholds[label]}
            assert likely == set(one["labels"]) and "label" not in one
    assert set(AdapterFolder("adapters/lists").opinions.weights) >= {"words"}
    assert set(AdapterFolder("adapters/separated").opinions.weights) == {"vectors"}
    assert not AdapterFolder("adapters/columns").opinions.vectors


def test_what_training_writes_and_says(run, place):
    out = (place / "said.txt").read_text()
    assert "micro-F1" in out and "exact match" in out and "each label is decided by itself" in out
    folder = AdapterFolder("adapters/lists")
    assert folder.task.multi_label and folder.task.labels == LABELS
    assert set(folder.metrics["trained"]) == {"accuracy", "macro_f1", "micro_f1"}
    assert folder.metrics["trained"]["macro_f1"] > 0.9 > folder.metrics["zero_shot"]["macro_f1"]
    assert folder.metrics["cross_validation"]["micro_f1"] > 0.9
    assert "| macro-F1 | micro-F1 | exact match |" in (place / "adapters/lists/README.md").read_text()
    assert AdapterFolder("adapters/separated").task.label_separator == ";"
    assert AdapterFolder("adapters/columns").task.label_columns == ["pos", "neg", "tea"]


def test_predictions_in_tables_and_files(run):
    out = run("predict", "adapters/lists", *TEXTS)
    assert "pos, tea" in out and "none" in out
    run("predict", "adapters/lists", data="test.csv", output="said.csv")
    with open("said.csv", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert all(isinstance(json.loads(row["prediction"]), list) for row in found)
    # What was predicted can be read as labels.
    task = Task.load("adapters/lists/task.yaml").changed(label_column="prediction")
    again = [task.labels_of(row) for row in found]
    run("predict", "adapters/lists", data="test.jsonl", output="said.jsonl")
    with open("said.jsonl", encoding="utf-8") as file:
        assert [tuple(json.loads(line)["predictions"]) for line in file] == again


def test_it_abstains(run):
    [one] = said(run, "separated", abstain_below=0.9999)[:1]
    assert one["labels"] is None
    assert "—" in run("predict", "adapters/separated", *TEXTS, abstain_below=0.9999)


def test_beside_an_adapter_of_one_label(run):
    found = json.loads(run("predict", "adapters", *TEXTS, "--all-adapters", "--zero-shot", "--json"))
    for one, alone in zip(found, said(run, "lists"), strict=True):
        several, single = one["adapters"]["lists"], one["adapters"]["single"]
        assert several["labels"] == alone["labels"] and single["label"] in ("pos", "neg")
        assert several["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-5)
        likely = several["zero_shot"]["probabilities"]
        assert several["zero_shot"]["labels"] == [max(likely, key=likely.get)]  # the base model has no thresholds
    out = run("predict", "adapters", TEXTS[0], "--all-adapters")
    assert "pos, tea" in out


def test_evaluate_and_calibrate(run, place):
    metrics = AdapterFolder("adapters/lists").metrics["trained"]
    for name, data in (("lists", "test.jsonl"), ("columns", "test-columns.csv"), ("separated", "test.csv")):
        measured = json.loads(run("evaluate", f"adapters/{name}", "--json", data=data))
        trained = AdapterFolder(f"adapters/{name}").metrics["trained"]
        assert {key: measured[key] for key in trained} == pytest.approx(trained)
    out = run("evaluate", "adapters/lists", data="test.jsonl")
    assert f"{metrics['accuracy']:.1%}" in out and "exact" in out and "Always answering 'none'" in out
    shutil.copytree("adapters/separated", "calibrated")
    before = json.loads(run("evaluate", "calibrated", "--json", data="test.csv"))
    run("evaluate", "calibrated", "--calibrate", data="test.csv")
    after = json.loads(run("evaluate", "calibrated", "--json", data="test.csv"))
    assert after["temperature"] != 1 and after["log_loss"] < before["log_loss"]
    assert after["labels"] == before["labels"]  # a temperature changes no decision


def test_the_service(run, place, tmp_path):
    shutil.copytree(place / "adapters", tmp_path / "adapters")
    shutil.copytree(place / "model", tmp_path / "model")
    expected = said(run, "lists")
    server = Running(tmp_path)
    try:
        folder = place / "adapters" / "lists"
        files = [("files", (name, (folder / name).read_bytes())) for name in FILES if (folder / name).exists()]
        assert server.http.post("/v1/adapters", data={"name": "uploaded"}, files=files).status_code == 201
        for name in ("lists", "uploaded"):
            found = server.classify(name, TEXTS).json()["predictions"]
            for one, its in zip(found, expected, strict=True):
                assert one["labels"] == its["labels"] and set(one) == {"labels", "probabilities"}
                assert one["probabilities"] == pytest.approx(its["probabilities"], abs=1e-4)
        body = {"adapters": ["lists", "single"], "texts": TEXTS[:1]}
        [both] = server.http.post("/v1/classify", json=body).json()["predictions"]
        assert both["lists"]["labels"] == ["pos", "tea"] and both["single"]["label"] == "pos"
        [base] = server.classify("lists", TEXTS[:1], without_adapter=True).json()["predictions"]
        assert base["labels"] == [max(base["probabilities"], key=base["probabilities"].get)]
    finally:
        server.close()


def test_the_examples_choose_a_wording(run):
    given = {**OPTIONS, "template": None, "encoder": "encoder"}
    run("train", output="worded", **given, **HOW["separated"] | {"opinions": None})
    folder = AdapterFolder("worded")
    assert len(folder.task.templates) > 1 and set(folder.opinions.weights) >= {"sentences", "words"}
    assert folder.metrics["trained"]["macro_f1"] > 0.9
    [one] = json.loads(run("predict", "worded", TEXTS[0], "--json"))
    assert set(one["labels"]) >= {"pos", "tea"}
    out = run("tasks", "suggest", data="rows.csv", label_separator=";", model="model")
    assert "Guessing one of 3 labels" in out
    # From there with one more label, in the adapter's wording.
    more = [{**row, "label": [*row["label"], *["new"] * (i % 3 == 0)]} for i, row in enumerate(rows(40))]
    with open("more.jsonl", "w", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, more)))
    out = run("train", output="more", init="worded", data="more.jsonl", **given)
    assert "The wording is that of worded" in out and set(AdapterFolder("more").opinions.thresholds) == {*LABELS, "new"}


def test_a_task_file_and_a_label_without_rows(run):
    Task.create({"name": "fresh", "template": words.TEMPLATE, "choices": [*LABELS, "unseen"]}).save("fresh.yaml")
    given = {**OPTIONS, "template": None, "steps": 2}
    run("train", output="fresh", task="fresh.yaml", data="rows.csv", test_data="test.csv", label_separator=";", **given)
    folder = AdapterFolder("fresh")
    assert folder.task.label_separator == ";" and folder.opinions.thresholds["unseen"] == 0.5
    assert "unseen" in json.loads(run("predict", "fresh", TEXTS[0], "--json"))[0]["probabilities"]
    shown = run("tasks", "show", "adapters/columns/task.yaml", data="test-columns.csv")
    assert "→ tea: tea" in shown or "  tea: tea" in shown


def test_many_at_once(run):
    out = run("train", output="fleet", seeds="0,1", folds=2, **OPTIONS, **HOW["lists"])
    assert "Macro-F1 (micro-F1) on test rows" in out
    for seed in (0, 1):
        folder = AdapterFolder(f"fleet/seed-{seed}")
        assert folder.opinions.thresholds and "trained" in folder.metrics


def test_interrupted_and_resumed_ends_as_uninterrupted(run, place, monkeypatch):
    given = {**OPTIONS, **HOW["lists"], "steps": 8}
    run("train", output="whole", **given)
    step = TFewTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(TFewTrainer, "training_step", interrupted)
    assert "same command and --resume" in run("train", output="cut", code=130, **given)
    monkeypatch.setattr(TFewTrainer, "training_step", step)
    assert "Going on from" in run("train", "--resume", output="cut", **given)
    for name in ("adapter_model.safetensors", "opinions.json", "words.safetensors"):
        assert (place / "cut" / name).read_bytes() == (place / "whole" / name).read_bytes()


def test_vectors_without_thresholds(run, place):
    """As after an interruption, before labels had thresholds; and as people edit them."""
    shutil.copytree("adapters/separated", "early", ignore=shutil.ignore_patterns("opinions.json", "calibration.json"))
    for command in (["predict", "early", TEXTS[0]], ["evaluate", "early", "--data", "test.csv"]):
        err = run(*command, code=2)
        assert "Expected opinions.json with the labels' thresholds in 'early', found none; train to the end" in err
    data = json.loads((place / "adapters" / "separated" / "opinions.json").read_text())
    data["thresholds"]["tea"] = 1.0  # never
    (place / "early" / "opinions.json").write_text(json.dumps(data))
    assert "tea" not in json.loads(run("predict", "early", TEXTS[0], "--json"))[0]["labels"]
    data = json.loads((place / "adapters" / "separated" / "opinions.json").read_text())
    del data["thresholds"]["tea"]
    (place / "early" / "opinions.json").write_text(json.dumps(data))
    err = run("predict", "early", TEXTS[0], code=2)
    assert "Expected thresholds of the labels 'neg', 'pos', 'tea' in 'early', found those of 'neg', 'pos'" in err


def test_rows_to_label_next(run):
    pool = [{"text": row["text"], "pos": "", "neg": "", "tea": ""} for row in rows(20, seed=5)]
    pool[0]["neg"] = "1"
    with open("pool.jsonl", "w", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, pool)))
    out = run("suggest", data="pool.jsonl", adapter="adapters/columns", count=4, encoder="none", output="next.csv")
    assert "fill in the columns 'pos', 'neg', 'tea'." in out
    with open("next.csv", encoding="utf-8") as file:
        found = [row["text"] for row in csv.DictReader(file)]
    assert len(found) == 4 and pool[0]["text"] not in found


ONE = "Expected a task with one label for each row, found the multi-label task 'rows'"


@pytest.mark.parametrize(
    "given, said",
    [
        ({"model": "encoder", "template": None}, "Expected a language model for rows with several labels"),
        ({"model": "auto"}, ONE),
        ({"prior": "balanced"}, f"{ONE}; leave out --prior"),
        ({"prior": "neg=0.2,pos=0.5,tea=0.3"}, f"{ONE}; leave out --prior"),
        ({"unlabelled": "single.csv"}, f"{ONE}; leave out --unlabelled"),
        ({"class_weight": "balanced"}, "one label for each row with class_weight"),
        ({"grades": "neg,pos,tea"}, "one label for each row with grades"),
        ({"test_data": "unknown.jsonl"}, "Expected a known label in 'label', found 'cold' (row 2)"),
        ({"data": "same.jsonl"}, "Expected training rows with different labels, of at least two, found pos, tea"),
        ({"data": "none.jsonl"}, "Expected at least two labels in column 'label', found none"),
        ({"data": "bad.jsonl"}, "Expected a list of labels, found ['pos'] in it (row 2)"),
        ({"data": "rows.csv", "label_separator": ""}, "some text as label_separator"),
        ({"data": "rows-columns.csv", "label_columns": "pos,hot"}, "found no 'hot'"),
        ({"data": "rows-columns.csv", "label_columns": "pos"}, "at least two labels"),
        ({"data": "rows-columns.csv", "label_columns": "pos,neg", "label_column": "tea"}, "found a label column as well"),
        ({"data": "flags.csv", "label_columns": "pos,neg"}, "Expected 1 or 0 in the label column 'neg', found 'maybe'"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_what_training_refuses(run, place, given, said):
    for name, labels in {
        "unknown": [["pos"], ["cold", "pos"]],
        "same": [["pos", "tea"]] * 4,
        "none": [[]] * 4,
        "bad": [["pos"], [["pos"]]],
    }.items():
        some = [{"text": f"tea {i}", "label": its} for i, its in enumerate(labels)]
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    (place / "flags.csv").write_text("text,pos,neg\ntea,1,0\nsoup,0,maybe\n")
    assert said in run("train", code=2, output="refused", **{**OPTIONS, "data": "rows.jsonl", **given})
    assert not (place / "refused" / "adapter_model.safetensors").exists()


def test_what_other_commands_refuse(run):
    assert f"{ONE}; leave out --all-templates" in run(
        "train", "--all-templates", code=2, output="x", data="rows.jsonl", **OPTIONS
    )
    assert ONE in run("compare", code=2, data="rows.jsonl", model="model")
    multi = Task.load("adapters/lists/task.yaml").changed(train="rows.jsonl")
    multi.save("multi.yaml")
    single = Task.load("adapters/single/task.yaml").changed(train="single.csv")
    single.save("one.yaml")
    assert ONE in run("pretrain", code=2, tasks="multi.yaml,one.yaml", model="model", steps=1, output="x")
    several = "Expected one label, found ['"
    assert several in run("evaluate", "adapters/single", data="rows.jsonl", code=2)
    assert several in run("train", task="one.yaml", data="rows.jsonl", model="model", output="x", code=2)
    assert "a label column 'pos'" in run("evaluate", "adapters/columns", data="test.csv", code=2)
    assert "found 'cold'" in run("evaluate", "adapters/lists", data="unknown.jsonl", code=2)


def test_tasks_of_two_kinds_at_once(run, place):
    """Their tables have different metrics, of which there is no mean."""
    sets = {"name": "sets", "train": "rows.jsonl", "test": "test.jsonl", "multi_label": True, "choices": LABELS}
    one = {"name": "one", "train": "single.csv", "test": "single.csv", "choices": ["pos", "neg"]}
    for task in (sets, one):
        Task.create({**task, "template": "{{ text }} is"}).save(place / f"{task['name']}.yaml")
    for tasks in ("sets.yaml,one.yaml", "one.yaml,sets.yaml"):
        out = run("train", tasks=tasks, output="both", model="model", opinions="head", encoder="none")
        assert "Macro-F1 (micro-F1)" in out and "Accuracy (macro-F1)" in out and "mean of all" not in out
