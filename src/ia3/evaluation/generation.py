"""The texts that a model generates for the rows of a `FreeText`: `generate`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ia3.adapter.placement import device_of
from ia3.adapter.pretrained import reads_sentences
from ia3.errors import InputError
from ia3.scoring import trials
from ia3.scoring.batch import BATCH_TOKENS, padded
from ia3.scoring.family import evaluating, waits_for_question
from ia3.scoring.prefix import SEPARATOR
from ia3.scoring.question import Question
from ia3.scoring.scorer import Scorer
from ia3.scoring.spans import FieldsProcessor, Grammar
from ia3.scoring.tokens import closing_token
from ia3.task.fields import Fields

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ia3.task.free_text import FreeText

# The maximum of new tokens of a task that does not say it.
USUAL_TOKENS = 128


@dataclass(frozen=True)
class Generated:
    """What a model generated for a row.

    Attributes:
        result: the text, or what it says (see `FreeText.result`).
        text: the text as generated.
        finished: whether the model ended the text; otherwise it is cut off at the maximum of tokens.
        question: the tokens of the prompt, and those that were generated as its only choice.
    """

    result: Any
    text: str
    finished: bool
    question: Question


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: FreeText,
    rows: Any,
    on_progress: Callable[[list[int]], None] | None = None,
    adapter_names: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    shots: Any = None,
) -> list[Generated]:
    """Generate the answer of each row.

    >>> generate(model, tokenizer, task, [{"review": "Stale, dented cans."}])[0].result

    Args:
        model: a causal language model or an encoder-decoder, adapted or not.
        tokenizer: its tokenizer.
        task: the task of the rows. Answers of rows are not read.
        rows: as `as_rows` takes them.
        on_progress: called with the indices of the rows that each batch finished.
        adapter_names: the adapter for each row; None: the active adapters.
        max_new_tokens: the maximum of tokens of an answer; None: the task's, or 128.
        temperature: 0 takes the most probable token each time; above, tokens are drawn from the softmax of the scores divided
            by it.
        seed: decides the draws.
        shots: labelled rows that stand before each prompt, with their answers; None: none.

    Raises:
        InputError: the model generates no text or has no room for it; a number is out of range; adapters act from the
            question on; see also `Wording`.
    """
    most = max_new_tokens or task.max_new_tokens or USUAL_TOKENS
    if most < 1:
        raise InputError(f"Expected at least one new token, found {most}", argument="max_new_tokens")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"Expected a temperature of 0 or above, found {temperature}", argument="temperature")
    if waits_for_question(model, adapter_names):
        raise InputError(
            f"Expected adapters that act from the start for the task {task.name!r}, whose answer is text, found one that acts "
            f"from the question on",
            "train with acts_from: start",
        )
    scorer, wordings = Scorer(model, tokenizer), task.wordings(rows)
    before = "" if shots is None else shots_before(task, shots)
    prompts = scorer.prompts(wordings, most, before)
    ends = _ends(scorer, task)
    options: dict[str, Any] = {
        "max_new_tokens": most,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "eos_token_id": ends,
        "pad_token_id": scorer.family.pad_token_id,
        "do_sample": temperature > 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}),
    }
    found: list[Generated | None] = [None] * len(prompts)
    device = device_of(model)
    with evaluating(model), torch.inference_mode(), torch.random.fork_rng(enabled=temperature > 0):
        if temperature:
            torch.manual_seed(seed)
        for group in _groups(scorer, prompts, most):
            some = [prompts[i] for i in group]
            ids, mask = (one.to(device) for one in _batch(scorer, some))
            names = {} if adapter_names is None else {"adapter_names": [adapter_names[i] for i in group]}
            start = 1 if scorer.family.has_encoder else ids.shape[1]
            stop = [_AtBlankLine(tokenizer, start)] if before else []
            bound: list[LogitsProcessor] = []
            if isinstance(task, Fields):
                grammars = [Grammar(task.fields, task.texts(wordings[i].row)) for i in group]
                bound = [FieldsProcessor(tokenizer, grammars, ends, start)]
            made = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                stopping_criteria=StoppingCriteriaList(stop),
                logits_processor=LogitsProcessorList(bound),
                **names,
                **options,
            )
            for index, tokens in zip(group, made[:, start:].tolist(), strict=True):
                length = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
                question = Question(prompts[index], [tokens[: length + 1]])
                finished, tokens = length < len(tokens), tokens[:length]
                text = str(tokenizer.decode(tokens, skip_special_tokens=True))
                if before and SEPARATOR in text.lstrip():
                    text, finished = text.lstrip().partition(SEPARATOR)[0], True
                result = task.result(text, wordings[index].row)
                found[index] = Generated(result, text.strip(), finished, question)
            if on_progress is not None:
                on_progress(group)
    return [one for one in found if one is not None]


def require_generator(model: str) -> None:
    """Raise `InputError` for the name of a base model that is a sentence encoder; no weights are read."""
    if reads_sentences(model):
        raise InputError(
            f"Expected a language model for a task whose answer is text, found the sentence encoder {model!r}, which generates "
            f"none",
            "name another with",
            argument="model",
        )


def shots_before(task: FreeText, shots: Any) -> str:
    """The text of labelled rows that stands before each prompt: each prompt with its answer, and a blank line behind each."""
    wordings = task.wordings(shots)
    return "".join(one.prompt + (one.separator or " ") + one.answer + SEPARATOR for one in wordings)


def bounded(task: FreeText, scorer: Scorer, rows: Any) -> FreeText:
    """The task with a maximum of new tokens: its own, or twice those of the longest answer of labelled rows, but no more than
    half of the model's context if that is enough for these."""
    if task.max_new_tokens is not None:
        return task
    longest = max(len(one.choices[0]) for one in scorer.questions(task.wordings(rows), labelled=False))
    limit = scorer.max_length or math.inf
    return task.model_copy(update={"max_new_tokens": int(min(2 * longest, max(longest, limit // 2)))})


def _ends(scorer: Scorer, task: FreeText) -> list[int]:
    """The tokens that end a text."""
    config = getattr(scorer.family.base, "generation_config", None)
    known: Any = getattr(config, "eos_token_id", None)
    ends = [closing_token(scorer.tokenizer, task.chat), scorer.tokenizer.eos_token_id]
    ends += known if isinstance(known, list) else [known]
    return sorted({end for end in ends if end is not None})  # type: ignore[type-var]


def _groups(scorer: Scorer, prompts: Sequence[list[int]], new_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts, the longest first, in groups that are generated together. Prompts of different lengths are, where
    padding on the left changes nothing."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    asked = [Question(prompts[i], [[0, 0]]) for i in order]
    pads = scorer.family.has_encoder or not asked or trials.packs(scorer.family, asked)
    for _, its in itertools.groupby(order, key=lambda i: 0 if pads else len(prompts[i])):
        group: list[int] = []
        for index in its:
            if group and (len(prompts[group[0]]) + new_tokens) * (len(group) + 1) > BATCH_TOKENS:
                yield group
                group = []
            group.append(index)
        yield group


def _batch(scorer: Scorer, prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask`, a decoder's padded on the left."""
    if scorer.family.has_encoder:
        return padded(prompts, scorer.family.pad_token_id)
    ids, mask = padded([prompt[::-1] for prompt in prompts], scorer.family.pad_token_id)
    return ids.flip(1), mask.flip(1)


class _AtBlankLine(StoppingCriteria):
    """Ends a text where, behind shots, the next one would begin."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int) -> None:
        self._tokenizer, self._start = tokenizer, start

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        ended = [SEPARATOR in text.lstrip() for text in texts]
        return torch.tensor(ended, device=input_ids.device)  # type: ignore[return-value]
