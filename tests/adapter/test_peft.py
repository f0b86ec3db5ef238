"""`PeftModel`, the façade around an `IA3Model`, beside PEFT's own."""

import copy
import dataclasses
import inspect
import io
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import ia3
from ia3 import InputError
from ia3.adapter.adapted import NOT_HERE
from support import tiny, zoo
from support.paths import ROOT

BOTH = pytest.mark.parametrize("library", [ia3, peft], ids=["ours", "PEFT's"])


def config(library=ia3, **fields):
    return library.IA3Config(target_modules=["0"], feedforward_modules=[], **fields)


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4))


def small(library=ia3, **fields):
    return library.get_peft_model(base(), config(library, **fields))


# Two objects, with PEFT's names.


@pytest.mark.parametrize("arch", tiny.NAMES)
def test_parameters_and_states_have_pefts_names(arch):
    ours, theirs = (tiny.adapt(arch, library) for library in (ia3, peft))
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_modules()][:3] == ["", "base_model", "base_model.model"]
    theirs.load_state_dict(ours.state_dict())
    assert tiny.relative_error(tiny.logits(theirs, arch), tiny.logits(ours, arch)) < 1e-6


def test_the_facade_holds_the_adapted_model_and_that_holds_the_base_model(llama):
    model = ia3.get_peft_model(llama, ia3.IA3Config(task_type="CAUSAL_LM"))
    assert type(model) is ia3.PeftModelForCausalLM and type(model.base_model) is ia3.IA3Model
    assert model.base_model.model is model.model is model.get_base_model() is llama


@pytest.mark.parametrize("task", [task.value for task in ia3.TaskType] + [None])
def test_the_class_is_the_one_for_the_task_here_and_from_disk(task, tmp_path):
    fields = {"target_modules": ["k_proj"], "feedforward_modules": [], "task_type": task}
    names = []
    for library in (ia3, peft):
        llama = tiny.build("llama")
        if task == "QUESTION_ANS":
            llama.qa_outputs = nn.Linear(4, 2)  # PEFT insists on a head
        model = library.get_peft_model(llama, library.IA3Config(**fields))
        model.save_pretrained(tmp_path / library.__name__)
        names.append(type(model).__name__)
        if library is ia3:
            again = ia3.PeftModel.from_pretrained(
                llama if task == "QUESTION_ANS" else tiny.build("llama"), tmp_path / "ia3", "x"
            )
            assert type(again) is type(model)
    assert names[0] == names[1]


def test_nothing_hides_a_name_of_the_base_model():
    """Of all that we define beyond nn.Module and PEFT, transformers' models have nothing."""
    theirs = {
        *dir(peft.PeftModelForSeq2SeqLM),
        *dir(peft.IA3Model),
        "model",
        "base_model",
        "peft_config",
        "peft_type",
        "training",
    }
    found = {}
    for model_type in ("llama", "t5", "bert", "gpt2", "whisper", "vit", "mixtral", "bart", "xlnet"):
        transformer = zoo.build(model_type)
        own = {*dir(transformer), *(name for module in transformer.modules() for name in module._modules)}
        model = ia3.get_peft_model(zoo.build(model_type), ia3.IA3Config())
        ours = {*dir(type(model)), *vars(model), *dir(ia3.IA3Model), *vars(model.base_model)} - {
            *dir(nn.Module),
            *vars(nn.Module()),
        }
        # Generation and training methods are wrapped on purpose.
        hidden = (ours & own) - theirs - {"_hf_peft_config_loaded", "accepts_loss_kwargs"}
        if hidden:
            found[model_type] = sorted(hidden)
    assert not found


def test_members_of_the_base_model_are_seen_through(llama):
    model = ia3.get_peft_model(tiny.build("llama").model, ia3.IA3Config())
    assert model.layers[0] is model.base_model.model.layers[0] and model.config.model_type == "llama"

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(3, 3)
            for name in ("layers", "bank", "routing", "resolve", "trained_modules", "rows"):
                setattr(self, name, f"mine: {name}")

    mine = ia3.get_peft_model(Mine(), ia3.IA3Config(target_modules=["proj"], feedforward_modules=[]))
    for name in ("layers", "bank", "routing", "resolve", "trained_modules", "rows"):
        assert getattr(mine, name) == getattr(mine.base_model, name) == f"mine: {name}"


