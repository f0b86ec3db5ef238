"""A text that stands before many prompts, such as examples in context: `Prefix` has a decoder read it once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ia3.adapter.targets import inside_wrappers
from ia3.errors import InputError, brief
from ia3.scoring.batch import Batch, groups
from ia3.scoring.beginning import Layout, is_exact_behind, packed_behind, plain_behind, read, room_behind, shared
from ia3.scoring.decoder import Decoder
from ia3.scoring.families import family_of
from ia3.scoring.family import Family, evaluating
from ia3.scoring.question import Question, row_length
from ia3.scoring.tokens import continuations, unclosed
from ia3.scoring.trials import Verdicts, collate, judged, size_of

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedTokenizerBase

SEPARATOR = "\n\n"
"""What stands between shots, and between the last one and the prompt."""


class Prefix:
    """A text that stands before many prompts, run through a decoder once: `score_choices(…, prefix=…)`.

    Scores are those of the prefix's tokens and the prompt's in one row. Where a model cannot continue a cache exactly
    (recurrent layers, layers that share keys), and in an encoder-decoder, whose encoder reads in both directions, the
    prefix goes through the model with every prompt instead.

    Args:
        model: a causal language model or an encoder-decoder, adapted or not. The cache is of the adapters that are
            active now.
        tokenizer: its tokenizer.
        text: the prefix.
        separator: stands between prefix and prompt, and is tokenized with the prompt.

    Attributes:
        tokens: the prefix's token ids.
        nbytes: bytes that its keys and values take; 0 when none are kept.

    Raises:
        InputError: the text is empty or fills the model's context, or the model does not generate text.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str, separator: str = SEPARATOR
    ) -> None:
        self._family = family_of(model, tokenizer)
        if not self._family.reads_answers:
            kind = type(self._family.base).__name__
            raise InputError(f"Expected a model that generates text, found {kind}: a classifier cannot read examples.")
        self.text, self.separator = text, separator
        self.tokens: list[int] = unclosed(tokenizer, list(tokenizer(text)["input_ids"]), text)  # type: ignore[arg-type]
        if not self.tokens:
            raise InputError(f"Expected a prefix with at least one token, found {brief(text)}.")
        limit = self._family.max_length
        if limit is not None and len(self.tokens) >= limit:
            raise InputError(
                f"Expected a prefix shorter than the model's {limit} tokens, found one of {len(self.tokens)}; "
                f"shorten it, or give fewer shots."
            )
        self._adapters = _in_effect(model)
        self._cache: DynamicCache | None = None
        self._layouts: dict[str, Layout] = {}
        if isinstance(self._family, Decoder):
            with evaluating(model), torch.no_grad():
                self._cache = read(self._family, self.tokens)
            if self._cache is not None:
                rows = {"packed": packed_behind, "plain": plain_behind}
                self._layouts = {
                    name: functools.partial(its, self._family, cache=self._cache) for name, its in rows.items()
                }
        self._verdicts = {name: Verdicts() for name in self._layouts}
        self._layout = next(iter(self._layouts), None)

    @property
    def is_cached(self) -> bool:
        """Whether the last questions continued the cache, or the first will; else the prefix is read with each prompt."""
        return self._layout is not None

    @property
    def nbytes(self) -> int:
        layers = [] if self._cache is None else self._cache.layers
        return sum(one.nbytes for layer in layers for one in (layer.keys, layer.values))  # type: ignore[union-attr]

    @property
    def room(self) -> int | None:
        """How many tokens (prompt + choice) the model takes behind the prefix; None when it does not say."""
        limit = self._family.max_length
        return None if limit is None else limit - len(self.tokens)

    def prompt_tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens of prompts that stand behind the prefix; for an encoder, which reads both at once, with its own."""
        behind = [self.separator + prompt for prompt in prompts]
        if isinstance(self._family, Decoder):
            return continuations(self._family.tokenizer, behind)
        return self._family.prompt_tokens([self.text + prompt for prompt in behind])

    def ask(
        self,
        prompts: Sequence[str],
        tokens: Sequence[Sequence[int]],
        choices: Sequence[Sequence[str]],
        labels: Sequence[int | None] | None = None,
        numbers: Sequence[int | None] | None = None,
    ) -> list[Question]:
        """As `Family.ask`, with the tokens of `prompt_tokens`."""
        room = self.room if isinstance(self._family, Decoder) else self._family.max_length
        texts = [self.separator + prompt for prompt in prompts]
        return self._family.ask(texts, tokens, choices, labels, numbers, room=room)

    def batches(
        self, family: Family, questions: Sequence[Question], batch_tokens: int
    ) -> Iterator[tuple[list[int], Batch]]:
        """Questions of `ask` in batches for the model: indices, and the batch.

        Raises:
            InputError: the model, or its active adapters, are not those that read the prefix, as they were then.
        """
        named = any(question.adapter is not None for question in questions)
        if named or family.base is not self._family.base or not _same(self._adapters, _in_effect(family.model)):
            raise InputError(
                "Expected the model and the active adapters that read the prefix, found others, or adapters that have been "
                "trained since; make a Prefix for each."
            )
        rows: Layout = functools.partial(collate, family)
        if questions and isinstance(family, Decoder):
            self._layout = self._exact(family, questions)
            whole = [replace(question, prompt=self.tokens + question.prompt) for question in questions]
            # What all prompts begin with, such as an instruction, is read once behind the prefix too.
            beginning = shared(family, whole, self._cache) if self._layout == "packed" else None
            if beginning is not None:
                rows, questions = beginning.packed, beginning.behind(whole)
                batch_tokens = beginning.room(questions, batch_tokens)
            elif self._layout is not None:
                rows = self._layouts[self._layout]
                batch_tokens = room_behind(len(self.tokens), max(map(row_length, questions)), batch_tokens)
            else:
                questions = whole
        for group in groups(questions, batch_tokens):
            yield group, rows([questions[i] for i in group])

    def _exact(self, family: Decoder, questions: Sequence[Question]) -> str | None:
        """The first layout that is exact for all questions; None: none is."""
        for name, layout in self._layouts.items():

            def is_exact(question: Question, layout: Layout = layout) -> bool | None:
                return is_exact_behind(family, layout, self.tokens, question)

            if judged(self._verdicts[name], questions, size_of, self.room, is_exact):
                return name
        return None


def _in_effect(model: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """The parameters of the active adapters, and which version of their numbers they hold."""
    adapted = inside_wrappers(model)
    routing = getattr(adapted, "ia3_routing", None)
    names = routing.active if routing is not None and routing.enabled else ()
    parameters = [parameter for name in names for parameter in adapted.adapter_parameters(name)]  # type: ignore[operator]
    return [(one, 0 if one.is_inference() else one._version) for one in parameters]


def _same(before: list[tuple[nn.Parameter, int]], now: list[tuple[nn.Parameter, int]]) -> bool:
    return len(before) == len(now) and all(a is b and v == w for (a, v), (b, w) in zip(before, now, strict=True))
