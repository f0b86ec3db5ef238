"""A base model and its adapters, which all answer the same requests: `Panel`."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ia3.adapter.config import CONFIG_NAME, IA3Config, TaskType, adapter_folders
from ia3.adapter.model import IA3Model
from ia3.adapter.placement import device_of
from ia3.adapter.pretrained import load_base, task_type
from ia3.adapter.rows import BASE
from ia3.bank import AdapterBank
from ia3.errors import InputError, shown
from ia3.scoring.batch import BATCH_TOKENS, groups_of_sizes
from ia3.scoring.question import Question
from ia3.scoring.scorer import Scorer
from ia3.scoring.tokens import padding_id

# Tokens beside those of a stop text that may hold its end: a token may begin before it, and one may be part of a character.
_MORE_TOKENS = 4


class Likelihood(NamedTuple):
    """How probable is a continuation?

    Attributes:
        context: the tokens before it.
        continuation: its tokens.
        read: how many of the context's first tokens stand before the question, see `Question`.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    read: int


class Generation(NamedTuple):
    """How does a text go on, decoded greedily?

    Attributes:
        context: its tokens.
        until: texts that end the generation.
        tokens: the maximum of new tokens.
        read: as of `Likelihood`.
    """

    context: tuple[int, ...]
    until: tuple[str, ...]
    tokens: int
    read: int


class Panel:
    """A base model and its adapters, which all answer the same requests.

    What one of them is asked, all answer, in common batches; the others' answers are kept until they are asked for. The
    continuations of one context stand in one row behind it (`ia3.scoring`), and adapters that act from the question on share
    one reading of the text before it.

    Args:
        pretrained: the base model, as of `load_base`.
        adapters: as of `names_of`; none: the base model alone.
        dtype: as of `load_base`.
        device: where the model computes; None, or a GPU where there is none: on a GPU if possible, otherwise on the CPU.

    Attributes:
        names: who answers: the adapters' names, "__base__" for the base model.
        model, tokenizer: those of the base model; adapters are in the model's bank.
        waits: whether one of the adapters acts from the question on alone.

    Raises:
        InputError: the model is no causal language model, or an adapter cannot be read or does not fit.
    """

    def __init__(
        self, pretrained: str, adapters: str | Sequence[str], dtype: str = "stored", device: str | None = None
    ) -> None:
        folders = names_of(adapters)
        self.names = tuple(folders) or (BASE,)
        base, self.tokenizer = load_base(pretrained, dtype=dtype)
        if task_type(base) != TaskType.CAUSAL_LM:
            raise InputError(f"Expected a causal language model, found {type(base).__name__}.", argument="pretrained")
        device = device or "cuda"
        # The harness asks for a GPU unless it is told otherwise, and its own types then take what there is.
        base.to("cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device)  # type: ignore[arg-type]
        self.base, self.waits = base, False
        self.model: Any = base
        trained = {name: folder for name, folder in folders.items() if name != BASE}
        if trained:
            self.model = IA3Model(base, {}).eval()
            config = IA3Config.from_pretrained(next(iter(trained.values())))
            # With columns for adapters of both kinds.
            bank = AdapterBank(self.model, dataclasses.replace(config, acts_from="start"))
            for name, folder in trained.items():
                bank.load(folder, name)
            self.waits = any(bank.acts_from(name) == "question" for name in trained)
        self._scorer = Scorer(self.model, self.tokenizer)
        self._kept: dict[bytes, dict[str, Any]] = {}

    def likelihoods(self, name: str, requests: Sequence[Likelihood]) -> list[tuple[float, bool]]:
        """The log-probability of each continuation by the adapter `name`, and whether greedy decoding begins with it."""
        return self._asked(name, requests, self._likelihoods)

    def texts(self, name: str, requests: Sequence[Generation]) -> list[str]:
        """The greedy continuation of each context by the adapter `name`; it may go on behind a text that ends it."""
        return self._asked(name, requests, self._texts)

    def _asked(self, name: str, requests: Sequence[Any], answer: Callable[[list[Any]], dict[str, list]]) -> list[Any]:
        """The answers of `name`. Those that are not there yet all give together."""
        keys = [hashlib.blake2b(repr(request).encode(), digest_size=16).digest() for request in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if name not in self._kept.get(key, ())}
        if new:
            for one, answers in answer([*new.values()]).items():
                for key, its in zip(new, answers, strict=True):
                    self._kept.setdefault(key, {})[one] = its
        found = [self._kept[key][name] for key in keys]
        for key in set(keys):
            del self._kept[key][name]
            if not self._kept[key]:
                del self._kept[key]
        return found

    def _likelihoods(self, requests: list[Likelihood]) -> dict[str, list[tuple[float, bool]]]:
        choices: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for index, request in enumerate(requests):
            choices.setdefault((request.context, request.read), []).append(index)
        asked = []
        for (context, read), indices in choices.items():
            prompt, continuations = list(context), [list(requests[index].continuation) for index in indices]
            # Choices stand in the order of their tokens (see `Question`).
            order = tuple(sorted(range(len(indices)), key=continuations.__getitem__))
            asked.append(Question(prompt, [continuations[i] for i in order], order=order, read=read))
        questions = [
            dataclasses.replace(one, adapter=None if self.model is self.base else name)
            for one in asked
            for name in self.names
        ]
        said = iter(self._scorer.likelihoods(questions))
        found: dict[str, list[Any]] = {name: [None] * len(requests) for name in self.names}
        for indices in choices.values():
            for name in self.names:
                for index, pair in zip(indices, next(said), strict=True):
                    found[name][index] = pair
        return found

    def _texts(self, requests: list[Generation]) -> dict[str, list[str]]:
        found: dict[str, list[Any]] = {name: [None] * len(requests) for name in self.names}
        alike: dict[tuple[tuple[str, ...], int], list[tuple[int, str]]] = {}
        for index, request in enumerate(requests):
            alike.setdefault((request.until, request.tokens), []).extend((index, name) for name in self.names)
        for (until, tokens), rows in alike.items():
            sizes = [(len(requests[index].context), tokens) for index, _ in rows]
            for group in groups_of_sizes(sizes, BATCH_TOKENS):
                some = [rows[place] for place in group]
                texts = self._generated([(requests[index], name) for index, name in some], until, tokens)
                for (index, name), text in zip(some, texts, strict=True):
                    found[name][index] = text
        return found

    def _generated(self, rows: Sequence[tuple[Generation, str]], until: Sequence[str], tokens: int) -> list[str]:
        """The texts of rows that are generated together."""
        device = device_of(self.base)
        width = max(len(request.context) for request, _ in rows)
        ids = torch.full((len(rows), width), padding_id(self.tokenizer))
        mask = torch.zeros_like(ids)
        for row, (request, _) in enumerate(rows):
            ids[row, width - len(request.context) :] = torch.tensor(request.context)
            mask[row, width - len(request.context) :] = 1
        options: dict[str, Any] = {}
        if self.model is not self.base:
            options["adapter_names"] = [name for _, name in rows]
            if self.model.waits_for_question(options["adapter_names"]):
                options["acts_from"] = [width - len(request.context) + request.read for request, _ in rows]
        its: Any = getattr(self.base.generation_config, "eos_token_id", None)
        end: Any = self.tokenizer.eos_token_id
        ends: set[int] = {*(its if isinstance(its, list) else [its]), end} - {None}
        with torch.inference_mode():
            made = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                do_sample=False,
                max_new_tokens=tokens,
                eos_token_id=sorted(ends) or None,
                pad_token_id=padding_id(self.tokenizer),
                stopping_criteria=StoppingCriteriaList([_Stop(self.tokenizer, until, width)]),
                **options,
            )
        texts = []
        for row in made[:, width:].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            texts.append(self.tokenizer.decode(row[:end], skip_special_tokens=True))
        return texts


