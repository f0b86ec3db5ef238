"""How the opinions on a row become one answer: `Opinions`, and `weigh`, which finds out how much each counts."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from scipy.special import log_softmax

from ia3.adapter.stored import HEAD_NAME, OPINIONS_NAME, SENTENCES_NAME, WORDS_NAME
from ia3.errors import InputError, excerpt, problems, shown
from ia3.files import parse_json, reading, to_json
from ia3.opinions.head import Head

Share = Annotated[float, Field(ge=1e-9, le=1)]
Weight = Annotated[float, Field(ge=0, le=100)]
Shift = Annotated[float, Field(ge=-1e3, le=1e3)]

VECTORS, HEAD, SENTENCES, WORDS = "vectors", "head", "sentences", "words"

HEADS = {HEAD: HEAD_NAME, SENTENCES: SENTENCES_NAME, WORDS: WORDS_NAME}
"""The opinions that are linear heads, and the files of these."""

USUAL = 0.55
"""The weight of an opinion where nothing is known: below 1, for opinions err together."""

MOST_ASKING = 3
"""Templates that ask the vectors, at most: each costs a question more."""

# The least probability that labels without training rows leave to others.
_NOTHING = 1e-9

# How far the logarithms of weights are from that: a few dozen rows are no reason to trust one opinion alone.
_SPREAD = 0.55

LEAST = 0.1
"""An opinion with a smaller part of the largest weight is not asked."""


class Opinions(BaseModel):
    """What a folder's parts say to a row, and how much each counts.

    p(label) = softmax(Σ weight · log p of each opinion + log prior(label) - log seen(label)), where the vectors' opinion is
    balanced, p = softmax(score + balance(label)), and its log p is the mean over the templates that ask. A label that heads do not
    know has the vectors' probability (see `_beside`).

    Where rows have several labels, each is decided by itself (`thresholds`): p(label) = sigmoid(Σ weight · score of each opinion
    + bias), where the vectors' score is balanced, too, and a head's is that of `Head.scores`.

    Attributes:
        vectors: the weight of the answers' scores with the adapter's vectors; 0: they are not asked.
        head: the weight of a linear head on the frozen model's hidden states (`Head`); 0: there is none.
        sentences: the weight of a linear head on a sentence encoder's embeddings; 0: there is none.
        words: the weight of a linear head on the words of a row (`Words`); 0: there is none.
        encoder: the name of the sentence encoder, as `load_base` takes it.
        balance: for each template that asks the vectors, the task's first ones in order: label → what is added to the scores,
            which carry how usual the answers' words are; empty: the first template asks alone, and nothing is added.
        seen: label → its share of the training examples; empty: as where predictions are made.
        prior: label → its share where predictions are made.
        bias: of labels that are decided one by one.
        thresholds: label → the probability from which on a row has it, 1 for never; empty: each row has the most probable label.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    vectors: Weight = 1.0
    head: Weight = 0.0
    sentences: Weight = 0.0
    words: Weight = 0.0
    encoder: str | None = None
    balance: Annotated[list[dict[str, Shift]], Field(max_length=MOST_ASKING)] = []
    seen: dict[str, Share] = {}
    prior: dict[str, Share] = {}
    bias: Shift = 0.0
    thresholds: dict[str, Share] = {}
    _heads: dict[str, Head] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _parts_go_together(self) -> Opinions:
        if self.seen.keys() != self.prior.keys():
            raise ValueError(f"expected shares of the same labels, found {shown(self.seen)} and {shown(self.prior)}")
        if bool(self.sentences) != (self.encoder is not None):
            raise ValueError("expected an encoder where sentences count, and there alone")
        if self.thresholds and self.prior:
            raise ValueError("expected a prior or thresholds of labels, found both")
        return self

    @classmethod
    def of(
        cls,
        weights: Mapping[str, float],
        heads: Mapping[str, Head] | None = None,
        balance: Sequence[Mapping[str, float]] = (),
        encoder: str | None = None,
        bias: float = 0.0,
        thresholds: Mapping[str, float] | None = None,
    ) -> Opinions:
        """Opinions with these weights, and the heads that count.

        Args:
            weights: opinion → weight; those that are left out do not count.
            heads: opinion → its head.
            balance, encoder, bias, thresholds: see the class; an encoder that does not count is left out.
        """
        given: dict[str, Any] = {name: weights.get(name, 0.0) for name in (VECTORS, *HEADS)}
        given["encoder"] = encoder if given[SENTENCES] else None
        made = cls(**given, balance=[*map(dict, balance)], bias=bias, thresholds=dict(thresholds or {}))
        return made._with(heads or {})

    @property
    def weights(self) -> dict[str, float]:
        """Opinion → weight, of those that count."""
        return {name: weight for name in (VECTORS, *HEADS) if (weight := getattr(self, name))}

    @property
    def heads(self) -> dict[str, Head]:
        """Opinion → head, of those that count."""
        return dict(self._heads)

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
        return type(self)(**fields)._with(self._heads)

    def _with(self, heads: Mapping[str, Head]) -> Opinions:
        made = self.model_copy()
        named = [name for name in HEADS if name in made.weights]
        missing = [name for name in named if name not in heads]
        if missing:
            raise InputError(
                f"Expected a head ({HEADS[missing[0]]}), to which opinions give a weight, found none; train anew."
            )
        made._heads = {name: heads[name] for name in named}
        return made

    def asking(self, templates: int) -> range:
        """The templates that ask, of so many that the task has. Raises `InputError` if it has too few."""
        if templates < len(self.balance):
            raise InputError(
                f"Expected a task with the {len(self.balance)} templates that opinions ask in, found {templates}; train anew."
            )
        return range(max(len(self.balance), 1) if self.vectors else 1)

    def together(
        self,
        vectors: Sequence[Mapping[str, float]],
        heads: Mapping[str, Mapping[str, float]] | None = None,
        temperature: float = 1.0,
    ) -> dict[str, float]:
        """The score of each label, of which `Prediction.of` makes probabilities.

        Args:
            vectors: for each template that asks: label → score by the vectors, of all labels; the scores are not looked at
                where vectors do not count.
            heads: opinion → label → what its head says (`Head.said`), of the labels that it knows.
            temperature: divides the scores later; the prior is not to be divided by it.
        """
        moved = {label: temperature * math.log(self.prior[label] / self.seen[label]) for label in self.seen}
        if self.thresholds:
            return self._one_by_one(vectors, heads or {})
        by_vectors = self._by_vectors(vectors)
        found = {label: self.vectors * score + moved.get(label, 0.0) for label, score in by_vectors.items()}
        if not self._heads:
            return found
        assert heads is not None
        for name in self._heads:
            said, weight = heads[name], self.weights[name]
            # Where nobody knows a label that had no training rows, it is less probable than any that had.
            least = min(said.values()) - math.log(len(said) + 1)
            found = {label: score + weight * said.get(label, least) for label, score in found.items()}
        known = next(iter(self._heads.values())).labels
        if self.vectors and found.keys() > {*known}:
            return _beside(found, _log_probs(by_vectors), known, moved)
        return found

    def _one_by_one(
        self, vectors: Sequence[Mapping[str, float]], heads: Mapping[str, Mapping[str, float]]
    ) -> dict[str, float]:
        """The logit of each label that has a threshold."""
        found = dict.fromkeys(self.thresholds, self.bias)
        shifts = self.balance or [{}] * len(vectors)
        said = [(self.weights[name], heads[name]) for name in self._heads]
        if self.vectors:
            said += [
                (self.vectors / len(vectors), {label: score + shift.get(label, 0.0) for label, score in scores.items()})
                for scores, shift in zip(vectors, shifts, strict=True)
            ]
        for weight, scores in said:
            found = {label: score + weight * scores.get(label, 0.0) for label, score in found.items()}
        return found

    def _by_vectors(self, vectors: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The vectors' opinion. Where it is the only one, and one template asks, scores stay as they are."""
        if not self.vectors:
            return dict.fromkeys(vectors[0], 0.0)
        balanced = [
            {label: score + shift.get(label, 0.0) for label, score in scores.items()}
            for scores, shift in zip(vectors, self.balance or [{}], strict=True)
        ]
        if len(balanced) == 1 and not self._heads:
            return balanced[0]
        said = [_log_probs(scores) for scores in balanced]
        return {label: math.fsum(one[label] for one in said) / len(said) for label in said[0]}

    def files(self) -> dict[str, bytes]:
        """What stands in an adapter's folder: name → content."""
        heads = {HEADS[name]: head.to_bytes() for name, head in self._heads.items()}
        return {OPINIONS_NAME: to_json(self.model_dump()).encode(), **heads}

    @classmethod
    def from_json(cls, data: bytes, path: str | os.PathLike, head: Callable[[str], Head | None]) -> Opinions:
        """The opinions in the content of `path`; `head` reads that of an opinion.

        Raises:
            InputError: a damaged file, or one without its heads.
        """
        advice = "train anew"
        with reading(path, "opinions", advice):
            try:
                found = cls.model_validate(parse_json(data, path, advice))
            except ValidationError as error:
                where = excerpt(os.fspath(path))
                raise InputError(f"Cannot use {where}: {problems(error, 'opinions')}; {advice}.") from error
            if not found.weights:
                raise InputError(
                    f"Expected an opinion that counts in {excerpt(os.fspath(path))}, found none; {advice}."
                )
            heads = {name: head(name) for name in HEADS if name in found.weights}
            return found._with({name: its for name, its in heads.items() if its is not None})


def _log_probs(scores: Mapping[str, float]) -> dict[str, float]:
    """The log-softmax of scores. The result does not depend on the order of the labels."""
    highest = max(scores.values())
    total = math.log(math.fsum(math.exp(score - highest) for score in scores.values()))
    return {label: score - highest - total for label, score in scores.items()}


def _beside(
    found: Mapping[str, float], vectors: Mapping[str, float], known: Collection[str], moved: Mapping[str, float]
) -> dict[str, float]:
    """Scores of all labels where some had no training rows.

    A head has never seen such a label. Its log-probability would be made up: the surer it is of another label, the lower, whatever
    the text. Only the vectors say something, by the answer text. So their probability of it stands, and a head shares the mass
    that it knows of: what the vectors leave is divided among the known labels by all opinions together.

        p(new) = p_vectors(new),  p(known) = (1 - Σ p_vectors(new)) · softmax(Σ weight · log p)(known)

    Args:
        found: label → the weighed sum; those of known labels are looked at.
        vectors: label → log-probability by the vectors.
        known: the labels that had training rows.
        moved: label → what is added for the prior, to all labels.
    """
    among = _log_probs({label: score - moved.get(label, 0.0) for label, score in found.items() if label in known})
    left = math.log(max(math.fsum(math.exp(vectors[label]) for label in among), _NOTHING))
    beside = {label: left + among[label] if label in among else vectors[label] for label in found}
    return {label: score + moved.get(label, 0.0) for label, score in beside.items()}


def weigh(
    held_out: Mapping[str, np.ndarray], y: Sequence[int], class_weight: np.ndarray | float = 1.0
) -> dict[str, float]:
    """Weights with the lowest log-loss on rows that no opinion was formed on.

    A logarithmic opinion pool: weights above 0, their logarithms pulled to a usual one (see `USUAL`). An opinion that is
    hardly heard is left out, and the others are weighed again.

    Args:
        held_out: name of an opinion → log-probabilities (N, K).
        y: the index of each row's label.
        class_weight: how much a row of each label counts, (K,); or all.
    """
    from scipy.optimize import minimize

    rows, parts = np.arange(len(y)), np.stack(list(held_out.values()))
    each = np.broadcast_to(class_weight, parts.shape[-1:])[list(y)]

    def loss(logs: np.ndarray) -> float:
        log_probs = log_softmax(np.tensordot(np.exp(logs), parts, 1), axis=1)
        pulled = ((logs - math.log(USUAL)) / _SPREAD) ** 2 / 2
        return float(-(log_probs[rows, list(y)] * each).sum() + pulled.sum())

    weights = np.exp(minimize(loss, np.full(len(parts), math.log(USUAL)), method="Nelder-Mead").x)
    heard = {
        name: its for name, its, weight in zip(held_out, parts, weights, strict=True) if weight >= LEAST * max(weights)
    }
    return (
        dict(zip(held_out, weights.tolist(), strict=True))
        if len(heard) == len(parts)
        else weigh(heard, y, class_weight)
    )
