"""Which modules of a model an adapter rescales, and on which side: `resolve`."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ia3.adapter.architectures import Site, candidates, default_sites, feedforward_sites, output_sites
from ia3.adapter.config import IA3Config
from ia3.adapter.layer import IA3Layer
from ia3.adapter.routing import Member
from ia3.adapter.rules import find_rule, rule_types
from ia3.adapter.trained import TrainedModule
from ia3.errors import InputError, brief, reason, shown

# Names of heads that adapters for a task train in full. A model has at most one of them.
_CLASSIFICATION = ("classifier", "score")
TASK_HEADS = {"SEQ_CLS": _CLASSIFICATION, "TOKEN_CLS": _CLASSIFICATION, "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class Target:
    """A module to rescale.

    Attributes:
        path: its dotted path in the base model.
        module: the module, without our wrappers.
        feedforward: whether its input is rescaled, instead of its output.
        rescaled: for a fused projection, a boolean mask of the rescaled features; None: all features.
    """

    path: str
    module: nn.Module
    feedforward: bool
    rescaled: torch.Tensor | None = None


@dataclass(frozen=True)
class Resolved:
    """A config, resolved for a model.

    Attributes:
        targets: the modules to rescale, in the model's order.
        kept: the paths of modules to train in full.
        config: a completed copy: `target_modules` and `feedforward_modules` have names that PEFT reads in the same way,
            `modules_to_save` has the head of the task, and `fan_in_fan_out` is right.
    """

    targets: list[Target]
    kept: list[str]
    config: IA3Config


def walk(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's modules by path in the base model, with wrappers instead of the modules that they wrap."""
    found: list[tuple[str, nn.Module]] = []

    def visit(prefix: str, module: nn.Module) -> None:
        for name, child in unwrapped(module)._modules.items():  # a module at two paths appears twice
            if child is not None:
                found.append((prefix + name, child))
                visit(f"{prefix}{name}.", child)

    visit("", model)
    return found


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The base model's modules by path, without wrappers."""
    return {path: unwrapped(module) for path, module in walk(model)}


def wrappers(model: nn.Module) -> tuple[dict[str, IA3Layer], dict[str, TrainedModule]]:
    """The wrappers by path in the base model, each once, with the first of several paths."""
    layers: dict[IA3Layer, str] = {}
    trained: dict[TrainedModule, str] = {}
    for path, module in walk(model):
        if isinstance(module, IA3Layer):
            layers.setdefault(module, path)
        elif isinstance(module, TrainedModule):
            trained.setdefault(module, path)
    return {path: layer for layer, path in layers.items()}, {path: module for module, path in trained.items()}


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without the wrapper of adapters."""
    return module.wrapped if isinstance(module, Member) else module


def inside_wrappers(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of `torch.compile`, DDP or FSDP."""
    while True:
        parts = [model._modules.get(name) for name in ("_orig_mod", "module", "_fsdp_wrapped_module")]
        inner = next((part for part in parts if part is not None), None)
        if inner is None:
            return model
        model = inner


