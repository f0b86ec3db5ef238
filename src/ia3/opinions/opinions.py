"""How the opinions on a row become one answer: `Opinions`, and `weigh`, which finds out how much each counts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from scipy.special import log_softmax

from ia3.adapter.stored import HEAD_NAME, OPINIONS_NAME
from ia3.errors import InputError, excerpt, problems
from ia3.files import parse_json, reading, to_json
from ia3.opinions.head import Head

VECTORS, HEAD = "vectors", "head"

USUAL = 0.8
"""The weight of an opinion where nothing is known: below 1, for those of one model err together."""

# How far the logarithms of weights are from that.
_SPREAD = 0.7

# A sum has to be better than its best part by so many nats a row, or the part answers alone.
_GAIN = 0.005


class Opinions(BaseModel):
    """What a folder's parts say to a row, and how much each counts: p = softmax(Σ weight · log p of each opinion).

    Attributes:
        vectors: the weight of the answers' scores with the adapter's vectors; 0: they are not asked.
        head: the weight of a linear head on the frozen model's hidden states (`Head`); 0: there is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    vectors: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    head: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    _fitted: Head | None = PrivateAttr(default=None)

    @classmethod
    def of(cls, weights: Mapping[str, float], head: Head | None = None) -> Opinions:
        """Opinions with these weights, and the head where it counts."""
        made = cls(vectors=weights.get(VECTORS, 0.0), head=weights.get(HEAD, 0.0))
        if made.head and head is None:
            raise InputError("Expected a head with the weight of one, found none.")
        made._fitted = head if made.head else None
        return made

    @property
    def fitted(self) -> Head | None:
        """The head."""
        return self._fitted

    def together(self, vectors: Mapping[str, float], head: Mapping[str, float] | None = None) -> dict[str, float]:
        """The log-probability of each label.

        Args:
            vectors: label → score by the vectors, of all labels; not looked at where these do not count.
            head: label → log-probability by the head, of those that it knows.
        """
        if not self.head:
            return {label: self.vectors * score for label, score in vectors.items()}
        assert head is not None
        # A label that had no training rows is less probable than any that had.
        least = min(head.values()) - math.log(len(head) + 1)
        highest = max(vectors.values())
        total = math.fsum(math.exp(score - highest) for score in vectors.values())
        found = {}
        for label, score in vectors.items():
            said = score - highest - math.log(total) if self.vectors else 0.0
            found[label] = self.vectors * said + self.head * head.get(label, least)
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
            return cls.of(found.model_dump(), head)


def weigh(held_out: Mapping[str, np.ndarray], y: Sequence[int]) -> dict[str, float]:
    """Weights with the lowest log-loss on rows that no opinion was formed on.

    A logarithmic opinion pool: weights above 0, their logarithms pulled to a usual one (see `USUAL`). The best opinion
    alone, if the others add nothing.

    Args:
        held_out: name of an opinion → log-probabilities (N, K).
        y: the index of each row's label.
    """
    from scipy.optimize import minimize

    rows = np.arange(len(y))

    def fitted(names: Sequence[str]) -> tuple[float, dict[str, float]]:
        parts = np.stack([held_out[name] for name in names])

        def loss(logs: np.ndarray) -> float:
            log_probs = log_softmax(np.tensordot(np.exp(logs), parts, 1), axis=1)
            pulled = ((logs - math.log(USUAL)) / _SPREAD) ** 2 / 2
            return float(-log_probs[rows, list(y)].sum() + pulled.sum())

        found = minimize(loss, np.full(len(names), math.log(USUAL)), method="Nelder-Mead")
        return loss(found.x), dict(zip(names, np.exp(found.x).tolist(), strict=True))

    together = fitted(list(held_out))
    alone = min((fitted([name]) for name in held_out), key=lambda one: one[0])
    return together[1] if together[0] < alone[0] - _GAIN * len(y) else alone[1]
