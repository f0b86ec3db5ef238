"""Adapters with the default targets in every text architecture: alone as merged, and a batch of several row by row."""

from types import SimpleNamespace

import pytest
import torch

import ia3
from ia3.adapter.architectures import Site, output_sites
from ia3.adapter.targets import base_modules
from support import zoo
from support.zoo import NOTHING, REFUSED, TEXT, built

pytestmark = pytest.mark.usefixtures("quiet")

# Voxtral hears before it reads.
ADAPTED = [name for name in TEXT if name not in {*NOTHING, *REFUSED, "voxtral_realtime"}]

# Those in which rows cannot have different adapters, and what the error says.
UNMIXED = {
    "dbrx": "Another module reads the v1",
    "jetmoe": "Rows of a JetMoeParallelExperts",
    "musicgen": "this model mixes rows on the way",  # its input has a row for each codebook
    "musicgen_melody": "this model mixes rows on the way",
    "switch_transformers": "An expert .* gets tokens of all rows",
}

# A few of those with a gate in every feed-forward, in two projections or in one.
GATED = {"cohere", "gemma2", "glm4", "llama", "lfm2", "mt5", "nomic_bert", "phi3", "qwen3", "recurrent_gemma", "umt5"}

# Activations with time first can be divided among the rows too, wrongly, because their number divides the length.
ROWS, LENGTH = 4, 12
NAMES = ("one", "__base__", "two", "one")


@pytest.fixture(scope="module")
def adapted(request):
    """A tiny model with adapters `one` and `two`, and what it answers without them."""
    base = built(request.param, meta=False).eval().requires_grad_(False)  # torch's linear rounds otherwise if trainable
    batch = zoo.inputs(base, ROWS, LENGTH)

    @torch.no_grad()
    def answer(**kwargs):
        output = model(**batch, **kwargs)
        return next(value for value in output.values() if torch.is_tensor(value) and value.is_floating_point())

    model = base
    plain = answer()
    if not torch.equal(plain, answer()):
        pytest.skip("answers at random")
    model = ia3.IA3Model(base, {"one": ia3.IA3Config(), "two": ia3.IA3Config()}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in model.peft_config:
            for vector in model.adapter_parameters(name):
                vector.copy_(1 + 0.5 * torch.randn(vector.shape, generator=generator))
    model.set_adapter("one", inference_mode=True)
    rows = len(next(iter(batch.values())))
    return SimpleNamespace(kind=request.param, model=model, answer=answer, plain=plain, one=answer(), rows=rows)


architectures = pytest.mark.parametrize("adapted", ADAPTED, indirect=True)


@architectures
def test_adapted_answers_are_the_merged_ones(adapted):
    model, answer, plain = adapted.model, adapted.answer, adapted.plain
    model.merge_adapter()
    merged = answer()
    model.unmerge_adapter()
    assert torch.equal(answer(), adapted.one)
    scale = plain.abs().max()
    assert (adapted.one - merged).abs().max() <= 1e-4 * scale
    assert not torch.allclose(adapted.one, plain, rtol=0, atol=float(1e-6 * scale))
    with model.disable_adapter():
        assert torch.equal(answer(), plain)


@architectures
def test_each_row_of_a_batch_has_its_own_adapter_or_the_model_refuses(adapted):
    model, answer, plain = adapted.model, adapted.answer, adapted.plain
    if adapted.kind in UNMIXED:
        with pytest.raises(ia3.InputError, match=UNMIXED[adapted.kind]) as error:
            answer(adapter_names=NAMES * (adapted.rows // ROWS))
        assert "one adapter at a time" in str(error.value)
        assert torch.equal(answer(), adapted.one)
        return
    mixed = answer(adapter_names=NAMES)
    model.set_adapter("two", inference_mode=True)
    alone = {"one": adapted.one, "__base__": plain, "two": answer()}
    scale = plain.abs().max()
    for row, name in enumerate(NAMES):
        assert (mixed[row] - alone[name][row]).abs().max() <= 1e-4 * scale
        for other in {*NAMES} - {name}:
            assert (mixed[row] - alone[other][row]).abs().max() > 1e-6 * scale


@architectures
def test_vectors_on_outputs_alone_are_those_on_inputs_or_refused(adapted):
    model, answer = adapted.model, adapted.answer
    modules = base_modules(model.model)
    inputs = [Site(path, True) for path, layer in model.ia3_layers.items() if layer.held["one"].feedforward]
    try:
        model.add_adapter("outputs", ia3.IA3Config(feedforward_modules=[]))
    except ia3.InputError as error:
        assert "to the same effect" in str(error) and adapted.kind not in GATED
        assert None in output_sites(modules, inputs).values()
        return
    moved = {site.path: path for path, site in output_sites(modules, inputs).items()}
    for path, layer in model.ia3_layers.items():
        if "outputs" in layer.ia3_l:
            vector, source = layer.ia3_l["outputs"].detach(), model.ia3_layers[moved.get(path, path)].ia3_l["one"]
            mask = layer.held["outputs"].mask
            mask = torch.ones_like(vector, dtype=torch.bool) if mask is None else mask
            vector[mask] = source.flatten() if path in moved else source[mask]
    model.set_adapter("outputs", inference_mode=True)
    found = answer()
    model.set_adapter("one", inference_mode=True)
    model.delete_adapter("outputs")
    assert (found - adapted.one).abs().max() <= 1e-4 * adapted.plain.abs().max()
