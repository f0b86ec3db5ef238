"""Under torch.compile: no graph break, no recompilation when adapters switch, and the results of eager execution.

The compiler stops before it would write machine code.
"""

import copy
import io
import pickle
import threading

import peft  # noqa: F401  # before it, `PeftModel.__class__` is a `PreTrainedModel`, which Dynamo cannot trace from outside
import pytest
import torch
import transformers
from torch import nn

import ia3
from ia3 import IA3Config
from support import tiny

ARCHITECTURES = ("llama", "gpt2", "bert", "t5")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, backend="aot_eager"):
    """`eager` is enough, and faster, where nothing is trained: breaks and recompilations are seen before a backend."""
    return torch.compile(model, backend=backend, fullgraph=True)


def inputs(arch: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Without labels, whose loss transformers itself cannot always compile whole."""
    made = {key: value for key, value in tiny.batch(arch, seed=seed).items() if key != "labels"}
    if arch == "t5":
        made["decoder_input_ids"] = tiny.batch(arch, seed=seed)["labels"]
    if arch != "bert":
        made["use_cache"] = False
    return made


def small(arch: str):
    """A model of one layer with adapters `one` (active), `two` and `three`, of the same modules."""
    model = tiny.adapt(arch, ia3, adapter="one", base=tiny.build(arch, **tiny.ONE_LAYER[arch]))
    targets, feedforward = tiny.TARGETS[arch]
    config = {"task_type": tiny.TASKS[arch], "target_modules": targets, "feedforward_modules": feedforward}
    for seed, name in enumerate(("two", "three"), start=2):
        model.add_adapter(name, IA3Config(**config))
        tiny.randomize(model, seed, name)
    return model


class Network(nn.Module):
    """Attention, a feed-forward and a head, traced in a fraction of a Llama's time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        x = x + torch.softmax(self.q_proj(x) @ self.k_proj(x).mT, -1) @ self.v_proj(x)
        return self.head(x + self.down_proj(torch.relu(self.up_proj(x))))


X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))


NAMES = ("one", "two", "three")
FIELDS = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


def three(base: nn.Module, fields: dict, **others: dict):
    """A model with adapters `one` (active), `two` and `three`; `others` have their own fields of the config."""
    configs = {name: IA3Config(**others.get(name, fields)) for name in NAMES}
    model = ia3.IA3Model(base, configs).eval()
    for seed, name in enumerate(configs, start=1):
        tiny.randomize(model, seed, name)
    return model


def network(**others: dict):
    """A network with three adapters."""
    return three(Network(), FIELDS, **others)


def headed():
    """A network with three adapters that have a head each."""
    return three(Network(), {**FIELDS, "modules_to_save": ["head"]})


def gradients(model, adapter: str) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in tiny.adapter_parameters(model, adapter).items()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_whole_models_compile_without_a_break_and_switch_without_recompiling(arch):
    """Bert with its classification head, which is trained in full."""
    model = small(arch)
    run = compiled(model)
    for name in ("one", "two"):
        model.set_adapter(name)
        expected = model(**inputs(arch)).logits
        expected.square().sum().backward()
        wanted = gradients(model, name)
        with torch._dynamo.config.patch(error_on_recompile=name == "two"):
            found = run(**inputs(arch)).logits
        assert tiny.relative_error(found, expected) <= 1e-5
        found.square().sum().backward()
        grads = gradients(model, name)
        assert len(grads) >= len(wanted) >= 2
        for key, gradient in grads.items():
            assert tiny.relative_error(gradient, wanted[key]) <= 1e-4, key
            assert gradient.abs().max() > 0


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_adapters_that_come_and_go_do_not_recompile(arch, tmp_path):
    model = small(arch)
    model.save_pretrained(tmp_path, selected_adapters=["three"])
    model.delete_adapter("three")
    model.requires_grad_(False)  # gradients are a property of compiled code
    run = compiled(model, "eager")
    seen = [run(**inputs(arch)).logits]

    def check(name: str) -> None:
        model.set_adapter(name, inference_mode=True)
        found = run(**inputs(arch)).logits
        assert tiny.relative_error(found, model(**inputs(arch)).logits) <= 1e-5
        assert all(not torch.equal(found, other) for other in seen)
        seen.append(found)

    with torch._dynamo.config.patch(error_on_recompile=True):
        check("two")
        model.load_adapter(tmp_path / "three", "three")
        check("three")
        model.delete_adapter("two")
        seen.clear()
        check("one")
        check("three")


