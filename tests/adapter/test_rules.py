"""Each rule against its formula, written out in float64 without the package's code, and in whole models."""

import copy
import itertools
import warnings

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.dbrx import modeling_dbrx
from transformers.models.jetmoe import modeling_jetmoe
from transformers.pytorch_utils import Conv1D

import ia3
from ia3 import IA3Config, IA3Layer, InputError, WeightRule, register_rule
from ia3.adapter.routing import Routing
from ia3.adapter.rules import RULES, RowLayout, Rule, find_rule
from support import tiny

sides = pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])

DOUBLE = {"dtype": torch.float64}


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module, frozen, in float64, every parameter random."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, **DOUBLE))
    return module


def rescaled(base: nn.Module, feedforward: bool, seed: int = 1, **kwargs) -> IA3Layer:
    """A layer with one active adapter, `a`, of random float64 values."""
    layer = IA3Layer(base, Routing(), **kwargs)
    torch.manual_seed(seed)
    layer.add("a", feedforward, ones=False)
    layer.routing.switch(active=("a",))
    return layer.double()


def vector_of(layer: IA3Layer) -> torch.Tensor:
    return layer.ia3_l["a"].detach().flatten()


def first(result):
    """Of a module's result the tensor that counts."""
    return result[0] if isinstance(result, tuple) else result