@pytest.mark.parametrize("owner", [lambda: small(), lambda: small().base_model], ids=["PeftModel", "IA3Model"])
def test_a_missing_member_is_missed_by_our_name(owner):
    model = owner()
    with pytest.raises(AttributeError, match=f"^'{type(model).__name__}' object has no attribute 'nonsense'"):
        model.nonsense  # noqa: B018
    assert not hasattr(model, "nonsense")


def test_a_member_that_only_peft_has_says_why():
    with pytest.raises(AttributeError, match=r"'PeftModel' object has no attribute 'get_prompt'.*prompt learning"):
        small().get_prompt(1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: reloaded(model)], ids=["deepcopy", "torch.save"])
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_a_copy_is_equal_and_its_own(arch, copied):
    model = tiny.adapt(arch, ia3)
    other = copied(model)
    assert type(other) is type(model)
    assert torch.equal(tiny.logits(other, arch), tiny.logits(model, arch))
    other.disable_adapter_layers()
    assert model.has_active_enabled_adapter and not other.has_active_enabled_adapter


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_trainers_take_it_for_pefts():
    model = small()
    assert isinstance(model, peft.PeftModel) and isinstance(model, ia3.PeftModel)
    assert type(model) is ia3.PeftModel and not issubclass(type(model), peft.PeftModel)
    causal = tiny.adapt("llama", ia3)
    assert isinstance(causal, peft.PeftModelForCausalLM) and causal.__class__.__name__ == "PeftModelForCausalLM"


def test_positional_arguments_are_pefts(llama):
    """PEFT's third one is inputs_embeds, the base model's position_ids."""
    batch = tiny.batch("llama")
    embeds = llama.get_input_embeddings()(batch["input_ids"]).detach()
    found = [
        model(None, batch["attention_mask"], embeds).logits
        for model in (tiny.adapt("llama", ia3), tiny.adapt("llama", peft))
    ]
    assert tiny.relative_error(*found) < 1e-6
    with pytest.raises(InputError, match="task_ids"):
        tiny.adapt("llama", ia3)(**batch, task_ids=torch.tensor([1]))
    with pytest.raises(TypeError, match="at most 8 positional"):
        tiny.adapt("llama", ia3)(*[None] * 9)


# A second time.


@pytest.mark.parametrize("what", ["the base", "the adapted model"])
def test_a_cell_that_runs_again_gives_a_new_adapter_with_a_warning(what):
    x = torch.randn(2, 4)
    transformer = base()
    model = ia3.get_peft_model(transformer, config())
    with torch.no_grad():
        model.get_parameter("base_model.model.0.ia3_l.default").fill_(3.0)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="adapter 'default' is replaced"):
        again = ia3.get_peft_model(transformer if what == "the base" else model, config())
    assert torch.equal(again(x), base()(x)), "the new vector is one, and nothing of the old is left"
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert sum(parameter.requires_grad for parameter in again.parameters()) == 1


def test_a_cell_with_other_modules_leaves_none_of_the_first():
    transformer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ia3.get_peft_model(transformer, config())
    with pytest.warns(UserWarning):
        again = ia3.get_peft_model(transformer, ia3.IA3Config(target_modules=["1"], feedforward_modules=[]))
    assert set(again.base_model.ia3_layers) == {"1"}


def test_a_cell_with_a_mistake_leaves_the_first_model(tmp_path):
    transformer = base()
    model = ia3.get_peft_model(transformer, config())
    with torch.no_grad():
        model.get_parameter("base_model.model.0.ia3_l.default").fill_(3.0)
    expected = model(torch.ones(1, 4))
    wrong = ia3.IA3Config(target_modules=["k_porj"], feedforward_modules=[])
    for call in (
        lambda: ia3.get_peft_model(transformer, wrong),
        lambda: ia3.inject_adapter_in_model(wrong, transformer),
        lambda: ia3.PeftModel.from_pretrained(transformer, tmp_path / "nothing"),
    ):
        with pytest.raises(InputError):
            call()
        assert torch.equal(model(torch.ones(1, 4)), expected) and model.get_nb_trainable_parameters()[0] == 4


