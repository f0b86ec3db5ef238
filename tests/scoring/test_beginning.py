"""Rows that go on from a beginning that is read once score, and teach, what whole rows do."""

import random
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from ia3 import IA3Config, IA3Model, Member, Recipe, Task, TFewTrainer
from ia3.scoring import beginning
from ia3.scoring.batch import groups, normalized_scores
from ia3.scoring.beginning import Beginning
from ia3.scoring.decoder import plain_rows
from ia3.scoring.family import base_of
from ia3.scoring.question import Question
from ia3.training.losses import tfew_loss
from support import tiny, words
from support.asked import LAYOUTS, alone, made, scorer

TOKENIZER = words.tokenizer()


def asked(count: int = 8, shared: int = 40, seed: int = 0, adapter: str | None = None) -> list[Question]:
    """Questions of different lengths with some of 3 choices each, that begin with the same tokens."""
    chance = random.Random(seed)

    def some(least: int, most: int) -> list[int]:
        return chance.choices(range(3, tiny.VOCAB), k=chance.randint(least, most))

    start = some(shared, shared)
    found = []
    for index in range(count):
        choices = sorted([[3, *some(0, 1)], [4, *some(0, 2)], [5]][: 2 + index % 2])
        found.append(Question([*start, 6 + index % 5, *some(0, 6)], choices, index % 2, adapter))
    return found


def lengths(model, questions) -> list[int]:
    """Of the beginnings, 0 for rows without one."""
    return [0 if one is None else len(one.tokens) for _, one in beginning.beginnings(scorer(model).family, questions)]


@pytest.fixture
def whole(monkeypatch):
    """A call's result with nothing shared."""

    def run(call):
        with monkeypatch.context() as patched:
            patched.setattr(beginning, "may_share", lambda _: False)
            return call()

    return run


