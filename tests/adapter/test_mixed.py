"""A batch whose rows have an adapter each: every row gets what the whole batch gets under that row's adapter alone."""

import copy
import pickle
import threading
import warnings
from contextlib import contextmanager

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ia3
from ia3 import IA3Config, InputError
from support import tiny, zoo
from support.mixed import ADAPTERS, BASE, NAMES, adapted, add, inputs, row_by_row, under


def check(model, arch: str, names=NAMES, tolerance: float = 1e-6, **kwargs) -> torch.Tensor:
    batch = inputs(arch, len(names), **kwargs)
    with torch.no_grad():
        found = model(**batch, adapter_names=list(names)).logits
        expected = row_by_row(model, names, lambda: model(**batch).logits)
    assert tiny.relative_error(found, expected) <= tolerance
    assert model.ia3_routing.rows is None
    return found


# Forward passes.


def test_each_row_has_its_adapter_whichever_is_active(arch):
    model = adapted(arch)
    found = check(model, arch)
    for active in ("three", "one" if arch == "bert" else ["two", "one"], "two"):  # two heads cannot be active at once
        model.set_adapter(active)
        assert torch.equal(check(model, arch), found)
    with torch.no_grad():
        base = tiny.build(arch)(**inputs(arch)).logits
    assert tiny.relative_error(found[1], base[1]) <= 1e-6
    for row in (0, 2, 3):
        assert tiny.relative_error(found[row], base[row]) > 0.01


@pytest.fixture(scope="module")
def models():
    return {arch: adapted(arch) for arch in ("gpt2", "bart")}


@pytest.mark.parametrize("arch", ["gpt2", "bart"])
@settings(max_examples=30)
@given(names=st.lists(st.sampled_from([*ADAPTERS, BASE]), min_size=1, max_size=5), length=st.integers(3, 10))
def test_any_names_for_any_number_of_rows(models, arch, names, length):
    check(models[arch], arch, names, length=length)


def test_all_ways_to_give_a_batch():
    model, tokens = adapted("llama"), inputs("llama")["input_ids"]
    mask = torch.ones_like(tokens)
    expected = model(input_ids=tokens, adapter_names=NAMES).logits
    embedded = model.get_input_embeddings()(tokens)
    for args, kwargs in (
        ((tokens,), {}),
        ((), {"attention_mask": mask, "input_ids": tokens}),
        ((), {"inputs_embeds": embedded}),
        ((None,), {"inputs_embeds": embedded, "attention_mask": mask}),
        ((), transformers.BatchEncoding({"input_ids": tokens, "attention_mask": mask})),
    ):
        assert tiny.relative_error(model(*args, **kwargs, adapter_names=NAMES).logits, expected) <= 1e-6
    found = model(tokens, adapter_names=NAMES, return_dict=False)
    assert isinstance(found, tuple) and torch.equal(found[0], expected)


def test_rows_go_on_from_a_cache():
    model, tokens = adapted("llama"), inputs("llama")["input_ids"]
    whole = model(tokens, adapter_names=NAMES).logits
    start = model(tokens[:, :5], adapter_names=NAMES, use_cache=True)
    rest = model(tokens[:, 5:], past_key_values=start.past_key_values, adapter_names=NAMES).logits
    assert tiny.relative_error(rest, whole[:, 5:]) <= 1e-5


# Generation.

MODES = {
    "greedy": {},
    "greedy without a cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "beams without a cache": {"num_beams": 3, "use_cache": False},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.5},
    "several samples": {"do_sample": True, "temperature": 0.5, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2},
}


def prompts() -> dict[str, torch.Tensor]:
    """Four of different lengths, padded on the left."""
    tokens = inputs("llama")["input_ids"].clamp(min=3)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 3, 1, 5)):
        mask[row, :padding] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, tiny.PAD), "attention_mask": mask}


def generated(model, tokens: int = 5, **kwargs) -> torch.Tensor:
    """What comes behind the prompts, always as much; by rows."""
    torch.manual_seed(0)  # rows of one place draw the same number, whatever the other rows are
    batch = prompts()
    found = model.generate(**batch, max_new_tokens=tokens, min_new_tokens=tokens, **kwargs)
    return found[:, -tokens:].view(len(batch["input_ids"]), -1, tokens)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5", "bart"])
