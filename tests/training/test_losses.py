"""The three terms against the paper's formulas, written out in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ia3 import InputError, tfew_loss
from ia3.training.losses import contrastive_loss

probabilities = st.floats(1e-6, 1.0)
question = st.lists(st.lists(probabilities, min_size=1, max_size=4), min_size=2, max_size=4)


def tensors(batch):
    shape = (len(batch), max(map(len, batch)), max(len(choice) for q in batch for choice in q))
    log_probs = torch.full(shape, 7.7, dtype=torch.float64)  # what stands where there is no token must not matter
    mask = torch.zeros(shape, dtype=torch.bool)
    for b, choices in enumerate(batch):
        for c, choice in enumerate(choices):
            log_probs[b, c, : len(choice)] = torch.tensor(choice, dtype=torch.float64).log()
            mask[b, c, : len(choice)] = True
    return log_probs, mask


def by_hand(batch, labels, power=1.0):
    terms = []
    for choices, label in zip(batch, labels, strict=True):
        likelihood = -sum(math.log(p) for p in choices[label]) / len(choices[label])
        wrong = [p for c, choice in enumerate(choices) if c != label for p in choice]
        unlikelihood = -sum(math.log(1 - 0.999 * p) for p in wrong) / len(wrong)
        beta = [sum(math.log(p) for p in choice) / len(choice) ** power for choice in choices]
        top = max(beta)
        normalized = top + math.log(sum(math.exp(b - top) for b in beta)) - beta[label]
        terms.append((likelihood, unlikelihood, normalized))
    return [sum(term) / len(terms) for term in zip(*terms, strict=True)]


@given(batch=st.lists(question, min_size=1, max_size=4), data=st.data(), power=st.sampled_from([0.0, 0.5, 1.0]))
def test_each_term_is_the_papers(batch, data, power):
    labels = [data.draw(st.integers(0, len(choices) - 1)) for choices in batch]
    log_probs, mask = tensors(batch)
    found = tfew_loss(log_probs, mask, torch.tensor(labels), 3.0, 0.5, 2.0, power)
    likelihood, unlikelihood, normalized = by_hand(batch, labels, power)
    assert found.likelihood.item() == pytest.approx(likelihood, rel=1e-9, abs=1e-12)
    assert found.unlikelihood.item() == pytest.approx(unlikelihood, rel=1e-9, abs=1e-12)
    assert found.length_normalized.item() == pytest.approx(normalized, rel=1e-9, abs=1e-12)
    assert found.total.item() == pytest.approx(
        3 * likelihood + 0.5 * unlikelihood + 2 * normalized, rel=1e-9, abs=1e-12
    )


@given(batch=st.lists(question, min_size=1, max_size=4), data=st.data())
def test_weights_multiply_each_questions_loss(batch, data):
    labels = [data.draw(st.integers(0, len(choices) - 1)) for choices in batch]
    weights = [data.draw(st.floats(0.1, 9)) for _ in batch]
    each = [tfew_loss(*tensors([one]), torch.tensor([y])) for one, y in zip(batch, labels, strict=True)]
    found = tfew_loss(*tensors(batch), torch.tensor(labels), weights=torch.tensor(weights, dtype=torch.float64))
    for term, values in zip(found, zip(*each, strict=True), strict=True):
        expected = sum(w * v.item() for w, v in zip(weights, values, strict=True)) / len(batch)
        assert term.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_gradients_are_right_and_stay_finite_where_a_wrong_token_is_certain():
    log_probs, mask = tensors([[[0.5, 0.25], [0.9]], [[0.3], [0.2, 0.6]]])
    log_probs.requires_grad_()
    labels = torch.tensor([0, 1])
    assert torch.autograd.gradcheck(lambda x: tfew_loss(x, mask, labels).total, log_probs)
    certain = torch.zeros(1, 2, 1, requires_grad=True)
    tfew_loss(certain, torch.ones(1, 2, 1, dtype=torch.bool), torch.tensor([0])).total.backward()
    assert torch.isfinite(certain.grad).all() and certain.grad[0, 1, 0] > 0


def test_order_of_choices_does_not_matter():
    log_probs, mask = tensors([[[0.5, 0.25], [0.9], [0.1, 0.2, 0.3]]])
    turned = torch.tensor([2, 0, 1])
    a = tfew_loss(log_probs, mask, torch.tensor([1]))
    b = tfew_loss(log_probs[:, turned], mask[:, turned], torch.tensor([2]))
    for x, y in zip(a, b, strict=True):
        assert x.item() == pytest.approx(y.item(), rel=1e-12)


@pytest.mark.parametrize(
    "shape, mask_shape, labels",
    [
        ((2, 3), (2, 3), [0, 0]),
        ((1, 2, 3), (1, 2, 2), [0]),
        ((1, 2, 3), (1, 2, 3), [0, 1]),
        ((1, 2, 3), (1, 2, 3), [2]),
        ((1, 2, 3), (1, 2, 3), [-100]),
    ],
)
def test_bad_shapes_and_labels(shape, mask_shape, labels):
    with pytest.raises(InputError, match="Expected"):
        tfew_loss(torch.zeros(shape), torch.ones(mask_shape, dtype=torch.bool), torch.tensor(labels))


def contrastive_by_hand(rows, labels, temperature):
    def similarity(i, j):
        return math.exp(sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) / temperature)

    terms = []
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        whole = sum(similarity(i, j) for j in others)
        if positives:
            terms.append(-sum(math.log(similarity(i, p) / whole) for p in positives) / len(positives))
    return sum(terms) / len(terms) if terms else 0.0


@given(
    labels=st.lists(st.integers(0, 3), min_size=2, max_size=8), seed=st.integers(0, 99), temperature=st.floats(0.05, 2)
)
def test_the_contrastive_loss_is_the_papers(labels, seed, temperature):
    drawn = torch.randn(len(labels), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    embeddings = torch.nn.functional.normalize(drawn, dim=-1).requires_grad_()
    found = contrastive_loss(embeddings, torch.tensor(labels), temperature)
    assert found.item() == pytest.approx(contrastive_by_hand(embeddings.tolist(), labels, temperature), rel=1e-9)
    found.backward()
    assert embeddings.grad is not None and embeddings.grad.isfinite().all()


def test_a_text_that_weighs_twice_counts_twice_in_the_contrastive_loss():
    drawn = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 0, 1, 1, 2])  # the last one has no other
    ones = torch.eye(5, dtype=torch.float64)
    each = [contrastive_loss(drawn, labels, 0.5, ones[i]).item() for i in range(5)]
    assert sum(each) == pytest.approx(contrastive_loss(drawn, labels, 0.5).item()) and each[4] == 0
    weighed = contrastive_loss(drawn, labels, 0.5, torch.tensor([2.0, 1, 3, 1, 9])).item()
    assert weighed == pytest.approx(2 * each[0] + each[1] + 3 * each[2] + each[3])


def test_the_contrastive_losss_gradient_is_right():
    drawn = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 1, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda x: contrastive_loss(x, labels, 0.5), drawn)
