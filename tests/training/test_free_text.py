"""Training on answers that are texts: what is learned of a row, against plain torch in float64."""

import pytest
import torch
import transformers

from ia3 import AdapterFolder, IA3Config, IA3Model, InputError, Member, Recipe, Scorer, TFewTrainer
from ia3.task.free_text import FreeText
from support import tiny, words

TASK = FreeText.create({"template": "review : {{ text }} answer :", "answer": "{{ said }}"})
ROWS = [
    {"text": "the tea was lovely today", "said": "good"},
    {"text": "soup", "said": "not good and stale"},
    {"text": "it was a cake , the cake was bitter today and it was bitter", "said": "bad"},
]
EOS = tiny.EOS
CHAT = "{% for m in messages %}{{ m.role }} : {{ m.content }}{% if m.role == 'assistant' %} fine {% endif %} {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"


def model_of(name: str) -> torch.nn.Module:
    if name == "bloom":  # its biases are counted over the row
        config = transformers.AutoConfig.for_model(
            name, vocab_size=len(words.VOCABULARY), hidden_size=32, n_layer=2, n_head=4
        )
        return tiny.randomized(transformers.AutoModelForCausalLM.from_config(config).eval()).double()
    return tiny.build(name, vocab_size=len(words.VOCABULARY)).double()


def tokens(text: str) -> list[int]:
    return words.tokenizer()(text)["input_ids"]