def test_each_row_generates_as_under_its_adapter_alone(arch):
    # Of others, Bart's likeliest token is the same under each adapter.
    model = adapted(arch, tiny.build(arch, seed=2) if arch == "bart" else None)
    model.set_adapter("three")
    for mode, options in MODES.items():
        found = generated(model, **options, adapter_names=NAMES)
        expected = row_by_row(model, NAMES, lambda options=options: generated(model, **options))
        assert torch.equal(found, expected), mode
        for name in (BASE, "three"):
            with under(model, name):
                assert not torch.equal(found, generated(model, **options)), mode
        assert model.ia3_routing.rows is None


def test_rows_sample_from_the_distributions_of_their_adapters():
    """Not by the seed: 400 rows of each adapter against the probabilities that it gives alone."""
    model, names = adapted("gpt2"), ["one", BASE] * 400
    prompt = prompts()["input_ids"][:1]
    options = {"do_sample": True, "top_k": 0, "temperature": 0.2}
    torch.manual_seed(3)
    found = model.generate(prompt.expand(800, -1), max_new_tokens=1, **options, adapter_names=names)[:, -1]
    expected, seen = {}, {}
    for start, name in enumerate(("one", BASE)):
        with under(model, name), torch.no_grad():
            expected[name] = (model(prompt).logits[0, -1] / 0.2).softmax(-1)
        seen[name] = torch.bincount(found[start::2], minlength=tiny.VOCAB) / 400

    def distance(a, b):
        return (a - b).abs().sum() / 2

    assert distance(expected["one"], expected[BASE]) > 0.5
    for name in expected:
        assert distance(seen[name], expected[name]) < 0.15
        assert expected[name].max() < 0.9


@pytest.mark.parametrize("helper", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_generation_of_a_row(helper):
    model = adapted("llama")
    options = {helper: 2 if helper == "prompt_lookup_num_tokens" else tiny.build("llama", seed=1)}
    prompt = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    results = {}
    for name in ("one", "two", BASE):
        kwargs = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        results[name] = model.generate(prompt, **kwargs, **options, adapter_names=[name])
        with under(model, name):
            assert torch.equal(results[name], model.generate(prompt, **kwargs))
    assert not torch.equal(results["one"], results["two"])


def test_a_call_while_a_mixed_batch_generates_is_one_of_its_own():
    model = adapted("llama")
    plain = model(**prompts()).logits

    class Look(transformers.LogitsProcessor):
        def __call__(self, tokens, scores):
            assert torch.equal(model(**prompts()).logits, plain)  # the active adapter's
            model(**prompts(), adapter_names=["two"] * 4)
            with pytest.raises(InputError):
                model(**prompts(), adapter_names=["two"])
            return scores

    found = generated(model, adapter_names=NAMES, logits_processor=transformers.LogitsProcessorList([Look()]))
    assert torch.equal(found, generated(model, adapter_names=NAMES))


# Modules that adapters train in full.


def head(kind: str):
    """A tiny model with a head for each adapter."""
    arch, cls, task = {
        "bert": ("bert", transformers.BertForSequenceClassification, "SEQ_CLS"),
        "llama": ("llama", transformers.LlamaForSequenceClassification, "SEQ_CLS"),
        "gpt2": ("gpt2", transformers.GPT2ForSequenceClassification, "SEQ_CLS"),
        "tokens": ("bert", transformers.BertForTokenClassification, "TOKEN_CLS"),
        "answers": ("bert", transformers.BertForQuestionAnswering, "QUESTION_ANS"),
    }[kind]
    torch.manual_seed(0)
    base = tiny.randomized(cls(tiny.config(arch, num_labels=2 if kind == "answers" else tiny.LABELS)).eval())
    return adapted(arch, base, task_type=task), arch


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "tokens", "answers"])
def test_each_row_goes_through_its_own_head(kind):
    model, arch = head(kind)
    assert len(model.ia3_trained_modules) == 1
    model.set_adapter("three")
    batch, names = inputs(arch), ("one", BASE, "two", "three")

    def call(**kwargs):
        with torch.no_grad():
            output = model(**batch, **kwargs)
        return torch.cat([value for value in output.to_tuple() if torch.is_tensor(value)], -1)

    found = call(adapter_names=names)
    assert tiny.relative_error(found, row_by_row(model, names, call)) <= 1e-5
    trained = next(iter(model.ia3_trained_modules.values()))
    for name in ADAPTERS:  # the head of each row, and no other
        before = trained.modules_to_save[name].weight.detach().clone()
        trained.modules_to_save[name].weight.data += 1
        changed = (call(adapter_names=names) != found).flatten(1).any(1)
        assert changed.tolist() == [name == each for each in names]
        trained.modules_to_save[name].weight.data = before


