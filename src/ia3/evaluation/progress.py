"""The progress of an experiment: `Progress`. Derive a class from it to show progress."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ia3.evaluation.wordings import Ranked


class Stage:
    """A part of the work, counted in rows or optimizer steps. This class shows nothing."""

    def advance(self, count: int) -> None:
        """Add `count` finished rows or steps."""

    def reach(self, done: int) -> None:
        """Set the number of finished rows or steps to `done`."""

    def note(self, text: str) -> None:
        """Show a text beside the count. It replaces the previous text."""

    def end(self) -> None:
        """End the stage, even if fewer than `total` are finished."""


class Progress:
    """An experiment calls these methods while it runs. This class shows nothing; derive a class from it."""

    def heading(self, text: str) -> None:
        """Show a heading for what follows."""

    def say(self, text: str) -> None:
        """Show a message."""

    def waiting(self, text: str) -> contextlib.AbstractContextManager[Any]:
        """Show a text during a `with` block whose work cannot be counted."""
        return contextlib.nullcontext()

    def wordings(self, title: str, ranking: Sequence[Ranked], taken: int) -> None:
        """Show the wordings that were tried, the best first, of which the first `taken` are used."""

    def stage(self, title: str, total: int, done: int = 0) -> Stage:
        """Begin a stage of `total` rows or steps, of which `done` are finished already."""
        return Stage()


def training_stages(progress: Progress, titles: Mapping[str, str]) -> TrainerCallback:
    """A trainer callback that shows steps and losses.

    Args:
        progress: shows them.
        titles: name of a loss in the trainer's logs → title of its stage.
    """
    from transformers import TrainerCallback

    class Stages(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            done = state.global_step
            self.stages = {name: progress.stage(title, state.max_steps, done) for name, title in titles.items()}
            self.logged: dict[str, tuple[int, str]] = dict.fromkeys(titles, (done, ""))

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            for name, stage in self.stages.items():
                if logs and name in logs:
                    self.logged[name] = state.global_step, f"loss {float(logs[name]):.3f}"
                    stage.reach(state.global_step)
                    stage.note(self.logged[name][1])

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for name, stage in self.stages.items():
                done, note = self.logged[name]
                if state.global_step < state.max_steps or state.global_step - done >= args.logging_steps:
                    stage.end()
                    stage.note(f"{note}, learned by heart")
                else:
                    stage.reach(state.global_step)

    return Stages()
