"""Encoders with a head for labels: a prompt is a row, and a label's index stands for its answer.

The score of a label is its log-probability, so that T-Few's likelihood term is cross-entropy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ia3.errors import InputError, shown
from ia3.scoring.batch import Batch, answers_of, names_of, prompts_of
from ia3.scoring.decoder import last_logits, output_of
from ia3.scoring.family import Family
from ia3.scoring.question import Question


class Encoder(Family):
    """A classifier. A prompt is as the tokenizer opens and closes it; the token of a choice is a label of the head."""

    reads_answers = False
    has_layouts = False

    def pack(self, questions: Sequence[Question]) -> Batch:
        """Each question as a row, its prompt, padded on the right: a `Batch` with one prediction a row, of a label."""
        # RoBERTa counts positions by the token that the config names, decoders find the last token by it.
        pad = getattr(self.base.config, "pad_token_id", None)
        return {
            **prompts_of(questions, self.pad_token_id if pad is None else pad),
            "keep": torch.tensor(1),
            **names_of(questions, [1] * len(questions)),
            **answers_of(questions, [[[row]] * len(question.choices) for row, question in enumerate(questions)]),
        }

    plain_rows = pack

    def logits(self, batch: Batch) -> torch.Tensor:
        return last_logits(self.model, self.base, batch)

    def _answers(
        self, choices: Sequence[Sequence[str]], names: Sequence[Sequence[str]] | None
    ) -> list[list[list[int]]]:
        if names is None:
            return [[[index] for index in range(len(texts))] for texts in choices]
        return [[[place] for place in self._places(its)] for its in names]

    def _check(self, choices: Sequence[Sequence[str]], numbers: Sequence[int | None]) -> None:
        """Raise `InputError` unless all prompts have the same choices, as many as the classifier has labels."""
        super()._check(choices, numbers)
        kind, config = type(self.base).__name__, self.base.config
        for number, texts in zip(numbers, choices, strict=True):
            if list(texts) != list(choices[0]):
                raise InputError(
                    f"Expected the same answer choices for all prompts, as a {kind} has fixed labels, found "
                    f"{shown(choices[0])} first and {shown(texts)} here",
                    "take a generative model for choices that differ",
                    row=number,
                )
            if len(texts) != config.num_labels:
                raise InputError(
                    f"Expected {config.num_labels} answer choices, the labels of this {kind} "
                    f"({shown(list(config.id2label.values()))}), found {len(texts)}; load it with load_base(name, labels=…)."
                )

    def _places(self, names: Sequence[str]) -> list[int]:
        """The head's label of each name, wherever the task lists it.

        A head that does not know the names, such as one that adapters of several tasks have in turn, has them in
        alphabetical order: that in which `load_base` gives them to a head of their own, with which the adapter is used
        alone.
        """
        places: dict[str, int] = self.base.config.label2id or {}
        if set(places) != set(names):
            places = {name: place for place, name in enumerate(sorted(names))}
        return [places[name] for name in names]


class SentenceEncoder(Encoder):
    """A sentence encoder. It reads what stands before the question, and a linear head tells labels by the embedding.

    A question is the same for all rows, so it would only make their embeddings alike.
    """

    reads_questions = False
    embeds = True

    def embeddings(self, batch: Batch) -> torch.Tensor:
        """The embedding of each question, of length 1: float32 (B, H)."""
        return output_of(self.model, self.base, batch).embeddings.float()

    @functools.cached_property
    def max_length(self) -> int | None:
        limits = [super().max_length, self.base.pooling.max_length]
        return min((limit for limit in limits if limit is not None), default=None)