def test_the_loss_of_a_mixed_batch_is_the_mean_of_its_rows():
    model, arch = head("bert")
    labels = torch.tensor([0, 2, 1, 0])
    output = model(**inputs(arch), labels=labels, adapter_names=NAMES)
    alone = row_by_row(model, NAMES, lambda: model(**inputs(arch)).logits)
    expected = -alone.log_softmax(-1)[torch.arange(4), labels].mean()
    torch.testing.assert_close(output.loss, expected)


def test_an_adapter_without_a_head_answers_with_the_original():
    model = tiny.adapt("bert", ia3, adapter="one", task_type="SEQ_CLS")
    add(model, "bert", "two", 2, task_type=None)
    assert list(next(iter(model.ia3_trained_modules.values())).modules_to_save) == ["one"]
    check(model, "bert", ("two", "one", BASE, "two"), 1e-5)


def test_heads_for_different_numbers_of_labels_cannot_be_in_one_batch():
    model, arch = head("bert")
    trained = next(iter(model.ia3_trained_modules.values()))
    trained.modules_to_save["two"] = nn.Linear(tiny.HIDDEN, 5)
    with refused(model, arch, "labels"):
        model(**inputs(arch), adapter_names=NAMES)
    assert model(**inputs(arch), adapter_names=["two"] * 4).logits.shape == (4, 5)
    check(model, arch, ("one", BASE, "three", "one"), 1e-5)


def test_a_whole_layer_can_be_a_rows_own():
    """Its arguments are divided too, in tuples as well; a cache, which all groups would write, is refused."""
    fields = {"feedforward_modules": [], "modules_to_save": ["layers.1"], "task_type": None}
    model = adapted("llama", target_modules=["layers.0.mlp.down_proj"], **fields)
    places = torch.arange(8)[None] + torch.tensor([[0], [3], [1], [20]])
    batch = {**inputs("llama"), "position_ids": places, "use_cache": False}
    with torch.no_grad():
        found = model(**batch, adapter_names=NAMES).logits
        assert tiny.relative_error(found, row_by_row(model, NAMES, lambda: model(**batch).logits)) <= 1e-5
    with refused(model, "llama", "DynamicCache.*use_cache=False"):
        model(**inputs("llama"), use_cache=True, adapter_names=NAMES)
    fields |= {"target_modules": ["encoder.block.0.layer.1.DenseReluDense.wo"], "modules_to_save": ["decoder.block.1"]}
    t5 = adapted("t5", **fields)
    with refused(t5, "t5", "EncoderDecoderCache"):
        t5(**inputs("t5"), use_cache=True, adapter_names=NAMES)
    whole = adapted("llama", **{**fields, "target_modules": ["lm_head"], "modules_to_save": ["model"]})
    with refused(whole, "llama", "BaseModelOutputWithPast"):
        whole(**inputs("llama"), use_cache=False, adapter_names=NAMES)