def test_switching_trainable_adapters_does_not_recompile():
    model = network()
    run = compiled(model)
    run(X).sum().backward()
    model.zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("two", "three", "one"):
            model.set_adapter(name)
            run(X).square().sum().backward()
            found = gradients(model, name)
            model(X).square().sum().backward()
            for key, gradient in gradients(model, name).items():
                assert tiny.relative_error(found[key], gradient) <= 1e-4
            assert all(p.grad is None for p in model.parameters())


def test_training_steps_do_not_recompile_and_are_eager_steps():
    results = []
    for wrap in (lambda model: model, compiled):
        model = network()
        run = wrap(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for step in range(3):
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                run(X + step).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(tiny.adapter_parameters(model, "one"))
    for key, parameter in results[0].items():
        assert not torch.equal(parameter, tiny.adapter_parameters(network(), "one")[key])
        torch.testing.assert_close(results[1][key], parameter, rtol=1e-4, atol=1e-5)


def test_switching_off_merging_and_composing_while_compiled():
    """Whatever changes, the answer is that of eager execution."""
    model = network()
    base = Network()(X)
    run = compiled(model, "eager")
    with torch.no_grad():

        def check(is_base: bool = False) -> torch.Tensor:
            found = run(X)
            assert tiny.relative_error(found, model(X)) <= 1e-5
            assert (tiny.relative_error(found, base.detach()) <= 1e-5) is is_base
            return found

        first = check()
        with model.disable_adapter():
            check(True)
        assert torch.equal(check(), first)
        model.disable_adapter_layers()
        check(True)
        model.enable_adapter_layers()
        assert torch.equal(check(), first)
        model.merge_adapter()
        assert tiny.relative_error(check(), first) <= 1e-5
        with model.disable_adapter():
            check(True)
        model.unmerge_adapter()
        assert torch.equal(check(), first)
        model.set_adapter(["one", "two"])
        assert tiny.relative_error(check(), first) > 0.01
        model.set_adapter("one")
        model.model.down_proj.ia3_l["one"].zero_()  # new values in the same vector
        assert tiny.relative_error(check(), first) > 0.01
        model.add_weighted_adapter(["two", "three"], [0.5, 0.5], "sum")
        model.set_adapter("sum")
        check()
        with pytest.warns(UserWarning, match="was active"):
            model.delete_adapter("sum")
        check()
        for name in list(model.peft_config)[:0:-1]:
            model.delete_adapter(name)
        model.unload()
        check(True)


def test_an_adapter_of_other_modules_is_right_too():
    model = network(two={"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]})
    run = compiled(model, "eager")
    for name in ("one", "two", ["two", "one"], "one"):
        model.set_adapter(name)
        assert tiny.relative_error(run(X), model(X)) <= 1e-5


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save, lambda model: model.double()],
    ids=["copied", "pickled", "saved", "converted"],
)
def test_compiled_after_being_changed_whole(copied, merged):
    """The vectors that compiled code finds are those of this model, not of the one before."""
    model = network()
    if merged:
        model.merge_adapter()
    model = copied(model)
    x = X.to(next(model.parameters()).dtype)
    run = compiled(model, "eager")
    assert tiny.relative_error(run(x), model(x)) <= 1e-5
    if merged:
        model.unmerge_adapter()
    for name in ("one", "two"):
        model.set_adapter(name)
        expected = model(x)
        assert tiny.relative_error(run(x), expected) <= 1e-5
    with torch.no_grad():
        for parameter in tiny.adapter_parameters(model, "two").values():
            parameter.mul_(2)
    assert tiny.relative_error(run(x), expected) > 0.01
    assert tiny.relative_error(run(x), model(x)) <= 1e-5


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_loaded_into_compiled_code_counts(assign):
    """Of vectors and of heads."""
    source, target = headed(), headed()
    for seed, name in enumerate(NAMES, start=5):
        tiny.randomize(source, seed, name)
    run = compiled(target, "eager")
    before = run(X)
    target.load_state_dict(source.state_dict(), assign=assign)
    for name in NAMES[:2]:
        source.set_adapter(name)
        target.set_adapter(name)
        assert tiny.relative_error(run(X), source(X)) <= 1e-6
        assert tiny.relative_error(run(X), before) > 0.01


def mixtral():
    """A model whose experts are slices of one parameter."""
    made = transformers.MixtralConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM._from_config(made, experts_implementation="batched_mm")


EXPERTS = {"target_modules": ["experts"], "feedforward_modules": ["experts"]}


def test_mixtral_compiles_without_a_break():
    model = three(mixtral(), {**EXPERTS, "target_modules": ["k_proj", "v_proj", "experts"]})
    run = compiled(model, "eager")
    expected = model(**inputs("llama")).logits
    assert tiny.relative_error(run(**inputs("llama")).logits, expected) <= 1e-5
    with torch._dynamo.config.patch(error_on_recompile=True):
        model.set_adapter("two")
        found = run(**inputs("llama")).logits
    assert tiny.relative_error(found, expected) > 0.01
    assert tiny.relative_error(found, model(**inputs("llama")).logits) <= 1e-5


@pytest.mark.parametrize("targets", [["attn"], ["attn", "out_proj"]], ids=["alone", "with its output projection"])
@pytest.mark.parametrize("widths", [{}, {"kdim": 5, "vdim": 7}], ids=["packed", "own widths"])
def test_an_attention_compiles_without_a_break(widths, targets):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **widths)

        def forward(self, q, k, v):
            return self.attn(q, k, v, need_weights=False)[0]

    torch.manual_seed(0)
    fields = {"target_modules": targets, "feedforward_modules": []}
    model = ia3.get_peft_model(Holder(), IA3Config(**fields), adapter_name="one")
    model.add_adapter("two", IA3Config(**fields))
    for seed, name in enumerate(("one", "two"), start=1):
        tiny.randomize(model, seed, name)
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 4, widths.get("kdim", 8)), torch.randn(2, 4, widths.get("vdim", 8))
    run = compiled(model)
    for name in ("one", "two"):
        model.set_adapter(name)
        with torch._dynamo.config.patch(error_on_recompile=targets == ["attn"]):
            found = run(q, k, v)
        found.square().sum().backward()
        grads = gradients(model, name)
        expected = model(q, k, v)
        expected.square().sum().backward()
        assert tiny.relative_error(found, expected) <= 1e-5
        for key, gradient in gradients(model, name).items():
            assert tiny.relative_error(grads[key], gradient) <= 1e-4


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed", "ignore::FutureWarning:torch.distributed")
@pytest.mark.parametrize("whole", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["FSDP", "FSDP2"])
def test_sharded_blocks_learn_as_plain_ones(kind, whole, one_process):
    """Sharding puts other tensors in the vectors' place, for the time of a pass and for good."""

    def build():
        fields = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        model = ia3.IA3Model(nn.Sequential(Network(), Network()), IA3Config(**fields))
        tiny.randomize(model, 1, "default")
        return model

    def learn(model) -> list[torch.Tensor]:
        model(X).square().sum().backward()
        found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in found]

    expected = learn(build())
    model = build()
    for i, block in enumerate(model.model):
        if whole:
            block.compile(backend="aot_eager")
        if kind == "FSDP2":
            torch.distributed.fsdp.fully_shard(block, mesh=one_process)
        else:
            model.model[i] = torch.distributed.fsdp.FullyShardedDataParallel(
                block, use_orig_params=True, device_id=torch.device("cpu")
            )
    found = learn(model)
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert tiny.relative_error(one.flatten(), other.flatten()) <= 1e-5