@BOTH
@pytest.mark.filterwarnings("ignore")
def test_loading_runs_again(library, tmp_path):
    model = small(library)
    with torch.no_grad():
        model.get_parameter("base_model.model.0.ia3_l.default").fill_(3.0)
    model.save_pretrained(tmp_path)
    transformer = base()
    for _ in range(2):
        again = library.PeftModel.from_pretrained(transformer, tmp_path)
        torch.testing.assert_close(again(torch.ones(1, 4)), model(torch.ones(1, 4)))
    if library is ia3:  # PEFT leaves ones
        other = ia3.PeftModel.from_pretrained(again, tmp_path, adapter_name="b")
        torch.testing.assert_close(other(torch.ones(1, 4)), model(torch.ones(1, 4)))


@BOTH
def test_the_base_model_keeps_its_mode(library):
    transformer = tiny.build("t5").eval()
    model = library.get_peft_model(transformer, library.IA3Config(target_modules=["k"], feedforward_modules=[]))
    assert model.training and not transformer.training


@BOTH
@pytest.mark.parametrize("name", ["SequenceClassification", "TokenClassification"])
def test_a_class_for_a_task_trains_the_head_whatever_the_config_says(library, name):
    fields = {"target_modules": ["key"], "feedforward_modules": []}
    model = getattr(library, f"PeftModelFor{name}")(tiny.build("bert"), library.IA3Config(**fields))
    assert model.get_parameter("base_model.model.classifier.modules_to_save.default.weight").requires_grad


@BOTH
@pytest.mark.filterwarnings("ignore")
def test_generation_settings_of_the_facade_hold(library):
    from transformers import GenerationConfig

    model = tiny.adapt("llama", library)
    model.generation_config = GenerationConfig(max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    assert model.generate(input_ids=torch.tensor([[3, 4]])).shape == (1, 5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["trained", "rescaled"])
def test_folders_that_peft_writes_with_embeddings_load(how, tmp_path):
    fields = {"target_modules": ["k_proj"], "feedforward_modules": []}
    if how == "trained":
        fields["modules_to_save"] = ["embed_tokens", "lm_head"]
    else:
        fields["target_modules"] = ["k_proj", "lm_head"]
    model = peft.get_peft_model(resized(tmp_path / "base").eval(), peft.IA3Config(**fields))
    tiny.randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    batch = {"input_ids": torch.tensor([[3, tiny.VOCAB + 1]])}
    again_base = resized(tmp_path / "base")
    if how == "rescaled":
        nn.init.zeros_(again_base.get_output_embeddings().weight)  # it comes from the folder
    again = ia3.PeftModel.from_pretrained(again_base, tmp_path / "adapter")
    assert tiny.relative_error(again(**batch).logits, model(**batch).logits) < 1e-6


@pytest.mark.filterwarnings("ignore")
def test_embeddings_at_several_places_are_written_once(tmp_path):
    tiny.build("t5").save_pretrained(tmp_path / "base")
    import transformers

    t5 = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    t5.resize_token_embeddings(tiny.VOCAB + 3, mean_resizing=False)
    ours, theirs = (
        library.get_peft_model_state_dict(tiny.adapt("t5", library, base=copy.deepcopy(t5))) for library in (ia3, peft)
    )
    assert set(ours) == set(theirs)


@BOTH
def test_what_layers_say_of_themselves_is_pefts(library):
    model = tiny.adapt("llama", library)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj")
    assert isinstance(layer.get_base_layer(), nn.Linear) and "ia3_l" in layer.adapter_layer_names
    assert (layer.merged, layer.merged_adapters, layer.active_adapters, layer.disable_adapters) == (
        False,
        [],
        ["default"],
        False,
    )
    model.merge_adapter()
    assert layer.merged and layer.merged_adapters == ["default"]
    assert set(model.base_model.targeted_module_names) == set(tiny.adapt("llama", ia3).base_model.ia3_layers)


def test_a_state_is_not_loaded_over_merged_weights():
    model = small()
    state = model.state_dict()
    model.merge_adapter()
    with pytest.raises(InputError, match="unmerge_adapter"):
        model.load_state_dict(state)


def test_infinite_buffers_of_trained_modules_come_back(tmp_path):
    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer("mask", torch.full((2,), -torch.inf))

    fields = {"target_modules": ["0"], "feedforward_modules": [], "modules_to_save": ["1"]}
    ia3.get_peft_model(nn.Sequential(nn.Linear(4, 4), Masked()), ia3.IA3Config(**fields)).save_pretrained(tmp_path)
    ia3.PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4), Masked()), tmp_path)


