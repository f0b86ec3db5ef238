"""Which rows a model scores rightly: packed ones where a trial shows that they are exact for it, else plain ones.

Packing is wrong for some models: positions built from a 2-D mask, recurrent layers, windows counted over the row, or not
at all. So each model is tried on the questions at hand, once for sizes of them that no earlier trial covers.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import le
from typing import Any

import torch
from torch import nn

from ia3.adapter.placement import device_of
from ia3.errors import reason
from ia3.scoring.batch import Batch, normalized_scores, to_device
from ia3.scoring.decoder import Decoder
from ia3.scoring.family import Family, evaluating
from ia3.scoring.question import Question, text_length, tree_of

logger = logging.getLogger(__name__)

# The mask of a packed row grows with the square of its length; this one has 256 MB in float32.
_LONGEST_PACKED = 8192

# So far may float32 scores differ: rounding came to at most 6e-6 in SmolLM2-135M, while windows that are counted over a
# row's places have changed a tiny model's choices by 1e-3, but those that a trial looks at by as little as 5e-5.
_ROUNDING = 3e-5

# A score may differ by 4 eps, times the largest score if that is above 1. Rounding came to at most 3 eps in SmolLM2-135M in
# bfloat16. Siblings of a tree that wrongly see each other changed scores by 7 eps and more.
_SPACINGS = 4

Size = tuple[int, ...]
"""How hard a question is for a layout; none that is smaller in no number is easier than another."""


def size_of(question: Question, has_encoder: bool = False) -> Size:
    """Tokens of the prompt, of the tree, and of the longest choice, and how many places the tree moves a token by.

    Args:
        question: any.
        has_encoder: one reads the prompt, apart from the choices.
    """
    tree = tree_of(question)
    moved = max(node - depth for node, depth in enumerate(tree.depths))
    longest = max(map(len, question.choices))
    return (0 if has_encoder else len(question.prompt)), len(tree.tokens) - 1, longest, moved


@dataclass
class Verdicts:
    """For which sizes of a question a layout was tried on a model, and found exact or not."""

    exact: list[Size] = field(default_factory=list)
    wrong: list[Size] = field(default_factory=list)

    def of(self, size: Size) -> bool | None:
        """Whether the layout is exact for a question of this size; None: no trial says so."""
        if any(all(map(le, tried, size)) for tried in self.wrong):
            return False
        return True if any(all(map(le, size, tried)) for tried in self.exact) else None

    def add(self, size: Size, exact: bool) -> None:
        """What a trial found."""
        (self.exact if exact else self.wrong).append(size)


# What is known of each base model lives as long as the model, for whoever asks it.
_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple, Verdicts]] = weakref.WeakKeyDictionary()


def verdicts_of(family: Family, layout: str) -> Verdicts:
    """What is known of a layout, by its name, for a model as it computes now."""
    attention = getattr(getattr(family.base, "config", None), "_attn_implementation", None)
    return _known.setdefault(family.base, {}).setdefault((layout, attention, family.dtype), Verdicts())


def judged(
    verdicts: Verdicts,
    questions: Sequence[Question],
    size: Callable[[Question], Size],
    limit: int | None,
    is_exact: Callable[[Question], bool | None],
) -> bool:
    """Whether a layout is exact for all questions, by trials of what no earlier trial says anything about.

    Tried is the longest prompt with the largest tree and the longest choice, none of which need be one question's; and
    question by question, the longest first, where that is not exact or longer than `limit` tokens.

    Args:
        verdicts: what is known; trials add to it.
        questions: at hand.
        size: as of `size_of`.
        limit: how many tokens the model has positions for.
        is_exact: makes a trial; None: it says nothing, for the scores are no numbers, as whoever asks for them will see.
    """

    def tried(question: Question) -> bool | None:
        found = is_exact(question)
        if found is not None:
            verdicts.add(size(question), found)
        return found

    known = [verdicts.of(size(question)) for question in questions]
    if False in known:
        return False
    left = [question for question, exact in zip(questions, known, strict=True) if exact is None]
    if len(left) > 1:
        hardest = hardest_of(left)
        # One place is for the padding that a trial may add.
        if verdicts.of(size(hardest)) is None and (limit is None or text_length(hardest) < limit):
            tried(hardest)
    for question in sorted(left, key=text_length, reverse=True):
        exact = verdicts.of(size(question))
        if exact is False or (exact is None and tried(question) is False):
            return False
    return True


def hardest_of(questions: Sequence[Question]) -> Question:
    """No easier than any of them: a union of trees moves each of their tokens at least as far."""
    longest = max(questions, key=lambda one: len(one.prompt))
    sizes = [size_of(question)[1:] for question in questions]
    chosen = {max(range(len(questions)), key=lambda i: sizes[i][which]) for which in range(len(sizes[0]))}
    choices = sorted({tuple(choice) for index in chosen for choice in questions[index].choices})
    return replace(longest, choices=[*map(list, choices)], label=None, order=None)


def telling(question: Question) -> list[int]:
    """The choices that say whether a layout is exact: the one that ends last, which packing moves farthest, and the
    longest one, which sees most."""
    longest = max(range(len(question.choices)), key=lambda i: len(question.choices[i]))
    return sorted({tree_of(question).farthest, longest})


def scores_of(family: Family, batch: Batch) -> torch.Tensor:
    """Length-normalized scores (B, C) of a batch."""
    batch = to_device(batch, device_of(family.model))
    return normalized_scores(family.log_probs(batch), batch["mask"])


def deviation(
    family: Family, batch: Callable[[], Batch], expected: torch.Tensor, where: Any = ...
) -> tuple[float, str]:
    """How far some scores of a batch are from those expected, and that in words; infinitely where the model takes no such
    batch, which it says in its own way."""
    try:
        difference = float((scores_of(family, batch())[where] - expected).abs().max())
        return difference, f"scores differ by {difference:.2g}"
    except Exception as error:
        return math.inf, reason(error)


def tolerance(family: Family, questions: Sequence[Question], right: torch.Tensor) -> float:
    """How far scores in another layout may be from those of plain rows: as far as rounding moves these, when the first two are
    asked alone."""
    noise = max(
        float((scores_of(family, family.plain_rows([q]))[0] - right[i]).abs().max())
        for i, q in enumerate(questions[:2])
    )
    return max(rounding(family, right), 4 * noise)


def rounding(family: Family, scores: torch.Tensor) -> float:
    """How far another layout's scores may be from these, as its sums are rounded in another order."""
    return max(_ROUNDING, _SPACINGS * torch.finfo(family.dtype).eps * max(float(scores.abs().max()), 1.0))


