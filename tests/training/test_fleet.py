"""Each of several members ends where it would have ended alone; the rest of the model is left as it was."""

import math
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from ia3 import IA3Config, IA3Model, InputError, Member, Recipe, Task, TFewTrainer, predict
from ia3.trainer import last_checkpoint
from support import tiny, words

TWO = Task(name="two", template="review : {{ text }} answer :", choices={"pos": "good", "neg": "not good"})
THREE = Task(
    name="three", template="{{ text }} , what is it ?", choices={"pos": "good fine", "neg": "bad", "none": "not a tea"}
)
STEPS = 7


def members(**changes) -> list[Member]:
    """Two tasks with 2 and 3 choices, 21, 22 and 5 rows, seeds and learning rates that differ."""
    some = words.rows(22, seed=3)
    some[4]["label"] = some[9]["label"] = "none"
    made = [
        Member(TWO, words.rows(21, seed=1), "a", seed=0),
        Member(THREE, some, "b", seed=3, learning_rate=0.02),
        Member(TWO, words.rows(5, seed=2), "c", seed=1),
        Member(TWO, words.rows(21, seed=1), "d", seed=5),
    ]
    return [member for member in made if member.name in changes.get("names", "abcd")]


def adapted(names, **fields) -> IA3Model:
    base = tiny.build("llama", vocab_size=len(words.VOCABULARY)).double()
    return IA3Model(base, {name: IA3Config(task_type="CAUSAL_LM", **fields) for name in names}).double()


def arguments(folder, steps=STEPS, **options):
    options = {"learning_rate": 0.05, "save_strategy": "no", "disable_tqdm": True, **options}
    return Recipe(steps=steps).training_arguments(folder, **options)


def fleet(folder, some=None, model=None, callbacks=None, **options) -> TFewTrainer:
    some = members() if some is None else some
    model = model or adapted([member.name for member in some])
    return TFewTrainer(model, arguments(folder, **options), words.tokenizer(), some, callbacks=callbacks)


def alone(folder, member: Member, fields=None, **options) -> TFewTrainer:
    rate = {} if member.learning_rate is None else {"learning_rate": member.learning_rate}
    args = arguments(folder, seed=member.seed, **{**options, **rate})
    return TFewTrainer(
        adapted([member.name], **(fields or {})), args, words.tokenizer(), Member(member.task, member.rows)
    )


def distance(a: IA3Model, b: IA3Model, name: str) -> float:
    """The largest difference of two models' adapters of a name."""
    pairs = zip(a.adapter_parameters(name), b.adapter_parameters(name), strict=True)
    return max((x - y).abs().max().item() for x, y in pairs)


ADAMW = {"optim": "adamw_torch", "weight_decay": 0.3}
SMALL = {"per_device_train_batch_size": 4}


@pytest.mark.parametrize(
    "options, fields",
    [
        (ADAMW, {}),
        ({**ADAMW, "max_grad_norm": 0.4, "lr_scheduler_type": "cosine"}, {"modules_to_save": ["norm"]}),
        ({"weight_decay": 0.3, "max_grad_norm": 0.4, "warmup_steps": 3, "per_device_train_batch_size": 3}, {}),
        ({"data_seed": 11, "optim": "sgd", "max_grad_norm": 0.4, "dataloader_drop_last": True, **SMALL}, {}),
    ],
    ids=["adamw", "adamw-clipped-norms", "adafactor-clipped", "sgd-data-seed"],
)
def test_each_member_ends_where_it_would_have_ended_alone(tmp_path, options, fields):
    together = fleet(tmp_path, model=adapted("abcd", **fields), **options)
    metrics = together.train().metrics
    norms = [entry["grad_norm"] for entry in together.state.log_history if "grad_norm" in entry]
    assert min(norms) > options.get("max_grad_norm", 1.0)  # clipping all of them together would show
    for member in members():
        lone = alone(tmp_path, member, fields, **options)
        start = [parameter.clone() for parameter in lone.model.adapter_parameters(member.name)]
        result = lone.train()
        ends = lone.model.adapter_parameters(member.name)
        assert min((x - y).abs().max().item() for x, y in zip(start, ends, strict=True)) > 1e-4
        assert distance(together.model, lone.model, member.name) < 1e-7
        assert metrics[f"train_loss/{member.name}"] == pytest.approx(result.training_loss, rel=1e-5)


