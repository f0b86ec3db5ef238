"""How an experiment gets on: `Progress`, which whoever wants to show it derives from."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Stage:
    """A part of the work that is counted, in rows or optimizer steps. This one shows nothing."""

    def advance(self, count: int) -> None:
        """So many more are done."""

    def reach(self, done: int) -> None:
        """So many are done."""

    def note(self, text: str) -> None:
        """Say this beside the count, in place of what was said before."""

    def end(self) -> None:
        """There is no more to do, however many were done."""


class Progress:
    """What an experiment tells while it works. This one shows nothing; derive from it to show something."""

    def heading(self, text: str) -> None:
        """What comes next is about this."""

    def say(self, text: str) -> None:
        """Something worth knowing."""

    def waiting(self, text: str) -> contextlib.AbstractContextManager[Any]:
        """Within `with`, something goes on that cannot be counted."""
        return contextlib.nullcontext()

    def stage(self, title: str, total: int, done: int = 0) -> Stage:
        """Something begins that has so many parts, some of which may be done already."""
        return Stage()


def training_stages(progress: Progress, titles: Mapping[str, str]) -> TrainerCallback:
    """A trainer's callback that shows steps and losses.

    Args:
        progress: where.
        titles: of a stage for each loss, by its name in the trainer's logs.
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