class TestScores:
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_they_are_those_of_each_row_alone(self, name):
        sizes, attentions, layout = LAYOUTS[name]
        for attention in attentions:
            model = made(name, **sizes)
            if attention is not None:
                model.set_attn_implementation(attention)
            questions = asked()
            found = scorer(model).score(questions, batch_tokens=60)
            for question, scores in zip(questions, found, strict=True):
                assert scores.tolist() == pytest.approx(alone(model, question), abs=1e-5)
            # A window that is shorter than the row, ALiBi, recurrence: rows are whole.
            assert lengths(model, questions) == ([40] if layout == "packed" else [0])

    @pytest.mark.parametrize("window, seed", [(16, 3), (16, 5), (16, 6), (40, 7)])
    def test_a_window_that_padding_moves_rows_out_of_is_found_out(self, window, seed):
        """The longest prompt fits it, and by chance loses little where it is moved by a place."""
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}
        sizes |= {"window_size": window, "max_position_embeddings": 200}
        model = made("gpt_neo", vocab_size=tiny.VOCAB, attention_types=[[["global", "local"], 1]], **sizes)
        chance = random.Random(seed)
        start = [TOKENIZER.vocab[chance.choice(words.OTHER)] for _ in range(40)]
        rest = [[TOKENIZER.vocab[chance.choice(words.VOCABULARY[3:])] for _ in range(1 + i % 6)] for i in range(12)]
        choices = scorer(model).encode(["tea"], [[" good", " not good", " not bad today"]])[0].choices
        questions = [Question([*start, *its], choices) for its in rest]
        for question, scores in zip(questions, scorer(model).score(questions), strict=True):
            assert scores.tolist() == pytest.approx(alone(model, question), abs=1e-4)

    def test_in_bfloat16_they_differ_by_rounding(self, llama, whole):
        model = llama.bfloat16()
        found = scorer(model).score(asked())
        for one, other in zip(found, whole(lambda: scorer(model).score(asked())), strict=True):
            torch.testing.assert_close(one, other, atol=0.03, rtol=0.01)
        assert lengths(model, asked()) == [40]

    def test_each_adapter_reads_its_own(self, llama):
        """Mixed batches: also where all begin with the same tokens, and some rows are nobody's."""
        names = ["one", "two", "__base__"]
        model = IA3Model(llama, {"one": IA3Config(), "two": IA3Config()})
        for seed, name in enumerate(names[:2]):
            tiny.randomize(model, seed, name)
        questions = [question for name in names for question in asked(8, adapter=name)]
        questions += [replace(question, prompt=question.prompt[41:] or [9]) for question in questions[:5]]
        random.Random(0).shuffle(questions)
        assert lengths(model, questions) == [40, 40, 40, 0]
        done: list[int] = []
        found = scorer(model).score(
            [replace(question, adapter=None) for question in questions],
            on_progress=done.extend,
            adapter_names=[question.adapter for question in questions],
        )
        assert sorted(done) == list(range(len(questions)))
        for name in names:
            model.set_adapter(names[0] if name == "__base__" else name)
            for question, scores in zip(questions, found, strict=True):
                if question.adapter == name == "__base__":
                    with model.disable_adapter():
                        assert scores.tolist() == pytest.approx(alone(model, question), abs=1e-5)
                elif question.adapter == name:
                    assert scores.tolist() == pytest.approx(alone(model, question), abs=1e-5)

    def test_vectors_that_change_are_read_anew(self, llama):
        model = IA3Model(llama, IA3Config())
        for seed in (1, 2):
            tiny.randomize(model, seed)
            question, scores = asked()[0], scorer(model).score(asked())[0]
            assert scores.tolist() == pytest.approx(alone(model, question), abs=1e-5)

    def test_no_bit_depends_on_the_order_of_labels(self, llama):
        prompts = ["review : the tea was it and is what question " * 4 + word for word in words.GOOD + words.BAD]
        texts = ["good", "not good", "bad", "fine"]
        given = scorer(llama).score(scorer(llama).encode(prompts, [texts] * 8))
        assert lengths(llama, scorer(llama).encode(prompts, [texts] * 8))[0] == 40
        turned = scorer(llama).score(scorer(llama).encode(prompts, [texts[::-1]] * 8))
        assert all(torch.equal(one, other.flip(0)) for one, other in zip(given, turned, strict=True))

    def test_a_prompt_that_is_the_beginning_of_all_keeps_a_token(self, llama):
        questions = asked()
        questions[3] = replace(questions[3], prompt=questions[3].prompt[:40])
        assert lengths(llama, questions) == [39]
        found = scorer(llama).score(questions)
        assert found[3].tolist() == pytest.approx(alone(llama, questions[3]), abs=1e-5)

    def test_the_same_prompt_many_times(self, llama):
        questions = asked()[:1] * 8
        [expected] = {tuple(scores.tolist()) for scores in scorer(llama).score(questions)}
        assert list(expected) == pytest.approx(alone(llama, questions[0]), abs=1e-5)

    @pytest.mark.parametrize("changes", [{"count": 2}, {"shared": 7}, {"count": 4, "shared": 30}])
    def test_little_is_not_shared(self, llama, changes):
        assert lengths(llama, asked(**changes)) == [0]

    def test_what_is_shared_does_not_depend_on_what_was_asked_before(self, llama):
        """Else a resumed run would not end as an uninterrupted one, bit for bit."""
        few = asked(count=4, shared=50)
        assert lengths(llama, few) == [0]
        assert lengths(llama, asked(count=8, shared=60)) == [60]
        assert lengths(llama, few) == [0]

    def test_many_short_choices_do_not_hide_a_window(self):
        """Their row is longer than the window, the text of each of them is not; of the next rows it is."""
        model = made("mistral", **{**LAYOUTS["mistral"][0], "sliding_window": 64})
        wide = [
            replace(question, choices=[[3 + i, 4, 5] for i in range(20)], label=0) for question in asked(16, shared=40)
        ]
        assert lengths(model, wide) == [40]
        long = asked(16, shared=72)
        assert lengths(model, long) == [0]
        for questions in (wide, long):
            for question, scores in zip(questions, scorer(model).score(questions), strict=True):
                assert scores.tolist() == pytest.approx(alone(model, question), abs=1e-5)

    def test_a_short_choice_far_back_in_the_row_is_tried_too(self):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "window_size": 24}
        config = transformers.AutoConfig.for_model(
            "gpt_neo", vocab_size=tiny.VOCAB, attention_types=[[["global", "local"], 1]], **sizes
        )
        torch.manual_seed(0)
        model = tiny.randomized(transformers.AutoModelForCausalLM.from_config(config).eval(), 0.15)
        # The longest choice stands next to the prompt, and only the others are moved out of the window.
        choices = [[3, 7, 8, 9, 10, 11], *([token, 20, 21] for token in range(4, 16))]
        questions = [Question([*range(5, 15), 3 + index % 40, 9], choices) for index in range(40)]
        found = scorer(model).score(questions)
        for question, scores in zip(questions[::8], found[::8], strict=True):
            batch = plain_rows([question])
            with torch.no_grad():
                expected = normalized_scores(scorer(model).log_probs(batch), batch["mask"])[0]
            assert torch.allclose(scores, expected, atol=1e-4)

    def test_models_of_other_families_share_nothing(self):
        questions = [replace(question, choices=[[0], [1]]) for question in asked()]
        assert lengths(tiny.build("t5"), questions) == lengths(tiny.classifier("bert"), questions) == [0]

    def test_a_model_without_a_cache_is_asked_once(self, monkeypatch):
        model, reads = made("mamba", **LAYOUTS["mamba"][0]), []
        read = beginning.read
        monkeypatch.setattr(beginning, "read", lambda *args: reads.append(args) or read(*args))
        for _ in range(3):
            assert lengths(model, asked()) == [0]
        assert len(reads) == 1


