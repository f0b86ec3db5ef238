"""The rescaled layer against the formulas l ⊙ (W x + b) and W (l ⊙ x) + b, written out in float64."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ia3 import IA3Layer, InputError
from ia3.adapter.routing import Routing
from ia3.adapter.rules import RULES, find_rule
from ia3.adapter.trained import TrainedModule

IN, OUT = 5, 7

kinds = pytest.mark.parametrize("kind", ["linear", "conv1d"])
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
sides = pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])


def make_base(kind: str, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, bias=bias) if kind == "linear" else Conv1D(OUT, IN)
    if not bias and kind == "conv1d":
        base.bias = None
        base.forward = lambda x: x @ base.weight
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return base.requires_grad_(False).to(dtype)


def make(kind: str, bias: bool = True, dtype: torch.dtype = torch.float32, **adapters: bool) -> IA3Layer:
    """A layer with random vectors; adapters by name, each with whether it scales the input. All are active."""
    layer = IA3Layer(make_base(kind, bias, dtype), Routing())
    torch.manual_seed(1)
    for name, feedforward in adapters.items():
        layer.add(name, feedforward, ones=False)
    layer.routing.switch(active=tuple(adapters))
    return layer


def formula(layer: IA3Layer, x: torch.Tensor, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the layer must return, in float64; vectors by adapter, those in effect and no others."""
    base = layer.base_layer
    weight = base.weight.double().T if isinstance(base, nn.Linear) else base.weight.double()  # (in, out)
    bias = torch.zeros(OUT, dtype=torch.double) if base.bias is None else base.bias.double()
    before, after = torch.ones(IN, dtype=torch.double), torch.ones(OUT, dtype=torch.double)
    for name, vector in vectors.items():
        if layer.held[name].feedforward:
            before = before * vector.double().flatten()
        else:
            after = after * vector.double().flatten()
    rows = []
    for row in x.double().reshape(-1, IN):
        scaled = [before[i] * row[i] for i in range(IN)]
        rows.append(
            torch.stack([after[o] * (sum(weight[i, o] * scaled[i] for i in range(IN)) + bias[o]) for o in range(OUT)])
        )
    return torch.stack(rows).reshape(*x.shape[:-1], OUT)


def vectors_of(layer: IA3Layer, *names: str) -> dict[str, torch.Tensor]:
    return {name: layer.ia3_l[name].detach() for name in names}


@kinds
@biases
@sides
def test_forward_is_the_formula(kind, bias, feedforward):
    layer = make(kind, bias, a=feedforward)
    x = torch.randn(2, 3, IN)
    torch.testing.assert_close(layer(x).double(), formula(layer, x, vectors_of(layer, "a")), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(layer(x), layer.base_layer(x), atol=0.1)


@kinds
@biases
@sides
def test_merged_weights_are_the_formula(kind, bias, feedforward):
    layer = make(kind, bias, a=feedforward)
    vector = layer.ia3_l["a"].detach().double().flatten()
    weight = layer.base_layer.weight.double()  # Linear: (out, in); Conv1D: (in, out)
    on_rows = feedforward == (kind == "conv1d")
    expected = weight * (vector[:, None] if on_rows else vector[None, :])
    x = torch.randn(4, IN)
    result = formula(layer, x, vectors_of(layer, "a"))
    original_bias = None if not bias else layer.base_layer.bias.double()

    layer.merge(["a"])
    torch.testing.assert_close(layer.base_layer.weight.double(), expected, rtol=1e-6, atol=0)
    if bias:
        expected_bias = original_bias if feedforward else original_bias * vector
        torch.testing.assert_close(layer.base_layer.bias.double(), expected_bias, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.base_layer(x).double(), result, rtol=1e-5, atol=1e-6)


@kinds
@biases
@sides
def test_unmerging_gives_the_bits_back(kind, bias, feedforward):
    """Also of a vector that holds a zero, by which one cannot divide."""
    layer = make(kind, bias, a=feedforward, b=feedforward)
    before = {key: value.clone() for key, value in layer.base_layer.state_dict().items()}
    with torch.no_grad():
        layer.ia3_l["a"][:] = 0.0
    layer.merge(["a"])
    assert (layer.base_layer.weight == 0).all()
    layer.merge(["a", "b"])
    layer.unmerge()
    after = layer.base_layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    layer.merge(["b"])  # and the originals of the first time are not left over
    layer.unmerge()
    assert all(torch.equal(layer.base_layer.state_dict()[key], before[key]) for key in before)


@kinds
@pytest.mark.parametrize("sides", [(False, False), (True, True), (False, True)])
def test_several_adapters_multiply(kind, sides):
    layer = make(kind, a=sides[0], b=sides[1], idle=False)
    x = torch.randn(3, IN)
    for names in (("a", "b"), ("b",), ("b", "a"), ()):
        layer.routing.switch(active=names)
        expected = formula(layer, x, vectors_of(layer, *names))
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)
    layer.merge(["a"])
    torch.testing.assert_close(layer.base_layer(x).double(), expected_after(layer, x, "a"), rtol=1e-5, atol=1e-6)
    layer.merge(["a", "b"])  # in place of a alone, not on top of it
    torch.testing.assert_close(layer.base_layer(x).double(), expected_after(layer, x, "a", "b"), rtol=1e-5, atol=1e-6)


