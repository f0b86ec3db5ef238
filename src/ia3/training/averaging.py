"""The average of trained parameters over steps: `MovingAverage`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class MovingAverage:
    """The exponential moving average of an optimizer's parameters over its steps.

    The optimizer's state holds it, so checkpoints have it. For the first 1 / (1 - decay) steps it is the plain
    mean. Parameters without a gradient in a step, such as those of a stopped member, keep their average.

    Args:
        optimizer: the optimizer itself, not a wrapper.
        decay: from 0 (only the last step) to below 1; it averages about (1 + decay) / (1 - decay) steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        self.optimizer = optimizer
        self.decay = decay
        optimizer.register_step_post_hook(self._update)

    def _update(self, *_: Any) -> None:
        for parameter in self._parameters():
            if parameter.grad is not None:
                state = self.optimizer.state[parameter]
                steps = state["averaged_steps"] = state.get("averaged_steps", 0) + 1
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.detach(), max(1 - self.decay, 1 / steps))

    def use(self) -> None:
        """Set the parameters to their average."""
        with torch.no_grad():
            for parameter in self._parameters():
                if "average" in self.optimizer.state[parameter]:
                    parameter.copy_(self.optimizer.state[parameter]["average"])

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])
