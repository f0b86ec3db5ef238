"""`IA3Model` beside PEFT's: outputs, gradients, switching, composing, merging, taking out."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
import transformers

import ia3
from ia3 import IA3Config, IA3Layer, IA3Model, InputError, PeftModel, get_peft_model
from ia3.adapter.trained import TrainedModule
from support import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter name 'a' should not be contained"),  # in PEFT's prefix `ia3_`
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
]

BOTH = pytest.mark.parametrize("library", [ia3, peft], ids=["ours", "PEFT's"])


def pair(arch: str, **kwargs):
    """The same adapter, by us and by PEFT."""
    return tiny.adapt(arch, ia3, **kwargs), tiny.adapt(arch, peft, **kwargs)


def add(model, arch: str, adapter: str, seed: int, **fields) -> None:
    """Another adapter with random vectors, into our model or PEFT's."""
    library = ia3 if isinstance(model, ia3.PeftModel) else peft
    targets, feedforward = tiny.TARGETS[arch]
    fields = {
        "task_type": tiny.TASKS[arch],
        "target_modules": targets,
        "feedforward_modules": feedforward,
        **fields,
    }
    # A façade for a task adds its head to each adapter, as PEFT's does; the model in it does not.
    adding = model.base_model if library is ia3 and fields["task_type"] is None else model
    adding.add_adapter(adapter, library.IA3Config(**fields))
    tiny.randomize(model, seed, adapter)


def two(arch: str = "llama", **fields):
    """Our model with two adapters, `a` (active) and `b`."""
    model = tiny.adapt(arch, ia3, adapter="a", seed=1)
    add(model, arch, "b", 2, **fields)
    return model


def adapted_modules(model) -> list:
    return [module for module in model.modules() if isinstance(module, (IA3Layer, TrainedModule))]


def trainable(model) -> set[str]:
    return {name for name, parameter in tiny.parameters(model).items() if parameter.requires_grad}


def one_line(error) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


def close(found, expected, tolerance=1e-6) -> bool:
    return tiny.relative_error(found, expected) <= tolerance


# Numbers: PEFT's.


def test_outputs_are_pefts(arch):
    ours, theirs = pair(arch)
    found, expected = ours(**tiny.batch(arch)), theirs(**tiny.batch(arch))
    assert close(found.logits, expected.logits)
    assert abs(found.loss - expected.loss) <= 1e-6 * expected.loss
    assert tiny.relative_error(found.logits, tiny.build(arch)(**tiny.batch(arch)).logits) > 0.05


def test_gradients_are_pefts(arch):
    ours, theirs = pair(arch)
    for model in (ours, theirs):
        model(**tiny.batch(arch)).loss.backward()
    found, expected = tiny.adapter_parameters(ours), tiny.adapter_parameters(theirs)
    assert list(found) == list(expected) and len(found) >= 2 * tiny.LAYERS
    for name, parameter in found.items():
        assert parameter.grad.abs().max() > 0
        assert close(parameter.grad, expected[name].grad, 1e-5), name
    assert {name for name, parameter in tiny.parameters(ours).items() if parameter.grad is not None} == set(found)


def test_a_new_adapter_changes_no_bit(arch):
    base = tiny.logits(tiny.build(arch), arch)
    model = get_peft_model(tiny.build(arch), IA3Config(task_type=tiny.TASKS[arch]))
    assert len(model.ia3_layers) >= 2 * tiny.LAYERS
    assert torch.equal(tiny.logits(model, arch), base)


def test_random_starts_on_request(arch):
    model = get_peft_model(tiny.build(arch), IA3Config(init_ia3_weights=False))
    for layer in model.ia3_layers.values():
        assert not (layer.ia3_l["default"] == 1).any()


@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5", "bert"])
def test_a_bfloat16_base_answers_in_bfloat16_as_pefts(arch):
    found, expected = (
        tiny.logits(tiny.adapt(arch, library, base=tiny.build(arch).bfloat16()), arch) for library in (ia3, peft)
    )
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_vectors_are_float32_in_a_bfloat16_base(arch):
    model = tiny.adapt(arch, ia3, base=tiny.build(arch).bfloat16())
    vectors = [parameter for name, parameter in tiny.adapter_parameters(model).items() if "ia3_l" in name]
    assert {vector.dtype for vector in vectors} == {torch.float32}


def test_parameters_have_pefts_names(arch):
    ours, theirs = pair(arch, adapter="mine")
    assert set(tiny.parameters(ours)) == set(tiny.parameters(theirs))
    assert any(name.endswith(".ia3_l.mine") for name in tiny.parameters(ours))


@pytest.mark.parametrize("arch", tiny.GENERATIVE)
def test_generated_tokens_are_pefts(arch):
    inputs = {key: value for key, value in tiny.batch(arch).items() if key != "labels"}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found, expected = (model.generate(**inputs, **settings) for model in pair(arch))
    assert torch.equal(found, expected)
    assert not torch.equal(found, tiny.build(arch).generate(**inputs, **settings))


@pytest.mark.parametrize("arch", ["llama", "t5", "bert"])
def test_gradient_checkpointing_changes_no_gradient(arch):
    plain, checkpointed = tiny.adapt(arch, ia3), tiny.adapt(arch, ia3)
    checkpointed.gradient_checkpointing_enable()
    assert checkpointed.is_gradient_checkpointing
    for model in (plain, checkpointed):
        model.train()
        model(**tiny.batch(arch)).loss.backward()
    expected = tiny.adapter_parameters(plain)
    for name, parameter in tiny.adapter_parameters(checkpointed).items():
        torch.testing.assert_close(parameter.grad, expected[name].grad)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5", "bert"])
