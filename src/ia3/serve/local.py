"""One model in this process: `LocalEngine`, whose thread mixes the requests of different adapters in its batches."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ia3.errors import InputError
from ia3.serve.engine import AdapterFailed, GenerateJob, Piece, ScoreJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.bank import AdapterBank
    from ia3.config import IA3Config
    from ia3.model import IA3Model
    from ia3.serve.generation import Decoder, Text
    from ia3.tfew.choices import Question
    from ia3.tfew.recipe import Recipe
    from ia3.tfew.task import Row, Task

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

# From so many candidates for each row of a batch, those of similar length are chosen.
_LOOK_AHEAD = 2

# A prompt of so many tokens is tried at the start, so that the first request does not wait for it (`choices.collate`).
_TRIED_TOKENS = 256


class _Call:
    """The jobs of one call of `score`."""

    def __init__(self, jobs: Sequence[ScoreJob]) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[list[list[float]]] = self.loop.create_future()
        self.cancelled = False
        self._results: list[list[float]] = [[]] * len(jobs)
        self._left = len(jobs)

    def give(self, index: int, scores: list[float]) -> None:
        self._results[index] = scores
        self._left -= 1
        if not self._left:
            _settle(self.loop, self.future, self._results)

    def fail(self, error: Exception) -> None:
        self.cancelled = True  # its other jobs are in vain
        _settle(self.loop, self.future, error)


class _Asked:
    """A job that waits for its batch."""

    def __init__(self, call: _Call, index: int, job: ScoreJob) -> None:
        from ia3.tfew.choices import sizes_of

        self.call, self.index, self.job = call, index, job
        self.sizes = sizes_of(job.question)


class LocalEngine:
    """See `Engine`. One thread owns the model: it alternates between a batch of questions and a token of each text.

    Args:
        model: the base's name, as `load_base` takes it.
        kinds: adapters' configs; the first that fits the model says which modules all adapters of this engine rescale.
            None of them: as `ia3 train` chooses.
        name: as it is served; None: `model`.
        labels: gives those of a classifier's head; called on the engine's thread.
        memory: for adapters' vectors, in bytes or such as "2GiB"; the least recently used make room. None: no limit.
        batch: rows of a batch at most.
        batch_tokens: tokens of a batch at most, padding included.
    """

    def __init__(
        self,
        model: str,
        kinds: Iterable[IA3Config] = (),
        name: str | None = None,
        labels: Callable[[], Sequence[str] | None] = lambda: None,
        memory: int | str | None = None,
        batch: int = 64,
        batch_tokens: int = 4096,
    ) -> None:
        self.name = name or model
        self._source = model
        self.tokenizer: PreTrainedTokenizerBase
        self.context_length: int | None = None
        self.generates = False
        self.observe: Callable[[str, int, int], None] = lambda kind, rows, adapters: None
        self._kinds, self._labels, self._memory = list(kinds), labels, memory
        self._batch, self._batch_tokens = batch, batch_tokens
        self._model: IA3Model
        self._bank: AdapterBank | None = None
        self._decoder: Decoder | None = None
        self._thread: threading.Thread | None = None
        # What the thread has to do, under its condition.
        self._changed = threading.Condition()
        self._orders: deque[Callable[[], None]] = deque()
        self._asked: deque[_Asked] = deque()
        self._texts: deque[Text] = deque()
        self._stopping = False

    # On the event loop.

    async def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="ia3-model", daemon=True)
        loaded = asyncio.ensure_future(self._order(self._load))
        self._thread.start()
        await loaded

    async def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        if self._bank is not None:
            self._bank.close()

    def questions(self, task: Task, rows: Sequence[Row], recipe: Recipe) -> list[Question]:
        return task.questions(self.tokenizer, rows, False, self._model, 0, recipe.long_prompts)

    async def score(self, jobs: Sequence[ScoreJob]) -> list[list[float]]:
        if not jobs:
            return []
        call = _Call(jobs)
        asked = [_Asked(call, index, job) for index, job in enumerate(jobs)]
        with self._changed:
            self._asked.extend(asked)
            self._changed.notify()
        try:
            return await call.future
        finally:
            call.cancelled = True

    async def generate(self, job: GenerateJob) -> AsyncIterator[Piece]:
        from ia3.serve.generation import Text

        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        text = Text(job, lambda piece: _call_on(loop, pieces.put_nowait, piece))
        with self._changed:
            self._texts.append(text)
            self._changed.notify()
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            text.cancelled = True

    async def add(self, key: str, folder: str, check: bool) -> None:
        await self._order(lambda: self._bank_of().load(folder, key) if check else self._bank_of().link(folder, key))

    async def keep(self, key: str) -> None:
        await self._order(lambda: self._bank_of().pin(key))

    async def drop(self, key: str) -> None:
        await self._order(lambda: self._bank_of().delete(key))

    def statistics(self) -> dict[str, Any]:
        if self._bank is None:
            return {}
        found = self._bank.statistics
        return {name: getattr(found, name) for name in ("resident", "hits", "misses", "evictions")}

    async def _order(self, function: Callable[[], _Result]) -> _Result:
        """Have the thread call a function, between batches."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Result] = loop.create_future()

        def run() -> None:
            try:
                _settle(loop, future, function())
            except Exception as error:
                _settle(loop, future, error)

        with self._changed:
            self._orders.append(run)
            self._changed.notify()
        return await future

    # On the thread.

    def _load(self) -> None:
        from ia3.bank import AdapterBank
        from ia3.config import IA3Config
        from ia3.model import IA3Model
        from ia3.pretrained import load_base, task_type
        from ia3.rows import BASE
        from ia3.serve.generation import Decoder
        from ia3.tfew.choices import Question, model_max_length, score_questions

        base, self.tokenizer = load_base(self._source, self._labels())
        family = task_type(base)
        self._model = IA3Model(base, {}).eval()
        kinds = [*self._kinds, IA3Config(task_type=family)]
        for number, kind in enumerate(kinds):
            try:
                self._bank = AdapterBank(self._model, kind, budget=self._memory)
                break
            except InputError:
                if number == len(kinds) - 1:
                    raise
        capacity = self._bank_of().statistics.capacity
        self._batch = self._batch if capacity is None else min(self._batch, capacity)
        self.context_length = model_max_length(base)
        self.generates = family == "CAUSAL_LM" and hasattr(self.tokenizer, "backend_tokenizer")
        if self.generates:
            self._decoder = Decoder(self._model, self.tokenizer, self.observe)
            size = min(_TRIED_TOKENS, (self.context_length or _TRIED_TOKENS) - 2)
            trial = Question([i % len(self.tokenizer) for i in range(size)], [[0, 1], [1, 0]])
            score_questions(self._model, self.tokenizer, [trial], adapter_names=[BASE])

    def _bank_of(self) -> AdapterBank:
        assert self._bank is not None  # orders come after `start`
        return self._bank

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._orders or self._asked or self._texts or self._running() or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    return
                orders = [self._orders.popleft() for _ in range(len(self._orders))]
            for order in orders:
                order()
            batch = self._next_batch()
            if batch:
                self._answer(batch, self._score)
            texts = self._next_texts()
            if texts:
                self._answer(texts, self._begin)
            if self._running():
                self._step()

    def _running(self) -> int:
        return 0 if self._decoder is None else self._decoder.running

    def _next_batch(self) -> list[_Asked]:
        """The question that has waited longest, and others of similar length."""
        from ia3.tfew.choices import batches_of_sizes

        with self._changed:
            while self._asked and self._asked[0].call.cancelled:
                self._asked.popleft()
            waiting: list[_Asked] = []
            for asked in self._asked:
                if not asked.call.cancelled:
                    waiting.append(asked)
                if len(waiting) == _LOOK_AHEAD * self._batch:
                    break
        if not waiting:
            return []
        groups = batches_of_sizes([asked.sizes for asked in waiting], self._batch_tokens)
        chosen = sorted(next(group for group in groups if 0 in group))[: self._batch]
        batch = [waiting[index] for index in chosen]
        taken = set(map(id, batch))
        with self._changed:
            # Others may have been added meanwhile, at the end.
            self._asked = deque(asked for asked in self._asked if id(asked) not in taken and not asked.call.cancelled)
        return batch

    def _next_texts(self) -> list[Text]:
        with self._changed:
            texts, tokens = [], 0
            while self._texts and self._running() + len(texts) < self._batch:
                text = self._texts[0]
                tokens += len(text.job.prompt)
                if texts and tokens > self._batch_tokens:
                    break
                self._texts.popleft()
                if not text.cancelled:
                    texts.append(text)
            return texts

    def _answer(self, batch: list[Any], answer: Callable[[list[Any]], None]) -> None:
        """Answer a batch; when that fails, each by itself, so that one broken adapter is the others' no trouble."""
        from ia3.rows import BASE

        try:
            answer(batch)
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    if isinstance(one, _Asked) or not one.begun:
                        self._answer([one], answer)
                return
            fail = batch[0].call.fail if isinstance(batch[0], _Asked) else batch[0].tell
            try:
                self._bank_of().gather([batch[0].job.adapter or BASE])
            except InputError as its:
                fail(AdapterFailed(str(its)))
            else:
                fail(error)

    def _score(self, batch: list[_Asked]) -> None:
        from ia3.rows import BASE
        from ia3.tfew.choices import score_questions

        questions = [asked.job.question for asked in batch]
        names = [asked.job.adapter or BASE for asked in batch]
        # Sums, because jobs may differ in how they are normalized.
        sums = score_questions(self._model, self.tokenizer, questions, 0.0, self._batch_tokens, adapter_names=names)
        self.observe("score", len(batch), len(set(names)))
        for asked, found in zip(batch, sums, strict=True):
            question, power = asked.job.question, asked.job.length_normalization
            asked.call.give(
                asked.index,
                [float(found[question.listed(i)]) / len(choice) ** power for i, choice in enumerate(question.choices)],
            )

    def _begin(self, texts: list[Text]) -> None:
        assert self._decoder is not None  # the server asks no other model
        self._decoder.begin(texts)

    def _step(self) -> None:
        assert self._decoder is not None
        try:
            self._decoder.step()
        except Exception as error:
            logger.exception("A step of %d texts failed", self._decoder.running)
            self._decoder.fail(error)


def _settle(loop: asyncio.AbstractEventLoop, future: asyncio.Future, result: Any) -> None:
    """Give a future its result or error, from another thread; whoever waited may be gone."""

    def settle() -> None:
        if not future.done():
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

    _call_on(loop, settle)


def _call_on(loop: asyncio.AbstractEventLoop, function: Callable, *args: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *args)
