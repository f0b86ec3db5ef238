"""One model in this process: `LocalEngine`, whose thread mixes the requests of different adapters in its batches."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from heapq import nsmallest
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ia3.errors import InputError, reason
from ia3.serve.engine import GenerateJob, Piece, ScoreJob, normalized
from ia3.serve.limits import turn_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.adapter.config import IA3Config
    from ia3.adapter.model import IA3Model
    from ia3.bank import AdapterBank
    from ia3.scoring.question import Question
    from ia3.scoring.scorer import Scorer
    from ia3.serve.generation import Decoder, Text
    from ia3.task.wording import Wording
    from ia3.training.recipe import Recipe

_Result = TypeVar("_Result")

# From so many candidates for each row of a batch, those of similar length are chosen.
_LOOK_AHEAD = 2

# A prompt of so many tokens is tried at the start, so that the first request does not wait for it (see `trials`).
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
        from ia3.scoring.question import sizes_of

        self.call, self.index, self.job = call, index, job
        self.sizes = sizes_of(job.question)
        self.turn = turn_of(tokens=sum(self.sizes))

    @property
    def cancelled(self) -> bool:
        return self.call.cancelled


_Item = TypeVar("_Item", "_Asked", "Text")


class Waiting(NamedTuple):
    """How much waits for an engine's thread.

    Attributes:
        orders: functions to call between two batches.
        questions: to be scored.
        texts: to be begun.
    """

    orders: int
    questions: int
    texts: int


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
        batch_tokens: tokens of what is asked together at most, padding included; see `pass_tokens` for what goes through
            the model at once.
        cache_tokens: tokens at most, padding included, whose keys and values are kept for texts under way; one text
            may have more.
        dtype: of the model's weights, as `load_base` takes it.

    Attributes:
        batch: rows of a batch at most; fewer than asked for where the bank has less room.
        decoder: continues texts, once `start` is done; None where the model continues none.
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
        cache_tokens: int = 65_536,
        dtype: str = "auto",
    ) -> None:
        self.name = name or model
        self._source, self._dtype = model, dtype
        self.tokenizer: PreTrainedTokenizerBase
        self.context_length: int | None = None
        self.generates = False
        self.observe: Callable[[str, int, int], None] = lambda kind, rows, adapters: None
        self.on_end: Callable[[BaseException], None] = lambda error: None
        self._kinds, self._labels, self._memory = list(kinds), labels, memory
        self.batch, self._batch_tokens, self._cache_tokens = batch, batch_tokens, cache_tokens
        self._model: IA3Model
        self._scorer: Scorer
        self._bank: AdapterBank | None = None
        self.decoder: Decoder | None = None
        self._thread: threading.Thread | None = None
        # What the thread has to do, under its condition.
        self._changed = threading.Condition()
        self._orders: deque[Callable[[], None]] = deque()
        self._asked: deque[_Asked] = deque()
        self._texts: deque[Text] = deque()
        self._stopping = False
        # On the event loop: what to call when the thread ends by an error, and that error.
        self._waiting: set[Callable[[BaseException], None]] = set()
        self._error: BaseException | None = None

    @property
    def bank(self) -> AdapterBank:
        """The adapters, once `start` is done."""
        assert self._bank is not None
        return self._bank

    @property
    def running(self) -> int:
        """How many texts are under way."""
        return 0 if self.decoder is None else self.decoder.running

    @property
    def waiting(self) -> Waiting:
        """How much waits for the thread."""
        return Waiting(len(self._orders), len(self._asked), len(self._texts))

    # On the event loop.

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="ia3-model", daemon=True)
        loaded = asyncio.ensure_future(self.between_batches(self._load))
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

    def questions(self, wordings: Sequence[Wording], recipe: Recipe) -> list[Question]:
        return self._scorer.questions(wordings, False, recipe.long_prompts)

    async def score(self, jobs: Sequence[ScoreJob]) -> list[list[float]]:
        if not jobs:
            return []
        call = _Call(jobs)
        asked = [_Asked(call, index, job) for index, job in enumerate(jobs)]
        try:
            with self._answered(lambda error: _set(call.future, error)):
                with self._changed:
                    self._asked.extend(asked)
                    self._changed.notify()
                return await call.future
        finally:
            call.cancelled = True

    async def generate(self, job: GenerateJob) -> AsyncIterator[Piece]:
        from ia3.serve.generation import Text

        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        text = Text(job, lambda piece: _call_on(loop, pieces.put_nowait, piece))
        try:
            with self._answered(pieces.put_nowait):
                with self._changed:
                    self._texts.append(text)
                    self._changed.notify()
                while True:
                    piece = await pieces.get()
                    if isinstance(piece, BaseException):
                        raise piece
                    yield piece
                    if piece.finish is not None:
                        return
        finally:
            text.cancelled = True

    async def add(self, key: str, folder: str, check: bool) -> None:
        def read() -> None:
            try:
                bank = self.bank
                bank.load(folder, key) if check else bank.link(folder, key)
            except InputError:
                raise
            except Exception as error:  # a file that may not be read, JSON that is too deep
                raise InputError(f"This adapter cannot be read: {reason(error)}.") from error

        await self.between_batches(read)

    async def keep(self, keys: Sequence[str], change: Callable[[], None]) -> None:
        def changed() -> None:
            for key in keys:
                with contextlib.suppress(Exception):  # what cannot be read now never could
                    self.bank.gather([key])
            # From here on, the bank saves what it has to evict: its folder holds it no more.
            change()

        await self.between_batches(changed)

    async def drop(self, key: str) -> None:
        await self.between_batches(lambda: self.bank.delete(key))

    def statistics(self) -> dict[str, Any]:
        if self._bank is None:
            return {}
        found = self._bank.statistics
        return {name: getattr(found, name) for name in ("resident", "hits", "misses", "evictions")}

    async def between_batches(self, function: Callable[[], _Result]) -> _Result:
        """What a function gives that the model's thread calls between two batches."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Result] = loop.create_future()

        def run() -> None:
            try:
                _settle(loop, future, function())
            except Exception as error:
                _settle(loop, future, error)

        with self._answered(lambda error: _set(future, error)):
            with self._changed:
                self._orders.append(run)
                self._changed.notify()
            return await future

    @contextlib.contextmanager
    def _answered(self, fail: Callable[[BaseException], None]) -> Iterator[None]:
        """Within `with`, someone waits for the thread, and is told when it ends by an error."""
        if self._error is not None:
            raise self._error
        self._waiting.add(fail)
        try:
            yield
        finally:
            self._waiting.discard(fail)

    def _ended(self, error: BaseException) -> None:
        self._error = error
        for fail in list(self._waiting):
            fail(error)
        self.on_end(error)

    # On the thread.

    def _load(self) -> None:
        from ia3.adapter.config import IA3Config
        from ia3.adapter.model import IA3Model
        from ia3.adapter.pretrained import load_base, task_type
        from ia3.adapter.rows import BASE
        from ia3.bank import AdapterBank
        from ia3.scoring.question import Question
        from ia3.scoring.scorer import Scorer
        from ia3.serve.generation import Decoder

        base, self.tokenizer = load_base(self._source, self._labels(), self._dtype)
        family = task_type(base)
        self._model = IA3Model(base, {}).eval()
        self._scorer = Scorer(self._model, self.tokenizer)
        kinds = [*self._kinds, IA3Config(task_type=family)]
        for number, kind in enumerate(kinds):
            try:
                self._bank = AdapterBank(self._model, kind, budget=self._memory)
                break
            except InputError:
                if number == len(kinds) - 1:
                    raise
        capacity = self.bank.statistics.capacity
        self.batch = self.batch if capacity is None else min(self.batch, capacity)
        self.context_length = self._scorer.max_length
        self.generates = family == "CAUSAL_LM" and hasattr(self.tokenizer, "backend_tokenizer")
        if self.generates:
            self.decoder = Decoder(self._model, self.tokenizer, self.observe)
            size = min(_TRIED_TOKENS, (self.context_length or _TRIED_TOKENS) - 2)
            trial = Question([i % len(self.tokenizer) for i in range(size)], [[0, 1], [1, 0]])
            self._scorer.score([trial], adapter_names=[BASE])

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._work()
        except BaseException as error:
            _call_on(loop, self._ended, error)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._orders or self._asked or self._texts or self.running or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    return
                orders = [self._orders.popleft() for _ in range(len(self._orders))]
            for order in orders:
                order()
            batch = self._next_batch()
            if batch:
                self._answer(batch)
            if self.decoder is not None:
                self.decoder.begin(self._next_texts(self.decoder))
                if self.decoder.running:
                    self.decoder.step()

    def _next_batch(self) -> list[_Asked]:
        return self._out_of(self._asked, self._first(self._asked, self.batch))

    def _next_texts(self, decoder: Decoder) -> list[Text]:
        """Those for which there is room beside the texts under way; of one alone there is nothing to wait for."""
        texts: list[Text] = []
        for text in self._first(self._texts, self.batch - decoder.running):
            if (texts or decoder.running) and decoder.columns([*texts, text]) > self._cache_tokens:
                break
            texts.append(text)
        return self._out_of(self._texts, texts)

    def _first(self, queue: deque[_Item], most: int) -> list[_Item]:
        """What comes next (see `turn_of`), and others of similar length, in their order."""
        from ia3.scoring.batch import groups_of_sizes

        with self._changed:
            left = (one for one in queue if not one.cancelled)
            waiting = nsmallest(_LOOK_AHEAD * self.batch, left, key=lambda one: one.turn)
        if not waiting or most < 1:
            return []
        groups = groups_of_sizes([one.sizes for one in waiting], self._batch_tokens)
        chosen = sorted(next(group for group in groups if 0 in group))[:most]
        return [waiting[index] for index in chosen]

    def _out_of(self, queue: deque[_Item], taken: list[_Item]) -> list[_Item]:
        """Take these, and all that nobody waits for any more, out of a queue, to which others may have been added."""
        its = set(map(id, taken))
        with self._changed:
            kept = [one for one in queue if id(one) not in its and not one.cancelled]
            queue.clear()
            queue.extend(kept)
        return taken

    def _answer(self, batch: list[_Asked]) -> None:
        """Answer a batch; when that fails, each by itself, so that one broken adapter is the others' no trouble."""
        from ia3.serve.generation import adapter_failure

        try:
            self._score(batch)
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    self._answer([one])
            else:
                batch[0].call.fail(adapter_failure(self.bank, batch[0].job.adapter) or error)

    def _score(self, batch: list[_Asked]) -> None:
        from ia3.adapter.rows import BASE

        questions = [asked.job.question for asked in batch]
        names = [asked.job.adapter or BASE for asked in batch]
        # Sums, because jobs may differ in how they are normalized.
        sums = self._scorer.score(questions, 0.0, adapter_names=names)
        self.observe("score", len(batch), len(set(names)))
        results = []
        for asked, found in zip(batch, sums, strict=True):
            question, power = asked.job.question, asked.job.length_normalization
            lengths = question.as_listed(map(len, question.choices))
            results.append([normalized(*each, power) for each in zip(found.tolist(), lengths, strict=True)])
        # Only now: had one failed, all would be asked once more.
        for asked, result in zip(batch, results, strict=True):
            asked.call.give(asked.index, result)


def _settle(loop: asyncio.AbstractEventLoop, future: asyncio.Future, result: Any) -> None:
    """Give a future its result or error, from another thread."""
    _call_on(loop, _set, future, result)


def _set(future: asyncio.Future, result: Any) -> None:
    if not future.done():  # whoever waited may be gone
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)


def _call_on(loop: asyncio.AbstractEventLoop, function: Callable, *args: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *args)
