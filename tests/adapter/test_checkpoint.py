"""An adapter on disk and on the hub: PEFT's format both ways, and nothing half done when something is wrong."""

import json
import os
import shutil
import stat
import tempfile
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import peft
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import ia3
from ia3 import IA3Config, IA3Layer, InputError, PeftModel, get_peft_model
from ia3.adapter.trained import TrainedModule
from ia3.files import replacing
from ia3.folder import AdapterFolder
from support import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter name 'a' should not be contained"),  # in PEFT's prefix `ia3_`
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
QUERY, REST = slice(0, tiny.HIDDEN), slice(tiny.HIDDEN, None)


def save(arch: str, folder, library=ia3, **kwargs):
    """A saved adapter with random vectors, and the model that it is from."""
    model = tiny.adapt(arch, library, **kwargs)
    model.save_pretrained(str(folder))
    return model


def stored(folder) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / WEIGHTS)


def rewrite(folder, change) -> None:
    """Save the tensors again after `change(tensors)`."""
    tensors = stored(folder)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def contents(folder) -> dict[str, bytes]:
    """Every file below a folder, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def snapshot(model) -> tuple:
    """All that loading an adapter could change, to be compared by `==`."""
    return (
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, parameter.requires_grad, id(parameter)) for name, parameter in model.named_parameters()],
        {key: value.flatten().tolist() for key, value in model.state_dict().items()},
    )


def one_line(error) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


def close(found, expected) -> bool:
    return tiny.relative_error(found, expected) <= 1e-6


# Both ways.


def test_pefts_checkpoints_load(arch, tmp_path):
    theirs = save(arch, tmp_path, peft)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = PeftModel.from_pretrained(tiny.build(arch), tmp_path)
    assert close(tiny.logits(ours, arch), tiny.logits(theirs, arch))
    assert tiny.relative_error(tiny.logits(ours, arch), tiny.logits(tiny.build(arch), arch)) > 0.05


def test_peft_loads_our_checkpoints(arch, tmp_path):
    ours = save(arch, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.build(arch), str(tmp_path))
    assert close(tiny.logits(theirs, arch), tiny.logits(ours, arch))


def test_peft_loads_checkpoints_of_our_own_defaults(arch, tmp_path):
    """The names in the completed config, ones for the queries of a fused projection."""
    ours = save(arch, tmp_path, target_modules=None, feedforward_modules=None)
    theirs = peft.PeftModel.from_pretrained(tiny.build(arch), str(tmp_path))
    assert close(tiny.logits(theirs, arch), tiny.logits(ours, arch))
    again = PeftModel.from_pretrained(tiny.build(arch), tmp_path)
    assert torch.equal(tiny.logits(again, arch), tiny.logits(ours, arch))


def test_a_trainers_gathered_state_is_saved_alike(arch, tmp_path):
    ours = tiny.adapt(arch, ia3, target_modules=None, feedforward_modules=None)
    ours.save_pretrained(tmp_path, state_dict=ours.state_dict())
    theirs = peft.PeftModel.from_pretrained(tiny.build(arch), str(tmp_path))
    assert close(tiny.logits(theirs, arch), tiny.logits(ours, arch))


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_a_gathered_state_is_what_is_saved(arch, tmp_path):
    """Not what the model holds, which under FSDP is a shard."""
    model = tiny.adapt(arch, ia3)
    gathered = {
        key: value.clone() + 1 if value.is_floating_point() else value for key, value in model.state_dict().items()
    }
    model.save_pretrained(tmp_path, state_dict=gathered)
    for name, parameter in tiny.adapter_parameters(model).items():
        key = "base_model.model." + name.replace(".modules_to_save.default", "").removesuffix(".default")
        assert torch.equal(stored(tmp_path)[key], parameter + 1)


def test_files_are_pefts(arch, tmp_path):
    """Names, shapes, types and values of the tensors, and the config."""
    save(arch, tmp_path / "ours")
    save(arch, tmp_path / "theirs", peft)
    found, expected = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value)
    ours, theirs = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("ours", "theirs"))
    del theirs["peft_version"]
    assert ours == {key: sorted(value) if isinstance(value, list) else value for key, value in theirs.items()} | {
        "modules_to_save": theirs["modules_to_save"]
    }
    assert ours["inference_mode"] is True


def test_without_a_task_the_config_records_the_models_class(tmp_path):
    save("llama", tmp_path / "ours", task_type=None)
    save("llama", tmp_path / "theirs", peft, task_type=None)
    ours, theirs = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("ours", "theirs"))
    assert ours["auto_mapping"] == theirs["auto_mapping"]
    assert ours["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"


def test_names_and_shapes_to_the_letter(tmp_path):
    save("bert", tmp_path, target_modules=["0.attention.self.key", "0.intermediate.dense"], feedforward_modules=None)
    assert {key: tuple(value.shape) for key, value in stored(tmp_path).items()} == {
        "base_model.model.bert.encoder.layer.0.attention.self.key.ia3_l": (tiny.HIDDEN, 1),
        "base_model.model.bert.encoder.layer.0.intermediate.dense.ia3_l": (tiny.INNER, 1),
        "base_model.model.classifier.weight": (tiny.LABELS, tiny.HIDDEN),
        "base_model.model.classifier.bias": (tiny.LABELS,),
    }
    with safe_open(tmp_path / WEIGHTS, framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"


def test_the_input_sides_shape(tmp_path):
    save("gpt2", tmp_path)
    shapes = {key.rpartition("transformer.h.")[2]: tuple(value.shape) for key, value in stored(tmp_path).items()}
    assert shapes["1.attn.c_attn.ia3_l"] == (3 * tiny.HIDDEN, 1)
    assert shapes["1.mlp.c_proj.ia3_l"] == (1, tiny.INNER)


def test_a_module_inside_one_that_another_adapter_saves_is_refused(tmp_path):
    save("llama", tmp_path)
    model = tiny.adapt("llama", ia3, target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["mlp"])
    before = snapshot(model)
    with pytest.raises(ia3.InputError, match=r"Cannot rescale 'model.layers.0.mlp.down_proj' while .* in full"):
        model.load_adapter(tmp_path, "other")
    assert snapshot(model) == before


def test_saving_changes_nothing_in_memory(tmp_path):
    model = tiny.adapt("llama", ia3, task_type=None)
    before, config = snapshot(model), model.peft_config["default"].to_dict()
    model.save_pretrained(tmp_path)
    assert snapshot(model) == before
    assert model.peft_config["default"].to_dict() == config
    assert config["inference_mode"] is False


def test_a_merged_model_saves_the_same_adapter(arch, tmp_path):
    model = save(arch, tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "after")
    assert contents(tmp_path / "before") == contents(tmp_path / "after")


def test_bfloat16_vectors_are_read(tmp_path):
    model = save("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({key: value.bfloat16() for key, value in tensors.items()}))
    loaded = PeftModel.from_pretrained(tiny.build("llama"), tmp_path)
    vectors = tiny.adapter_parameters(loaded)
    assert {vector.dtype for vector in vectors.values()} == {torch.float32}
    for name, parameter in tiny.adapter_parameters(model).items():
        assert torch.equal(vectors[name], parameter.bfloat16().float())


# Names, folders, formats.


def test_named_adapters_go_into_subfolders(tmp_path):
    model = tiny.adapt("llama", ia3)
    model.add_adapter("other", IA3Config(init_ia3_weights=False))
    model.save_pretrained(tmp_path)
    assert set(contents(tmp_path)) == {CONFIG, WEIGHTS, "README.md", f"other/{CONFIG}", f"other/{WEIGHTS}"}
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        model.set_adapter(name)
        theirs = peft.PeftModel.from_pretrained(tiny.build("llama"), str(folder))
        assert close(tiny.logits(theirs, "llama"), tiny.logits(model, "llama"))
    loaded = PeftModel.from_pretrained(tiny.build("llama"), tmp_path, subfolder="other", adapter_name="renamed")
    assert torch.equal(tiny.logits(loaded, "llama"), tiny.logits(model, "llama"))
    assert loaded.active_adapter == "renamed"


def test_selected_adapters_alone_are_saved(tmp_path):
    model = tiny.adapt("llama", ia3)
    for name in ("one", "two"):
        model.add_adapter(name, IA3Config())
    model.save_pretrained(tmp_path, selected_adapters=["two"])
    assert {name for name in contents(tmp_path) if name != "README.md"} == {f"two/{CONFIG}", f"two/{WEIGHTS}"}


def test_an_unknown_adapter_cannot_be_saved(tmp_path):
    with pytest.raises(InputError, match="'two' does not exist"):
        tiny.adapt("llama", ia3).save_pretrained(tmp_path / "new", selected_adapters=["default", "two"])
    assert not (tmp_path / "new").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(InputError, match="directory"):
        tiny.adapt("llama", ia3).save_pretrained(tmp_path / "file")
    assert contents(tmp_path) == {"file": b"text"}


def test_other_processes_write_nothing(tmp_path):
    tiny.adapt("llama", ia3).save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("library", [ia3, peft], ids=["ours", "PEFT's"])
def test_pickled_tensors_load(library, arch, tmp_path):
    model = tiny.adapt(arch, library)
    model.save_pretrained(str(tmp_path), safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists() and not (tmp_path / WEIGHTS).exists()
    loaded = PeftModel.from_pretrained(tiny.build(arch), tmp_path)
    assert close(tiny.logits(loaded, arch), tiny.logits(model, arch))


@pytest.mark.parametrize("last", [True, False], ids=["safetensors", "bin"])
def test_the_format_that_was_saved_last_is_read(last, tmp_path):
    tiny.adapt("llama", ia3, seed=1).save_pretrained(tmp_path, safe_serialization=not last)
    model = tiny.adapt("llama", ia3, seed=2)
    model.save_pretrained(tmp_path, safe_serialization=last)
    loaded = PeftModel.from_pretrained(tiny.build("llama"), tmp_path)
    assert torch.equal(tiny.logits(loaded, "llama"), tiny.logits(model, "llama"))


def test_files_are_as_readable_as_any_other(tmp_path):
    save("llama", tmp_path)
    (tmp_path / "plain").write_text("")
    expected = stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)
    assert {stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in contents(tmp_path)} == {expected}


def test_a_model_card_is_written_once(llama, tmp_path):
    llama.name_or_path = "owner/base"
    save("llama", tmp_path, base=llama)
    card = (tmp_path / "README.md").read_text()
    assert "base_model: owner/base" in card and "library_name: peft" in card
    assert f"{sum(value.numel() for value in stored(tmp_path).values())} learned numbers" in card
    (tmp_path / "README.md").write_text("mine")
    save("llama", tmp_path, seed=2)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_model_without_adapters_has_nothing_to_save(tmp_path):
    model = tiny.adapt("llama", ia3)
    model.delete_adapter("default")
    try:
        model.save_pretrained(tmp_path / "new")
    except InputError as error:
        assert "adapter" in str(error)
    assert not (tmp_path / "new" / WEIGHTS).exists()


# Loading into a model.


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_what_is_trainable_and_the_mode_after_loading_are_pefts(arch, is_trainable, tmp_path):
    save(arch, tmp_path)
    ours, theirs = (
        library.PeftModel.from_pretrained(tiny.build(arch).train(), str(tmp_path), is_trainable=is_trainable)
        for library in (ia3, peft)
    )
    found, expected = (
        {name for name, parameter in tiny.parameters(model).items() if parameter.requires_grad}
        for model in (ours, theirs)
    )
    assert found == expected == (set(tiny.adapter_parameters(ours)) if is_trainable else set())
    assert ours.training is theirs.training is is_trainable
    assert ours.peft_config["default"].inference_mode is not is_trainable


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_beside_another_adapter(is_trainable, arch, tmp_path):
    save(arch, tmp_path, seed=2)
    ours, theirs = tiny.adapt(arch, ia3, adapter="a"), tiny.adapt(arch, peft, adapter="a")
    before = tiny.logits(ours, arch)
    for model in (ours, theirs):
        model.train()
        model.load_adapter(str(tmp_path), "b", is_trainable=is_trainable)
    assert ours.training is theirs.training is is_trainable
    for model in (ours, theirs):
        model.eval()
    assert ours.active_adapter == "a" and list(ours.peft_config) == ["a", "b"]
    assert torch.equal(tiny.logits(ours, arch), before)
    assert {name for name, parameter in tiny.parameters(ours).items() if parameter.requires_grad} == {
        name for name, parameter in tiny.parameters(theirs).items() if parameter.requires_grad
    }
    for model in (ours, theirs):
        model.set_adapter("b")
    assert close(tiny.logits(ours, arch), tiny.logits(theirs, arch))


def test_loading_over_an_adapter_refills_it(arch, tmp_path):
    expected = save(arch, tmp_path, seed=2)
    model = tiny.adapt(arch, ia3, seed=1)
    model.set_adapter("default", inference_mode=True)
    needed = [parameter.requires_grad for parameter in model.parameters()]
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(tiny.logits(model, arch), tiny.logits(expected, arch))
    assert [parameter.requires_grad for parameter in model.parameters()] == needed


def test_refilling_a_default_adapter_with_rescaled_queries_is_not_silent(gpt2, tmp_path):
    expected = save("gpt2", tmp_path)
    model = get_peft_model(gpt2, IA3Config()).eval()
    try:
        model.load_adapter(tmp_path, "default")
    except InputError as error:
        assert "c_attn" in str(error)
    else:
        assert close(tiny.logits(model, "gpt2"), tiny.logits(expected, "gpt2"))


def test_vectors_can_be_made_without_memory_first(arch, tmp_path):
    expected = save(arch, tmp_path)
    model = PeftModel.from_pretrained(tiny.build(arch), tmp_path, low_cpu_mem_usage=True, is_trainable=True).eval()
    model.load_adapter(tmp_path, "b", low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert {name for name, parameter in tiny.parameters(model).items() if parameter.requires_grad} == set(
        tiny.adapter_parameters(model)
    )
    assert torch.equal(tiny.logits(model, arch), tiny.logits(expected, arch))
    model.set_adapter("b")
    assert torch.equal(tiny.logits(model, arch), tiny.logits(expected, arch))


def test_without_memory_there_is_none(llama):
    model = get_peft_model(llama, IA3Config(), low_cpu_mem_usage=True)
    assert all(parameter.is_meta for parameter in tiny.adapter_parameters(model).values())


def test_another_config_can_be_given(tmp_path):
    expected = save("llama", tmp_path)
    (tmp_path / CONFIG).unlink()
    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"])
    model = PeftModel.from_pretrained(tiny.build("llama"), tmp_path, config=config)
    assert torch.equal(tiny.logits(model, "llama"), tiny.logits(expected, "llama"))


def train(model, steps: int = 3) -> None:
    """A few steps with weight decay, which moves also what has no gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.5)
    for _ in range(steps):
        model(**tiny.batch("gpt2")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_a_reloaded_default_adapter_goes_on_without_queries(gpt2, tmp_path):
    model = get_peft_model(gpt2, IA3Config())
    train(model)
    for turn in ("first", "second"):
        model.save_pretrained(tmp_path / turn)
        for key, value in stored(tmp_path / turn).items():
            if "c_attn" in key:
                assert torch.equal(value[QUERY], torch.ones(tiny.HIDDEN, 1))
                assert not (value[REST] == 1).any()
        model = PeftModel.from_pretrained(tiny.build("gpt2"), tmp_path / turn, is_trainable=True)
        model(**tiny.batch("gpt2")).loss.backward()
        for path, layer in model.ia3_layers.items():
            if path.endswith("c_attn"):
                assert torch.equal(layer.ia3_l["default"].grad[QUERY], torch.zeros(tiny.HIDDEN, 1))
        train(model)
    assert contents(tmp_path / "first")[WEIGHTS] != contents(tmp_path / "second")[WEIGHTS]


@pytest.mark.parametrize("library", [ia3, peft], ids=["ours", "PEFT's"])
def test_training_a_reloaded_explicit_adapter_goes_on_with_queries(library, tmp_path):
    save("gpt2", tmp_path, library)
    model = PeftModel.from_pretrained(tiny.build("gpt2"), tmp_path, is_trainable=True)
    model(**tiny.batch("gpt2")).loss.backward()
    fused = [layer for path, layer in model.ia3_layers.items() if path.endswith("c_attn")]
    assert len(fused) == tiny.LAYERS
    assert all((layer.ia3_l["default"].grad[QUERY] != 0).all() for layer in fused)


# Tensors in memory.


def test_tensors_in_memory_are_pefts(arch):
    ours, theirs = (tiny.adapt(arch, library, adapter="a") for library in (ia3, peft))
    for model, library in ((ours, ia3), (theirs, peft)):
        targets, feedforward = tiny.TARGETS[arch]
        config = library.IA3Config(task_type=tiny.TASKS[arch], target_modules=targets, feedforward_modules=feedforward)
        model.add_adapter("b", config)
    for name in "ab":
        found = ia3.get_peft_model_state_dict(ours, adapter_name=name)
        expected = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        assert sorted(found) == sorted(expected)
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
        assert not any(value.requires_grad for value in found.values())


def test_tensors_round_trip_through_memory(arch):
    source, target = tiny.adapt(arch, ia3, seed=1), tiny.adapt(arch, ia3, seed=2, adapter="other")
    expected = tiny.logits(source, arch)
    assert not torch.equal(tiny.logits(target, arch), expected)
    tensors = ia3.get_peft_model_state_dict(source)
    needed = [parameter.requires_grad for parameter in target.parameters()]
    ia3.set_peft_model_state_dict(target, tensors, adapter_name="other")
    assert torch.equal(tiny.logits(target, arch), expected)
    assert [parameter.requires_grad for parameter in target.parameters()] == needed
    tiny.randomize(target, 3, "other")  # and no memory is shared
    assert torch.equal(tiny.logits(source, arch), expected)


def test_an_unknown_adapter_has_no_tensors(llama):
    model = tiny.adapt("llama", ia3, base=llama)
    with pytest.raises(InputError, match="'other' does not exist"):
        ia3.get_peft_model_state_dict(model, adapter_name="other")
    with pytest.raises(InputError, match="'other' does not exist"):
        ia3.set_peft_model_state_dict(model, {}, adapter_name="other")


# What is wrong with a checkpoint, and what the message must hold.

FOREIGN = (
    torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def first(tensors) -> str:
    return next(key for key in sorted(tensors) if key.endswith("ia3_l"))


def lora_folder(folder):
    """A whole adapter of another method."""
    config = peft.LoraConfig(target_modules=["k_proj"])
    peft.get_peft_model(tiny.build("llama"), config).save_pretrained(str(folder))


def cut(size):
    def damage(folder):
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: size if size >= 0 else len(data) + size])

    return damage


