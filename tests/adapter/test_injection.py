"""Adapters in a model of one's own, without a wrapper around it: names and values are PEFT's."""

import peft
import pytest
import torch

import ia3
from ia3 import IA3Config, InputError
from support import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


def injected(arch: str, library, adapter: str = "default", seed: int = 1, base=None, **fields):
    targets, feedforward = tiny.TARGETS[arch]
    fields = {"target_modules": targets, "feedforward_modules": feedforward, **fields}
    model = library.inject_adapter_in_model(
        library.IA3Config(**fields), tiny.build(arch) if base is None else base, adapter_name=adapter
    ).eval()
    tiny.randomize(model, seed, adapter)
    return model


def heads(arch: str) -> dict:
    return {"modules_to_save": ["classifier"]} if arch == "bert" else {}


@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5", "bert"])
@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_injected_adapters_are_pefts(arch, adapter):
    ours, theirs = (injected(arch, library, adapter, **heads(arch)) for library in (ia3, peft))
    assert type(ours) is type(theirs) is type(tiny.build(arch))
    assert tiny.relative_error(tiny.logits(ours, arch), tiny.logits(theirs, arch)) <= 1e-6
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == {
        name for name, p in theirs.named_parameters() if p.requires_grad
    }
    found = ia3.get_peft_model_state_dict(ours, adapter_name=adapter)
    expected = peft.get_peft_model_state_dict(theirs, adapter_name=adapter)
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert not any(name.startswith("base_model") or adapter in name.split(".") for name in found)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5", "bert"])
def test_values_are_exchanged_in_both_directions(arch):
    source = {library: injected(arch, library, seed=1, **heads(arch)) for library in (ia3, peft)}
    target = {library: injected(arch, library, seed=2, **heads(arch)) for library in (ia3, peft)}
    expected = tiny.logits(source[ia3], arch)
    assert tiny.relative_error(tiny.logits(target[ia3], arch), expected) > 0.05
    for giver, taker in ((ia3, peft), (peft, ia3)):
        result = taker.set_peft_model_state_dict(target[taker], giver.get_peft_model_state_dict(source[giver]))
        assert result.unexpected_keys == []
        assert tiny.relative_error(tiny.logits(target[taker], arch), expected) <= 1e-6


def test_wrapped_and_injected_models_differ_in_the_prefix_only():
    wrapped = ia3.get_peft_model_state_dict(tiny.adapt("llama", ia3))
    plain = ia3.get_peft_model_state_dict(injected("llama", ia3))
    assert set(wrapped) == {f"base_model.model.{name}" for name in plain}
    assert set(wrapped) == set(peft.get_peft_model_state_dict(tiny.adapt("llama", peft)))
    assert "model.layers.0.self_attn.k_proj.ia3_l" in plain
    other = injected("llama", ia3)
    ia3.set_peft_model_state_dict(other, wrapped)  # as PEFT, which takes the prefix away
    found = ia3.get_peft_model_state_dict(other)
    assert all(torch.equal(found[name], wrapped[f"base_model.model.{name}"]) for name in plain)


def test_an_unknown_adapter_of_an_injected_model_is_named():
    model = injected("llama", ia3)
    for call in (
        lambda: ia3.get_peft_model_state_dict(model, adapter_name="other"),
        lambda: ia3.set_peft_model_state_dict(model, {}, adapter_name="other"),
        lambda: ia3.get_peft_model_state_dict(tiny.build("llama")),
    ):
        with pytest.raises(InputError, match="does not exist in this LlamaForCausalLM"):
            call()


def test_an_injected_adapter_knows_its_config_and_a_second_one_joins_it():
    model = injected("llama", ia3, "one")
    first = tiny.logits(model, "llama")
    injected("llama", ia3, "two", seed=2, base=model)
    assert list(model.peft_config) == ["one", "two"]
    assert tiny.relative_error(tiny.logits(model, "llama"), first) > 0.05
    for name in ("one", "two"):
        tensors = ia3.get_peft_model_state_dict(model, adapter_name=name)
        assert len(tensors) == 3 * tiny.LAYERS
    with pytest.warns(UserWarning, match="adapter 'two' is replaced"):
        injected("llama", ia3, "two", base=model)
    assert list(model.peft_config) == ["one", "two"]


def test_vectors_of_an_injected_adapter_can_wait_for_their_values():
    source = injected("llama", ia3)
    targets, feedforward = tiny.TARGETS["llama"]
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward)
    model = ia3.inject_adapter_in_model(config, tiny.build("llama"), low_cpu_mem_usage=True)
    assert all(p.is_meta for p in tiny.adapter_parameters(model).values())
    ia3.set_peft_model_state_dict(model, ia3.get_peft_model_state_dict(source), low_cpu_mem_usage=True)
    assert torch.equal(tiny.logits(model.eval(), "llama"), tiny.logits(source, "llama"))


def test_a_bad_config_leaves_the_model_alone():
    base = tiny.build("llama")
    before = tiny.state(base)
    with pytest.raises(InputError, match="no_such"):
        ia3.inject_adapter_in_model(IA3Config(target_modules=["no_such"]), base)
    assert tiny.same_bits(base.state_dict(), before)
    assert not hasattr(base, "peft_config")