def test_training_moves_the_adapter_and_no_bit_of_the_base(arch):
    base = tiny.state(tiny.build(arch))
    model = get_peft_model(tiny.build(arch), IA3Config(task_type=tiny.TASKS[arch])).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    losses = []
    for _ in range(5):
        loss = model(**tiny.batch(arch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    for value in ia3.get_peft_model_state_dict(model).values():
        assert not torch.equal(value, torch.ones_like(value))
    assert tiny.same_bits(model.unload().state_dict(), base)


# Making one.


def test_both_orders_of_arguments(llama):
    config = IA3Config(init_ia3_weights=False)
    torch.manual_seed(0)
    first = IA3Model(tiny.build("llama"), config, "mine")
    torch.manual_seed(0)
    second = IA3Model(config, llama, "mine")
    assert second.model is llama and second.peft_config["mine"] is config
    assert torch.equal(tiny.logits(first, "llama"), tiny.logits(second, "llama"))
    assert not isinstance(first, PeftModel)


@pytest.mark.parametrize("arguments", [(), ("model",), ("config",), ("config", "config"), ("model", "model")])
def test_a_model_and_a_config_are_needed(arguments, llama):
    given = {"model": llama, "config": IA3Config()}
    with pytest.raises((InputError, TypeError)):
        IA3Model(*(given[name] for name in arguments))
    assert adapted_modules(llama) == []


def test_get_peft_model_takes_configs_only(llama):
    with pytest.raises(InputError, match="IA3Config"):
        get_peft_model(llama, {"peft_type": "IA3"})
    with pytest.raises(InputError, match="IA3Config"):
        get_peft_model(llama, peft.LoraConfig(target_modules=["k_proj"]))


def test_several_configs_by_name(llama):
    model = IA3Model(llama, {"a": IA3Config(), "b": IA3Config(init_ia3_weights=False)})
    assert list(model.peft_config) == ["a", "b"]
    assert model.active_adapters == ["a"]
    assert trainable(model) == set(tiny.adapter_parameters(model, "a"))
    assert len(trainable(model)) == 3 * tiny.LAYERS


def test_a_bad_second_config_leaves_the_model_alone(llama):
    before = tiny.state(llama)
    with pytest.raises(InputError, match="no_such"):
        IA3Model(llama, {"a": IA3Config(), "b": IA3Config(target_modules=["no_such"])})
    assert adapted_modules(llama) == []
    assert tiny.same_bits(llama.state_dict(), before)


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": ["no_such"]}, {"modules_to_save": ["no_such"]}, {"target_modules": ["mlp"]}],
)
def test_a_config_that_does_not_fit_leaves_the_model_alone(fields, llama):
    before, needed = tiny.state(llama), trainable(llama)
    with pytest.raises(InputError):
        get_peft_model(llama, IA3Config(**fields))
    assert adapted_modules(llama) == []
    assert tiny.same_bits(llama.state_dict(), before)
    assert trainable(llama) == needed == set(tiny.parameters(llama))


def test_modules_to_save_that_are_not_there_are_named(llama):
    with pytest.raises(InputError) as error:
        get_peft_model(llama, IA3Config(modules_to_save=["lm_head", "no_such"]))
    message = one_line(error)
    assert "'no_such'" in message and "'lm_head'" in message.replace("No module is named", "")


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["layers"], "'model.layers', a ModuleList, .*'model.layers.0', 'model.layers.1'"),
        (["steps"], "'steps', a ModuleDict, .*'steps.first'"),
        (["scales"], "'scales', a ParameterList, .* the module around it"),
        (["norm", "by_name"], "'by_name', a ParameterDict"),
    ],
)
def test_containers_cannot_be_modules_to_save(names, shown, llama):
    llama.steps = torch.nn.ModuleDict({"first": torch.nn.Linear(2, 2)})
    llama.scales = torch.nn.ParameterList([torch.ones(2)])
    llama.by_name = torch.nn.ParameterDict({"one": torch.ones(2)})
    before = tiny.state(llama)
    with pytest.raises(InputError, match=shown) as error:
        get_peft_model(llama, IA3Config(modules_to_save=names, target_modules=["lm_head"]))
    one_line(error)
    assert tiny.same_bits(llama.state_dict(), before) and adapted_modules(llama) == []
    with pytest.raises(TypeError, match="cannot be applied"):
        peft.get_peft_model(llama, peft.IA3Config(modules_to_save=names, target_modules=["lm_head"]))


