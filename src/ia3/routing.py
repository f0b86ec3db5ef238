"""Which adapters act: one object, shared by every rescaled layer of a model."""

from __future__ import annotations


class Routing:
    """The state that all `IA3Layer`s of one model ask. Switching or disabling adapters is one assignment here.

    Attributes:
        active: names of the adapters in effect; the vectors of several multiply.
        enabled: False switches every adapter off, so that the model's outputs are the base model's.
        merged: names of the adapters that are multiplied into the base weights at the moment.
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged: tuple[str, ...] = ()

    @property
    def vectors(self) -> tuple[str, ...]:
        """The adapters whose vectors a forward pass multiplies by: none while some are merged into the weights."""
        return () if self.merged or not self.enabled else self.active

    @property
    def modules(self) -> tuple[str, ...]:
        """The adapters whose own copies of `modules_to_save` are used, best first."""
        return (self.merged or self.active) if self.enabled else ()
