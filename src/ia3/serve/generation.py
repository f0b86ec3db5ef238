"""Generate many texts together, one token of each per step, with different adapters: `Decoder`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from tokenizers.decoders import DecodeStream
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ia3.adapter.placement import device_of
from ia3.adapter.rows import BASE
from ia3.bank import AdapterBank
from ia3.errors import InputError, reason
from ia3.scoring.tokens import padding_id
from ia3.serve.engine import AdapterFailed, GenerateJob, Piece
from ia3.serve.limits import turn_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.adapter.model import IA3Model

# As an index, not a number: the slice that a number gives is not contiguous, and bfloat16 products of such are slow.
_LAST = torch.tensor([-1])

# Texts with at most this many tokens are generated together, whatever their lengths.
_SHORT = 256

# The number of previous tokens that a tokenizer needs for the next one: a space, the bytes of a character.
_LOOKED_BACK = 8


def adapter_failure(bank: AdapterBank, adapter: str | None) -> AdapterFailed | None:
    """Why an adapter cannot be used; None if it can."""
    try:
        bank.gather([adapter or BASE])
    except Exception as error:  # also an unreadable file, too deep JSON, a full disk
        if isinstance(error, InputError):
            return AdapterFailed(error.message, error.advice, owner=error.owner)
        return AdapterFailed(f"{type(error).__name__}: {reason(error)}")
    return None


class Text:
    """A text in generation.

    Attributes:
        job: the job.
        tell: takes its pieces, or the error that ends it; called on the decoding thread.
        cancelled: the client no longer waits; set on any thread.
        sizes: the sizes of the prompt and of the tokens read with it, see `groups_of_sizes`.
        turn: its start time, see `turn_of`.
        tokens: the maximum of its tokens, prompt included.
        count: the number of chosen tokens.
    """

    def __init__(self, job: GenerateJob, tell: Callable[[Piece | Exception], None]) -> None:
        self.job = job
        self.tell = tell
        self.cancelled = False
        self.sizes = len(job.prompt), 0
        self.turn = turn_of(tokens=len(job.prompt))
        self.tokens = len(job.prompt) + job.max_tokens
        self.count = 0
        self._stream: DecodeStream | None = None
        self._along = ""  # see `_said`
        self._held = ""  # text held back, which may be the start of a stop text
        self._chance = torch.Generator()
        if job.seed is None:
            self._chance.seed()
        else:
            self._chance.manual_seed(job.seed % 2**63)

    def take(self, logits: torch.Tensor, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> int | None:
        """Choose the next token from logits (vocabulary,), and send its text; None if it was the last."""
        token = self.choose(logits.float().cpu())
        self.count += 1
        stopped = token in ends
        text = self._held + ("" if stopped else self._said(token, tokenizer))
        found = [place for place in map(text.find, self.job.stop) if place >= 0]
        if found:
            text, self._held, stopped = text[: min(found)], "", True
        else:
            held = 0 if stopped else self._possible_stop(text)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        if not stopped and self.count >= self.job.max_tokens:
            self.tell(Piece(text + self._held, self.count, "length"))
            return None
        self.tell(Piece(text, self.count, "stop" if stopped else None))
        return None if stopped else token

    def _said(self, token: int, tokenizer: PreTrainedTokenizerBase) -> str:
        """The text that one more token adds; empty if the token is part of a character."""
        if self._stream is None:
            # A token's text may depend on the tokens before it: the first word of a text may lose its space.
            before = list(self.job.prompt[-_LOOKED_BACK:])
            self._stream = DecodeStream(ids=before, skip_special_tokens=True)
            # A character that the prompt leaves open brings what stands before it along.
            closed = before
            while closed and _decoded(tokenizer, closed).endswith("\ufffd"):
                closed = closed[:-1]
            self._along = "" if closed is before else _decoded(tokenizer, closed)
        said = self._stream.step(tokenizer.backend_tokenizer, token) or ""  # type: ignore[attr-defined]
        if said:
            said, self._along = said.removeprefix(self._along), ""
        return said

    def choose(self, logits: torch.Tensor) -> int:
        """The next token, chosen from logits (vocabulary,)."""
        if not torch.isfinite(logits).all():
            raise InputError("The model gives NaN or infinite scores; is the adapter or the base broken?")
        if self.job.temperature == 0:
            return int(logits.argmax())
        probabilities = torch.softmax((logits - logits.max()) / self.job.temperature, -1)
        if self.job.top_p < 1:
            ordered, index = probabilities.sort(descending=True)
            # A token is kept if those before it have not reached the sum, so the first is always kept.
            ordered[ordered.cumsum(0) - ordered >= self.job.top_p] = 0
            return int(index[torch.multinomial(ordered, 1, generator=self._chance)])
        return int(torch.multinomial(probabilities, 1, generator=self._chance))

    def _possible_stop(self, text: str) -> int:
        """The number of last characters that may be the start of a stop text."""
        longest = max(map(len, self.job.stop), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(text[len(text) - n :]) for stop in self.job.stop)), 0)


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


class _Group:
    """Texts that are generated together: R rows, padded on the left to T columns.

    Attributes:
        texts: the rows' texts.
        tokens: the last token of each row, which is not in the cache yet (R,).
        mask: which columns of the cache are in use (R, T).
        cache: the key/value cache.
    """

    def __init__(self, texts: list[Text], tokens: list[int], mask: torch.Tensor, cache: Any) -> None:
        self.texts, self.tokens, self.mask, self.cache = texts, tokens, mask, cache

    def keep(self, tokens: Sequence[int | None]) -> None:
        """Keep the texts that have a next token, in place."""
        rows = [row for row, token in enumerate(tokens) if token is not None]
        self.tokens = [token for token in tokens if token is not None]
        if len(rows) == len(self.texts):
            return
        self.texts = [self.texts[row] for row in rows]
        if not rows:
            return
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]
        first = int(self.mask.any(0).int().argmax())  # drop columns that only removed rows needed
        if first and _joinable(self.cache):
            self.mask = self.mask[:, first:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[..., first:, :], layer.values[..., first:, :]

    def join(self, other: _Group) -> None:
        """Add another group's rows."""
        width = max(self.mask.shape[1], other.mask.shape[1])

        def both(mine: torch.Tensor, its: torch.Tensor, after: int) -> torch.Tensor:
            # Pad on the left of the column axis; this is the number of axes after it.
            padded = [F.pad(x, (*[0] * (2 * after), width - x.shape[-1 - after], 0)) for x in (mine, its)]
            return torch.cat(padded)

        for layer, more in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.keys, layer.values = both(layer.keys, more.keys, 1), both(layer.values, more.values, 1)
        self.mask = both(self.mask, other.mask, 0)
        self.texts += other.texts
        self.tokens += other.tokens