def test_a_container_with_a_forward_can_be_a_module_to_save():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = torch.nn.Linear(3, 3), torch.nn.Sequential(torch.nn.Linear(3, 2))

        def forward(self, x):
            return self.head(self.body(x))

    model = get_peft_model(Net(), IA3Config(target_modules=["body"], feedforward_modules=[], modules_to_save=["head"]))
    model(torch.ones(1, 3)).sum().backward()
    assert model.ia3_trained_modules["head"].modules_to_save["default"][0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("first", ["mlp", "up_proj"])
def test_adapters_cannot_save_a_module_and_a_part_of_it(first, llama):
    second = {"mlp": "up_proj", "up_proj": "mlp"}[first]
    fields = {"target_modules": ["k_proj"], "feedforward_modules": []}
    model = get_peft_model(llama, IA3Config(modules_to_save=[first], **fields))
    before = tiny.state(model)
    with pytest.raises(InputError, match=r"Cannot train '.*mlp\.up_proj' in full beside '.*mlp'"):
        model.add_adapter("other", IA3Config(modules_to_save=[second], **fields))
    assert tiny.same_bits(model.state_dict(), before) and list(model.peft_config) == ["default"]


def test_the_config_learns_the_base_models_name(llama):
    llama.name_or_path = "owner/name"
    config = IA3Config()
    get_peft_model(llama, config, revision="abc")
    assert (config.base_model_name_or_path, config.revision) == ("owner/name", "abc")


def test_inference_mode_adds_a_frozen_adapter(llama):
    model = get_peft_model(llama, IA3Config(inference_mode=True))
    assert trainable(model) == set()
    assert model.active_adapter == "default"


def test_injection_returns_the_model_itself(llama):
    config = IA3Config(init_ia3_weights=False)
    base = tiny.logits(llama, "llama")
    model = ia3.inject_adapter_in_model(config, llama)
    assert model is llama
    assert len(adapted_modules(llama)) == 3 * tiny.LAYERS
    assert not torch.equal(tiny.logits(llama, "llama"), base)
    assert trainable(llama) == set(tiny.adapter_parameters(llama))


@BOTH
@pytest.mark.parametrize("call", ["inject_adapter_in_model", "get_peft_model"])
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model")
def test_a_second_adapter_put_into_the_model_is_in_effect(library, call, llama):
    """As when a notebook's cell runs twice: in PEFT the last one is active."""
    targets, feedforward = tiny.TARGETS["llama"]

    def put(name, **fields):
        config = library.IA3Config(target_modules=targets, feedforward_modules=feedforward, **fields)
        arguments = (config, llama) if call == "inject_adapter_in_model" else (llama, config)
        getattr(library, call)(*arguments, adapter_name=name)

    put("a")
    before = tiny.logits(llama, "llama")
    put("b", init_ia3_weights=False)
    assert tiny.relative_error(tiny.logits(llama, "llama"), before) > 0.05
    assert set(tiny.adapter_parameters(llama, "b")) <= trainable(llama)


# Being the wrapped model.


def test_attributes_of_the_wrapped_model_are_reachable(llama):
    model = tiny.adapt("llama", ia3, base=llama)
    assert model.config is llama.config
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.get_input_embeddings() is llama.model.embed_tokens
    assert model.generation_config is llama.generation_config
    assert model.base_model.model is model.model is model.get_base_model() is llama
    assert model.base_model.peft_config is model.peft_config
    assert model.num_parameters() > 0
    with pytest.raises(AttributeError, match="no_such_name"):
        model.no_such_name  # noqa: B018


def test_modes_and_devices_reach_the_whole_model(llama):
    model = tiny.adapt("llama", ia3, base=llama)
    assert model.train() is model and all(module.training for module in llama.modules())
    assert model.eval() is model and not any(module.training for module in llama.modules())
    assert {parameter.dtype for parameter in model.double().parameters()} == {torch.float64}
    assert tiny.logits(model, "llama").dtype == torch.float64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5", "bert"])
def test_a_copy_of_the_model_is_equal_and_its_own(copied, arch):
    model = tiny.adapt(arch, ia3, adapter="a")
    add(model, arch, "b", 2)
    before = tiny.logits(model, arch)
    other = copied(model)
    assert torch.equal(tiny.logits(other, arch), before)
    assert other.peft_config == model.peft_config and trainable(other) == trainable(model)
    other.set_adapter("b")
    assert not torch.equal(tiny.logits(other, arch), before)
    other.merge_adapter()
    other.peft_config["b"].revision = "changed"
    assert torch.equal(tiny.logits(model, arch), before)
    assert model.active_adapter == "a" and model.peft_config["b"].revision is None


def test_a_copy_of_a_merged_model_can_be_unmerged(llama):
    base = tiny.state(llama)
    model = tiny.adapt("llama", ia3, base=llama)
    model.merge_adapter()
    other = copy.deepcopy(model)
    model.unmerge_adapter()
    other.unmerge_adapter()
    assert tiny.same_bits(other.unload().state_dict(), base)


# Counting.


@pytest.mark.parametrize("arch", tiny.NAMES)
def test_printed_counts_are_pefts(arch, capsys):
    ours, theirs = pair(arch)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.print_trainable_parameters()
    found = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert found == capsys.readouterr().out


def test_printed_counts_to_the_letter(llama, capsys):
    base = sum(parameter.numel() for parameter in llama.parameters())
    tiny.adapt("llama", ia3, base=llama).print_trainable_parameters()
    vectors = tiny.LAYERS * (2 * tiny.HIDDEN // 2 + tiny.INNER)
    share = 100 * vectors / (base + vectors)
    expected = f"trainable params: {vectors} || all params: {base + vectors:,} || trainable%: {share:.4f}\n"
    assert capsys.readouterr().out == expected


# Switching.


def test_a_second_adapter_is_neither_active_nor_trainable(arch):
    model = tiny.adapt(arch, ia3, adapter="a")
    before, needed = tiny.logits(model, arch), trainable(model)
    add(model, arch, "b", 2)
    assert model.active_adapters == ["a"] and list(model.peft_config) == ["a", "b"]
    assert trainable(model) == needed
    assert torch.equal(tiny.logits(model, arch), before)


@pytest.mark.parametrize("arch", ["llama", "t5", "bert"])
def test_what_is_trainable_is_pefts(arch):
    ours, theirs = pair(arch, adapter="a")
    steps = [
        lambda model: None,
        lambda model: add(model, arch, "b", 2),
        lambda model: model.set_adapter("b"),
        lambda model: model.set_adapter("a"),
        lambda model: model.base_model.set_adapter("b", inference_mode=True),
        lambda model: model.set_requires_grad("a"),
        lambda model: model.set_requires_grad("a", requires_grad=False),
        lambda model: model.set_adapter("b"),
        lambda model: model.delete_adapter("a"),
    ]
    counts = []
    for step in steps:
        for model in (ours, theirs):
            step(model)
        assert trainable(ours) == trainable(theirs)
        counts.append(len(trainable(ours)))
    assert set(counts) == {0, counts[0]}


def test_switching_is_pefts(arch):
    ours, theirs = pair(arch, adapter="a")
    for model in (ours, theirs):
        add(model, arch, "b", 2)
    answers = []
    for name in ("b", "a"):
        for model in (ours, theirs):
            model.set_adapter(name)
        assert ours.active_adapter == theirs.active_adapter == name
        answers.append(tiny.logits(ours, arch))
        assert close(answers[-1], tiny.logits(theirs, arch))
    assert tiny.relative_error(*answers) > 0.05


@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5"])
def test_several_active_adapters_multiply_as_pefts(arch):
    ours, theirs = pair(arch, adapter="a")
    for model in (ours, theirs):
        add(model, arch, "b", 2)
    ours.set_adapter(["a", "b"])
    theirs.base_model.set_adapter(["a", "b"])
    assert ours.active_adapter == ours.active_adapters == ["a", "b"]
    assert close(tiny.logits(ours, arch), tiny.logits(theirs, arch))
    assert trainable(ours) == trainable(theirs)
    product = tiny.adapt(arch, ia3)
    vectors = [tiny.adapter_parameters(ours, name).values() for name in "ab"]
    with torch.no_grad():
        for parameter, a, b in zip(tiny.adapter_parameters(product).values(), *vectors, strict=True):
            parameter.copy_(a * b)
    assert close(tiny.logits(product, arch), tiny.logits(ours, arch))


def test_active_adapters_are_counted_once(llama):
    model = two()
    model.set_adapter(["b", "b"])
    assert model.active_adapter == "b"


def test_adapters_of_different_modules_stand_side_by_side():
    """One on keys and values, one on feed-forwards, together what one adapter on all of them is."""
    whole = tiny.adapt("llama", ia3)
    model = tiny.adapt("llama", ia3, adapter="a", target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    add(model, "llama", "b", 0, target_modules=["down_proj"])
    with torch.no_grad():
        for path, layer in model.ia3_layers.items():
            for vector in layer.ia3_l.values():
                vector.copy_(whole.ia3_layers[path].ia3_l["default"])
    model.set_adapter(["a", "b"])
    assert torch.equal(tiny.logits(model, "llama"), tiny.logits(whole, "llama"))


def test_one_module_rescaled_on_either_side():
    """By two adapters that disagree about it, alone and together."""
    model = tiny.adapt("llama", ia3, adapter="a", target_modules=["down_proj"], feedforward_modules=["down_proj"])
    add(model, "llama", "b", 2, target_modules=["down_proj"], feedforward_modules=[])
    layer = model.ia3_layers["model.layers.0.mlp.down_proj"]
    assert (layer.ia3_l["a"].shape, layer.ia3_l["b"].shape) == ((1, tiny.INNER), (tiny.HIDDEN, 1))
    model.set_adapter(["a", "b"])
    both = tiny.logits(model, "llama")
    assert close(tiny.logits(model.merge_and_unload(), "llama"), both, 1e-5)


@pytest.mark.parametrize("name", ["c", ["a", "c"], ""])
def test_an_unknown_adapter_cannot_be_set(name, llama):
    model = two()
    with pytest.raises(InputError) as error:
        model.set_adapter(name)
    message = one_line(error)
    assert "'a', 'b'" in message and repr(name if isinstance(name, str) else "c") in message
    assert model.active_adapters == ["a"] and trainable(model) == set(tiny.adapter_parameters(model, "a"))


@pytest.mark.parametrize("name", ["a", "", "x.y", "__base__"])
def test_bad_names_are_refused(name):
    model = two()
    before = tiny.state(model)
    for call in (
        lambda: model.add_adapter(name, IA3Config()),
        lambda: model.add_weighted_adapter(["a", "b"], [0.5, 0.5], name),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert repr(name) in one_line(error)
        assert list(model.peft_config) == ["a", "b"]
        assert tiny.same_bits(model.state_dict(), before)


def test_a_bad_first_name_is_refused(llama):
    with pytest.raises(InputError):
        get_peft_model(llama, IA3Config(), adapter_name="x.y")
    assert adapted_modules(llama) == []


def test_add_adapter_in_transformers_order(llama):
    model = tiny.adapt("llama", ia3, base=llama)
    config = IA3Config()
    model.add_adapter(config, "b")
    assert model.peft_config["b"] is config


def test_a_second_config_that_does_not_fit_leaves_the_first(llama):
    model = tiny.adapt("llama", ia3, base=llama)
    before = tiny.logits(model, "llama")
    for fields in ({"target_modules": ["no_such"]}, {"modules_to_save": ["no_such"]}):
        with pytest.raises(InputError):
            model.add_adapter("b", IA3Config(**fields))
    assert list(model.peft_config) == ["default"]
    assert not any("b" in layer.ia3_l for layer in model.ia3_layers.values())
    assert torch.equal(tiny.logits(model, "llama"), before)


def test_disabled_is_the_base_bit_for_bit(arch):
    base = tiny.logits(tiny.build(arch), arch)
    model = tiny.adapt(arch, ia3)
    adapted, needed = tiny.logits(model, arch), trainable(model)
    assert not torch.equal(adapted, base)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model, arch), base)
        with model.disable_adapter():
            assert torch.equal(tiny.logits(model, arch), base)
        assert torch.equal(tiny.logits(model, arch), base)
    assert torch.equal(tiny.logits(model, arch), adapted)
    model.disable_adapter_layers()
    assert torch.equal(tiny.logits(model, arch), base)
    with model.disable_adapter():
        pass
    assert torch.equal(tiny.logits(model, arch), base)
    model.enable_adapter_layers()
    assert torch.equal(tiny.logits(model, arch), adapted)
    assert trainable(model) == needed


def test_adapters_come_back_after_an_error(llama):
    model = tiny.adapt("llama", ia3, base=llama)
    adapted = tiny.logits(model, "llama")
    with pytest.raises(KeyError, match="within"), model.disable_adapter():
        raise KeyError("within")
    assert torch.equal(tiny.logits(model, "llama"), adapted)


def test_disabled_while_merged_is_the_base_too(arch):
    base = tiny.logits(tiny.build(arch), arch)
    model = tiny.adapt(arch, ia3)
    model.merge_adapter()
    merged = tiny.logits(model, arch)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model, arch), base)
    assert torch.equal(tiny.logits(model, arch), merged)
    assert model.ia3_routing.merged == ("default",)