@settings(max_examples=4)
@given(
    counts=st.lists(st.integers(2, 20), min_size=2, max_size=3),
    size=st.integers(1, 9),
    seed=st.integers(0, 2**31 - 10),
    steps=st.integers(1, 10),
)
def test_each_member_sees_its_rows_in_the_order_of_a_lone_run(tmp_path_factory, counts, size, seed, steps):
    seen: list = []

    class Lone(TFewTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append([question.prompt for question in inputs["questions"]])
            return sum(parameter.sum() for parameter in model.adapter_parameters("m"))

    folder = tmp_path_factory.mktemp("run")
    words_of = [*words.GOOD, *words.BAD, *words.OTHER]
    rows = [[{"text": words_of[i], "label": ("pos", "neg")[i % 2]} for i in range(count)] for count in counts]
    options = {"per_device_train_batch_size": size}
    some = [Member(TWO, rows[i], f"m{i}", seed + i) for i in range(len(counts))]
    together = fleet(folder, some, steps=steps, **options)
    for member in some:
        seen.clear()
        args = arguments(folder, steps, seed=member.seed, **options)
        Lone(adapted("m"), args, words.tokenizer(), Member(TWO, member.rows)).train()
        asked = [[example.questions[0] for example in step] for step in together.train_dataset]
        assert seen == [[question.prompt for question in step if question.adapter == member.name] for step in asked]


@pytest.mark.parametrize("options", [ADAMW, {}], ids=["adamw", "adafactor"])
def test_resuming_ends_byte_for_byte_where_an_uninterrupted_fleet_does(tmp_path, options):
    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    options = {**options, "save_strategy": "steps", "save_steps": 3}
    fleet(tmp_path / "whole", **options).train()
    with pytest.raises(KeyboardInterrupt):
        fleet(tmp_path / "cut", callbacks=[Stop()], **options).train()
    checkpoint = last_checkpoint(tmp_path / "cut")
    assert checkpoint.endswith("checkpoint-3")
    resumed = fleet(tmp_path / "cut", **options)
    metrics = resumed.train(resume_from_checkpoint=checkpoint).metrics
    assert sum(metrics[f"train_loss/{name}"] for name in "abcd") == pytest.approx(metrics["train_loss"], rel=1e-5)
    for name in "abcd":
        a, b = (tmp_path / run / "checkpoint-7" / name / "adapter_model.safetensors" for run in ("whole", "cut"))
        assert a.read_bytes() == b.read_bytes()


def test_logs_say_each_members_loss(tmp_path):
    run = fleet(tmp_path, logging_steps=3)
    metrics = run.train().metrics
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    for entry in logs:
        assert sum(entry[f"loss/{name}"] for name in "abcd") == pytest.approx(entry["loss"], rel=1e-5)
    assert metrics["train_loss"] == pytest.approx(sum(metrics[f"train_loss/{name}"] for name in "abcd"), rel=1e-5)


def test_other_adapters_and_the_active_one_stay(tmp_path):
    model = adapted("xabcd")
    tiny.randomize(model, adapter="x")
    before = tiny.state(model)
    fleet(tmp_path, model=model).train()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.rpartition(".")[2] in "abcd" for key in changed)
    assert model.active_adapters == ["x"]
    assert not any(parameter.requires_grad for parameter in model.adapter_parameters("x"))


@pytest.mark.parametrize("kind", ["fleet", "alone"])
def test_parts_of_a_batch_add_up(tmp_path, monkeypatch, kind):
    from ia3.scoring import scorer

    def make():
        return fleet(tmp_path) if kind == "fleet" else alone(tmp_path, members()[1])

    whole = make()
    whole.train()
    backward, step = [], transformers.Trainer.training_step
    monkeypatch.setattr(scorer, "pass_tokens", lambda model: 60)
    monkeypatch.setattr(transformers.Trainer, "training_step", lambda *args: backward.append(args) or step(*args))
    parts = make()
    parts.train()
    assert len(backward) > 2 * parts.state.global_step
    for name in parts.model.peft_config:
        assert distance(whole.model, parts.model, name) < 1e-7