# Batches whose rows have an adapter each.

BASE = "__base__"
MIXES = (
    ("one", "two", BASE),
    ("three", BASE, "one"),
    ("two", "two", "two"),
    ("one", "three", "one"),
    (BASE, BASE, BASE),
)


@pytest.mark.parametrize("kind", ["network", "t5"])
def test_new_mixes_of_adapters_do_not_recompile(kind):
    """Also when what is compiled first has no names; and going back to none does not either."""
    model = network() if kind == "network" else small(kind)
    model.requires_grad_(False)  # gradients are a property of compiled code
    run = compiled(model, "eager")
    batch = {"x": X} if kind == "network" else inputs(kind)

    def answer(model, names=None) -> torch.Tensor:
        output = model(**batch, adapter_names=names)
        return output if kind == "network" else output.logits

    seen = [answer(run)]
    assert tiny.relative_error(answer(run, MIXES[0]), answer(model, MIXES[0])) <= 1e-5
    with torch._dynamo.config.patch(error_on_recompile=True):
        for names in MIXES:
            found = answer(run, names)
            assert tiny.relative_error(found, answer(model, names)) <= 1e-5
            assert all(not torch.equal(found, other) for other in seen)
            seen.append(found)
            assert torch.equal(answer(run), seen[0])
        model.set_adapter("two", inference_mode=True)
        assert torch.equal(answer(run, MIXES[1]), seen[2])
        assert torch.equal(answer(run), seen[3])
        other = threading.Thread(target=lambda: seen.append(answer(run, MIXES[0])))
        other.start()  # a thread that has had no rows yet
        other.join()
        assert torch.equal(seen[-1], seen[1])
    with pytest.raises(ia3.InputError, match="Row 1"):
        answer(run, ["one", "nobody", "one"])
    assert torch.equal(answer(run), seen[3])