def edit_config(**values):
    def damage(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **values}))

    return damage


LAST = "base_model.model.model.layers.1.self_attn.v_proj.ia3_l"
DAMAGES = {
    "missing": (
        lambda folder: rewrite(folder, lambda tensors: tensors.pop(LAST)),
        ["missing", repr(LAST), "expected 6 tensors, found 5"],
    ),
    "all missing": (lambda folder: rewrite(folder, lambda tensors: tensors.clear()), ["missing", "and 3 more"]),
    "surplus": (
        lambda folder: rewrite(folder, lambda tensors: tensors.update({"base_model.model.more": torch.ones(1)})),
        ["surplus", "'base_model.model.more'", "expected 6 tensors, found 7"],
    ),
    "renamed": (
        lambda folder: rewrite(folder, lambda tensors: tensors.update({LAST + ".default": tensors.pop(LAST)})),
        ["missing", repr(LAST), "surplus", repr(LAST + ".default")],
    ),
    "longer": (
        lambda folder: rewrite(folder, lambda tensors: tensors.update({LAST: torch.ones(99, 1)})),
        [LAST, "(99, 1)", f"({tiny.HIDDEN // 2}, 1)"],
    ),
    "transposed": (
        lambda folder: rewrite(folder, lambda tensors: tensors.update({LAST: tensors[LAST].T.contiguous()})),
        [LAST, f"(1, {tiny.HIDDEN // 2})", f"({tiny.HIDDEN // 2}, 1)"],
    ),
    "flat": (
        lambda folder: rewrite(folder, lambda tensors: tensors.update({LAST: tensors[LAST].flatten()})),
        [LAST, f"({tiny.HIDDEN // 2},)"],
    ),
    "NaN": (
        lambda folder: rewrite(folder, lambda tensors: tensors[LAST][3].fill_(float("nan"))),
        ["NaN", repr(LAST)],
    ),
    "infinite": (
        lambda folder: rewrite(folder, lambda tensors: tensors[LAST][0].fill_(float("-inf"))),
        ["infinite", repr(LAST)],
    ),
    "infinite in float32": (
        lambda folder: rewrite(folder, lambda tensors: tensors.update({LAST: tensors[LAST].double() * 1e300})),
        ["infinite in torch.float32", repr(LAST)],
    ),
    **{
        f"of {dtype}": (
            lambda folder, dtype=dtype: rewrite(
                folder, lambda tensors: tensors.update({LAST: tensors[LAST].to(dtype)})
            ),
            [str(dtype), repr(LAST), "torch.float32 is expected"],
        )
        for dtype in FOREIGN
    },
    "cut to nothing": (cut(0), [WEIGHTS, "safetensors"]),
    "cut in the length": (cut(5), [WEIGHTS, "safetensors"]),
    "cut in the header": (cut(100), [WEIGHTS, "safetensors"]),
    "cut in the last byte": (cut(-1), [WEIGHTS, "safetensors"]),
    "text": (lambda folder: (folder / WEIGHTS).write_text("<html>Not found</html>\n" * 20), [WEIGHTS]),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), [WEIGHTS, "Can't find"]),
    "no config": (lambda folder: (folder / CONFIG).unlink(), [CONFIG, "Can't find"]),
    "a cut config": (lambda folder: (folder / CONFIG).write_text('{"peft_type": "IA'), [CONFIG, "JSON"]),
    "a model's config": (lambda folder: (folder / CONFIG).write_text('{"model_type": "llama"}'), [CONFIG, "peft_type"]),
    "another method": (lora_folder, ["'LORA'", "IA3"]),
    "other modules": (edit_config(target_modules=["no_such"], feedforward_modules=[]), ["no_such", "'k_proj'"]),
    "more modules": (
        edit_config(target_modules=["k_proj", "v_proj", "q_proj", "down_proj"]),
        ["missing", "q_proj", "expected 8 tensors, found 6"],
    ),
    "the other side": (edit_config(feedforward_modules=["k_proj", "down_proj"]), ["k_proj", f"(1, {tiny.HIDDEN})"]),
    "no subset": (edit_config(feedforward_modules=["wo"]), ["'wo'", "subset"]),
    "modules to save": (edit_config(modules_to_save=["lm_head"]), ["missing", "'base_model.model.lm_head.weight'"]),
    "modules to save that are not there": (edit_config(modules_to_save=["no_such"]), ["'no_such'", "'lm_head'"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_model_is_as_before(damage, tmp_path):
    harm, expected = DAMAGES[damage]
    save("llama", tmp_path)
    harm(tmp_path)
    model = tiny.build("llama").train()
    model.lm_head.weight.requires_grad_(False)  # a pattern of its own
    before = snapshot(model)
    with pytest.raises(InputError) as error:
        PeftModel.from_pretrained(model, tmp_path)
    assert isinstance(error.value, ValueError)
    message = one_line(error)
    assert [part for part in expected if part not in message] == []
    assert not any(isinstance(module, (IA3Layer, TrainedModule)) for module in model.modules())
    assert snapshot(model) == before


# Sound configs that the tensors do not fit. In place of an adapter, which keeps its own config, they mean nothing.
OF_THE_CONFIG = [name for name in DAMAGES if "modules" in name or name == "the other side"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [("other", name) for name in DAMAGES] + [("default", name) for name in DAMAGES if name not in OF_THE_CONFIG],
)
def test_a_damaged_checkpoint_changes_nothing_in_an_adapted_model(name, damage, tmp_path):
    """Neither as another adapter nor in place of the one that is there."""
    save("llama", tmp_path)
    DAMAGES[damage][0](tmp_path)
    model = tiny.adapt("llama", ia3, seed=2)
    before, config, active = snapshot(model), dict(model.peft_config), model.active_adapters
    with pytest.raises(InputError):
        model.load_adapter(tmp_path, name)
    assert snapshot(model) == before
    assert model.peft_config == config and model.active_adapters == active


def test_an_adapter_for_another_model_is_refused(arch, tmp_path):
    other = {"llama": "bert"}.get(arch, "llama")
    save(other, tmp_path)
    model = tiny.build(arch)
    before = snapshot(model)
    with pytest.raises(InputError) as error:
        PeftModel.from_pretrained(model, tmp_path)
    one_line(error)
    assert snapshot(model) == before


def test_an_adapter_for_a_larger_model_is_refused_by_shape(tmp_path):
    save("llama", tmp_path, base=tiny.build("llama", hidden_size=64))
    model = tiny.build("llama")
    before = snapshot(model)
    with pytest.raises(InputError, match="another base model") as error:
        PeftModel.from_pretrained(model, tmp_path)
    assert "(32, 1), expected (16, 1)" in one_line(error)
    assert snapshot(model) == before


def test_values_are_checked_in_the_type_that_the_model_holds(tmp_path):
    """Vectors and modules trained in full; what float32 holds, float16 may not."""
    save("bert", tmp_path)
    model = tiny.adapt("bert", ia3)
    ia3.PeftModel.from_pretrained(tiny.build("bert"), tmp_path)
    for part in ("ia3_l", "classifier.weight"):
        tensors = stored(tmp_path)
        key = next(key for key in sorted(tensors) if key.endswith(part))
        tensors[key].view(-1)[0] = 1e5
        ia3.set_peft_model_state_dict(model.float(), tensors)
        before = snapshot(model.half())
        with pytest.raises(InputError, match=r"infinite in torch.float16") as error:
            ia3.set_peft_model_state_dict(model, tensors)
        assert repr(key) in one_line(error)
        assert snapshot(model) == before


def test_a_modules_own_integers_are_read():
    """Of another type than its other numbers, and refused in any but their own."""
    norm = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    model = ia3.IA3Model(norm, IA3Config(target_modules=["0"], feedforward_modules=[], modules_to_save=["1"]))
    tensors = ia3.get_peft_model_state_dict(model)
    counter = next(key for key in tensors if key.endswith("num_batches_tracked"))
    ia3.set_peft_model_state_dict(model, {**tensors, counter: torch.tensor(7)})
    assert ia3.get_peft_model_state_dict(model)[counter] == 7
    with pytest.raises(InputError, match=r"torch.float32 in .*num_batches_tracked' where torch.int64 is expected"):
        ia3.set_peft_model_state_dict(model, {**tensors, counter: torch.tensor(7.0)})


def test_tensors_are_set_all_or_none(llama):
    model = tiny.adapt("llama", ia3, base=llama)
    before = snapshot(model)
    tensors = {key: value + 1 for key, value in ia3.get_peft_model_state_dict(model).items()}
    tensors[sorted(tensors)[-1]] = torch.ones(2, 2)
    with pytest.raises(InputError, match=r"\(2, 2\)"):
        ia3.set_peft_model_state_dict(model, tensors)
    assert snapshot(model) == before


@pytest.mark.parametrize("where", ["missing", "missing/deep/folder", "owner/name", "not a name!", "/no/such/folder"])
def test_a_missing_folder_is_named(where, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = snapshot(llama)
    with pytest.raises(InputError) as error:
        PeftModel.from_pretrained(llama, where)
    message = one_line(error)
    assert CONFIG in message and repr(where) in message
    assert snapshot(llama) == before


@pytest.mark.parametrize("reason", [TimeoutError(), OSError("first line\nsecond line"), RuntimeError("")])
@pytest.mark.parametrize("answers", [True, False])
def test_whatever_the_hub_says_is_one_line(reason, answers, llama, monkeypatch):
    monkeypatch.setattr("ia3.files.hub.hub_answers", lambda: answers)

    def fail(*args, **kwargs):
        raise reason

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(InputError) as error:
        PeftModel.from_pretrained(llama, "owner/name")
    assert "'owner/name'" in one_line(error)


def test_the_hub_is_asked_for_the_two_files(llama, tmp_path, monkeypatch):
    expected = save("llama", tmp_path)
    asked = []

    def download(repo_id, filename, **kwargs):
        asked.append((repo_id, filename, kwargs))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("ia3.files.hub.hub_answers", lambda: True)
    model = PeftModel.from_pretrained(llama, "owner/name", subfolder="task", revision="abc", token="secret")
    assert torch.equal(tiny.logits(model, "llama"), tiny.logits(expected, "llama"))
    where = {"subfolder": "task", "revision": "abc", "token": "secret"}
    assert asked == [("owner/name", CONFIG, where), ("owner/name", WEIGHTS, where)]


class Malicious:
    """Runs code when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "wrap", [lambda bad: bad, lambda bad: {LAST: bad}, lambda bad: {LAST: torch.ones(16, 1), "x": bad}]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(wrap, zipped, llama, tmp_path):
    folder = tmp_path / "adapter"
    save("llama", folder)
    (folder / WEIGHTS).unlink()
    torch.save(
        wrap(Malicious(tmp_path / "executed")), folder / "adapter_model.bin", _use_new_zipfile_serialization=zipped
    )
    before = snapshot(llama)
    with pytest.raises(InputError) as error:
        PeftModel.from_pretrained(llama, folder)
    assert "adapter_model.bin" in one_line(error) and "safetensors" in str(error.value)
    assert not (tmp_path / "executed").exists()
    assert snapshot(llama) == before
    # The pickle is what it is meant to be.
    torch.load(folder / "adapter_model.bin", weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content", [[1, 2], "text", 3, None, {}, torch.ones(3), {"name": 1}], ids=lambda value: type(value).__name__
)
def test_a_pickle_of_something_else_is_refused(content, llama, tmp_path):
    save("llama", tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(content, tmp_path / "adapter_model.bin")
    before = snapshot(llama)
    with pytest.raises(InputError) as error:
        PeftModel.from_pretrained(llama, tmp_path)
    one_line(error)
    assert snapshot(llama) == before


def compress(path):
    """Write a file of `torch.save` again as small as it can be, which torch reads."""
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: torch.ones(1, 1).expand(2**40, 1),
        lambda: torch.ones(1, 1).expand(16, 1),
        lambda: torch.ones(16, 1).to_sparse(),
        lambda: torch.ones(16, 1, device="meta"),
        lambda: torch.nested.nested_tensor([torch.ones(16)]),
    ],
    ids=["expanded", "a little", "sparse", "meta", "nested"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:TypedStorage")
def test_a_tensor_without_all_its_numbers_is_refused(bad, llama, tmp_path):
    """What is small in the file is huge, or nothing, in memory."""
    save("llama", tmp_path)
    torch.save({**stored(tmp_path), LAST: bad()}, tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS).unlink()
    before = snapshot(llama)
    with pytest.raises(InputError, match="is no tensor with all its numbers in the file") as error:
        PeftModel.from_pretrained(llama, tmp_path)
    assert repr(LAST) in one_line(error)
    assert snapshot(llama) == before


def test_a_compressed_file_is_refused(llama, tmp_path):
    """A thousand times as much memory as it has bytes is not taken."""
    save("llama", tmp_path)
    torch.save({**stored(tmp_path), LAST: torch.ones(10**6, 1)}, tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS).unlink()
    compress(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match="compressed") as error:
        PeftModel.from_pretrained(llama, tmp_path)
    one_line(error)


@pytest.mark.parametrize("value", [1, "text", None, [1.0]])
def test_a_pickle_with_the_right_names_and_no_tensors_is_refused(value, llama, tmp_path):
    save("llama", tmp_path)
    torch.save(dict.fromkeys(stored(tmp_path), value), tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS).unlink()
    before = snapshot(llama)
    with pytest.raises(InputError) as error:
        PeftModel.from_pretrained(llama, tmp_path)
    one_line(error)
    assert snapshot(llama) == before


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(data=st.binary(max_size=60), place=st.integers(0, 400))
def test_no_bytes_do_worse_than_bad_input(name, data, place):
    """A file with other bytes somewhere is read, or refused in one line; nothing else is raised."""
    tensors = {"base_model.model.k.ia3_l": torch.ones(4, 1)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        if name == WEIGHTS:
            safetensors.torch.save_file(tensors, path)
        else:
            torch.save(tensors, path, _use_new_zipfile_serialization=False)
        good = path.read_bytes()
        path.write_bytes(good[:place] + data + good[place + len(data) :])
        try:
            found, _ = AdapterFolder(folder).vectors()
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert isinstance(found, dict)


# Interrupted.


def interrupt(monkeypatch, target: str, error: BaseException) -> None:
    """Let a function that writes a file write half of it and raise."""

    def write(tensors, path, *args, **kwargs):
        with open(path, "wb") as file:
            file.write(b"half")
        raise error

    monkeypatch.setattr(target, write)


INTERRUPTIONS = pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr
)
WRITERS = pytest.mark.parametrize(("target", "safe"), [("safetensors.torch.save_file", True), ("torch.save", False)])


@WRITERS
@INTERRUPTIONS
def test_an_interrupted_save_leaves_the_former_checkpoint(error, target, safe, tmp_path, monkeypatch):
    former = tiny.adapt("llama", ia3, seed=1)
    former.save_pretrained(tmp_path, safe_serialization=safe)
    before = contents(tmp_path)
    model = tiny.adapt("llama", ia3, seed=2, target_modules=["k_proj"], feedforward_modules=[])
    with monkeypatch.context() as patched:
        interrupt(patched, target, error)
        with pytest.raises(type(error)):
            model.save_pretrained(tmp_path, safe_serialization=safe)
    assert contents(tmp_path) == before
    loaded = PeftModel.from_pretrained(tiny.build("llama"), tmp_path)
    assert torch.equal(tiny.logits(loaded, "llama"), tiny.logits(former, "llama"))


@WRITERS
@INTERRUPTIONS
def test_an_interrupted_first_save_leaves_nothing_that_looks_like_one(error, target, safe, tmp_path, monkeypatch):
    interrupt(monkeypatch, target, error)
    with pytest.raises(type(error)):
        tiny.adapt("llama", ia3).save_pretrained(tmp_path / "new", safe_serialization=safe)
    assert contents(tmp_path) == {}


@INTERRUPTIONS
def test_an_interruption_at_the_config_leaves_the_former_checkpoint(error, tmp_path, monkeypatch):
    save("llama", tmp_path, seed=1)
    before = contents(tmp_path)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("pathlib.Path.write_text", fail)
    with pytest.raises(type(error)):
        save("llama", tmp_path, seed=2)
    assert contents(tmp_path) == before


def test_a_save_that_succeeds_replaces_the_former_checkpoint_whole(tmp_path):
    save("llama", tmp_path, seed=1)
    model = save("llama", tmp_path, seed=2, target_modules=["k_proj"], feedforward_modules=[])
    assert set(contents(tmp_path)) == {CONFIG, WEIGHTS, "README.md"}
    loaded = PeftModel.from_pretrained(tiny.build("llama"), tmp_path)
    assert torch.equal(tiny.logits(loaded, "llama"), tiny.logits(model, "llama"))


def test_an_interrupted_load_takes_the_adapter_out_again(llama, tmp_path, monkeypatch):
    save("llama", tmp_path)
    before = snapshot(llama)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ia3.adapter.checkpoint.set_peft_model_state_dict", fail)
    with pytest.raises(KeyboardInterrupt):
        PeftModel.from_pretrained(llama, tmp_path)
    assert snapshot(llama) == before


def test_replacing_a_file_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("first")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "first"
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("second")
        raise KeyError
    assert contents(tmp_path) == {"new/file.txt": b"first"}


# The hub.


def test_pushing_uploads_what_saving_writes(llama, tmp_path, monkeypatch):
    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, *, private=None, exist_ok=False):
            calls["create"] = (repo_id, private, exist_ok)
            return SimpleNamespace(repo_id="owner/" + repo_id)

        def repo_info(self, repo_id):
            return SimpleNamespace(private=True)

        def upload_folder(self, *, repo_id, folder_path, **kwargs):
            calls["upload"] = (repo_id, kwargs)
            shutil.copytree(folder_path, tmp_path, dirs_exist_ok=True)
            calls["folder"] = folder_path
            return "https://hub/owner/mine/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = tiny.adapt("llama", ia3, base=llama)
    found = model.push_to_hub("mine", private=True, token="secret", revision="main")
    assert found == "https://hub/owner/mine/commit/1"
    assert calls["token"] == "secret" and calls["create"] == ("mine", True, True)
    repo_id, kwargs = calls["upload"]
    assert repo_id == "owner/mine" and kwargs.pop("commit_message") and kwargs == {"revision": "main"}
    assert set(contents(tmp_path)) == {CONFIG, WEIGHTS, "README.md"}
    assert not os.path.exists(calls["folder"])
    loaded = PeftModel.from_pretrained(tiny.build("llama"), tmp_path)
    assert torch.equal(tiny.logits(loaded, "llama"), tiny.logits(model, "llama"))
