"""Decoder-only models: a prompt and all its answer choices in one row (`pack`).

The choices form a tree behind the prompt, in which common beginnings are shared: a token attends to the prompt and to
its own ancestors, and its position counts on from the prompt. The last token of a choice is predicted, never read, so
it is not in the row: single-token choices add nothing at all. The vocabulary projection runs at the tree only.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ia3.scoring.attention import shared_keys
from ia3.scoring.batch import Batch, additive_mask, answers_of, names_of, padded
from ia3.scoring.family import Family, waits_for_question
from ia3.scoring.question import Question, tree_of
from ia3.scoring.tokens import continuations, unclosed

# What of a batch is the model's, where it knows it.
_INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values")


class Decoder(Family):
    """A causal language model.

    A choice is tokenized by itself, as it continues a text: give it the leading space that it needs (" yes"). Neither
    prompt nor choice is closed.
    """

    has_encoder = False

    def pack(self, questions: Sequence[Question]) -> Batch:
        return pack(questions, self.pad_token_id, self.dtype)

    def join(self, questions: Sequence[Question]) -> Batch:
        """One row for all questions, of one adapter that acts from the start; see `join`. Which models take it, `trials`
        finds out."""
        return join(questions, self.dtype)

    def plain_rows(self, questions: Sequence[Question]) -> Batch:
        return plain_rows(questions, self.pad_token_id)

    def logits(self, batch: Batch) -> torch.Tensor:
        return last_logits(self.model, self.base, batch)

    def _answers(
        self, choices: Sequence[Sequence[str]], names: Sequence[Sequence[str]] | None
    ) -> list[list[list[int]]]:
        different = list(dict.fromkeys(text for texts in choices for text in texts))
        known = dict(zip(different, continuations(self.tokenizer, different), strict=True))
        return [[known[text] for text in texts] for texts in choices]

    def _framed(self, tokens: list[int], text: str) -> tuple[list[int], int, int]:
        # What marks the beginning of a text stays at the beginning.
        tokens = unclosed(self.tokenizer, tokens, text)
        return tokens, int(tokens[:1] == [self.tokenizer.bos_token_id]), 0


def pack(questions: Sequence[Question], pad_token_id: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Each question as one row: the prompt, then the tree of its choices.

    Prompts end at the same column (padded on the left), so that the tree's predictions are the last K columns.

    Args:
        questions: B of them.
        pad_token_id: fills unused places; nothing attends to it.
        dtype: of the additive attention mask, the model's.

    Returns:
        A `Batch` with R = B rows and `attention_mask` (B, 1, L, L): 0 where a token attends, the dtype's lowest
        number elsewhere.
    """
    width = max(len(question.prompt) for question in questions)
    trees = [tree_of(question) for question in questions]
    keep = max(len(tree.tokens) for tree in trees)
    rows, length = len(questions), width + keep - 1
    ids = np.full((rows, length), pad_token_id, dtype=np.int64)
    positions = np.zeros((rows, length), dtype=np.int64)
    allowed = np.zeros((rows, length, length), dtype=bool)
    # A place that holds nothing attends to itself: a row of the softmax must not be empty.
    allowed[:, np.arange(length), np.arange(length)] = True
    for row, (question, tree) in enumerate(zip(questions, trees, strict=True)):
        start, nodes = width - len(question.prompt), len(tree.tokens) - 1
        ids[row, start:width] = question.prompt
        ids[row, width : width + nodes] = tree.tokens[1:]
        positions[row, start:width] = np.arange(len(question.prompt))
        positions[row, width : width + nodes] = len(question.prompt) - 1 + np.array(tree.depths[1:], dtype=np.int64)
        allowed[row, start:width, start:width] = np.tri(len(question.prompt), dtype=bool)
        allowed[row, width : width + nodes, start:width] = True
        allowed[row, width : width + nodes, width : width + nodes] = tree.seen[1:, 1:]
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": additive_mask(allowed, dtype),
        "position_ids": torch.from_numpy(positions),
        "keep": torch.tensor(keep),
        "acts_from": torch.tensor([width - len(question.prompt) + question.read for question in questions]),
        **names_of(questions, [1] * rows),
        **answers_of(
            questions, [[[row * keep + node for node in path] for path in tree.paths] for row, tree in enumerate(trees)]
        ),
    }


