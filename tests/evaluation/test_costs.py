"""FLOPs, cache and tokens agree with formulas worked out by hand."""

import pytest
import torch

from ia3 import IA3Config, IA3Model, Prefix, Recipe, Scorer, Task, predict
from ia3.evaluation.costs import (
    cache_bytes_per_token,
    count_flops,
    count_parameters,
    estimated_flops,
    example_flops,
    examples_seen,
    measure,
)
from ia3.scoring.batch import groups, pass_tokens
from ia3.scoring.decoder import pack
from ia3.scoring.question import Question
from ia3.training.members import Steps
from support import tiny, words
from support.asked import scorer

HEADS, WIDTH, KV = tiny.HEADS, tiny.HIDDEN // tiny.HEADS, 2 * (tiny.HIDDEN // tiny.HEADS)


def llama_flops(rows: int, length: int, projected: int, before: int = 0) -> int:
    """A forward pass of the tiny Llama on rows of so many tokens, behind so many cached ones."""
    linear = 2 * tiny.HIDDEN * (2 * tiny.HIDDEN + 2 * KV + 3 * tiny.INNER) * length
    attention = 2 * 2 * HEADS * WIDTH * length * (before + length)
    return rows * (tiny.LAYERS * (linear + attention) + 2 * tiny.HIDDEN * tiny.VOCAB * projected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_flops_of_a_forward_pass(llama, attention, mode):
    llama.set_attn_implementation(attention)
    batch = pack([Question([5, 6, 7], [[8, 9], [10]]), Question([5] * 9, [[8], [10]])])
    with mode(), count_flops() as counter:
        scorer(llama).log_probs(batch)
    assert counter.get_total_flops() == llama_flops(rows=2, length=10, projected=2)


def test_flops_behind_a_prefix(llama):
    tokenizer, task = words.tokenizer(), Task(template="{{ text }}", choices={"pos": "good", "neg": "bad"})
    rows = [{"text": "the tea was"}] * 3
    with count_flops() as counter:
        prefix = Prefix(llama, tokenizer, "tea " * 30)
    assert counter.get_total_flops() == llama_flops(rows=1, length=30, projected=1)
    found = measure(llama, tokenizer, task, rows, prefix)
    assert found.flops == llama_flops(rows=1, length=3, projected=1, before=30)
    assert found.tokens == 33
    assert found.predictions == predict(llama, tokenizer, task, rows, prefix=prefix)
    assert 0 < found.seconds < 5
    # Without the cache, the prefix's pass comes on top.
    assert measure(llama, tokenizer, task, rows).flops == llama_flops(rows=1, length=3, projected=1)


def test_flops_of_many_rows_are_those_of_batches_of_all_lengths(llama):
    tokenizer, task = words.tokenizer(), Task(template="{{ text }}", choices={"pos": "good", "neg": "not bad"})
    rows = [{"text": "tea " * (1 + i % 50)} for i in range(200)]
    seen = []
    found = measure(llama, tokenizer, task, rows, on_progress=seen.extend)
    assert sorted(seen) == list(range(200))
    # "not" is read, "good" and "bad" are only predicted.
    lengths = [1 + i % 50 + 1 for i in range(200)]
    assert found.tokens == sum(lengths) / 200
    asked = Scorer(llama, tokenizer).questions(task.wordings(rows), labelled=False)
    batches = list(groups(asked, pass_tokens(llama)))
    expected = sum(llama_flops(len(group), max(lengths[i] for i in group), projected=2) for group in batches)
    assert len(batches) > 4 and found.flops == pytest.approx(expected / 200, rel=0.02)


def test_answers_are_scored_by_the_recipe(llama):
    task = Task(template="review : {{ text }}", choices={"pos": "good", "neg": "not good"})
    recipe = Recipe(length_normalization=0.0)
    found = measure(llama, words.tokenizer(), task, words.rows(6), recipe=recipe).predictions
    expected = predict(llama, words.tokenizer(), task, words.rows(6), recipe=recipe)
    plain = predict(llama, words.tokenizer(), task, words.rows(6))
    assert [item.scores for item in found] == [item.scores for item in expected]
    assert [item.scores for item in found] != [item.scores for item in plain]


def test_training_costs_twice_a_forward_pass(llama):
    """The base is frozen: the backward pass goes through activations, and through no weights' gradients."""
    llama.set_attn_implementation("eager")
    model = IA3Model(llama, IA3Config())
    task = Task(template="review : {{ text }}", choices={"pos": "good", "neg": "bad"})
    found = example_flops(model, words.tokenizer(), task, words.rows(32), Recipe()).each
    forward = llama_flops(rows=1, length=7, projected=1)
    assert 1.7 * forward < found < 2.1 * forward
    assert all(parameter.grad is None for parameter in model.parameters())
    model.set_requires_grad("default", False)
    model.eval()
    assert example_flops(model, words.tokenizer(), task, words.rows(32), Recipe()).each == found
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
    # As many for an example where there are fewer than a batch takes.
    assert example_flops(model, words.tokenizer(), task, words.rows(2), Recipe()).each == found
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


SHARED = Task(template=f"{'tea ' * 60} {{{{ text }}}}", choices={"pos": "good", "neg": "bad"})


def test_a_beginning_that_rows_share_is_counted_once(llama):
    """As `predict` reads it, whose seconds stand beside."""
    rows = [{"text": word} for word in ["cake soup", "soup cake", "the tea", "a cake"] * 10]
    read = llama_flops(rows=1, length=60, projected=1)
    behind = llama_flops(rows=40, length=2, projected=1, before=60)
    assert measure(llama, words.tokenizer(), SHARED, rows).flops == (read + behind) / 40
    # The same words behind other ones share nothing.
    alone = [{"text": word} for word in ["cake soup", "soup cake"]]
    assert measure(llama, words.tokenizer(), SHARED, alone).flops == llama_flops(rows=1, length=62, projected=1)


def test_a_beginning_that_rows_share_is_read_once_behind_shots_too(llama):
    """So that in-context learning, like the others, has an instruction read once for all rows."""
    rows = [{"text": word} for word in ["cake soup", "soup cake", "the tea", "a cake"] * 10]
    prefix = Prefix(llama, words.tokenizer(), "soup " * 30)
    found = measure(llama, words.tokenizer(), SHARED, rows, prefix)
    read = llama_flops(rows=1, length=60, projected=1, before=30)
    behind = llama_flops(rows=40, length=2, projected=1, before=90)
    assert found.flops == (read + behind) / 40 and found.tokens == 92
    for row, one in zip(rows, found.predictions, strict=True):
        [alone] = predict(llama, words.tokenizer(), SHARED, [row], prefix=prefix)
        assert one.probabilities == pytest.approx(alone.probabilities, abs=1e-5)


def test_training_reads_a_shared_beginning_once_a_step(llama):
    llama.set_attn_implementation("eager")
    model = IA3Model(llama, IA3Config())
    rows = [{"text": word, "label": label} for word, label in [("cake soup", "pos"), ("soup cake", "neg")] * 16]
    found = example_flops(model, words.tokenizer(), SHARED, rows, Recipe()).each
    once = llama_flops(rows=1, length=60, projected=1) / 8 + llama_flops(rows=1, length=2, projected=1, before=60)
    # Of the beginning, the last layer hands on keys and values alone, and so the way back is shorter.
    assert 1.5 * once < found < 2.1 * once
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("rows, batch, steps", [(32, 8, 10), (2, 8, 5), (10, 8, 5), (10, 3, 9), (8, 8, 1), (7, 4, 2)])
def test_examples_seen_are_those_of_the_trainers_batches(tmp_path, rows, batch, steps):
    recipe = Recipe(batch_size=batch, steps=steps)
    arguments = recipe.training_arguments(tmp_path)
    expected = sum(map(len, Steps([list(range(rows))], [0], arguments).steps))
    assert examples_seen(rows, recipe, steps) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes(dtype):
    size = torch.finfo(dtype).bits // 8
    assert cache_bytes_per_token(tiny.build("llama").to(dtype)) == 2 * tiny.LAYERS * 2 * WIDTH * size
    assert cache_bytes_per_token(tiny.build("gpt2").to(dtype)) == 2 * tiny.LAYERS * HEADS * WIDTH * size
    # A decoder's own tokens and the encoder's, four of each: as many bytes for either.
    assert cache_bytes_per_token(tiny.build("t5").to(dtype)) == 2 * tiny.LAYERS * HEADS * WIDTH * size
    prefix = Prefix(tiny.build("llama").to(dtype), words.tokenizer(), "tea " * 20)
    assert prefix.nbytes == 20 * 2 * tiny.LAYERS * 2 * WIDTH * size


def test_the_papers_estimate():
    # T-Few with T0-11B, 103 tokens an example: 1.1e12 to predict, and 2.7e16 to train on 1,000 batches of 8.
    assert estimated_flops(11_000_000_000, 103, encoder_decoder=True) == pytest.approx(1.1e12, rel=0.05)
    assert 8000 * estimated_flops(11_000_000_000, 103, True, training=True) == pytest.approx(2.7e16, rel=0.05)
    # GPT-3 175B with 41 examples of 98 tokens in context: 1.4e15.
    assert estimated_flops(175_000_000_000, 41 * 98 + 103) == pytest.approx(1.4e15, rel=0.05)


def test_parameters_are_the_bases(llama):
    expected = sum(parameter.numel() for parameter in llama.parameters())
    assert count_parameters(llama) == expected
    assert count_parameters(IA3Model(llama, IA3Config())) == expected