def test_training_on_mixes_does_not_recompile():
    model = network()
    model.set_requires_grad(["one", "two", "three"])
    run = compiled(model)
    run(X, adapter_names=MIXES[0]).sum().backward()
    model.zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for names in MIXES[:4]:
            grads = []
            for each in (run, model):
                each(X, adapter_names=names).square().sum().backward()
                grads.append({path: p.grad for path, p in model.named_parameters() if ".ia3_l." in path})
                model.zero_grad()
            for path, found in grads[0].items():
                assert (found is not None) is (path.rpartition(".")[2] in names)
                assert found is None or tiny.relative_error(found, grads[1][path]) <= 1e-4


@pytest.mark.parametrize("kind", ["heads", "experts"])
def test_what_goes_adapter_by_adapter_does_so_between_compiled_parts(kind):
    if kind == "heads":
        model, x = headed(), X
    else:
        model = three(mixtral().model.layers[0].mlp, EXPERTS)
        x = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    run = torch.compile(model, backend="eager")
    run(x, adapter_names=MIXES[0])
    plain = run(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for names in MIXES[1:3]:
            found = run(x, adapter_names=names)
            assert tiny.relative_error(found, model(x, adapter_names=names)) <= 1e-5
            assert tiny.relative_error(found, plain) > 0.01
        assert torch.equal(run(x), plain)


def test_an_adapted_model_in_a_compiled_function():
    """Whole when all rows have one adapter; with names there is a break around the model."""
    model = small("llama").requires_grad_(False)
    batch = inputs("llama")

    def answer(names=None):
        return model(**batch, adapter_names=names).logits * 2

    whole, broken = (torch.compile(answer, backend="eager", fullgraph=full) for full in (True, False))
    assert tiny.relative_error(whole(), answer()) <= 1e-5
    for names in (None, MIXES[0], None):
        assert tiny.relative_error(broken(names), answer(names)) <= 1e-5
    assert model.ia3_routing.rows is None


@pytest.mark.parametrize("strict", [False, True])
def test_an_adapted_model_is_exported(strict):
    model, batch = small("llama"), inputs("llama")
    with torch.no_grad():
        expected = model(**batch).logits
        model(**batch, adapter_names=MIXES[0])
        exported = torch.export.export(model, (), batch, strict=strict).module()
        assert tiny.relative_error(exported(**batch).logits, expected) <= 1e-6
