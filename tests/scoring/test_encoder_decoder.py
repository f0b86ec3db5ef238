"""Encoder-decoders: packed decoder rows and plain ones score as each (prompt, choice) alone through the model's own loss."""

import math
import threading
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from ia3 import (
    IA3Config,
    IA3Model,
    InputError,
    Member,
    Readings,
    Recipe,
    Scorer,
    Task,
    TFewTrainer,
    predict,
    score_choices,
    tfew_loss,
)
from ia3.scoring.batch import normalized_scores
from ia3.scoring.question import Question
from support import tiny, words
from support.asked import scorer

# What `for_model` takes beside the tiny sizes of T5 and BART.
T5, BART = tiny.SIZES["t5"], tiny.SIZES["bart"]
PACKED = {
    "t5": T5,
    "mt5": T5,
    "umt5": T5,
    "longt5": {**T5, "local_radius": 5},
    "switch_transformers": {**T5, "num_experts": 2, "expert_capacity": 64},
    "bart": BART,
    "mbart": BART,
    "plbart": BART,
    "mvp": BART,
    "blenderbot": BART,
    "blenderbot-small": BART,
    "pegasus": BART,
    "marian": BART,
}
PLAIN = {
    "m2m_100": BART,
    "led": {
        **BART,
        "attention_window": 4,
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
    },
}
SIZES = {**PACKED, **PLAIN}
FEW = ("t5", "umt5", "bart", "pegasus", "m2m_100")


