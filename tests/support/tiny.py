"""Tiny random models of the architectures that the tests go through, a batch for each, and adapters in them.

`import tiny` works in every file under `tests/`, because pytest puts the folder of `conftest.py` on the path.
"""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import nn

HIDDEN, INNER, LAYERS, HEADS, VOCAB, LABELS = 32, 48, 2, 4, 60, 3
PAD, EOS, BOS = 0, 1, 2

_TOKENS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
_WIDTHS = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}

# Sizes by what the architectures call them. `for_model` of another architecture of the same family takes them too.
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": INNER, "n_positions": 64},
    "llama": {**_WIDTHS, "intermediate_size": INNER, "num_key_value_heads": 2},
    "t5": {
        "d_model": HIDDEN,
        "d_kv": HIDDEN // HEADS,
        "d_ff": INNER,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "decoder_start_token_id": PAD,
    },
    "bert": {**_WIDTHS, "intermediate_size": INNER, "max_position_embeddings": 64, "num_labels": LABELS},
    "opt": {**_WIDTHS, "ffn_dim": INNER, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": 64},
    "bart": {
        "d_model": HIDDEN,
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": INNER,
        "decoder_ffn_dim": INNER,
        "max_position_embeddings": 64,
        "decoder_start_token_id": EOS,
        "forced_eos_token_id": None,
    },
}

# For `build`, where one layer shows as much as two, such as to a compiler.
ONE_LAYER = {
    "gpt2": {"n_layer": 1},
    "llama": {"num_hidden_layers": 1},
    "t5": {"num_layers": 1},
    "bert": {"num_hidden_layers": 1},
}

_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "bert": "BertForSequenceClassification",
    "opt": "OPTForCausalLM",
    "bart": "BartForConditionalGeneration",
}

NAMES = tuple(_CLASSES)
GENERATIVE = tuple(name for name in NAMES if name != "bert")

# target_modules and feedforward_modules that both libraries read in the same way.
TARGETS = {
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "opt": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    "bart": (["k_proj", "v_proj", "fc2"], ["fc2"]),
}

TASKS = {
    **dict.fromkeys(("gpt2", "llama", "opt"), "CAUSAL_LM"),
    **dict.fromkeys(("t5", "bart"), "SEQ_2_SEQ_LM"),
    "bert": "SEQ_CLS",
}


def config(name: str, **sizes: Any) -> transformers.PretrainedConfig:
    """A tiny config of an architecture, without dropout."""
    made = transformers.AutoConfig.for_model(name, **{"vocab_size": VOCAB, **_TOKENS, **SIZES[name], **sizes})
    for key, value in list(vars(made).items()):
        if "drop" in key and isinstance(value, float):
            setattr(made, key, 0.0)
    return made


def build(name: str, seed: int = 0, **sizes: Any) -> nn.Module:
    """A tiny model of an architecture, in evaluation mode; one seed gives one model.

    Every parameter is random, biases and norms too, and large enough to make a difference.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, _CLASSES[name])(config(name, **sizes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def classifier(name: str = "bert", seed: int = 0, **sizes: Any) -> nn.Module:
    """A tiny classifier whose matrices are random and large, so that each token makes a difference to the pooled one."""
    known = SIZES["bert" if name == "roberta" else name]
    made = transformers.AutoConfig.for_model(name, **{"vocab_size": VOCAB, **_TOKENS, **known, **sizes})
    for key, value in list(vars(made).items()):
        if "drop" in key and isinstance(value, float):
            setattr(made, key, 0.0)
    model = transformers.AutoModelForSequenceClassification.from_config(made).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(name: str, rows: int = 3, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs for a model's forward pass, with padding and labels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[-1, length - 2 :] = 0
    tokens[mask == 0] = PAD
    if name == "bert":
        labels = torch.arange(rows) % LABELS
    elif name in ("t5", "bart"):
        labels = torch.randint(3, VOCAB, (rows, 5), generator=generator)
    else:
        labels = tokens.masked_fill(mask == 0, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def logits(model: nn.Module, name: str) -> torch.Tensor:
    """What a model answers to `batch(name)`."""
    return model(**batch(name)).logits


def adapt(
    name: str,
    library: ModuleType,
    adapter: str = "default",
    seed: int | None = 1,
    base: nn.Module | None = None,
    **fields: Any,
) -> Any:
    """A tiny model with an adapter that has random vectors, by our library or by PEFT: `adapt("t5", peft)`.

    The modules are those of `TARGETS` unless `fields` of the config say otherwise; `seed=None` leaves vectors as
    they were made.
    """
    targets, feedforward = TARGETS[name]
    fields = {"task_type": TASKS[name], "target_modules": targets, "feedforward_modules": feedforward, **fields}
    model = library.get_peft_model(base or build(name), library.IA3Config(**fields), adapter_name=adapter).eval()
    if seed is not None:
        randomize(model, seed, adapter)
    return model


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by their name in the base model, for ours and PEFT's models alike."""
    return {
        name.removeprefix("base_model.").removeprefix("model."): parameter
        for name, parameter in model.named_parameters()
    }


def adapter_parameters(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """An adapter's parameters by their name in the base model, sorted: vectors and modules to save."""
    return {
        name: parameter
        for name, parameter in sorted(parameters(model).items())
        if name.endswith(f".ia3_l.{adapter}") or f".modules_to_save.{adapter}." in name
    }


def randomize(model: nn.Module, seed: int = 1, adapter: str = "default") -> None:
    """Give an adapter's vectors random values around one, its trained modules random weights; ours and PEFT's the same."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model, adapter).items():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.5 * noise if ".ia3_l." in name else 0.3 * noise)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest deviation, relative to the largest value."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return ((found - expected).abs().max() / expected.abs().max()).item()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a model's parameters and buffers."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether two states have the same names and the same values in all of them."""
    return list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in expected)


def randomized(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """The model with every parameter random."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def check_model(
    base: nn.Module, targets: list[str], feedforward: list[str], call: Callable[[nn.Module], torch.Tensor], count: int
) -> None:
    """Adapted, merged and merged out are one; off is the base; unmerging is exact; every vector's gradient is right.

    All in float64, but for norms and routers, which many models compute in float32. `call(model)` gives the output.
    """
    import ia3

    base = base.double().eval().requires_grad_(False)  # torch itself answers with other bits to what is frozen
    before = state(base)
    with torch.no_grad():
        plain = call(base)
    model = ia3.get_peft_model(base, ia3.IA3Config(target_modules=targets, feedforward_modules=feedforward)).eval()
    assert len(model.ia3_layers) == count
    model.double()
    randomize(model)
    direction = torch.randn(plain.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    adapted = call(model)
    assert relative_error(adapted.detach(), plain) > 0.01
    (adapted * direction).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(call(model), adapted)
        adapted = call(model)
        for path, parameter in adapter_parameters(model).items():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
            values, ends = parameter.clone(), []
            for step in (1e-4, -1e-4):
                parameter.copy_(values + step * noise)
                ends.append((call(model) * direction).sum())
            parameter.copy_(values)
            slope = (parameter.grad * noise).sum().item()
            assert abs(slope) > 1e-3, path
            assert (ends[0] - ends[1]).item() / 2e-4 == pytest.approx(slope, rel=1e-2, abs=1e-2), path
        with model.disable_adapter():
            assert torch.equal(call(model), plain)
        model.merge_adapter()
        torch.testing.assert_close(call(model), adapted, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(call(model), plain)
        model.unmerge_adapter()
        assert torch.equal(call(model), adapted)
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(call(merged), adapted, rtol=1e-5, atol=1e-5)
        assert same_bits(model.unload().state_dict(), before)
