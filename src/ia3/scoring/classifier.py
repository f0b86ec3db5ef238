"""Questions for encoders with a classification head: a prompt is a row, and a label's index stands for its answer.

The score of a label is its log-probability, so that T-Few's likelihood term is cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ia3.errors import InputError, shown
from ia3.scoring.choices import Batch, answers_of, names_of
from ia3.scoring.questions import Question
from ia3.scoring.seq2seq import prompts


def check_choices(base: nn.Module, choices: Sequence[Sequence[str]]) -> None:
    """Raise `InputError` unless all prompts have the same choices, as many as the classifier has labels."""
    config: Any = base.config
    for i, texts in enumerate(choices):
        if list(texts) != list(choices[0]):
            raise InputError(
                f"Expected the same answer choices for all prompts, as a {type(base).__name__} has fixed labels, found "
                f"{shown(choices[0])} for prompt 0 and {shown(texts)} for prompt {i}; take a generative model for choices "
                f"that differ."
            )
        if len(texts) != config.num_labels:
            raise InputError(
                f"Expected {config.num_labels} answer choices, the labels of this {type(base).__name__} "
                f"({shown(list(config.id2label.values()))}), found {len(texts)}; load it with load_base(name, labels=…)."
            )


def by_name(base: nn.Module, question: Question, labels: Sequence[str]) -> Question:
    """The question with each choice standing for the head's label of that name, wherever the task lists it.

    A head that does not know the names, such as one that adapters of several tasks have in turn, has them in
    alphabetical order: that in which `load_base` gives them to a head of their own, with which the adapter is used alone.

    Args:
        base: the classifier.
        question: as `encode` makes it, with choices in the task's order.
        labels: the task's, in its order.
    """
    places: dict[str, int] = base.config.label2id or {}  # type: ignore[union-attr, assignment]
    if set(places) != set(labels):
        places = {label: place for place, label in enumerate(sorted(labels))}
    order = tuple(sorted(range(len(labels)), key=lambda index: places[labels[index]]))
    label = None if question.label is None else order.index(question.listed(question.label))
    return replace(question, choices=[[places[labels[index]]] for index in order], label=label, order=order)


def rows(base: nn.Module, questions: Sequence[Question], pad_token_id: int = 0) -> Batch:
    """Each question as a row, its prompt, padded on the right: a `Batch` with one prediction a row, of a label.

    Args:
        base: the classifier.
        questions: B of them.
        pad_token_id: fills unused places where the model's config names no token for that.
    """
    config: Any = base.config
    pad = getattr(config, "pad_token_id", None)  # RoBERTa counts positions by it, decoders find the last token by it
    return {
        **prompts(questions, pad_token_id if pad is None else pad),
        "keep": torch.tensor(1),
        **names_of(questions, [1] * len(questions)),
        **answers_of(questions, [[[row]] * len(question.choices) for row, question in enumerate(questions)]),
    }
