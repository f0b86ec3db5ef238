"""How the opinions on a row become one answer: `Opinions`, and `weigh`, which finds out how much each counts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from scipy.special import log_softmax

from ia3.adapter.stored import HEAD_NAME, OPINIONS_NAME
from ia3.errors import InputError, excerpt, problems, shown
from ia3.files import parse_json, reading, to_json
from ia3.opinions.head import Head

Share = Annotated[float, Field(ge=1e-9, le=1)]
Weight = Annotated[float, Field(ge=0, le=100)]

VECTORS, HEAD = "vectors", "head"

USUAL = 0.8
"""The weight of an opinion where nothing is known: below 1, for those of one model err together."""

# How far the logarithms of weights are from that: a few dozen rows are no reason to trust one opinion alone.
_SPREAD = 0.5

# An opinion with a smaller part of the largest weight is not asked.
_LEAST = 0.1


class Opinions(BaseModel):
    """What a folder's parts say to a row, and how much each counts.

    p(label) = softmax(Σ weight · log p of each opinion + log prior(label) - log seen(label)), where the vectors' opinion is
    balanced: p = softmax(score + balance(label)).

    Attributes:
        vectors: the weight of the answers' scores with the adapter's vectors; 0: they are not asked.
        head: the weight of a linear head on the frozen model's hidden states (`Head`); 0: there is none.
        balance: label → what is added to the vectors' scores, which carry how usual the answers' words are; empty: nothing.
        seen: label → its share of the training examples; empty: as where predictions are made.
        prior: label → its share where predictions are made.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    vectors: Weight = 1.0
    head: Weight = 0.0
    balance: dict[str, Annotated[float, Field(ge=-1e3, le=1e3)]] = {}
    seen: dict[str, Share] = {}
    prior: dict[str, Share] = {}
    _fitted: Head | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _shares_go_together(self) -> Opinions:
        if self.seen.keys() != self.prior.keys():
            raise ValueError(f"expected shares of the same labels, found {shown(self.seen)} and {shown(self.prior)}")
        return self

    @classmethod
    def of(
        cls, weights: Mapping[str, float], head: Head | None = None, balance: Mapping[str, float] | None = None
    ) -> Opinions:
        """Opinions with these weights, and the head where it counts."""
        made = cls(vectors=weights.get(VECTORS, 0.0), head=weights.get(HEAD, 0.0), balance=dict(balance or {}))
        return made._with(head)

    def toward(self, prior: Mapping[str, float], seen: Mapping[str, float] | None = None) -> Opinions:
        """The opinions for a place where labels have other shares.

        p'(label) ∝ p(label) · prior(label) / seen(label) (Saerens et al. 2002).

        Args:
            prior: label → share there, of all labels.
            seen: label → share of the training examples; None: as before.
        """
        seen = self.seen if seen is None else seen
        if seen.keys() != prior.keys():
            raise InputError(f"Expected shares of the labels {shown(seen, 20)}, found {shown(prior, 20)}.")
        if not all(0 < share <= 1 for share in prior.values()) or abs(math.fsum(prior.values()) - 1) > 1e-6:
            raise InputError(f"Expected shares above 0 that add up to 1, found {shown(prior.values(), 20)}.")
        fields = {**self.model_dump(), "seen": dict(seen), "prior": dict(prior)}
        return type(self)(**fields)._with(self.fitted)

    def _with(self, head: Head | None) -> Opinions:
        made = self.model_copy()
        if made.head and head is None:
            raise InputError("Expected a head, to which opinions give a weight, found none; train anew.")
        made._fitted = head if made.head else None
        return made

    @property
    def fitted(self) -> Head | None:
        """The head."""
        return self._fitted

    def together(
        self, vectors: Mapping[str, float], head: Mapping[str, float] | None = None, temperature: float = 1.0
    ) -> dict[str, float]:
        """The score of each label, of which `Prediction.of` makes probabilities.

        Args:
            vectors: label → score by the vectors, of all labels; not looked at where these do not count.
            head: label → log-probability by the head, of those that it knows.
            temperature: divides the scores later; the prior is not to be divided by it.
        """
        vectors = {label: score + self.balance.get(label, 0.0) for label, score in vectors.items()}
        moved = {label: temperature * math.log(self.prior[label] / self.seen[label]) for label in self.seen}
        if not self.head:
            return {label: self.vectors * score + moved.get(label, 0.0) for label, score in vectors.items()}
        assert head is not None
        # A label that had no training rows is less probable than any that had.
        least = min(head.values()) - math.log(len(head) + 1)
        highest = max(vectors.values())
        total = math.fsum(math.exp(score - highest) for score in vectors.values())
        found = {}
        for label, score in vectors.items():
            said = score - highest - math.log(total) if self.vectors else 0.0
            found[label] = self.vectors * said + self.head * head.get(label, least) + moved.get(label, 0.0)
        return found

    def files(self) -> dict[str, bytes]:
        """What stands in an adapter's folder: name → content."""
        found = {OPINIONS_NAME: to_json(self.model_dump()).encode()}
        return found if self.fitted is None else {**found, HEAD_NAME: self.fitted.to_bytes()}

    @classmethod
    def from_json(cls, data: bytes, path: str | os.PathLike, head: Head | None) -> Opinions:
        """The opinions in the content of `path`. Raises `InputError` for a damaged file, or one without its head."""
        advice = "train anew"
        with reading(path, "opinions", advice):
            try:
                found = cls.model_validate(parse_json(data, path, advice))
            except ValidationError as error:
                where = excerpt(os.fspath(path))
                raise InputError(f"Cannot use {where}: {problems(error, 'opinions')}; {advice}.") from error
            if not found.vectors and not found.head:
                raise InputError(
                    f"Expected an opinion that counts in {excerpt(os.fspath(path))}, found none; {advice}."
                )
            return found._with(head)


def weigh(held_out: Mapping[str, np.ndarray], y: Sequence[int]) -> dict[str, float]:
    """Weights with the lowest log-loss on rows that no opinion was formed on.

    A logarithmic opinion pool: weights above 0, their logarithms pulled to a usual one (see `USUAL`). An opinion that is
    hardly heard is left out, and the others are weighed again.

    Args:
        held_out: name of an opinion → log-probabilities (N, K).
        y: the index of each row's label.
    """
    from scipy.optimize import minimize

    rows, parts = np.arange(len(y)), np.stack(list(held_out.values()))

    def loss(logs: np.ndarray) -> float:
        log_probs = log_softmax(np.tensordot(np.exp(logs), parts, 1), axis=1)
        pulled = ((logs - math.log(USUAL)) / _SPREAD) ** 2 / 2
        return float(-log_probs[rows, list(y)].sum() + pulled.sum())

    weights = np.exp(minimize(loss, np.full(len(parts), math.log(USUAL)), method="Nelder-Mead").x)
    heard = {
        name: its for name, its, weight in zip(held_out, parts, weights, strict=True) if weight >= _LEAST * max(weights)
    }
    return dict(zip(held_out, weights.tolist(), strict=True)) if len(heard) == len(parts) else weigh(heard, y)