def join(questions: Sequence[Question], dtype: torch.dtype = torch.float32) -> Batch:
    """All questions in one row, none of which sees another: first the prompts without their last tokens, then these, each with
    its tree, so that all predictions are the last K columns.

    Args:
        questions: B of them.
        dtype: as of `pack`.

    Returns:
        A `Batch` with R = 1 row, otherwise as of `pack`.
    """
    trees = [tree_of(question) for question in questions]
    width = sum(len(question.prompt) - 1 for question in questions)
    keep = sum(len(tree.tokens) for tree in trees)
    ids, positions = np.zeros((2, 1, width + keep), dtype=np.int64)
    allowed = np.eye(width + keep, dtype=bool)[None]
    paths, start, end = [], 0, width
    for question, tree in zip(questions, trees, strict=True):
        size = len(question.prompt) - 1
        mine, its = slice(start, start + size), slice(end, end + len(tree.tokens))
        ids[0, mine], ids[0, its] = question.prompt[:-1], [question.prompt[-1], *tree.tokens[1:]]
        positions[0, mine], positions[0, its] = np.arange(size), size + np.array(tree.depths)
        allowed[0, mine, mine] = np.tri(size, dtype=bool)
        allowed[0, its, mine], allowed[0, its, its] = True, tree.seen
        paths.append([[end - width + node for node in path] for path in tree.paths])
        start, end = start + size, its.stop
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": additive_mask(allowed, dtype),
        "position_ids": torch.from_numpy(positions),
        "keep": torch.tensor(keep),
        "acts_from": torch.tensor([0]),
        **names_of(questions[:1], [1]),
        **answers_of(questions, paths),
    }


def plain_rows(questions: Sequence[Question], pad_token_id: int = 0) -> Batch:
    """Each (prompt + choice) as a row of its own, padded on the right: exact for every causal model, and slower.

    Returns:
        A `Batch` with a row for each choice and `attention_mask` (R, L).
    """
    ids, mask = padded(
        [question.prompt + choice[:-1] for question in questions for choice in question.choices], pad_token_id
    )
    first = min(len(question.prompt) for question in questions) - 1
    keep = ids.shape[1] - first
    paths, row = [], 0
    for question in questions:
        paths.append([])
        for choice in question.choices:
            start = row * keep + len(question.prompt) - 1 - first
            paths[-1].append(range(start, start + len(choice)))
            row += 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "keep": torch.tensor(keep),
        "acts_from": torch.tensor([question.read for question in questions for _ in question.choices]),
        **names_of(questions, [len(question.choices) for question in questions]),
        **answers_of(questions, paths),
    }


def last_logits(model: nn.Module, base: nn.Module, batch: Batch) -> torch.Tensor:
    """The logits at the last K places of each row of `input_ids`; the one place that a classifier has."""
    logits = output_of(model, base, batch).logits
    return logits[:, None] if logits.dim() == 2 else logits[:, -int(batch["keep"]) :]


def output_of(model: nn.Module, base: nn.Module, batch: Batch, **more: Any) -> Any:
    """The model's output for a batch, with logits at the last K places of each row; `more` are its other arguments."""
    known = inspect.signature(base.forward).parameters
    inputs = {key: batch[key] for key in _INPUTS if key in batch and key in known}
    names = batch.get("adapter_names")
    if names is not None:
        inputs["adapter_names"] = names
    if waits_for_question(model, names):
        inputs["acts_from"] = batch["acts_from"]
    keep = int(batch["keep"])
    # As indices, not as a number: a slice is not contiguous, and a product that has a gradient then reads the whole
    # vocabulary's matrix anew for each row. (A model on several devices would divide the indices among them.)
    last: Any = keep if isinstance(model, nn.DataParallel) else torch.arange(-keep, 0)
    options: dict[str, Any] = {"use_cache": "past_key_values" in batch, "logits_to_keep": last, "return_dict": True}
    with shared_keys(base):
        return model(**inputs, **{key: value for key, value in options.items() if key in known}, **more)
