"""Training sentence encoders: contrastive vectors, and a logistic regression as the head."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ia3 import IA3Config, IA3Model, InputError, Member, Recipe, Scorer, Task, TFewTrainer, load_base, predict
from ia3.training.examples import training_examples
from ia3.training.losses import contrastive_loss
from support import tiny, words

TASK = Task(template="{{ text }} question : good or bad ?", choices={"pos": "good", "neg": "not good"})
QUICK = Recipe.sentence().changed(steps=10, learning_rate=0.05)


@pytest.fixture
def folder(tmp_path):
    tiny.classifier(vocab_size=len(words.VOCABULARY)).base_model.save_pretrained(tmp_path / "model")
    words.enclosing().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def build(folder, names=("default",), task=TASK):
    base, tokenizer = load_base(str(folder), task.labels)
    return IA3Model(base, {name: IA3Config(task_type="FEATURE_EXTRACTION") for name in names}), tokenizer


def train(model, tokenizer, members, folder, recipe=QUICK, **options):
    options = {"save_strategy": "no", "disable_tqdm": True, "report_to": "none", **options}
    trainer = TFewTrainer(model, recipe.training_arguments(folder, **options), tokenizer, members, recipe)
    trainer.silence()
    trainer.train()
    return trainer


def test_texts_are_read_without_the_question_and_answers_are_texts_of_their_label(folder):
    model, tokenizer = build(folder)
    found = training_examples(Scorer(model, tokenizer), TASK, words.rows(4), QUICK, 0)
    texts = [tokenizer.decode(example.questions[0].prompt, skip_special_tokens=True) for example in found]
    assert texts == [row["text"] for row in words.rows(4)] + ["not good", "good"]
    labels = [example.questions[0].choices[example.questions[0].label] for example in found]
    assert labels == [[1], [0], [1], [0], [0], [1]]  # by the alphabet: neg, pos
    first = Task(template="good or bad ? {{ text }}", choices=TASK.choices)
    question = Scorer(model, tokenizer).question(first.wording({"text": "tea"}), labelled=False)
    assert tokenizer.decode(question.prompt, skip_special_tokens=True) == "good or bad ? tea"


def test_the_loss_falls_and_the_head_is_a_regression_on_the_embeddings(folder, tmp_path):
    model, tokenizer = build(folder)
    rows = words.rows(24)
    scorer = Scorer(model, tokenizer)
    questions = [example.questions[0] for example in training_examples(scorer, TASK, rows, QUICK, 0)]
    labels = torch.tensor([question.choices[question.label][0] for question in questions])
    before = contrastive_loss(scorer.embeddings(questions), labels)
    trainer = train(model, tokenizer, Member(TASK, rows, eval_rows=words.rows(20, seed=5)), tmp_path)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(before), rel=1e-4)
    embeddings = scorer.embeddings(questions)
    assert contrastive_loss(embeddings, labels) < 0.9 * before
    found = torch.stack(scorer.score(questions)).softmax(-1)[:, [1, 0]]  # the task lists pos first
    fits = [
        LogisticRegression(C=strength, max_iter=300).fit(embeddings, labels).predict_proba(embeddings)
        for strength in (1.0, 10.0, 100.0, 1000.0)
    ]
    assert min(np.abs(found.numpy() - expected).max() for expected in fits) < 1e-4
    assert trainer.evaluate()["eval_accuracy"] > 0.7


def test_members_end_where_they_would_have_ended_alone_with_their_own_heads(folder, tmp_path):
    members = [Member(TASK, words.rows(8 + 2 * seed, seed), name, seed) for seed, name in enumerate("ab")]
    together, tokenizer = build(folder, "ab")
    train(together.double(), tokenizer, members, tmp_path)
    for member in members:
        alone, tokenizer = build(folder, [member.name])
        train(alone.double(), tokenizer, Member(TASK, member.rows), tmp_path, seed=member.seed)
        pairs = zip(together.adapter_parameters(member.name), alone.adapter_parameters(member.name), strict=True)
        assert max((a - b).abs().max().item() for a, b in pairs) < 1e-5


def test_a_saved_adapter_answers_as_before(folder, tmp_path):
    model, tokenizer = build(folder)
    train(model, tokenizer, Member(TASK, words.rows(12)), tmp_path)
    expected = predict(model, tokenizer, TASK, words.rows(6, seed=3))
    model.save_pretrained(tmp_path / "adapter")
    again = IA3Model.from_pretrained(load_base(str(folder), TASK.labels)[0], tmp_path / "adapter")
    for one, two in zip(predict(again, tokenizer, TASK, words.rows(6, seed=3)), expected, strict=True):
        assert one.probabilities == pytest.approx(two.probabilities, abs=1e-6)


def test_evaluation_during_training_has_a_head_for_the_vectors_of_its_step(folder, tmp_path):
    model, tokenizer = build(folder)
    rows = words.rows(16)
    options = {"eval_strategy": "steps", "eval_steps": 2}
    trainer = train(model, tokenizer, Member(TASK, rows, eval_rows=rows), tmp_path, **options)
    found = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(found) == 5 and min(found) > 0.9


def test_one_row_a_label_is_enough(folder, tmp_path):
    model, tokenizer = build(folder)
    rows = [{"text": "tea was lovely", "label": "pos"}, {"text": "tea was awful", "label": "neg"}]
    train(model, tokenizer, Member(TASK, rows), tmp_path)
    first, second = predict(model, tokenizer, TASK, rows)
    assert first.probabilities["pos"] > second.probabilities["pos"]


def test_early_stopping_is_refused(folder, tmp_path):
    model, tokenizer = build(folder)
    with pytest.raises(InputError, match="Expected a recipe without early_stopping for a sentence encoder"):
        train(model, tokenizer, Member(TASK, words.rows(8)), tmp_path, recipe=Recipe.small())


def test_two_columns_are_joined_as_the_template_says(folder):
    model, tokenizer = build(folder)
    task = Task.infer(
        [{"a": "tea", "b": "soup", "label": "pos"}, {"a": "x", "b": "y", "label": "neg"}], text_column=["a", "b"]
    )
    question = Scorer(model, tokenizer).question(task.wording({"a": "tea", "b": "soup"}), labelled=False)
    expected = tokenizer(task.prompt({"a": "tea", "b": "soup"}).split("\n\nQuestion")[0])["input_ids"]
    assert question.prompt == expected


def test_the_recipe_of_a_sentence_encoder_is_its_own(folder):
    assert Recipe.for_model(str(folder)) == Recipe.sentence() == Recipe.load("sentence")
