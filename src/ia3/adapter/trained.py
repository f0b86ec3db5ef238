"""A module that adapters train in full, with a copy for each adapter: `TrainedModule`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ia3.adapter.routing import Held, Member, Routing, Watched
from ia3.errors import InputError


class _Copies(nn.ModuleDict):
    def __init__(self, held: dict[str, Held]) -> None:
        super().__init__()
        self._modules = Watched(held)


class TrainedModule(Member):
    """A module of `modules_to_save`: the original, and a trained copy for each adapter that has one."""

    _inner, _container = "original_module", "modules_to_save"

    original_module: nn.Module
    modules_to_save: nn.ModuleDict

    def __init__(self, original_module: nn.Module, routing: Routing) -> None:
        super().__init__(original_module, _Copies, routing)

    def add(self, name: str) -> None:
        """Add a copy of the original for an adapter."""
        module = copy.deepcopy(self.original_module)
        module.requires_grad_(True)
        self._hold(name, Held(module))

    @property
    def current(self) -> nn.Module:
        """The copy of the active adapter that has one, otherwise the original."""
        module = self.routing.module(self)
        return self.original_module if module is None else module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the current module; in a mixed batch, each row uses its adapter's copy."""
        rows = self.routing.rows
        if rows is None:
            return self.current(*args, **kwargs)

        def run(group: int, *args: Any, **kwargs: Any) -> Any:
            return (rows.modules[group][self.slot] or self.original_module)(*args, **kwargs)

        return rows.apart(run, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save", "routing"):
                raise
        rows = self.routing.rows
        if rows is None:
            return getattr(self.current, name)
        modules = [group[self.slot] or self.original_module for group in rows.modules]
        if isinstance(modules[0], nn.Module) and all(module is modules[0] for module in modules):
            return getattr(modules[0], name)
        value = getattr(self.original_module, name)
        if isinstance(value, (torch.Tensor, nn.Module)):
            raise InputError(
                f"Another module reads the {name} of a {type(self.original_module).__name__} in place of calling it, so "
                f"that rows cannot each have their own adapter's; give the model one adapter at a time (set_adapter)."
            )
        return value