def test_arguments_of_scripts_are_taken_or_refused(tmp_path):
    model = small()
    with pytest.warns(UserWarning, match="save_function"):
        model.save_pretrained(tmp_path, save_function=torch.save)
    model.save_pretrained(tmp_path, selected_adapters="default")
    with pytest.warns(UserWarning, match="torch_device"):
        model.load_adapter(tmp_path, "b", False, "cpu")
    ia3.PeftModel.from_pretrained(base(), tmp_path, use_safetensors=True)
    with pytest.raises(InputError, match="nonsense"):
        ia3.IA3Config.from_pretrained(tmp_path, nonsense=1)
    with pytest.raises(InputError, match="tags"):
        model.push_to_hub("me/x", tags=["a"])
    with pytest.raises(InputError, match="not a file"):
        config().save_pretrained(tmp_path / "adapter_config.json")
    config().save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "A", "parent_library": "b"})
    assert ia3.IA3Config.from_pretrained(tmp_path).auto_mapping["base_model_class"] == "A"
    assert f"{config(task_type='CAUSAL_LM').task_type}" == "CAUSAL_LM"
    with pytest.warns(UserWarning, match="names the base model 'elsewhere'"):
        ia3.get_peft_model(base(), config(base_model_name_or_path="elsewhere"))


# Counting and state.


@BOTH
def test_nothing_is_trainable_while_adapters_are_off(library, capsys):
    model = small(library)
    with model.disable_adapter():
        model.print_trainable_parameters()
        assert not any(parameter.requires_grad for parameter in model.parameters())
    model.print_trainable_parameters()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" ||")[0] for line in lines] == ["trainable params: 0", "trainable params: 4"]


def test_what_was_frozen_stays_frozen_when_adapters_are_on_again():
    model = small()
    model.set_adapter("default", inference_mode=True)
    with model.disable_adapter():
        model.set_requires_grad("default", False)
    assert model.get_nb_trainable_parameters()[0] == 0
    with model.disable_adapter():
        model.set_requires_grad("default")
        assert model.get_nb_trainable_parameters()[0] == 0
    assert model.get_nb_trainable_parameters()[0] == 4


def state(model) -> dict:
    return dataclasses.asdict(model.get_model_status())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ["llama", "t5", "bert"])
def test_states_are_pefts(arch):
    ours, theirs = (tiny.adapt(arch, library) for library in (ia3, peft))

    def compare():
        assert state(ours) == state(theirs)
        assert [dataclasses.asdict(one) for one in ours.get_layer_status()] == [
            dataclasses.asdict(one) for one in theirs.get_layer_status()
        ]

    compare()
    for model, library in ((ours, ia3), (theirs, peft)):
        targets, second = tiny.TARGETS[arch]
        model.add_adapter("b", library.IA3Config(target_modules=targets, feedforward_modules=second))
    compare()
    for model in (ours, theirs):
        model.base_model.set_adapter("b")
    compare()
    if arch != "bert":  # PEFT does not count heads as merged
        for model in (ours, theirs):
            model.merge_adapter()
        compare()
        for model in (ours, theirs):
            model.unmerge_adapter()
    for model in (ours, theirs):
        model.disable_adapter_layers()
    assert state(ours)["enabled"] is state(theirs)["enabled"] is False
    assert ia3.get_model_status(ours.get_base_model()).adapter_model_type == "None"
    with pytest.raises(InputError, match="No adapter layers"):
        ia3.get_layer_status(tiny.build(arch))


