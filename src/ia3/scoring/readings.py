"""Texts that the frozen model reads once, for any number of questions, templates, steps and adapters: `Readings`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ia3.adapter.adapted import find_adapted
from ia3.adapter.placement import device_of
from ia3.adapter.rows import BASE
from ia3.adapter.targets import inside_wrappers
from ia3.files import parse_bytes
from ia3.scoring import MEMORY
from ia3.scoring.batch import Batch, groups, groups_of_sizes, padded, pass_tokens, to_device, training_groups
from ia3.scoring.beginning import (
    common_tokens,
    continued,
    fill,
    is_exact_behind,
    joined,
    may_continue,
    packed_behind,
    pays,
    room_behind,
)
from ia3.scoring.decoder import Decoder
from ia3.scoring.encoder_decoder import Encoded, EncoderDecoder
from ia3.scoring.family import Family, evaluating, frozen
from ia3.scoring.question import Question, row_length, sizes_of
from ia3.scoring.states import last_states, telling, total
from ia3.scoring.trials import Size, collate, judged, size_of, verdicts_of

# A text of fewer tokens is read anew with each question: a pass of its own would cost more.
_LEAST = 4

# A decoder's layer makes keys and values of each of an encoder's states. A token's pass through it costs over four times that.
_STATES = 4

Text = tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """What a frozen decoder made of a text of S tokens.

    Attributes:
        layers: for each layer keys and values (S, heads, width).
        states: the mean of its tokens' hidden states, without the first token's: float32 (layers + 1, width); empty for a
            model that gives none.
    """

    layers: Sequence[tuple[torch.Tensor, torch.Tensor]]
    states: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.states.nbytes + sum(one.nbytes for layer in self.layers for one in layer)


class TextsLayer(DynamicLayer):
    """A layer's keys and values of texts, one for each row of a batch, which the row has before its own.

    Rows are padded on the right, as `rows_behind` has them masked. What a batch adds is handed back and not kept, and memory
    holds one layer's padded keys and values at a time.
    """

    def __init__(self, readings: Sequence[Reading], number: int, length: int) -> None:
        super().__init__()
        # Rows that all have one text read it where it lies.
        readings = readings[:1] if all(reading is readings[0] for reading in readings) else readings
        self._texts = tuple([reading.layers[number][which] for reading in readings] for which in (0, 1))
        self._length = length
        [first, *_], _ = self._texts
        self.dtype, self.device, self.is_initialized = first.dtype, first.device, True

    def get_seq_length(self) -> int:
        """Of the longest text."""
        return self._length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The texts' keys and values before these, in each row."""
        keys, values = (pad_sequence(texts, batch_first=True).transpose(1, 2) for texts in self._texts)
        return joined(keys, key_states), joined(values, value_states)