def embeddings(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The input and output embeddings of a transformers model, with wrappers; None for a missing one."""
    found: list[nn.Module | None] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):  # no transformers model, or one without embeddings
            module = None
        found.append(module if isinstance(module, nn.Module) else None)
    return found[0], found[1]


def matches(path: str, pattern: Iterable[str] | str) -> bool:
    """Whether a module path matches a regular expression (a string) or whole trailing components (a list)."""
    if isinstance(pattern, str):
        try:
            return re.fullmatch(pattern, path) is not None
        except Exception as error:  # large repetitions or too many parentheses raise various errors
            raise InputError(
                f"Expected a regular expression, found {brief(pattern)}: {reason(error)}; for one name, use a list."
            ) from error
    return f".{path}".endswith(tuple(f".{entry}" for entry in pattern))


def resolve(model: nn.Module, config: IA3Config, key_value_only: bool | None = None) -> Resolved:
    """Find the modules that an adapter with this config rescales, and those that it trains in full.

    Args:
        model: the base model, adapted or not.
        config: see `IA3Config`; it is not changed.
        key_value_only: rescale only the key and value part of fused projections. None: only if the config leaves the
            choice of modules to the architecture.

    Raises:
        InputError: no module matches, a module's type cannot be rescaled, or the architecture is unknown.
    """
    config = copy.copy(config)
    heads = TASK_HEADS.get(config.task_type or "", ())
    if config.task_type == "FEATURE_EXTRACTION" and getattr(type(model), "is_sentence_encoder", False):
        heads = _CLASSIFICATION[:1]
    config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads])) or None
    if config.acts_from == "question":
        _check_reads_first(model, config)
    targets = _resolve_targets(model, config, key_value_only)
    kept = _trained_in_full(model, config.modules_to_save or [])
    _check_nesting(model, [target.path for target in targets], kept)
    return Resolved(targets, kept, config)


def _check_reads_first(model: nn.Module, config: IA3Config) -> None:
    """Raise unless what a model makes of a text does not depend on the question behind it, whatever an adapter does there."""
    if config.task_type not in (None, "SEQ_2_SEQ_LM" if has_encoder(model) else "CAUSAL_LM"):
        raise InputError(
            f"Expected a decoder-only language model (task_type CAUSAL_LM) or an encoder-decoder (SEQ_2_SEQ_LM) for "
            f"acts_from='question', found a {type(model).__name__} and task_type {config.task_type}; use acts_from='start'."
        )
    if config.modules_to_save:
        raise InputError(
            f"Expected no modules_to_save beside acts_from='question', found {shown(config.modules_to_save)}: they are trained "
            f"in full, and act on the text too. Use acts_from='start'."
        )


def has_encoder(model: nn.Module) -> bool:
    """Whether a model is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def outside_decoder(model: nn.Module) -> set[str]:
    """The paths of an encoder-decoder's modules that an adapter with `acts_from="question"` leaves as they are.

    These are all but the decoder's own. A module that encoder and decoder share reads the text, too.
    """
    encoder, decoder = ({*part.modules()} for part in (model.get_encoder(), model.get_decoder()))  # type: ignore[operator]
    own = decoder - encoder
    return {path for path, module in walk(model) if module not in own}


def _resolve_targets(model: nn.Module, config: IA3Config, key_value_only: bool | None) -> list[Target]:
    """The modules that a config names, in the model's order. Completes the config."""
    modules = base_modules(model)
    base_config = getattr(model, "config", None)
    config.chosen_by_architecture |= config.target_modules is None
    if key_value_only is None:
        key_value_only = config.chosen_by_architecture
    kept = config.modules_to_save or []
    leave_out = config.exclude_modules
    excluded = {path for path in modules if (leave_out and matches(path, leave_out)) or (kept and _inside(path, kept))}
    frozen = outside_decoder(model) if config.acts_from == "question" and has_encoder(model) else set()
    excluded |= frozen

    masks: dict[str, torch.Tensor | None] = {}
    sites = default_sites(modules, base_config) if config.target_modules is None or key_value_only else []
    if config.feedforward_modules is not None:
        sites = _moved_to_outputs(sites, modules, config, excluded)
    if key_value_only:
        masks = {site.path: site.rescaled for site in sites}
    if config.target_modules is None:
        paths = [site.path for site in sites]
    elif _is_all_linear(config):
        paths = _all_linear(model, modules, config)
    else:
        paths = [path for path in modules if matches(path, config.target_modules)]
    model_type = getattr(base_config, "model_type", None)
    asked = config.target_modules if config.target_modules is not None else f"the keys and values of {model_type}"
    chosen = [path for path in paths if path not in excluded]
    if not chosen:
        what, how = "No module matches the", ""
        if paths and frozen.issuperset(paths):
            what, how = "acts_from='question' leaves none of the", " (only modules of the decoder)"
        elif paths:
            what, how = "exclude_modules leaves none of the", f" (exclude_modules {brief(config.exclude_modules)})"
        raise InputError(
            f"{what} target_modules {brief(sorted(asked) if isinstance(asked, set) else asked)}{how}; modules that can be "
            f"rescaled: {candidates({path: module for path, module in modules.items() if path not in frozen})}."
        )
    if config.feedforward_modules is None:
        expected = {site.path for site in (sites or feedforward_sites(modules, base_config)) if site.feedforward}
        feedforward = [path for path in chosen if path in expected]
    else:
        feedforward = [path for path in chosen if matches(path, config.feedforward_modules)]
    targets = [Target(path, modules[path], path in feedforward, masks.get(path)) for path in chosen]
    for target in targets:
        _check(target)
    # `acts_from` itself leaves out the encoder, so that names need not.
    _complete(config, chosen, feedforward, {path: one for path, one in modules.items() if path not in frozen})
    return targets


def _moved_to_outputs(
    sites: list[Site], modules: dict[str, nn.Module], config: IA3Config, excluded: set[str]
) -> list[Site]:
    """The architecture's sites. Inputs that `feedforward_modules` leaves out are replaced by outputs.

    In a gated feed-forward, rescaling the output of the projection beside the gate is the same function (PEFT's choice
    for mT5). Without a gate, a config that leaves the modules to the architecture is refused.
    """
    named = config.feedforward_modules or ()
    by_default = config.target_modules is None
    patterns = [named] if isinstance(named, str) else [[name] for name in named]
    unused = [pattern for pattern in patterns if not any(matches(site.path, pattern) for site in sites)]
    if unused and by_default:
        paths = {site.path for site in sites}
        raise InputError(
            f"feedforward_modules names {shown([p if isinstance(p, str) else p[0] for p in unused])}, but the default "
            f"targets are {shown(sorted(shortest_names(paths, set(modules) - paths)), 12)}; name target_modules too."
        )
    inputs = [
        site for site in sites if site.feedforward and site.path not in excluded and not matches(site.path, named)
    ]
    outputs = output_sites(modules, inputs)
    stuck = [path for path, site in outputs.items() if site is None]
    if stuck and by_default:
        raise InputError(
            f"feedforward_modules leaves out {stuck[0]!r}, and there is no module whose output could be rescaled instead to "
            f"the same effect; leave feedforward_modules open, or exclude {stuck[0].rpartition('.')[2]!r} for keys and values only."
        )
    order = {path: i for i, path in enumerate(modules)}
    return sorted((outputs.get(site.path) or site for site in sites), key=lambda site: order[site.path])


def _trained_in_full(model: nn.Module, names: list[str]) -> list[str]:
    """The paths of modules that `modules_to_save` names. Heads of a task may be missing in the model."""
    modules = base_modules(model)
    chosen = [path for path in modules if matches(path, names)]
    unknown = [
        name
        for name in names
        if not any(name in heads for heads in TASK_HEADS.values()) and not any(matches(path, [name]) for path in chosen)
    ]
    if unknown:
        raise InputError(
            f"No module is named {shown(unknown)}, as modules_to_save asks; the model's parts are "
            f"{shown([name for name, _ in model.named_children()], 12)}."
        )
    kept = [path for path in chosen if not any(path.startswith(f"{other}.") for other in chosen)]
    for path in kept:
        check_callable(path, modules[path])
    return kept


def _check_nesting(model: nn.Module, targets: list[str], kept: list[str]) -> None:
    """Refuse to rescale a part of a module that an adapter trains in full, or the reverse, because copies would
    differ."""
    layers, trained = wrappers(model)
    outer = {*kept, *trained}
    nested = [(a, b) for a in sorted(outer) for b in sorted(outer) if a.startswith(f"{b}.")]
    if nested:
        a, b = nested[0]
        raise InputError(f"Cannot train {a!r} in full beside {b!r}, which contains it (modules_to_save).")
    inner = {*targets, *layers}
    nested = [(a, b) for a in sorted(inner) for b in sorted(outer) if f"{a}.".startswith(f"{b}.")]
    if nested:
        a, b = nested[0]
        raise InputError(f"Cannot rescale {a!r} while an adapter trains {b!r} in full (modules_to_save); exclude one.")


def _check(target: Target) -> None:
    """Raise unless the target's type has a rule for its side."""
    rule = find_rule(target.module)
    if rule is None:
        raise InputError(
            f"Cannot rescale {target.path!r}, a {type(target.module).__name__}; there are rules for "
            f"{shown(rule_types(), 99, room=400)}. Narrow target_modules, exclude it, or add a rule (ia3.register_rule)."
        )
    try:
        rule.shape(target.module, target.feedforward)
    except InputError as error:
        raise InputError(f"Cannot rescale {target.path!r}: {error}") from error


def check_callable(path: str, module: nn.Module) -> None:
    """Raise for a container without a forward pass, such as `ModuleList`, because an adapter's copy cannot replace
    it."""
    if type(module).forward is nn.Module.forward and hasattr(type(module), "__getitem__"):
        inner = [f"{path}.{name}" for name, _ in module.named_children()]
        around = path.rpartition(".")[0]
        raise InputError(
            f"modules_to_save names {path!r}, a {type(module).__name__}, which only holds others; name "
            + (f"what it holds ({shown(inner, 2)})" if inner else f"the module around it, {around!r}")
            + " instead."
        )


def shortest_names(paths: Iterable[str], others: Iterable[str]) -> set[str]:
    """The shortest trailing components that match all of the paths and none of the others."""
    others = list(others)
    names: set[str] = set()
    for path in paths:
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[-length:])
            if name in names or not any(matches(other, [name]) for other in others):
                names.add(name)
                break
    return names