def test_a_module_that_another_reads_cannot_be_a_rows_own():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            assert self.head.out_features == 3
            return nn.functional.linear(self.body(x), self.head.weight)

    config = {"target_modules": ["body"], "feedforward_modules": [], "modules_to_save": ["head"]}
    model = ia3.get_peft_model(Reads(), IA3Config(**config), adapter_name="one")
    model.add_adapter("two", IA3Config(**config))
    for seed, name in enumerate(ADAPTERS[:2], start=1):
        tiny.randomize(model, seed, name)
    x = torch.randn(2, 4)
    with pytest.raises(InputError, match="reads the weight of a Linear"):
        model(x, adapter_names=["one", "two"])
    assert torch.equal(model(x, adapter_names=["two", "two"]), row_by_row(model, ["two"] * 2, lambda: model(x)))


def test_a_module_whose_results_are_not_rows_cannot_be_a_rows_own():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3), nn.Flatten(0, 1))

        def forward(self, x):
            return self.head(self.body(x))

    config = {"target_modules": ["body"], "feedforward_modules": [], "modules_to_save": ["head"]}
    model = ia3.get_peft_model(Flat(), IA3Config(**config), adapter_name="one")
    with pytest.raises(InputError, match="a result for each of 2 rows, found 6"):
        model(torch.randn(2, 3, 4), adapter_names=["one", BASE])


# Training.


def gradients(model, *names: str) -> dict[str, torch.Tensor | None]:
    """Of adapters' parameters, which are reset."""
    found = {path: p.grad for name in names for path, p in tiny.adapter_parameters(model, name).items()}
    model.zero_grad()
    return found


def trainable(arch: str, base: nn.Module | None = None, **fields):
    """All in float64, with every adapter trainable."""
    model = adapted(arch, base, **fields).double().train()
    model.set_requires_grad(ADAPTERS)
    return model


def backward(logits: torch.Tensor, rows=slice(None)) -> None:
    """Of a sum of squares that weighs each number in another way, over some rows."""
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view(logits.shape)
    (logits.square() * weights)[rows].sum().backward()


@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5", "bert"])
def test_gradients_are_those_of_each_adapters_rows_alone(arch):
    """Bert with a head for each adapter."""
    model = trainable(arch)
    batch = inputs(arch)
    backward(model(**batch, adapter_names=NAMES).logits)
    found = gradients(model, "one", "two")
    assert all(gradient is None for gradient in gradients(model, "three").values())
    for name in ("one", "two"):
        with under(model, name):
            backward(model(**batch).logits, [row for row, each in enumerate(NAMES) if each == name])
    for path, expected in gradients(model, "one", "two").items():
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(found[path], expected, rtol=1e-9, atol=1e-9)


def test_frozen_adapters_and_the_base_get_no_gradients():
    model = trainable("llama")
    batch = inputs("llama")
    backward(model(**batch, adapter_names=NAMES).logits)
    expected = gradients(model, "one")
    model.set_requires_grad("two", False)
    backward(model(**batch, adapter_names=NAMES).logits)
    found, rest = gradients(model, "one"), gradients(model, "two", "three")
    assert all(torch.equal(found[path], expected[path]) for path in expected)
    assert not any(isinstance(gradient, torch.Tensor) for gradient in rest.values())
    assert not model(**batch, adapter_names=[BASE] * 4).logits.requires_grad
    assert not model(**batch, adapter_names=["two"] * 4).logits.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
