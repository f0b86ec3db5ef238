"""Heads that learn from rows without labels."""

import numpy as np
import pytest

from ia3.opinions.head import fit_head
from ia3.opinions.self_training import Examples, self_train

CHANCE = np.random.default_rng(0)
CENTRES = CHANCE.normal(size=(3, 8)) * 1.2


def drawn(count, seed):
    chance = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    return (CENTRES[labels] + chance.normal(size=(count, 8)))[:, None].astype(np.float32), labels


def log_loss(log_probs, labels):
    return -log_probs[np.arange(len(labels)), labels].mean()


@pytest.fixture(scope="module")
def both():
    states, labels = drawn(12, 1)
    more = CENTRES[:, None].astype(np.float32)  # an example of each label
    pool, _ = drawn(300, 2)
    names = ["abc"[label] for label in labels]
    folds = [*[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], -1, -1, -1]
    examples = {
        "head": Examples(states, names, pool),
        "sentences": Examples(np.concatenate([states, more]), [*names, *"abc"], pool),
    }
    heads = {
        "head": fit_head(states, names, folds[:12])[0],
        "sentences": fit_head(np.concatenate([states, more]), [*names, *"abc"], folds)[0],
    }
    return examples, heads, folds, labels


def test_a_pool_helps_where_labels_are_groups(both):
    examples, heads, folds, labels = both
    found, held_out = self_train(examples, heads, {"head": 0.5, "sentences": 0.8}, folds)
    others, right = drawn(300, 5)
    assert log_loss(found["head"].log_probs(others), right) < log_loss(heads["head"].log_probs(others), right)
    assert {name: one.shape for name, one in held_out.items()} == {"head": (12, 3), "sentences": (12, 3)}
    np.testing.assert_allclose(np.exp(held_out["head"]).sum(1), 1, atol=1e-9)
    assert log_loss(held_out["head"], labels) < np.log(3)


def test_a_held_out_row_is_not_seen(both):
    examples, heads, folds, _ = both
    _, held_out = self_train(examples, heads, {"head": 0.5, "sentences": 0.8}, folds)
    wrong = {
        name: Examples(its.states, ["c" if row < 3 else label for row, label in enumerate(its.labels)], its.pool)
        for name, its in examples.items()
    }
    _, others = self_train(wrong, heads, {"head": 0.5, "sentences": 0.8}, folds)
    # Other labels of the first fold change what the others are told, but its own rows' odds only by how sure heads are.
    np.testing.assert_allclose(held_out["head"][:3].argsort(axis=1), others["head"][:3].argsort(axis=1))
    assert not np.allclose(held_out["head"][3:], others["head"][3:])


def test_a_label_whose_row_is_held_out_is_the_least_probable(both):
    examples, _, _, _ = both
    its = examples["head"]
    names = ["d" if row == 0 else label for row, label in enumerate(its.labels)]
    folds = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    head, _ = fit_head(its.states, names, folds)
    found, held_out = self_train({"head": Examples(its.states, names, its.pool)}, {"head": head}, {"head": 1.0}, folds)
    assert found["head"].labels == ("a", "b", "c", "d")
    assert (held_out["head"][:3].argmin(axis=1) == 3).all()
