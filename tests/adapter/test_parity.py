"""Ours and PEFT's on the architectures of the contract: each reads the other's adapters with equal answers and gradients."""

import re

import peft
import pytest
import torch

import ia3
from support import tiny, zoo

TYPES = (
    "gpt2 llama t5 bart bert opt gpt_neox bloom falcon phi3 mixtral gpt_oss vit whisper".split()  # noqa: SIM905
)
GATED = {"mt5": {"feed_forward_proj": "gated-gelu"}}
OUTPUTS = {"feedforward_modules": []}
# PEFT cannot rescale experts that are one parameter.
EXPERTS = {"mixtral", "gpt_oss"}


def fields(model_type: str) -> dict[str, list[str]]:
    """Our default choice, or the part of it that PEFT has too, as explicit names."""
    if model_type in EXPERTS:
        return {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}
    config = ia3.IA3Config()
    ia3.IA3Model(zoo.build(model_type), config)
    return {name: sorted(getattr(config, name)) for name in ("target_modules", "feedforward_modules")}


def answer(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    return next(v for v in model(**batch).values() if torch.is_tensor(v) and v.is_floating_point())


def gradients(model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    answer(model, batch).pow(2).sum().backward()
    # A decoder without an encoder has cross-attention that it does not use.
    return {name: p.grad for name, p in tiny.adapter_parameters(model).items() if p.grad is not None}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", TYPES)
def test_explicit_modules_are_pefts_and_files_go_both_ways(model_type, tmp_path):
    names = fields(model_type)
    models = {}
    for library in (ia3, peft):
        base = zoo.build(model_type).eval()
        models[library] = library.get_peft_model(base, library.IA3Config(**names)).eval()
        tiny.randomize(models[library])
    batch = zoo.inputs(zoo.build(model_type))
    ours, theirs = models[ia3], models[peft]
    assert sorted(tiny.adapter_parameters(ours)) == sorted(tiny.adapter_parameters(theirs))
    found, expected = answer(ours, batch), answer(theirs, batch)
    assert tiny.relative_error(found, expected) < 1e-5
    with ours.disable_adapter():
        assert tiny.relative_error(answer(ours, batch), expected) > 1e-4

    grads, peft_grads = gradients(ours, batch), gradients(theirs, batch)
    assert grads.keys() == peft_grads.keys() and len(grads) >= 2 * zoo.LAYERS
    assert all(tiny.relative_error(grads[name], peft_grads[name]) < 1e-3 for name in grads)

    for library, other in ((ia3, peft), (peft, ia3)):
        folder = tmp_path / library.__name__
        models[library].save_pretrained(folder)
        loaded = other.PeftModel.from_pretrained(zoo.build(model_type).eval(), folder).eval()
        assert tiny.relative_error(answer(loaded, batch), expected) < 1e-5
    merged = ours.merge_and_unload()
    assert tiny.relative_error(answer(merged, batch), expected) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in EXPERTS])
def test_peft_reads_an_adapter_with_default_modules(model_type, tmp_path):
    """Also where only the key and value part of a fused projection is rescaled."""
    ours = ia3.IA3Model(zoo.build(model_type).eval(), ia3.IA3Config()).eval()
    tiny.randomize(ours)
    batch = zoo.inputs(zoo.build(model_type))
    expected = answer(ours, batch)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(zoo.build(model_type).eval(), tmp_path).eval()
    assert tiny.relative_error(answer(theirs, batch), expected) < 1e-5
    again = ia3.PeftModel.from_pretrained(zoo.build(model_type).eval(), tmp_path).eval()
    assert torch.equal(answer(again, batch), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["mt5", "llama", "phi3"])
def test_vectors_on_outputs_only_are_those_on_inputs(model_type, tmp_path):
    """mT5's are PEFT's own choice; a gate and its factor in one projection (Phi-3) are told apart."""
    bases = [zoo.build(model_type, **GATED.get(model_type, {})).eval() for _ in range(5)]
    plain = ia3.get_peft_model(bases[0], ia3.IA3Config()).eval()
    ours = ia3.get_peft_model(bases[1], ia3.IA3Config(**OUTPUTS)).eval()
    tiny.randomize(ours)
    for path, layer in ours.ia3_layers.items():
        twin = plain.ia3_layers[re.sub(r"wi_1$", "wo", re.sub(r"\w*up_proj$", "down_proj", path))]
        vector = layer.vector("default").flatten()
        twin.fill("default", vector[-twin.ia3_l["default"].numel() :].view_as(twin.ia3_l["default"]))
    batch = zoo.inputs(bases[0])
    expected = answer(plain, batch)
    assert tiny.relative_error(answer(ours, batch), expected) < 1e-5
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(bases[2], tmp_path / "ours").eval()
    assert tiny.relative_error(answer(theirs, batch), expected) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = ia3.PeftModel.from_pretrained(bases[3], tmp_path / "theirs").eval()
    assert tiny.relative_error(answer(again, batch), expected) < 1e-5
    if model_type == "mt5":
        fresh = peft.get_peft_model(bases[4], peft.IA3Config(**OUTPUTS)).eval()
        assert {k: v.shape for k, v in tiny.adapter_parameters(fresh).items()} == {
            k: v.shape for k, v in tiny.adapter_parameters(ours).items()
        }
        tiny.randomize(fresh)
        assert tiny.relative_error(answer(fresh, batch), expected) < 1e-5


@pytest.mark.parametrize("model_type", sorted(EXPERTS))
def test_experts_are_rescaled_by_default_and_come_back_from_the_file(model_type, tmp_path):
    ours = ia3.IA3Model(zoo.build(model_type).eval(), ia3.IA3Config()).eval()
    tiny.randomize(ours)
    assert sum(path.endswith("experts") for path in ours.ia3_layers) == zoo.LAYERS
    batch = zoo.inputs(zoo.build(model_type))
    ours.save_pretrained(tmp_path)
    again = ia3.PeftModel.from_pretrained(zoo.build(model_type).eval(), tmp_path).eval()
    assert torch.equal(answer(again, batch), answer(ours, batch))
