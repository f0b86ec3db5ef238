"""Prompts and answer choices as token ids, as each family of models reads them."""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ia3.adapter.config import TaskType
from ia3.adapter.pretrained import task_type
from ia3.adapter.targets import inside_wrappers
from ia3.errors import InputError, brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A prompt and its answer choices as token ids.

    Choices stand in an order of their own, that of their tokens: a sum over them, a tie between them, and a row that
    they are packed into, are the same to the last bit however a task lists its labels.

    Attributes:
        prompt: its tokens.
        choices: the tokens of each choice.
        label: the index of the right choice among `choices`; None when that is not known.
        adapter: whose answer is wanted, "__base__" for no adapter's; None: the active ones'. All questions of a batch
            say it, or none does.
        order: for each of `choices`, its index in the caller's list; None: the same.
    """

    prompt: list[int]
    choices: list[list[int]]
    label: int | None = None
    adapter: str | None = None
    order: tuple[int, ...] | None = None

    def listed(self, index: int) -> int:
        """A choice's index in the caller's list."""
        return index if self.order is None else self.order[index]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    labels: Sequence[int | None] | None = None,
    max_length: int | None = None,
    model: nn.Module | None = None,
    continuing: bool = False,
) -> list[Question]:
    """Prompts and choices as token ids.

    - For a decoder-only model, a choice is tokenized by itself, as it continues a text: give it the leading space that it
      needs (" yes"). Neither prompt nor choice is closed.
    - For an encoder-decoder, prompt and choice are two texts, each as the tokenizer opens and closes it (T5: "yes</s>"), as
      in the code of T-Few's authors: the closing token is scored and counts in the choice's length. Leading spaces of a
      choice mean nothing.
    - For a classifier, a prompt is as the tokenizer opens and closes it, and the i-th choice is the token i, a label.

    Args:
        tokenizer: the model's.
        prompts: N texts.
        choices: the answer choices of each.
        labels: the index of each prompt's right choice.
        max_length: how many tokens (prompt + choice; prompt alone, where there is an encoder) the model takes; longer
            prompts lose their beginning. None: as many as `model` has positions for.
        model: whose family prompts and choices are for; None: a decoder-only one.
        continuing: prompts continue a text that is not in them.

    Raises:
        InputError: lengths differ, a prompt or choice is empty, or a choice alone is too long; a classifier's choices are
            not the same for all prompts, or not as many as its labels.
    """
    prompts, choices = prompts if isinstance(prompts, str) else list(prompts), list(choices)
    if isinstance(prompts, str) or len(prompts) != len(choices):
        raise InputError(
            f"Expected a list of prompts and as many lists of choices, found {len(prompts)} and {len(choices)}."
        )
    family = TaskType.CAUSAL_LM if model is None else task_type(base_of(model))
    if max_length is None and model is not None:
        max_length = model_max_length(model)
    if continuing:
        encoded: Any = [continuation(tokenizer, prompt) for prompt in prompts]
    else:
        encoded = tokenizer(list(prompts))["input_ids"] if prompts else []
    for i, texts in enumerate(choices):
        if isinstance(texts, str) or not len(texts):
            raise InputError(f"Expected a list of answer choices for prompt {i}, found {brief(texts)}.")
    if family == TaskType.SEQ_CLS:
        from ia3.scoring.classifier import check_choices

        check_choices(base_of(model), choices)  # type: ignore[arg-type]
    special = {token for token in tokenizer.all_special_ids if token != tokenizer.unk_token_id}
    # A classifier's answers are its labels.
    different = dict.fromkeys(text for texts in choices for text in texts) if family != TaskType.SEQ_CLS else {}
    cache = dict(zip(different, _answers(tokenizer, list(different), family, special), strict=True))
    questions, shortened = [], 0
    for i, (prompt, texts) in enumerate(zip(encoded, choices, strict=True)):
        prompt = list(prompt)  # type: ignore[arg-type]
        if family == TaskType.CAUSAL_LM:
            prompt = unclosed(tokenizer, prompt, prompts[i])
            # What marks the beginning of a text stays at the beginning.
            first, last = int(prompt[:1] == [tokenizer.bos_token_id]), 0
        else:
            first, last = _marks(special, prompt)
        for text in texts:
            if text in cache and not cache[text]:
                raise InputError(
                    f"Expected answer choices with at least one token, found {brief(text)} for prompt {i}."
                )
        if len(prompt) <= (0 if family == TaskType.CAUSAL_LM else first + last):
            raise InputError(f"Expected a prompt with at least one token, found {brief(prompts[i])} (prompt {i}).")
        answers = [[index] for index in range(len(texts))] if family == TaskType.SEQ_CLS else [cache[t] for t in texts]
        if max_length is not None:
            longest = max(map(len, answers))
            room = max_length - (longest if family == TaskType.CAUSAL_LM else 0)
            if room < 1 or longest > max_length:
                raise InputError(
                    f"Expected choices shorter than {max_length} tokens, found one of {longest} (prompt {i})."
                )
            if len(prompt) > room:
                shortened += 1
                first, last = (first, last) if first + last < room else (0, 0)
                middle = prompt[first : len(prompt) - last]
                prompt = prompt[:first] + middle[len(middle) - (room - first - last) :] + prompt[len(prompt) - last :]
        order = tuple(sorted(range(len(answers)), key=answers.__getitem__))
        label = None if labels is None or labels[i] is None else order.index(labels[i])  # type: ignore[arg-type]
        questions.append(Question(prompt, [answers[index] for index in order], label, order=order))
    if shortened:
        logger.warning(
            "%d prompts are longer than the model's %d tokens and lose their beginning.", shortened, max_length
        )
    return questions


def _marks(special: Container[int], tokens: Sequence[int]) -> tuple[int, int]:
    """How many tokens open a text, and how many close it."""
    first = next((i for i, token in enumerate(tokens) if token not in special), len(tokens))
    last = next((i for i, token in enumerate(reversed(tokens)) if token not in special), 0)
    return first, last


def _answers(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], family: TaskType, special: Container[int]
) -> list[list[int]]:
    """The tokens of answer choices; none where one holds nothing."""
    if family == TaskType.CAUSAL_LM or not texts:
        return continuations(tokenizer, texts)
    encoded: Any = tokenizer(text_target=[text.lstrip(" ") for text in texts])["input_ids"]
    return [tokens if len(tokens) > sum(_marks(special, tokens)) else [] for tokens in encoded]


def unclosed(tokenizer: PreTrainedTokenizerBase, tokens: list[int], text: str) -> list[int]:
    """A text's tokens without the one that a tokenizer closes every text with: here the text goes on."""
    closed = len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token))
    return tokens[:-1] if closed else tokens


def continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that continues another one."""
    return continuations(tokenizer, [text])[0]


def continuations(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts, each of which continues another one."""
    if not texts:
        return []
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    spaced = [i for i, text in enumerate(texts) if text[:1].isspace()]
    if not spaced:
        return found
    # SentencePiece puts a space of its own in front of every text: behind a word the given white space is enough.
    word: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    behind: Any = tokenizer(["a" + texts[i] for i in spaced], add_special_tokens=False)["input_ids"]
    for i, both in zip(spaced, behind, strict=True):
        if word and both[: len(word)] == word:
            found[i] = both[len(word) :]
    return found


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id to fill places with that nothing attends to."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0


def model_max_length(model: nn.Module) -> int | None:
    """How many tokens a model (an encoder-decoder's encoder) has positions for; None when it does not say."""
    base = base_of(model)
    config = getattr(base, "config", None)
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_encoder_position_embeddings")]
    for name, module in base.named_modules():
        # RoBERTa and its kin begin to count behind the padding token's number.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if limit is not None), default=None)


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a wrapper for parallel training and inside an adapted model."""
    model = inside_wrappers(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
