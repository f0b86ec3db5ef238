"""A recipe: its presets, its file, random templates, and stopping when nothing is left to learn."""

import pytest
import torch
import transformers
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ia3 import (
    EarlyStopping,
    IA3Config,
    IA3Model,
    InputError,
    Member,
    Recipe,
    Scorer,
    Task,
    TFewTrainer,
)
from ia3.trainer import last_checkpoint
from ia3.training.examples import Example, training_examples
from ia3.training.recipe import OPTIMIZERS, SCHEDULES
from ia3.training.stopping import StopAtFloor
from support import tiny, words

CHOICES = {"pos": "good", "neg": "not good"}
TASK = Task(template="review : {{ text }} answer :", choices=CHOICES)
WORDINGS = ["review : {{ text }} answer :", "{{ text }} , what is it ?", "is it good ? {{ text }}"]
SEVERAL = Task(templates=WORDINGS, choices=CHOICES)


class TestRecipe:
    def test_the_papers_numbers_are_the_default(self, tmp_path):
        args = Recipe().training_arguments(tmp_path)
        assert (args.max_steps, args.learning_rate, args.per_device_train_batch_size) == (1000, 3e-3, 8)
        assert (args.optim, args.lr_scheduler_type, args.warmup_steps) == ("adafactor", "linear", 0.06)
        assert Recipe.load("paper") == Recipe() and Recipe().early_stopping is None
        assert set(Recipe().loss_weights.values()) == {1.0}
        assert Recipe.load("small") == Recipe.small() and Recipe.small().early_stopping is not None

    def test_a_models_size_decides(self, tmp_path):
        config = tiny.config("llama", vocab_size=1000)
        config.save_pretrained(tmp_path)  # no weights are needed
        assert Recipe.for_model(str(tmp_path)) == Recipe.small()
        config.hidden_size, config.num_hidden_layers, config.vocab_size = 4096, 8, 128_000
        config.intermediate_size = 8192
        config.save_pretrained(tmp_path)
        assert Recipe.for_model(str(tmp_path)) == Recipe.paper()

    def test_round_trip(self, tmp_path):
        recipe = Recipe.small().changed(steps=7, init="somewhere", unlikelihood=0.5)
        recipe.save(tmp_path / "recipe.yaml")
        assert Recipe.load(tmp_path / "recipe.yaml") == recipe

    def test_a_file_with_some_fields(self, tmp_path):
        (tmp_path / "mine.yaml").write_text("learning_rate: 0.01\nearly_stopping: {floor: 0.1}\n")
        recipe = Recipe.load(tmp_path / "mine.yaml")
        assert recipe == Recipe(name="mine", learning_rate=0.01, early_stopping=EarlyStopping(floor=0.1))

    def test_arguments_win(self, tmp_path):
        assert Recipe().training_arguments(tmp_path, max_steps=3).max_steps == 3

    @pytest.mark.parametrize(
        "text, message",
        [
            ("steps: 0", "steps: Input should be greater than or equal to 1"),
            ("learning_rate: .nan", "learning_rate"),
            ("likelihood: 0\nunlikelihood: 0\nlength_normalized: 0", "above 0 for at least one term"),
            ("step: 3", "step: Extra inputs"),
            ("- a", "found list"),
            ("a: [", "Expected YAML"),
            ("name: 2024-13-45", "Expected YAML in .*bad.yaml: month must be in 1..12"),
            ("steps: !!timestamp soon", "Expected YAML in .*bad.yaml"),
            ("\u00fc".encode("latin-1"), "Expected UTF-8 text in .*bad.yaml: .* at byte 0"),
            ("early_stopping: {floor: 0}", "early_stopping.floor"),
            ("steps: 0x" + "f" * 5000, "int too large"),
            ("optimizer: " + "x" * 5000, "expected optimizer of"),
            ("steps: &a [*a]", "levels of lists"),
            ("x" * 900 + ": 1", "Extra inputs"),
        ],
    )
    def test_bad_files(self, tmp_path, text, message):
        (tmp_path / "bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(InputError, match=message) as error:
            Recipe.load(tmp_path / "bad.yaml")
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("name, message", [("smal", "close to it: 'small'"), ("no.yaml", "found no 'no.yaml'")])
    def test_unknown_names(self, name, message):
        with pytest.raises(InputError, match=message):
            Recipe.load(name)

    @pytest.mark.parametrize(
        "field, name, known",
        [
            ("optimizer", "adamw_torsch", "adafactor, adamw_torch"),
            # Known to transformers, but not without arguments or packages of their own.
            ("optimizer", "apollo_adamw", "adafactor, adamw_torch"),
            ("optimizer", "adamw_bnb_8bit", "adafactor, adamw_torch"),
            ("schedule", "cosin", "linear, cosine"),
            ("schedule", "cosine_with_min_lr", "linear, cosine"),
            ("schedule", "reduce_lr_on_plateau", "linear, cosine"),
            ("schedule", "warmup_stable_decay", "linear, cosine"),
        ],
    )
    def test_names_that_a_recipe_cannot_configure(self, field, name, known):
        with pytest.raises(InputError, match=f"expected {field} of {known}.*, found '{name}'") as error:
            Recipe.create({field: name})
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "field, name", [*(("optimizer", n) for n in OPTIMIZERS), *(("schedule", n) for n in SCHEDULES)]
    )
    def test_names_that_a_recipe_can_configure(self, tmp_path, field, name):
        recipe = Recipe.create({field: name, "steps": 3})
        adapted = model(["a", "b"])
        members = [Member(TASK, words.rows(8), "a"), Member(TASK, words.rows(8), "b", learning_rate=0.02)]
        TFewTrainer(adapted, recipe.training_arguments(tmp_path, **OPTIONS), words.tokenizer(), members, recipe).train()
        assert not torch.equal(vectors(adapted, "a"), vectors(adapted, "b"))
        assert all(torch.isfinite(vectors(adapted, member)).all() for member in "ab")


