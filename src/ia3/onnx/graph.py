"""What goes into the ONNX file: tokens of prompts become probabilities of labels (`Graph`)."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ia3.adapter.adapted import find_adapted
from ia3.adapter.rows import Starts
from ia3.opinions.opinions import Opinions
from ia3.scoring.decoder import Decoder, last_logits
from ia3.scoring.question import Question, tree_of
from ia3.scoring.scorer import Scorer


class _Starts(Starts):
    """From where adapters act, without checks that would make a graph for one size of a batch alone."""

    def apply(self, activation: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
        acting = torch.arange(activation.shape[1], device=activation.device) >= self.places[:, None]
        return torch.where(acting[..., None], scaled, activation)


class Graph(nn.Module):
    """A model and the answers to one question, asked of any prompts. The answers are in it: a decoder reads their tokens behind
    each prompt, as `ia3.scoring.decoder.pack` lays them out.

    Args:
        scorer: of the model.
        question: any row's; all rows have its choices.
        labels: those of the choices, as the caller lists them.
        power: of the length that a choice's log-probability is divided by.
        opinions: with the vectors alone.
        temperature: divides the scores.
    """

    tree: torch.Tensor
    depths: torch.Tensor
    above: torch.Tensor
    path: torch.Tensor
    token: torch.Tensor
    there: torch.Tensor
    size: torch.Tensor
    shift: torch.Tensor
    moved: torch.Tensor

    def __init__(
        self,
        scorer: Scorer,
        question: Question,
        labels: list[str],
        power: float,
        opinions: Opinions,
        temperature: float,
    ) -> None:
        super().__init__()
        self.base: Any = scorer.family.base
        self.is_decoder = isinstance(scorer.family, Decoder)
        self.pad_token_id = scorer.family.pad_token_id
        adapted = find_adapted(scorer.model)
        self.routing = None if adapted is None else adapted.ia3_routing
        self.waits = adapted is not None and adapted.waits_for_question(None)
        choices = question.as_listed(question.choices)
        tree = tree_of(question)
        paths = question.as_listed(tree.paths) if self.is_decoder else [[0]] * len(choices)
        nodes = len(tree.tokens) if self.is_decoder else 1
        longest = max(map(len, choices))
        fill = [[0] * (longest - len(choice)) for choice in choices]
        lengths = torch.tensor([[len(choice)] for choice in choices])
        self.keep = nodes
        self._constant("tree", tree.tokens[1:nodes], torch.long)
        self._constant("depths", tree.depths[1:nodes], torch.long)
        self._constant("above", tree.seen[1:nodes, 1:nodes], torch.bool)
        self._constant("path", [[*path, *left] for path, left in zip(paths, fill, strict=True)], torch.long)
        self._constant("token", [[*choice, *left] for choice, left in zip(choices, fill, strict=True)], torch.long)
        self._constant("there", torch.arange(longest) < lengths, torch.bool)
        self._constant("size", lengths[:, 0].float() ** power, torch.float32)
        shift = opinions.balance[0] if opinions.balance else {}
        moved = {label: math.log(opinions.prior[label] / share) for label, share in opinions.seen.items()}
        self._constant("shift", [shift.get(label, 0.0) for label in labels], torch.float32)
        self._constant("moved", [moved.get(label, 0.0) for label in labels], torch.float32)
        self.factor = opinions.vectors / temperature

    def _constant(self, name: str, values: Any, dtype: torch.dtype) -> None:
        self.register_buffer(name, torch.as_tensor(values, dtype=dtype), persistent=False)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, question_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The probability of each label (rows, labels).

        Args:
            input_ids: prompts (rows, tokens), a decoder's padded on the left, an encoder's on the right.
            attention_mask: 1 where there is a token.
            question_tokens: how many of each prompt's last tokens adapters act on that act from the question on.
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        starts = None
        if self.is_decoder:
            batch = self._packed(input_ids, attention_mask)
        if question_tokens is not None:
            starts = _Starts(input_ids.shape[1] - question_tokens, 0)
        with nullcontext() if self.routing is None else self.routing.passing(None, starts):
            logits = last_logits(self.base, self.base, {**batch, "keep": self.keep}).float()
        each = logits.log_softmax(-1)[:, self.path, self.token]
        scores = torch.where(self.there, each, 0.0).sum(-1) / self.size
        return ((scores + self.shift) * self.factor + self.moved).softmax(-1)

    def _packed(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Prompts with the tree of the choices behind each: what a decoder takes."""
        rows, length = ids.shape
        real, places = mask.bool(), torch.arange(length, device=ids.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        # A place that holds nothing attends to itself: a row of the softmax must not be empty.
        allowed = (places[None, :] <= places[:, None]) & real[:, None, :] | (places[None, :] == places[:, None])
        nodes = self.keep - 1
        if nodes:
            ids = torch.cat([ids, self.tree.expand(rows, nodes)], 1)
            positions = torch.cat([positions, positions[:, -1:] + self.depths], 1)
            none = torch.zeros(rows, length, nodes, dtype=torch.bool, device=ids.device)
            seen = real[:, None, :].expand(rows, nodes, length)
            behind = torch.cat([seen, self.above.expand(rows, nodes, nodes)], 2)
            allowed = torch.cat([torch.cat([allowed, none], 2), behind], 1)
        lowest = torch.finfo(torch.float32).min
        return {
            "input_ids": ids,
            "attention_mask": torch.where(allowed, 0.0, lowest)[:, None],
            "position_ids": positions,
        }