@pytest.mark.parametrize("arch", ["llama", "t5", "bert"])
def test_checkpointed_layers_run_again_with_the_rows_of_their_pass(arch):
    model = trainable(arch)
    batch, other = inputs(arch), inputs(arch, seed=1)
    mixed, swapped = list(NAMES), ["three", "two", BASE, "one"]
    extra = {} if arch == "bert" else {"use_cache": False}

    def step():
        """Two mixed passes, one for the active adapter, and then all backward."""
        passes = [
            model(**batch, **extra, adapter_names=mixed).logits,
            model(**batch, **extra).logits,
            model(**other, **extra, adapter_names=swapped).logits,
        ]
        model(**other, **extra, adapter_names=["two"] * 4)
        sum(logits.square().sum() for logits in passes).backward()
        return gradients(model, *ADAPTERS)

    expected = step()
    calls = []
    layer = next(iter(model.ia3_layers.values()))
    layer.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for whose in (model.model, model):  # whether only the wrapped model is in training mode or both are
        model.eval()
        whose.train()
        for path, gradient in step().items():
            torch.testing.assert_close(gradient, expected[path], rtol=1e-9, atol=1e-9)
        assert len(calls) == 7  # once more for each of three
        calls.clear()
    assert model.ia3_routing.rows is None


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated", "ignore:.*use_reentrant")
def test_checkpointing_by_reentrance_is_refused():
    """It goes backward layer by layer, where rows have one matrix for all layers."""
    model = trainable("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    batch = {**inputs("llama"), "use_cache": False}
    with refused(model, "llama", "use_reentrant.: False"):
        model(**batch, adapter_names=NAMES)
    with torch.no_grad():
        model(**batch, adapter_names=NAMES)
    backward(model(**batch).logits)  # as before, where all rows have one adapter
    assert all(gradient is not None for gradient in gradients(model, "one").values())


def test_under_autocast():
    model = adapted("llama").train()
    model.set_requires_grad(ADAPTERS)
    batch = inputs("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(**batch, adapter_names=NAMES).logits
        expected = row_by_row(model, NAMES, lambda: model(**batch).logits)
    assert found.dtype == torch.bfloat16
    assert tiny.relative_error(found, expected) <= 1e-2
    assert tiny.relative_error(found.float(), model(**batch, adapter_names=NAMES).logits) > 1e-4
    found.float().square().sum().backward()
    grads = gradients(model, "one", "two")
    expected.float().square().sum().backward()
    for path, gradient in gradients(model, "one", "two").items():
        assert grads[path].dtype == torch.float32
        assert tiny.relative_error(grads[path], gradient) <= 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_half_precision_base(dtype):
    model = adapted("llama", tiny.build("llama").to(dtype))
    assert check(model, "llama", tolerance=1e-2).dtype == dtype
    model.to(dtype)
    assert next(model.adapter_parameters("one")).dtype == dtype
    check(model, "llama", tolerance=1e-2)
    for vector in model.adapter_parameters("two"):  # one adapter of another dtype
        vector.data = vector.data.float()
    check(model, "llama", tolerance=1e-2)


# Adapters that differ in what they rescale.


def test_adapters_of_different_modules_and_sides():
    model = tiny.adapt("llama", ia3, adapter="usual")
    for seed, (name, targets, feedforward) in enumerate(
        [
            ("outputs", ["down_proj", "k_proj"], []),  # the other side of one module
            ("inputs", ["k_proj", "down_proj"], ["k_proj"]),  # and the reverse
            ("elsewhere", ["q_proj", "up_proj"], ["up_proj"]),
            ("one layer", ["layers.1.mlp.down_proj"], ["layers.1.mlp.down_proj"]),
        ]
    ):
        model.add_adapter(name, IA3Config(target_modules=targets, feedforward_modules=feedforward))
        tiny.randomize(model, seed, name)
    check(model, "llama", ("outputs", "usual", "elsewhere", BASE, "inputs", "one layer"), 1e-5)
    check(model, "llama", ("one layer", BASE), 1e-5)
    model.train().double()
    model.set_requires_grad(list(model.peft_config))
    names, batch = ("inputs", "outputs", "usual", "elsewhere"), inputs("llama")
    backward(model(**batch, adapter_names=names).logits)
    found = gradients(model, *names)
    for row, name in enumerate(names):
        with under(model, name):
            backward(model(**batch).logits, [row])
    for path, expected in gradients(model, *names).items():
        torch.testing.assert_close(found[path], expected, rtol=1e-9, atol=1e-9)


def test_masked_vectors_of_a_fused_projection():
    """Keys and values of GPT-2's c_attn beside an adapter that rescales queries too."""
    model = ia3.get_peft_model(tiny.build("gpt2"), IA3Config(), adapter_name="masked").eval()
    model.add_adapter("full", IA3Config(target_modules=["c_attn"], feedforward_modules=[]), key_value_only=False)
    for seed, name in enumerate(("masked", "full")):
        tiny.randomize(model, seed, name)
    fused = next(layer for path, layer in model.ia3_layers.items() if path.endswith("c_attn"))
    assert [name for name, held in fused.held.items() if held.mask is not None] == ["masked"]
    names = ("full", "masked", BASE, "masked")
    check(model, "gpt2", names, 1e-5)
    model.set_requires_grad(["masked", "full"])
    backward(model(**inputs("gpt2"), adapter_names=names).logits)
    gradient = fused.ia3_l["masked"].grad
    assert gradient[: tiny.HIDDEN].abs().max() == 0 < gradient[tiny.HIDDEN :].abs().min()


def test_adapters_that_come_and_go():
    model = adapted("llama")
    before = check(model, "llama", ("one", "two", "three", BASE))
    model.delete_adapter("two")
    with refused(model, "llama", "Row 1: adapter 'two' does not exist"):
        model(**inputs("llama"), adapter_names=["one", "two", "three", BASE])
    assert torch.equal(check(model, "llama", ("one", "three", "three", BASE))[[0, 2, 3]], before[[0, 2, 3]])
    add(model, "llama", "four", 9, target_modules=["q_proj", "k_proj"], feedforward_modules=[])
    model.add_weighted_adapter(["one", "three"], [0.3, 0.7], "sum")
    check(model, "llama", ("sum", "four", "three", "one"))
    tiny.randomize(model, 12, "one")  # values change in place
    assert not torch.equal(check(model, "llama", ("one", "three", "three", BASE))[0], before[0])
    model.load_state_dict({key: value + 0.01 for key, value in model.state_dict().items()}, assign=True)
    check(model, "llama", ("sum", "four", "three", "one"))
    for name in list(model.peft_config)[:-1]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.delete_adapter(name)
    check(model, "llama", ("sum", BASE))


def test_a_model_of_two_wrappers():
    """The second adapted model takes over the adapters that are in the base already."""
    first = tiny.adapt("llama", ia3, adapter="one")
    second = ia3.get_peft_model(first.get_base_model(), IA3Config(), adapter_name="two").eval()
    tiny.randomize(second, 2, "two")
    check(second, "llama", ("two", BASE, "two"))
    with pytest.raises(InputError, match="'one' does not exist"):
        second(**inputs("llama"), adapter_names=["one"] * 4)


# States.


def test_switched_off_all_rows_are_the_bases():
    model, batch = adapted("llama"), inputs("llama")
    base = tiny.build("llama")(**batch).logits
    with model.disable_adapter():
        assert torch.equal(model(**batch, adapter_names=NAMES).logits, base)
        with refused(model, "llama", "does not exist"):
            model(**batch, adapter_names=["none"] * 4)
        prompt = prompts()["input_ids"]
        found = model.generate(prompt, max_new_tokens=3, adapter_names=NAMES)
        assert torch.equal(found, tiny.build("llama").generate(prompt, max_new_tokens=3))
    check(model, "llama")


def test_merged_adapters_are_all_rows():
    model = adapted("llama")
    model.merge_adapter(["two"])
    with refused(model, "llama", "merged into the weights .'two'.*unmerge_adapter"):
        model(**inputs("llama"), adapter_names=NAMES)
    with refused(model, "llama", "merged into the weights"):
        model.generate(**prompts(), adapter_names=NAMES)
    model.unmerge_adapter()
    check(model, "llama")


@contextmanager
def refused(model, arch: str, match: str):
    """What is done within is refused in one line, and leaves the model as it was."""
    with torch.no_grad():
        before = model(**inputs(arch)).logits
    with pytest.raises(InputError, match=match) as error:
        yield
    assert "\n" not in str(error.value)
    assert model.ia3_routing.rows is None
    with torch.no_grad():
        assert torch.equal(model(**inputs(arch)).logits, before)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["one", "two"], "the 4 rows of the batch, found 2"),
        (["one"] * 5, "the 4 rows of the batch, found 5"),
        ([], "the 4 rows of the batch, found 0"),
        ("one", "a list of a name for each row, found 'one'"),
        ("base", "a list of a name for each row"),  # as many letters as rows
        (["one", None, "two", "one"], "a list of a name for each row"),
        ([0, 1, 2, 3], "a list of a name for each row"),
        (["one", "two", "tow", "one"], "Row 2: adapter 'tow' does not exist; close to it: 'two'"),
        (["one", "base", "xyz", "one"], "Row 1: adapter 'base'"),
        (["", "one", "one", "one"], "Row 0: adapter ''.*there are 'one', 'two', 'three'"),
    ],
)
def test_names_that_do_not_fit_are_refused(names, match):
    model = adapted("llama")
    with refused(model, "llama", match):
        model(**inputs("llama"), adapter_names=names)
    with refused(model, "llama", match):
        model.generate(**prompts(), adapter_names=names)


