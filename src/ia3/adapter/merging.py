"""Merge adapters into the base weights, reversibly or permanently."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ia3.adapter.layer import IA3Layer
from ia3.adapter.routing import Member, Routing
from ia3.adapter.targets import embeddings, wrappers
from ia3.adapter.wrapping import find_routing, remove, take_out
from ia3.errors import InputError, shown


def sync_weights(routing: Routing) -> None:
    """Update the base weights to the merged adapters: none while adapters are disabled."""
    names = routing.merged if routing.enabled else ()
    _warn_of_rounding([member.merge(names) for member in routing.members if isinstance(member, IA3Layer)])


def discard(base: nn.Module, name: str) -> None:
    """Remove an adapter that any `IA3Model` added to a model, merged or not."""
    routing = find_routing(base)
    if routing is not None:
        if name in routing.merged:
            routing.switch(merged=[each for each in routing.merged if each != name])
            sync_weights(routing)
        remove(base, routing, name)


def check_finite(base: nn.Module, routing: Routing, names: Sequence[str]) -> None:
    """Raise if adapters would make weights NaN or infinite. The weights do not change."""
    for path, layer in wrappers(base)[0].items():
        layer.unmerge()  # to check the adapters with the original weights
        broken = layer.broken(names)
        if broken:
            sync_weights(routing)
            raise InputError(
                f"NaN or infinite values in the merged {broken} of {path!r}; the adapter {shown(names)} seems to "
                f"be broken, and nothing was merged."
            )


def merge_for_good(base: nn.Module, routing: Routing, names: Sequence[str], progressbar: bool) -> None:
    """Merge adapters into the base model's weights, and remove all wrappers."""
    from tqdm.auto import tqdm

    replacements: dict[Member, nn.Module] = {}
    errors = []
    with _untying(base):
        for member in tqdm(routing.members, disable=not progressbar, desc="Merging"):
            if isinstance(member, IA3Layer):
                errors.append(member.merge(names, keep_originals=False))
                replacements[member] = member.wrapped
            else:
                copies = [member.container[name] for name in names if name in member.held]
                replacements[member] = copies[0] if copies else member.wrapped
        take_out(base, routing, replacements)
    _warn_of_rounding(errors)


def unload(base: nn.Module, routing: Routing) -> None:
    """Restore the base model, without wrappers."""
    for member in routing.members:
        if isinstance(member, IA3Layer):
            member.unmerge()
    take_out(base, routing, {member: member.wrapped for member in routing.members})


@contextmanager
def _untying(base: nn.Module) -> Iterator[None]:
    """Watch whether input and output embeddings become different in a `with` block. If so, update the model's config,
    or they would be tied again when a saved model is loaded."""
    tied = _embeddings_are_one(base)
    yield
    if tied and not _embeddings_are_one(base):
        base.config.tie_word_embeddings = False  # type: ignore[union-attr]
        warnings.warn(
            "The adapter changed one of two tied embeddings; the merged model has both, and tie_word_embeddings "
            "is now False in its config.",
            stacklevel=5,
        )


def _embeddings_are_one(model: nn.Module) -> bool:
    """Whether a language model's input and output embeddings are the same parameter."""
    first, second = (getattr(module, "weight", None) for module in embeddings(model))
    return first is not None and first is second


def _warn_of_rounding(errors: Sequence[float]) -> None:
    rounded = [error for error in errors if error > 0]
    if rounded:
        warnings.warn(
            f"{len(rounded)} of {len(errors)} quantized modules could not take their vector exactly and were quantized "
            f"again: their weights are off by {max(rounded):.2%} at most, {sum(rounded) / len(rounded):.2%} on average "
            f"(relative error of the rescaled weight).",
            stacklevel=4,
        )