class Readings:
    """Texts that a model has read, each once: a decoder's keys and values of what stands before a question, and an
    encoder's last hidden states of a prompt.

    >>> readings = Readings("1GiB")
    >>> scorer = Scorer(model, tokenizer, readings)
    >>> scorer.score(scorer.questions(task.wordings(rows)))  # reads the rows' texts
    >>> scorer.score(scorer.questions(task.wordings(rows, template=1)))  # asks what they left

    They are of the base model, so they serve whatever does not change it: the untrained model, and adapters that act from
    the question on (`IA3Config.acts_from`), before, during and after their training. Rows of other adapters go through the
    model whole. Where a model does not go on from keys and values exactly, which a trial finds out, all rows do.

    Args:
        memory: bytes that they take at most, or such as "512MB" or "2GiB", but one text is always kept; texts that do not fit are read
            again. The base model's weights have to stay as they are.

    Attributes:
        memory: in bytes.
        nbytes: bytes that the texts take that are kept.
        read: how many texts have been read so far, those that were read again counted again.

    Raises:
        InputError: no amount of memory.
    """

    def __init__(self, memory: int | str = MEMORY) -> None:
        self.memory = parse_bytes(memory, "memory for readings")
        self.nbytes = self.read = 0
        self._base: nn.Module | None = None
        self._token_bytes = self._text_bytes = 0
        self._kept: OrderedDict[Text, Reading | Encoded] = OrderedDict()

    def __len__(self) -> int:
        """How many texts are kept."""
        return len(self._kept)

    def clear(self) -> None:
        """Let go of all texts."""
        self._kept.clear()
        self.nbytes = 0

    def batches(
        self, family: Family, questions: Sequence[Question], batch_tokens: int, training: bool = False
    ) -> Iterator[tuple[list[int], Batch]]:
        """Questions of `askable` in batches of rows that go on from their texts: indices, and the batch.

        Texts are read as their turn comes, as many as the memory holds.
        """
        for group, readings in self._divided(family, questions, batch_tokens, training):
            yield group, rows_behind(family, [questions[i] for i in group], readings)

    def states(
        self, family: Family, questions: Sequence[Question], batch_tokens: int
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """The states of questions of `askable`, as `whole_states` gives them."""
        device = device_of(family.model)
        for group, readings in self._divided(family, questions, batch_tokens):
            states = torch.stack([one.states for one in readings])
            if not family.has_encoder:
                rows = to_device(rows_behind(family, [questions[i] for i in group], readings), device)
                states = torch.cat([states, last_states(family, rows)], dim=1)
            yield group, states

    def _divided(
        self, family: Family, questions: Sequence[Question], batch_tokens: int, training: bool = False
    ) -> Iterator[tuple[list[int], list[Reading | Encoded]]]:
        """Questions, as indices, that go through the model at once, and the readings of their texts."""
        self._own(family)
        for part in self._fitting(family, questions):
            readings = self._have(family, [questions[i].text for i in part])
            some = [questions[i] for i in part]
            divided = _divided(family, some, batch_tokens, training)
            for group in reversed(divided) if training else divided:
                yield [part[i] for i in group], [readings[some[i].text] for i in group]

    def foresee(self, family: Family, questions: Sequence[Question]) -> None:
        """Read the texts of questions of `askable` that memory holds at once, in fewer passes than as their turn comes."""
        self._own(family)
        part = next(self._fitting(family, questions))
        self._have(family, [questions[i].text for i in part])

    def _own(self, family: Family) -> None:
        """Let go of another model's texts."""
        if self._base is not family.base:
            self.clear()
            self._base, self._token_bytes, self._text_bytes = family.base, 0, 0

    def exact(self, family: Family, questions: Sequence[Question]) -> bool:
        """Whether rows that go on from texts are exact for all of these questions."""
        verdicts = verdicts_of(family, "behind texts")

        def size(question: Question) -> Size:
            return question.read, *size_of(question.behind(question.read))

        def is_exact(question: Question) -> bool | None:
            # Beside it a row with another text, half as long, and a decoder's one token to ask with.
            moved = replace(question, prompt=[*question.text[: question.read // 2 + 1], question.prompt[-1]])
            moved = replace(moved, read=len(moved.prompt) - (0 if family.has_encoder else 1))
            found = read_texts(family, list(dict.fromkeys([question.text, moved.text])))
            if found is None:
                return False
            return is_exact_behind(
                family, lambda asked: rows_behind(family, asked, [found[one.text] for one in asked]), question, moved
            )

        return judged(verdicts, questions, size, family.max_length, is_exact)

    def _fitting(self, family: Family, questions: Sequence[Question]) -> Iterator[list[int]]:
        """Questions, as indices, in parts whose texts the memory holds at once; those of one text together."""
        by_text: dict[Text, list[int]] = {}
        for index, question in enumerate(questions):
            by_text.setdefault(question.text, []).append(index)
        groups = [*by_text.values()]
        for part in self.parts(family, [[text] for text in by_text]):
            yield [index for i in part for index in groups[i]]

    def parts(self, family: Family, groups: Sequence[Collection[Text]]) -> Iterator[list[int]]:
        """Groups of texts that are needed together, as indices, in parts whose texts the memory holds at once.

        A group that it does not hold is in a part without other texts.
        """
        self._learn(family, [text for texts in groups for text in texts])

        def place(index: int) -> Any:
            # What is there comes first; then neighbours are of one length, for they are padded least, and of one text.
            texts = sorted({*groups[index]})
            return not self._kept.keys() >= {*texts}, -sum(map(len, texts)), texts

        part: list[int] = []
        held: set[Text] = set()
        filled = 0
        for index in sorted(range(len(groups)), key=place):
            texts = {*groups[index]}
            more = sum(map(self._bytes, texts - held))
            if part and more and filled + more > self.memory:
                yield part
                part, held, filled = [], set(), 0
                more = sum(map(self._bytes, texts))
            part.append(index)
            held |= texts
            filled += more
        if part:
            yield part

    def _learn(self, family: Family, texts: Sequence[Text]) -> None:
        """Find out how much a token takes, by the shortest of the texts."""
        self._own(family)
        if texts and not self._token_bytes:
            self._have(family, [min(texts, key=len)])

    def _bytes(self, text: Text) -> int:
        """What a text takes."""
        return self._text_bytes + self._token_bytes * len(text)

    def _have(self, family: Family, texts: Sequence[Text]) -> dict[Text, Reading | Encoded]:
        """The readings of texts, which fit at once: those that are kept, and the others read now in place of the oldest."""
        found = {text: self._kept[text] for text in texts if text in self._kept}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        for text in found:
            self._kept.move_to_end(text)
        needed = sum(map(self._bytes, missing))
        while self.nbytes + needed > self.memory and len(self._kept) > len(found):
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        fresh = read_texts(family, missing) if missing else {}
        assert fresh is not None  # or `exact` had said so
        for text, reading in fresh.items():
            self._text_bytes = reading.states.nbytes
            self._token_bytes = -(-(reading.nbytes - self._text_bytes) // len(text))
            self._kept[text] = reading
        self.nbytes += sum(reading.nbytes for reading in fresh.values())
        self.read += len(fresh)
        return found | fresh


def askable(family: Family, questions: Sequence[Question]) -> list[bool]:
    """Which questions are asked of what the frozen model made of their texts: nothing else acts on these."""
    if not family.reads_answers or not may_continue(family):
        return [False] * len(questions)
    adapted = find_adapted(family.model)
    known: dict[str | None, bool] = {None: True, BASE: adapted is None or not adapted.ia3_routing.merged}
    if adapted is None:
        # Another library's adapters act on texts too; and what is trained of a model itself changes what it reads.
        learns = family.model.training and torch.is_grad_enabled()
        known[None] = family.base is inside_wrappers(family.model) and not learns
    else:
        routing = adapted.ia3_routing
        for name in {question.adapter for question in questions} - {BASE}:
            acting = () if not routing.enabled else routing.active if name is None else (name,)
            known[name] = not routing.merged and (not acting or adapted.waits_for_question(acting))
    return [known[question.adapter] and question.read >= _LEAST for question in questions]


def read_texts(family: Family, texts: Sequence[Text]) -> dict[Text, Reading | Encoded] | None:
    """What the frozen model makes of texts, several a pass.

    Args:
        family: of the model, adapted or not.
        texts: that differ.

    Returns:
        None for a decoder that keeps no keys and values.
    """
    with evaluating(family.model), frozen(family.model), torch.no_grad():
        if isinstance(family, EncoderDecoder):
            return {**family.encoded(texts)}
        assert isinstance(family, Decoder)
        return _read(family, texts)


def _read(family: Decoder, texts: Sequence[Text]) -> dict[Text, Reading | Encoded] | None:
    """`read_texts` of a decoder. What all texts begin with, such as an instruction, is read once."""
    found: dict[Text, Reading | Encoded] = {}
    device = device_of(family.model)
    size = common_tokens([list(text) for text in texts])
    size = size if pays(size, len(texts)) else 0
    start, before = DynamicCache(), torch.tensor(0.0)
    if size:
        output = fill(family, start, torch.tensor([texts[0][:size]], device=device), output_hidden_states=True)
        if output is None:
            return None
        before = total(output.hidden_states or (), 0, 1, size)
    for group in groups_of_sizes([(len(text) - size, 0) for text in texts], pass_tokens(family.model)):
        # Without a mask: no token sees the padding behind it, and attention is faster so.
        ids, _ = padded([texts[i][size:] for i in group], family.pad_token_id)
        cache = continued(start, len(group))
        output = fill(family, cache, ids.to(device), output_hidden_states=True)
        if output is None:
            return None
        states = output.hidden_states or ()  # some models give none, which only a head minds
        for row, index in enumerate(group):
            length = len(texts[index])
            kept = [
                [one[row, :, :length].transpose(0, 1).clone() for one in (layer.keys, layer.values)]  # type: ignore[index,union-attr]
                for layer in cache.layers
            ]
            first = telling(length)
            mean = (before + total(states, row, 0 if size else first, length - size)) / (length - first)
            found[texts[index]] = Reading([(keys, values) for keys, values in kept], mean)
    return found


def _divided(family: Family, questions: Sequence[Question], batch_tokens: int, training: bool) -> list[list[int]]:
    """Indices of questions, in groups for one batch of `rows_behind` each."""
    if family.has_encoder:
        sizes = [
            (-(-prompt // _STATES), 2 * tree + 1 if training else tree) for prompt, tree in map(sizes_of, questions)
        ]
        return list(groups_of_sizes(sizes, batch_tokens))
    tails = [question.behind(question.read) for question in questions]
    room = room_behind(max(question.read for question in questions), max(map(row_length, tails)), batch_tokens)
    return list((training_groups if training else groups)(tails, room))


def rows_behind(family: Family, questions: Sequence[Question], readings: Sequence[Any]) -> Batch:
    """A batch whose rows go on from the readings of their own texts.

    A decoder's rows are packed (see `packed_behind`), an encoder-decoder's in the layout that is exact for its model.
    """
    if isinstance(family, EncoderDecoder):
        return family.behind(collate(family, questions), readings)
    assert isinstance(family, Decoder)
    sizes = [question.read for question in questions]
    cache = DynamicCache()
    layers: Any = [TextsLayer(readings, number, max(sizes)) for number in range(len(readings[0].layers))]
    cache.layers = layers
    return packed_behind(family, [question.behind(question.read) for question in questions], cache, sizes)
