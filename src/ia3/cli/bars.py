"""Progress on the screen: a bar for each stage, with time spent and time left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ia3.evaluation.progress import Progress, Stage

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import Task, TaskID

    from ia3.evaluation.wordings import Ranked


# Between two lines in a file, where bars cannot move.
_SECONDS = 30.0


class Bars(Progress):
    """Shows an experiment's progress in a `with` block; in a file, a line at most every half minute, and all bars at the end.

    Args:
        out: the console for people.
    """

    def __init__(self, out: Console) -> None:
        self.out = out
        self._shown: RichProgress | None = None
        self._told = time.monotonic()

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._shown is not None:
            self._shown.stop()
            self._shown = None

    def heading(self, text: str) -> None:
        self._stop()
        self.out.print(text, style="bold", markup=False)

    def say(self, text: str) -> None:
        self.out.print(text, style="dim", markup=False, soft_wrap=True)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        self._stop()
        with self.out.status(text):
            yield

    def wordings(self, title: str, ranking: Sequence[Ranked], taken: int) -> None:
        from ia3.cli.results import print_wordings

        if self._shown is not None and self._shown.finished:  # others may be at work
            self._stop()
        print_wordings(self.out, title, ranking[:taken], len(ranking))

    def stage(self, title: str, total: int, done: int = 0) -> Bar:
        if self._shown is None:
            self._shown = _bars(self.out)
            self._shown.start()
        return Bar(self._shown, self._shown.add_task(title, total=total, completed=done, note=""), self)

    def tell(self, bar: Bar) -> None:
        """Say in a file how far a stage is, unless a line has just been said."""
        now = time.monotonic()
        if not (self.out.is_terminal or self.out.is_jupyter) and now - self._told >= _SECONDS:
            self._told, task = now, bar.task
            self.say(f"{task.description}: {task.completed:.0f} of {task.total:.0f}")


class Bar(Stage):
    """One of the bars."""

    def __init__(self, bars: RichProgress, number: TaskID, shown_by: Bars) -> None:
        self._bars, self._number, self._shown_by = bars, number, shown_by

    def advance(self, count: int) -> None:
        self._bars.advance(self._number, count)
        self._shown_by.tell(self)

    def reach(self, done: int) -> None:
        self._bars.update(self._number, completed=done)
        self._shown_by.tell(self)

    def note(self, text: str) -> None:
        self._bars.update(self._number, note=text)

    def end(self) -> None:
        self._bars.update(self._number, total=self.task.completed)

    @property
    def task(self) -> Task:
        """What rich knows of it."""
        [task] = [task for task in self._bars.tasks if task.id == self._number]
        return task


def _bars(out: Console) -> RichProgress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    return RichProgress(
        TextColumn("{task.description}", table_column=Column(overflow="fold")),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", table_column=Column(overflow="fold")),
        console=out,
    )
