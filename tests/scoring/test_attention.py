"""Query heads that share keys and values read them where they lie, on a processor."""

import os
from contextlib import suppress

import pytest
import torch
from transformers.integrations import sdpa_attention

from ia3 import IA3Config, IA3Model
from ia3.scoring.attention import shared_keys
from ia3.scoring.question import Question
from support import tiny
from support.asked import scorer

VARIABLE = "TRANSFORMERS_SDPA_FORCE_GQA"
CPU = torch.device("cpu")
QUESTIONS = [Question([*range(3, 20)], [[3, 4], [5, 6, 7]], label=1), Question([*range(5, 12)], [[9], [8, 4]], label=0)]


@pytest.fixture
def copied(monkeypatch):
    """How often keys or values are copied for query heads."""
    found, before = [], sdpa_attention.repeat_kv

    def counted(states, count):
        found.append(count)
        return before(states, count)

    monkeypatch.setattr(sdpa_attention, "repeat_kv", counted)
    return found


def gradients():
    base = tiny.build("llama", num_attention_heads=4, num_key_value_heads=2)
    model = IA3Model(base, IA3Config(task_type="CAUSAL_LM"))
    tiny.randomize(model, 1)
    asks, total = scorer(model), 0
    for _, batch in asks.training_batches(QUESTIONS):
        total = total + asks.log_probs(batch).sum()
    total.backward()
    return asks.score(QUESTIONS), [one.grad for one in model.parameters() if one.grad is not None]


def test_nothing_is_copied_and_scores_and_gradients_stay(copied, monkeypatch):
    scores, grads = gradients()
    assert not copied
    monkeypatch.setenv(VARIABLE, "0")  # somebody's own choice
    wanted, known = gradients()
    assert copied and os.environ[VARIABLE] == "0"
    torch.testing.assert_close([*scores, *grads], [*wanted, *known], rtol=1e-5, atol=1e-6)


def test_it_ends_with_the_block():
    with shared_keys(CPU), suppress(ZeroDivisionError), shared_keys(CPU):
        assert os.environ[VARIABLE] == "1"
        1 / 0  # noqa: B018
    assert VARIABLE not in os.environ


def test_on_other_devices_nothing_is_said():
    with shared_keys(torch.device("meta")):
        assert VARIABLE not in os.environ
