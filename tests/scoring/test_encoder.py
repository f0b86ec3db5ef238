"""Encoders with a classification head: labels are the choices, and training is cross-entropy of head and vectors."""

import pytest
import torch
from torch.nn import functional as F

from ia3 import (
    IA3Config,
    IA3Model,
    InputError,
    Member,
    Recipe,
    Scorer,
    Task,
    TFewTrainer,
    load_base,
    predict,
    score_choices,
    tfew_loss,
)
from support import tiny, words


def training_arguments(folder, steps: int, **options):
    return Recipe(steps=steps).training_arguments(folder, **options)


TASK = Task(template="{{ text }}", choices={"pos": "good", "neg": "not good"})
TOKENIZER = words.enclosing()
TEXTS = ["the tea was lovely", "soup", "the cake was stale and it was bitter today"]


def build(name="bert", labels=2) -> torch.nn.Module:
    return tiny.classifier(name, vocab_size=len(words.VOCABULARY), num_labels=labels)


def adapted(names=("default",), labels=2) -> IA3Model:
    return IA3Model(build(labels=labels), {name: IA3Config(task_type="SEQ_CLS") for name in names})


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "bart"])
def test_scores_are_log_probabilities_of_each_text_alone(name):
    model = build(name, labels=3)
    found = score_choices(model, TOKENIZER, TEXTS, [["good", "bad", "fine"]] * 3, batch_tokens=30)
    for text, row in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            expected = model(**TOKENIZER(text, return_tensors="pt", return_token_type_ids=False)).logits[0]
        torch.testing.assert_close(row, expected.log_softmax(-1), atol=2e-5, rtol=1e-5)


