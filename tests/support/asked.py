"""Questions for any causal model, their scores one row at a time, and models whose layouts differ."""

import functools

import torch
import transformers
from hypothesis import strategies as st

from ia3 import Scorer
from ia3.scoring.question import Question
from support import tiny, words

CAUSAL = ("gpt2", "llama", "opt")

tokens = st.integers(3, tiny.VOCAB - 1)
questions = st.lists(
    st.builds(
        Question,
        st.lists(tokens, min_size=1, max_size=9),
        st.lists(st.lists(tokens, min_size=1, max_size=4), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=4,
)


_tokenizer = functools.cache(words.tokenizer)


def scorer(model: torch.nn.Module) -> Scorer:
    """Asks a model; the tokenizer only says which token is padding."""
    return Scorer(model, _tokenizer())


def alone(model: torch.nn.Module, question: Question, power: float = 1.0) -> list[float]:
    """Each choice's score from a forward pass of its own, summed in float64."""
    scores = []
    for choice in question.choices:
        ids = torch.tensor([question.prompt + choice])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        places = range(len(question.prompt) - 1, ids.shape[1] - 1)
        total = sum(float(log_probs[place, ids[0, place + 1]]) for place in places)
        scores.append(total / len(choice) ** power)
    return scores


COMMON = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": tiny.VOCAB}
_MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": tiny.VOCAB}


_BOTH = ("eager", "sdpa")

# Sizes of each architecture, its attentions, and how rows continue a prefix in it.
LAYOUTS = {
    "gpt2": ({}, _BOTH, "packed"),
    "llama": ({}, _BOTH, "packed"),
    "opt": ({}, _BOTH, "packed"),
    "qwen2": ({**COMMON, "use_sliding_window": False}, _BOTH, "packed"),
    "gemma": ({**COMMON, "head_dim": 8}, _BOTH, "packed"),
    "mistral": ({**COMMON, "sliding_window": 8}, _BOTH, "plain"),  # a window: the model itself has to make the mask
    "bloom": (_BLOOM, (None,), "plain"),
    "mamba": (_MAMBA, (None,), "whole"),
}


def made(name: str, **sizes) -> torch.nn.Module:
    """A tiny random model of any architecture."""
    if name in tiny.NAMES:
        return tiny.build(name, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, **sizes)
        return tiny.randomized(transformers.AutoModelForCausalLM.from_config(config).eval(), 0.2)
