"""The harness's model type `ia3`: `IA3LM`, and the panel that several of them share."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from ia3.adapter.rows import BASE
from ia3.errors import InputError, brief, shown, similar
from ia3.harness import missing
from ia3.harness.panel import Generation, Likelihood, Panel
from ia3.scoring.tokens import question_lengths

# The harness's decorators hide its types.
HFLM: Any
handle_stop_sequences: Any
normalize_gen_kwargs: Any
postprocess_generated_text: Any
register_model: Any
try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise missing() from error

# All requests come to us at once, and we divide them.
_ALL = 2**31

# What greedy decoding has no use for.
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p")

_panels: ContextVar[dict[tuple, Panel] | None] = ContextVar("panels", default=None)


@contextlib.contextmanager
def sharing_panels() -> Iterator[None]:
    """Within `with`, models with the same arguments share a panel: one base model, and answers that all give together."""
    token = _panels.set({})
    try:
        yield
    finally:
        _panels.reset(token)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within `with`, `hf` does not warn that it is given a model, which is how we use it."""
    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@register_model("ia3")
class IA3LM(HFLM):
    """The base model or an adapter, as the harness asks it. Tokens, windows and limits are those of its type `hf`.

    Args:
        pretrained: the base model: a folder, a hub id or "smollm2".
        adapter: whose answers these are: a folder or hub id; None: the base model's.
        adapters: the adapters that answer together, one of which is `adapter`; see `names_of`.
        question: the words with which the question begins in the prompts; the last place counts, "" is the beginning. For
            adapters that act from the question on.
        dtype: as of `load_base`.
        device: see `Panel`.
        batch_size, max_batch_size: the harness gives them; rows go through the model by their tokens, not their number.

    Raises:
        InputError: see `Panel`; `adapter` is missing, or not among the adapters; `question` is missing.
    """

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        adapters: str | Sequence[str] | None = None,
        question: str | None = None,
        dtype: str = "stored",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        if adapters is None:
            adapters = [adapter or BASE]
        elif adapter is None:
            raise InputError(
                "Expected one adapter, for one model gives one result, found several",
                "run `python -m ia3.harness` in place of `lm_eval`, or evaluate_each in Python",
            )
        adapters = adapters if isinstance(adapters, str) else "|".join(adapters)
        kept = _panels.get()
        key = (pretrained, adapters, dtype, device)
        panel = Panel(pretrained, adapters, dtype, device) if kept is None or key not in kept else kept[key]
        if kept is not None:
            kept[key] = panel
        self._panel, self._name, self._question = panel, adapter or BASE, question
        if self._name not in panel.names:
            known = panel.names
            raise InputError(f"Expected one of {shown(known)}, found {adapter!r}; {similar(self._name, known)}.")
        if panel.waits and question is None:
            raise InputError(
                "Expected the words with which the question begins in the prompts, for adapters that act from the question on, "
                "found none",
                "give them in",
                argument="question",
            )
        with _quiet():
            super().__init__(pretrained=panel.base, tokenizer=panel.tokenizer, batch_size=_ALL)

    def get_model_info(self) -> dict[str, Any]:
        """What the results say about the model."""
        return {"pretrained": self._panel.base.name_or_path, "adapter": self._name, "question": self._question}

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        contexts = [None if words is None else words[0] for words, _, _ in requests]
        reads = self._reads(contexts, [context for _, context, _ in requests])
        asked = []
        for (_, context, continuation), read in zip(requests, reads, strict=True):
            if len(continuation) > self.max_length:
                raise InputError(
                    f"Expected a continuation of at most {self.max_length} tokens, found {len(continuation)}."
                )
            cut = max(len(context) + len(continuation) - self.max_length - 1, 0)
            asked.append(Likelihood(tuple(context[cut:]), tuple(continuation), max(read - cut, 0)))
        found = self._panel.likelihoods(self._name, asked)
        for (words, _, _), answer in zip(requests, found, strict=True):
            if words is not None:
                self.cache_hook.add_partial("loglikelihood", words, answer)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each context, up to the first of its stop texts."""
        end = self.tokenizer.decode(self.eot_token_id)
        contexts = [request.args[0] for request in requests]
        tokens = [self.tok_encode(context) for context in contexts]
        asked = []
        for request, context, read in zip(requests, tokens, self._reads(contexts, tokens), strict=True):
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            until, most = tuple(handle_stop_sequences(options.pop("until", None), eos=end)), options.pop("max_gen_toks")
            others = [name for name in options if name not in _SAMPLING]
            if options.get("do_sample") or others:
                raise InputError(f"Expected greedy decoding, found {brief(options)}.", "change", argument="gen_kwargs")
            if most >= self.max_length:
                raise InputError(f"Expected fewer than {self.max_length} new tokens, found {most}.")
            cut = max(len(context) + most - self.max_length, 0)
            asked.append(Generation(tuple(context[cut:]), until, most, max(read - cut, 0)))
        found = []
        for request, one, text in zip(requests, asked, self._panel.texts(self._name, asked), strict=True):
            found.append(postprocess_generated_text(text, list(one.until), None))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _reads(self, contexts: Sequence[str | None], tokens: Sequence[list[int]]) -> list[int]:
        """How many of each context's tokens stand before its question; 0 where it has none, as in rolling windows."""
        found = [0] * len(contexts)
        if not self._question:
            return found
        # A context stands here once for each of its continuations.
        known: dict[str, tuple[str, list[int]]] = {}
        for context, its in zip(contexts, tokens, strict=True):
            if context:
                place = context.rfind(self._question)
                if place < 0:
                    raise InputError(
                        f"Expected a prompt with {self._question!r}, found {brief(context)}",
                        "give the words with which its question begins in",
                        argument="question",
                    )
                known[context] = context[:place], its
        texts, encoded = [text for text, _ in known.values()], [its for _, its in known.values()]
        lengths = question_lengths(self.tokenizer, [*known], encoded, texts, self._encoded)
        read = {
            context: len(its) - length if length else 0
            for context, its, length in zip(known, encoded, lengths, strict=True)
        }
        return [read[context] if context else 0 for context in contexts]

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.tok_encode(text) for text in texts]
