"""Labels that are rare, dear, new or without examples, from training to the service."""

import json
import math
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ia3 import AdapterFolder, FewShotClassifier, IA3Model, Recipe, Task, load_base, read_rows
from ia3.evaluation.learner import Learner
from ia3.evaluation.start import Start
from support import tiny, words
from support.serving import Running

BILLS = ["bill", "fault", "billing", "technical"]
ANSWERS = {**words.CHOICES, "money": "fine"}
CHOICES = ",".join(f"{label}={text}" for label, text in ANSWERS.items())


def money(count, seed=0):
    """Rows of a third label: sentences as those of `words`, with words of their own."""
    chance = random.Random(seed)
    return [
        {"text": f"the {chance.choice(['tea', 'soup', 'cake'])} was {chance.choice(BILLS)} today {i}", "label": "money"}
        for i in range(count)
    ]


def knowing(folder):
    """A tiny model that has read what stands behind such sentences, as a pretrained model has."""
    model, tokenizer = tiny.build("llama", vocab_size=len(words.VOCABULARY)), words.tokenizer()
    rows = [row for some in zip(words.different(48), money(48), strict=True) for row in some]
    texts = [f"review : {row['text'].rsplit(' ', 1)[0]} answer : {ANSWERS[row['label']]}" for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(80):
        batch = tokenizer(texts[step * 16 % 96 :][:16], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :7] = -100
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unequal")
    knowing(folder / "model")
    tiny.classifier(vocab_size=len(words.VOCABULARY)).base_model.save_pretrained(folder / "encoder")
    words.enclosing().save_pretrained(folder / "encoder")
    rows = words.different(24, seed=3)
    words.write_csv(folder / "two.csv", rows)
    words.write_csv(folder / "three.csv", [*words.different(16, seed=5), *money(8, seed=5)])
    words.write_csv(folder / "test.csv", [*words.different(16, seed=9), *money(8, seed=9)])
    words.write_csv(folder / "rare.csv", [row for i, row in enumerate(rows) if row["label"] == "pos" or i < 8])
    return folder


@pytest.fixture
def run(place, monkeypatch, ia3):
    monkeypatch.chdir(place)

    def run(*arguments, code=0, **options):
        found, out, err = ia3(*arguments, **options)
        assert found == code, err
        return err if code else out

    return run


def train(run, output, **options):
    given = {"model": "model", "template": words.TEMPLATE, "steps": 6, "encoder": "none", "output": output}
    return run("train", **{**given, **options})


def recalls(run, folder):
    measured = json.loads(run("evaluate", folder, "--json", data="test.csv"))
    return {name: its["recall"] for name, its in measured["labels"].items()}


def test_a_label_without_examples_is_answered_beside_the_others(run, place):
    train(run, "adapters/zero", data="two.csv", choices=CHOICES, test_data="test.csv")
    folder = AdapterFolder("adapters/zero")
    assert set(folder.opinions.heads["head"].labels) == {"pos", "neg"} and folder.opinions.vectors
    assert set(folder.opinions.balance[0]) == set(ANSWERS)
    assert set(folder.metrics["cross_validation"]) == {"accuracy", "macro_f1"}
    found = recalls(run, "adapters/zero")
    assert found["pos"] == found["neg"] == 1 and found["money"] > 0.7
    text = "the soup was technical today"
    [said] = json.loads(run("predict", "adapters/zero", text, "--json"))
    assert said["label"] == "money"
    classifier = FewShotClassifier.load("adapters/zero")
    assert classifier.predict([text]) == ["money"]
    server = Running(place)
    try:
        [served] = server.classify("zero", [text]).json()["predictions"]
    finally:
        server.close()
    assert served["label"] == "money" and served["probabilities"] == pytest.approx(said["probabilities"], abs=1e-4)


def test_heads_alone_cannot_know_it_and_say_so(run):
    out = train(run, "alone", data="two.csv", choices=CHOICES, opinions="head", steps=None, grades="neg,money,pos")
    assert "Heads do not know 'money', which no training row has: it is never predicted." in " ".join(out.split())
    assert recalls(run, "alone")["money"] == 0


def test_a_label_is_added_to_an_adapter(run):
    train(run, "old", data="two.csv", template=None)
    out = train(run, "new", data="three.csv", init="old", template=None)
    assert "The wording is that of old, which its vectors know" in out
    old, new = Task.load("old/task.yaml"), Task.load("new/task.yaml")
    assert [one.prompt for one in new.templates] == [one.prompt for one in old.templates]
    for number in range(len(old.templates)):
        assert new.choices_of(number) == {**old.choices_of(number), "money": "money"}
    assert set(AdapterFolder("new").opinions.heads["head"].labels) == {"pos", "neg", "money"}
    found = recalls(run, "new")
    assert found["pos"] == found["neg"] == found["money"] == 1
    # With fewer labels, or other columns, it is another task.
    assert Start("new").worded(Task.infer(words.rows(8))) is None
    renamed = [{"body": row["text"], "label": row["label"]} for row in words.rows(8)]
    assert (
        Start("old").worded(Task.infer(words.rows(8))) is not None and Start("old").worded(Task.infer(renamed)) is None
    )
    given = Start("old").worded(Task.infer(words.rows(8), choices={"pos": "great", "neg": "neg"}))
    assert given is not None and given.choices == {"pos": "great", "neg": "neg"}


def test_vectors_start_from_the_adapters(run, place):
    Recipe.small().changed(steps=1, learning_rate=1e-12, opinions="vectors").save("still.yaml")
    train(run, "old-vectors", data="two.csv", opinions="vectors")
    train(run, "new-vectors", data="three.csv", init="old-vectors", recipe="still.yaml", steps=None)
    old, new = (load_file(place / name / "adapter_model.safetensors") for name in ("old-vectors", "new-vectors"))
    assert any((value - 1).abs().max() > 1e-3 for value in old.values())
    for name, value in old.items():
        torch.testing.assert_close(new[name], value)


def test_rows_that_the_adapter_has_learned_are_no_test_rows_and_not_held_out(run, monkeypatch):
    train(run, "learned", data="two.csv", examples_per_label=12, opinions="head", steps=None)
    out = train(run, "again", data="two.csv", init="learned", examples_per_label=6, opinions="head", steps=None)
    assert "12 test rows are left out: learned was trained on them." in " ".join(out.split())
    assert AdapterFolder("again").metrics["test_rows"] == 0
    started: list[str] = []
    monkeypatch.setattr("ia3.evaluation.start.Start.load", lambda self, model, name: started.append(name))

    base, tokenizer = load_base("model")
    task, recipe = Task.load("learned/task.yaml"), Recipe.small().changed(steps=1, init="learned")
    learner = Learner(IA3Model(base, {}), tokenizer, task, read_rows("two.csv"), recipe, output_dir="out")
    with learner.trained_on_others(2) as names:
        assert set(names) == {"fold0", "fold1"} and not started


def test_an_encoders_head_keeps_the_rows_of_its_labels(run, place):
    options = {"model": "encoder", "template": None, "encoder": None}
    train(run, "sentences", data="two.csv", **options)
    train(run, "more-sentences", data="three.csv", init="sentences", **options)
    assert recalls(run, "more-sentences").keys() == {"pos", "neg", "money"}

    base, _ = load_base("encoder", ["pos", "neg", "money"])
    model = IA3Model(base, {})
    Start("sentences").load(model, "default")
    name = "base_model.model.classifier.weight"
    before = load_file(place / "sentences" / "adapter_model.safetensors")[name]
    head = base.classifier.modules_to_save["default"].weight
    torch.testing.assert_close(head.detach(), torch.stack([torch.zeros_like(before[0]), before[0], before[1]]))


def test_rare_labels_count_as_much(run, place):
    options = {"data": "rare.csv", "examples_per_label": 0, "test_rows": 1}
    train(run, "plain", **options)
    train(run, "weighed", class_weight="balanced", **options)
    assert Task.load("weighed/task.yaml").class_weight == "balanced"
    plain, weighed = (AdapterFolder(name).opinions for name in ("plain", "weighed"))
    assert plain.prior == pytest.approx({"pos": 13 / 18, "neg": 5 / 18})
    assert weighed.prior == pytest.approx({"pos": 0.5, "neg": 0.5}) and weighed.seen == pytest.approx(weighed.prior)
    for file in ("adapter_model.safetensors", "head.safetensors"):
        before, after = (load_file(place / name / file) for name in ("plain", "weighed"))
        assert any(not torch.allclose(before[name], after[name], rtol=1e-3) for name in before)
    texts = ["the tea was today", "soup today"]  # nothing tells
    rare = [json.loads(run("predict", name, *texts, "--json")) for name in ("plain", "weighed")]
    for before, after in zip(*rare, strict=True):
        assert after["probabilities"]["neg"] > before["probabilities"]["neg"]
    err = train(run, "no", class_weight="pos=-1", data="rare.csv", code=2)
    assert "expected a number above 0 for 'pos', found '-1'" in err and len(err.strip().splitlines()) == 1
    err = train(run, "no", class_weight="pos=1,pos=2", data="rare.csv", code=2)
    assert "one weight for each label" in err and "--class-weight" in err


def test_costs_decide_everywhere(run, place):
    dear = Task(name="dear", template=words.TEMPLATE, choices=words.CHOICES, costs={"neg": {"pos": 1e9}})
    dear.save("dear.yaml")
    out = train(run, "adapters/dear", task="dear.yaml", template=None, data="two.csv", examples_per_label=6)
    assert "mean cost" in out
    metrics = AdapterFolder("adapters/dear").metrics
    assert metrics["trained"] == metrics["opinions"]["head"] and metrics["trained"]["mean_cost"] == 0.5
    assert metrics["cross_validation"]["mean_cost"] == 0.5
    text = "the tea was lovely"
    [said] = json.loads(run("predict", "adapters/dear", text, "--json"))
    assert said["label"] == "neg" and said["probabilities"]["pos"] > 0.5
    [nothing] = json.loads(run("predict", "adapters/dear", text, "--json", abstain_below=0.5))
    assert nothing["label"] is None
    assert json.loads(run("evaluate", "adapters/dear", "--json", data="two.csv"))["mean_cost"] == 0.5
    assert "Mean cost 0.50" in run("evaluate", "adapters/dear", data="two.csv")
    assert FewShotClassifier.load("adapters/dear").predict([text]) == ["neg"]
    server = Running(place)
    try:
        assert server.classify("dear", [text]).json()["predictions"][0]["label"] == "neg"
    finally:
        server.close()


def test_costs_are_those_of_calibrated_probabilities(run):
    """Vectors that answer alone are calibrated after they were measured."""
    options = {
        "template": None,
        "opinions": "vectors",
        "examples_per_label": 6,
        "test_data": "two.csv",
        "data": "two.csv",
    }
    Task(name="dear", template=words.TEMPLATE, choices=words.CHOICES, costs={"neg": {"pos": 1000}}).save("dear.yaml")
    train(run, "calibrated", task="dear.yaml", folds=2, **options)
    train(run, "uncalibrated", task="dear.yaml", **options)
    folder = AdapterFolder("calibrated")
    measured = json.loads(run("evaluate", "calibrated", "--json", data="two.csv"))
    assert folder.metrics["trained"]["mean_cost"] == pytest.approx(measured["mean_cost"])
    assert folder.temperature != 1
    assert AdapterFolder("uncalibrated").metrics["trained"]["mean_cost"] != pytest.approx(measured["mean_cost"])


def test_a_classifier_takes_weights_as_scikit_learn_names_them(place):
    rows = [*words.different(16, seed=3), *words.different(6, seed=4)[::2]]
    texts, labels = [row["text"] for row in rows], np.array([row["label"] == "pos" for row in rows])
    made = {"template": words.TEMPLATE, "choices": {True: "good", False: "not good"}, "model": str(place / "model")}
    recipe = Recipe.small().changed(steps=4, encoder="none")
    for weight in ("balanced", {False: 11 / 8}):
        its = FewShotClassifier(**made, recipe=recipe, class_weight=weight).fit(texts, labels)
        assert its.opinions_.seen == pytest.approx({"false": 0.5, "true": 0.5}, abs=1e-6)
    assert its.task_.class_weight == {"false": 11 / 8} and its.get_params()["class_weight"] == {False: 11 / 8}
    assert math.isclose(its.predict_proba(texts).sum(), len(texts), rel_tol=1e-6)