def expected_after(layer: IA3Layer, x: torch.Tensor, *names: str) -> torch.Tensor:
    """The formula for a layer that is merged at the moment, whose originals `make` makes once more."""
    fresh = copy.deepcopy(layer)
    fresh.unmerge()
    return formula(fresh, x, vectors_of(layer, *names))


@kinds
@sides
def test_gradients_are_numerically_right(kind, feedforward):
    """With respect to the vector and to the input."""
    layer = make(kind, dtype=torch.float64, a=feedforward).double()
    x = torch.randn(2, IN, dtype=torch.double, requires_grad=True)
    vector = layer.ia3_l["a"].detach().clone().requires_grad_()

    def call(vector, x):
        return torch.func.functional_call(layer, {"ia3_l.a": vector}, (x,))

    assert torch.autograd.gradcheck(call, (vector, x))


@kinds
@sides
def test_gradients_are_the_derivative_of_the_formula(kind, feedforward):
    layer = make(kind, a=feedforward)
    x = torch.randn(6, IN)
    upstream = torch.randn(6, OUT)
    (layer(x) * upstream).sum().backward()
    vector = layer.ia3_l["a"].detach().double().requires_grad_()
    (formula(layer, x, {"a": vector}) * upstream.double()).sum().backward()
    gradient = layer.ia3_l["a"].grad
    assert gradient.shape == layer.ia3_l["a"].shape
    torch.testing.assert_close(gradient.double(), vector.grad, rtol=1e-4, atol=1e-5)
    assert layer.base_layer.weight.grad is None


@kinds
@sides
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_results_come_in_the_bases_dtype_and_vectors_in_float32(kind, feedforward, dtype):
    layer = make(kind, dtype=dtype, a=feedforward)
    assert layer.ia3_l["a"].dtype == torch.float32
    x = torch.randn(3, IN).to(dtype)
    result = layer(x)
    assert result.dtype == dtype
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.005, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(
        result.double(), formula(layer, x, vectors_of(layer, "a")), rtol=tolerance, atol=tolerance
    )
    layer.merge(["a"])
    assert {parameter.dtype for parameter in layer.base_layer.parameters()} == {dtype}
    torch.testing.assert_close(layer.base_layer(x).double(), result.double(), rtol=tolerance, atol=2 * tolerance)


def test_the_multiplication_itself_is_float32():
    """A vector is not rounded to bfloat16 first."""
    layer = make("linear", dtype=torch.bfloat16, a=False)
    value = 1 + 2**-8 + 2**-10  # has no bfloat16
    with torch.no_grad():
        layer.ia3_l["a"].fill_(value)
    x = torch.randn(50, IN).to(torch.bfloat16)
    base = layer.base_layer(x)
    expected = (base.float() * value).to(torch.bfloat16)
    rounded = base * torch.tensor(value).to(torch.bfloat16)
    assert not torch.equal(expected, rounded)
    assert torch.equal(layer(x), expected)


@kinds
@sides
def test_ones_change_no_bit(kind, feedforward):
    layer = IA3Layer(make_base(kind), Routing())
    layer.add("a", feedforward)
    layer.routing.switch(active=("a",))
    x = torch.randn(3, IN)
    assert torch.equal(layer.ia3_l["a"], torch.ones(layer.rule.shape(layer.base_layer, feedforward)))
    assert torch.equal(layer(x), layer.base_layer(x))


@kinds
@pytest.mark.parametrize(("feedforward", "shape"), [(False, (OUT, 1)), (True, (1, IN))])
def test_shapes_of_vectors(kind, feedforward, shape):
    layer = make(kind, a=feedforward)
    assert layer.ia3_l["a"].shape == shape
    assert isinstance(layer.ia3_l["a"], nn.Parameter)
    assert [name for name, _ in layer.named_parameters() if "ia3_l" in name] == ["ia3_l.a"]