def check_layer(layer: IA3Layer, *args, expected: torch.Tensor, **kwargs) -> None:
    """The layer answers as expected; merged alike; disabled and unmerged bit for bit as the base; right gradients."""
    base = layer.base_layer
    before, plain = tiny.state(base), first(base(*args, **kwargs))
    torch.testing.assert_close(first(layer(*args, **kwargs)), expected, rtol=1e-10, atol=1e-10)
    assert (expected - plain).abs().max() > 0.1

    layer.routing.switch(enabled=False)
    assert torch.equal(first(layer(*args, **kwargs)), plain)
    layer.routing.switch(enabled=True)

    vector = layer.ia3_l["a"].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: first(torch.func.functional_call(layer, {"ia3_l.a": v}, args, kwargs)), (vector,), fast_mode=True
    )

    layer.merge(["a"])
    layer.routing.switch(merged=("a",))
    torch.testing.assert_close(first(base(*args, **kwargs)), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(first(layer(*args, **kwargs)), expected, rtol=1e-10, atol=1e-10)
    layer.unmerge()
    layer.routing.switch(merged=())
    assert tiny.same_bits(base.state_dict(), before)


# Linear maps and convolutions.


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@sides
def test_a_linear_map_is_the_formula(kind, bias, feedforward):
    base = nn.Linear(5, 7, bias=bias) if kind == "linear" else Conv1D(7, 5)
    layer = rescaled(filled(base), feedforward)
    if kind == "conv1d" and not bias:
        layer.base_layer.bias.zero_()
    weight = base.weight.clone() if kind == "linear" else base.weight.clone().T
    x = torch.randn(2, 3, 5, **DOUBLE)
    vector, b = vector_of(layer), base.bias.clone() if base.bias is not None else torch.zeros(7, **DOUBLE)
    if feedforward:
        expected = torch.einsum("oi,i,bti->bto", weight, vector, x) + b
    else:
        expected = torch.einsum("oi,o,bti->bto", weight, vector, x) + vector * b
    check_layer(layer, x, expected=expected)


def convolution(base: nn.Module, x: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """after ⊙ (W ∗ (before ⊙ x) + b), one output at a time; zero padding."""
    dimensions = x.dim() - 2
    groups, outputs = base.groups, base.out_channels
    inputs = base.in_channels // groups
    padded = torch.zeros(*x.shape[:2], *(s + 2 * p for s, p in zip(x.shape[2:], base.padding, strict=True)), **DOUBLE)
    inner = tuple(slice(p, p + s) for s, p in zip(x.shape[2:], base.padding, strict=True))
    padded[(slice(None), slice(None), *inner)] = x
    for channel in range(base.in_channels):
        padded[:, channel] *= before[channel]
    reach = [d * (k - 1) + 1 for d, k in zip(base.dilation, base.kernel_size, strict=True)]
    sizes = [(padded.shape[2 + i] - reach[i]) // base.stride[i] + 1 for i in range(dimensions)]
    result = torch.zeros(len(x), outputs, *sizes, **DOUBLE)
    for place in itertools.product(*map(range, sizes)):
        starts = [p * s for p, s in zip(place, base.stride, strict=True)]
        window = tuple(slice(a, a + r, d) for a, r, d in zip(starts, reach, base.dilation, strict=True))
        for o in range(outputs):
            group = o // (outputs // groups)
            seen = padded[(slice(None), slice(group * inputs, (group + 1) * inputs), *window)]
            value = (seen * base.weight[o]).flatten(1).sum(1)
            value = value + (0 if base.bias is None else base.bias[o])
            result[(slice(None), o, *place)] = after[o] * value
    return result


CONVOLUTIONS = {
    "1d": (nn.Conv1d, (4, 6, 3), {}, (7,)),
    "1d stride, padding, dilation": (nn.Conv1d, (4, 6, 3), {"stride": 2, "padding": 2, "dilation": 2}, (9,)),
    "1d depthwise": (nn.Conv1d, (6, 6, 3), {"groups": 6, "padding": 1}, (5,)),
    "1d no bias": (nn.Conv1d, (3, 4, 2), {"bias": False}, (5,)),
    "2d": (nn.Conv2d, (4, 6, 3), {}, (4, 5)),
    "2d uneven": (
        nn.Conv2d,
        (4, 6, (3, 2)),
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
        (5, 4),
    ),
    "2d groups": (nn.Conv2d, (4, 6, 2), {"groups": 2}, (3, 4)),
    "2d groups, no bias": (nn.Conv2d, (6, 6, 2), {"groups": 3, "bias": False}, (3, 3)),
    "2d depthwise with two outputs each": (nn.Conv2d, (3, 6, 2), {"groups": 3}, (3, 3)),
    "2d one by one": (nn.Conv2d, (4, 6, 1), {}, (2, 2)),
    "3d": (nn.Conv3d, (2, 4, 2), {"padding": 1}, (2, 2, 3)),
    "3d groups": (nn.Conv3d, (4, 6, 2), {"groups": 2, "stride": 2, "bias": False}, (3, 3, 3)),
}


def make_convolution(case: str) -> tuple[nn.Module, torch.Tensor]:
    kind, sizes, options, space = CONVOLUTIONS[case]
    base = filled(kind(*sizes, **options))
    return base, torch.randn(2, sizes[0], *space, generator=torch.Generator().manual_seed(3), **DOUBLE)


@pytest.mark.parametrize("case", CONVOLUTIONS)
@sides
def test_a_convolution_is_the_formula(case, feedforward):
    base, x = make_convolution(case)
    layer = rescaled(base, feedforward)
    channels = base.in_channels if feedforward else base.out_channels
    assert layer.ia3_l["a"].shape == (1, channels, *[1] * (x.dim() - 2))
    before = vector_of(layer) if feedforward else torch.ones(base.in_channels, **DOUBLE)
    after = torch.ones(base.out_channels, **DOUBLE) if feedforward else vector_of(layer)
    check_layer(layer, x, expected=convolution(base, x, before, after))


@sides
def test_a_convolution_takes_an_input_without_rows(feedforward):
    base, x = make_convolution("2d")
    layer = rescaled(base, feedforward)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


@settings(max_examples=40)
@given(
    groups=st.integers(1, 3),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    feedforward=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_convolution_is_the_formula(
    groups, inputs, outputs, kernel, stride, padding, dilation, bias, feedforward, seed
):
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    base = filled(nn.Conv1d(groups * inputs, groups * outputs, kernel, **options), seed)
    layer = rescaled(base, feedforward, seed)
    x = torch.randn(1, base.in_channels, 6, generator=torch.Generator().manual_seed(seed), **DOUBLE)
    before = vector_of(layer) if feedforward else torch.ones(base.in_channels, **DOUBLE)
    after = torch.ones(base.out_channels, **DOUBLE) if feedforward else vector_of(layer)
    expected = convolution(base, x, before, after)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    layer.merge(["a"])
    torch.testing.assert_close(base(x), expected, rtol=1e-10, atol=1e-10)


class Image(nn.Module):
    """A small network of convolutions, for ours and PEFT's models alike."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        self.first = conv(3, 4, 2, padding=1)
        self.second = conv(4, 6, 2, groups=2, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.second(torch.relu(self.first(x)))
        return self.head(x.flatten(2).mean(-1))


def image(library, dimensions: int, adapter: str = "default"):
    torch.manual_seed(0)
    base = Image(dimensions).eval()
    config = library.IA3Config(target_modules=["first", "second", "head"], feedforward_modules=["second"])
    model = library.get_peft_model(base, config, adapter_name=adapter).eval()
    tiny.randomize(model, 1, adapter)
    return model


@pytest.mark.parametrize("dimensions", [2, 3])
def test_convolutions_are_pefts(dimensions, tmp_path):
    """Outputs, merged weights, names and shapes, and checkpoints in both directions."""
    ours, theirs = image(ia3, dimensions), image(peft, dimensions)
    x = torch.randn(2, 3, *[4] * dimensions, generator=torch.Generator().manual_seed(0))
    expected = theirs(x).detach()
    assert tiny.relative_error(ours(x), expected) <= 1e-6
    for model in (ours, theirs):
        model(x).square().sum().backward()
    found, wanted = tiny.adapter_parameters(ours), tiny.adapter_parameters(theirs)
    assert {name: p.shape for name, p in found.items()} == {name: p.shape for name, p in wanted.items()}
    assert found["first.ia3_l.default"].shape == (1, 4, *[1] * dimensions)
    for name, parameter in found.items():
        assert tiny.relative_error(parameter.grad, wanted[name].grad) <= 1e-5

    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    torch.manual_seed(0)
    for library, folder in ((ia3, "theirs"), (peft, "ours")):
        torch.manual_seed(0)
        loaded = library.PeftModel.from_pretrained(Image(dimensions), tmp_path / folder)
        assert tiny.relative_error(loaded(x), expected) <= 1e-6

    merged, reference = ours.merge_and_unload(), theirs.merge_and_unload()
    assert type(merged.first) is type(reference.first) is {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    for (name, parameter), other in zip(merged.named_parameters(), reference.parameters(), strict=True):
        assert tiny.relative_error(parameter.detach(), other.detach()) <= 1e-6, name


# Embeddings.


def test_an_embedding_is_the_formula():
    base = filled(nn.Embedding(9, 4))
    layer = rescaled(base, False)
    assert layer.ia3_l["a"].shape == (4, 1)
    tokens = torch.tensor([[3, 3, 8], [0, 1, 2]])
    expected = torch.stack([base.weight[t].clone() * vector_of(layer) for t in tokens.flatten()]).view(2, 3, 4)
    check_layer(layer, tokens, expected=expected)


def test_an_embeddings_input_cannot_be_rescaled(llama):
    config = IA3Config(target_modules=["embed_tokens", "k_proj"], feedforward_modules=["embed_tokens"])
    with pytest.raises(InputError) as error:
        ia3.get_peft_model(llama, config)
    message = str(error.value)
    assert "model.embed_tokens" in message and "feedforward_modules" in message and "\n" not in message


EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte", "t5": "shared"}


def with_embedding(arch: str, extra: tuple[str, ...] = ()):
    base = tiny.build(arch, tie_word_embeddings=True)
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
    targets, feedforward = tiny.TARGETS[arch]
    config = IA3Config(target_modules=[*targets, EMBEDDINGS[arch], *extra], feedforward_modules=feedforward)
    model = ia3.get_peft_model(base, config).eval()
    tiny.randomize(model)
    return base, model


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_merging_changes_one_of_two_tied_embeddings_only(arch):
    base, model = with_embedding(arch)
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    original, values = outputs.weight, outputs.weight.detach().clone()
    adapted = tiny.logits(model, arch)
    model.merge_adapter()
    assert tiny.relative_error(tiny.logits(model, arch), adapted) <= 1e-5
    assert outputs.weight is original and torch.equal(outputs.weight, values)
    assert not torch.equal(inputs.weight, values)
    model.unmerge_adapter()
    assert inputs.weight is outputs.weight is original and torch.equal(original, values)
    assert torch.equal(tiny.logits(model, arch), adapted)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_model_merged_with_a_tied_embedding_is_saved_untied(arch, tmp_path):
    _, model = with_embedding(arch)
    adapted = tiny.logits(model, arch)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    assert tiny.relative_error(tiny.logits(merged, arch), adapted) <= 1e-5
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(loaded, arch), tiny.logits(merged, arch))


@pytest.mark.parametrize("unmerged", ["unload", "delete"])
def test_tied_embeddings_stay_tied_without_a_merge(unmerged):
    base, model = with_embedding("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if unmerged == "unload":
            model.unload()
        else:
            model.delete_adapter("default")
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert base.config.tie_word_embeddings is True


# Attention that holds its projections itself.


def attention(base: nn.MultiheadAttention, q, k, v, vector, mask=None, out=None) -> torch.Tensor:
    """Multi-head attention with l_k ⊙ keys and l_v ⊙ values, (rows, length, features) in and out."""
    width, heads = base.embed_dim, base.num_heads
    lk, lv = vector[:width], vector[width:]
    if base.in_proj_weight is not None:
        wq, wk, wv = (base.in_proj_weight[i * width : (i + 1) * width] for i in range(3))
    else:
        wq, wk, wv = base.q_proj_weight, base.k_proj_weight, base.v_proj_weight
    packed = torch.zeros(3 * width, **DOUBLE) if base.in_proj_bias is None else base.in_proj_bias
    bq, bk, bv = packed[:width], packed[width : 2 * width], packed[2 * width :]
    rows = []
    for r in range(len(q)):
        queries = torch.einsum("oi,ti->to", wq, q[r]) + bq
        keys = (torch.einsum("oi,ti->to", wk, k[r]) + bk) * lk
        values = (torch.einsum("oi,ti->to", wv, v[r]) + bv) * lv
        if base.bias_k is not None:
            keys = torch.cat([keys, base.bias_k[0] * lk])
            values = torch.cat([values, base.bias_v[0] * lv])
        parts = []
        for h in range(heads):
            part = slice(h * width // heads, (h + 1) * width // heads)
            scores = torch.einsum("qd,kd->qk", queries[:, part], keys[:, part]) / (width // heads) ** 0.5
            if mask is not None:
                scores[:, : mask.shape[1]] = scores[:, : mask.shape[1]].masked_fill(mask, float("-inf"))
            parts.append(torch.softmax(scores, -1) @ values[:, part])
        result = torch.cat(parts, -1) @ base.out_proj.weight.T
        result = result + (0 if base.out_proj.bias is None else base.out_proj.bias)
        rows.append(result if out is None else out * result)
    return torch.stack(rows)


ATTENTIONS = {
    "packed": {},
    "no bias": {"bias": False},
    "own widths": {"kdim": 5, "vdim": 7},
    "own widths, no bias": {"kdim": 5, "vdim": 7, "bias": False},
    "one more key and value": {"add_bias_kv": True},
    "length first": {"batch_first": False},
}


def make_attention(case: str) -> nn.MultiheadAttention:
    return filled(nn.MultiheadAttention(8, 2, **{"batch_first": True, **ATTENTIONS[case]}))


@pytest.mark.parametrize("case", ATTENTIONS)
@pytest.mark.parametrize("masked", [False, True], ids=["all seen", "masked"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_an_attention_is_the_formula(case, masked, need_weights):
    base = make_attention(case)
    layer = rescaled(base, False)
    assert layer.ia3_l["a"].shape == (16, 1)
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, n, w, **DOUBLE) for n, w in ((3, 8), (4, base.kdim), (4, base.vdim)))
    mask = torch.triu(torch.ones(3, 4, dtype=torch.bool), 1) if masked else None
    expected = attention(base, q, k, v, vector_of(layer), mask)
    if not base.batch_first:
        q, k, v, expected = (x.transpose(0, 1) for x in (q, k, v, expected))
    check_layer(layer, q, k, v, attn_mask=mask, need_weights=need_weights, expected=expected)


def test_an_attentions_input_cannot_be_rescaled():
    with pytest.raises(InputError, match="MultiheadAttention has keys and values"):
        rescaled(make_attention("packed"), True)


def encoder(batch_first: bool = True, norm_first: bool = False) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    return filled(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first))


def in_encoder(base: nn.Module, *targets: str, feedforward=()):
    model = ia3.get_peft_model(base, IA3Config(target_modules=targets, feedforward_modules=feedforward)).eval()
    tiny.randomize(model)
    return model.double()


ENCODER_TARGETS = {
    "attention": (["self_attn"], []),
    "output projections": (["out_proj"], []),
    "their inputs": (["out_proj"], ["out_proj"]),
    "feed-forwards": (["linear1", "linear2"], ["linear2"]),
    "all": (["self_attn", "out_proj", "linear1", "linear2"], ["linear2"]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", ENCODER_TARGETS)
def test_the_fast_path_of_an_encoder_is_rescaled_too(case, padded, norm_first):
    """In evaluation mode without gradients torch reads the weights of the layers in place of calling them."""
    targets, feedforward = ENCODER_TARGETS[case]
    model = in_encoder(encoder(norm_first=norm_first), *targets, feedforward=feedforward)
    torch.manual_seed(3)
    x = torch.randn(2, 4, 8, **DOUBLE)
    padding = torch.tensor([[False] * 4, [False, False, False, True]]) if padded else None
    seen = ~padding if padded else torch.ones(2, 4, dtype=torch.bool)
    slow = model(x, src_key_padding_mask=padding).detach()
    with torch.no_grad():
        plain = encoder(norm_first=norm_first)(x, src_key_padding_mask=padding)
        fast = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(fast[seen], slow[seen])
        assert (fast - plain)[seen].abs().max() > 0.1
        with model.disable_adapter():
            torch.testing.assert_close(model(x, src_key_padding_mask=padding)[seen], plain[seen])
        torch.testing.assert_close(model.merge_and_unload()(x, src_key_padding_mask=padding)[seen], slow[seen])


def test_an_attentions_output_projection_is_rescaled_too():
    base = make_attention("packed")
    holder = nn.ModuleDict({"attn": base})
    model = in_encoder(holder, "attn", "out_proj")
    q = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3), **DOUBLE)
    inner = model.ia3_layers["attn"]
    vector = inner.ia3_l["default"].detach().flatten()
    out = model.ia3_layers["attn.out_proj"].ia3_l["default"].detach().flatten()
    expected = attention(make_attention("packed"), q, q, q, vector, out=out)
    torch.testing.assert_close(holder["attn"](q, q, q)[0], expected)
    model.merge_and_unload()
    assert holder["attn"] is base and type(base.out_proj) is type(make_attention("packed").out_proj)
    torch.testing.assert_close(base(q, q, q)[0], expected)


# Experts.


def experts(arch: str) -> nn.Module:
    made = build_experts(arch)
    kind = find_experts_path(made)
    return filled(copy.deepcopy(made.get_submodule(kind)))


def find_experts_path(model: nn.Module) -> str:
    return next(
        path for path, module in model.named_modules() if isinstance(getattr(module, "down_proj", None), nn.Parameter)
    )


WIDTHS = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": tiny.PAD,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
    "attn_implementation": "eager",
}
OWN_EXPERTS = {"moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
MIXTURES = {
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "llama4_text": {
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 12,
        "moe_layers": [0, 1],
        "use_qk_norm": False,
    },
    "qwen2_moe": {**OWN_EXPERTS, "shared_expert_intermediate_size": 12},
    "qwen3_moe": OWN_EXPERTS,
}


def build_experts(arch: str, implementation: str = "eager") -> nn.Module:
    settings = {**WIDTHS, **MIXTURES[arch]}
    made = transformers.AutoConfig.for_model(arch, **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        made, attn_implementation="eager", experts_implementation=implementation
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def expert(base: nn.Module, arch: str, e: int, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """One expert's answer to one token; the vector multiplies what goes into its second projection."""
    first, second = base.gate_up_proj[e], base.down_proj[e]
    if arch in ("gpt_oss", "llama4_text"):
        first, second = first.T, second.T
    both = torch.einsum("oi,i->o", first, x)
    if arch == "gpt_oss":
        both = both + base.gate_up_proj_bias[e]
        gate, up = both[::2].clamp(max=base.limit), both[1::2].clamp(-base.limit, base.limit)
        inner = (up + 1) * gate * torch.sigmoid(base.alpha * gate)
    else:
        gate, up = both[: len(both) // 2], both[len(both) // 2 :]
        inner = gate * torch.sigmoid(gate) * up
    result = torch.einsum("oi,i,i->o", second, vector, inner)
    return result + base.down_proj_bias[e] if arch == "gpt_oss" else result


@pytest.mark.parametrize("arch", MIXTURES)
def test_experts_are_the_formula(arch):
    base = experts(arch)
    layer = rescaled(base, True)
    assert layer.ia3_l["a"].shape == (3, 1, 12)
    vectors = layer.ia3_l["a"].detach()[:, 0]
    torch.manual_seed(3)
    x = torch.randn(6, 16, **DOUBLE)
    if arch == "llama4_text":  # two tokens for each expert
        expected = torch.stack([expert(base, arch, t // 2, x[t], vectors[t // 2]) for t in range(6)])
        check_layer(layer, x, expected=expected)
        return
    chosen = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0], [2, 1]])
    weights = torch.rand(6, 2, **DOUBLE)
    expected = torch.stack(
        [
            sum(weights[t, k] * expert(base, arch, e, x[t], vectors[e]) for k, e in enumerate(chosen[t]))
            for t in range(6)
        ]
    )
    check_layer(layer, x, chosen, weights, expected=expected)


def test_experts_have_no_output_side():
    config = IA3Config(target_modules=["experts"], feedforward_modules=[])
    with pytest.raises(InputError) as error:
        ia3.get_peft_model(build_experts("mixtral"), config)
    assert "model.layers.0.mlp.experts" in str(error.value) and "feedforward_modules" in str(error.value)


# Whole models.


TOKENS = torch.tensor([[5, 17, 23, 9, 41], [3, 8, 8, 30, 12]])


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize(
    ("arch", "implementation"),
    [
        ("mixtral", "eager"),
        ("mixtral", "batched_mm"),
        ("gpt_oss", "eager"),
        ("gpt_oss", "batched_mm"),
        ("llama4_text", "eager"),
        ("qwen2_moe", "eager"),
        ("qwen3_moe", "batched_mm"),
    ],
)
def test_mixtures_of_experts_in_whole_models(arch, implementation):
    shared = ["shared_expert.down_proj"] if arch in ("qwen2_moe", "llama4_text") else []
    targets = ["k_proj", "v_proj", "experts", *shared]
    tiny.check_model(build_experts(arch, implementation), targets, ["experts", *shared], logits, 2 * (3 + len(shared)))


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_every_implementation_of_experts_is_rescaled_alike(arch):
    results, plain = [], None
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        base = build_experts(arch, implementation)
        assert base.config._experts_implementation == implementation
        plain = tiny.logits(base, "llama") if plain is None else plain
        model = ia3.get_peft_model(base, IA3Config(target_modules=["experts"], feedforward_modules=["experts"])).eval()
        tiny.randomize(model)
        output = model(**tiny.batch("llama"))
        output.loss.backward()
        results.append([output.logits.detach(), *(p.grad for p in tiny.adapter_parameters(model).values())])
    assert tiny.relative_error(results[0][0], plain) > 0.01
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            assert tiny.relative_error(found, expected) <= 1e-4


def test_jetmoe():
    made = transformers.JetMoeConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=12,
        num_local_experts=3,
        num_experts_per_tok=2,
        attn_implementation="eager",
    )
    base = nn.Module.eval(transformers.JetMoeForCausalLM(made))
    tiny.randomized(base)
    tiny.check_model(base, ["kv_proj", "mlp.output_linear"], ["mlp.output_linear"], logits, 4)


def test_dbrx():
    made = transformers.DbrxConfig(
        vocab_size=tiny.VOCAB,
        d_model=16,
        n_heads=2,
        n_layers=2,
        max_seq_len=32,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 12, "moe_num_experts": 3, "moe_top_k": 2, "hidden_size": 16},
    )
    base = tiny.randomized(transformers.DbrxForCausalLM(made))
    tiny.check_model(base, ["Wqkv", "experts.mlp"], ["experts.mlp"], logits, 4)


def test_dbrxs_experts_are_the_formula():
    """They are called with slices of parameters that another module has read."""
    made = transformers.DbrxConfig(
        d_model=16, ffn_config={"ffn_hidden_size": 12, "moe_num_experts": 3, "hidden_size": 16}
    )
    base = filled(modeling_dbrx.DbrxExperts(made.ffn_config))
    model = ia3.get_peft_model(base, IA3Config(target_modules=["mlp"], feedforward_modules=["mlp"])).double()
    tiny.randomize(model)
    assert model.ia3_layers["mlp"].ia3_l["default"].shape == (1, 36)
    vectors = model.ia3_layers["mlp"].ia3_l["default"].detach().view(3, 12)
    torch.manual_seed(3)
    x, weights = torch.randn(1, 3, 16, **DOUBLE), torch.rand(3, 2, **DOUBLE)
    chosen = torch.tensor([[0, 1], [1, 2], [2, 0]])
    w1, v1, w2 = (p.view(3, 12, 16) for p in (base.mlp.w1, base.mlp.v1, base.mlp.base_layer.w2))
    expected = torch.zeros(3, 16, **DOUBLE)
    for t, k in itertools.product(range(3), range(2)):
        e = chosen[t, k]
        inner = nn.functional.silu(w1[e] @ x[0, t]) * (v1[e] @ x[0, t])
        expected[t] += weights[t, k] * torch.einsum("i,i,io->o", vectors[e], inner, w2[e])
    torch.testing.assert_close(model(x, chosen, weights)[0].detach(), expected, rtol=1e-10, atol=1e-10)


def test_jetmoes_experts_are_the_formula():
    layer = rescaled(filled(modeling_jetmoe.JetMoeParallelExperts(3, 5, 7)), True)
    assert layer.ia3_l["a"].shape == (3, 1, 5)
    x = torch.randn(6, 5, **DOUBLE)
    owners = [0, 0, 0, 1, 2, 2]
    weight, vectors = layer.base_layer.weight.clone(), layer.ia3_l["a"].detach()[:, 0]
    expected = torch.stack([torch.einsum("oi,i,i->o", weight[e], vectors[e], x[t]) for t, e in enumerate(owners)])
    check_layer(layer, x, [3, 1, 2], expected=expected)


def test_xlnet():
    made = transformers.XLNetConfig(vocab_size=tiny.VOCAB, d_model=16, n_layer=2, n_head=2, d_inner=12, dropout=0.0)
    base = tiny.randomized(transformers.XLNetLMHeadModel(made))
    tiny.check_model(base, ["rel_attn", "layer_2"], ["layer_2"], lambda m: m(input_ids=TOKENS).logits, 4)


def test_xlnets_attention_is_the_formula():
    """Scaling keys and values is the same as scaling what the parameters k and v make: l ⊙ (k x)."""
    made = transformers.XLNetConfig(vocab_size=tiny.VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=12, dropout=0.0)
    base = filled(transformers.XLNetModel(made)).layer[0].rel_attn
    layer = rescaled(base, False)
    assert layer.ia3_l["a"].shape == (32, 1)
    values = vector_of(layer)
    other = copy.deepcopy(base)
    for h in range(2):
        for d in range(8):
            other.k[:, h, d] *= values[8 * h + d]
            other.v[:, h, d] *= values[16 + 8 * h + d]
    h, r = torch.randn(4, 1, 16, **DOUBLE), torch.randn(8, 1, 16, **DOUBLE)
    arguments = {"h": h, "g": None, "attn_mask_h": None, "attn_mask_g": None, "r": r, "seg_mat": None}
    check_layer(layer, **arguments, expected=other(**arguments)[0])


def test_wavlm_reads_weights_without_calling_their_modules():
    made = transformers.WavLMConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        conv_dim=(8, 8),
        conv_kernel=(3, 3),
        conv_stride=(2, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_buckets=8,
        max_bucket_distance=16,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
    )
    base = tiny.randomized(transformers.WavLMModel(made))
    sound = torch.randn(2, 60, generator=torch.Generator().manual_seed(0), **DOUBLE)
    targets = ["k_proj", "v_proj", "output_dense"]
    tiny.check_model(base, targets, ["output_dense"], lambda m: m(input_values=sound).last_hidden_state, 6)


# Rules of one's own.


class Columns(nn.Module):
    """Like a Linear, with its weight the other way round and names of its own."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.n_in, self.n_out = n_in, n_out
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out)), nn.Parameter(torch.randn(n_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class TwoInOne(nn.Module):
    """Keys and values as parameters of one module: no activation that could be reached."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.key, self.value = nn.Parameter(torch.randn(width, width)), nn.Parameter(torch.randn(width, width))

    def forward(self, x):
        return torch.tanh(x @ self.key) * (x @ self.value)


class KeyRule(Rule):
    """Rescales a TwoInOne's keys."""

    def shape(self, module, feedforward):
        return (module.width, 1)

    def rescale(self, module, parameters, vector, feedforward):
        return {"key": (parameters["key"] * vector).to(parameters["key"].dtype)}


@pytest.fixture
def own_rules(monkeypatch):
    monkeypatch.setattr("ia3.adapter.rules.RULES", dict(RULES))


@pytest.mark.usefixtures("own_rules")
@sides
def test_a_module_type_of_ones_own(feedforward):
    with pytest.raises(InputError):
        rescaled(Columns(3, 5), feedforward)
    register_rule(Columns, WeightRule("n_in", "n_out", weight_in=-2, weight_out=-1))

    class Derived(Columns):
        pass

    for kind in (Columns, Derived):
        base = filled(kind(3, 5))
        layer = rescaled(base, feedforward)
        assert layer.ia3_l["a"].shape == ((1, 3) if feedforward else (5, 1))
        x, vector = torch.randn(4, 3, **DOUBLE), vector_of(layer)
        expected = (x * vector) @ base.weight + base.bias if feedforward else (x @ base.weight + base.bias) * vector
        check_layer(layer, x, expected=expected)


@pytest.mark.usefixtures("own_rules")
def test_a_rule_of_ones_own():
    register_rule(TwoInOne, KeyRule())
    base = filled(TwoInOne(4))
    x = torch.randn(3, 4, **DOUBLE)
    layer = rescaled(base, False)
    check_layer(layer, x, expected=torch.tanh((x @ base.key) * vector_of(layer)) * (x @ base.value))

    holder = nn.ModuleDict({"mine": filled(TwoInOne(4))})
    model = ia3.get_peft_model(holder, IA3Config(target_modules=["mine"], feedforward_modules=[]))
    assert list(model.ia3_layers) == ["mine"] and model.ia3_layers["mine"].ia3_l["default"].shape == (4, 1)


@pytest.mark.usefixtures("own_rules")
def test_a_registered_rule_replaces_one():
    rule = WeightRule("in_features", "out_features", -1, -2)
    register_rule(nn.Linear, rule)
    assert find_rule(nn.Linear(2, 2)) is rule


def test_a_type_without_a_rule_is_named_with_its_path():
    holder = nn.ModuleDict({"outer": nn.ModuleDict({"mine": TwoInOne(4)}), "linear": nn.Linear(2, 2)})
    with pytest.raises(InputError) as error:
        ia3.get_peft_model(holder, IA3Config(target_modules=["mine", "linear"], feedforward_modules=[]))
    message = str(error.value)
    for word in ("'outer.mine'", "TwoInOne", "'Linear'", "'Conv1D'", "'MultiheadAttention'", "register_rule"):
        assert word in message
    assert "\n" not in message
    assert not any(isinstance(module, IA3Layer) for module in holder.modules())


# Rows of a batch with an adapter each.

NAMES = ("a", "__base__", "b", "a")


def of_two(base: nn.Module, feedforward: bool, **kwargs) -> IA3Layer:
    """A layer with adapters `a` and `b` of random float64 values."""
    layer = IA3Layer(base, Routing(), **kwargs)
    torch.manual_seed(1)
    for name in "ab":
        layer.add(name, feedforward, ones=False)
    return layer.double()


def mixed(layer: nn.Module, names, *args, **kwargs):
    routing = layer.routing
    with routing.passing(routing.gather(names, "ab"), None):
        result = layer(*args, **kwargs)
    return result if isinstance(layer, Weights) else first(result)


class Weights(nn.Module):
    """Of what an attention returns, its weights."""

    def __init__(self, layer: IA3Layer, place: int = 1) -> None:
        super().__init__()
        self.layer, self.routing, self.place = layer, layer.routing, place

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)[self.place]


def check_rows(layer: IA3Layer, *args, names=NAMES, axis: int = 0, owners=None, **kwargs) -> torch.Tensor:
    """Each place along an axis is as under its owner's adapter alone, and so are the gradients.

    The owners, as numbers of rows, are blocks of equal size by default.
    """
    found = mixed(layer, names, *args, **kwargs)
    length = found.shape[axis]
    owners = torch.arange(length) // (length // len(names)) if owners is None else owners
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(5), **DOUBLE)
    (found * direction).sum().backward()
    grads = {name: layer.ia3_l[name].grad.clone() for name in "ab"}
    layer.zero_grad()
    for name in {*names}:
        layer.routing.switch(active=() if name == "__base__" else (name,))
        places = torch.tensor([place for place in range(length) if names[owners[place]] == name])
        alone = first(layer(*args, **kwargs))
        expected = alone.index_select(axis, places)
        torch.testing.assert_close(found.index_select(axis, places), expected, rtol=1e-10, atol=1e-10)
        rest = torch.tensor([place for place in range(length) if names[owners[place]] != name])
        assert (found - alone).index_select(axis, rest).abs().max() > 1e-3
        if name != "__base__":
            (expected * direction.index_select(axis, places)).sum().backward()
            torch.testing.assert_close(layer.ia3_l[name].grad, grads[name], rtol=1e-9, atol=1e-9)
            layer.zero_grad()
    with pytest.raises(InputError, match="one adapter at a time"):
        mixed(layer, ("a", "b") * length, *args, **kwargs)  # more rows than the axis is long
    return found


@settings(max_examples=60)
@given(
    names=st.lists(st.sampled_from(["a", "b", "__base__"]), min_size=1, max_size=5),
    block=st.integers(1, 3),
    inner=st.lists(st.integers(1, 3), max_size=2),
    kind=st.sampled_from(["linear", "conv1d"]),
    feedforward=st.booleans(),
    by_column=st.booleans(),
)
def test_rows_of_a_linear_map_are_the_formula(names, block, inner, kind, feedforward, by_column):
    base = filled(nn.Linear(5, 7) if kind == "linear" else Conv1D(7, 5))
    weight = base.weight if kind == "linear" else base.weight.T
    by_column = by_column and bool(inner)
    layer = of_two(base, feedforward, row_axis=1 if by_column else 0)
    vectors = {name: layer.ia3_l[name].detach().flatten() for name in "ab"}
    vectors["__base__"] = torch.ones(5 if feedforward else 7, **DOUBLE)
    x = torch.randn(len(names), block, *inner, 5, generator=torch.Generator().manual_seed(2), **DOUBLE)
    expected = torch.stack(
        [
            (x[row] * vectors[name]) @ weight.T + base.bias
            if feedforward
            else (x[row] @ weight.T + base.bias) * vectors[name]
            for row, name in enumerate(names)
        ]
    )
    x, expected = x.flatten(0, 1), expected.flatten(0, 1)
    found = mixed(layer, names, x.transpose(0, 1).contiguous() if by_column else x)
    found = found.transpose(0, 1) if by_column else found
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    length = len(x) * 2 + 1
    if len(names) > 1 and length % len(names):
        with pytest.raises(InputError, match=f"hold {len(names)} rows, or blocks of them, found {length}:"):
            mixed(of_two(base, feedforward), names, torch.randn(length, *inner, 5, **DOUBLE))


@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize("case", CONVOLUTIONS)
@sides
def test_rows_of_a_convolution(case, rows, feedforward):
    base, x = make_convolution(case)
    x = torch.cat([x + step for step in range(rows // 2)])
    layer = of_two(base, feedforward)
    found = check_rows(layer, x)
    before, after = (torch.ones(count, **DOUBLE) for count in (base.in_channels, base.out_channels))
    vector = layer.ia3_l["b"].detach().flatten()
    sides = (vector, after) if feedforward else (before, vector)
    block = slice(2 * rows // 4, 3 * rows // 4)  # the third row's
    torch.testing.assert_close(found[block], convolution(base, x[block], *sides), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (8, 2)])
def test_rows_of_an_embedding(shape):
    layer = of_two(filled(nn.Embedding(9, 4)), False)
    check_rows(layer, torch.arange(100)[: torch.Size(shape).numel()].view(shape) % 9)


@pytest.mark.parametrize("case", ATTENTIONS)
@pytest.mark.parametrize("masked", [None, "shared", "padding", "each"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_rows_of_an_attention(case, masked, need_weights):
    base = make_attention(case)
    torch.manual_seed(3)
    q, k, v = (torch.randn(4, n, w, **DOUBLE) for n, w in ((3, 8), (4, base.kdim), (4, base.vdim)))
    if not base.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    masks = {
        None: {},
        "shared": {"attn_mask": torch.triu(torch.ones(3, 4, dtype=torch.bool), 1)},
        "padding": {"key_padding_mask": torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)},
        "each": {"attn_mask": torch.randn(8, 3, 4, **DOUBLE)},  # rows times heads
    }
    layer = of_two(base, False)
    check_rows(layer, q, k, v, axis=0 if base.batch_first else 1, need_weights=need_weights, **masks[masked])
    if need_weights:
        found = mixed(Weights(layer), NAMES, q, k, v, **masks[masked])
        for row, name in enumerate(NAMES):
            layer.routing.switch(active=() if name == "__base__" else (name,))
            torch.testing.assert_close(found[row], layer(q, k, v, **masks[masked])[1][row])


@pytest.mark.parametrize("arch", MIXTURES)
def test_rows_of_experts(arch):
    """Two tokens a row, which choose their experts."""
    layer = of_two(experts(arch), True)
    torch.manual_seed(3)
    if arch == "llama4_text":  # every expert gets all tokens
        check_rows(layer, torch.randn(24, 16, **DOUBLE), owners=torch.arange(24) % 8 // 2)
        return
    x, weights = torch.randn(8, 16, **DOUBLE), torch.rand(8, 2, **DOUBLE)
    chosen = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0], [2, 1], [0, 1], [0, 2]])
    found = check_rows(layer, x, chosen, weights)
    vectors = layer.ia3_l["b"].detach()[:, 0]
    for t in (4, 5):
        parts = [weights[t, k] * expert(layer.base_layer, arch, e, x[t], vectors[e]) for k, e in enumerate(chosen[t])]
        torch.testing.assert_close(found[t].detach(), sum(parts), rtol=1e-10, atol=1e-10)


def test_rows_of_experts_that_get_rows_and_choices_of_tokens():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.randn(3, 5, 6))

        def forward(self, x, chosen, scale=None):
            flat = torch.stack([self.down_proj[e] @ token for e, token in zip(chosen, x.flatten(0, 1), strict=True)])
            return (flat * scale[:, None]).view(*x.shape[:2], 5)

    layer = of_two(filled(Experts()), True)
    x, chosen = torch.randn(4, 3, 6, **DOUBLE), torch.arange(12) % 3
    check_rows(layer, x, chosen, scale=torch.rand(12, **DOUBLE))


@pytest.mark.parametrize("two_streams", [False, True])
def test_rows_of_xlnets_attention(two_streams):
    made = transformers.XLNetConfig(vocab_size=tiny.VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=12, dropout=0.0)
    layer = of_two(filled(transformers.XLNetModel(made)).layer[0].rel_attn, False)
    torch.manual_seed(3)
    h, g = torch.randn(3, 4, 16, **DOUBLE), torch.randn(2, 4, 16, **DOUBLE) if two_streams else None
    arguments = {"h": h, "g": g, "attn_mask_h": None, "attn_mask_g": None, "r": torch.randn(6, 4, 16, **DOUBLE)}
    if two_streams:
        arguments["target_mapping"] = torch.eye(2, 3, **DOUBLE)[:, :, None].expand(-1, -1, 4)
    arguments["seg_mat"] = None
    check_rows(layer, **arguments, axis=1)
    found = mixed(Weights(layer, 2), NAMES, **arguments, output_attentions=True)
    for row, name in enumerate(NAMES):
        layer.routing.switch(active=() if name == "__base__" else (name,))
        expected = layer(**arguments, output_attentions=True)[2]
        for weights, wanted in zip(*[[x] if torch.is_tensor(x) else x for x in (found, expected)], strict=True):
            torch.testing.assert_close(weights[:, :, row], wanted[:, :, row])


@pytest.mark.usefixtures("own_rules")
def test_rows_of_a_rule_of_ones_own():
    """A rule without an axis says how its module holds rows, or rows cannot differ; one row can always have its own."""
    register_rule(TwoInOne, KeyRule())
    layer, x = of_two(filled(TwoInOne(4)), False), torch.randn(4, 4, **DOUBLE)
    with pytest.raises(InputError, match="Rows of a TwoInOne cannot have different adapters"):
        mixed(layer, NAMES, x)

    class Dividing(KeyRule):
        def rows(self, module):
            return RowLayout()

    register_rule(TwoInOne, Dividing())
    check_rows(of_two(filled(TwoInOne(4)), False), x)

    class Clipping(WeightRule):
        def scale(self, activation, vector):
            return super().scale(activation, vector.clamp(max=1))

    register_rule(Columns, Clipping("n_in", "n_out", weight_in=-2, weight_out=-1))
    check_rows(of_two(filled(Columns(3, 5)), True), torch.randn(4, 2, 3, **DOUBLE))


def test_rows_of_sorted_experts_are_refused():
    layer = of_two(filled(modeling_jetmoe.JetMoeParallelExperts(3, 5, 7)), True)
    with pytest.raises(InputError, match="Rows of a JetMoeParallelExperts"):
        mixed(layer, NAMES, torch.randn(8, 5, **DOUBLE), [3, 1, 4])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_of_torchs_encoder(batch_first):
    """Right in training, where torch calls its layers; refused where it looks at their weights, for its fast path."""
    targets = ["self_attn", "linear1", "linear2"]
    model = in_encoder(encoder(batch_first), *targets, feedforward=["linear2"])
    model.add_adapter("other", IA3Config(target_modules=targets, feedforward_modules=["linear2"]))
    tiny.randomize(model, 2, "other")
    model.double()
    x = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(3), **DOUBLE)
    names = ["default", "other", "__base__", "default"]
    with torch.no_grad():
        if batch_first:
            with pytest.raises(InputError, match="reads the"):
                model(x, adapter_names=names)
        model.train()
        found = model(x, adapter_names=names)
        for row, name in enumerate(names):
            model.ia3_routing.switch(active=() if name == "__base__" else (name,))
            expected = model(x)
            at = (slice(None), row) if not batch_first else row
            torch.testing.assert_close(found[at], expected[at])
