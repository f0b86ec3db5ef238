"""A beginning that many prompts share, such as an instruction: a decoder reads it once, and each row attends to it.

`beginnings` finds them among questions by itself, where it pays and is exact, in scoring and in training: the gradient
goes through the keys and values of the beginning as through any other activation.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ia3.adapter.placement import device_of
from ia3.errors import reason
from ia3.scoring.attention import shared_keys
from ia3.scoring.batch import PASS_TOKENS, Batch
from ia3.scoring.decoder import Decoder
from ia3.scoring.family import Family, evaluating, frozen, passes_in_step, waits_for_question
from ia3.scoring.question import Question, row_length
from ia3.scoring.trials import Size, deviation, judged, rounding, scores_of, size_of, telling, verdicts_of

logger = logging.getLogger(__name__)

# Keys and values of so many tokens may be side by side in one layer, the beginning's counted in each row.
_CACHED_TOKENS = 32768

# Prompts that agree in fewer tokens than these are not looked at.
_LEAST = 8

# So many rows' tokens have to be saved, because a trial of whether a model is exact takes a few whole rows. Whether it
# has been tried before is not asked: what is shared must not depend on the past, or a resumed run would round otherwise.
_LEAST_ROWS = 4

Layout = Callable[[Sequence[Question]], Batch]


class SharedLayer(DynamicLayer):
    """A layer's keys and values (1, heads, S, width) of a beginning, which each row of a batch has before its own.

    What a batch adds is handed back and not kept, so that one cache serves every batch, and memory holds one layer's
    expanded keys and values at a time.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys: torch.Tensor = keys
        self.values: torch.Tensor = values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The beginning's keys and values before these, in each row."""
        return joined(self.keys, key_states), joined(self.values, value_states)