def test_layers_are_computed_again_after_an_evaluation_too(tmp_path):
    """An evaluation leaves the model in a mode in which more may be shared."""
    many = "the tea was good and the soup was not bad and " * 3
    task = Task(name="t", template=many + "{{ text }} answer :", choices=TWO.choices)
    member = Member(task, words.rows(16, seed=1), "a", eval_rows=words.rows(4, seed=2))
    plain, again = (
        fleet(tmp_path, [member], eval_strategy="steps", eval_steps=2, gradient_checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    plain.train()
    again.train()
    assert distance(plain.model, again.model, "a") < 1e-6


def test_one_that_diverges_leaves_the_others_alone(tmp_path):
    a, b, *_ = members()
    broken = Member(TWO, words.rows(8), "c", learning_rate=1e200)
    run = fleet(tmp_path, [a, broken, b])
    run.train()
    assert not all(torch.isfinite(parameter).all() for parameter in run.model.adapter_parameters("c"))
    for member in (a, b):
        lone = alone(tmp_path, member)
        lone.train()
        assert distance(run.model, lone.model, member.name) < 1e-7


def test_one_member_with_its_name_seed_and_rate_is_one_with_the_arguments_bit_for_bit(tmp_path):
    for member in members(names="ab"):
        model = adapted("x" + member.name)
        model.set_adapter(member.name)
        run, lone = fleet(tmp_path, [member], model=model), alone(tmp_path, member)
        assert run.train().training_loss == lone.train().training_loss
        assert distance(run.model, lone.model, member.name) == 0


@pytest.mark.parametrize("name", [None, "a"])
def test_one_member_takes_what_transformers_takes(tmp_path, name):
    """Epochs, accumulated batches, an optimizer; and the caller's arguments stay as they are."""
    model = adapted("a")
    options = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    args = arguments(tmp_path, **options, per_device_train_batch_size=2)
    optimizers = (torch.optim.SGD(model.adapter_parameters("a"), lr=0.1), None)
    member = Member(TWO, words.rows(8), name, seed=3, learning_rate=0.2, eval_rows=ROWS)
    run = TFewTrainer(model, args, words.tokenizer(), member, optimizers=optimizers)
    run.train()
    assert run.state.global_step == run.steps_of("a") == 4
    assert run.evaluate()["eval_loss"] == run.evaluate("a")["eval_loss"] == run.evaluate(ROWS)["eval_loss"]
    assert not any("loss/" in key for entry in run.state.log_history for key in entry)
    assert run.args.data_seed == 3 and (args.data_seed, args.learning_rate) == (None, 0.05)


def test_one_that_is_not_active_is_trained_all_the_same(tmp_path):
    (member,) = members(names="a")
    run, lone = fleet(tmp_path, [member], model=adapted("xa")), alone(tmp_path, member)
    run.train()
    lone.train()
    assert run.model.active_adapters == ["x"] and distance(run.model, lone.model, "a") < 1e-7
    assert all(torch.equal(vector, torch.ones_like(vector)) for vector in run.model.adapter_parameters("x"))


def test_several_that_are_active_are_one_member(tmp_path):
    model = adapted("ab")
    model.set_adapter(["a", "b"])
    TFewTrainer(model, arguments(tmp_path), words.tokenizer(), Member(TWO, ROWS)).train()
    assert set(model.adapter_folders) == {"a", "b"}
    for name in "ab":
        assert not all(torch.equal(vector, torch.ones_like(vector)) for vector in model.adapter_parameters(name))


def test_metrics_of_the_callers_own_are_kept(tmp_path):
    for some in (BOTH[:1], BOTH):
        some = [replace(member, eval_rows=ROWS) for member in some]
        run = TFewTrainer(
            adapted("ab"), arguments(tmp_path), words.tokenizer(), some, compute_metrics=lambda result: {"own": 1.0}
        )
        found = run.evaluate()
        assert [key for key in found if "own" in key] == (
            ["eval_own"] if len(some) == 1 else ["eval_a_own", "eval_b_own"]
        )


def test_a_fleet_trains_on_one_of_several_devices(tmp_path, monkeypatch):
    some = members(names="ac")
    one = fleet(tmp_path, some, steps=3)
    one.train()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    two = fleet(tmp_path, some, steps=3)
    two.train()
    assert two.args.n_gpu == 1 and two.model_wrapped is two.model
    assert all(distance(one.model, two.model, name) == 0 for name in "ac")


def test_evaluate_measures_each_member_on_its_own_rows(tmp_path):
    held_out = [words.rows(10, seed=8), words.rows(6, seed=9)]
    some = [
        Member(TWO, words.rows(20), "a", eval_rows=held_out[0]),
        Member(THREE, members()[1].rows, "b", eval_rows=held_out[1]),
        Member(TWO, words.rows(20), "c"),
    ]
    run = fleet(tmp_path, some, eval_strategy="steps", eval_steps=7)
    run.train()
    found = run.evaluate()
    assert "eval_c_loss" not in found and found["eval_a_loss"] > 0
    assert any("eval_b_accuracy" in entry for entry in run.state.log_history)
    for member in some[:2]:
        labels = [row["label"] for row in member.eval_rows]
        names = [member.name] * len(labels)
        answers = predict(run.model, words.tokenizer(), member.task, member.eval_rows, adapter_names=names)
        expected = member.task.metrics(labels, [answer.label for answer in answers])
        assert {key: found[f"eval_{member.name}_{key}"] for key in expected} == expected
    assert set(run.evaluate("b")) >= {"eval_loss", "eval_accuracy"}


def test_rows_of_many_tasks_and_adapters_are_predicted_together(tmp_path):
    run = fleet(tmp_path)
    run.train()
    rows = words.rows(6, seed=4)
    names, tasks = ["a", "b", "c"] * 2, [TWO, THREE, TWO] * 2
    together = predict(run.model, words.tokenizer(), tasks, rows, adapter_names=names)
    for found, name, task, row in zip(together, names, tasks, rows, strict=True):
        (one,) = predict(run.model, words.tokenizer(), task, [row], adapter_names=[name])
        assert found.label == one.label and found.probabilities == pytest.approx(one.probabilities, abs=1e-6)
    with pytest.raises(InputError, match="a task for each of the 6 rows, found 2"):
        predict(run.model, words.tokenizer(), [TWO, THREE], rows)


ROWS = words.rows(4)
BOTH = [Member(TWO, ROWS, "a"), Member(TWO, ROWS, "b")]


@pytest.mark.parametrize(
    "some, options, message",
    [
        ([], {}, "at least one member, found none"),
        ([Member(TWO, ROWS, "a"), Member(THREE, ROWS, "a")], {}, "found 'a' twice"),
        ([Member(TWO, ROWS, "a"), Member(TWO, ROWS, "z")], {}, "Adapter 'z' does not exist"),
        (
            [Member(TWO, ROWS, "a"), Member(TWO, ROWS[::2], "b")],
            {},
            "Member 'b': .*at least two labels, found only 'pos'",
        ),
        ([Member(TWO, [{"text": "tea", "label": "maybe"}], "a")], {}, "^Expected a known label.*'maybe'"),
        ([Member(TWO, ROWS, "a", eval_rows=[{"text": "", "label": "pos"}])], {}, "^Expected some text.*row 1"),
        ([Member(TWO, ROWS, "a", learning_rate=0.0)], {}, "Member 'a': Expected a learning rate above 0"),
        ([Member(TWO, ROWS, "a", learning_rate=math.nan)], {}, "learning rate above 0"),
        (BOTH, {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps of 1"),
        (BOTH, {"max_steps": -1}, "max_steps above 0"),
        (BOTH, {"train_sampling_strategy": "sequential"}, "train_sampling_strategy"),
        ([Member(TWO, ROWS, "a")], {"dataloader_drop_last": True}, "at least one batch of 8 rows, found 4"),
        (BOTH, {"dataloader_drop_last": True}, "Member 'a': Expected at least one batch of 8 rows, found 4"),
        ([Member(TWO, ROWS, "a"), Member(TWO, ROWS)], {}, "a name for each of 2 members, found 1"),
        ([BOTH[0], Member(TWO, ROWS[::2], "b", title="tea")], {}, "^'tea': Expected .*at least two labels"),
        ([TWO], {}, r"Expected a Member or several, found a Task; for example Member\(task, rows\)"),
        (TWO, {}, "Expected a Member or several, found a Task"),
    ],
)
def test_bad_fleets(tmp_path, some, options, message):
    with pytest.raises(InputError, match=message):
        fleet(tmp_path, some, model=adapted("ab"), **options)


def test_models_that_cannot_be_trained_as_a_fleet(tmp_path):
    model = adapted("a")
    with pytest.raises(InputError, match="found a LlamaForCausalLM"):
        fleet(tmp_path, [Member(TWO, ROWS, "a")], model=tiny.build("llama"))
    optimizers = (torch.optim.SGD(model.parameters()), None)
    with pytest.raises(InputError, match="no `optimizers`"):
        args = arguments(tmp_path)
        TFewTrainer(adapted("ab"), args, words.tokenizer(), BOTH, optimizers=optimizers)
    model.merge_adapter()
    with pytest.raises(InputError, match="unmerge_adapter"):
        fleet(tmp_path, [Member(TWO, ROWS, "a")], model=model)
