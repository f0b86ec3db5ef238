"""Add wrappers around the modules that adapters rescale or train in full, and remove them."""

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
    """The `Routing` that a model's wrappers share; None if there are no wrappers."""
    return next((module.routing for module in base.modules() if isinstance(module, Member)), None)


def wrap(
    base: nn.Module, routing: Routing, targets: Iterable[Target], kept: Iterable[str]
) -> tuple[dict[IA3Layer, Target], list[TrainedModule]]:
    """Wrap the targets and the modules to train in full, if they are not wrapped yet; return all wrappers."""
    layers: dict[nn.Module, IA3Layer] = {}  # a module at several paths has one vector
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
    # Wrap at every path, even those that the config does not name, because merging changes the module at all paths.
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
    """The parent of the module at a path, and the module's name there."""
    parent, _, name = path.rpartition(".")
    return unwrapped(base.get_submodule(parent)), name


def insert(
    base: nn.Module, routing: Routing, name: str, targets: Iterable[Target], kept: Iterable[str], **vector: bool
) -> None:
    """Add an adapter's vectors and copies of modules, frozen. `vector`: see `IA3Layer.add`."""
    layers, trained = wrap(base, routing, targets, kept)
    for layer, target in layers.items():
        layer.add(name, target.feedforward, rescaled=target.rescaled, **vector)
    for module in trained:
        module.add(name)
    for member in (*layers, *trained):
        for parameter in member.parameters_of(name):
            parameter.requires_grad_(False)


def remove(base: nn.Module, routing: Routing, name: str) -> None:
    """Remove an adapter from all wrappers, whichever `IA3Model` added it."""
    for member in routing.members:
        if name in member.held:
            member.remove(name)
    take_out_idle(base, routing)


def take_out_idle(base: nn.Module, routing: Routing) -> None:
    """Remove wrappers that no adapter uses any more, neither the model's own nor the bank's."""
    idle = [member for member in routing.members if not member.held and not routing.serves_bank(member)]
    if idle:
        take_out(base, routing, {member: member.wrapped for member in idle})


def take_out(base: nn.Module, routing: Routing, replacements: Mapping[Member, nn.Module]) -> None:
    """Replace wrappers by plain modules, at every path."""
    for parent in list(base.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, Member) and child in replacements:
                setattr(parent, name, replacements[child])
    for wrapper in replacements:
        routing.leave(wrapper)


def check_copies(base: nn.Module, routing: Routing, names: Iterable[str]) -> None:
    """Raise if two adapters train the same module in full, because only one copy can be active."""
    names = list(dict.fromkeys(names))
    for member in routing.members if len(names) > 1 else ():
        owners = [name for name in names if name in member.held]
        if len(owners) > 1 and isinstance(member, TrainedModule):
            path = next(path for path, other in wrappers(base)[1].items() if other is member)
            raise InputError(
                f"Adapters {shown(owners)} each train their own {path!r} (modules_to_save), and only one can be "
                f"active; use one of them, or a different adapter for each row (adapter_names)."
            )