@BOTH
def test_merging_while_disabled_stays_disabled(library):
    base = tiny.logits(tiny.build("llama"), "llama")
    model = tiny.adapt("llama", library)
    model.base_model.disable_adapter_layers()
    model.base_model.merge_adapter()
    assert close(tiny.logits(model, "llama"), base, 1e-5)


# Deleting.


def test_deleting_an_idle_adapter_changes_nothing_else(arch):
    model = tiny.adapt(arch, ia3, adapter="a")
    before, names = tiny.state(model), list(tiny.parameters(model))
    add(model, arch, "b", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.delete_adapter("b")
    assert tiny.same_bits(model.state_dict(), before) and list(tiny.parameters(model)) == names
    assert model.active_adapter == "a" and list(model.peft_config) == ["a"]


def test_deleting_the_active_adapter_activates_another(arch):
    model, theirs = pair(arch, adapter="a")
    for each in (model, theirs):
        add(each, arch, "b", 2)
        with pytest.warns(UserWarning, match="was active") as caught:
            each.delete_adapter("a")
        assert "b" in str(caught[0].message)
    assert model.active_adapter == "b" and list(model.peft_config) == ["b"]
    assert close(tiny.logits(model, arch), tiny.logits(theirs, arch))
    assert trainable(model) == trainable(theirs) == set(tiny.adapter_parameters(model, "b"))


def test_deleting_the_last_adapter_leaves_the_base(arch):
    base = tiny.build(arch)
    expected = tiny.state(base)
    model = tiny.adapt(arch, ia3, base=base)
    model.delete_adapter("default")
    assert model.active_adapters == [] and model.peft_config == {}
    assert adapted_modules(model) == []
    assert tiny.same_bits(base.state_dict(), expected)
    assert torch.equal(tiny.logits(model, arch), tiny.logits(tiny.build(arch), arch))
    add(model, arch, "again", 1)  # and the model takes adapters again
    model.set_adapter("again")
    assert close(tiny.logits(model, arch), tiny.logits(tiny.adapt(arch, ia3, adapter="again"), arch))


def test_deleting_one_of_several_active_adapters_keeps_the_others():
    model = two()
    add(model, "llama", "c", 3)
    model.set_adapter(["a", "c"])
    with pytest.warns(UserWarning, match="'c'"):
        model.delete_adapter("a")
    assert model.active_adapters == ["c"]


def test_deleting_gives_layers_back_that_nobody_rescales():
    model = two(target_modules=["q_proj"], feedforward_modules=[])
    model.delete_adapter("b")
    assert not any(path.endswith("q_proj") for path in model.ia3_layers)
    assert isinstance(model.model.model.layers[0].self_attn.q_proj, torch.nn.Linear)


def test_what_is_not_there_cannot_be_deleted():
    model = two()
    with pytest.raises(InputError, match="'c' does not exist"):
        model.delete_adapter("c")


@BOTH
def test_a_merged_adapter_cannot_be_deleted(library):
    model = tiny.adapt("llama", library)
    model.base_model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["default"]


# Composing.


def test_a_weighted_adapter_is_the_sum(arch):
    model = tiny.adapt(arch, ia3, adapter="a", task_type=None)
    add(model, arch, "b", 2, task_type=None)
    before, needed = tiny.logits(model, arch), trainable(model)
    model.add_weighted_adapter(["a", "b"], [0.25, 1.5], "sum")
    assert torch.equal(tiny.logits(model, arch), before)
    assert trainable(model) == needed and model.active_adapter == "a"
    for layer in model.ia3_layers.values():
        expected = 0.25 * layer.ia3_l["a"] + 1.5 * layer.ia3_l["b"]
        torch.testing.assert_close(layer.ia3_l["sum"], expected)
        assert not layer.ia3_l["sum"].requires_grad


def test_a_weighted_adapter_is_pefts(arch):
    ours, theirs = pair(arch, adapter="a", task_type=None)
    for model in (ours, theirs):
        add(model, arch, "b", 2, task_type=None)
        model.base_model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "sum")
        model.base_model.set_adapter("sum")
    assert close(tiny.logits(ours, arch), tiny.logits(theirs, arch))