def model(names=("default",)) -> IA3Model:
    base = tiny.build("llama", vocab_size=len(words.VOCABULARY)).double()
    return IA3Model(base, {name: IA3Config(task_type="CAUSAL_LM") for name in names}).double()


OPTIONS = {"save_strategy": "no", "disable_tqdm": True, "learning_rate": 0.05}


def lone(folder, recipe, task=SEVERAL, rows=None, seed=0, kind=TFewTrainer, callbacks=None, **options):
    args = recipe.training_arguments(folder, seed=seed, **{**OPTIONS, **options})
    rows = words.rows(20) if rows is None else rows
    return kind(model(), args, words.tokenizer(), Member(task, rows), recipe, callbacks=callbacks)


def vectors(adapted, name="default"):
    return torch.cat([parameter.detach().flatten() for parameter in adapted.adapter_parameters(name)])


class TestPlace:
    """From where adapters act."""

    @pytest.mark.parametrize(
        ("arch", "expected"),
        [
            ("llama", {"auto": "question", "start": "start", "question": "question"}),
            ("t5", {"auto": "start", "start": "start", "question": "question"}),
            ("bert", {"auto": "start", "start": "start"}),
        ],
    )
    def test_of_each_family(self, arch, expected):
        for wanted, place in expected.items():
            assert Recipe(acts_from=wanted).place(tiny.build(arch), TASK) == place

    def test_a_template_that_ends_in_the_text(self):
        recipe = Recipe(acts_from="question")
        with pytest.raises(InputError, match="found a template that ends in it"):
            recipe.place(tiny.build("llama"), SEVERAL)
        assert recipe.place(tiny.build("t5"), SEVERAL) == "question"  # the encoder reads the whole prompt anyway

    def test_what_generates_no_text(self):
        with pytest.raises(InputError, match="found a BertForSequenceClassification, which generates no text"):
            Recipe(acts_from="question").place(tiny.build("bert"), TASK)


