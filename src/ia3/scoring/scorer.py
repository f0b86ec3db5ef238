"""A model that answers: `Scorer`, and `score_choices`, which is all of it in one call."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ia3.adapter.placement import device_of
from ia3.adapter.targets import inside_wrappers
from ia3.errors import InputError
from ia3.scoring import MEMORY, trials
from ia3.scoring.batch import (
    PASS_TOKENS,
    Batch,
    groups,
    joined_groups,
    normalized_scores,
    pass_tokens,
    to_device,
    training_groups,
)
from ia3.scoring.beginning import Beginning, beginnings
from ia3.scoring.decoder import Decoder
from ia3.scoring.encoder import SentenceEncoder
from ia3.scoring.families import family_of
from ia3.scoring.family import evaluating, frozen, waits_for_question
from ia3.scoring.fitting import answer_lengths, fitted, warn_of_cuts
from ia3.scoring.prefix import SEPARATOR, Prefix
from ia3.scoring.question import Question
from ia3.scoring.readings import Readings, askable
from ia3.scoring.states import whole_states
from ia3.scoring.tokens import chat_tokens, closing_token, question_lengths
from ia3.task.wording import Wording

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.task.free_text import FreeText, TextWording
    from ia3.task.task import Task


# Tokens of a row of several questions, at most: attention, which grows with the square, sees all of them.
_JOINED = 1024


class Scorer:
    """A model and its tokenizer, asked which answer choices are how probable.

    >>> scorer = Scorer(model, tokenizer)
    >>> questions = scorer.questions(task.wordings(rows), labelled=False)
    >>> scores = scorer.score(questions)

    Making one costs nothing: which rows the model scores rightly is tried when it is first asked, and known to every
    scorer of it.

    Args:
        model: a causal language model, an encoder-decoder or a classifier, adapted or not.
        tokenizer: its tokenizer.
        readings: keep what the base model makes of texts, for whatever is asked about them later; None: of those only
            that one call asks for several times, until it ends.
        memory: as of `Readings`, for what is kept where none are given.

    Attributes:
        family: how models of this kind are asked.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        readings: Readings | None = None,
        memory: int | str = MEMORY,
    ) -> None:
        self.model, self.tokenizer, self.readings, self.memory = model, tokenizer, readings, memory
        self._kept: set[tuple[int, ...]] | None = None  # the texts that readings are for; None: all
        self.family = family_of(model, tokenizer)

    def through(self, model: nn.Module) -> Scorer:
        """The scorer of the same model in a wrapper for parallel training, which computes."""
        return self if model is self.model else Scorer(model, self.tokenizer, self.readings, self.memory)

    def keeping(self, questions: Sequence[Question]) -> Scorer:
        """The scorer for several calls that ask these questions in all: texts that they share are read once, where that pays."""
        if self.readings is not None:
            return self
        asks = askable(self.family, questions)
        shared = _shared([question for question, ok in zip(questions, asks, strict=True) if ok])
        if not shared:
            return self
        found = Scorer(self.model, self.tokenizer, Readings(self.memory), self.memory)
        found._kept = shared
        return found

    def parts(self, rows: Sequence[Sequence[Question]]) -> Iterator[list[int]]:
        """Rows of questions, as indices, in parts whose texts are kept at once; all in one where none are kept."""
        if self.readings is None:
            yield [*range(len(rows))]
            return
        row_of = [row for row, questions in enumerate(rows) for _ in questions]
        flat = [question for questions in rows for question in questions]
        texts: list[set[tuple[int, ...]]] = [set() for _ in rows]
        for index in self._apart(flat)[0]:
            texts[row_of[index]].add(flat[index].text)
        yield from self.readings.parts(self.family, texts)

    @property
    def max_length(self) -> int | None:
        """How many tokens the model (an encoder-decoder's encoder) has positions for; None when it does not say."""
        return self.family.max_length

    # Words become tokens.

    def encode(
        self,
        prompts: Sequence[str],
        choices: Sequence[Sequence[str]],
        labels: Sequence[int | None] | None = None,
        prefix: Prefix | None = None,
    ) -> list[Question]:
        """Prompts and choices as token ids, as the model's family reads them: see `Decoder`, `EncoderDecoder`, `Encoder`.

        Args:
            prompts: N texts; those that are longer than the model has positions for lose their beginning.
            choices: the answer choices of each.
            labels: the index of each prompt's right choice.
            prefix: a text that stands before each prompt.

        Raises:
            InputError: lengths differ, a prompt or choice is empty, or a choice alone is too long; a classifier's choices
                are not the same for all prompts, or not as many as its labels.
        """
        prompts, choices = prompts if isinstance(prompts, str) else list(prompts), list(choices)
        if prefix is not None:
            return prefix.ask(prompts, prefix.prompt_tokens(prompts), choices, labels)
        return self.family.ask(prompts, self.family.prompt_tokens(prompts), choices, labels, room=self.max_length)

    def questions(
        self,
        wordings: Sequence[Wording],
        labelled: bool = True,
        long_prompts: Literal["truncate", "refuse"] = "truncate",
        prefix: Prefix | None = None,
    ) -> list[Question]:
        """Rows in words as token ids. How many had to be cut is logged, and each question says what was (`cut`).

        Args:
            wordings: of `Task.wordings`; they may be of several tasks.
            labelled: take each row's label, too.
            long_prompts: "truncate" cuts the end off a column (see `Task.truncate`), "refuse" does not.
            prefix: a text that stands before each prompt.

        Raises:
            InputError: see `Wording`; two answers are the same to the tokenizer; or a prompt is too long.
        """
        found: list[Question | None] = [None] * len(wordings)
        alike: dict[tuple[int, int], list[int]] = {}
        for index, wording in enumerate(wordings):
            alike.setdefault((id(wording.task), id(wording.template)), []).append(index)
        for indices in alike.values():
            some = [wordings[index] for index in indices]
            for index, question in zip(indices, self._asked(some, labelled, long_prompts, prefix), strict=True):
                found[index] = question
        questions = [question for question in found if question is not None]
        warn_of_cuts([question.cut for question in questions])
        return questions

    def question(
        self, wording: Wording, labelled: bool = True, long_prompts: Literal["truncate", "refuse"] = "truncate"
    ) -> Question:
        """As `questions`, for one row and without a log."""
        [question] = self._asked([wording], labelled, long_prompts, None)
        return question

    def _asked(
        self,
        wordings: Sequence[Wording],
        labelled: bool,
        long_prompts: Literal["truncate", "refuse"],
        prefix: Prefix | None,
    ) -> list[Question]:
        """Rows of one task, in the words of one template."""
        family, spoken = self.family, wordings[0].chat if wordings else False
        if wordings and wordings[0].closes and not family.reads_answers:
            raise no_text(family.base, wordings[0].task)
        answers = [wording.answers for wording in wordings]
        # A classifier reads no answers, so it need not tell them apart.
        lengths = answer_lengths(self.tokenizer, wordings) if family.reads_answers else []
        tokens_of = self._tokens_of(spoken) if prefix is None else prefix.prompt_tokens
        if not family.reads_questions and wordings:
            tokens_of = _unasked(tokens_of, wordings[0])
        behind = prefix is not None and isinstance(family, Decoder)  # it has positions for what is left of them
        limit = prefix.room if prefix is not None and behind else family.max_length
        # An encoder has its positions for the prompt alone.
        rooms = None if limit is None else [limit - length for length in lengths or [0] * len(wordings)]
        if limit is not None and family.has_encoder:
            rooms = [limit] * len(wordings)
        fits = fitted(wordings, tokens_of, rooms, long_prompts)
        labels = None
        if labelled:
            labels = [list(its).index(wording.label) for its, wording in zip(answers, wordings, strict=True)]
        texts = [[wording.separator + text for text in wording.answers.values()] for wording in wordings]
        prompts, tokens = [one.prompt for one in fits], [one.tokens for one in fits]
        numbers = [wording.number for wording in wordings]
        if prefix is not None:
            questions = prefix.ask(prompts, tokens, texts, labels, numbers)
        else:
            questions = family.ask(prompts, tokens, texts, labels, numbers, [list(its) for its in answers], limit)
        if wordings and wordings[0].closes:
            # There is a position for it: the last token of an answer is predicted, not read.
            end = closing_token(self.tokenizer, spoken)
            closed = [
                [choice if choice[-1:] == [end] else [*choice, end] for choice in its.choices] for its in questions
            ]
            questions = [replace(its, choices=choices) for its, choices in zip(questions, closed, strict=True)]
        if isinstance(family, Decoder):
            texts_of = [wording.text_of(prompt) for wording, prompt in zip(wordings, prompts, strict=True)]
            asked = question_lengths(self.tokenizer, prompts, tokens, texts_of, tokens_of)
            questions = [
                replace(question, read=max(len(question.prompt) - length, 0) if length else 0)
                for question, length in zip(questions, asked, strict=True)
            ]
        return [replace(question, cut=fit.cut) for question, fit in zip(questions, fits, strict=True)]

    def _tokens_of(self, spoken: bool) -> Callable[[Sequence[str]], list[list[int]]]:
        """The tokens of prompts; with `spoken`, as a user's messages in the tokenizer's chat template."""
        return functools.partial(chat_tokens, self.tokenizer) if spoken else self.family.prompt_tokens

    def prompts(self, wordings: Sequence[TextWording], new_tokens: int, before: str = "") -> list[list[int]]:
        """Prompts to generate text behind, as token ids that leave room for so many more. Long ones are cut as those of
        `questions`.

        Args:
            wordings: of one `FreeText`.
            new_tokens: the maximum of tokens to generate.
            before: a text that stands before each prompt, such as examples in context.

        Raises:
            InputError: see `Wording`; the model generates no text, or has no room.
        """
        if not wordings:
            return []
        family, limit = self.family, self.max_length
        if not family.reads_answers:
            raise no_text(family.base, wordings[0].task)
        room = limit if limit is None or family.has_encoder else limit - new_tokens
        if room is not None and room < 1:
            raise InputError(
                f"Expected fewer new tokens than the model's {limit}, found {new_tokens}",
                "see",
                argument="max_new_tokens",
            )
        tokens_of = self._tokens_of(wordings[0].chat)
        fits = fitted(
            wordings,
            lambda prompts: tokens_of([before + prompt for prompt in prompts]),
            None if room is None else [room] * len(wordings),
            "truncate",
        )
        warn_of_cuts([fit.cut for fit in fits])
        return [family._framed(list(fit.tokens), fit.prompt)[0] for fit in fits]

    def prefix(self, text: str, separator: str = SEPARATOR) -> Prefix:
        """A text that stands before many prompts, read by the model as it is now; see `Prefix`."""
        return Prefix(self.model, self.tokenizer, text, separator)

    # Tokens become rows.

    def collate(self, questions: Sequence[Question]) -> Batch:
        """The questions as a batch for this model: packed where that is exact, else plain rows; a classifier's prompts."""
        return trials.collate(self.family, questions)

    def foresee(self, questions: Sequence[Question]) -> None:
        """Find out once which rows are exact for all of these, so that no batch of them has to; and read their texts."""
        apart, readings = self._apart(questions)
        if readings is not None:
            readings.foresee(self.family, [questions[i] for i in apart])
        taken = set() if self.family.has_encoder else {*apart}  # behind an encoder's states rows are packed as all are
        left = [question for i, question in enumerate(questions) if i not in taken]
        self._try_packing(left)
        joined = self._joined(left)
        if joined:  # the longest questions, none of which a later row has more of
            trials.joins(self.family, [left[i] for i in joined[0]])  # type: ignore[arg-type]

    def _try_packing(self, questions: Sequence[Question]) -> None:
        if questions:
            trials.packs(self.family, questions)

    def batches(
        self, questions: Sequence[Question], batch_tokens: int | None = None, prefix: Prefix | None = None
    ) -> Iterator[tuple[list[int], Batch]]:
        """The questions in batches for this model: indices, and the batch. What prompts share is read once.

        Args:
            questions: with a prefix, those that were encoded for it.
            batch_tokens: how many tokens go through the model at once; None: as many as is fast (`pass_tokens`).
            prefix: a text that stands before each prompt.
        """
        batch_tokens = batch_tokens or pass_tokens(self.model)
        if prefix is not None:
            yield from prefix.batches(self.family, questions, batch_tokens)
            return
        left, behind_texts = self._behind_texts(questions, batch_tokens)
        yield from behind_texts
        for indices, beginning in self._beginnings(questions, left):
            some = [questions[i] for i in indices]
            if beginning is None:
                self._try_packing(some)
                for group in groups(some, batch_tokens):
                    yield [indices[i] for i in group], self.collate([some[i] for i in group])
                continue
            some = beginning.behind(some)
            for group in groups(some, beginning.room(some, batch_tokens)):
                yield [indices[i] for i in group], beginning.packed([some[i] for i in group])

    def _behind_texts(
        self, questions: Sequence[Question], batch_tokens: int, training: bool = False
    ) -> tuple[list[int], Iterator[tuple[list[int], Batch]]]:
        """Batches of questions that are asked of what was read of their texts, and the indices of the others."""
        apart, readings = self._apart(questions)
        if readings is None:
            return [*range(len(questions))], iter(())
        some = [questions[i] for i in apart]
        made = readings.batches(self.family, some, batch_tokens, training)
        left = sorted({*range(len(questions))} - {*apart})
        return left, (([apart[i] for i in group], batch) for group, batch in made)

    def _beginnings(
        self, questions: Sequence[Question], indices: Sequence[int]
    ) -> Iterator[tuple[list[int], Beginning | None]]:
        """`beginnings` of some of the questions."""
        for group, beginning in beginnings(self.family, [questions[i] for i in indices]):
            yield [indices[i] for i in group], beginning

    def _apart(self, questions: Sequence[Question]) -> tuple[list[int], Readings | None]:
        """Questions that are asked of what was read of their texts, as indices, and where that is."""
        found = [i for i, ok in enumerate(askable(self.family, questions)) if ok]
        readings, kept = self.readings, self._kept
        if readings is None:
            readings, kept = Readings(self.memory), _shared([questions[i] for i in found])
        if kept is not None:
            found = [i for i in found if questions[i].text in kept]
        if not found or not readings.exact(self.family, [questions[i] for i in found]):
            return [], None
        return found, readings

    def training_batches(self, questions: Sequence[Question]) -> Iterator[tuple[list[int], Batch]]:
        """As `batches`, for a backward pass behind each of them, before the next is asked for.

        So memory holds the activations of one batch. The last one comes first, as in a backward pass through the sum of
        all: gradients add up in the same order.
        """
        batch_tokens = pass_tokens(self.model)
        left, behind_texts = self._behind_texts(questions, batch_tokens, training=True)
        yield from behind_texts
        for indices, beginning in self._beginnings(questions, left):
            some = [questions[i] for i in indices]
            if beginning is None:
                for group, batch in self._training_rows(some, batch_tokens):
                    yield [indices[i] for i in group], batch
                continue
            some = beginning.behind(some)
            beginning.detach()
            for group in reversed(list(training_groups(some, beginning.room(some, batch_tokens)))):
                yield [indices[i] for i in group], beginning.packed([some[i] for i in group])
            beginning.backward()

    def _training_rows(self, questions: Sequence[Question], batch_tokens: int) -> Iterator[tuple[list[int], Batch]]:
        """Batches of questions, the last first: rows of several where that takes fewer passes and is exact, otherwise a row for
        each question."""
        alone, joined = list(training_groups(questions, batch_tokens)), self._joined(questions)
        family = self.family
        if isinstance(family, Decoder) and 0 < len(joined) < len(alone):
            rows = [[questions[i] for i in group] for group in joined]
            if all(len(row) == 1 or trials.joins(family, row) for row in rows):
                for group, row in zip(joined[::-1], rows[::-1], strict=True):
                    yield group, family.join(row) if len(row) > 1 else self.collate(row)
                return
        self._try_packing(questions)
        for group in reversed(alone):
            yield group, self.collate([questions[i] for i in group])

    def _joined(self, questions: Sequence[Question]) -> list[list[int]]:
        """Groups of questions that may share a row, if they have one choice each and adapters act from the start; else none."""
        names = dict.fromkeys(question.adapter for question in questions)
        named = [name for name in names if name is not None]
        if (
            not isinstance(self.family, Decoder)
            or any(len(question.choices) > 1 for question in questions)
            or waits_for_question(self.model, named or None)
        ):
            return []
        tokens = min(pass_tokens(self.model), _JOINED, self.max_length or _JOINED)
        found = []
        for name in names:
            mine = [i for i, question in enumerate(questions) if question.adapter == name]
            found += [[mine[i] for i in group] for group in joined_groups([questions[i] for i in mine], tokens)]
        return found

    # Rows become scores.

    def log_probs(self, batch: Batch) -> torch.Tensor:
        """The log-probability of each choice token of a batch on the model's device: float32 (B, C, T), 0 where there is
        none."""
        return self.family.log_probs(batch)

    def states(
        self, questions: Sequence[Question], on_progress: Callable[[list[int]], None] | None = None
    ) -> torch.Tensor:
        """What the frozen model's layers hold of each question, for a head (`ia3.opinions`).

        Args:
            questions: N of them; their choices do not matter. Texts that were read are not read again.
            on_progress: called with the indices of the questions that each batch finished.

        Returns:
            float32 (N, places, width) on the CPU. A decoder's first layers + 1 places are means over the text before the
            question (over the prompt where that begins with the question), of the embeddings and behind each layer; the
            next are the states at the prompt's last token. An encoder-decoder's are means over its encoder's prompt.

        Raises:
            InputError: the model gives no hidden states, or is a classifier.
        """
        if not self.family.reads_answers:
            raise InputError(f"Expected a language model, found a {type(self.family.base).__name__}.")
        # Of the answers, no more than a place to ask at.
        asked = [replace(one, choices=[one.choices[0][:1]], label=None, adapter=None, order=None) for one in questions]
        results: list[torch.Tensor] = [torch.empty(0)] * len(asked)
        with evaluating(self.model), frozen(self.model), torch.no_grad():
            apart, readings = self._apart(asked)
            # What an encoder reads is what is kept of it.
            if self.family.has_encoder and len(apart) < len(asked):
                apart, readings = [*range(len(asked))], Readings(self.memory)
            left = sorted({*range(len(asked))} - {*apart})
            parts = [(left, whole_states(self.family, [asked[i] for i in left]))]
            if readings is not None:
                some = [asked[i] for i in apart]
                parts.append((apart, readings.states(self.family, some, pass_tokens(self.model))))
            for indices, found in parts:
                for group, states in found:
                    for row, index in enumerate(group):
                        results[indices[index]] = states[row]
                    if on_progress is not None:
                        on_progress([indices[index] for index in group])
        states = torch.stack(results)
        if not torch.isfinite(states).all():
            broken = next(index for index, one in enumerate(states) if not torch.isfinite(one).all())
            row = questions[broken].row or broken + 1
            raise InputError("The model's hidden states are NaN or infinite", "is the base broken?", row=row)
        return states

    def score(
        self,
        questions: Sequence[Question],
        length_normalization: float | Sequence[float] = 1.0,
        batch_tokens: int | None = None,
        on_progress: Callable[[list[int]], None] | None = None,
        adapter_names: Sequence[str] | None = None,
        prefix: Prefix | None = None,
    ) -> list[torch.Tensor]:
        """`score_choices` for questions that are token ids already; with a prefix, those that were encoded for it.

        `length_normalization` may be a number for each question.
        """
        if adapter_names is not None:
            questions = self.named(questions, adapter_names)
        device = device_of(self.model)
        results: list[torch.Tensor] = [torch.empty(0)] * len(questions)
        power: Any = length_normalization
        each = None if isinstance(power, (int, float)) else torch.tensor(power, dtype=torch.float32, device=device)
        divided = self.batches(questions, batch_tokens, prefix)
        with evaluating(self.model), torch.inference_mode():
            for group, batch in divided:
                batch = to_device(batch, device)
                power = power if each is None else each[group, None]
                scores = normalized_scores(self.log_probs(batch), batch["mask"], power).cpu()
                for row, index in zip(scores, group, strict=True):
                    question = questions[index]
                    results[index] = torch.tensor(question.as_listed(row[: len(question.choices)].tolist()))
                    _require_numbers(results[index], question.row or index + 1)
                if on_progress is not None:
                    on_progress(group)
        return results

    def likelihoods(self, questions: Sequence[Question]) -> list[list[tuple[float, bool]]]:
        """For each choice, in the caller's order, log p(y | x) = Σ_t log p(y_t | x, y_<t), and whether greedy decoding
        begins with it.

        Raises:
            InputError: scores that are not numbers.
        """
        device = device_of(self.model)
        results: list[list[tuple[float, bool]]] = [[] for _ in questions]
        with evaluating(self.model), torch.inference_mode():
            for group, batch in self.batches(questions):
                batch = to_device(batch, device)
                log_probs, greedy = self.family.likelihoods(batch)
                for index, sums, greedily in zip(group, log_probs.sum(-1).cpu(), greedy.tolist(), strict=True):
                    question = questions[index]
                    _require_numbers(sums, question.row or index + 1)
                    pairs = [*zip(sums.tolist(), greedily, strict=True)][: len(question.choices)]
                    results[index] = question.as_listed(pairs)
        return results

    def embeddings(self, questions: Sequence[Question], adapter_names: Sequence[str] | None = None) -> torch.Tensor:
        """A sentence encoder's embedding of each question, of length 1: float32 (N, H) on the CPU.

        Args:
            questions: N of them.
            adapter_names: for each the adapter that reads it; None: the active ones.

        Raises:
            InputError: the model is no sentence encoder.
        """
        family = self.family
        if not isinstance(family, SentenceEncoder):
            raise InputError(f"Expected a sentence encoder for embeddings, found a {type(family.base).__name__}.")
        if adapter_names is not None:
            questions = self.named(questions, adapter_names)
        device = device_of(self.model)
        found: dict[int, torch.Tensor] = {}
        with evaluating(self.model), torch.inference_mode():
            for group in groups(questions, pass_tokens(self.model)):
                batch = to_device(self.collate([questions[i] for i in group]), device)
                found.update(zip(group, family.embeddings(batch).cpu(), strict=True))
        return torch.stack([found[i] for i in range(len(questions))])

    def named(self, questions: Sequence[Question], adapter_names: Sequence[str]) -> list[Question]:
        """The questions, each for the adapter of an `IA3Model` that answers it."""
        check: Callable | None = getattr(inside_wrappers(self.model), "check_adapter_names", None)
        if check is None:
            kind = type(self.family.base).__name__
            raise InputError(f"Expected an IA3Model, whose adapters adapter_names are, found a {kind}.")
        check(adapter_names)  # before the first batch, and with the numbers of the prompts
        if len(adapter_names) != len(questions):
            raise InputError(f"Expected adapter_names for the {len(questions)} prompts, found {len(adapter_names)}.")
        return [replace(one, adapter=name) for one, name in zip(questions, adapter_names, strict=True)]