@BOTH
def test_members_beside_the_adapters(library):
    model = tiny.adapt("bert", library)
    assert model.modules_to_save == {"classifier", "score"}
    assert model.base_model_torch_dtype is torch.float32
    assert model.active_peft_config is model.peft_config["default"]
    assert model.has_active_enabled_adapter is True and model.supports_lora_conversion() is False
    assert model.base_model.prefix == "ia3_" and small(library).modules_to_save is None
    assert model.peft_config["default"].is_prompt_learning is model.peft_config["default"].is_adaption_prompt is False
    assert model.base_model.get_model_config(model.get_base_model())["model_type"] == "bert"


@BOTH
def test_the_base_models_state_by_its_own_names(library):
    plain = tiny.build("bert").state_dict()
    model = tiny.adapt("bert", library)
    found = library.get_base_model_state_dict(model)
    assert set(found) == set(plain)
    doubled = {name: value * 2 if value.is_floating_point() else value for name, value in plain.items()}
    assert library.set_base_model_state_dict(model, doubled) == ([], [])
    again = library.get_base_model_state_dict(model)
    assert all(torch.equal(again[name], doubled[name]) for name in doubled)
    with pytest.raises(RuntimeError, match="nonsense"):
        library.set_base_model_state_dict(model, {**doubled, "nonsense": torch.ones(1)})
    assert library.set_base_model_state_dict(model, {"nonsense": torch.ones(1)}, strict=False).unexpected_keys == [
        "nonsense"
    ]


# Arguments.


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_have_the_dtype_that_is_asked_for(library, dtype, tmp_path):
    for autocast, expected in ((True, torch.float32), (False, dtype)):
        model = library.get_peft_model(base().to(dtype), config(library), autocast_adapter_dtype=autocast)
        model.add_adapter("b", config(library), autocast_adapter_dtype=autocast)
        model.save_pretrained(tmp_path / str(autocast))
        again = library.PeftModel.from_pretrained(
            base().to(dtype), tmp_path / str(autocast), autocast_adapter_dtype=autocast
        )
        again.load_adapter(tmp_path / str(autocast), "b", autocast_adapter_dtype=autocast)
        for one in (model, again):
            assert {name: p.dtype for name, p in one.named_parameters() if "ia3_l" in name} == {
                f"base_model.model.0.ia3_l.{name}": expected for name in ("default", "b")
            }


@BOTH
def test_loading_says_what_was_loaded(library, tmp_path):
    model = small(library)
    model.save_pretrained(tmp_path)
    result = model.load_adapter(tmp_path, "b")
    assert result.unexpected_keys == []
    assert library is peft or result.missing_keys == []  # PEFT's says that the other adapter's are missing


def test_what_is_not_honoured_is_refused(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="Unknown arguments 'nonsense'"):
        model.load_adapter(tmp_path, "b", nonsense=1)
    with pytest.raises(InputError, match="ephemeral_gpu_offload"):
        ia3.PeftModel.from_pretrained(base(), tmp_path, ephemeral_gpu_offload=True)
    with pytest.raises(TypeError, match="path_initial_model"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="x")
    with pytest.raises(InputError, match="mixed=False"):
        ia3.get_peft_model(base(), config(), mixed=True)
    with pytest.warns(UserWarning, match="'torch_dtype': ignored"):
        ia3.PeftModel.from_pretrained(base(), tmp_path, torch_dtype=torch.float16)
    assert set(model.peft_config) == {"default"}


@BOTH
def test_names_of_tensors_can_be_mapped(library, tmp_path):
    model = small(library)
    with torch.no_grad():
        model.get_parameter("base_model.model.0.ia3_l.default").fill_(2.0)
    model.save_pretrained(tmp_path)
    moved = nn.ModuleDict({"first": nn.Linear(4, 4)})
    fields = {"config": library.IA3Config(target_modules=["first"], feedforward_modules=[])}
    again = library.PeftModel.from_pretrained(moved, tmp_path, key_mapping={"^0": "first"}, **fields)
    assert again.get_parameter("base_model.model.first.ia3_l.default").eq(2).all()
    found = library.load_peft_weights(tmp_path, device="cpu", key_mapping={"^0": "first"})
    assert list(found) == ["base_model.model.first.ia3_l"]


