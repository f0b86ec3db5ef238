"""The engine in this process: `LocalEngine`. Its thread mixes requests for different adapters in its batches."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from heapq import nsmallest
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ia3.errors import InputError, reason
from ia3.serve.engine import GenerateJob, Piece, ScoreJob
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

# Candidates per row of a batch. Those of similar length are chosen.
_LOOK_AHEAD = 2

# Tokens of a prompt to test at the start, so that the first request does not wait for the test (see `trials`).
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
        self.cancelled = True  # its other jobs are useless now
        _settle(self.loop, self.future, error)


class _Asked:
    """A waiting job."""

    def __init__(self, call: _Call, index: int, job: ScoreJob) -> None:
        from ia3.scoring.question import sizes_of

        self.call, self.index, self.job = call, index, job
        self.sizes = sizes_of(job.question)
        self.text = job.question.text
        self.turn = turn_of(tokens=sum(self.sizes))

    @property
    def cancelled(self) -> bool:
        return self.call.cancelled


_Item = TypeVar("_Item", "_Asked", "Text")


class Waiting(NamedTuple):
    """The numbers of items that wait for an engine's thread.

    Attributes:
        orders: functions to call between two batches.
        questions: questions to score.
        texts: texts to start.
    """

    orders: int
    questions: int
    texts: int


class LocalEngine:
    """See `Engine`. One thread owns the model: it alternates between a batch of questions and a token of each text.

    Args:
        model: the base model's name, as `load_base` takes it.
        kinds: adapters' configs; the first that fits the model decides which modules all adapters of this engine
            rescale. If none fits, the default modules.
        name: the served name; None: `model`.
        labels: returns the labels of an encoder's head; called on the engine's thread.
        memory: memory for adapters' vectors, in bytes or such as "2GiB"; the least recently used are evicted. None: no
            limit.
        batch: the maximum of rows in a batch.
        batch_tokens: the maximum of tokens of questions in a batch, padding included; `pass_tokens` limits a single
            pass.
        cache_tokens: the maximum of tokens in the key/value caches of running texts, padding included; a single text
            may have more.
        dtype: the type of the model's weights, as `load_base` takes it.

    Attributes:
        batch: the maximum of rows in a batch; less than requested if the bank has less room.
        decoder: generates texts, after `start`; None if the model cannot generate.
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
        self.source, self.dtype = model, dtype
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
        # The thread's work, guarded by its condition.
        self._changed = threading.Condition()
        self._orders: deque[Callable[[], None]] = deque()
        self._asked: deque[_Asked] = deque()
        self._texts: deque[Text] = deque()
        self._stopping = False
        # On the event loop: functions to call if an error ends the thread, and that error.
        self._waiting: set[Callable[[BaseException], None]] = set()
        self._error: BaseException | None = None

    @property
    def bank(self) -> AdapterBank:
        """The adapters, after `start`."""
        assert self._bank is not None
        return self._bank

    @property
    def running(self) -> int:
        """The number of running texts."""
        return 0 if self.decoder is None else self.decoder.running

    @property
    def waiting(self) -> Waiting:
        """The numbers of items that wait for the thread."""
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
            except Exception as error:  # an unreadable file, too deep JSON
                raise InputError(f"This adapter cannot be read: {reason(error)}.") from error

        await self.between_batches(read)

    async def keep(self, keys: Sequence[str], change: Callable[[], None]) -> None:
        def changed() -> None:
            for key in keys:
                with contextlib.suppress(Exception):  # an unreadable adapter could not be used before either
                    self.bank.gather([key])
            # From now on, the bank spills these adapters when it evicts them, because their folder is gone.
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
        """Call a function on the model's thread between two batches; return its result."""
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
        """Call `fail` if an error ends the thread during the `with` block."""
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

        base, self.tokenizer = load_base(
            self.source, self._labels(), self.dtype, next((one.task_type for one in self._kinds), None)
        )
        family = task_type(base)
        self._model = IA3Model(base, {}).eval()
        self._scorer = Scorer(self._model, self.tokenizer)
        kinds = [*self._kinds, IA3Config(task_type=family)]
        for number, kind in enumerate(kinds):
            try:
                # With columns for both kinds: adapters of either may be uploaded.
                kind = dataclasses.replace(kind, acts_from="start")
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
        batch = self._first(self._asked, self.batch)
        return self._out_of(self._asked, batch + self._about_the_same(batch)[: self.batch - len(batch)])

    def _about_the_same(self, batch: Sequence[_Asked]) -> list[_Asked]:
        """What waits and asks about texts that are read for a batch anyway: it costs the question alone."""
        texts = {one.text for one in batch if self._shares_text(one)}
        if not texts:
            return []
        taken = set(map(id, batch))
        with self._changed:
            waiting = [one for one in self._asked if one.text in texts and not one.cancelled]
        return [one for one in waiting if id(one) not in taken and self._shares_text(one)]

    def _shares_text(self, asked: _Asked) -> bool:
        """Whether its adapter leaves the text before the question as the base model reads it."""
        if not asked.text or asked.job.adapter is None:
            return bool(asked.text)
        try:
            return self.bank.acts_from(asked.job.adapter) == "question"
        except Exception:  # whoever asks the adapter will hear why
            return False

    def _next_texts(self, decoder: Decoder) -> list[Text]:
        """The texts that fit beside the running ones. If no text is running, one text always fits."""
        texts: list[Text] = []
        for text in self._first(self._texts, self.batch - decoder.running):
            if (texts or decoder.running) and decoder.columns([*texts, text]) > self._cache_tokens:
                break
            texts.append(text)
        return self._out_of(self._texts, texts)

    def _first(self, queue: deque[_Item], most: int) -> list[_Item]:
        """The next items (see `turn_of`): the first, and others of similar length, in order."""
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
        """Remove these and all cancelled items from a queue, to which others may have been added."""
        its = set(map(id, taken))
        with self._changed:
            kept = [one for one in queue if id(one) not in its and not one.cancelled]
            queue.clear()
            queue.extend(kept)
        return taken

    def _answer(self, batch: list[_Asked]) -> None:
        """Answer a batch. If that fails, answer each question separately, so that a broken adapter fails only its
        own."""
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
        from ia3.opinions.asking import heads_read, heads_say

        heads = [(asked, asked.job.head) for asked in batch if asked.job.head is not None]
        others = [asked for asked in batch if asked.job.head is None]
        names = [asked.job.adapter or BASE for asked in others]
        powers = [asked.job.length_normalization for asked in others]
        questions = self._scorer.named([asked.job.question for asked in others], names)
        scorer = self._scorer.keeping([*questions, *heads_read(head for _, head in heads)])
        results = scorer.score(questions, powers)
        found = [(asked, result.tolist()) for asked, result in zip(others, results, strict=True)]
        said = heads_say(scorer, [head for _, head in heads])
        found += [(asked, [*one.values()]) for (asked, _), one in zip(heads, said, strict=True)]
        self.observe("score", len(batch), len(set(names)))
        # Not earlier, because all questions are asked again if one fails.
        for asked, result in found:
            asked.call.give(asked.index, result)


def _settle(loop: asyncio.AbstractEventLoop, future: asyncio.Future, result: Any) -> None:
    """Set a future's result or error from another thread."""
    _call_on(loop, _set, future, result)


def _set(future: asyncio.Future, result: Any) -> None:
    if not future.done():  # the waiting task may be cancelled
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)


def _call_on(loop: asyncio.AbstractEventLoop, function: Callable, *args: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *args)