class _Stop(StoppingCriteria):
    """Ends a row whose last tokens hold a text of `until`."""

    def __init__(self, tokenizer: Any, until: Sequence[str], width: int) -> None:
        self._tokenizer, self._until, self._width = tokenizer, until, width
        sizes = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in until]
        self._last = max(sizes, default=0) + _MORE_TOKENS

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        said = self._tokenizer.batch_decode(input_ids[:, self._width :][:, -self._last :])
        return torch.tensor([any(stop in text for stop in self._until) for text in said], device=input_ids.device)


def names_of(adapters: str | Sequence[str]) -> dict[str, str]:
    """Adapters by name, which is how they are given: name → folder or hub id.

    Args:
        adapters: folders or hub ids, or one text with "|" between them; "__base__" is the base model, and a folder that is no
            adapter's stands for all adapters below it.

    Raises:
        InputError: a name is empty or given twice, or a folder has no adapters.
    """
    found: dict[str, str] = {}
    for given in adapters.split("|") if isinstance(adapters, str) else adapters:
        its = {given: given}
        if os.path.isdir(given) and not os.path.isfile(os.path.join(given, CONFIG_NAME)):
            its = {os.path.join(given, name): folder for name, folder in adapter_folders(given).items()}
            if not its:
                raise InputError(f"Expected an adapter's folder, or one with adapters, found {given!r} without.")
        twice = [name for name in its if name in found]
        if twice or not given:
            raise InputError(f"Expected different adapters, found {shown(twice or [given])}.", argument="adapters")
        found |= its
    return found
