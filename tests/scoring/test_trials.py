"""Whether rows are packed is decided on the model in hand, and scores are right either way."""

import math
import random
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given

from ia3 import IA3Config, IA3Model
from ia3.scoring import trials
from ia3.scoring.batch import normalized_scores
from ia3.scoring.decoder import Decoder, plain_rows
from ia3.scoring.question import Question
from ia3.scoring.trials import size_of
from support import tiny
from support.asked import CAUSAL, alone, made, questions, scorer

MADE = (Question([5, 6, 7, 8], [[9, 10], [11, 12, 13], [14]]),)


def packs(model) -> bool:
    return "position_ids" in scorer(model).collate(MADE)


@pytest.mark.parametrize("name", CAUSAL)
def test_packs_where_it_is_exact(name):
    assert packs(tiny.build(name))


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    ],
)
def test_uses_plain_rows_where_it_is_not_and_scores_are_right(name, sizes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        name, vocab_size=tiny.VOCAB, pad_token_id=0, bos_token_id=2, eos_token_id=1, **sizes
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert not packs(model)
    batch = scorer(model).collate(MADE)
    with torch.no_grad():
        scores = normalized_scores(scorer(model).log_probs(batch), batch["mask"])
    assert scores[0].tolist() == pytest.approx(alone(model, MADE[0]), abs=1e-4)


@pytest.mark.parametrize("seed", [0, 6, 11])
def test_a_window_that_hardly_shows_in_the_trial_is_found_out(seed):
    """It is counted over the row's places. The choices that are tried lose little by that, others much."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "window_size": 24}
    sizes |= {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 200}
    model = made("gpt_neo", vocab_size=tiny.VOCAB, **sizes)
    chance = random.Random(seed)

    def some(least: int, most: int) -> list[int]:
        return [chance.randrange(3, tiny.VOCAB) for _ in range(chance.randint(least, most))]

    asked, start = [], some(0, 30)
    for _ in range(8):
        choices: list[list[int]] = []
        while len(choices) < chance.randint(2, 6):
            choice = some(1, 4)
            choices += [] if choice in choices else [choice]
        asked.append(Question([*start, *some(1, 12)], sorted(choices)))
    for question, scores in zip(asked, scorer(model).score(asked), strict=True):
        assert scores.tolist() == pytest.approx(alone(model, question), abs=1e-5)


def test_a_model_that_ignores_position_ids_is_found_out(llama):
    forward = type(llama.model.rotary_emb).forward

    def counting(self, x, position_ids):
        return forward(self, x, torch.arange(x.shape[1])[None].expand(position_ids.shape))

    llama.model.rotary_emb.forward = counting.__get__(llama.model.rotary_emb)
    assert not packs(llama)


@pytest.mark.parametrize("sure", [0.01, 0.5])
def test_a_model_that_is_sure_rounds_no_less(llama, sure):
    """Its scores are near 0, but they are differences of logits, which are not."""
    family, spacing = scorer(llama.bfloat16()).family, torch.finfo(torch.bfloat16).eps
    small, large = (trials.rounding(family, torch.tensor([-sure, -size])) for size in (sure, 8.0))
    assert small >= 3 * spacing and large >= 8 * 3 * spacing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_of_the_model_is_found_out_in_half_precision_too(dtype):
    long = [Question([5, *range(3, 33)], [[9, 10], [11, 12, 13]])]
    assert "position_ids" not in scorer(windowed().to(dtype)).collate(long)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_window_is_found_out_behind_longer_rows_of_many_short_choices(at_once):
    model = windowed()
    wide = Question([5, 6], [[10 + i, 20, 21] for i in range(30)])
    long = Question(list(range(3, 33)), [[40], [41, 42]])
    if not at_once:
        assert "position_ids" in scorer(model).collate([wide])
    questions = [wide, long] if at_once else [long]
    [*_, found], [expected] = (
        normalized_scores(scorer(model).log_probs(batch), batch["mask"])
        for batch in (scorer(model).collate(questions), plain_rows([long]))
    )
    assert torch.allclose(found[:2], expected, atol=1e-5)
    assert "position_ids" in scorer(model).collate([wide])


@pytest.mark.parametrize("still", [[[5], [6]], [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]]], ids=["no tree", "a chain"])
def test_a_long_row_that_moves_nothing_is_no_verdict_on_shorter_ones(still):
    model = alibi()
    moved = Question([5, *range(3, 23)], [[9, 10, 3], [11, 12, 13, 4], [14, 7, 8, 9]])
    assert "position_ids" in scorer(model).collate([Question([5, *range(3, 33)] * 2, still)])
    assert "position_ids" not in scorer(model).collate([moved])


def alibi():
    """A model whose attention counts places, whatever positions it is given."""
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32}
    config = transformers.AutoConfig.for_model("mpt", vocab_size=tiny.VOCAB, **sizes)
    return tiny.randomized(transformers.AutoModelForCausalLM.from_config(config).eval(), 0.15)


def some_questions(count: int) -> list[Question]:
    chance = random.Random(0)

    def some(least: int, most: int) -> list[int]:
        return chance.choices(range(3, tiny.VOCAB), k=chance.randint(least, most))

    return [Question(some(1, 20), [some(1, 4) for _ in range(chance.randint(2, 5))]) for _ in range(count)]


@given(questions)
def test_the_hardest_question_is_no_easier_than_any(made):
    made = [replace(question, choices=sorted(question.choices)) for question in made]
    hardest = size_of(trials.hardest_of(made))
    assert all(a <= b for question in made for a, b in zip(size_of(question), hardest, strict=True))


def test_few_trials_are_made_where_packing_is_wrong(monkeypatch):
    calls, check = [], trials.is_exact_packed
    monkeypatch.setattr(trials, "is_exact_packed", lambda *a: calls.append(1) or check(*a))
    model, asked = alibi(), some_questions(200)
    for question in asked:
        batch = scorer(model).collate([question])
        with torch.no_grad():
            found = normalized_scores(scorer(model).log_probs(batch), batch["mask"])
        assert found[0, : len(question.choices)].tolist() == pytest.approx(alone(model, question), abs=1e-4)
    assert len(calls) < 40


def test_a_question_that_fills_the_context_is_tried_within_it(gpt2):
    limit = gpt2.config.max_position_embeddings
    full, other = Question([5] * (limit - 3), [[6, 7, 8], [9]]), Question([5, 6], [[6, 7, 8, 9, 10, 11], [9]])
    assert "position_ids" in scorer(gpt2).collate([full, other])
    assert "position_ids" in scorer(gpt2).collate([Question([5] * (limit - 1), [[6], [7]])])


def test_one_trial_is_enough_for_rows_that_are_known_at_once(llama, monkeypatch):
    calls, check = [], trials.is_exact_packed
    monkeypatch.setattr(trials, "is_exact_packed", lambda *a: calls.append(1) or check(*a))
    asked = some_questions(50)
    scorer(llama).foresee(asked)
    for question in asked:
        assert "position_ids" in scorer(llama).collate([question])
    assert len(calls) == 1


def windowed():
    """A model whose own mask has a window of 8 tokens."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(
        "mistral", vocab_size=tiny.VOCAB, sliding_window=8, num_key_value_heads=2, **sizes
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def test_a_broken_adapter_is_no_verdict_on_the_model(llama):
    vectors = IA3Model(llama, IA3Config())
    vector = vectors.ia3_layers["model.layers.0.self_attn.k_proj"].ia3_l["default"]
    vector.data[0] = math.nan
    scorer(vectors).collate(MADE)
    vector.data[0] = 1.0
    assert "position_ids" in scorer(vectors).collate(MADE)


def test_nor_is_it_one_for_packing():
    model = alibi()
    weight = model.transformer.norm_f.weight
    weight.data[0], kept = math.nan, weight.data[0].clone()
    scorer(model).collate(MADE)
    weight.data[0] = kept
    assert "position_ids" not in scorer(model).collate(MADE)


def test_a_window_counted_over_the_row_is_found_out_when_rows_reach_it(llama, monkeypatch):
    forward = Decoder.log_probs

    def windowed(self, batch):  # as if the model saw no farther back than 16 places of the row
        if batch["attention_mask"].dim() == 4:
            far = torch.ones(batch["attention_mask"].shape[-2:]).tril(-16).bool()
            batch = {**batch, "attention_mask": batch["attention_mask"].masked_fill(far, -1e9)}
        return forward(self, batch)

    monkeypatch.setattr(Decoder, "log_probs", windowed)
    short, long = ([Question([5, *range(3, 3 + n)], [[9, 10], [11, 12, 13]])] for n in (5, 30))
    assert "position_ids" in scorer(llama).collate(short)
    assert "position_ids" not in scorer(llama).collate(long)
    assert "position_ids" in scorer(llama).collate(short)


def test_is_made_again_for_longer_rows_only_and_leaves_modes_alone(llama, monkeypatch):
    calls = []
    check = trials.is_exact_packed
    monkeypatch.setattr(trials, "is_exact_packed", lambda *a: calls.append(1) or check(*a))
    llama.train()
    llama.model.layers[0].eval()
    for length in (4, 3, 20, 7):
        scorer(llama).collate([Question([5] * length, [[6], [7]])])
    assert len(calls) == 2
    assert llama.training and not llama.model.layers[0].training