@BOTH
def test_the_modules_of_a_state_are_the_targets(library):
    tensors = library.get_peft_model_state_dict(tiny.adapt("llama", library))
    names = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    model = library.inject_adapter_in_model(
        library.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), tiny.build("llama"), state_dict=names
    )
    assert set(library.get_peft_model_state_dict(model)) == set(names)
    if library is ia3:
        ia3.set_peft_model_state_dict(model, names)
        assert torch.equal(tiny.logits(model.eval(), "llama"), tiny.logits(tiny.adapt("llama", ia3), "llama"))


@BOTH
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_shapes_can_be_left_out(library):
    model = small(library)
    tensors = {"base_model.model.0.ia3_l": torch.full((5, 1), 2.0)}
    library.set_peft_model_state_dict(model, tensors, ignore_mismatched_sizes=True)
    assert model.get_parameter("base_model.model.0.ia3_l.default").eq(1).all()
    with pytest.raises((InputError, RuntimeError)):
        library.set_peft_model_state_dict(model, tensors)


@BOTH
def test_configs_from_files_and_dictionaries(library, tmp_path):
    config(library, task_type="CAUSAL_LM").save_pretrained(tmp_path)
    fields = library.IA3Config.from_json_file(tmp_path / "adapter_config.json")
    assert fields["peft_type"] == "IA3" and fields["target_modules"] == ["0"]
    for other in (
        library.IA3Config(**fields),
        library.IA3Config.from_peft_type(**fields),
        library.get_peft_config(fields),
    ):
        assert other.target_modules == {"0"} and other.task_type == "CAUSAL_LM"


def test_a_config_without_a_method_is_refused():
    with pytest.raises(InputError, match="Expected a peft_type"):
        ia3.get_peft_config({"task_type": "CAUSAL_LM"})


@BOTH
def test_preparing_and_casting(library):
    llama = tiny.build("llama").bfloat16()
    prepared = library.prepare_model_for_kbit_training(llama)
    assert prepared is llama and {p.dtype for p in llama.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in llama.parameters())
    model = tiny.adapt("llama", library)
    library.cast_mixed_precision_params(model, torch.bfloat16)
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}


@BOTH
def test_checkpointed_layers_get_gradients(library):
    llama = tiny.build("llama")
    llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model = tiny.adapt("llama", library, base=llama).train()
    model(**tiny.batch("llama")).logits.sum().backward()
    assert all(p.grad is not None for p in tiny.adapter_parameters(model).values())


# Resized vocabularies.


def resized(folder: Path, size: int = tiny.VOCAB + 5) -> nn.Module:
    """A tiny Llama from disk, whose vocabulary has grown."""
    import transformers

    if not folder.exists():
        tiny.build("llama").save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


@BOTH
@pytest.mark.filterwarnings("ignore")
def test_embeddings_of_a_resized_vocabulary_come_back(library, tmp_path):
    model = tiny.adapt("llama", library, base=resized(tmp_path / "base"))
    batch = {"input_ids": torch.tensor([[3, tiny.VOCAB + 1, tiny.VOCAB + 4]])}
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    again_base = resized(tmp_path / "base")
    nn.init.zeros_(again_base.get_input_embeddings().weight)
    nn.init.zeros_(again_base.get_output_embeddings().weight)
    again = library.PeftModel.from_pretrained(again_base, tmp_path / "adapter")
    assert torch.equal(again(**batch).logits, expected)


@pytest.mark.filterwarnings("ignore:Setting")
def test_resized_vocabularies_go_both_ways(tmp_path):
    with pytest.warns(UserWarning, match=r"resized from 60 to 65"):
        tiny.adapt("llama", ia3, base=resized(tmp_path / "base")).save_pretrained(tmp_path / "ours")
    tiny.adapt("llama", peft, base=resized(tmp_path / "base")).save_pretrained(tmp_path / "theirs")
    ours, theirs = (ia3.load_peft_weights(tmp_path / name) for name in ("ours", "theirs"))
    assert set(ours) == set(theirs) and len(ours) == 8
    batch = {"input_ids": torch.tensor([[3, tiny.VOCAB + 1]])}
    first = peft.PeftModel.from_pretrained(resized(tmp_path / "base"), tmp_path / "ours")(**batch).logits
    second = ia3.PeftModel.from_pretrained(resized(tmp_path / "base"), tmp_path / "theirs")(**batch).logits
    assert tiny.relative_error(first, second) < 1e-6