class TestTemplates:
    @given(key=st.text(max_size=5), step=st.integers(0, 10**6))
    def test_the_draw_depends_on_row_and_step_alone(self, key, step):
        questions = tuple(object() for _ in range(3))
        assert Example(questions, key).drawn(step) is Example(questions, key).drawn(step)  # type: ignore[arg-type]

    def test_all_are_drawn_about_equally(self):
        examples = [Example((0, 1, 2), f"0 {row}") for row in range(30)]  # type: ignore[arg-type]
        drawn = [example.drawn(step) for example in examples for step in range(30)]
        assert all(250 < drawn.count(i) < 350 for i in range(3))
        assert [e.drawn(0) for e in examples] != [e.drawn(1) for e in examples]

    def test_training_asks_in_all_words_and_evaluation_in_the_first(self, tmp_path):
        seen: dict[bool, set] = {True: set(), False: set()}

        class Watched(TFewTrainer):
            def compute_loss(self, model, inputs, *args, **kwargs):
                for question in inputs["questions"]:
                    seen[model.training].add(tuple(question.prompt))
                return super().compute_loss(model, inputs, *args, **kwargs)

        rows = words.rows(6)
        run = lone(tmp_path, Recipe(steps=12), rows=rows, kind=Watched)
        run.train()
        tokens = words.tokenizer()
        prompts = [{tuple(tokens(SEVERAL.prompt(r, template=t))["input_ids"]) for r in rows} for t in range(3)]
        assert all(seen[True] & some for some in prompts) and seen[True] <= set().union(*prompts)
        run.evaluate(training_examples(run.scorer, TASK, rows, Recipe(), 0))
        assert seen[False] == prompts[0]
        seen[True].clear()
        lone(tmp_path, Recipe(steps=4, templates="first"), rows=rows, kind=Watched).train()
        assert seen[True] == prompts[0]

    def test_own_words_for_answers(self):
        own = {"prompt": "{{ text }} , is it good ?", "choices": {"neg": "bad", "pos": "fine"}}
        task = Task(templates=[WORDINGS[0], own], choices=CHOICES)
        example = training_examples(Scorer(model(), words.tokenizer()), task, words.rows(4), Recipe(), 0)[0]
        listed = [{q.listed(i): choice for i, choice in enumerate(q.choices)} for q in example.questions]
        tokens = words.tokenizer()
        assert listed[0] == {0: tokens("good")["input_ids"], 1: tokens("not good")["input_ids"]}
        assert listed[1] == {0: tokens("bad")["input_ids"], 1: tokens("fine")["input_ids"]}

    def test_a_resumed_run_draws_as_an_uninterrupted_one(self, tmp_path):
        recipe = Recipe(steps=9)
        whole = lone(tmp_path / "whole", recipe)
        whole.train()
        saving = {"save_strategy": "steps", "save_steps": 4}

        class Stop(transformers.TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 6:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            lone(tmp_path / "cut", recipe, callbacks=[Stop()], **saving).train()
        resumed = lone(tmp_path / "cut", recipe, **saving)
        resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "cut"))
        assert torch.equal(vectors(whole.model), vectors(resumed.model))