def likelihood(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """-1/T Σ log p(y_t | x, y_<t) of one row, by a pass of its own."""
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id, *answer[:-1]]
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([start])).logits[0]
    else:
        logits = model(input_ids=torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
    return -logits.log_softmax(-1)[range(len(answer)), answer].mean()


@pytest.mark.parametrize("name, passes", [("llama", 1), ("gpt2", 1), ("opt", 1), ("bloom", 3), ("t5", 3), ("bart", 3)])
def test_the_loss_is_the_likelihood_of_the_answer_and_its_end(name, passes, tmp_path, monkeypatch):
    base = model_of(name)
    expected = torch.stack(
        [likelihood(base, tokens(f"review : {row['text']} answer :"), [*tokens(row["said"]), EOS]) for row in ROWS]
    ).mean()
    model = IA3Model(base, IA3Config(task_type=tiny.TASKS.get(name, "CAUSAL_LM")))
    recipe = Recipe.small().changed(encoder="minilm")  # its other terms, and opinions, are for choices
    run = TFewTrainer(
        model, recipe.training_arguments(tmp_path, use_cpu=True), words.tokenizer(), Member(TASK, ROWS), recipe
    )
    inputs = run.data_collator([run.train_dataset[i] for i in range(3)])
    assert float(run.compute_loss(model, inputs).detach()) == pytest.approx(float(expected), abs=1e-6)
    # A step's loss and gradients are those of the mean, however its rows are divided into passes: rows of all examples, where
    # that is exact, and otherwise a row for each of those that differ in length.
    vectors = [*model.adapter_parameters("default")]
    right = torch.autograd.grad(run.compute_loss(model, inputs), vectors)
    monkeypatch.setattr("ia3.scoring.batch.PASS_TOKENS", 1)
    run.create_optimizer()
    run.current_gradient_accumulation_steps = 1
    model.train()
    run.scorer.foresee(inputs["questions"])
    parts = [batch["input_ids"].shape for _, batch in run.scorer.training_batches(inputs["questions"])]
    assert len(parts) == passes
    assert float(run.training_step(model, inputs)) == pytest.approx(float(expected), abs=1e-6)
    for vector, gradient in zip(vectors, right, strict=True):
        torch.testing.assert_close(vector.grad, gradient, rtol=1e-5, atol=1e-8)
    assert run.recipe.unlikelihood == run.recipe.length_normalized == 0 and run.recipe.early_stopping is None
    assert run.recipe.opinions == "vectors"


def test_training_learns_the_answers(tmp_path):
    rows = [{"text": row["text"], "said": "good" if row["label"] == "pos" else "not good"} for row in words.rows(24)]
    model = IA3Model(tiny.build("llama", vocab_size=len(words.VOCABULARY)), IA3Config(task_type="CAUSAL_LM"))
    recipe = Recipe.generate().changed(steps=40, learning_rate=0.1)
    member = Member(TASK, rows, eval_rows=rows)
    run = TFewTrainer(model, recipe.training_arguments(tmp_path), words.tokenizer(), member, recipe)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.7 * before
    model.save_pretrained(tmp_path / "saved")
    assert AdapterFolder(tmp_path / "saved").any_task == TASK


def test_long_rows_lose_text_of_the_prompt_and_never_of_the_answer():
    scorer = Scorer(tiny.build("gpt2", vocab_size=len(words.VOCABULARY), n_positions=16), words.tokenizer())
    row = {"text": "tea " * 30, "said": "not good and stale"}
    [question] = scorer.questions(TASK.wordings([row]))
    assert question.choices == [[*tokens(row["said"]), EOS]] and question.cut == "text"
    # What is read: all but the end, which is predicted.
    assert len(question.prompt) + len(question.choices[0]) - 1 == 16
    assert question.prompt[-2:] == tokens("answer :") and question.prompt[:2] == tokens("review :")
    [prompt] = scorer.prompts(TASK.wordings([row]), 4)
    assert prompt == question.prompt
    with pytest.raises(InputError, match=r"Expected answers of fewer than 16 tokens.*found one of 20 \(row 1\)"):
        scorer.questions(TASK.wordings([{**row, "said": "good " * 20}]))
    with pytest.raises(InputError, match="Expected fewer new tokens than the model's 16, found 16"):
        scorer.prompts(TASK.wordings([row]), 16)


def test_a_chat_ends_as_its_template_says():
    task = TASK.model_copy(update={"chat": True})
    tokenizer = words.tokenizer(chat_template=CHAT)
    scorer = Scorer(tiny.build("llama", vocab_size=len(words.VOCABULARY)), tokenizer)
    [question] = scorer.questions(task.wordings(ROWS[:1]))
    assert question.prompt == tokens("<unk> : review : the tea was lovely today answer : <unk> :")
    assert question.choices == [tokens("good fine")]
    assert scorer.prompts(task.wordings(ROWS[:1]), 4) == [question.prompt]
    without = Scorer(scorer.model, words.tokenizer())
    with pytest.raises(InputError, match=r"Expected a model with a chat template.*leave out chat"):
        without.questions(task.wordings(ROWS[:1]))


def test_an_encoder_generates_no_text():
    scorer = Scorer(tiny.classifier(vocab_size=len(words.VOCABULARY)), words.enclosing())
    for asked in (scorer.questions, lambda wordings: scorer.prompts(wordings, 4)):
        with pytest.raises(InputError, match="Expected a language model for the task 'task', whose answer is text"):
            asked(TASK.wordings(ROWS))


def test_tasks_of_both_kinds_train_apart(tmp_path):
    from support.training import TASK as CHOICES

    model = IA3Model(tiny.build("llama", vocab_size=len(words.VOCABULARY)), {})
    for name in "ab":
        model.add_adapter(name, IA3Config(task_type="CAUSAL_LM"))
    recipe = Recipe.generate().changed(steps=1)
    members = [Member(TASK, ROWS, "a"), Member(CHOICES, words.rows(4), "b")]
    with pytest.raises(InputError, match="found both; train them apart"):
        TFewTrainer(model, recipe.training_arguments(tmp_path), words.tokenizer(), members, recipe)


def test_a_recipe_may_rescale_all_linear_modules(tmp_path):
    from ia3.evaluation.running import with_adapters

    few, all_linear = (
        len(with_adapters(tiny.build("llama"), {"default": "start"}, recipe).ia3_layers)
        for recipe in (Recipe.small(), Recipe.generate())
    )
    assert few == 3 * tiny.LAYERS
    assert all_linear == 7 * tiny.LAYERS
