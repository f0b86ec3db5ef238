"""How a model is asked: `Family`, of which decoders, encoder-decoders and encoders are one each."""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ia3.adapter.adapted import find_adapted
from ia3.adapter.targets import inside_wrappers
from ia3.errors import InputError, brief
from ia3.scoring.attention import recomputes
from ia3.scoring.batch import Batch
from ia3.scoring.question import Question
from ia3.scoring.tokens import padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Family(ABC):
    """A model with its tokenizer, asked as models of its family are.

    Args:
        model: what computes: a transformers model, adapted or not, perhaps in a wrapper for parallel training.
        tokenizer: its tokenizer.

    Attributes:
        base: the transformers model inside the wrapper and inside the adapted model.
        pad_token_id: fills unused places; nothing attends to it.
        has_encoder: whether an encoder reads the prompt, which alone takes of its positions.
        reads_answers: whether the model reads the answers' words; else they stand for labels of its head.
        reads_questions: whether the model reads the question behind a row's text.
        embeds: whether the model makes one embedding of each prompt, which a head tells labels by.
        has_layouts: whether choices can stand in one row, or in rows of their own.
    """

    has_encoder = True
    reads_answers = True
    reads_questions = True
    embeds = False
    has_layouts = True

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.base: Any = base_of(model)
        self.pad_token_id = padding_id(tokenizer)

    @abstractmethod
    def pack(self, questions: Sequence[Question]) -> Batch:
        """A row for each question, in which its choices form a tree. Which models take it, `trials` finds out."""

    @abstractmethod
    def plain_rows(self, questions: Sequence[Question]) -> Batch:
        """A row for each choice: exact for every model, and slower."""

    @abstractmethod
    def logits(self, batch: Batch) -> torch.Tensor:
        """The logits at the last K places of each row: (R, K, vocabulary), or (B, 1, labels) of a classifier."""

    @abstractmethod
    def _answers(
        self, choices: Sequence[Sequence[str]], names: Sequence[Sequence[str]] | None
    ) -> list[list[list[int]]]:
        """The tokens of each prompt's choices; none for a text that holds nothing."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's floating-point parameters."""
        return next((p.dtype for p in self.base.parameters() if p.dtype.is_floating_point), torch.float32)

    @functools.cached_property
    def max_length(self) -> int | None:
        """How many tokens the model (an encoder-decoder's encoder) has positions for; None when it does not say."""
        config = getattr(self.base, "config", None)
        names = ("max_position_embeddings", "max_encoder_position_embeddings")
        limits = [getattr(config, name, None) for name in names]
        for name, module in self.base.named_modules():
            # RoBERTa and its kin begin to count behind the padding token's number.
            if (
                name.endswith("position_embeddings")
                and isinstance(module, nn.Embedding)
                and module.padding_idx is not None
            ):
                limits.append(module.num_embeddings - module.padding_idx - 1)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def recomputes(self) -> bool:
        """Whether layers are computed again in the backward pass, without what was handed to them."""
        return recomputes(self.model, self.base)

    @property
    def unwrapped(self) -> Family:
        """The same without a wrapper for parallel training."""
        inner = inside_wrappers(self.model)
        return self if inner is self.model else type(self)(inner, self.tokenizer)

    def log_probs(self, batch: Batch) -> torch.Tensor:
        """The log-probability of each choice token: float32 (B, C, T), 0 where there is none."""
        return _of_tokens(self._rows_of_logits(batch), batch)

    def likelihoods(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """`log_probs`, and whether each choice is what greedy decoding begins with: bool (B, C)."""
        logits = self._rows_of_logits(batch)
        best = logits.argmax(-1)[batch["position"]] == batch["token"]
        return _of_tokens(logits, batch), (best | ~batch["mask"]).all(-1)

    def _rows_of_logits(self, batch: Batch) -> torch.Tensor:
        """The logits that a batch's `position` counts: float32 (R · K, vocabulary)."""
        return self.logits(batch).float().flatten(0, 1)

    def prompt_tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens of prompts, as the tokenizer opens and closes them."""
        return self.tokenizer(list(prompts))["input_ids"] if prompts else []  # type: ignore[return-value]

    def ask(
        self,
        prompts: Sequence[str],
        tokens: Sequence[Sequence[int]],
        choices: Sequence[Sequence[str]],
        labels: Sequence[int | None] | None = None,
        numbers: Sequence[int | None] | None = None,
        names: Sequence[Sequence[str]] | None = None,
        room: int | None = None,
    ) -> list[Question]:
        """Prompts, whose tokens are there, and choices as questions.

        Args:
            prompts: N texts.
            tokens: those of each, as of `prompt_tokens`.
            choices: the answer choices of each.
            labels: the index of each prompt's right choice.
            numbers: those of the prompts' rows, for errors; None: 1, 2, ….
            names: what the choices of each prompt are called, where a classifier's head knows them by name; None: the
                choices are the head's labels, in its order.
            room: how many tokens (prompt + choice; prompt alone, where there is an encoder) there are positions for;
                longer prompts lose their beginning. None: no limit.

        Raises:
            InputError: see `Scorer.encode`.
        """
        if isinstance(prompts, str) or len(prompts) != len(choices):
            raise InputError(
                f"Expected a list of prompts and as many lists of choices, found {len(prompts)} and {len(choices)}."
            )
        numbers = range(1, len(prompts) + 1) if numbers is None else numbers
        self._check(choices, numbers)
        questions, shortened = [], 0
        for i, (text, texts, answers) in enumerate(zip(prompts, choices, self._answers(choices, names), strict=True)):
            number = numbers[i]
            if not all(answers):
                empty = texts[answers.index([])]
                raise InputError(f"Expected answer choices with at least one token, found {brief(empty)}.", row=number)
            prompt, first, last = self._framed(list(tokens[i]), text)
            if len(prompt) <= (first + last if self.has_encoder else 0):
                raise InputError(f"Expected a prompt with at least one token, found {brief(text)}.", row=number)
            if room is not None:
                longest = max(map(len, answers))
                most = room - (0 if self.has_encoder else longest)
                if most < 1 or longest > room:
                    raise InputError(
                        f"Expected answers of fewer than {room} tokens, the model's context, found one of {longest}",
                        "shorten the answer",
                        row=number,
                    )
                if len(prompt) > most:
                    shortened += 1
                    first, last = (first, last) if first + last < most else (0, 0)
                    middle = prompt[first : len(prompt) - last]
                    kept = middle[len(middle) - (most - first - last) :]
                    prompt = prompt[:first] + kept + prompt[len(prompt) - last :]
            order = tuple(sorted(range(len(answers)), key=answers.__getitem__))
            right = None if labels is None else labels[i]
            label = None if right is None else order.index(right)
            choices_in_order = [answers[index] for index in order]
            questions.append(Question(prompt, choices_in_order, label, order=order, row=number))
        if shortened:
            logger.warning(
                "%d prompts are longer than the model's %d tokens and lose their beginning.", shortened, room
            )
        return questions

    def _check(self, choices: Sequence[Sequence[str]], numbers: Sequence[int | None]) -> None:
        """Raise `InputError` for choices that are none."""
        for number, texts in zip(numbers, choices, strict=True):
            if isinstance(texts, str) or not len(texts):
                raise InputError(f"Expected a list of answer choices, found {brief(texts)}.", row=number)

    @functools.cached_property
    def _special(self) -> set[int]:
        return {token for token in self.tokenizer.all_special_ids if token != self.tokenizer.unk_token_id}

    def _marks(self, tokens: Sequence[int]) -> tuple[int, int]:
        """How many tokens open a text, and how many close it."""
        first = next((i for i, token in enumerate(tokens) if token not in self._special), len(tokens))
        last = next((i for i, token in enumerate(reversed(tokens)) if token not in self._special), 0)
        return first, last

    def _framed(self, tokens: list[int], text: str) -> tuple[list[int], int, int]:
        """A prompt's tokens as they are read, and how many of them open and close it, and stay when it is shortened."""
        return tokens, *self._marks(tokens)


def _of_tokens(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The log-probability of each choice token (B, C, T), 0 where there is none."""
    chosen, mask = batch["position"], batch["mask"]
    found = logits[chosen[mask], batch["token"][mask]] - logits.logsumexp(-1)[chosen[mask]]
    return torch.zeros(mask.shape, dtype=found.dtype, device=found.device).masked_scatter(mask, found)


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a wrapper for parallel training and inside an adapted model."""
    model = inside_wrappers(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def waits_for_question(model: nn.Module, adapter_names: Sequence[str] | None) -> bool:
    """Whether a model's active adapters, or those named, act from the question on alone; see `IA3Config.acts_from`."""
    adapted = find_adapted(model)
    return adapted is not None and adapted.waits_for_question(adapter_names)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within `with`, the model is its base model: no adapter acts."""
    adapted = find_adapted(model)
    if adapted is None:
        yield
        return
    with adapted.disable_adapter():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within `with`, the model is in evaluation mode; afterwards each of its modules is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def passes_in_step(model: nn.Module) -> bool:
    """Whether processes exchange something in each pass through a model, so that all have to make the same passes: where they hold
    parts of it (FSDP, DeepSpeed ZeRO-3), or share gradients in each backward pass (DDP)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    kinds = FSDPModule, FullyShardedDataParallel, DistributedDataParallel
    return any(isinstance(module, kinds) for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    )