def test_embeddings_are_saved_when_asked_and_not_when_not(tmp_path):
    model = tiny.adapt("llama", ia3)
    assert len(ia3.get_peft_model_state_dict(model)) == 6
    assert len(ia3.get_peft_model_state_dict(model, save_embedding_layers=True)) == 8
    model = tiny.adapt("llama", ia3, base=resized(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert len(ia3.load_peft_weights(tmp_path / "adapter")) == 6


def test_a_base_model_that_was_not_resized_is_told_to_be(tmp_path):
    with pytest.warns(UserWarning, match="resized"):
        tiny.adapt("llama", ia3, base=resized(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"65 tokens, the base model has 60; call base.resize_token_embeddings\(65\)"):
        ia3.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert not any(isinstance(module, ia3.IA3Layer) for module in plain.modules())


def test_a_base_model_that_is_gone_is_taken_as_it_is_with_a_warning(tmp_path):
    model = tiny.adapt("llama", ia3, base=resized(tmp_path / "base"))
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="save_embedding_layers=True"):
        assert len(ia3.get_peft_model_state_dict(model)) == 6


# Wrappers.


@pytest.mark.parametrize("wrap", ["compiled", "layer compiled", "DDP-like"])
def test_states_of_wrapped_models_have_plain_names(wrap):
    plain = ia3.get_peft_model_state_dict(tiny.adapt("llama", ia3))
    model = tiny.adapt("llama", ia3)
    outer: nn.Module = model
    if wrap == "compiled":
        outer = torch.compile(model)
    elif wrap == "layer compiled":
        layers = model.base_model.model.model.layers
        layers[0] = torch.compile(layers[0])
    else:
        outer = nn.Module()
        outer.module = model
    found = ia3.get_peft_model_state_dict(outer, unwrap_compiled=True)
    assert set(found) == set(plain)
    gathered = ia3.get_peft_model_state_dict(outer, state_dict=outer.state_dict())
    assert all(torch.equal(gathered[name], plain[name]) for name in plain)
    ia3.set_peft_model_state_dict(outer, {name: value * 2 for name, value in plain.items()})
    again = ia3.get_peft_model_state_dict(outer)
    assert all(torch.equal(again[name], plain[name] * 2) for name in plain)


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


def sharded_by_fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, sharded, sharded_by_fsdp1])
def test_models_of_several_processes_have_plain_names(wrap, one_process, tmp_path):
    x = torch.randn(3, 4)
    plain = small()
    expected, names = plain(x), list(ia3.get_peft_model_state_dict(plain))
    model = wrap(small())
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert list(ia3.get_peft_model_state_dict(model)) == names
    assert list(ia3.get_peft_model_state_dict(model, state_dict=model.state_dict())) == names
    if wrap is sharded:
        assert isinstance(model, ia3.PeftModel) and isinstance(model, peft.PeftModel)
        assert not issubclass(type(model), peft.PeftModel)


def test_names_of_fsdp_and_checkpointing_are_taken_away():
    model = small()
    state = {
        "_fsdp_wrapped_module.base_model.model._checkpoint_wrapped_module.0.ia3_l.default": torch.full((4, 1), 3.0)
    }
    found = ia3.get_peft_model_state_dict(model, state_dict=state)
    assert list(found) == ["base_model.model.0.ia3_l"] and found["base_model.model.0.ia3_l"].eq(3).all()
    ia3.set_peft_model_state_dict(model, {"base_model.model._fsdp_wrapped_module.0.ia3_l": torch.full((4, 1), 5.0)})
    assert model.get_parameter("base_model.model.0.ia3_l.default").eq(5).all()
    with pytest.raises(InputError, match=r"no '0\.ia3_l\.default'"):
        ia3.get_peft_model_state_dict(model, state_dict={})


# Cards.