@given(st.lists(st.tuples(st.sampled_from([0, 10, 40]), st.integers(1, 8), st.integers(0, 3)), max_size=4))
@settings(max_examples=20)
def test_every_question_is_asked_once_and_whole(sizes):
    model = tiny.build("llama")
    questions = [one for shared, count, seed in sizes for one in asked(count, shared, seed)]
    random.Random(0).shuffle(questions)
    seen = []
    for indices, shared in beginning.beginnings(scorer(model).family, questions):
        some = [questions[i] for i in indices]
        behind = some if shared is None else shared.behind(some)
        seen += indices
        for question, rest in zip(some, behind, strict=True):
            assert ([] if shared is None else shared.tokens) + rest.prompt == question.prompt and rest.prompt
    assert sorted(seen) == list(range(len(questions)))
    assert sorted(i for group, _ in scorer(model).batches(questions) for i in group) == sorted(seen)


def gradients(model: IA3Model, questions: list[Question], detached: bool = False) -> tuple[float, torch.Tensor]:
    """The loss and its gradient for all vectors, by parts of one graph, or of one for each part."""
    total = 0.0
    model.zero_grad()
    for indices, shared in beginning.beginnings(scorer(model).family, questions):
        some = [questions[i] for i in indices]
        if shared is not None and detached:
            some = shared.behind(some)
            shared.detach()
            parts = ([indices[i] for i in g] for g in groups(some, shared.room(some, 60)))
            asked_of = dict(zip(indices, some, strict=True))
            made = [(g, shared.packed([asked_of[i] for i in g])) for g in parts]
        else:
            made = [([indices[i] for i in g], batch) for g, batch in scorer(model).batches(some, 60)]
        losses = []
        for group, batch in made:
            loss = tfew_loss(scorer(model).log_probs(batch), batch["mask"], batch["label"]).total * len(group)
            if detached:
                loss.backward()
            losses.append(loss)
        if not detached:
            torch.stack(losses).sum().backward()
        elif shared is not None:
            shared.backward()
        total += float(torch.stack(losses).sum().detach())
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return total, torch.cat(found)