class Snapshots(transformers.TrainerCallback):
    """The vectors after each step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(vectors(model))


class TestAverage:
    @pytest.mark.parametrize("optimizer", ["adafactor", "adamw_torch"])
    @pytest.mark.parametrize("decay", [0.3, 0.9])
    def test_the_result_is_the_average_over_steps(self, tmp_path, decay, optimizer):
        snapshots = Snapshots()
        recipe = Recipe(steps=7, ema_decay=decay, optimizer=optimizer)
        run = lone(tmp_path, recipe, callbacks=[snapshots])
        run.train()
        average = snapshots.seen[0]
        for step, seen in enumerate(snapshots.seen[1:], 2):
            forgotten = max(1 - decay, 1 / step)
            average = (1 - forgotten) * average + forgotten * seen
        torch.testing.assert_close(vectors(run.model), average, atol=1e-12, rtol=0)
        assert (average - snapshots.seen[-1]).abs().max() > 1e-3

    def test_without_a_decay_it_is_the_last_step(self, tmp_path):
        snapshots = Snapshots()
        run = lone(tmp_path, Recipe(steps=3), callbacks=[snapshots])
        run.train()
        assert torch.equal(vectors(run.model), snapshots.seen[-1])

    def test_a_resumed_run_averages_as_an_uninterrupted_one(self, tmp_path):
        recipe = Recipe(steps=9, ema_decay=0.7)
        whole = lone(tmp_path / "whole", recipe)
        whole.train()
        lone(tmp_path / "part", recipe, save_strategy="steps", save_steps=4).train()
        resumed = lone(tmp_path / "part", recipe)
        resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4"))
        assert torch.equal(vectors(whole.model), vectors(resumed.model))

    def test_a_second_training_goes_on(self, tmp_path):
        run = lone(tmp_path, Recipe(steps=3, ema_decay=0.5))
        run.train()
        before = vectors(run.model)
        run.train()
        assert not torch.equal(before, vectors(run.model))

    def test_the_best_checkpoint_is_taken_as_it_is(self, tmp_path):
        saving = dict.fromkeys(("save_strategy", "eval_strategy", "logging_strategy"), "steps") | {"eval_steps": 3}
        snapshots = Snapshots()
        args = Recipe(steps=3).training_arguments(
            tmp_path, **{**OPTIONS, **saving, "save_steps": 3, "load_best_model_at_end": True}
        )
        recipe = Recipe(steps=3, ema_decay=0.9)
        member = Member(SEVERAL, words.rows(8), eval_rows=words.rows(8))
        run = TFewTrainer(model(), args, words.tokenizer(), member, recipe, callbacks=[snapshots])
        run.train()
        torch.testing.assert_close(vectors(run.model), snapshots.seen[-1], atol=1e-7, rtol=0)

    def test_members_of_a_fleet_average_as_alone(self, tmp_path):
        recipe = FLOOR.changed(ema_decay=0.6)
        rows = {"a": words.rows(20), "b": words.rows(9, seed=4)}
        members = [Member(SEVERAL, some, name, seed) for seed, (name, some) in enumerate(rows.items())]
        args = recipe.training_arguments(tmp_path / "fleet", **OPTIONS)
        together = TFewTrainer(model("ab"), args, words.tokenizer(), members, recipe)
        together.train()
        for seed, (name, some) in enumerate(rows.items()):
            alone = lone(tmp_path / name, recipe, rows=some, seed=seed)
            alone.train()
            assert together.steps_of(name) == alone.state.global_step
            torch.testing.assert_close(vectors(together.model, name), vectors(alone.model), atol=1e-7, rtol=0)
        assert together.steps_of("a") != together.steps_of("b")


FLOOR = Recipe(steps=60, early_stopping=EarlyStopping(floor=0.655, steps=3))


class TestEarlyStopping:
    def test_training_ends_when_the_loss_has_stayed_at_its_floor(self, tmp_path):
        run, seen = lone(tmp_path, FLOOR), []
        add = run.stopping.add
        run.stopping.add = lambda terms: (seen.append(terms["default"]), add(terms))  # type: ignore[method-assign]
        run.train()
        means = [sum(seen[i - 3 : i]) / 3 for i in range(3, len(seen) + 1)]
        assert 3 < run.state.global_step < 60 and len(seen) == run.state.global_step
        assert means[-1] <= 0.655 and all(mean > 0.655 for mean in means[:-1])

    def test_the_term_that_is_looked_at_is_the_length_normalized_one(self, tmp_path):
        only = FLOOR.changed(likelihood=0.0, unlikelihood=0.0, steps=1)
        run, seen = lone(tmp_path, only), []
        run.stopping.add = lambda terms: seen.append(terms["default"])  # type: ignore[method-assign]
        run.train()
        assert seen == pytest.approx([run.state.log_history[0]["loss"]], rel=1e-3)

    def test_without_a_rule_all_steps_are_made(self, tmp_path):
        run = lone(tmp_path, Recipe(steps=5))
        run.train()
        assert run.state.global_step == 5

    @pytest.mark.parametrize("cut_at", [5, 9])
    def test_members_of_a_fleet_stop_as_alone_also_when_resumed(self, tmp_path, cut_at):
        rows = {"a": words.rows(20), "b": words.rows(9, seed=4), "c": words.rows(20, seed=2)}
        members = [Member(SEVERAL, some, name, seed) for seed, (name, some) in enumerate(rows.items())]
        saving = {"save_strategy": "steps", "save_steps": 4}

        class Stop(transformers.TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == cut_at:
                    raise KeyboardInterrupt

        def fleet(callbacks=None):
            args = FLOOR.training_arguments(tmp_path / "fleet", **{**OPTIONS, **saving})
            return TFewTrainer(model("abc"), args, words.tokenizer(), members, FLOOR, callbacks=callbacks)

        with pytest.raises(KeyboardInterrupt):
            fleet([Stop()]).train()
        together = fleet()
        metrics = together.train(resume_from_checkpoint=last_checkpoint(tmp_path / "fleet")).metrics
        steps = {}
        for seed, (name, some) in enumerate(rows.items()):
            alone = lone(tmp_path / name, FLOOR, rows=some, seed=seed)
            alone.train()
            steps[name] = alone.state.global_step
            assert together.steps_of(name) == steps[name]
            torch.testing.assert_close(vectors(together.model, name), vectors(alone.model), atol=1e-7, rtol=0)
        assert len(set(steps.values())) > 1 and max(steps.values()) == together.state.global_step < 60
        assert all(f"train_loss/{name}" in metrics for name in rows)

    @pytest.mark.parametrize("kind", ["alone", "fleet"])
    def test_a_run_that_goes_on_from_where_it_stopped_makes_no_step(self, tmp_path, kind):
        recipe = Recipe(steps=12, early_stopping=EarlyStopping(floor=50, steps=3))
        members = [Member(SEVERAL, words.rows(20), name) for name in "ab"]

        saving = {"save_strategy": "steps", "save_steps": 3}

        def make(folder):
            if kind == "alone":
                return lone(tmp_path / folder, recipe, **saving)
            args = recipe.training_arguments(tmp_path / folder, **{**OPTIONS, **saving})
            return TFewTrainer(model("ab"), args, words.tokenizer(), members, recipe)

        whole, resumed = make("whole"), make("resumed")
        whole.train()
        assert whole.state.global_step == 3
        resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "whole"))
        assert resumed.state.global_step == 3
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_a_step_of_few_parts_at_the_end_of_an_epoch_is_a_whole_one(self, tmp_path):
        """Ten rows in batches of two, four to a step: the second step of an epoch has one."""
        recipe = Recipe(steps=6, learning_rate=1e-9, early_stopping=EarlyStopping(floor=0.45, steps=2))
        run = lone(tmp_path, recipe.changed(batch_size=2), rows=words.rows(10), gradient_accumulation_steps=4)
        run.train()
        assert run.state.global_step == 6

    def test_gradient_accumulation_stops_by_the_loss_of_the_whole_step(self, tmp_path):
        recipe = FLOOR.changed(batch_size=4)
        rows = words.rows(16)
        whole = lone(tmp_path, FLOOR, rows=rows)
        parts = lone(tmp_path, recipe, rows=rows, gradient_accumulation_steps=2)
        whole.train()
        parts.train()
        assert whole.state.global_step == parts.state.global_step < 60

    @given(st.lists(st.floats(0, 2), max_size=30), st.floats(0.1, 2), st.integers(1, 5))
    def test_the_rule(self, losses, floor, steps):
        stop = StopAtFloor(EarlyStopping(floor=floor, steps=steps), ["default"])
        control, state = transformers.TrainerControl(), transformers.TrainerState()
        ended = None
        for step, loss in enumerate(losses, 1):
            state.global_step = step
            stop.add({"default": loss / 2})
            stop.add({"default": loss / 2})
            stop.on_step_end(None, state, control)
            if control.should_training_stop and ended is None:
                ended = step
        sums = [sum(losses[i - steps : i]) / steps for i in range(steps, len(losses) + 1)]
        expected = next((i for i, mean in enumerate(sums, steps) if mean <= floor), None)
        assert ended == expected or any(abs(mean - floor) < 1e-9 for mean in sums)


def test_weights_of_the_terms_reach_the_loss(tmp_path):
    def loss(**weights):
        run = lone(tmp_path, Recipe(steps=1, **weights), task=TASK)
        run.train()
        return run.state.log_history[0]["loss"]

    only = {"likelihood": 0.0, "unlikelihood": 0.0, "length_normalized": 0.0}
    parts = [loss(**{**only, name: 1.0}) for name in only]
    assert loss() == pytest.approx(sum(parts), rel=2e-3)
    assert loss(likelihood=0.5, unlikelihood=2.0) == pytest.approx(0.5 * parts[0] + 2 * parts[1] + parts[2], rel=2e-3)
    assert yaml.safe_load("1e-3") == "1e-3"  # YAML's trap: pydantic reads the text as a number
    assert Recipe.create({"learning_rate": "1e-3"}).learning_rate == 1e-3


def test_the_order_of_labels_changes_nothing(tmp_path):
    turned = Task(templates=WORDINGS, choices=dict(reversed(CHOICES.items())))
    ends = []
    for task in (SEVERAL, turned):
        run = lone(tmp_path, Recipe(steps=6), task=task)
        run.train()
        ends.append(vectors(run.model))
    assert torch.equal(*ends)
