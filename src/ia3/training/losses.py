"""T-Few's loss: likelihood, unlikelihood, and length-normalized cross-entropy (Liu et al. 2022, section 3.2); and the
contrastive loss of sentence encoders."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from ia3.errors import InputError
from ia3.scoring.batch import normalized_scores

# Keeps -log(1 - p) and its gradient finite if a wrong token has probability 1.
_EPSILON = 1e-3


class TFewLoss(NamedTuple):
    """The three terms, each the mean over the questions of a batch, and their weighted sum `total`."""

    total: torch.Tensor
    likelihood: torch.Tensor
    unlikelihood: torch.Tensor
    length_normalized: torch.Tensor


def tfew_loss(
    log_probs: torch.Tensor,
    mask: torch.Tensor,
    labels: torch.Tensor,
    likelihood_weight: float = 1.0,
    unlikelihood_weight: float = 1.0,
    length_normalized_weight: float = 1.0,
    length_normalization: float = 1.0,
    weights: torch.Tensor | None = None,
) -> TFewLoss:
    """L = a L_LM + b L_UL + c L_LN for B questions of at most C choices of at most T tokens.

    y is the right choice, ŷ⁽ⁿ⁾ are the wrong ones, β is the length-normalized log-probability:

    - likelihood, L_LM = -1/T Σ_t log p(y_t | x, y_<t)
    - unlikelihood, L_UL = -Σ_n Σ_t log(1 - p(ŷ⁽ⁿ⁾_t | x, ŷ⁽ⁿ⁾_<t)) / Σ_n T⁽ⁿ⁾, with p multiplied by 1 - 0.001
    - length-normalized, L_LN = -log(exp β(x, y) / (exp β(x, y) + Σ_n exp β(x, ŷ⁽ⁿ⁾)))

    Args:
        log_probs: (B, C, T), the log-probability of each choice token.
        mask: (B, C, T), whether the choice has this token.
        labels: (B,), the index of the right choice.
        likelihood_weight: a, 1 in the paper.
        unlikelihood_weight: b, 1 in the paper.
        length_normalized_weight: c, 1 in the paper.
        length_normalization: the power of T in β.
        weights: (B,), what each question's loss is multiplied by before the mean over B; None: all the same.

    Raises:
        InputError: shapes do not fit, or a label is not the index of a choice.
    """
    if log_probs.dim() != 3 or mask.shape != log_probs.shape or labels.shape != log_probs.shape[:1]:
        raise InputError(
            f"Expected log_probs and mask (B, C, T) and labels (B,), found {tuple(log_probs.shape)}, "
            f"{tuple(mask.shape)} and {tuple(labels.shape)}."
        )
    exists = mask.any(-1)
    if labels.min() < 0 or labels.max() >= mask.shape[1] or not exists.gather(1, labels[:, None]).all():
        raise InputError(f"Expected labels that are choices of their questions, found {labels.tolist()}.")
    log_probs = log_probs.masked_fill(~mask, 0)
    length = mask.sum(-1)
    right = F.one_hot(labels, mask.shape[1]).bool()

    mean = log_probs.sum(-1) / length.clamp(min=1)
    likelihood = _mean(-mean[right], weights)

    wrong = mask & ~right[..., None]
    surprise = -torch.log1p(-(1 - _EPSILON) * log_probs.exp()).masked_fill(~wrong, 0)
    unlikelihood = _mean(surprise.sum((1, 2)) / wrong.sum((1, 2)).clamp(min=1), weights)

    scores = normalized_scores(log_probs, mask, length_normalization)
    if weights is None:  # PyTorch's own mean, which rounds otherwise
        length_normalized = F.cross_entropy(scores, labels)
    else:
        length_normalized = _mean(F.cross_entropy(scores, labels, reduction="none"), weights)
    total = (
        likelihood_weight * likelihood
        + unlikelihood_weight * unlikelihood
        + length_normalized_weight * length_normalized
    )
    return TFewLoss(total, likelihood, unlikelihood, length_normalized)


def _mean(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return (values if weights is None else values * weights).mean()


def contrastive_loss(
    embeddings: torch.Tensor, labels: torch.Tensor, temperature: float = 0.1, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The supervised contrastive loss of N texts (Khosla et al. 2020, arXiv:2004.11362, equation 2).

    P(i) are the other texts with the label of text i, and z are embeddings of length 1:

        L = mean over i of -1/|P(i)| Σ_{p ∈ P(i)} log(exp(z_i·z_p / temperature) / Σ_{a ≠ i} exp(z_i·z_a / temperature))

    The mean is over texts with a P(i) that is not empty; without such a text the loss is 0.

    Args:
        embeddings: (N, H), of length 1.
        labels: (N,).
        temperature: below 1, the nearest texts count most.
        weights: (N,), what the loss of each text i is multiplied by before the mean; None: all the same.
    """
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    similar = (embeddings @ embeddings.T / temperature).masked_fill(~others, -torch.inf)
    positives = (labels[:, None] == labels) & others
    counts = positives.sum(1)
    surprise = (similar.logsumexp(1, keepdim=True) - similar).masked_fill(~positives, 0.0).sum(1)
    has_positives = counts > 0
    if not has_positives.any():
        return embeddings.sum() * 0.0
    return _mean(surprise[has_positives] / counts[has_positives], None if weights is None else weights[has_positives])
