"""An adapter's vectors on the layers of an engine that fuses projections."""

import json

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from ia3 import IA3Config, get_peft_model
from ia3.errors import InputError
from ia3.vllm.placing import Layer, place, read_config, read_vectors
from support import tiny

QKV = Layer(("attn.q_proj", "attn.k_proj", "attn.v_proj"), (8, 4, 4), 6)
DOWN = Layer(("mlp.down_proj",), (6,), 10)
LAYERS = {"attn.qkv_proj": QKV, "mlp.down_proj": DOWN}


def test_outputs_go_to_their_part_and_inputs_to_the_whole_layer():
    key, down = torch.rand(4, 1), torch.rand(1, 10)
    placed = place({"attn.k_proj": key, "mlp.down_proj": down}, LAYERS, "a")
    assert set(placed) == set(LAYERS)
    assert placed["attn.qkv_proj"].inputs is None and placed["mlp.down_proj"].outputs == [None]
    first, second, third = placed["attn.qkv_proj"].outputs
    assert first is None and second is key and third is None and placed["mlp.down_proj"].inputs is down


@given(st.data())
def test_each_vector_lands_once_or_is_refused(data):
    widths = data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    inputs = data.draw(st.integers(2, 5))
    layers = {
        f"layer{n}.all": Layer(tuple(f"layer{n}.p{i}" for i in range(len(widths))), tuple(widths), inputs)
        for n in range(2)
    }
    parts = [(path, i, part) for path, layer in layers.items() for i, part in enumerate(layer.parts)]
    chosen = data.draw(st.lists(st.sampled_from(parts), min_size=1, unique=True))
    vectors = {part: torch.rand(widths[i], 1) for _, i, part in chosen}
    placed = place(vectors, layers, "a")
    found = {
        layers[path].parts[i]: vector
        for path, scales in placed.items()
        for i, vector in enumerate(scales.outputs)
        if vector is not None
    }
    assert found.keys() == vectors.keys() and all(found[part] is vectors[part] for part in vectors)
    assert set(placed) == {path for path, _, _ in chosen}


