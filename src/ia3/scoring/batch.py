"""Questions as tensors: `Batch`, what all families' rows have in common, and which questions go through a model at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ia3.adapter.placement import device_of
from ia3.scoring.question import Question, sizes_of

# Tokens that go through the model at once, padding included: on an accelerator, and on a processor, which is faster when
# activations stay in its caches, and where they take less memory.
BATCH_TOKENS = 4096
_PROCESSOR_TOKENS = 512

# Reading the weights once more costs about as much as so many tokens do.
PASS_TOKENS = 64

# So little padding is no reason for another pass, however short the rows are.
_FEW_TOKENS = 8

Batch = dict[str, Any]
"""Questions as tensors, B questions of at most C choices of at most T tokens:

- the model's own inputs (`input_ids`, `attention_mask`, perhaps `position_ids`), R rows of L tokens; an
  encoder-decoder's rows are its decoder's, see `EncoderDecoder.pack`;
- `keep`: how many last positions, K, of each row have to be projected on the vocabulary (a 0-d tensor);
- `position` (B, C, T): where the prediction of each choice token stands among the R·K projected positions;
- `token` (B, C, T): the choice token; `mask` (B, C, T): whether there is one;
- `label` (B,): the right choice; -100 where it is not known;
- `encoder_outputs`: where an encoder has read the prompts before, its output, in place of `input_ids`;
- `past_key_values`: where rows continue a text that was read before, its keys and values (see `Prefix`);
- `acts_from` (R,): a decoder's, the place in each row where the question begins;
- `adapter_names`: where questions say it, the adapter of each of the R rows.
"""


def names_of(questions: Sequence[Question], rows: Sequence[int]) -> Batch:
    """`adapter_names` of a batch whose questions have so many rows each; nothing where they leave it open."""
    names = [name for question, count in zip(questions, rows, strict=True) for name in [question.adapter] * count]
    return {} if names[0] is None else {"adapter_names": names}


def answers_of(questions: Sequence[Question], paths: Sequence[Sequence[Sequence[int]]]) -> Batch:
    """`position`, `token`, `mask` and `label` of a batch."""
    shape = (
        len(questions),
        max(len(question.choices) for question in questions),
        max(len(choice) for question in questions for choice in question.choices),
    )
    position, token, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool)
    for b, (question, places) in enumerate(zip(questions, paths, strict=True)):
        for c, (choice, path) in enumerate(zip(question.choices, places, strict=True)):
            position[b, c, : len(choice)] = path
            token[b, c, : len(choice)] = choice
            mask[b, c, : len(choice)] = True
    labels = [-100 if question.label is None else question.label for question in questions]
    return {
        "position": torch.from_numpy(position),
        "token": torch.from_numpy(token),
        "mask": torch.from_numpy(mask),
        "label": torch.tensor(labels),
    }


def padded(texts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of texts, padded on the right, and where they are texts: both (texts, longest)."""
    length = max(map(len, texts))
    ids = torch.full((len(texts), length), pad_token_id)
    mask = torch.zeros((len(texts), length), dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return ids, mask


def prompts_of(questions: Sequence[Question], pad_token_id: int) -> Batch:
    """`input_ids` and `attention_mask` (B, S) of the prompts, padded on the right."""
    ids, mask = padded([question.prompt for question in questions], pad_token_id)
    return {"input_ids": ids, "attention_mask": mask}


def additive_mask(allowed: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """What attention adds (B, 1, L, L): 0 where a place may attend to another (B, L, L), else the dtype's lowest number."""
    mask = torch.zeros((len(allowed), 1, *allowed.shape[1:]), dtype=dtype)
    return mask.masked_fill_(torch.from_numpy(~allowed)[:, None], torch.finfo(dtype).min)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on a device."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def normalized_scores(log_probs: torch.Tensor, mask: torch.Tensor, power: float | torch.Tensor = 1.0) -> torch.Tensor:
    """β(x, y) = Σ_t log p(y_t | x, y_<t) / T^power for each choice (Liu et al. 2022, section 3.2): (B, C).

    Minus infinity where a question has fewer than C choices. The power is one for all, or one for each question (B, 1).
    """
    length = mask.sum(-1)
    scores = log_probs.sum(-1) / length.clamp(min=1).to(log_probs.dtype).pow(power)
    return scores.masked_fill(length == 0, -math.inf)


def pass_tokens(model: nn.Module) -> int:
    """How many tokens, padding included, are best read by a model at once where it is."""
    return _PROCESSOR_TOKENS if device_of(model).type == "cpu" else BATCH_TOKENS


def groups(questions: Sequence[Question], tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices of questions, longest first, in groups of similar length.

    A group's packed rows hold at most so many tokens, and it ends before its padding costs more than another pass
    through the model does, or is more than a few tokens and a tenth of it.
    """
    yield from groups_of_sizes([sizes_of(question) for question in questions], tokens)


def training_groups(questions: Sequence[Question], tokens: int) -> Iterator[list[int]]:
    """As `groups`; a place that something is predicted at counts as a token more, for its logits are kept as well."""
    sizes = [(prompt, 2 * tree + 1) for prompt, tree in map(sizes_of, questions)]
    return groups_of_sizes(sizes, tokens)


def joined_groups(questions: Sequence[Question], tokens: int) -> Iterator[list[int]]:
    """Indices of questions of one adapter, longest first, in groups of at most so many tokens together."""
    group: list[int] = []
    filled = 0
    for index in sorted(range(len(questions)), key=lambda i: -sum(sizes_of(questions[i]))):
        size = sum(sizes_of(questions[index]))
        if group and filled + size > tokens:
            yield group
            group, filled = [], 0
        group.append(index)
        filled += size
    if group:
        yield group


def groups_of_sizes(sizes: Sequence[tuple[int, int]], tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """`groups` of questions whose `sizes_of` are known."""
    group: list[int] = []
    prompt = tree = filled = 0
    for index in sorted(range(len(sizes)), key=lambda i: -sum(sizes[i])):
        size = sizes[index]
        if group:
            room = (max(prompt, size[0]) + max(tree, size[1])) * (len(group) + 1)
            if room > tokens or room - filled - sum(size) > min(PASS_TOKENS, max(_FEW_TOKENS, room / 10)):
                yield group
                group, prompt, tree, filled = [], 0, 0, 0
        group.append(index)
        prompt, tree, filled = max(prompt, size[0]), max(tree, size[1]), filled + sum(size)
    if group:
        yield group
