"""One display for the progress of many workers: what each tells is told again here."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ia3.evaluation.progress import Progress, Stage

if TYPE_CHECKING:
    from ia3.evaluation.wordings import Ranked

# The number of the part that tells, what it does, and the arguments.
Event = tuple[int, str, tuple[Any, ...]]


class Board:
    """Keeps what workers tell until somebody takes it. It lives in an actor."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def add(self, *event: Any) -> None:
        """Add an event."""
        self._events.append(event)  # type: ignore[arg-type]

    def take(self) -> list[Event]:
        """The events since the last call."""
        taken, self._events = self._events, []
        return taken


class Told(Progress):
    """A worker's progress, told to a board.

    Args:
        board: the actor.
        part: the number of the part that the worker has.
    """

    def __init__(self, board: Any, part: int) -> None:
        self._board, self._part = board, part
        self._numbers = itertools.count()

    def tell(self, what: str, *arguments: Any) -> Any:
        """Tell an event without waiting; returns what Ray can wait for."""
        return self._board.add.remote(self._part, what, arguments)

    def heading(self, text: str) -> None:
        self.tell("say", text)

    def say(self, text: str) -> None:
        self.tell("say", text)

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        self.tell("say", text)
        yield

    def wordings(self, title: str, ranking: Sequence[Ranked], taken: int) -> None:
        self.tell("wordings", title, list(ranking), taken)

    def stage(self, title: str, total: int, done: int = 0) -> Stage:
        number = next(self._numbers)
        self.tell("stage", number, title, total, done)
        return _ToldStage(self, number)


class _ToldStage(Stage):
    def __init__(self, told: Told, number: int) -> None:
        self._told, self._number = told, number

    def advance(self, count: int) -> None:
        self._told.tell("advance", self._number, count)

    def reach(self, done: int) -> None:
        self._told.tell("reach", self._number, done)

    def note(self, text: str) -> None:
        self._told.tell("note", self._number, text)

    def end(self) -> None:
        self._told.tell("end", self._number)


class Together:
    """Tells a progress here what workers told a board.

    Args:
        progress: shows it.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._said: set[tuple[Any, ...]] = set()
        self._owners: dict[str, int] = {}
        self._titled: dict[tuple[int, str], Stage] = {}
        self._stages: dict[tuple[int, int], Stage] = {}

    def tell(self, events: Sequence[Event]) -> None:
        """Tell events in their order."""
        for part, what, arguments in events:
            if what == "say":
                if arguments not in self._said:  # workers that do the same say the same
                    self._said.add(arguments)
                    self._progress.say(*arguments)
            elif what == "wordings":
                self._progress.wordings(*arguments)
            elif what == "stage":
                self._stage(part, *arguments)
            else:
                number, *more = arguments
                getattr(self._stages[part, number], what)(*more)

    def _stage(self, part: int, number: int, title: str, total: int, done: int) -> None:
        """Begin a stage, or go on with that of the worker before, if it is repeated."""
        known = self._titled.get((part, title))
        if known is None:
            shared = self._owners.setdefault(title, part) != part
            known = self._progress.stage(f"{title} ({part + 1})" if shared else title, total, done)
            self._titled[part, title] = known
        else:
            known.reach(done)
        self._stages[part, number] = known