def _is_all_linear(config: IA3Config) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _all_linear(model: nn.Module, modules: dict[str, nn.Module], config: IA3Config) -> list[str]:
    """All Linear and Conv1D modules except the output layer and the head that the task trains in full."""
    _, output = embeddings(model)
    output = None if output is None else unwrapped(output)
    heads = TASK_HEADS.get(config.task_type or "", ())
    return [
        path
        for path, module in modules.items()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output and not _inside(path, heads)
    ]


def _inside(path: str, names: Iterable[str]) -> bool:
    """Whether a path is one of the named modules or inside one."""
    names = list(names)
    parts = path.split(".")
    return any(matches(".".join(parts[: i + 1]), names) for i in range(len(parts)))


def _complete(config: IA3Config, chosen: list[str], feedforward: list[str], modules: dict[str, nn.Module]) -> None:
    """Write the resolved modules into the config, as names that resolve to the same modules again."""
    if config.target_modules is None or _is_all_linear(config):
        # Two lists of names, so that one is a subset of the other, as PEFT requires.
        config.feedforward_modules = shortest_names(feedforward, set(modules) - set(feedforward))
        first = shortest_names(set(chosen) - set(feedforward), set(modules) - set(chosen))
        config.target_modules = first | config.feedforward_modules
    elif config.feedforward_modules is None:
        others = set(chosen) - set(feedforward)
        if isinstance(config.target_modules, str):
            config.feedforward_modules = shortest_names(feedforward, others)
        else:
            second = {name for name in config.target_modules if not any(matches(path, [name]) for path in others)}
            if not all(matches(path, second) for path in feedforward):
                second |= shortest_names(feedforward, set(modules) - set(feedforward))
            config.feedforward_modules = {name for name in second if any(matches(path, [name]) for path in feedforward)}
            config.target_modules = set(config.target_modules) | config.feedforward_modules
    transposed = {
        isinstance(modules[path], Conv1D) for path in chosen if isinstance(modules[path], (nn.Linear, Conv1D))
    }
    if transposed and config.fan_in_fan_out not in transposed:
        kind = "Conv1D" if True in transposed else "torch.nn.Linear"
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is `{kind}`. "
            f"Setting fan_in_fan_out to {not config.fan_in_fan_out}.",
            stacklevel=3,
        )
        config.fan_in_fan_out = not config.fan_in_fan_out
