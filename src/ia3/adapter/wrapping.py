"""Wrappers around the modules that adapters rescale or train in full: put into a base model, and taken out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ia3.adapter.architectures import READS_WEIGHTS, row_axis
from ia3.adapter.layer import IA3Layer
from ia3.adapter.routing import Member, Routing
from ia3.adapter.targets import Target, base_modules, unwrapped, wrappers
from ia3.adapter.trained import TrainedModule
from ia3.errors import InputError, shown


def find_routing(base: nn.Module) -> Routing | None:
    """What the wrappers in a model ask; None when there are none."""
    return next((module.routing for module in base.modules() if isinstance(module, Member)), None)


def wrap(
    base: nn.Module, routing: Routing, targets: Iterable[Target], kept: Iterable[str]
) -> tuple[dict[IA3Layer, Target], list[TrainedModule]]:
    """Put layers around the targets and the modules to train in full, where there are none yet; returns all."""
    layers: dict[nn.Module, IA3Layer] = {}  # a module at several paths is one module, with one vector
    found: dict[IA3Layer, Target] = {}
    for target in targets:
        if target.module not in layers:
            parent, place = _place(base, target.path)
            layer = getattr(parent, place)
            if not isinstance(layer, IA3Layer):
                weights_read = type(parent).__name__ in READS_WEIGHTS
                layer = IA3Layer(target.module, routing, weights_read, row_axis(target.path, parent))
            layers[target.module] = layer
            found[layer] = target
    # At every path, named by the config or not: merging changes the module for all of them too.
    full = tuple(f"{path}." for path in (*kept, *wrappers(base)[1]))
    for path, module in base_modules(base).items():
        if module in layers and not path.startswith(full):
            parent, place = _place(base, path)
            setattr(parent, place, layers[module])
    trained = []
    for path in kept:
        parent, place = _place(base, path)
        module = getattr(parent, place)
        if not isinstance(module, TrainedModule):
            module = TrainedModule(module, routing)
            setattr(parent, place, module)
        trained.append(module)
    return found, trained


def _place(base: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that owns the one at a path, and the name that it has there."""
    parent, _, name = path.rpartition(".")
    return unwrapped(base.get_submodule(parent)), name


def insert(
    base: nn.Module, routing: Routing, name: str, targets: Iterable[Target], kept: Iterable[str], **vector: bool
) -> None:
    """Give an adapter its vectors and its copies of modules, frozen. `vector`: see `IA3Layer.add`."""
    layers, trained = wrap(base, routing, targets, kept)
    for layer, target in layers.items():
        layer.add(name, target.feedforward, rescaled=target.rescaled, **vector)
    for module in trained:
        module.add(name)
    for member in (*layers, *trained):
        for parameter in member.parameters_of(name):
            parameter.requires_grad_(False)


def remove(base: nn.Module, routing: Routing, name: str) -> None:
    """Take an adapter out of all members, whichever `IA3Model` put it there."""
    for member in routing.members:
        if name in member.held:
            member.remove(name)
    take_out_idle(base, routing)


def take_out_idle(base: nn.Module, routing: Routing) -> None:
    """Take out the wrappers that no adapter needs any more, of the model's own or of the bank."""
    idle = [member for member in routing.members if not member.held and not routing.serves_bank(member)]
    if idle:
        take_out(base, routing, {member: member.wrapped for member in idle})


def take_out(base: nn.Module, routing: Routing, replacements: Mapping[Member, nn.Module]) -> None:
    """Put plain modules where wrappers stand, at every path."""
    for parent in list(base.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, Member) and child in replacements:
                setattr(parent, name, replacements[child])
    for wrapper in replacements:
        routing.leave(wrapper)


def check_copies(base: nn.Module, routing: Routing, names: Iterable[str]) -> None:
    """Raise when two of the adapters train the same module of the model in full: only one copy can act."""
    names = list(dict.fromkeys(names))
    for member in routing.members if len(names) > 1 else ():
        owners = [name for name in names if name in member.held]
        if len(owners) > 1 and isinstance(member, TrainedModule):
            path = next(path for path, other in wrappers(base)[1].items() if other is member)
            raise InputError(
                f"Adapters {shown(owners)} each train their own {path!r} (modules_to_save), and one alone can act; use "
                f"one of them, or give rows an adapter each (adapter_names)."
            )