def joined(before: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Keys or values (B, heads, L, width) behind those (1 or B, heads, S, width) of a text that was read before."""
    return torch.cat([before.expand(len(own), -1, -1, -1), own], dim=-2)


def continued(before: DynamicCache | None, rows: int = 1) -> DynamicCache:
    """A cache of `DynamicLayer`s for a number of rows, which all go on from the one row of `before`; None: an empty cache."""
    cache = DynamicCache()
    for number, layer in enumerate([] if before is None else before.layers):
        keys, values = (one.expand(rows, -1, -1, -1) for one in (layer.keys, layer.values))  # type: ignore[union-attr]
        cache.update(keys, values, number)
    return cache


def read(
    family: Decoder, tokens: Sequence[int], adapter: str | None = None, before: DynamicCache | None = None
) -> DynamicCache | None:
    """The keys and values of tokens, as a cache of `SharedLayer`s, with a graph where gradients are enabled.

    Args:
        family: a model in the mode that rows will be asked in.
        tokens: S of them.
        adapter: as of `Question`. One that acts from the question on does not act on what stands before it.
        before: those of the first of the tokens, which are not read again; None: all are read.

    Returns:
        None for a model that keeps no keys and values, or something else.
    """
    cache = continued(before)
    ids = torch.tensor([list(tokens)[cache.get_seq_length() :]], device=device_of(family.model))
    names = None if adapter is None else [adapter]
    if waits_for_question(family.model, names):
        with frozen(family.model):
            filled = fill(family, cache, ids)
    else:
        filled = fill(family, cache, ids, **({} if names is None else {"adapter_names": names}))
    if filled is None:
        return None
    cache.layers = [SharedLayer(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr]
    return cache


def fill(family: Decoder, cache: DynamicCache, ids: torch.Tensor, **inputs: Any) -> Any:
    """Put the keys and values of tokens (B, L) into a cache, behind those it has, by a pass through the model.

    Args:
        family: of the model.
        cache: empty, or of `DynamicLayer`s.
        ids: the tokens.
        **inputs: other arguments of the model.

    Returns:
        The model's output; None for a model that keeps no keys and values, or something else.
    """
    known = inspect.signature(family.base.forward).parameters
    if "past_key_values" not in known:
        return None
    # As an index, which gathers: the slice that a number gives is multiplied row by row (see `last_logits`).
    options: dict[str, Any] = {"logits_to_keep": torch.tensor([-1])} if "logits_to_keep" in known else {}
    length = cache.get_seq_length() + ids.shape[1]
    try:
        with shared_keys(family.base):
            found = family.model(
                input_ids=ids, past_key_values=cache, use_cache=True, return_dict=True, **inputs, **options
            )
        filled = bool(cache.layers) and all(
            type(layer) is DynamicLayer and layer.get_seq_length() == length for layer in cache.layers
        )
        return found if filled else None
    except Exception as error:  # a model with another kind of cache says so in its own way
        logger.info("%s: its cache is of another kind (%s).", type(family.base).__name__, reason(error))
        return None


def packed_behind(
    family: Decoder, questions: Sequence[Question], cache: DynamicCache, sizes: Sequence[int] | None = None
) -> Batch:
    """A packed row for each question, which goes on from S tokens: `attention_mask` (B, 1, L, S + L), positions from S on.

    Args:
        family: of the model.
        questions: B of them, without the tokens.
        cache: the tokens' keys and values.
        sizes: how many of its S places each row's tokens take, the first ones; None: all.
    """
    length = cache.get_seq_length()
    batch = family.pack(questions)
    mask = batch["attention_mask"]
    taken = torch.tensor([length] * len(mask) if sizes is None else sizes)[:, None]
    before = torch.zeros((len(mask), length), dtype=mask.dtype)
    before.masked_fill_(torch.arange(length) >= taken, torch.finfo(mask.dtype).min)
    return {
        **batch,
        "attention_mask": torch.cat([before[:, None, None].expand(*mask.shape[:3], length), mask], dim=-1),
        "position_ids": batch["position_ids"] + taken,
        "past_key_values": cache,
    }


def plain_behind(family: Decoder, questions: Sequence[Question], cache: DynamicCache) -> Batch:
    """A row for each choice, which goes on from S tokens: `attention_mask` (R, S + L)."""
    batch = family.plain_rows(questions)
    mask = batch["attention_mask"]
    before = torch.ones((len(mask), cache.get_seq_length()), dtype=mask.dtype)
    return {**batch, "attention_mask": torch.cat([before, mask], dim=-1), "past_key_values": cache}


def room_behind(before: int, longest: int, batch_tokens: int) -> int:
    """Tokens for a batch of rows that go on from so many: rows are short and what they attend to is long, and so bounded."""
    return min(batch_tokens, max(_CACHED_TOKENS * longest // (before + longest), 1))


def is_exact_behind(family: Family, layout: Layout, question: Question, moved: Question) -> bool | None:
    """Whether a layout of rows that go on from what was read before is exact; None: its scores are no numbers.

    One or two choices of two questions are scored in whole rows, without the cache; that is about what reading the tokens
    costs a few times.

    Args:
        family: of the model.
        layout: rows that go on, of whole questions.
        question: no easier than any that will be asked.
        moved: stands beside it and is padded as far as any that is no harder. So its prompt is moved away from the tokens,
            and a window that is counted over the row's places sees fewer of them.
    """
    # The shortest choice has least to hide that behind.
    ends = telling(question)
    others = sorted({ends[-1], min(range(len(question.choices)), key=lambda choice: len(question.choices[choice]))})
    asked = [question, moved]
    rows, choices = [0] * len(ends) + [1] * len(others), ends + others
    whole = [
        replace(asked[row], choices=[question.choices[choice]], label=None, order=None)
        for row, choice in zip(rows, choices, strict=True)
    ]
    with evaluating(family.model), torch.no_grad():
        expected = scores_of(family, family.plain_rows(whole))[:, 0]
        if not torch.isfinite(expected).all():
            return None
        difference, why = deviation(family, lambda: layout(asked), expected, (rows, choices))
    if difference <= rounding(family, expected):
        return True
    logger.info(
        "%s: rows behind what was read before are not exact in this layout (%s).", type(family.base).__name__, why
    )
    return False


def is_exact_behind_tokens(family: Decoder, layout: Layout, tokens: Sequence[int], question: Question) -> bool | None:
    """As `is_exact_behind`, for a layout of questions without the tokens, as `question` is."""
    whole = [question.after(tokens), replace(question, prompt=question.prompt[-1:], read=0).after(tokens)]
    return is_exact_behind(family, lambda asked: layout([one.behind(len(tokens)) for one in asked]), *whole)


class Beginning:
    """The beginning of some questions' prompts, read by the model as it is now.

    Args:
        family: a causal language model, adapted or not.
        tokens: S of them, with which each of the prompts begins, and after which it goes on.
        adapter: whose keys and values; as of `Question`.
        before: as of `read`.

    Attributes:
        cache: its keys and values; None when the model keeps none.
    """

    def __init__(
        self,
        family: Decoder,
        tokens: Sequence[int],
        adapter: str | None = None,
        before: DynamicCache | None = None,
    ) -> None:
        self.tokens, self._family = list(tokens), family
        self.cache = read(family, tokens, adapter, before)
        self._attached: list[tuple[torch.Tensor, torch.Tensor]] = []

    def behind(self, questions: Sequence[Question]) -> list[Question]:
        """The questions without it."""
        return [question.behind(len(self.tokens)) for question in questions]

    def packed(self, questions: Sequence[Question]) -> Batch:
        """A batch of questions of `behind`."""
        assert self.cache is not None
        return packed_behind(self._family, questions, self.cache)

    def room(self, questions: Sequence[Question], batch_tokens: int) -> int:
        """Tokens for a batch of questions of `behind`."""
        return room_behind(len(self.tokens), max(map(row_length, questions)), batch_tokens)

    def detach(self) -> None:
        """Let backward passes through rows end here; `backward` goes on for all of them at once."""
        self._attached = [(layer.keys, layer.values) for layer in self._layers]
        for layer in self._layers:
            layer.keys, layer.values = (
                one.detach().requires_grad_(one.requires_grad) for one in (layer.keys, layer.values)
            )

    def backward(self) -> None:
        """What rows that were asked since `detach` have to say about the beginning, to the parameters that read it."""
        pairs = [
            (read, leaf.grad)
            for attached, layer in zip(self._attached, self._layers, strict=True)
            for read, leaf in zip(attached, (layer.keys, layer.values), strict=True)
            if leaf.grad is not None
        ]
        self._attached = []
        if pairs:
            torch.autograd.backward([read for read, _ in pairs], [gradient for _, gradient in pairs])

    @property
    def _layers(self) -> list[SharedLayer]:
        return [] if self.cache is None else self.cache.layers  # type: ignore[return-value]


def beginnings(family: Family, questions: Sequence[Question]) -> Iterator[tuple[list[int], Beginning | None]]:
    """Questions, as indices, that share a beginning, and the beginning; last those without one.

    A beginning is read when its turn comes, so that whoever lets go of one has no more than one in memory.
    """
    rest = []
    sharing = family if isinstance(family, Decoder) and may_share(family) else None
    for indices in _alike(questions):
        beginning = None if sharing is None else shared(sharing, [questions[i] for i in indices])
        if beginning is None:
            rest += indices
        else:
            yield indices, beginning
        del beginning
    if rest:
        yield sorted(rest), None


def may_continue(family: Family) -> bool:
    """Whether rows may attend to keys and values, or to an encoder's states, that another pass computed."""
    if passes_in_step(family.model):
        return False
    # Layers that are computed again keep no cache, and an encoder-decoder needs none here.
    return family.has_encoder or not (family.model.training and torch.is_grad_enabled() and family.recomputes)


def may_share(family: Decoder) -> bool:
    """Whether rows may attend to keys and values that are one for all of them."""
    if not may_continue(family) or not (family.model.training and torch.is_grad_enabled()):
        return may_continue(family)
    # Rows that share a beginning would share what is dropped of it.
    config = getattr(family.base, "config", None)
    return not any("drop" in key and isinstance(value, float) and value > 0 for key, value in vars(config).items())


def _alike(questions: Sequence[Question]) -> list[list[int]]:
    """Indices of questions whose prompts begin alike, for one adapter."""
    found: dict[tuple, list[int]] = {}
    for index, question in enumerate(questions):
        found.setdefault((question.adapter, *question.prompt[:_LEAST]), []).append(index)
    return list(found.values())


def common_tokens(prompts: Sequence[list[int]]) -> int:
    """With how many equal tokens all prompts begin; one of each is left to go on with."""
    first, last = min(prompts), max(prompts)  # no two of them differ sooner
    size = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(size, min(map(len, prompts)) - 1)


def pays(tokens: int, prompts: int) -> bool:
    """Whether it saves more than it costs to read so many tokens once, in a pass of their own, and not in each prompt."""
    return tokens >= _LEAST and tokens * (prompts - 1) >= 2 * PASS_TOKENS


def shared(family: Decoder, questions: Sequence[Question], before: DynamicCache | None = None) -> Beginning | None:
    """What questions that begin alike share, read, where that saves more than it costs and is exact; else None.

    Args:
        family: a causal language model, adapted or not.
        questions: for one adapter.
        before: keys and values that there are already, of tokens with which all prompts begin.
    """
    adapter = questions[0].adapter
    if waits_for_question(family.model, None if adapter is None else [adapter]):
        return None  # the question may be common to them, too; `Readings` are for such
    prompts = [question.prompt for question in questions]
    size = common_tokens(prompts)
    read_for_it = size - (0 if before is None else before.get_seq_length())
    saved = read_for_it * (len(questions) - 1)
    if not pays(read_for_it, len(questions)):
        return None
    if saved < _LEAST_ROWS * max(map(row_length, questions)):
        return None
    verdicts = verdicts_of(family, "behind a beginning")

    def sizes(question: Question) -> Size:
        return size, *size_of(question)

    if any(verdicts.of(sizes(question)) is False for question in questions):
        return None
    beginning = Beginning(family, prompts[0][:size], adapter, before)
    if beginning.cache is None:
        verdicts.add(tuple(0 for _ in sizes(questions[0])), False)
        return None

    def is_exact(question: Question) -> bool | None:
        [behind] = beginning.behind([question])
        return is_exact_behind_tokens(family, beginning.packed, beginning.tokens, behind)

    return beginning if judged(verdicts, questions, sizes, family.max_length, is_exact) else None