def test_a_module_left_out_counts_as_ones():
    model = tiny.adapt("llama", ia3, adapter="a", target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    add(model, "llama", "b", 2, target_modules=["v_proj", "down_proj"])
    add(model, "llama", "idle", 3, target_modules=["q_proj"], feedforward_modules=[])
    model.add_weighted_adapter(["a", "b"], [0.3, 0.5], "sum")
    config = model.peft_config["sum"]
    assert config.target_modules == {"k_proj", "v_proj", "down_proj"} and config.feedforward_modules == {"down_proj"}
    for path, layer in model.ia3_layers.items():
        if path.endswith("q_proj"):
            assert "sum" not in layer.ia3_l
            continue
        a, b = (layer.ia3_l.get(name, 1.0) for name in "ab")
        torch.testing.assert_close(layer.ia3_l["sum"].detach(), 0.3 * a + 0.5 * b)
    assert sum("sum" in layer.ia3_l for layer in model.ia3_layers.values()) == 3 * tiny.LAYERS


def test_a_weighted_adapter_of_default_adapters_leaves_queries_alone(gpt2):
    model = get_peft_model(gpt2, IA3Config(), "a")
    model.add_adapter("b", IA3Config())
    for seed, name in enumerate("ab"):
        tiny.randomize(model, seed, name)
    model.add_weighted_adapter(["a", "b"], [0.7, 0.9], "sum")
    stored = ia3.get_peft_model_state_dict(model, adapter_name="sum")
    fused = [value for key, value in stored.items() if "c_attn" in key]
    assert len(fused) == tiny.LAYERS
    for value in fused:
        assert torch.equal(value[: tiny.HIDDEN], torch.ones(tiny.HIDDEN, 1))
        assert not torch.equal(value[tiny.HIDDEN :], torch.ones(2 * tiny.HIDDEN, 1))


def test_a_weighted_adapter_takes_the_head_of_the_one_that_has_one():
    model = tiny.adapt("bert", ia3, adapter="a")
    add(model, "bert", "b", 2, task_type=None)
    model.add_weighted_adapter(["b", "a"], [0.5, 0.5], "sum")
    head = model.ia3_trained_modules["classifier"]
    assert torch.equal(head.modules_to_save["sum"].weight, head.modules_to_save["a"].weight)
    assert model.peft_config["sum"].modules_to_save == ["classifier"]
    model.set_adapter("sum")
    summed = tiny.logits(model, "bert")
    model.delete_adapter("a")
    assert torch.equal(tiny.logits(model, "bert"), summed)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ((["a", "c"], [1, 1], "sum"), "'c' does not exist"),
        ((["a", "b"], [1], "sum"), "2 adapters and 1 weights"),
        (([], [], "sum"), "0 adapters"),
        ((["a", "side"], [1, 1], "sum"), "different sides"),
        ((["a", "b"], [1, 1], "b"), "already exists"),
        ((["a", "b"], [1, float("nan")], "sum"), "finite numbers, found 1, nan"),
    ],
)
def test_sums_that_make_no_sense(arguments, shown):
    model = two()
    add(model, "llama", "side", 3, feedforward_modules=[])
    before = tiny.state(model)
    with pytest.raises(InputError, match=shown) as error:
        model.add_weighted_adapter(*arguments)
    one_line(error)
    assert list(model.peft_config) == ["a", "b", "side"]
    assert tiny.same_bits(model.state_dict(), before)