@kinds
@sides
def test_what_routing_leaves_out_has_no_effect(kind, feedforward):
    layer = make(kind, a=feedforward)
    x = torch.randn(3, IN)
    base, adapted = layer.base_layer(x), layer(x)
    assert not torch.equal(base, adapted)
    layer.routing.switch(enabled=False)
    assert torch.equal(layer(x), base)
    layer.routing.switch(enabled=True)
    assert torch.equal(layer(x), adapted)
    layer.routing.switch(active=("another",))
    assert torch.equal(layer(x), base)


@kinds
def test_a_mask_leaves_features_alone(kind):
    """Whatever the parameter holds there: in the output, in the merged weights, and in the gradient."""
    layer = IA3Layer(make_base(kind), Routing())
    mask = torch.tensor([False, True, True, False, True, True, False])
    layer.add("a", False, ones=False, rescaled=mask)
    layer.routing.switch(active=("a",))
    x = torch.randn(3, IN)
    base, result = layer.base_layer(x), layer(x)
    assert torch.equal(result[:, ~mask], base[:, ~mask])
    assert (result[:, mask] != base[:, mask]).all()
    result.sum().backward()
    gradient = layer.ia3_l["a"].grad.flatten()
    assert ((gradient != 0) == mask).all()
    assert ((layer.vector("a").flatten() != 1) == mask).all()
    layer.merge(["a"])
    torch.testing.assert_close(layer.base_layer(x), result.detach())
    assert torch.equal(layer.base_layer(x)[:, ~mask], base[:, ~mask])


def test_what_is_merged_is_the_weight_of_now():
    """Not the one of an earlier merge."""
    layer = make("linear", a=False)
    layer.merge(["a"])
    layer.unmerge()
    with torch.no_grad():
        layer.base_layer.weight.fill_(2.0)
    layer.merge(["a"])
    assert torch.equal(layer.base_layer.weight, 2 * layer.ia3_l["a"].expand(OUT, IN))
    layer.unmerge()
    assert (layer.base_layer.weight == 2).all()


def test_merging_nothing_changes_nothing():
    layer = make("linear", a=False)
    before = layer.base_layer.weight.clone()
    layer.merge([])
    layer.merge(["another"])
    assert torch.equal(layer.base_layer.weight, before)


def test_merging_keeps_the_parameter_objects():
    """So that ties and optimizers that hold them go on holding them."""
    layer = make("linear", a=False)
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    layer.merge(["a"])
    layer.unmerge()
    assert layer.base_layer.weight is weight and layer.base_layer.bias is bias


def test_removing_an_adapter_leaves_the_others():
    layer = make("linear", a=False, b=True)
    x = torch.randn(3, IN)
    layer.remove("a")
    assert list(layer.ia3_l) == ["b"]
    torch.testing.assert_close(layer(x).double(), formula(layer, x, vectors_of(layer, "b")), rtol=1e-5, atol=1e-6)


@kinds
def test_attributes_of_the_base_are_reachable(kind):
    layer = make(kind, a=False)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    if kind == "linear":
        assert (layer.in_features, layer.out_features) == (IN, OUT)
    else:
        assert layer.nf == OUT
    with pytest.raises(AttributeError, match="no_such_name"):
        layer.no_such_name  # noqa: B018


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_is_equal_and_its_own(copied):
    layer = make("linear", a=False, b=True)
    layer.merge(["a"])
    other = copied(layer)
    x = torch.randn(3, IN)
    assert torch.equal(other(x), layer(x))
    other.unmerge()
    assert not torch.equal(other.weight, layer.weight)
    other.routing.switch(active=())
    assert layer.routing.active == ("a", "b")


def test_rules_hold_for_derived_types_and_no_others():
    class Mine(nn.Linear):
        pass

    assert find_rule(Mine(2, 3)) is RULES[nn.Linear]
    assert find_rule(nn.LayerNorm(3)) is None


def test_a_module_without_a_rule_is_refused():
    with pytest.raises(InputError) as error:
        IA3Layer(nn.LayerNorm(3), Routing())
    message = str(error.value)
    assert "LayerNorm" in message and "Linear" in message and "Conv1D" in message and "\n" not in message


@pytest.mark.parametrize("training", [True, False])
def test_wrappers_take_the_mode_of_what_they_wrap(training):
    base = make_base("linear").train(training)
    assert IA3Layer(base, Routing()).training is training
    assert TrainedModule(base, Routing()).training is training
    assert base.training is training


# Modules that are trained in full.