def build(name: str, **sizes) -> torch.nn.Module:
    tokens = {"pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS, "bos_token_id": tiny.BOS}
    values = {"vocab_size": tiny.VOCAB, **tokens, **SIZES[name], **sizes}
    config = transformers.AutoConfig.for_model(name, **values)
    for key, value in list(vars(config).items()):
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def models():
    return {name: build(name) for name in FEW}


tokens = st.integers(3, tiny.VOCAB - 1)
# mBART's decoder starts with the language, the last token of its targets: all choices of a model end alike.
questions = st.lists(
    st.builds(
        Question,
        st.lists(tokens, min_size=1, max_size=9).map(lambda prompt: [*prompt, tiny.EOS]),
        st.lists(st.lists(tokens, max_size=4).map(lambda choice: [*choice, tiny.EOS]), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=4,
)
# Common beginnings, one choice that begins another, one token, repeated places: 2, 3 and 5 choices of 1 to 5 tokens.
MADE = [
    Question([5, 6, 7, 8, 9, 10, 1], [[11, 12, 1], [11, 13, 14, 1], [1]], 1),
    Question([7, 1], [[11, 1], [11, 12, 13, 14, 1]], 0),
    Question([9, 8, 30, 1], [[20, 1], [21, 1], [20, 21, 22, 1], [20, 21, 23, 1], [22, 20, 1]], 4),
]


def alone(model: torch.nn.Module, question: Question) -> list[float]:
    """Each choice's score, from the loss that the model itself computes."""
    with torch.no_grad():
        return [
            -float(model(input_ids=torch.tensor([question.prompt]), labels=torch.tensor([choice])).loss)
            for choice in question.choices
        ]


def scores(model: torch.nn.Module, batch) -> torch.Tensor:
    with torch.no_grad():
        return normalized_scores(scorer(model).log_probs(batch), batch["mask"])


def check(model: torch.nn.Module, found: torch.Tensor, made: list[Question]) -> None:
    compare(found, [alone(model, question) for question in made])


def compare(found: torch.Tensor, wanted: list[list[float]]) -> None:
    for row, expected in zip(found, wanted, strict=True):
        assert row[: len(expected)].tolist() == pytest.approx(expected, abs=2e-5)
        assert row[len(expected) :].tolist() == [-math.inf] * (found.shape[1] - len(expected))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", SIZES)
def test_every_architecture_scores_as_each_choice_alone(name, attention):
    model = build(name)
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"{name} has no {attention} attention")
    batch = scorer(model).collate(MADE)
    assert ("question" not in batch) is (name in PACKED)
    expected = [alone(model, question) for question in MADE]
    compare(scores(model, batch), expected)
    compare(scores(model, scorer(model).family.plain_rows(MADE)), expected)
    asks, read = scorer(model), [replace(question, read=len(question.prompt)) for question in MADE]
    asks.readings = Readings()
    for found, its in zip(asks.score(read), expected, strict=True):
        compare(found[None], [its])
    assert asks.readings.read == 2  # the encoder's states of all but a short prompt are kept
    assert not any("compute_bias" in vars(module) or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", FEW)
@settings(max_examples=15)
@given(made=questions)
def test_any_lengths(models, name, made):
    check(models[name], scores(models[name], scorer(models[name]).collate(made)), made)


@pytest.mark.parametrize("name", FEW)
def test_an_adapters_gradients_are_those_of_the_plain_loss(name):
    """Of T-Few's loss, in float64, through encoder and decoder."""
    model = IA3Model(build(name), IA3Config()).double()
    tiny.randomize(model)
    log_probs, mask, labels = (torch.zeros(3, 5, 5, dtype=torch.float64), torch.zeros(3, 5, 5).bool(), [1, 0, 4])
    for i, question in enumerate(MADE):
        for j, choice in enumerate(question.choices):
            target = torch.tensor([choice])
            logits = model(input_ids=torch.tensor([question.prompt]), labels=target).logits
            found = logits.log_softmax(-1).gather(-1, target[..., None])[0, :, 0]
            log_probs[i, j, : len(choice)] = found
            mask[i, j, : len(choice)] = True
    tfew_loss(log_probs, mask, torch.tensor(labels)).total.backward()
    parameters = tiny.adapter_parameters(model)
    expected = {key: parameter.grad for key, parameter in parameters.items()}
    assert any("encoder" in key for key in expected) and any("decoder" in key for key in expected)
    for layout in (scorer(model).collate(MADE), scorer(model).family.plain_rows(MADE)):
        model.zero_grad()
        tfew_loss(scorer(model).log_probs(layout), layout["mask"], layout["label"]).total.backward()
        for key, parameter in parameters.items():
            assert parameter.grad.abs().max() > 0
            torch.testing.assert_close(parameter.grad, expected[key], atol=1e-5, rtol=1e-4)


def test_common_beginnings_are_computed_once_and_the_encoder_reads_a_prompt_once():
    model, seen = build("t5"), []
    family = scorer(model).family
    batch = family.pack(MADE[:1])
    # The start token, then 11 with 12, 13 and 14 below it; what closes a choice is only predicted.
    assert batch["decoder_input_ids"].tolist() == [[0, 11, 12, 13, 14]]
    assert batch["decoder_position_ids"].tolist() == [[0, 1, 2, 2, 3]]
    attended = (batch["decoder_attention_mask"][0, 0] == 0).int().tolist()
    assert attended == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    assert batch["position"][0].tolist() == [[0, 1, 2, 0], [0, 1, 3, 4], [0, 0, 0, 0]]
    model.encoder.register_forward_hook(lambda *args: seen.append(args[-1].last_hidden_state.shape[0]))
    for layout in (family.pack(MADE), family.plain_rows(MADE)):
        family.log_probs(layout)
    assert seen == [3, 3]


def test_77_choices():
    chance = torch.Generator().manual_seed(0)
    choices = [[*torch.randint(3, 12, (1 + i % 6,), generator=chance).tolist(), 1] for i in range(77)]
    made = [Question([5, 6, 7, 1], choices, 0), Question([9, 1], choices[:40], 3)]
    for name in ("t5", "bart"):
        model = build(name)
        batch = scorer(model).collate(made)
        assert "question" not in batch and batch["decoder_input_ids"].shape[1] < sum(len(c) for c in choices) * 0.7
        check(model, scores(model, batch), made)


@pytest.mark.parametrize("name", ["t5", "bart", "m2m_100"])
def test_each_question_is_answered_by_its_adapter_in_encoder_and_decoder(name):
    model = IA3Model(build(name), {"one": IA3Config(), "two": IA3Config()})
    for seed, adapter in enumerate(model.peft_config):
        tiny.randomize(model, seed, adapter)
    names = ["two", "__base__", "one"]
    mixed = [
        Question(question.prompt, question.choices, adapter=adapter)
        for question, adapter in zip(MADE, names, strict=True)
    ]
    found = scores(model, scorer(model).collate(mixed))
    assert model.ia3_routing.rows is None
    for row, (question, adapter) in enumerate(zip(MADE, names, strict=True)):
        model.ia3_routing.switch(active=() if adapter == "__base__" else (adapter,))
        check(model, found[row : row + 1, : len(question.choices)], [question])


def test_layers_that_are_computed_again_have_plain_rows():
    model = IA3Model(build("t5"), IA3Config())
    tiny.randomize(model)
    gradients = []
    for again in (False, True):
        model.train()
        if again:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = scorer(model).collate(MADE)
        assert ("question" in batch) is again
        model.zero_grad()
        tfew_loss(scorer(model).log_probs(batch), batch["mask"], batch["label"]).total.backward()
        gradients.append([parameter.grad.clone() for parameter in tiny.adapter_parameters(model).values()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert "question" not in scorer(model.eval()).collate(MADE)


def test_threads_do_not_see_each_others_positions():
    """One computes packed rows over and over, others the model itself meanwhile."""
    model = build("t5")
    batch = scorer(model).collate(MADE)
    with torch.no_grad():
        expected = scorer(model).log_probs(batch), model(**tiny.batch("t5")).logits
    wrong, end = [], threading.Event()

    def work(call, right):
        with torch.no_grad():
            while not end.is_set():
                if not torch.equal(call(), right):
                    wrong.append(call)

    calls = (lambda: scorer(model).log_probs(batch), lambda: model(**tiny.batch("t5")).logits)
    threads = [threading.Thread(target=work, args=pair) for pair in zip(calls, expected, strict=True)]
    for thread in threads:
        thread.start()
    end.wait(0.5)
    end.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not any("compute_bias" in vars(module) for module in model.modules())


class TestText:
    """Prompts and choices as the tokenizer closes them."""

    tokenizer = words.closing()

    def test_both_are_closed_and_leading_spaces_mean_nothing(self):
        model = build("t5", vocab_size=len(words.VOCABULARY))
        made = Scorer(model, self.tokenizer).encode(["the tea was"], [[" not good", "good"]])[0]
        ids = words.tokenizer().convert_tokens_to_ids
        assert made.prompt == [*ids(["the", "tea", "was"]), 1]
        assert made.choices == [[*ids(["not", "good"]), 1], [*ids(["good"]), 1]]
        found = score_choices(model, self.tokenizer, ["the tea was"], [["not good", "good"]])
        assert found[0].tolist() == pytest.approx(alone(model, made), abs=2e-5)

    def test_long_prompts_lose_their_beginning_not_their_end_token(self, caplog):
        model = build("bart", vocab_size=len(words.VOCABULARY))
        assert scorer(model).max_length == 64
        long, short = (" ".join(["tea"] * count + ["was"]) for count in (100, 62))
        made = Scorer(model, self.tokenizer).encode([long, short], [["good", "bad"]] * 2)
        assert made[0] == made[1] and len(made[0].prompt) == 64 and made[0].prompt[-1] == 1
        assert "1 prompts are longer" in caplog.text
        assert scorer(build("t5")).max_length is None

    @pytest.mark.parametrize(
        "prompt, texts, message",
        [
            ("tea", ["good", " "], "at least one token"),
            ("", ["good"], "prompt with at least one token"),
            ("tea", ["good " * 70, "bad"], "fewer than 64 tokens, the model's context, found one of 71"),
        ],
    )
    def test_bad_input(self, prompt, texts, message):
        with pytest.raises(InputError, match=message):
            score_choices(build("bart", vocab_size=len(words.VOCABULARY)), self.tokenizer, [prompt], [texts])


def training_arguments(folder, steps: int, **options):
    return Recipe(steps=steps).training_arguments(folder, **options)


TASK = Task(template="review : {{ text }} answer :", choices={"pos": "good", "neg": "not good"})


def adapted(names, name="t5") -> IA3Model:
    base = build(name, vocab_size=len(words.VOCABULARY))
    return IA3Model(base, {each: IA3Config(task_type="SEQ_2_SEQ_LM") for each in names})


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_trainer_learns_a_toy_task(tmp_path, name):
    model = adapted(["default"], name)
    arguments = training_arguments(tmp_path, 30, learning_rate=0.1, save_strategy="no", disable_tqdm=True)
    rows = words.rows(32)
    trainer = TFewTrainer(model, arguments, words.closing(), Member(TASK, rows, eval_rows=rows))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.7 * before["eval_loss"] and after["eval_accuracy"] > 0.9
    found = [item.label for item in predict(model, words.closing(), TASK, rows)]
    assert TASK.metrics([row["label"] for row in rows], found)["accuracy"] == after["eval_accuracy"]


def test_each_member_of_a_fleet_ends_where_it_would_have_ended_alone(tmp_path):
    options = {"learning_rate": 0.05, "save_strategy": "no", "disable_tqdm": True}
    other = Task(name="other", template="{{ text }}", choices={"pos": "good fine", "neg": "bad"})
    members = [Member(TASK, words.rows(10), "a", 0), Member(other, words.rows(12, seed=1), "b", 3)]
    together = adapted("ab").double()
    TFewTrainer(together, training_arguments(tmp_path, 5, **options), words.closing(), members).train()
    for member in members:
        lone = adapted([member.name]).double()
        start = [parameter.clone() for parameter in lone.adapter_parameters(member.name)]
        arguments = training_arguments(tmp_path, 5, seed=member.seed, **options)
        TFewTrainer(lone, arguments, words.closing(), Member(member.task, member.rows)).train()
        pairs = zip(together.adapter_parameters(member.name), lone.adapter_parameters(member.name), start, strict=True)
        for found, expected, first in pairs:
            assert (expected - first).abs().max() > 1e-4
            torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
