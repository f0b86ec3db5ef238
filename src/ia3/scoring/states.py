"""What the frozen model's layers hold of texts: means of hidden states, for heads (`ia3.opinions`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ia3.adapter.placement import device_of
from ia3.errors import InputError
from ia3.scoring.batch import Batch, groups_of_sizes, padded, pass_tokens, to_device
from ia3.scoring.decoder import output_of
from ia3.scoring.family import Family
from ia3.scoring.question import Question

Layers = Sequence[torch.Tensor]


def hidden_states(family: Family, output: Any) -> Layers:
    """The hidden states (R, L, width) of a model's output: of its embeddings, and behind each layer.

    Raises:
        InputError: the model gives none.
    """
    found = getattr(output, "hidden_states", None)
    if found is None or not alike(found):
        raise InputError(
            f"Expected a model that gives hidden states of one width for all layers, found a {type(family.base).__name__}",
            "train without a head",
            argument="opinions",
        )
    return found


def alike(layers: Layers) -> bool:
    """Whether there are hidden states (R, L, width) of one width for all layers."""
    return len({layer.shape[-1] for layer in layers}) == 1 and all(layer.dim() == 3 for layer in layers)


def total(layers: Layers, row: int, first: int, end: int) -> torch.Tensor:
    """The sum of a row's hidden states from one place to another: float32 (layers, width); (0,) if layers are unlike."""
    if not alike(layers):
        return torch.empty(0)
    return torch.stack([layer[row, first:end].float().sum(0) for layer in layers]).cpu()


def telling(length: int) -> int:
    """From which of a decoder's tokens on states tell something: the first one sees nothing, and collects attention."""
    return min(1, length - 1)


def whole_states(family: Family, questions: Sequence[Question]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """The states of a decoder's questions that are read whole: indices, and float32 (B, places, width).

    See `Scorer.states`.
    """
    device = device_of(family.model)
    for group in groups_of_sizes([(len(one.prompt), 0) for one in questions], pass_tokens(family.model)):
        some = [questions[i] for i in group]
        ids, _ = padded([one.prompt for one in some], family.pad_token_id)
        # Without a mask: no token sees the padding behind it.
        batch = {"input_ids": ids, "keep": torch.tensor(1), "acts_from": torch.tensor([one.read for one in some])}
        layers = _layers(family, to_device(batch, device))
        found = []
        for row, one in enumerate(some):
            end = one.read or len(one.prompt)
            mean = total(layers, row, telling(end), end) / (end - telling(end))
            found.append(torch.cat([mean, total(layers, row, len(one.prompt) - 1, len(one.prompt))]))
        yield group, torch.stack(found)


def last_states(family: Family, batch: Batch) -> torch.Tensor:
    """The hidden states at the last place of each of a decoder's rows: float32 (R, layers, width)."""
    return torch.stack([layer[:, -1].float() for layer in _layers(family, batch)], dim=1).cpu()


def _layers(family: Family, batch: Batch) -> Layers:
    return hidden_states(family, output_of(family.model, family.base, batch, output_hidden_states=True))