def test_a_card_names_no_base_model_that_is_not_known(tmp_path):
    small().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "unknown" not in card and "base_model" not in card.split("---")[1]
    tiny.adapt("llama", ia3).create_or_update_model_card(tmp_path / "other")
    assert (tmp_path / "other" / "README.md").exists()


def test_a_card_of_ones_own_is_completed_when_asked_and_keeps_its_text(tmp_path):
    model, card = small(), tmp_path / "README.md"
    card.write_text("mine")
    model.save_pretrained(tmp_path)
    assert card.read_text() == "mine"
    for _ in range(2):
        model.create_or_update_model_card(tmp_path)
        assert "library_name: peft" in card.read_text() and card.read_text().endswith("mine")
        assert card.read_text().count("- ia3") == 1


# All of PEFT's names.


def public(thing) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def missing_names() -> set[str]:
    """PEFT's public names that concern (IA)³ and are not here."""
    method = re.compile(
        r".+(Config|Model|Init|Encoder|Embedding|Type)$|.*(lora|eva|kappa|cartridge|arrow|prefix|prompt|bloom|MAPPING)",
        re.I,
    )
    about_ia3 = {name for name in peft.__all__ if name.startswith(("IA3", "Peft", "AutoPeft", "TaskType"))}
    found = {name for name in peft.__all__ if (name in about_ia3 or not method.match(name)) and not hasattr(ia3, name)}
    for name in ("IA3Model", "IA3Config", "PeftModel", "PeftModelForCausalLM", "PeftModelForSeq2SeqLM"):
        ours, theirs = getattr(ia3, name), getattr(peft, name)
        fields = {field.name for field in dataclasses.fields(ours)} if dataclasses.is_dataclass(ours) else set()
        inherited = public(peft.PeftModel) if name.startswith("PeftModelFor") else public(nn.Module)
        found |= {f"{name}.{member}" for member in public(theirs) - public(ours) - fields - inherited}
    ours, theirs = small(), small(peft)  # what they set on objects
    for name, pair in {"PeftModel": (ours, theirs), "IA3Model": (ours.base_model, theirs.base_model)}.items():
        found |= {f"{name}.{member}" for member in public(pair[1]) if not hasattr(pair[0], member)}
    return found


def test_every_public_name_of_pefts_is_here_or_in_the_list_with_a_reason():
    assert missing_names() == set(NOT_HERE)
    text = (ROOT / "docs" / "adapters.md").read_text()
    for name, why in NOT_HERE.items():
        assert f"| `{name}` | {why} |" in text


def test_arguments_have_pefts_names_and_order():
    """What PEFT takes by position we take by position; its other arguments we take or refuse by name."""
    different = {}
    functions = [name for name in peft.__all__ if inspect.isfunction(getattr(peft, name)) and hasattr(ia3, name)]
    pairs = {name: (getattr(ia3, name), getattr(peft, name)) for name in functions}
    for owner in ("IA3Model", "PeftModel", "PeftModelForCausalLM", "IA3Config"):
        ours, theirs = getattr(ia3, owner), getattr(peft, owner)
        for name in public(theirs) & public(ours):
            if inspect.isroutine(getattr(theirs, name)):
                pairs[f"{owner}.{name}"] = (getattr(ours, name), getattr(theirs, name))
    for name, (ours, theirs) in pairs.items():
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        expected = [p.name for p in inspect.signature(theirs).parameters.values() if p.kind not in kinds]
        found = inspect.signature(ours).parameters
        named = [each for each, p in found.items() if p.kind not in kinds]
        open_ended = any(p.kind in kinds for p in found.values())
        if named[: len(expected)] != expected and not (open_ended and expected[: len(named)] == named):
            different[name] = (named, expected)
    # Refused or of no effect, for they are other methods'.
    allowed = {"from_pretrained", "load_adapter", "save_pretrained", "push_to_hub"}
    assert {name for name in different if name.rpartition(".")[2] not in allowed} == set()


def test_warnings_of_peft_twice_are_no_errors():
    transformer = base()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft.get_peft_model(transformer, config(peft))
        peft.get_peft_model(transformer, config(peft))
    assert caught, "PEFT warns too"
