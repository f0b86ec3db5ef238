"""Mixtures are drawn as their formula says; the loss is the likelihood; resuming ends at the same bytes."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ia3 import IA3Config, IA3Model, InputError, Recipe, Scorer, Task
from ia3.trainer import last_checkpoint
from ia3.training.examples import collate_examples
from ia3.training.pretrain import CAP, PRETRAINING, Mixture, MixtureTrainer
from support import tiny, words

TOKENIZER = words.tokenizer()
TEAS = Task(
    name="teas", templates=["review : {{ text }} answer :", "{{ text }} is"], choices={"pos": "good", "neg": "not good"}
)
SOUPS = Task(name="soups", template="{{ text }} ?", choices={"pos": "fine", "neg": "bad"})


def mixture(sizes, draws=1000, cap=CAP, seed=0, recipe=PRETRAINING):
    tasks = [
        (Task(name=name, templates=TEAS.templates, choices=TEAS.choices), words.rows(size))
        for name, size in sizes.items()
    ]
    return Mixture(tasks, Scorer(tiny.build("llama"), TOKENIZER), recipe, draws, cap, seed)


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), cap=st.integers(1, 50), seed=st.integers(0, 99))
def test_tasks_are_drawn_in_proportion_to_their_capped_sizes(sizes, cap, seed):
    named = {f"t{i}": size for i, size in enumerate(sizes)}
    found = mixture(named, 4000, cap, seed)
    total = sum(min(size, cap) for size in sizes)
    expected = {name: min(size, cap) / total for name, size in named.items()}
    assert found.shares == pytest.approx(expected, abs=1e-15)
    assert sum(found.drawn.values()) == len(found) == 4000
    for name, share in expected.items():
        assert abs(found.drawn[name] - 4000 * share) <= 5 * math.sqrt(4000 * share * (1 - share)) + 1e-9


def test_each_row_is_drawn_equally_often_in_orders_that_differ():
    found = mixture({"a": 7, "b": 20}, 2000)
    draws = [found.draw(i) for i in range(len(found))]
    for which, size in ((0, 7), (1, 20)):
        rows = [row for task, row, _ in draws if task == which]
        epochs = [tuple(rows[i : i + size]) for i in range(0, len(rows) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs) and len(set(epochs)) > 0.9 * len(epochs)
    templates = np.bincount([template for *_, template in draws])
    assert len(templates) == 2 and abs(templates[0] - 1000) < 5 * math.sqrt(500)
    assert {
        template for *_, template in map(mixture({"a": 7}, 50, recipe=Recipe(templates="first")).draw, range(50))
    } == {0}


def test_rows_have_the_class_weights_of_their_task():
    rows = [row for number, row in enumerate(words.rows(20)) if row["label"] == "pos" or number < 10]
    tasks = [(TEAS.changed(class_weight="balanced"), rows), (SOUPS, rows)]
    found = Mixture(tasks, Scorer(tiny.build("llama"), TOKENIZER), PRETRAINING, 40, CAP, 0)
    weights = {}
    for index in range(40):
        which, row, _ = found.draw(index)
        weights.setdefault((found.tasks[which][0].name, rows[row]["label"]), set()).add(found[index].weight)
    assert weights == {
        ("teas", "pos"): {0.75}, ("teas", "neg"): {1.5}, ("soups", "pos"): {1.0}, ("soups", "neg"): {1.0}
    }  # fmt: skip


def test_a_seed_decides_the_draws_and_the_order_of_tasks_does_not():
    def draws(seed, names="ab"):
        found = mixture({name: {"a": 7, "b": 20}[name] for name in names}, 60, seed=seed)
        return [(found.tasks[task][0].name, row, template) for task, row, template in map(found.draw, range(60))]

    assert draws(0) == draws(0) == draws(0, "ba") != draws(1)


def test_an_example_is_the_row_with_its_right_answer_alone():
    found = Mixture(
        [(TEAS, words.rows(6)), (SOUPS, words.rows(9))], Scorer(tiny.build("llama"), TOKENIZER), PRETRAINING, 40
    )
    for i in range(40):
        which, row, template = found.draw(i)
        task, rows = found.tasks[which]
        [question] = found[i].questions
        assert TOKENIZER.decode(question.prompt) == task.prompt(rows[row], template=template)
        assert question.label == 0 and [TOKENIZER.decode(choice) for choice in question.choices] == [
            task.answers(rows[row])[rows[row]["label"]]
        ]


def test_rows_become_tokens_when_drawn(monkeypatch):
    asked, real = [], Scorer.question
    monkeypatch.setattr(Scorer, "question", lambda self, w, **k: asked.append(w.task.name) or real(self, w, **k))
    found = mixture({"a": 30, "b": 500}, 100)
    assert asked == ["a", "a", "b", "b"]  # a row in each template: answers are checked at once
    assert found[3].questions is not found[3].questions and found[3] == found[3]
    assert len(asked) <= 5


def trainer(folder, steps=8, seed=0, model=None, tasks=None, **args):
    torch.manual_seed(0)
    model = model or IA3Model(tiny.build("llama"), IA3Config(task_type="CAUSAL_LM"))
    options = {"seed": seed, "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 4, **args}
    arguments = PRETRAINING.changed(steps=steps).training_arguments(folder, **options)
    tasks = tasks or [(TEAS, words.rows(20)), (SOUPS, words.rows(8, seed=1))]
    return MixtureTrainer(model, arguments, TOKENIZER, tasks)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_loss_is_the_likelihood(tmp_path, name):
    """L_LM = -(1/T) Σ log p of the right answer, in float64, against the model's own logits."""
    tokenizer = words.tokenizer() if name == "llama" else words.closing()
    base = tiny.build(name, vocab_size=len(words.VOCABULARY)).double()
    model = IA3Model(base, IA3Config(task_type=tiny.TASKS[name])).double()
    tiny.randomize(model)
    arguments = Recipe(steps=3).training_arguments(tmp_path, save_strategy="no", disable_tqdm=True)
    tasks = [(TEAS, words.rows(20)), (SOUPS, words.rows(8, seed=1))]
    run = MixtureTrainer(model, arguments, tokenizer, tasks, Recipe())  # the paper's three weights make no difference
    examples = [run.mixture[i] for i in range(8)]
    found = run.compute_loss(model, collate_examples(examples)).item()
    losses = []
    for example in examples:
        prompt, [answer] = example.questions[0].prompt, example.questions[0].choices
        if name == "llama":
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        else:
            logits = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).logits[0]
        log_probs = logits.log_softmax(-1)[torch.arange(len(answer)), answer]
        losses.append(-log_probs.mean().item())
    assert len({len(example.questions[0].choices[0]) for example in examples}) > 1
    assert found == pytest.approx(np.mean(losses), rel=1e-7)  # log-probabilities are float32