def _shared(questions: Sequence[Question]) -> set[tuple[int, ...]]:
    """Texts that several of these questions, all `askable`, are about; none where reading them apart saves less than it costs."""
    times = Counter(question.text for question in questions)
    shared = {text for text, count in times.items() if count > 1}
    return shared if sum((times[text] - 1) * len(text) for text in shared) >= 2 * PASS_TOKENS else set()


def no_text(model: nn.Module, task: Task | FreeText) -> InputError:
    """The error for a model that generates no text."""
    return InputError(
        f"Expected a language model for the task {task.name!r}, whose answer is text, found a {type(model).__name__}, which "
        f"generates none",
        "name another with",
        argument="model",
    )


def _require_numbers(scores: torch.Tensor, row: int) -> None:
    """Raise `InputError` unless a row's scores are finite."""
    if not torch.isfinite(scores).all():
        raise InputError("The model gives NaN or infinite scores", "is the adapter or the base broken?", row=row)


def _unasked(tokens_of: Callable[[Sequence[str]], list[list[int]]], wording: Wording) -> Callable:
    """The tokens of prompts without the question behind the text, which is the wording's, as are all answers."""
    return lambda prompts: tokens_of([wording.text_of(prompt).rstrip() or prompt for prompt in prompts])


def score_choices(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    length_normalization: float = 1.0,
    batch_tokens: int | None = None,
    on_progress: Callable[[list[int]], None] | None = None,
    adapter_names: Sequence[str] | None = None,
    prefix: Prefix | None = None,
) -> list[torch.Tensor]:
    """The length-normalized log-probability of each answer choice of each prompt.

    Args:
        model: a causal language model, an encoder-decoder or a classifier (whose choices are its labels, in their
            order, for every prompt), adapted or not. It is put into evaluation mode for the time.
        tokenizer: its tokenizer.
        prompts: N texts.
        choices: for each prompt its answer choices; they may differ from prompt to prompt. A choice continues the
            prompt, so it usually begins with a space.
        length_normalization: the power of the choice's token count that the sum is divided by; 0: not at all.
        batch_tokens: how many tokens go through the model at once; None: as many as is fast (`pass_tokens`).
        on_progress: called with the indices of the prompts that each batch finished.
        adapter_names: for each prompt the adapter of an `IA3Model` that answers it; None: the active ones.
        prefix: a text that stands before each prompt, run through this model once.

    Returns:
        N float32 tensors on the CPU, one number a choice: Σ_t log p(y_t | x, y_<t) / T^power; a classifier's are the
        log-probabilities of its labels.

    Raises:
        InputError: see `Scorer.encode`; or scores that are not numbers.
    """
    scorer = Scorer(model, tokenizer)
    questions = scorer.encode(prompts, choices, prefix=prefix)
    return scorer.score(questions, length_normalization, batch_tokens, on_progress, adapter_names, prefix)
