"""Rows of several questions: the scores are those of a row for each, where a trial says so."""

import random
from dataclasses import replace

import pytest
import torch

from ia3 import IA3Config, IA3Model, Scorer
from ia3.scoring import trials
from ia3.scoring.batch import joined_groups
from ia3.scoring.decoder import Decoder
from ia3.scoring.question import Question, row_length
from support import tiny, words


def asked(count: int, choices: int, seed: int = 0) -> list[Question]:
    chance = random.Random(seed)
    return [
        Question(
            chance.choices(range(3, tiny.VOCAB), k=chance.randint(1, 9)),
            [chance.choices(range(3, 7), k=chance.randint(1, 4)) for _ in range(choices)],
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_questions_of_a_row_do_not_see_each_other(name, choices):
    family = Decoder(tiny.build(name).double(), words.tokenizer())
    questions = asked(5, choices)
    joined, rows = family.join(questions), family.plain_rows(questions)
    assert joined["input_ids"].shape == (1, sum(map(row_length, questions)))
    torch.testing.assert_close(family.log_probs(joined), family.log_probs(rows), rtol=1e-5, atol=1e-6)
    if choices == 1:
        assert trials.joins(family, questions)


def test_a_trial_holds_for_smaller_rows_alone(monkeypatch):
    family, tried = Decoder(tiny.build("llama"), words.tokenizer()), []
    join = family.join
    monkeypatch.setattr(family, "join", lambda questions: tried.append(len(questions)) or join(questions))
    questions = asked(6, 1)
    assert trials.joins(family, questions[:4]) and trials.joins(family, questions[:2]) and tried == [4]
    assert trials.joins(family, questions) and tried == [4, 6]


def test_groups_hold_all_questions_once_and_no_more_than_fits():
    questions = asked(20, 1)
    groups = list(joined_groups(questions, 24))
    assert sorted(i for group in groups for i in group) == [*range(20)]
    assert all(sum(row_length(questions[i]) for i in group) <= 24 for group in groups)
    sizes = [row_length(questions[i]) for group in groups for i in group]
    assert sizes == sorted(sizes, reverse=True)


def test_what_may_share_a_row(monkeypatch):
    monkeypatch.setattr("ia3.scoring.batch.PASS_TOKENS", 1)
    questions = asked(6, 1)
    model = IA3Model(tiny.build("llama"), IA3Config(task_type="CAUSAL_LM"))
    model.add_adapter("other", IA3Config(task_type="CAUSAL_LM"))

    def rows(some, its=model):
        return [
            (sorted(group), len(batch["input_ids"]))
            for group, batch in Scorer(its, words.tokenizer()).training_batches(some)
        ]

    assert rows(questions) == [([*range(6)], 1)]
    # Each adapter has rows of its own.
    named = [replace(one, adapter="default" if i % 2 else "other") for i, one in enumerate(questions)]
    assert sorted(rows(named)) == [([0, 2, 4], 1), ([1, 3, 5], 1)]
    # Choices are compared in rows of their own, and adapters that act from the question on know one beginning a row.
    assert len(rows(asked(6, 2))) > 1
    waiting = IA3Model(tiny.build("llama"), IA3Config(task_type="CAUSAL_LM", acts_from="question"))
    assert len(rows(questions, waiting)) > 1
    monkeypatch.setattr(trials, "deviation", lambda *_: (1.0, "wrong"))
    fresh = IA3Model(tiny.build("llama"), IA3Config(task_type="CAUSAL_LM"))
    assert len(rows(questions, fresh)) > 1
