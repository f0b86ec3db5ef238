"""In-context learning: labelled examples ("shots") stand before each prompt, and nothing is trained.

The shots are the same for every prompt, so a decoder reads them once, and each prompt attends to their keys and values.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ia3.adapter.config import TaskType
from ia3.adapter.pretrained import task_type
from ia3.adapter.targets import inside_wrappers
from ia3.errors import InputError, brief
from ia3.evaluation.prediction import Prediction, predict
from ia3.scoring.beginning import Layout, is_exact_behind, packed_behind, read, room_behind, shared
from ia3.scoring.choices import Batch, base_dtype, batches, evaluating, pass_tokens, plain_rows, row_length
from ia3.scoring.layouts import Verdicts, collate, judged, size_of
from ia3.scoring.questions import Question, base_of, encode, model_max_length, unclosed
from ia3.task.rows import as_rows
from ia3.task.task import Row, Task
from ia3.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn
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
        base = base_of(model)
        family = task_type(base)
        self._encoder_decoder = family == TaskType.SEQ_2_SEQ_LM
        if family == TaskType.SEQ_CLS:
            raise InputError(
                f"Expected a model that generates text, found {type(base).__name__}: a classifier cannot read examples."
            )
        self.text, self.separator, self._tokenizer, self._model = text, separator, tokenizer, base
        self.tokens: list[int] = unclosed(tokenizer, list(tokenizer(text)["input_ids"]), text)  # type: ignore[arg-type]
        if not self.tokens:
            raise InputError(f"Expected a prefix with at least one token, found {brief(text)}.")
        limit = model_max_length(model)
        if limit is not None and len(self.tokens) >= limit:
            raise InputError(
                f"Expected a prefix shorter than the model's {limit} tokens, found one of {len(self.tokens)}; "
                f"shorten it, or give fewer shots."
            )
        self._adapters = _in_effect(model)
        self._cache = None if self._encoder_decoder else self._read(model)
        self._layouts: dict[Layout, Verdicts] = {}
        if self._cache is not None:
            self._layouts = {self._packed: Verdicts(), self._plain: Verdicts()}
        self._layout: Layout | None = next(iter(self._layouts), None)

    @property
    def is_cached(self) -> bool:
        """Whether the last questions continued the cache, or the first will; else the prefix is read with each prompt."""
        return self._layout is not None

    @property
    def nbytes(self) -> int:
        layers = [] if self._cache is None else self._cache.layers
        return sum(one.nbytes for layer in layers for one in (layer.keys, layer.values))  # type: ignore[union-attr]

    def _read(self, model: nn.Module) -> DynamicCache | None:
        """The prefix's keys and values; None for a model that keeps none, or something else."""
        with evaluating(model), torch.no_grad():
            return read(model, self.tokens)

    @property
    def room(self) -> int | None:
        """How many tokens (prompt + choice) the model takes behind the prefix; None when it does not say."""
        limit = model_max_length(self._model)
        return None if limit is None else limit - len(self.tokens)

    def encode(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], labels: Sequence[int | None] | None = None
    ) -> list[Question]:
        """As `ia3.scoring.questions.encode`, for prompts that stand behind the prefix."""
        prompts = [self.separator + prompt for prompt in prompts]
        if self._encoder_decoder:
            texts = [self.text + prompt for prompt in prompts]
            return encode(self._tokenizer, texts, choices, labels, model=self._model)
        return encode(self._tokenizer, prompts, choices, labels, self.room, continuing=True)

    def parts(
        self, model: nn.Module, questions: Sequence[Question], pad_token_id: int = 0, batch_tokens: int | None = None
    ) -> Iterator[tuple[list[int], Batch]]:
        """Questions of `encode` in batches for the model: indices, and the batch.

        Raises:
            InputError: the model, or its active adapters, are not those that read the prefix, as they were then.
        """
        named = any(question.adapter is not None for question in questions)
        if named or base_of(model) is not self._model or not _same(self._adapters, _in_effect(model)):
            raise InputError(
                "Expected the model and the active adapters that read the prefix, found others, or adapters that have been "
                "trained since; make a Prefix for each."
            )
        layout: Layout = collate
        tokens = batch_tokens or pass_tokens(model)
        if questions and not self._encoder_decoder:
            self._layout = self._exact(model, questions, pad_token_id)
            whole = [self._whole(question) for question in questions]
            # What all prompts begin with, such as an instruction, is read once behind the prefix too.
            beginning = shared(model, whole, pad_token_id, self._cache) if self._layout == self._packed else None
            if beginning is not None:
                layout, questions = beginning.packed, beginning.behind(whole)
                tokens = beginning.room(questions, tokens)
            elif self._layout is not None:
                layout = self._layout
                tokens = room_behind(len(self.tokens), max(map(row_length, questions)), tokens)
            else:
                questions = whole
        for group in batches(questions, tokens):
            yield group, layout(model, [questions[i] for i in group], pad_token_id)

    def _exact(self, model: nn.Module, questions: Sequence[Question], pad_token_id: int) -> Layout | None:
        """The first layout that is exact for all questions; None: none is."""
        for layout, verdicts in self._layouts.items():

            def is_exact(question: Question, layout: Layout = layout) -> bool | None:
                return is_exact_behind(model, layout, self.tokens, question, pad_token_id)

            if judged(verdicts, questions, size_of, self.room, is_exact):
                return layout
        return None

    def _whole(self, question: Question) -> Question:
        return replace(question, prompt=self.tokens + question.prompt)

    def _packed(self, model: nn.Module, questions: Sequence[Question], pad_token_id: int) -> Batch:
        """A packed row for each question: `attention_mask` (B, 1, L, S + L), positions from S on."""
        assert self._cache is not None
        return packed_behind(self._cache, questions, pad_token_id, base_dtype(self._model))

    def _plain(self, model: nn.Module, questions: Sequence[Question], pad_token_id: int) -> Batch:
        """A row for each choice: `attention_mask` (R, S + L)."""
        batch = plain_rows(questions, pad_token_id)
        mask = batch["attention_mask"]
        before = torch.ones((len(mask), len(self.tokens)), dtype=mask.dtype)
        return {**batch, "attention_mask": torch.cat([before, mask], dim=-1), "past_key_values": self._cache}