@BOTH
def test_two_heads_cannot_be_summed(library):
    model = tiny.adapt("bert", library, adapter="a")
    add(model, "bert", "b", 2)
    with pytest.raises(ValueError, match="modules_to_save"):
        model.base_model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")


def heads() -> IA3Model:
    """Adapters `a` and `b` with heads of their own, and `c` without."""
    model = tiny.adapt("bert", ia3, adapter="a")
    add(model, "bert", "b", 2)
    add(model, "bert", "c", 3, task_type=None)
    return model


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.set_adapter(["a", "b"]),
        lambda model: model.set_adapter(["c", "b", "a"], inference_mode=True),
        lambda model: model.merge_adapter(["a", "c", "b"]),
        lambda model: model.merge_adapter(["a", "b"], safe_merge=True),
        lambda model: model.merge_and_unload(adapter_names=["b", "a"]),
        lambda model: model.add_weighted_adapter(["a", "b"], [1, 1], "sum"),
    ],
)
def test_two_heads_cannot_act_at_once(use):
    model = heads()
    model.set_adapter(["c", "a"])
    before, needed, answer = tiny.state(model), trainable(model), tiny.logits(model, "bert")
    with pytest.raises(InputError, match=r"'classifier'.*modules_to_save") as error:
        use(model)
    one_line(error)
    assert model.active_adapters == ["c", "a"] and trainable(model) == needed and not model.ia3_routing.merged
    assert tiny.same_bits(model.state_dict(), before) and torch.equal(tiny.logits(model, "bert"), answer)


@pytest.mark.parametrize("use", [lambda m: m.set_adapter(["a", "b"]), lambda m: m.merge_adapter(["b"])])
def test_a_second_head_leaves_a_merged_model_merged(use):
    model = heads()
    model.merge_adapter(["a"])
    before = tiny.state(model)
    with pytest.raises(InputError, match="each train their own 'classifier'"):
        use(model)
    assert model.ia3_routing.merged == ("a",) and tiny.same_bits(model.state_dict(), before)


def test_two_heads_are_refused_by_peft_too():
    model = tiny.adapt("bert", peft, adapter="a")
    add(model, "bert", "b", 2)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        model.base_model.set_adapter(["a", "b"])


# Merging and taking out.


def test_a_merged_model_answers_the_same(arch):
    ours, theirs = pair(arch)
    before = tiny.logits(ours, arch)
    ours.merge_adapter()
    theirs.base_model.merge_adapter()
    merged = tiny.logits(ours, arch)
    assert close(merged, before, 1e-5)
    assert close(merged, tiny.logits(theirs, arch), 1e-5)


