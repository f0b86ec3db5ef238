"""What happens to an adapted model as a whole: other dtypes, checkpointed gradients, copies, saved states, meta."""

import copy
import io
import pickle

import peft
import pytest
import torch

import ia3
from ia3 import IA3Config
from support import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated", "ignore:.*use_reentrant")

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
ARCHITECTURES = ["gpt2", "llama", "t5", "bert"]


def two(arch: str, **sizes):
    """Our model with adapters `one` (active) and `two`."""
    model = tiny.adapt(arch, ia3, adapter="one", base=tiny.build(arch, **sizes))
    targets, feedforward = tiny.TARGETS[arch]
    config = IA3Config(task_type=tiny.TASKS[arch], target_modules=targets, feedforward_modules=feedforward)
    model.add_adapter("two", config)
    tiny.randomize(model, 2, "two")
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in tiny.adapter_parameters(model).items()}
    assert found and all(gradient is not None for gradient in found.values())
    return found


# Dtypes.


@HALVES
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_half_precision_base_has_pefts_dtypes_gradients_and_steps(arch, dtype):
    losses = {}
    dtypes = {}
    for library in (ia3, peft):
        model = tiny.adapt(
            arch, library, base=tiny.build(arch).to(dtype), modules_to_save=["classifier"] if arch == "bert" else None
        )
        dtypes[library] = {name: parameter.dtype for name, parameter in sorted(tiny.parameters(model).items())}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses[library] = []
        for _ in range(3):
            loss = model(**tiny.batch(arch)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[library].append(loss.item())
    assert dtypes[ia3] == dtypes[peft]
    assert {kind for name, kind in dtypes[ia3].items() if ".ia3_l." in name} == {torch.float32}
    assert losses[ia3] == losses[peft]
    assert losses[ia3][-1] < losses[ia3][0]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_under_autocast_outputs_and_gradients_are_pefts(arch):
    results = []
    for library in (ia3, peft):
        model = tiny.adapt(arch, library).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(**tiny.batch(arch))
        output.loss.backward()
        results.append((output.logits.detach(), gradients(model)))
    (found, grads), (expected, wanted) = results
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert not torch.equal(found.float(), tiny.logits(tiny.adapt(arch, ia3), arch))
    for name, gradient in grads.items():
        assert gradient.dtype == torch.float32
        assert tiny.relative_error(gradient, wanted[name]) <= 1e-2, name


@HALVES
def test_a_half_precision_base_is_merged_as_by_peft(dtype):
    found, expected = (
        tiny.adapt("llama", library, base=tiny.build("llama").to(dtype)).merge_and_unload().state_dict()
        for library in (ia3, peft)
    )
    assert tiny.same_bits(found, expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_converted_while_merged_it_can_be_unmerged(arch):
    model = tiny.adapt(arch, ia3)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    expected = tiny.state(tiny.build(arch).to(torch.bfloat16))
    assert tiny.same_bits(model.unload().state_dict(), expected)


# Gradient checkpointing.


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5", "bert"])
def test_checkpointed_gradients_are_the_same(arch, use_reentrant):
    plain, checkpointed = tiny.adapt(arch, ia3).train(), tiny.adapt(arch, ia3).train()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    calls = []
    layer = next(iter(checkpointed.ia3_layers.values()))
    layer.register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, checkpointed):
        extra = {} if arch == "bert" else {"use_cache": False}
        model(**tiny.batch(arch), **extra).loss.backward()
    assert len(calls) == 2  # once more in the backward pass
    expected = gradients(plain)
    for name, gradient in gradients(checkpointed).items():
        torch.testing.assert_close(gradient, expected[name])


# Copies and states.


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)


@COPIES
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_a_copy_of_a_whole_model_goes_on_by_itself(copied, merged):
    model = two("llama", **tiny.ONE_LAYER["llama"])
    answers = dict.fromkeys(("one", "two"))
    for name in ("two", "one"):
        model.set_adapter(name)
        answers[name] = tiny.logits(model, "llama")
    if merged:
        model.merge_adapter()
    before = tiny.logits(model, "llama")
    other = copied(model)
    assert torch.equal(tiny.logits(other, "llama"), before)
    if merged:
        other.unmerge_adapter()
        assert torch.equal(tiny.logits(other, "llama"), answers["one"])
    other.set_adapter("two")
    assert torch.equal(tiny.logits(other, "llama"), answers["two"])
    tiny.randomize(other, 7, "two")
    assert not torch.equal(tiny.logits(other, "llama"), answers["two"])
    other.unload()
    assert torch.equal(tiny.logits(model, "llama"), before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_a_state_is_loaded_into_a_model_with_the_same_adapters(arch, assign):
    source, target = (two(arch, **tiny.ONE_LAYER[arch]) for _ in range(2))
    for seed, name in enumerate(("one", "two"), start=5):
        tiny.randomize(source, seed, name)
    result = target.load_state_dict(source.state_dict(), assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    for name in ("one", "two"):
        source.set_adapter(name)
        target.set_adapter(name)
        assert torch.equal(tiny.logits(target, arch), tiny.logits(source, arch))


def test_states_have_pefts_names():
    ours, theirs = tiny.adapt("bert", ia3).state_dict(), tiny.adapt("bert", peft).state_dict()
    assert list(ours) == list(theirs)


def test_a_model_without_memory_is_filled_later():
    source = two("llama")
    model = two("llama")
    model.to("meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    for module in ("rotary_emb",):  # its buffers are no part of a state
        for name, buffer in source.model.model.get_submodule(module).named_buffers():
            model.model.model.get_submodule(module).get_buffer(name).copy_(buffer)
    for name in ("one", "two"):
        source.set_adapter(name)
        model.set_adapter(name)
        assert torch.equal(tiny.logits(model, "llama"), tiny.logits(source, "llama"))


def test_vectors_without_memory_are_filled_by_a_checkpoint(tmp_path):
    source = tiny.adapt("llama", ia3)
    source.save_pretrained(tmp_path)
    tensors = ia3.get_peft_model_state_dict(source)
    targets, feedforward = tiny.TARGETS["llama"]
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward)
    model = ia3.get_peft_model(tiny.build("llama"), config, low_cpu_mem_usage=True)
    assert all(parameter.is_meta for parameter in tiny.adapter_parameters(model).values())
    ia3.set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    vectors = tiny.adapter_parameters(model)
    assert all(not p.is_meta and p.dtype == torch.float32 and p.requires_grad for p in vectors.values())
    assert torch.equal(tiny.logits(model.eval(), "llama"), tiny.logits(source, "llama"))
    model(**tiny.batch("llama")).loss.backward()
    gradients(model)