def test_the_likelihood_term_is_cross_entropy_of_vectors_and_head():
    model = adapted(labels=3)
    tiny.randomize(model)
    scorer = Scorer(model, TOKENIZER)
    batch = scorer.collate(scorer.encode(TEXTS, [["good", "bad", "fine"]] * 3, [2, 0, 1]))
    assert batch["mask"].shape == (3, 3, 1)
    tfew_loss(scorer.log_probs(batch), batch["mask"], batch["label"], 0.0, 0.0).total.backward()
    parameters = tiny.adapter_parameters(model)
    found = {key: parameter.grad for key, parameter in parameters.items()}
    model.zero_grad()
    inputs = TOKENIZER(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    F.cross_entropy(model(**inputs).logits, torch.tensor([2, 0, 1])).backward()
    assert any("classifier" in key for key in found) and any("ia3_l" in key for key in found)
    for key, parameter in parameters.items():
        torch.testing.assert_close(found[key], parameter.grad, atol=1e-6, rtol=1e-4)


def test_the_trainer_learns_by_cross_entropy_and_saves_the_head(tmp_path):
    model, rows = adapted(), words.rows(32)
    arguments = training_arguments(tmp_path, 30, learning_rate=0.05, save_strategy="no", disable_tqdm=True)
    trainer = TFewTrainer(model, arguments, TOKENIZER, Member(TASK, rows, eval_rows=rows))
    before = trainer.evaluate()
    inputs = TOKENIZER([row["text"] for row in rows], padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        expected = F.cross_entropy(model(**inputs).logits, torch.tensor([1, 0] * 16))  # neg, pos: by the alphabet
    assert before["eval_loss"] == pytest.approx(float(expected), rel=1e-4)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"] and after["eval_accuracy"] > 0.9
    model.save_pretrained(tmp_path / "adapter")
    again = IA3Model.from_pretrained(build(), tmp_path / "adapter")
    found = predict(model, TOKENIZER, TASK, rows)
    for one, two in zip(found, predict(again, TOKENIZER, TASK, rows), strict=True):
        assert one.label == two.label and one.probabilities == pytest.approx(two.probabilities, abs=1e-6)
    assert TASK.metrics([row["label"] for row in rows], [item.label for item in found])["accuracy"] > 0.9


def test_rows_of_one_batch_have_their_adapters_head(tmp_path):
    model = adapted(("one", "two"))
    for seed, name in enumerate(model.peft_config):
        tiny.randomize(model, seed, name)
    names = ["two", "__base__", "one"]
    found = score_choices(model, TOKENIZER, TEXTS, [["good", "bad"]] * 3, adapter_names=names)
    for text, name, row in zip(TEXTS, names, found, strict=True):
        model.ia3_routing.switch(active=() if name == "__base__" else (name,))
        torch.testing.assert_close(row, score_choices(model, TOKENIZER, [text], [["good", "bad"]])[0])


def test_each_member_of_a_fleet_ends_where_it_would_have_ended_alone(tmp_path):
    options = {"learning_rate": 0.05, "save_strategy": "no", "disable_tqdm": True}
    members = [Member(TASK, words.rows(8 + seed, seed), name, seed) for seed, name in enumerate("ab")]
    together = adapted("ab").double()
    TFewTrainer(together, training_arguments(tmp_path, 4, **options), TOKENIZER, members).train()
    for member in members:
        lone = adapted([member.name]).double()
        arguments = training_arguments(tmp_path, 4, seed=member.seed, **options)
        TFewTrainer(lone, arguments, TOKENIZER, Member(TASK, member.rows)).train()
        pairs = zip(together.adapter_parameters(member.name), lone.adapter_parameters(member.name), strict=True)
        assert max((a - b).abs().max().item() for a, b in pairs) < 1e-7


def test_long_prompts_keep_what_opens_and_closes_them():
    long = " ".join(["tea"] * 100 + ["was"])
    made = Scorer(build(), TOKENIZER).encode([long], [["good", "bad"]])[0]
    assert (
        len(made.prompt) == 64
        and made.prompt[0] == TOKENIZER.cls_token_id
        and made.prompt[-2:] == [TOKENIZER("was")["input_ids"][1], 1]
    )
    roberta = build("roberta")
    assert Scorer(roberta, TOKENIZER).max_length == 63  # its positions begin at 1, behind the padding's
    score_choices(roberta, TOKENIZER, [long], [["good", "bad"]])


@pytest.mark.parametrize(
    "choices, message",
    [
        ([["good", "bad", "fine"]] * 2, "Expected 2 answer choices, the labels of this BertForSequenceClassification"),
        (
            [["good", "bad"], ["bad", "good"]],
            r"the same answer choices for all prompts, .* \(row 2\); take a generative",
        ),
    ],
)
def test_choices_are_the_labels(choices, message):
    with pytest.raises(InputError, match=message):
        score_choices(build(), TOKENIZER, TEXTS[:2], choices)


def test_a_member_of_a_fleet_whose_labels_do_not_fit_is_named(tmp_path):
    three = Task(template="{{ text }}", choices=["pos", "neg", "none"])
    members = [Member(TASK, words.rows(8), "a"), Member(three, words.rows(8), "b")]
    with pytest.raises(InputError, match="Member 'b': Expected 2 answer choices"):
        TFewTrainer(adapted("ab"), training_arguments(tmp_path, 2), TOKENIZER, members)


def test_answers_need_not_differ_to_its_tokenizer():
    """Labels are what it tells apart; their texts are not read."""
    task = Task(template="{{ text }}", choices={"US": "unknown", "us": "words"})
    found = predict(adapted(), TOKENIZER, task, [{"text": text} for text in TEXTS])
    assert all(set(item.probabilities) == {"US", "us"} for item in found)
    questions = Scorer(adapted(), TOKENIZER).questions(task.wordings([{"text": "tea", "label": "us"}]))
    assert questions[0].choices == [[0], [1]] and questions[0].label == 1


def test_the_order_of_labels_changes_nothing(tmp_path):
    folder = tmp_path / "encoder"
    tiny.classifier(vocab_size=len(words.VOCABULARY)).base_model.save_pretrained(folder)
    words.enclosing().save_pretrained(folder)
    choices = {"pos": "good", "neg": "not good", "none": "a tea"}
    found = []
    for listed in (choices, dict(reversed(choices.items()))):
        task = Task(template="review : {{ text }} answer :", choices=listed)
        base, tokenizer = load_base(str(folder), task.labels, kind="SEQ_CLS")
        model = IA3Model(base, IA3Config(task_type="SEQ_CLS"))
        rows = [row if i % 5 else {**row, "label": "none"} for i, row in enumerate(words.rows(20))]
        recipe = Recipe(steps=3)
        arguments = recipe.training_arguments(tmp_path, save_strategy="no", disable_tqdm=True)
        TFewTrainer(model, arguments, tokenizer, Member(task, rows), recipe).train()
        found.append(predict(model, tokenizer, task, rows))
        # What the head calls a label is what the task calls it.
        logits = model(**tokenizer([task.prompt(rows[0])], return_tensors="pt")).logits[0].softmax(-1)
        named = {base.config.id2label[i]: float(value) for i, value in enumerate(logits)}
        assert found[-1][0].probabilities == pytest.approx(named, abs=1e-5)
    assert [item.label for item in found[0]] == [item.label for item in found[1]]
    assert [item.probabilities for item in found[0]] == [item.probabilities for item in found[1]]