def test_no_names_for_no_given_rows_are_refused():
    model = adapted("gpt2")
    with refused(model, "gpt2", "for the rows of the batch, found 0"):
        model.generate(adapter_names=[])
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    with under(model, "two"):
        expected = model.generate(**kwargs)
    assert torch.equal(model.generate(adapter_names=["two"], **kwargs), expected)


def test_an_error_inside_the_model_leaves_no_rows():
    model = adapted("llama")
    for call in (model, model.generate):
        with pytest.raises(IndexError):
            call(input_ids=torch.full((4, 3), 10**6), adapter_names=NAMES)
        assert model.ia3_routing.rows is None
    check(model, "llama")


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        # Keys of positions, which all rows share.
        ("deberta-v2", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}),
        # Experts that are modules of their own.
        ("nllb-moe", {"encoder_sparse_step": 1, "decoder_sparse_step": 1}),
    ],
)
def test_models_that_mix_rows_refuse(arch, changes):
    model = ia3.IA3Model(zoo.build(arch, **changes), {"one": IA3Config(), "two": IA3Config()}).eval()
    batch = zoo.inputs(model.model, 4)
    with torch.no_grad():
        before = model(**batch)[0]
        with pytest.raises(InputError, match="one adapter at a time"):
            model(**batch, adapter_names=["one", "two", "one", BASE])
        assert torch.equal(model(**batch)[0], before)