def packs(family: Family, questions: Sequence[Question]) -> bool:
    """Whether a row for each question is exact for all of them."""
    if not family.has_layouts:
        return True
    if family.has_encoder and family.recomputes:
        return False  # layers that are computed again would not find the positions that are handed in
    sizes = [size_of(question, family.has_encoder) for question in questions]
    if any(prompt + tree > _LONGEST_PACKED for prompt, tree, *_ in sizes):
        return False
    # Processes that share a model are not tried equally often, and must not wait for each other.
    alone, verdicts = family.unwrapped, verdicts_of(family, "packed")
    return judged(
        verdicts,
        questions,
        lambda one: size_of(one, family.has_encoder),
        family.max_length,
        lambda one: is_exact_packed(alone, one, verdicts),
    )


def joins(family: Decoder, questions: Sequence[Question]) -> bool:
    """Whether one row for all these questions, each with one choice, is exact."""
    verdicts = verdicts_of(family, "joined")
    size = sum(map(text_length, questions)), max(map(text_length, questions))
    known = verdicts.of(size)
    if known is None:
        alone = family.unwrapped
        with evaluating(alone.model), torch.no_grad():
            right = scores_of(alone, alone.plain_rows(questions))
            if not torch.isfinite(right).all():
                return False
            difference, why = deviation(alone, lambda: alone.join(questions), right)  # type: ignore[attr-defined]
            known = difference <= tolerance(alone, questions, right)
        verdicts.add(size, known)
        if not known:
            name = type(family.base).__name__
            logger.info("%s: a row for each example, because rows of several are not exact (%s).", name, why)
    return known


def is_exact_packed(family: Family, question: Question, verdicts: Verdicts) -> bool | None:
    """Whether a model scores a question packed as it does in plain rows; None: its scores are no numbers."""
    # Two short rows show whether padding on the left is exact too, and how much rounding does to plain rows alone.
    short = [replace(question, prompt=question.prompt[-size:], choices=question.choices[:4]) for size in (2, 8)]
    ends = telling(question)
    with evaluating(family.model), torch.no_grad():
        right = scores_of(family, family.plain_rows(short))
        told = replace(question, choices=[question.choices[end] for end in ends])
        far = scores_of(family, family.plain_rows([told]))[0]
        if not torch.isfinite(right).all() or not torch.isfinite(far).all():
            return None
        allowed = tolerance(family, short, right)
        difference, why = deviation(family, lambda: family.pack(short), right)
        if not difference <= allowed:  # so is every longer row
            verdicts.add(size_of(short[1], family.has_encoder), False)
        else:
            difference, why = deviation(family, lambda: family.pack([question]), far, (0, ends))
    if difference <= allowed:
        return True
    name = type(family.base).__name__
    logger.info("%s: one row for each choice, because packing is not exact (%s).", name, why)
    return False


def collate(family: Family, questions: Sequence[Question]) -> Batch:
    """The questions as a batch: a row for each where that is exact, else plain rows."""
    return (family.pack if packs(family, questions) else family.plain_rows)(questions)
