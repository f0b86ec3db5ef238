"""Texts that are continued together, a token of each at a time, with an adapter each: `Decoder`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tokenizers.decoders import DecodeStream
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ia3.errors import InputError
from ia3.rows import BASE
from ia3.serve.engine import GenerateJob, Piece
from ia3.tfew.choices import padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.model import IA3Model


class Text:
    """A text that is being continued.

    Attributes:
        job: what is wanted.
        cancelled: nobody waits for it any more; set on any thread.
    """

    def __init__(self, job: GenerateJob, tell: Callable[[Piece | Exception], None]) -> None:
        self.job = job
        self.tell = tell
        self.cancelled = False
        self._count = 0
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held = ""  # it may be the beginning of a stop text
        self._chance = torch.Generator()
        if job.seed is None:
            self._chance.seed()
        else:
            self._chance.manual_seed(job.seed % 2**63)

    @property
    def begun(self) -> bool:
        """Whether it has a token."""
        return self._count > 0

    def take(self, logits: torch.Tensor, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> int | None:
        """Choose the next token by its logits (vocabulary,), and tell what it says; None when it was the last."""
        token = self._choose(logits.float().cpu())
        self._count += 1
        stopped = token in ends
        said = None if stopped else self._stream.step(tokenizer.backend_tokenizer, token)  # type: ignore[attr-defined]
        text = self._held + (said or "")
        found = [place for place in map(text.find, self.job.stop) if place >= 0]
        if found:
            text, self._held, stopped = text[: min(found)], "", True
        else:
            held = 0 if stopped else self._possible_stop(text)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        if not stopped and self._count >= self.job.max_tokens:
            self.tell(Piece(text + self._held, self._count, "length"))
            return None
        self.tell(Piece(text, self._count, "stop" if stopped else None))
        return None if stopped else token

    def _choose(self, logits: torch.Tensor) -> int:
        if not torch.isfinite(logits).all():
            raise InputError("The model gives NaN or infinite scores; is the adapter or the base broken?")
        if self.job.temperature == 0:
            return int(logits.argmax())
        probabilities = torch.softmax((logits - logits.max()) / self.job.temperature, -1)
        if self.job.top_p < 1:
            ordered, index = probabilities.sort(descending=True)
            # A token counts while those before it have not reached the sum: the first always does.
            ordered[ordered.cumsum(0) - ordered >= max(self.job.top_p, 1e-9)] = 0
            return int(index[torch.multinomial(ordered, 1, generator=self._chance)])
        return int(torch.multinomial(probabilities, 1, generator=self._chance))

    def _possible_stop(self, text: str) -> int:
        """How many last characters may be the beginning of a stop text."""
        longest = max(map(len, self.job.stop), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(text[len(text) - n :]) for stop in self.job.stop)), 0)


class _Group:
    """Texts that are at their next token together: R rows, padded on the left to T columns.

    Attributes:
        texts: of the rows.
        tokens: the last of each, which the cache has not yet (R,).
        mask: which columns of the cache hold something (R, T).
        cache: keys and values of what was read.
    """

    def __init__(self, texts: list[Text], tokens: list[int], mask: torch.Tensor, cache: Any) -> None:
        self.texts, self.tokens, self.mask, self.cache = texts, tokens, mask, cache

    def keep(self, tokens: Sequence[int | None]) -> None:
        """Go on with those texts that have a next token, in place."""
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
        first = int(self.mask.any(0).int().argmax())  # columns that only rows which have left needed
        if first and _joinable(self.cache):
            self.mask = self.mask[:, first:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[..., first:, :], layer.values[..., first:, :]

    def join(self, other: _Group) -> None:
        """Take in another group's rows."""
        width = max(self.mask.shape[1], other.mask.shape[1])

        def both(mine: torch.Tensor, its: torch.Tensor, after: int) -> torch.Tensor:
            # Padded on the left of the column axis, which has so many axes behind it.
            padded = [F.pad(x, (*[0] * (2 * after), width - x.shape[-1 - after], 0)) for x in (mine, its)]
            return torch.cat(padded)

        for layer, more in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.keys, layer.values = both(layer.keys, more.keys, 1), both(layer.values, more.values, 1)
        self.mask = both(self.mask, other.mask, 0)
        self.texts += other.texts
        self.tokens += other.tokens