def test_queries_of_an_image_model_that_come_first():
    """Their number, 100, can be divided among the rows too."""
    base = zoo.build("mask2former")
    images = zoo.inputs(base, 4)
    model = ia3.IA3Model(base, {"one": IA3Config(), "two": IA3Config()}).eval().requires_grad_(False)
    for seed, name in enumerate(("one", "two")):
        tiny.randomize(model, seed, name)

    def call(**kwargs):
        return model(**images, **kwargs).transformer_decoder_last_hidden_state

    found, expected = call(adapter_names=NAMES), row_by_row(model, NAMES, call)
    assert found.shape[:2] == (4, 100)
    assert tiny.relative_error(found, expected) <= 1e-5


def test_rows_with_different_numbers_of_images():
    """The vision tower gets all images one after the other: right when rows have equally many, refused otherwise."""
    base = zoo.build("llava", "IMAGE_TEXT").requires_grad_(False)
    image, size = base.config.image_token_id, base.config.vision_config.image_size
    count = (size // base.config.vision_config.patch_size) ** 2
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    even = torch.tensor([[image] * count + [7] * count + [5], [image] * count + [9] * count + [5]])
    uneven = torch.tensor([[image] * count * 2 + [5], [7] * count * 2 + [5]])
    names = ("one", "two")

    def build(config):
        model = ia3.IA3Model(copy.deepcopy(base), {"one": config(), "two": config()}).eval()
        for seed, name in enumerate(names):
            tiny.randomize(model, seed, name)
        return model

    def check(model, tokens):
        batch = {"input_ids": tokens, "pixel_values": images}
        with torch.no_grad():
            found = model(**batch, adapter_names=names).logits
            expected = row_by_row(model, names, lambda: model(**batch).logits)
        assert tiny.relative_error(found, expected) <= 1e-5

    model = build(IA3Config)
    check(model, even)
    for call in (model, model.generate):
        with pytest.raises(InputError, match="different amounts of image input"):
            call(input_ids=uneven, pixel_values=images, adapter_names=names)
        call(input_ids=uneven, pixel_values=images, adapter_names=["two", "two"])
    check(build(lambda: IA3Config(target_modules=r".*language_model.*k_proj", feedforward_modules=[])), uneven)


def test_guided_generation_that_doubles_the_batch_refuses():
    model = ia3.IA3Model(zoo.build("dia"), {"one": IA3Config(), "two": IA3Config()}).eval()
    for seed, name in enumerate(("one", "two")):
        tiny.randomize(model, seed, name)
    tokens = torch.randint(4, 60, (2, 8), generator=torch.Generator().manual_seed(0))

    def generate(**kwargs):
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, **kwargs)

    with pytest.raises(InputError, match="guidance_scale=1"):
        generate(adapter_names=["one", "two"], guidance_scale=3.0)
    assert torch.equal(
        generate(adapter_names=["two", "two"], guidance_scale=3.0),
        row_by_row(model, ["two", "two"], lambda: generate(guidance_scale=3.0)),
    )
    found = generate(adapter_names=["one", "two"], guidance_scale=1.0)
    assert torch.equal(found, row_by_row(model, ["one", "two"], lambda: generate(guidance_scale=1.0)))


