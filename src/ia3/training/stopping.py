"""Early stopping: `StopAtFloor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ia3.training.recipe import EarlyStopping


class StopAtFloor(TrainerCallback, ExportableState):
    """Stops a member when its length-normalized term L_LN has reached the floor, and training when all have stopped.

    Args:
        rule: the floor and the number of steps; None: no early stopping.
        members: the members' names.
    """

    def __init__(self, rule: EarlyStopping | None, members: Sequence[str]) -> None:
        self.rule = rule
        self.members = list(members)
        self.stopped: dict[str, int] = {}  # name → the step after which it stopped
        self._step: dict[str, float] = {}
        self._last: dict[str, list[float]] = {name: [] for name in members}

    def add(self, losses: Mapping[str, float]) -> None:
        """Add parts of the current step's length-normalized term."""
        for name, loss in losses.items():
            self._step[name] = self._step.get(name, 0.0) + loss

    @property
    def step_losses(self) -> list[float]:
        """The current step's length-normalized term of each member; 0 for one without."""
        return [self._step.get(name, 0.0) for name in self.members]

    @step_losses.setter
    def step_losses(self, losses: Sequence[float]) -> None:
        self._step = {
            name: loss
            for name, loss in zip(self.members, losses, strict=True)
            if self.rule is not None and self.learns(name)
        }

    @property
    def all_stopped(self) -> bool:
        """Whether all members have stopped."""
        return len(self.stopped) == len(self.members)

    def learns(self, name: str) -> bool:
        """Whether a member has not stopped."""
        return name not in self.stopped

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start again, or resume from the state of a checkpoint."""
        self._step = {}
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        found = [None] * len(self.members) if saved is None else saved["attributes"]["learners"]
        pairs = list(zip(self.members, found, strict=True))
        self.stopped = {name: its["stopped"] for name, its in pairs if its and its["stopped"] is not None}
        self._last = {name: its["last"] if its else [] for name, its in pairs}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the step's losses."""
        if self.rule is not None:
            for name, loss in self._step.items():
                last = self._last[name] = [*self._last[name], loss][-self.rule.steps :]
                if len(last) == self.rule.steps and sum(last) / len(last) <= self.rule.floor:
                    self.stopped.setdefault(name, state.global_step)
            if self.all_stopped:
                control.should_training_stop = True
        self._step = {}

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        found = [{"stopped": self.stopped.get(name), "last": self._last[name]} for name in self.members]
        return {"args": {}, "attributes": {"learners": found}}