@pytest.mark.parametrize(
    "vectors, message",
    [
        ({"attn.key": torch.ones(4, 1)}, "'attn.key', expected modules among 'down_proj', 'k_proj'"),
        ({"attn.k_proj": torch.ones(5, 1)}, r"attn.k_proj is \(5, 1\), expected \(4, 1\)"),
        ({"mlp.down_proj": torch.ones(1, 9)}, r"mlp.down_proj is \(1, 9\), expected \(1, 10\)"),
        ({"mlp.down_proj": torch.ones(2, 1, 10)}, r"\(2, 1, 10\), expected"),
        ({"attn.v_proj": torch.full((4, 1), torch.nan)}, "NaN or infinite values in 'attn.v_proj'"),
        ({"attn.v_proj": torch.full((4, 1), torch.inf)}, "NaN or infinite values in 'attn.v_proj'"),
        (
            {"attn.v_proj": torch.full((4, 1), 1e300, dtype=torch.float64)},
            "'attn.v_proj' that are infinite in torch.float32",
        ),
        ({"attn.v_proj": torch.ones(4, 1, dtype=torch.int64)}, "torch.int64 in 'attn.v_proj'"),
        ({"attn.v_proj": torch.ones(4, 1).to(torch.float8_e4m3fn)}, "torch.float8_e4m3fn in 'attn.v_proj'"),
        ({"attn.q_proj": torch.ones(1, 6)}, "input of 'attn.q_proj', which is fused with 'k_proj', 'v_proj'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(vectors, message):
    with pytest.raises(InputError, match=message) as raised:
        place(vectors, LAYERS, "tickets")
    assert "'tickets'" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "layer, message",
    [
        (Layer(("a.b",), (3,), 5, bias_apart=True), "skip_bias_add"),
        (Layer(("a.b",), (3,), 5, other_order=True), "another order"),
    ],
)
def test_an_output_that_cannot_be_reached_is_refused_but_not_the_input(layer, message):
    with pytest.raises(InputError, match=message):
        place({"a.b": torch.ones(3, 1)}, {"a.b": layer}, "tickets")
    assert place({"a.b": torch.ones(1, 5)}, {"a.b": layer}, "tickets")["a.b"].inputs is not None


def test_another_workers_layers_are_no_error():
    vectors = {"layers.0.k_proj": torch.ones(4, 1), "layers.1.k_proj": torch.ones(4, 1)}
    layers = {"layers.0.k_proj": Layer(("layers.0.k_proj",), (4,), 6)}
    assert list(place(vectors, layers, "a", lambda path: path.startswith("layers.1."))) == ["layers.0.k_proj"]
    with pytest.raises(InputError, match=r"layers\.1\.k_proj"):
        place(vectors, layers, "a", lambda path: path.startswith("layers.2."))


@pytest.mark.parametrize("library", ["ia3", "peft"])
def test_folders_of_both_libraries_are_read(library, tmp_path):
    if library == "ia3":  # the paper's default, resolved by us
        model = get_peft_model(tiny.build("llama"), IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False))
    else:
        targets, feedforward = tiny.TARGETS["llama"]
        config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward, init_ia3_weights=False)
        model = peft.get_peft_model(tiny.build("llama"), config)
    model.save_pretrained(tmp_path)
    config, vectors = read_vectors(tmp_path, "a")
    assert config.target_modules and config.acts_from == "start"
    saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert len(vectors) == 3 * tiny.LAYERS and "model.layers.1.mlp.down_proj" in vectors
    assert torch.equal(
        vectors["model.layers.0.self_attn.k_proj"], saved["base_model.model.model.layers.0.self_attn.k_proj.ia3_l"]
    )
    keys = tiny.HIDDEN // tiny.HEADS * 2
    layers = {}
    for number in range(tiny.LAYERS):
        attention, down = f"model.layers.{number}.self_attn", f"model.layers.{number}.mlp.down_proj"
        names = tuple(f"{attention}.{name}_proj" for name in "qkv")
        layers[f"{attention}.qkv_proj"] = Layer(names, (tiny.HIDDEN, keys, keys), tiny.HIDDEN)
        layers[down] = Layer((down,), (tiny.HIDDEN,), tiny.INNER)
    placed = place(vectors, layers, "a")
    assert all(scales.inputs is not None or scales.outputs[0] is None for scales in placed.values())
    assert len(placed) == 2 * tiny.LAYERS


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"Can't find 'adapter_config.json'"):
        read_vectors(tmp_path, "a")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(InputError, match=r"Can't find 'adapter_model.safetensors'"):
        read_vectors(tmp_path, "a")
    torch.save({"base_model.model.k.ia3_l": torch.ones(4, 1)}, tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"Can't find 'adapter_model.safetensors'"):
        read_vectors(tmp_path, "a")
    safetensors.torch.save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="holds no vectors"):
        read_vectors(tmp_path, "a")
    safetensors.torch.save_file(
        {"base_model.model.k.ia3_l": torch.ones(4, 1), "base_model.model.score.weight": torch.ones(2, 4)},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(InputError, match=r"'base_model.model.score.weight', modules_to_save"):
        read_vectors(tmp_path, "a")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="Expected a whole safetensors file"):
        read_vectors(tmp_path, "a")


def test_a_config_says_whether_an_adapter_is_ia3(tmp_path):
    assert read_config(tmp_path) is None and read_config(tmp_path / "gone") is None
    path = tmp_path / "adapter_config.json"
    path.write_text('{"peft_type": "IA3"')
    with pytest.raises(InputError, match="Expected JSON in"):
        read_config(tmp_path)
    for text in ("[]", '{"peft_type": "LORA"}', "{}"):
        path.write_text(text)
        assert read_config(tmp_path) is None
    for acts_from in ("start", "question"):
        config = IA3Config(task_type="CAUSAL_LM", acts_from=acts_from)
        config.save_pretrained(tmp_path)
        assert read_config(tmp_path) == config