def test_unmerging_gives_the_bits_back(arch):
    """Also of a vector that is zero, by which one cannot divide."""
    model = tiny.adapt(arch, ia3)
    with torch.no_grad():
        for layer in model.ia3_layers.values():
            layer.ia3_l["default"].flatten()[::3] = 0
    before, answers = tiny.state(model), tiny.logits(model, arch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
        assert not tiny.same_bits(model.state_dict(), before)
        model.unmerge_adapter()
    assert tiny.same_bits(model.state_dict(), before)
    assert torch.equal(tiny.logits(model, arch), answers)


def test_taken_out_merged_weights_are_pefts(arch):
    ours, theirs = pair(arch)
    before = tiny.logits(ours, arch)
    found, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    assert type(found) is type(tiny.build(arch))
    assert list(found.state_dict()) == list(expected.state_dict()) == list(tiny.build(arch).state_dict())
    changed = 0
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=1e-6, atol=1e-9)
        changed += not torch.equal(value, tiny.build(arch).state_dict()[key])
    assert changed >= 2 * tiny.LAYERS
    assert adapted_modules(found) == []
    assert close(tiny.logits(found, arch), before, 1e-5)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5", "bert"])
def test_a_merged_model_is_a_plain_transformers_model(arch, tmp_path):
    """It saves, loads and takes another adapter like any other."""
    merged = tiny.adapt(arch, ia3).merge_and_unload()
    before = tiny.logits(merged, arch)
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).eval()
    assert torch.equal(tiny.logits(loaded, arch), before)
    again = tiny.adapt(arch, ia3, base=merged, seed=2)
    assert tiny.relative_error(tiny.logits(again, arch), before) > 0.05


def test_merging_a_merged_model_out(arch):
    model = tiny.adapt(arch, ia3)
    before = tiny.logits(model, arch)
    model.merge_adapter()
    found = model.merge_and_unload(progressbar=True)
    assert tiny.same_bits(found.state_dict(), tiny.state(tiny.adapt(arch, ia3).merge_and_unload()))
    assert close(tiny.logits(found, arch), before, 1e-5)


def test_unloading_restores_the_base(arch):
    for merged in (False, True):
        base = tiny.build(arch)
        expected = tiny.state(base)
        kinds = [type(module) for module in base.modules()]
        model = tiny.adapt(arch, ia3, base=base)
        if merged:
            model.merge_adapter()
        found = model.unload()
        assert found is base
        assert [type(module) for module in found.modules()] == kinds
        assert tiny.same_bits(found.state_dict(), expected)
        assert torch.equal(tiny.logits(found, arch), tiny.logits(tiny.build(arch), arch))


def test_an_emptied_model_has_no_adapters(llama):
    model = tiny.adapt("llama", ia3, base=llama)
    model.unload()
    assert model.peft_config == {} and model.active_adapters == []


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5"])
def test_merging_one_of_two_is_pefts(order, arch):
    ours, theirs = pair(arch, adapter="a")
    for model in (ours, theirs):
        add(model, arch, "b", 2)
    base = tiny.state(ours)
    answers = []
    for name in order:
        for model in (ours, theirs):
            model.base_model.merge_adapter(adapter_names=[name])
        answers.append(tiny.logits(ours, arch))
        assert close(answers[-1], tiny.logits(theirs, arch), 1e-5)
    assert ours.ia3_routing.merged == order
    assert tiny.relative_error(*answers) > 0.02
    ours.unmerge_adapter()
    assert tiny.same_bits(ours.state_dict(), base)
    ours.set_adapter(order[0])
    assert close(tiny.logits(ours, arch), answers[0], 1e-5)


def test_merging_adapters_by_name_into_a_plain_model():
    expected, model, theirs = two(), two(), tiny.adapt("llama", peft, adapter="a")
    add(theirs, "llama", "b", 2)
    expected.set_adapter("b")
    found = model.merge_and_unload(adapter_names=["b"])
    assert close(tiny.logits(found, "llama"), tiny.logits(expected, "llama"), 1e-5)
    assert close(tiny.logits(found, "llama"), tiny.logits(theirs.merge_and_unload(adapter_names=["b"]), "llama"), 1e-5)


def test_taking_out_merges_what_is_merged_already_too():
    model, theirs = two(), tiny.adapt("llama", peft, adapter="a")
    add(theirs, "llama", "b", 2)
    for each in (model, theirs):
        each.base_model.merge_adapter(adapter_names=["a"])
    found, expected = (each.merge_and_unload(adapter_names=["b"]) for each in (model, theirs))
    assert close(tiny.logits(found, "llama"), tiny.logits(expected, "llama"), 1e-5)


def test_merging_twice_or_unmerging_nothing_only_warns():
    model = two()
    with pytest.warns(UserWarning, match="[Aa]lready unmerged"):
        model.unmerge_adapter()
    model.merge_adapter()
    before = tiny.state(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert tiny.same_bits(model.state_dict(), before)


def test_setting_an_adapter_unmerges_with_a_warning(arch):
    model = tiny.adapt(arch, ia3, adapter="a")
    add(model, arch, "b", 2)
    before = tiny.state(model)
    model.set_adapter("b")
    expected = tiny.logits(model, arch)
    model.set_adapter("a")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Adapter cannot be set when the model is merged. Unmerging the model first."):
        model.set_adapter("b")
    assert model.ia3_routing.merged == ()
    assert tiny.same_bits(model.state_dict(), before)
    assert torch.equal(tiny.logits(model, arch), expected)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_of_a_broken_adapter_leaves_the_model_as_it_was(call, broken, arch):
    model = tiny.adapt(arch, ia3)
    path, layer = list(model.ia3_layers.items())[-1]
    with torch.no_grad():
        layer.ia3_l["default"].flatten()[0] = broken
    base = {key: value.clone() for key, value in model.state_dict().items() if "ia3_l" not in key}
    modules = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="NaN") as error:
        getattr(model, call)(safe_merge=True)
    assert repr(path) in one_line(error) and "'default'" in str(error.value)
    assert {
        key for key, value in model.state_dict().items() if key in base and not torch.equal(value, base[key])
    } == set()
    assert [type(module) for module in model.modules()] == modules
    assert model.ia3_routing.merged == () and list(model.peft_config) == ["default"]


