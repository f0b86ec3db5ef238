"""Query heads that share keys and values read them where they lie, on a processor."""

import inspect
import os
from contextlib import suppress

import pytest
import torch
from transformers.integrations import sdpa_attention

from ia3 import IA3Config, IA3Model
from ia3.scoring import attention
from ia3.scoring.attention import shared_keys
from ia3.scoring.question import Question
from support import tiny
from support.asked import scorer

VARIABLE = "TRANSFORMERS_SDPA_FORCE_GQA"
ON_CPU = torch.nn.Linear(1, 1)
QUESTIONS = [Question([*range(3, 20)], [[3, 4], [5, 6, 7]], label=1), Question([*range(5, 12)], [[9], [8, 4]], label=0)]

pytestmark = pytest.mark.skipif(
    not attention._ABLE or VARIABLE not in inspect.getsource(sdpa_attention),
    reason="this torch or transformers always copies keys",
)


@pytest.fixture
def copied(monkeypatch):
    """How often keys or values are copied for query heads."""
    found, before = [], sdpa_attention.repeat_kv

    def counted(states, count):
        found.append(count)
        return before(states, count)

    monkeypatch.setattr(sdpa_attention, "repeat_kv", counted)
    return found


def gradients(again=False):
    base = tiny.build("llama", num_attention_heads=4, num_key_value_heads=2)
    if again:
        base.gradient_checkpointing_enable()
    model = IA3Model(base, IA3Config(task_type="CAUSAL_LM"))
    tiny.randomize(model, 1)
    asks, total = scorer(model.train(again)), 0
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


def test_layers_that_are_computed_again_do_the_same_twice(copied):
    scores, grads = gradients(again=True)
    assert copied
    wanted, known = gradients()
    torch.testing.assert_close([*scores, *grads], [*wanted, *known], rtol=1e-5, atol=1e-6)


def test_it_ends_with_the_block():
    with shared_keys(ON_CPU), suppress(ZeroDivisionError), shared_keys(ON_CPU):
        assert os.environ[VARIABLE] == "1"
        1 / 0  # noqa: B018
    assert VARIABLE not in os.environ


def test_on_other_devices_nothing_is_said():
    with shared_keys(torch.nn.Linear(1, 1, device="meta")):
        assert VARIABLE not in os.environ
