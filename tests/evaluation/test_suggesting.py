"""The rows that are suggested for labelling."""

import numpy as np
import pytest

from ia3 import InputError, Scorer
from ia3.evaluation.suggesting import states_as_embeddings, suggest
from support import tiny, words

CHANCE = np.random.default_rng(0)


def groups(sizes, width=6, spread=0.05):
    """Rows in groups far from each other, and the group of each."""
    centres = np.random.default_rng(1).normal(size=(len(sizes), width)) * 5
    rows = np.concatenate(
        [centre + spread * CHANCE.normal(size=(size, width)) for centre, size in zip(centres, sizes, strict=True)]
    )
    return rows, np.repeat(np.arange(len(sizes)), sizes)


def test_each_group_is_suggested_once_and_large_ones_first():
    rows, of = groups([50, 3, 20, 8])
    found = suggest(rows, 4)
    assert of[found].tolist() == [0, 2, 3, 1]
    assert suggest(rows, 4) == found


def test_what_a_classifier_doubts_is_preferred():
    rows, of = groups([40, 40, 40])
    probabilities = np.where((of == 1)[:, None], [[0.5, 0.5]], [[0.999, 0.001]])
    found = suggest(rows, 4, probabilities)
    assert (of[found] == 1).all() and len(set(found)) == 4


def test_rows_that_are_alike_fill_up_what_is_wanted():
    rows = np.repeat(np.eye(3), 5, axis=0)
    found = suggest(rows, 7)
    assert len(set(found)) == 7 and {row // 5 for row in found[:3]} == {0, 1, 2}


@pytest.mark.parametrize("count", [0, 4])
def test_a_count_beyond_the_rows_is_refused(count):
    with pytest.raises(InputError, match=f"Expected a count from 1 to the number of different rows, 3, found {count}"):
        suggest(np.eye(3), count)


def test_states_of_a_language_model_stand_in_for_embeddings():
    scorer = Scorer(tiny.build("llama", vocab_size=len(words.VOCABULARY)), words.tokenizer())
    found = states_as_embeddings(scorer, ["the tea was lovely", "soup", "the tea was lovely"])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found[0], found[2], atol=1e-5)
    assert not np.allclose(found[0], found[1], atol=0.1)


@pytest.mark.parametrize("texts", [["soup"], ["soup", "soup"]])
def test_states_that_are_all_alike_are_no_nan(texts):
    scorer = Scorer(tiny.build("llama", vocab_size=len(words.VOCABULARY)), words.tokenizer())
    assert suggest(states_as_embeddings(scorer, texts), 1) == [0]