def test_no_adapter_can_be_called_as_none_is():
    with pytest.raises(InputError, match="__base__"):
        ia3.get_peft_model(tiny.build("llama"), IA3Config(), adapter_name=BASE)


# Threads and copies.


def test_threads_have_their_own_rows():
    """Both are inside the model at once, step by step."""
    model, batch = adapted("llama").requires_grad_(False), inputs("llama")
    mixes = {0: NAMES, 1: ("two", "two", BASE, "three"), 2: None}
    expected = {key: model(**batch, **({} if n is None else {"adapter_names": n})).logits for key, n in mixes.items()}
    meeting = threading.Barrier(len(mixes), timeout=20)
    for layer in model.ia3_layers.values():
        layer.register_forward_pre_hook(lambda *_: [meeting.wait()].clear())
    found = {}

    def run(key, names):
        for _ in range(5):
            found[key] = model(**batch, **({} if names is None else {"adapter_names": names})).logits

    threads = [threading.Thread(target=run, args=each) for each in mixes.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(layer) for layer in model.ia3_layers.values()}) == 6
    assert all(torch.equal(found[key], expected[key]) for key in mixes)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_rows_of_its_own(copied):
    model = adapted("llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()  # by a hook that cannot be pickled
    batch = {**inputs("llama"), "use_cache": False}
    model(**batch, adapter_names=NAMES).logits.sum().backward()  # its layers now run again with their rows
    expected = gradients(model, "one")
    inside = []

    class Watching(nn.Module):
        def forward(self, x):
            inside.append(copied(model.ia3_routing).rows)  # what a pass is at is no part of a copy
            return x

    norm, model.model.model.norm = model.model.model.norm, Watching()
    model(**batch, adapter_names=NAMES)
    model.model.model.norm = norm
    assert inside == [None]
    other = copied(model)
    tiny.randomize(model, 8, "one")
    other(**batch, adapter_names=NAMES).logits.sum().backward()
    assert model.ia3_routing.rows is None
    for path, gradient in gradients(other, "one").items():
        assert torch.equal(gradient, expected[path])
    check(other.eval(), "llama")
    check(model.eval(), "llama")


# Beside PEFT, which knows no such batches.


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_each_row_is_pefts_under_its_adapter(arch):
    ours, theirs = adapted(arch), tiny.adapt(arch, peft, adapter="one")
    targets, feedforward = tiny.TARGETS[arch]
    config = {"task_type": tiny.TASKS[arch], "target_modules": targets, "feedforward_modules": feedforward}
    theirs.add_adapter("two", peft.IA3Config(**config))
    tiny.randomize(theirs, 2, "two")
    theirs.eval()
    batch = inputs(arch)
    with torch.no_grad():
        found = ours(**batch, adapter_names=NAMES).logits
        with theirs.disable_adapter():
            expected = {BASE: theirs(**batch).logits}
        for name in ("one", "two"):
            theirs.set_adapter(name)
            expected[name] = theirs(**batch).logits
    for row, name in enumerate(NAMES):
        assert tiny.relative_error(found[row], expected[name][row]) <= 1e-5
