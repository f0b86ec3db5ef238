"""The average of what is trained over the steps: `MovingAverage`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class MovingAverage:
    """The exponential moving average of the parameters that an optimizer trains, over its steps.

    It is kept in the optimizer's state, so that checkpoints have it. Of the first steps it is the mean, up to the one
    from which on the decay forgets faster. Parameters that have no gradient in a step, such as those of a member that
    has stopped, keep theirs.

    Args:
        optimizer: what is stepped, not a wrapper around it.
        decay: from 0, the last step alone, to below 1; the mean is over about (1 + decay) / (1 - decay) steps.
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
        """Let the parameters be their average."""
        with torch.no_grad():
            for parameter in self._parameters():
                if "average" in self.optimizer.state[parameter]:
                    parameter.copy_(self.optimizer.state[parameter]["average"])

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])
