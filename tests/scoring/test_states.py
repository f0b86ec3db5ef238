"""`Scorer.states`: hidden states of the frozen model, whether a text is read whole or was read before."""

import random
from dataclasses import replace

import pytest
import torch

from ia3 import IA3Config, IA3Model, InputError, Readings
from ia3.scoring.question import Question
from support import tiny
from support.asked import scorer


def asked(prefix: int = 0, count: int = 6) -> list[Question]:
    """Questions of texts of different lengths, which begin alike in so many tokens; the last one begins with the question."""
    chance = random.Random(0)
    shared = chance.choices(range(3, tiny.VOCAB), k=prefix)
    found = []
    for index in range(count):
        text = [*shared, *chance.choices(range(3, tiny.VOCAB), k=5 + 3 * index)]
        tail = chance.choices(range(3, tiny.VOCAB), k=1 + index % 3)
        found.append(Question([*text, *tail], [[3, 4], [5]], read=len(text) if index < count - 1 else 0))
    return found


def expected(base, question: Question) -> torch.Tensor:
    """By a pass of the bare model over the prompt alone."""
    with torch.no_grad():
        layers = base(torch.tensor([question.prompt]), output_hidden_states=True).hidden_states
    end = question.read or len(question.prompt)
    return torch.stack([*(one[0, 1:end].mean(0) for one in layers), *(one[0, -1] for one in layers)])


class TestDecoder:
    @pytest.mark.parametrize("readings", [None, "1MB", "20KB"])
    @pytest.mark.parametrize("prefix", [0, 40])
    def test_means_of_the_text_and_the_last_token(self, readings, prefix):
        base = tiny.build("llama")
        questions = asked(prefix)
        wanted = torch.stack([expected(base, one) for one in questions])
        model = IA3Model(base, IA3Config(task_type="CAUSAL_LM"))
        tiny.randomize(model, 1)
        one = scorer(model)
        one.readings = readings and Readings(readings)
        done = []
        found = one.states(questions, done.extend)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert sorted(done) == list(range(len(questions)))
        # Read before, they are not read again.
        if readings == "1MB":
            read = one.readings.read
            torch.testing.assert_close(one.states(questions), wanted, rtol=1e-4, atol=1e-5)
            assert one.readings.read == read == len(questions) - 1

    def test_adapters_and_choices_do_not_matter(self):
        base = tiny.build("llama")
        model = IA3Model(base, {name: IA3Config(task_type="CAUSAL_LM") for name in ("a", "b")})
        for seed, name in enumerate(("a", "b")):
            tiny.randomize(model, seed, name)
        questions = asked()
        named = [replace(one, adapter="b", choices=[[7]], order=(0,)) for one in questions]
        assert torch.equal(scorer(model).states(questions), scorer(model).states(named))

    def test_layers_of_different_width_have_none_but_are_read(self):
        base = tiny.build("opt", word_embed_proj_dim=16)
        one = scorer(base)
        one.readings = Readings("1MB")
        questions = asked()
        torch.testing.assert_close(
            torch.cat(one.score(questions)), torch.cat(scorer(base).score(questions)), rtol=1e-4, atol=1e-5
        )
        for asks in (one, scorer(base)):
            with pytest.raises(InputError, match="hidden states of one width for all layers, found a OPTForCausalLM"):
                asks.states(questions)

    def test_states_that_are_no_numbers_are_refused(self):
        base = tiny.build("llama")
        base.model.embed_tokens.weight.data[9] = float("nan")
        with pytest.raises(InputError, match=r"hidden states are NaN or infinite \(row 2\); is the base broken\?"):
            scorer(base).states([Question([7, 8], [[3]]), Question([7, 9], [[3]])])

    def test_a_text_of_one_token(self):
        base = tiny.build("llama")
        question = Question([9], [[3]], read=0)
        with torch.no_grad():
            layers = base(torch.tensor([[9]]), output_hidden_states=True).hidden_states
        found = scorer(base).states([question])
        torch.testing.assert_close(found[0], torch.stack([one[0, 0] for one in layers * 2]))


class TestOthers:
    def test_an_encoder_decoder_gives_means_of_its_encoder(self):
        base = tiny.build("t5")
        questions = [replace(one, read=len(one.prompt)) for one in [*asked(), Question([7, 8], [[3]])]]
        found = scorer(base).states(questions)
        one = scorer(base)
        one.readings = Readings("1MB")
        torch.testing.assert_close(one.states(questions[:-1]), found[:-1], rtol=1e-4, atol=1e-5)
        assert one.readings.read == len(questions) - 1
        for question, states in zip(questions, found, strict=True):
            with torch.no_grad():
                layers = base.get_encoder()(torch.tensor([question.prompt]), output_hidden_states=True).hidden_states
            torch.testing.assert_close(states, torch.stack([one[0].mean(0) for one in layers]), rtol=1e-4, atol=1e-5)

    def test_a_classifier_is_refused(self):
        with pytest.raises(InputError, match="Expected a language model, found a BertForSequenceClassification"):
            scorer(tiny.build("bert")).states(asked())
