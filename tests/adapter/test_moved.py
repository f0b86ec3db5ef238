"""How far vectors are from ones, by layer and kind, against the formula."""

import pytest
import torch

import ia3
from ia3.adapter.moved import moved
from support import tiny


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("llama", {"key", "value", "feed-forward"}),
        ("gpt2", {"key and value", "feed-forward"}),
        ("bert", {"key", "value", "feed-forward"}),
        ("t5", {f"{part} {kind}" for part in ("encoder", "decoder") for kind in ("key", "value", "feed-forward")}),
    ],
)
def test_kinds_of_each_family(name, kinds):
    model = ia3.get_peft_model(tiny.build(name), ia3.IA3Config(task_type=tiny.TASKS[name]))
    found = moved(model, "default")
    assert set(found) == kinds
    assert all([*layers] == [0, 1] for layers in found.values())
    assert all(value == 0 for layers in found.values() for value in layers.values())


def test_means_are_over_the_numbers_that_act():
    model = ia3.get_peft_model(tiny.build("t5"), ia3.IA3Config(task_type="SEQ_2_SEQ_LM"))
    tiny.randomize(model)
    # Keys of self-attention and of attention to the encoder are in one layer.
    paths = [path for path in model.ia3_layers if path.startswith("decoder.block.1.") and path.endswith(".k")]
    values = torch.cat([model.ia3_layers[path].held["default"].value.flatten() for path in paths])
    assert len(paths) == 2
    assert moved(model, "default")["decoder key"][1] == pytest.approx((values - 1).abs().mean().item())


def test_of_a_fused_projection_only_keys_and_values_count():
    model = ia3.get_peft_model(tiny.build("gpt2"), ia3.IA3Config(task_type="CAUSAL_LM"))
    before = moved(model, "default")["key and value"][0]
    with torch.no_grad():
        [path] = [path for path in model.ia3_layers if ".0." in path and path.endswith("c_attn")]
        model.ia3_layers[path].held["default"].value += 0.25
    assert before == 0 and moved(model, "default")["key and value"][0] == pytest.approx(0.25)


def test_other_modules_have_their_names_and_other_adapters_do_not_count():
    model = ia3.get_peft_model(tiny.build("llama"), ia3.IA3Config(target_modules=["o_proj"], feedforward_modules=[]))
    model.add_adapter("other", ia3.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    assert set(moved(model, "default")) == {"o_proj"} and set(moved(model, "other")) == {"key"}
