"""A thread beside the event loop that renders and tokenizes: `Worker`."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ia3.serve.limits import turn_of

_Result = TypeVar("_Result")


class Worker:
    """A single thread, because tokenizers are not thread-safe. Work for short texts goes before long ones.

    Args:
        bounds: makes a context manager around each piece of work, from a function that raises if the caller no longer
            waits for the result.
    """

    def __init__(self, bounds: Callable[[Callable[[], None]], Any]) -> None:
        self._bounds = bounds
        self._waiting: queue.PriorityQueue[tuple[float, int, Callable[[], None] | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        threading.Thread(target=self._work, name="ia3-tokens", daemon=True).start()

    async def call(self, characters: int, function: Callable[..., _Result], *args: Any) -> _Result:
        """Call a function on the thread. If the awaiting task is cancelled, the function ends at its next checkpoint or
        does not begin.

        Args:
            characters: the number of characters of its texts.
            function: a function that may block.
            *args: its arguments.
        """
        future: Future[_Result] = Future()
        left = threading.Event()

        def check() -> None:
            if left.is_set():
                raise asyncio.CancelledError

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    with self._bounds(check):
                        check()
                        result = function(*args)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)

        self._waiting.put((turn_of(characters=characters), next(self._numbers), run))
        try:
            return await asyncio.wrap_future(future)
        finally:
            left.set()

    @property
    def waiting(self) -> int:
        """The number of calls that have not begun."""
        return self._waiting.qsize()

    def stop(self) -> None:
        """End the thread after its current call."""
        self._waiting.put((-1.0, next(self._numbers), None))

    def _work(self) -> None:
        while True:
            run = self._waiting.get()[2]
            if run is None:
                return
            run()
            del run  # and all objects that it holds