def test_it_learns(tmp_path):
    run = trainer(tmp_path, steps=60, learning_rate=0.05)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 60 and sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_what_is_trained_on_is_what_is_drawn(tmp_path, monkeypatch):
    seen, real = [], MixtureTrainer.training_step
    monkeypatch.setattr(
        MixtureTrainer,
        "training_step",
        lambda s, m, inputs, *a: seen.extend(inputs["questions"]) or real(s, m, inputs, *a),
    )
    run = trainer(tmp_path, steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    run.train()
    assert len(run.mixture) == 30 and seen == [run.mixture[i].questions[0] for i in range(30)]


def test_accumulated_batches_are_the_larger_batch(tmp_path):
    whole = trainer(tmp_path, steps=4, per_device_train_batch_size=8)
    parts = trainer(tmp_path, steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    whole.train()
    parts.train()
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_resumed_it_ends_at_the_same_bytes(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    for path in (tmp_path / "whole").glob("checkpoint-[68]"):
        path.rename(tmp_path / path.name)
    found = last_checkpoint(tmp_path / "whole")
    assert found is not None and found.endswith("checkpoint-3")
    resumed = trainer(tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=found)
    assert tiny.same_bits(tiny.state(resumed.model), tiny.state(whole.model))
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, resumed)]
    assert losses[0] == losses[1]


def test_another_seed_ends_elsewhere(tmp_path):
    ends = []
    for seed in (0, 0, 1):
        run = trainer(tmp_path, seed=seed)
        run.train()
        ends.append(tiny.state(run.model))
    assert tiny.same_bits(ends[0], ends[1]) and not tiny.same_bits(ends[0], ends[2])


def test_a_mixture_is_drawn_for_one_of_several_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    run = trainer(tmp_path)
    assert len(run.mixture) == 8 * 4 and run.args.n_gpu == 1


def test_recipe():
    changed = Recipe.small().changed(likelihood=0.0, init="somewhere").likelihood_only
    assert (changed.likelihood, changed.unlikelihood, changed.length_normalized) == (1, 0, 0)
    assert changed.early_stopping is None and changed.init == "somewhere"
    assert (PRETRAINING.steps, PRETRAINING.batch_size, PRETRAINING.learning_rate) == (100_000, 16, 3e-3)


def test_long_prompts_are_cut_and_counted(tmp_path, caplog):
    rows = [{"text": " ".join(["tea"] * n), "label": label} for n, label in itertools.product((5, 90), ("pos", "neg"))]
    model = IA3Model(tiny.build("gpt2"), IA3Config(task_type="CAUSAL_LM"))  # 64 positions
    run = trainer(tmp_path, steps=10, model=model, tasks=[(SOUPS, rows)])
    run.train()
    assert run.mixture.cut == 2
    assert [record.getMessage() for record in caplog.records if record.name.startswith("ia3")] == [
        "2 prompts were longer than the model's context, and cut."
    ]
    refusing = PRETRAINING.changed(long_prompts="refuse")
    mixed = Mixture([(SOUPS, rows)], Scorer(model, TOKENIZER), refusing, 20)
    with pytest.raises(
        InputError, match=r"Task 'soups': Expected prompts of at most \d+ tokens, found 91 \(row [34]\)"
    ):
        [mixed[i] for i in range(20)]


@pytest.mark.parametrize(
    "tasks, message",
    [
        ([], "at least, found none"),
        ([(TEAS, words.rows(4)), (SOUPS, words.rows(4)), (TEAS, words.rows(4))], "found 'teas' twice"),
        ([(TEAS, [])], "Task 'teas': Expected labelled rows, found none"),
        ([(TEAS, [*words.rows(4), {"text": "tea", "label": "so-so"}])], r"Task 'teas': .*found 'so-so' \(row 5\)"),
        ([(SOUPS, [*words.rows(4), {"text": " ", "label": "pos"}])], r"Task 'soups': .*empty \(row 5\)"),
        ([(TEAS, words.rows(4)), (SOUPS, [{"label": "pos"}])], "Task 'soups': .*names 'text'"),
        (
            [(Task(name="same", template="{{ text }}", choices={"pos": "unknown", "neg": "unheard"}), words.rows(4))],
            "Task 'same': .*are the same to this model's tokenizer",
        ),
    ],
)
def test_what_cannot_be_drawn_from_is_refused_at_once(tasks, message):
    with pytest.raises(InputError, match=message):
        Mixture(tasks, Scorer(tiny.build("llama"), TOKENIZER), PRETRAINING, 10)


def test_other_bad_arguments(tmp_path):
    with pytest.raises(InputError, match="cap of at least 1"):
        mixture({"a": 3}, cap=0)
    with pytest.raises(InputError, match="max_steps above 0, found -1"):
        trainer(tmp_path, max_steps=-1)
    with pytest.raises(InputError, match="classification head"):
        trainer(tmp_path, model=IA3Model(tiny.classifier(), IA3Config(task_type="SEQ_CLS")))