def _joinable(cache: Any) -> bool:
    """Whether a cache has only keys and values, column by column."""
    return all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None]))


class Decoder:
    """Generates texts. Only one thread at a time may use it.

    New texts are read in one pass. They then join running texts with a similar number of tokens, so padding to the
    longest at most doubles the memory for keys and values. If a model's cache has more than keys and values by column
    (windows, recurrent layers), each text runs separately.

    Args:
        model: the model, whose bank has the jobs' adapters.
        tokenizer: the model's tokenizer.
        observe: see `Engine.observe`.

    Attributes:
        ends: the tokens that end a text.
    """

    def __init__(
        self, model: IA3Model, tokenizer: PreTrainedTokenizerBase, observe: Callable[[str, int, int], None]
    ) -> None:
        self._model, self._tokenizer, self._observe = model, tokenizer, observe
        base = model.get_base_model()
        self._device = device_of(base)
        self._known = inspect.signature(base.forward).parameters
        self._joins = _joinable(DynamicCache(config=base.config))  # type: ignore[arg-type]
        ends = getattr(base.generation_config, "eos_token_id", None)
        found = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
        self.ends = {token for token in found if token is not None}
        self._groups: dict[int, _Group] = {}

    @property
    def texts(self) -> list[Text]:
        """The running texts."""
        return [text for group in list(self._groups.values()) for text in group.texts]

    @property
    def running(self) -> int:
        """The number of running texts."""
        return len(self.texts)

    @property
    def held(self) -> int:
        """The keys and values of running texts, padding included: rows times columns."""
        return sum(group.mask.numel() for group in list(self._groups.values()))

    def columns(self, more: Iterable[Text] = ()) -> int:
        """The maximum of keys and values of running texts and these, padding included: rows times the longest text."""
        tokens: dict[int, list[int]] = {}
        for text in chain(self.texts, more):
            tokens.setdefault(self._kind(text), []).append(text.tokens)
        return sum(len(each) * max(each) for each in tokens.values())

    def begin(self, texts: Sequence[Text]) -> None:
        """Read prompts and generate the first token of each; `step` continues. Errors are sent to their texts."""
        kinds: dict[int, list[Text]] = {}
        for text in texts:
            kinds.setdefault(self._kind(text), []).append(text)
        for kind, its in kinds.items():
            self._begin(kind, its)

    def step(self) -> None:
        """Generate the next token of every text. Errors are sent to their texts."""
        for group in self._groups.values():
            try:
                self._advance(group)
            except Exception as error:
                self._end(group, error)
        self._groups = {kind: group for kind, group in self._groups.items() if group.texts}

    def _kind(self, text: Text) -> int:
        """The kind of a text; texts of one kind run together."""
        return (max(text.tokens, _SHORT) - 1).bit_length() if self._joins else id(text)

    def _begin(self, kind: int, texts: list[Text]) -> None:
        width = max(len(text.job.prompt) for text in texts)
        ids = torch.full((len(texts), width), padding_id(self._tokenizer))
        mask = torch.zeros((len(texts), width), dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, width - len(text.job.prompt) :] = torch.tensor(list(text.job.prompt))
            mask[row, width - len(text.job.prompt) :] = 1
        mask = mask.to(self._device)
        group = _Group(texts, [], mask, None)
        try:
            logits = self._read("prefill", group, ids.to(self._device), mask)
        except Exception as error:
            usable = self._usable(texts)
            if len(usable) == len(texts) == 1:
                texts[0].tell(error)
            elif len(usable) == len(texts):  # together they may have been too large
                for text in texts:
                    self._begin(kind, [text])
            elif usable:
                self._begin(kind, usable)
            return
        groups = [group]
        try:
            self._take(group, logits)
            if group.texts and kind in self._groups:
                groups.append(self._groups[kind])
                groups[1].join(group)
            elif group.texts:
                self._groups[kind] = group
        except Exception as error:  # their caches may be joined only in part
            self._groups.pop(kind, None)
            for each in groups:
                self._end(each, error)

    def _advance(self, group: _Group) -> None:
        group.keep([None if text.cancelled else token for text, token in zip(group.texts, group.tokens, strict=True)])
        if not group.texts:
            return
        ids = torch.tensor(group.tokens, device=self._device)[:, None]
        try:
            logits = self._read("decode", group, ids, F.pad(group.mask, (0, 1), value=1))
        except Exception:
            usable = set(map(id, self._usable(group.texts)))
            if len(usable) == len(group.texts):
                raise
            # Vectors are looked up before the cache changes, so that the other texts can continue.
            group.keep(
                [token if id(text) in usable else None for text, token in zip(group.texts, group.tokens, strict=True)]
            )
        else:
            self._take(group, logits)

    def _read(self, kind: str, group: _Group, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Read tokens with the model; `mask` is the group's mask with them. Return the next logits (R, vocabulary)."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        options: dict[str, Any] = {"position_ids": positions, "logits_to_keep": _LAST, "past_key_values": group.cache}
        names = [text.job.adapter or BASE for text in group.texts]
        with torch.inference_mode():
            found = self._model(
                input_ids=ids,
                attention_mask=mask,
                use_cache=True,
                adapter_names=names,
                **{key: value for key, value in options.items() if key in self._known},
            )
        group.cache, group.mask = found.past_key_values, mask
        self._observe(kind, len(names), len(set(names)))
        return found.logits[:, -1]

    def _take(self, group: _Group, logits: torch.Tensor) -> None:
        """Choose each text's next token."""
        nexts: list[int | None] = []
        for text, its in zip(group.texts, logits, strict=True):
            try:
                nexts.append(text.take(its, self._tokenizer, self.ends))
            except Exception as error:  # an error of this text only
                text.tell(error)
                nexts.append(None)
        group.keep(nexts)

    def _usable(self, texts: Iterable[Text]) -> list[Text]:
        """The texts whose adapter can be used; the others get the error."""
        bank = self._model.adapter_bank
        assert isinstance(bank, AdapterBank)  # made by the engine
        failures = {adapter: adapter_failure(bank, adapter) for adapter in {text.job.adapter for text in texts}}
        usable = []
        for text in texts:
            failure = failures[text.job.adapter]
            if failure is None:
                usable.append(text)
            else:
                text.tell(failure)
        return usable

    def _end(self, group: _Group, error: Exception) -> None:
        for text in group.texts:
            text.tell(error)
        group.texts, group.tokens = [], []
