"""One module at several places, or called several times: one vector, merged once."""

import copy

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import ia3
from ia3 import IA3Config, IA3Layer
from support import tiny

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FIELDS = {"target_modules": ["key", "second"], "feedforward_modules": ["second"]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.second(torch.tanh(self.key(x)))


class Twice(nn.Module):
    """The same block as two children, and one of its maps as a child of the model too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = Block()
        self.other = Block()
        self.last = self.first  # a shared parent
        self.other.second = self.first.second  # a shared module
        self.spare = self.first.key

    def forward(self, x):
        return self.spare(self.last(self.other(self.first(x))))


class Hybrid(nn.Module):
    """Layers that each hold the one shared block beside a map of their own."""

    class Layer(nn.Module):
        def __init__(self, shared: Block) -> None:
            super().__init__()
            self.shared, self.own = shared, nn.Linear(6, 6)

        def forward(self, x):
            return self.own(self.shared(x))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shared = Block()
        self.layers = nn.ModuleList([Hybrid.Layer(shared) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def paths(model: nn.Module) -> dict[str, int]:
    """Every path of every module, each module as a number: what is shared with what."""
    numbers: dict[int, int] = {}
    return {
        name: numbers.setdefault(id(module), len(numbers))
        for name, module in model.named_modules(remove_duplicate=False)
    }


def adapted(kind: type[nn.Module], **fields):
    model = ia3.get_peft_model(kind().double(), IA3Config(**{**FIELDS, **fields})).double()
    tiny.randomize(model)
    return model


@pytest.mark.parametrize(
    ("kind", "vectors"),
    [
        (Twice, {"first.key", "first.second", "other.key"}),
        (Hybrid, {"layers.0.shared.key", "layers.0.shared.second"}),
    ],
)
def test_shared_modules_have_one_vector_under_the_first_path(kind, vectors, tmp_path):
    model = adapted(kind)
    assert set(model.ia3_layers) == vectors
    assert {name.removesuffix(".ia3_l.default") for name in tiny.adapter_parameters(model)} == vectors
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert set(stored) == {f"base_model.model.{path}.ia3_l" for path in vectors}
    loaded = ia3.PeftModel.from_pretrained(kind().double(), tmp_path)
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [Twice, Hybrid])
def test_shared_modules_in_whole(kind):
    tiny.check_model(kind(), ["key", "second"], ["second"], lambda m: m(X), 3 if kind is Twice else 2)


def test_each_place_of_a_shared_module_is_rescaled():
    model = adapted(Twice)
    base = Twice().double()
    vectors = {path: layer.ia3_l["default"].detach().flatten() for path, layer in model.ia3_layers.items()}

    def block(x, key, weight, inner, second):
        hidden = torch.tanh((x @ key.weight.T + key.bias) * weight)
        return x + (hidden * inner) @ second.weight.T + second.bias

    first = (base.first.key, vectors["first.key"], vectors["first.second"], base.first.second)
    other = (base.other.key, vectors["other.key"], vectors["first.second"], base.first.second)
    x = block(block(block(X, *first), *other), *first)
    expected = (x @ base.first.key.weight.T + base.first.key.bias) * vectors["first.key"]
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [Twice, Hybrid])
def test_rows_of_shared_modules_have_their_own_adapters_at_every_place(kind):
    model = adapted(kind)
    model.add_adapter("two", IA3Config(target_modules=["key"], feedforward_modules=[]))
    tiny.randomize(model.double(), 2, "two")
    model.set_requires_grad(["default", "two"])
    names = ["two", "__base__", "default"]
    found = model(X, adapter_names=names)
    found.square().sum().backward()
    grads = {path: p.grad for path, p in model.named_parameters() if ".ia3_l." in path}
    model.zero_grad()
    for row, name in enumerate(names):
        model.ia3_routing.switch(active=() if name == "__base__" else (name,))
        expected = model(X)[row]
        torch.testing.assert_close(found[row], expected, rtol=1e-12, atol=1e-12)
        if name != "__base__":
            expected.square().sum().backward()
    for path, gradient in grads.items():
        torch.testing.assert_close(gradient, model.get_parameter(path).grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [Twice, Hybrid])
@pytest.mark.parametrize("how", ["unload", "delete_adapter", "merge_and_unload"])
def test_all_paths_are_given_back(kind, how):
    base = kind().double()
    before = paths(base)
    model = ia3.get_peft_model(base, IA3Config(**FIELDS))
    assert any(isinstance(module, IA3Layer) for module in base.modules())
    if how == "delete_adapter":
        model.delete_adapter("default")
    else:
        assert getattr(model, how)() is base
    assert paths(base) == before


def test_a_copy_shares_what_the_original_shares():
    model = adapted(Twice)
    other = copy.deepcopy(model)
    assert other.model.last is other.model.first and other.model.spare is other.model.first.key
    other.merge_adapter()
    torch.testing.assert_close(other(X), model(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("named", ["spare", "first.key", "last.key"])
def test_a_module_named_by_one_of_its_paths_is_rescaled_at_all(named):
    """Its weight is one: merging cannot change it for one path only."""
    model = adapted(Twice, target_modules=[named], feedforward_modules=[])
    assert set(model.ia3_layers) == {"first.key"}
    assert model.model.spare is model.model.first.key is model.ia3_layers["first.key"]
    expected = model(X).detach()
    model.merge_adapter()
    torch.testing.assert_close(model(X).detach(), expected, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    model.add_adapter("two", IA3Config(target_modules=["spare"], feedforward_modules=[]))
    assert set(model.ia3_layers) == {"first.key"} and set(model.ia3_layers["first.key"].ia3_l) == {"default", "two"}


def test_a_second_adapter_of_shared_modules_is_one_too():
    model = adapted(Twice)
    model.add_adapter("two", IA3Config(target_modules=["key"], feedforward_modules=[]))
    tiny.randomize(model, 2, "two")
    assert len(tiny.adapter_parameters(model, "two")) == 2
    model.set_adapter("two")
    expected = model(X).detach()
    model.merge_adapter()
    torch.testing.assert_close(model(X).detach(), expected)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert set(model.ia3_layers) == {"first.key", "other.key"}
    assert type(model.model.other.second) is nn.Linear and model.model.other.second is model.model.last.second
    assert torch.equal(model(X), expected)


def test_a_shared_head_trained_in_full_is_one_copy():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.block, self.head = Block(), nn.Linear(6, 6)
            self.tail = self.head

        def forward(self, x):
            return self.tail(self.head(self.block(x)))

    base = Heads().double()
    before = paths(base)
    model = ia3.get_peft_model(base, IA3Config(**FIELDS, modules_to_save=["head"])).double()
    tiny.randomize(model)
    trained = model.ia3_trained_modules
    assert len(trained) == 1
    expected = model(X).detach()
    plain = Heads().double()(X)
    mixed = model(X, adapter_names=["default", "__base__", "default"])
    torch.testing.assert_close(mixed, torch.stack([expected[0], plain[1], expected[2]]))
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(X).detach(), expected)
    model.unload()
    assert paths(base) == before


def test_albert_calls_each_module_in_every_layer():
    made = transformers.AlbertConfig(
        vocab_size=tiny.VOCAB,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    tokens = torch.tensor([[5, 17, 23, 9], [3, 8, 8, 30]])
    base = tiny.randomized(transformers.AlbertModel(made, add_pooling_layer=False), 1.0)
    targets = ["key", "value", "ffn_output"]
    tiny.check_model(base, targets, ["ffn_output"], lambda m: m(input_ids=tokens).last_hidden_state, 3)


def test_zambas_shared_transformer_has_one_set_of_vectors(tmp_path):
    made = transformers.ZambaConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=16,
        attention_hidden_size=32,
        intermediate_size=12,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=4,
        n_mamba_heads=2,
        use_mamba_kernels=False,
        use_cache=False,
        attn_implementation="eager",
    )
    base = tiny.randomized(transformers.ZambaForCausalLM(made).eval(), 0.2)
    hybrids = [layer for layer in base.model.layers if hasattr(layer, "shared_transf")]
    assert len(hybrids) == 2
    tokens = torch.tensor([[5, 17, 23, 9]])
    model = ia3.get_peft_model(
        base, IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    tiny.randomize(model)
    adapted = logits_of(model, tokens)
    separate = {id(layer.shared_transf) for layer in hybrids}
    assert len(model.ia3_layers) == 3 * len(separate)
    assert len(ia3.get_peft_model_state_dict(model)) == 3 * len(separate)
    assert tiny.relative_error(logits_of(copy.deepcopy(model).merge_and_unload(), tokens), adapted) <= 1e-4
    model.save_pretrained(tmp_path)
    other = tiny.randomized(transformers.ZambaForCausalLM(made).eval(), 0.2)
    loaded = ia3.PeftModel.from_pretrained(other, tmp_path)
    assert tiny.relative_error(logits_of(loaded, tokens), adapted) <= 1e-5


@torch.no_grad()
def logits_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens).logits