def test_a_trained_module_answers_by_the_adapter_in_effect():
    routing = Routing()
    module = TrainedModule(make_base("linear"), routing)
    module.add("a")
    module.add("b")
    with torch.no_grad():
        module.modules_to_save["a"].weight.mul_(2)
        module.modules_to_save["b"].weight.mul_(3)
    x = torch.randn(3, IN)
    results = {name: child(x) for name, child in module.modules_to_save.items()}
    results[None] = module.original_module(x)
    assert len({result.sum().item() for result in results.values()}) == 3
    for active, expected in [((), None), (("a",), "a"), (("b",), "b"), (("c", "b"), "b"), (("a", "b"), "a")]:
        routing.switch(active=active)
        assert torch.equal(module(x), results[expected])
    routing.switch(merged=("b",))
    assert torch.equal(module(x), results["b"])
    assert module.weight is module.modules_to_save["b"].weight
    routing.switch(enabled=False)
    assert torch.equal(module(x), results[None])


def test_a_trained_copy_is_trainable_and_its_own():
    module = TrainedModule(make_base("linear"), Routing())
    module.add("a")
    assert all(parameter.requires_grad for parameter in module.modules_to_save["a"].parameters())
    assert not any(parameter.requires_grad for parameter in module.original_module.parameters())
    with torch.no_grad():
        module.modules_to_save["a"].weight.zero_()
    assert not (module.original_module.weight == 0).any()
    module.remove("a")
    assert list(module.modules_to_save) == []
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


# Others in the place of what an adapter holds.


def put_a_tensor(layer: IA3Layer, values: torch.Tensor) -> None:
    del layer.ia3_l.a  # as FSDP, by names alone
    layer.ia3_l.a = values


REPLACED = {
    "by item": lambda layer, values: layer.ia3_l.update({"a": values}),
    "loaded": lambda layer, values: layer.load_state_dict({"ia3_l.a": values}, strict=False, assign=True),
    "by FSDP's first kind": put_a_tensor,
    "by FSDP's second kind": lambda layer, values: setattr(layer.ia3_l, "a", nn.Parameter(values)),
    "in the dictionary": lambda layer, values: layer.ia3_l._parameters.__setitem__("a", nn.Parameter(values)),
    "emptied": lambda layer, values: (
        layer.to_empty(device="meta")
        .to_empty(device="cpu")
        .load_state_dict({**make("linear").state_dict(), "ia3_l.a": values})
    ),
}


@pytest.mark.parametrize(
    "copied", [lambda layer: layer, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("how", REPLACED)
def test_what_stands_in_a_parameters_place_acts(how, compiled, copied):
    torch._dynamo.reset()
    layer = copied(make("linear", a=False))
    run = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    x, values = torch.randn(3, IN), torch.randn(OUT, 1)
    run(x)
    REPLACED[how](layer, values)
    torch.testing.assert_close(run(x).double(), formula(layer, x, {"a": values}), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("copied", [lambda module: module, copy.deepcopy])
def test_what_stands_in_a_modules_place_acts(copied):
    module = TrainedModule(make_base("linear"), Routing())
    module.add("a")
    module.routing.switch(active=["a"])
    module, x = copied(module), torch.randn(3, IN)
    for put in (
        module.modules_to_save.__setitem__,
        module.modules_to_save.add_module,
        module.modules_to_save.__setattr__,
    ):
        other = nn.Linear(IN, OUT)
        put("a", other)
        assert torch.equal(module(x), other(x))


def test_replicas_for_data_parallel_have_their_own(monkeypatch):
    """`nn.DataParallel` copies modules to several devices, each with tensors of its own."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            routing = Routing()
            self.layer, self.head = make("linear", a=False), TrainedModule(make_base("linear"), routing)
            self.head.add("a")
            routing.switch(active=["a"])

        def forward(self, x):
            return self.layer(x), self.head(x)

    copies = []

    def broadcast(tensors, devices, detach=False):
        copies.append([[tensor * (device + 2) for tensor in tensors] for device in devices])
        return copies[-1]

    monkeypatch.setattr(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", broadcast)
    network, x = Network(), torch.randn(3, IN)
    before = network(x)
    names = [name for name, _ in network.named_parameters()]
    for device, replica in enumerate(torch.nn.parallel.replicate(network, [0, 1])):
        values = dict(zip(names, copies[0][device], strict=True))
        for found, expected in zip(replica(x), torch.func.functional_call(network, values, (x,)), strict=True):
            assert torch.equal(found, expected)
    assert all(torch.equal(found, expected) for found, expected in zip(network(x), before, strict=True))