class TestGradients:
    @pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
    @pytest.mark.parametrize("detached", [False, True])
    def test_they_are_those_of_whole_rows(self, name, detached, whole):
        model = IA3Model(tiny.build(name), IA3Config()).double().train()
        tiny.randomize(model)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        config = base_of(model).config
        for key in [key for key in vars(config) if "drop" in key]:
            setattr(config, key, 0.0)
        assert lengths(model, asked()) == [40]
        loss, gradient = gradients(model, asked(), detached)
        expected_loss, expected = whole(lambda: gradients(model, asked()))
        assert loss == pytest.approx(expected_loss, rel=1e-6)  # log-probabilities are float32
        assert float((gradient - expected).norm() / expected.norm()) < 1e-6

    def test_vectors_that_no_key_depends_on(self, llama, whole):
        """The last layer's feed-forward alone: nothing is to be learned from the beginning."""
        config = IA3Config(target_modules=r".*1\.mlp\.down_proj", feedforward_modules=r".*1\.mlp\.down_proj")
        model = IA3Model(llama, config).double().train()
        _, gradient = gradients(model, asked(), True)
        _, expected = whole(lambda: gradients(model, asked()))
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)

    def test_layers_that_are_computed_again_and_dropout_share_nothing(self, llama):
        model = IA3Model(llama, IA3Config()).train()
        assert lengths(model, asked()) == [40]
        base_of(model).gradient_checkpointing_enable()
        assert lengths(model, asked()) == [0]
        with torch.no_grad():
            assert lengths(model.eval(), asked()) == [40]
        base_of(model).gradient_checkpointing_disable()
        base_of(model).config.attention_dropout = 0.1
        assert lengths(model.train(), asked()) == [0]


TASK = Task(
    name="instructed",
    template="what is it ? good or bad : answer the question and the text , " * 3 + "{{ text }} answer :",
    choices={"pos": "good", "neg": "not good"},
)


class TestTrainers:
    def trained(self, name, folder, double=True):
        model = IA3Model(tiny.build("llama", vocab_size=len(words.VOCABULARY)), IA3Config())
        model = model.double() if double else model
        arguments = Recipe(steps=5, learning_rate=0.05).training_arguments(
            folder, save_strategy="no", disable_tqdm=True, seed=3
        )
        trainer = TFewTrainer(model, arguments, TOKENIZER, Member(TASK, words.rows(20), name))
        trainer.train()
        return model, trainer.state.log_history

    @pytest.mark.parametrize("name", [None, "default"])
    def test_they_end_where_whole_rows_do(self, name, tmp_path, whole, monkeypatch):
        read, reads = beginning.read, []
        monkeypatch.setattr(beginning, "read", lambda *args: reads.append(args) or read(*args))
        model, log = self.trained(name, tmp_path / "a")
        assert len(reads) == 4  # once in each step of eight rows; four save too little
        expected, other = whole(lambda: self.trained(name, tmp_path / "b"))
        assert len(reads) == 4
        for one, two in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        losses = [[one["loss"] for one in some if "loss" in one] for some in (log, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 5

    def test_members_share_with_themselves(self, tmp_path):
        """Beginnings are the same text, but each adapter's own keys and values."""
        ends = {}
        for names in (("a",), ("b",), ("a", "b")):
            base = tiny.build("llama", vocab_size=len(words.VOCABULARY)).double()
            model = IA3Model(base, {name: IA3Config() for name in names}).double()
            arguments = Recipe(steps=4, learning_rate=0.05).training_arguments(
                tmp_path, save_strategy="no", disable_tqdm=True
            )
            members = [Member(TASK, words.rows(20, seed=ord(name)), name, ord(name)) for name in names]
            TFewTrainer(model, arguments, TOKENIZER, members).train()
            for name in names:
                ends[name, len(names)] = torch.cat([p.flatten() for p in model.adapter_parameters(name)])
        for name in "ab":
            torch.testing.assert_close(ends[name, 2], ends[name, 1], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(ends["a", 2], ends["b", 2], atol=1e-3)


def test_a_beginning_keeps_nothing_of_its_rows(llama):
    questions = asked()
    shared = Beginning(scorer(llama).family, questions[0].prompt[:40])
    with torch.no_grad():
        scorer(llama).log_probs(shared.packed(shared.behind(questions)))
    assert shared.cache is not None and shared.cache.get_seq_length() == 40
