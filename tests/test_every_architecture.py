"""An adapter with the default targets in every text architecture: it acts as its merged weights do."""

import pytest
import torch

import ia3
import zoo
from test_architectures import NOTHING, REFUSED, TEXT, _quiet, built  # noqa: F401

# Voxtral hears before it reads.
ADAPTED = [name for name in TEXT if name not in {*NOTHING, *REFUSED, "voxtral_realtime"}]


@pytest.mark.parametrize("model_type", ADAPTED)
def test_adapted_answers_are_the_merged_ones(model_type):
    base = built(model_type, meta=False).eval().requires_grad_(False)  # torch's linear rounds otherwise if trainable
    batch = zoo.inputs(base)

    def answer(model):
        with torch.no_grad():
            output = model(**batch)
        return next(value for value in output.values() if torch.is_tensor(value) and value.is_floating_point())

    plain = answer(base)
    if not torch.equal(plain, answer(base)):
        pytest.skip("answers at random")
    model = ia3.IA3Model(base, ia3.IA3Config()).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for vector in model.adapter_parameters("default"):
            vector.copy_(1 + 0.5 * torch.randn(vector.shape, generator=generator))
    adapted = answer(model)
    model.merge_adapter()
    merged = answer(model)
    model.unmerge_adapter()
    assert torch.equal(answer(model), adapted)
    scale = plain.abs().max()
    assert (adapted - merged).abs().max() <= 1e-4 * scale
    assert not torch.allclose(adapted, plain, rtol=0, atol=float(1e-6 * scale))
    with model.disable_adapter():
        assert torch.equal(answer(model), plain)