def _in_effect(model: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """The parameters of the active adapters, and which version of their numbers they hold."""
    adapted = inside_wrappers(model)
    routing = getattr(adapted, "ia3_routing", None)
    names = routing.active if routing is not None and routing.enabled else ()
    parameters = [parameter for name in names for parameter in adapted.adapter_parameters(name)]  # type: ignore[operator]
    return [(one, 0 if one.is_inference() else one._version) for one in parameters]


def _same(before: list[tuple[nn.Parameter, int]], now: list[tuple[nn.Parameter, int]]) -> bool:
    return len(before) == len(now) and all(a is b and v == w for (a, v), (b, w) in zip(before, now, strict=True))


def draw_shots(rows: Any, task: Task, count: int, seed: int = 0, balanced: bool = True) -> list[Row]:
    """A random draw of labelled rows to show in context, in random order.

    Args:
        rows: to draw from, as `as_rows` takes them.
        task: knows their labels.
        count: how many.
        seed: decides the draw and the order. A larger draw of the same seed holds the smaller ones.
        balanced: as equally many of each label as `count` and `rows` allow; else as it comes.

    Raises:
        InputError: there are fewer rows, or a label is not known.
    """
    rows = as_rows(rows, task)
    if count < 1 or count > len(rows):
        raise InputError(f"Expected between 1 and {len(rows)} shots, as many as there are rows, found {count}.")
    chance = random.Random(seed)
    drawn = chance.sample(rows, len(rows))
    if balanced:
        seen: Counter[str] = Counter()
        turns = []
        for row in drawn:
            label = task.label(row)
            turns.append(seen[label])
            seen[label] += 1
        drawn = [drawn[i] for i in sorted(range(len(drawn)), key=turns.__getitem__)]
    drawn = drawn[:count]
    random.Random(f"{seed} {count}").shuffle(drawn)
    return drawn


def shots_text(task: Task, shots: Any, template: int = 0) -> str:
    """Shots as the model reads them: each one's prompt with the right answer, blank lines between."""
    return SEPARATOR.join(
        task.prompt(row, template=template)
        + task.separator
        + task.answers(row, template=template)[task.label(row, template=template)]
        for row in as_rows(shots, task)
    )


def fitting(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    shots: Any,
    rows: Any,
    template: int = 0,
) -> int:
    """How many of the shots, counted from the first, fit into the model's context with the longest of the rows."""
    limit, shots = model_max_length(model), as_rows(shots, task)
    if limit is None:
        return len(shots)
    rows = as_rows(rows, task)
    prompts = [SEPARATOR + task.prompt(row, template=template) for row in rows]
    answers = [[task.separator + text for text in task.answers(row, template=template).values()] for row in rows]
    questions = encode(tokenizer, prompts, answers, continuing=True)
    longest = max((len(q.prompt) + max(map(len, q.choices)) for q in questions), default=0)
    for count in range(len(shots), 0, -1):
        if len(tokenizer(shots_text(task, shots[:count], template))["input_ids"]) + longest <= limit:  # type: ignore[arg-type]
            return count
    return 0


def shots_prefix(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    shots: Any,
    rows: Any,
    template: int = 0,
) -> Prefix:
    """Shots, read by the model, to stand before the prompts of rows.

    Raises:
        InputError: with the longest of the rows they do not fit into the model's context; see `Task.prompt`.
    """
    shots = as_rows(shots, task)
    count = fitting(model, tokenizer, task, shots, rows, template)
    if count < len(shots):
        raise InputError(
            f"Expected shots that fit into the model's {model_max_length(model)} tokens with the longest prompt, found "
            f"{len(shots)}, of which {count} fit; ask for fewer."
        )
    return Prefix(model, tokenizer, shots_text(task, shots, template))


def predict_in_context(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Any,
    shots: Any,
    on_progress: Callable[[list[int]], None] | None = None,
    template: int = 0,
    recipe: Recipe | None = None,
) -> list[Prediction]:
    """As `predict`, with labelled examples before each prompt.

    Args:
        model: a causal language model or an encoder-decoder, adapted or not.
        tokenizer: its tokenizer.
        task: says what rows and shots mean.
        rows: to label, as `predict` takes them.
        shots: the labelled examples, rows too, in the order in which they are shown; at least one.
        on_progress: called with the indices of the rows that each batch finished.
        template: the index of the task's template that shots and prompts are worded in.
        recipe: see `predict`.

    Raises:
        InputError: see `shots_prefix`; or there are no shots.
    """
    rows = as_rows(rows, task)
    prefix = shots_prefix(model, tokenizer, task, shots, rows, template)
    return predict(
        model,
        tokenizer,
        task,
        rows,
        on_progress,
        template=template,
        recipe=recipe,
        prefix=prefix,
    )