def test_a_safe_merge_of_a_bias_too(gpt2):
    """A weight of zero hides the infinite vector, the bias does not."""
    model = tiny.adapt("gpt2", ia3, base=gpt2)
    layer = model.ia3_layers["transformer.h.0.attn.c_attn"]
    with torch.no_grad():
        layer.base_layer.weight.fill_(0.5)
        layer.base_layer.bias.fill_(1e30)
        layer.ia3_l["default"].fill_(1e30)
    with pytest.raises(InputError, match="bias"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_of_a_sound_adapter_is_a_merge(call, arch):
    safe, plain = tiny.adapt(arch, ia3), tiny.adapt(arch, ia3)
    getattr(safe, call)(safe_merge=True)
    getattr(plain, call)()
    assert tiny.same_bits(safe.model.state_dict(), plain.model.state_dict())


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_an_unknown_adapter_cannot_be_merged(call):
    model = two()
    before = tiny.state(model)
    with pytest.raises(InputError, match="'c' does not exist"):
        getattr(model, call)(adapter_names=["a", "c"])
    assert tiny.same_bits(model.state_dict(), before)


# Modules that are trained in full: a classifier's head.


def test_heads_of_two_adapters_are_switched_merged_and_unloaded():
    ours, theirs = pair("bert", adapter="a")
    for model in (ours, theirs):
        add(model, "bert", "b", 2)
    assert sorted(ours.peft_config["b"].modules_to_save) == sorted(theirs.peft_config["b"].modules_to_save)
    base = tiny.build("bert")
    head = ours.ia3_trained_modules["classifier"]
    own = {name: head.modules_to_save[name].weight.detach().clone() for name in "ab"}
    for name in ("b", "a"):
        for model in (ours, theirs):
            model.set_adapter(name)
        answers = tiny.logits(ours, "bert")
        assert close(answers, tiny.logits(theirs, "bert"))
        merged = copy.deepcopy(ours).merge_and_unload()
        assert close(tiny.logits(merged, "bert"), answers, 1e-5)
        assert type(merged.classifier) is torch.nn.Linear and torch.equal(merged.classifier.weight, own[name])
        expected = copy.deepcopy(theirs).merge_and_unload().state_dict()
        assert list(merged.state_dict()) == list(expected)
        for key, value in merged.state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-9)
    assert tiny.same_bits(ours.unload().state_dict(), base.state_dict())


def test_a_head_starts_as_the_bases_and_is_trained_alone():
    base = tiny.build("bert")
    model = get_peft_model(base, IA3Config(task_type="SEQ_CLS"))
    head = model.ia3_trained_modules["classifier"]
    assert torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    assert {name for name in trainable(model) if "classifier" in name} == {
        f"classifier.modules_to_save.default.{part}" for part in ("weight", "bias")
    }
    model(**tiny.batch("bert")).loss.backward()
    assert head.modules_to_save["default"].weight.grad.abs().max() > 0
    assert head.original_module.weight.grad is None


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_classifying_tasks_add_the_head_by_themselves(task):
    expected = peft.get_peft_model(
        tiny.build("bert"), peft.IA3Config(task_type=task, target_modules=["key"], feedforward_modules=[])
    )
    config = IA3Config(task_type=task, modules_to_save=["pooler"])
    model = get_peft_model(tiny.build("bert"), config)
    assert set(config.modules_to_save) == {"pooler", *expected.peft_config["default"].modules_to_save}
    assert set(model.ia3_trained_modules) == {"classifier", "bert.pooler"}


def test_other_tasks_add_no_head():
    model = get_peft_model(tiny.build("bert"), IA3Config(task_type="FEATURE_EXTRACTION"))
    assert model.ia3_trained_modules == {} and model.peft_config["default"].modules_to_save is None


def test_deleting_gives_the_head_back():
    model = tiny.adapt("bert", ia3, adapter="a")
    add(model, "bert", "b", 2)
    with pytest.warns(UserWarning, match="was active"):
        model.delete_adapter("a")
    assert list(model.ia3_trained_modules["classifier"].modules_to_save) == ["b"]
    model.delete_adapter("b")
    assert type(model.model.classifier) is torch.nn.Linear


def test_modules_in_saved_modules_are_saved_once(llama):
    model = get_peft_model(llama, IA3Config(modules_to_save=["up_proj", "1.mlp"]))
    assert set(model.ia3_trained_modules) == {"model.layers.0.mlp.up_proj", "model.layers.1.mlp"}


def test_output_layers_can_be_saved_modules(llama):
    ours, theirs = pair("llama", modules_to_save=["lm_head"])
    assert close(tiny.logits(ours, "llama"), tiny.logits(theirs, "llama"))
    assert trainable(ours) == trainable(theirs)


# The two examples of PEFT's documentation.


def test_the_example_of_the_class():
    model = tiny.build("t5")
    config = IA3Config(
        peft_type="IA3",
        task_type="SEQ_2_SEQ_LM",
        target_modules=["k", "v", "wo"],
        feedforward_modules=["wo"],
    )
    adapted = IA3Model(config, model)
    tiny.randomize(adapted)
    assert close(tiny.logits(adapted, "t5"), tiny.logits(tiny.adapt("t5", peft), "t5"))


def test_the_example_of_merging(tmp_path):
    theirs = tiny.adapt("llama", peft)
    theirs.save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(tiny.build("llama"), tmp_path)
    merged = model.merge_and_unload()
    assert isinstance(merged, transformers.LlamaForCausalLM)
    assert close(tiny.logits(merged, "llama"), tiny.logits(theirs, "llama"), 1e-5)