def _joinable(cache: Any) -> bool:
    """Whether a cache is one of plain keys and values, column by column."""
    return all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None]))


class Decoder:
    """Continues texts; one thread at a time may use it.

    New texts are read in one pass and then join the batch of those that are under way. Where a model's cache is more than
    keys and values by column (windows, recurrent layers), each text is a batch of its own.

    Args:
        model: its bank has the jobs' adapters.
        tokenizer: the model's.
        observe: see `Engine.observe`.
    """

    def __init__(
        self, model: IA3Model, tokenizer: PreTrainedTokenizerBase, observe: Callable[[str, int, int], None]
    ) -> None:
        self._model, self._tokenizer, self._observe = model, tokenizer, observe
        base = model.get_base_model()
        self._device = next(base.parameters()).device
        self._known = inspect.signature(base.forward).parameters
        self._joins = _joinable(DynamicCache(config=base.config))  # type: ignore[arg-type]
        ends = getattr(base.generation_config, "eos_token_id", None)
        found = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
        self._ends = {token for token in found if token is not None}
        self._groups: list[_Group] = []

    @property
    def running(self) -> int:
        """How many texts are under way."""
        return sum(len(group.texts) for group in self._groups)

    def begin(self, texts: Sequence[Text]) -> None:
        """Read prompts, say the first token of each, and go on with them in `step`."""
        if not self._joins and len(texts) > 1:
            for text in texts:
                self.begin([text])
            return
        width = max(len(text.job.prompt) for text in texts)
        ids = torch.full((len(texts), width), padding_id(self._tokenizer))
        mask = torch.zeros((len(texts), width), dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, width - len(text.job.prompt) :] = torch.tensor(list(text.job.prompt))
            mask[row, width - len(text.job.prompt) :] = 1
        mask = mask.to(self._device)
        group = _Group(list(texts), [], mask, None)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self._pass("prefill", group, ids.to(self._device), positions)
        if not group.texts:
            return
        if self._joins and self._groups:
            self._groups[0].join(group)
        else:
            self._groups.append(group)

    def step(self) -> None:
        """The next token of every text."""
        for group in self._groups:
            group.keep(
                [None if text.cancelled else token for text, token in zip(group.texts, group.tokens, strict=True)]
            )
            if group.texts:
                group.mask = F.pad(group.mask, (0, 1), value=1)
                ids = torch.tensor(group.tokens, device=self._device)[:, None]
                self._pass("decode", group, ids, group.mask.sum(1, keepdim=True) - 1)
        self._groups = [group for group in self._groups if group.texts]

    def fail(self, error: Exception) -> None:
        """Give up all that is under way."""
        for group in self._groups:
            for text in group.texts:
                text.tell(error)
        self._groups = []

    def _pass(self, kind: str, group: _Group, ids: torch.Tensor, positions: torch.Tensor) -> None:
        options: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1, "past_key_values": group.cache}
        names = [text.job.adapter or BASE for text in group.texts]
        with torch.inference_mode():
            found = self._model(
                input_ids=ids,
                attention_mask=group.mask,
                use_cache=True,
                adapter_names=names,
                **{key: value for key, value in options.items() if key in self._known},
            )
        self._observe(kind, len(names), len(set(names)))
        group.cache = found.past_key_values
        nexts: list[int | None] = []
        for text, logits in zip(group.texts, found.logits[:, -1], strict=True):
            try:
                nexts.append(text.take(logits, self._tokenizer, self._ends))
            except Exception as error:  # of this text alone
                text.tell(error)
                nexts.append(None)
        group.keep(nexts)
