"""The adapters that a trainer trains: a `Member` is an adapter with its task and examples; several train together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from torch.utils.data import BatchSampler, Dataset
from transformers import TrainingArguments

from ia3.adapter.adapted import find_adapted
from ia3.errors import InputError, shown
from ia3.processes import add_up
from ia3.task.free_text import FreeText
from ia3.training.examples import ONE, Example

if TYPE_CHECKING:
    from ia3.task.kinds import AnyTask


@dataclass(frozen=True)
class Member:
    """An adapter to train, with its task and rows.

    Attributes:
        task: the task of the rows.
        rows: labelled training rows: a list of dictionaries, a DataFrame, a `datasets.Dataset` (see `as_rows`).
        name: the adapter's name in the model; a single member may leave it out and train the active adapter.
        seed: decides the order of the rows and the random templates; None: the arguments' seed.
        learning_rate: the peak learning rate; None: the arguments'.
        eval_rows: labelled rows for `evaluate()`.
        title: the member's name in errors; None: `name`.
        known: the labels whose answers are choices; None: all (see `training_examples`).
    """

    task: AnyTask
    rows: Any
    name: str | None = None
    seed: int | None = None
    learning_rate: float | None = None
    eval_rows: Any = None
    title: str | None = None
    known: Collection[str] | None = None

    def seed_in(self, args: TrainingArguments) -> int:
        """The seed of its order: the arguments' `data_seed` if set, else the member's, else the arguments' `seed`."""
        return next(seed for seed in (args.data_seed, self.seed, args.seed) if seed is not None)

    @property
    def owner(self) -> str:
        """The member's name in errors."""
        return repr(self.title) if self.title else f"Member {self.name!r}"


def listed(members: Member | Iterable[Member]) -> list[Member]:
    """One member or several as a list. Raises `InputError` if there are none, or for other objects."""
    found = [members] if isinstance(members, Member) else list(members)
    if not found:
        raise InputError("Expected at least one member, found none; for example Member(task, rows).")
    for one in found:
        if not isinstance(one, Member):
            kind = type(one if isinstance(members, (list, tuple)) else members).__name__
            raise InputError(f"Expected a Member or several, found a {kind}; for example Member(task, rows).")
    return found


def generates(members: Sequence[Member]) -> bool:
    """Whether the members' answers are texts. Raises `InputError` if only some are."""
    kinds = {isinstance(member.task, FreeText) for member in members}
    if len(kinds) > 1:
        raise InputError("Expected tasks with choices or tasks whose answer is text, found both; train them apart.")
    return kinds.pop()


def only_active(members: Sequence[Member], model: nn.Module) -> bool:
    """Whether the members train only the active adapters of the model.

    Their questions then name no adapter, so models without a different adapter per row can be trained too.
    """
    [first, *others] = members
    adapted = find_adapted(model)
    active = [] if adapted is None else adapted.active_adapters
    return not others and (first.name is None or active == [first.name])


def by_name(members: Sequence[Member], model: nn.Module) -> dict[str, Member]:
    """Name → member; a member without a name gets that of the active adapter.

    Raises:
        InputError: a name is missing, repeated or not an adapter's, adapters are merged, or a learning rate is invalid.
    """
    adapted = find_adapted(model)
    if len(members) == 1 and members[0].name is None:
        active = [] if adapted is None else adapted.active_adapters
        members = [replace(members[0], name=active[0] if len(active) == 1 else ONE)]
    elif adapted is None:
        raise InputError(f"Expected an IA3Model with the members' adapters, found a {type(model).__name__}.")
    else:
        adapted.require_adapters(_names(members))
    if adapted is not None and adapted.ia3_routing.merged:
        merged = shown(adapted.ia3_routing.merged)
        raise InputError(f"Expected adapters that are not merged, found {merged}; call unmerge_adapter() first.")
    for member in members:
        rate = member.learning_rate
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise InputError(f"Expected a learning rate above 0, found {rate}.", owner=member.owner)
    return dict(zip(_names(members), members, strict=True))


def _names(members: Sequence[Member]) -> list[str]:
    names = [member.name for member in members if member.name is not None]
    if len(names) < len(members):
        raise InputError(f"Expected a name for each of {len(members)} members, found {len(names)}.")
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise InputError(f"Expected members with names that differ, found {shown(twice)} twice.")
    return names


def arguments_of_one(args: TrainingArguments, member: Member) -> TrainingArguments:
    """The arguments with a member's seed and learning rate."""
    args = copy(args)
    if member.seed is not None:
        args.data_seed = member.seed_in(args)
    if member.learning_rate is not None:
        args.learning_rate = member.learning_rate
    return args


def check_in_step(args: TrainingArguments, kwargs: Mapping[str, Any]) -> None:
    """Raise `InputError` for arguments with which several members would not train as separate runs do."""
    strategy = getattr(args, "train_sampling_strategy", "random")
    seedable = getattr(args.accelerator_config, "use_seedable_sampler", True)
    requirements = {
        f"max_steps above 0, found {args.max_steps}; members' epochs differ in length": args.max_steps > 0,
        f"gradient_accumulation_steps of 1, found {args.gradient_accumulation_steps}; batches go through the model in "
        f"parts anyway, so make them larger (per_device_train_batch_size)": args.gradient_accumulation_steps == 1,
        f"train_sampling_strategy 'random' with use_seedable_sampler, found {str(strategy)!r} and {seedable}": seedable
        and strategy == "random",
        "no `optimizers`, found some; the trainer makes its own of the arguments' `optim`": "optimizers" not in kwargs,
    }
    for text, met in requirements.items():
        if not met:
            raise InputError(f"For several members, expected {text}.")


def check_batch(examples: Sequence[Example], args: TrainingArguments) -> None:
    """Raise `InputError` if incomplete batches are dropped and the rows are too few for one batch."""
    size = args.per_device_train_batch_size
    if args.dataloader_drop_last and len(examples) < size:
        raise InputError(
            f"Expected at least one batch of {size} rows, found {len(examples)} rows and dataloader_drop_last."
        )


class Steps(Dataset):
    """The examples of each step of several members: for each member the batch that a separate run has in that step.

    Args:
        members: the examples of each member.
        seeds: the seed of each member's order.
        args: their `max_steps` and batch size are used.
    """

    def __init__(self, members: Iterable[list[Example]], seeds: Iterable[int], args: TrainingArguments) -> None:
        members = list(members)
        self.examples = [example for examples in members for example in examples]
        batches = [_batches(examples, args, seed) for examples, seed in zip(members, seeds, strict=True)]
        self.steps = [[example for batch in step for example in batch] for step in zip(*batches, strict=True)]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> list[Example]:
        return self.steps[step]


def _batches(examples: list[Example], args: TrainingArguments, seed: int) -> list[list[Example]]:
    """The batch of each step of a single run: epoch after epoch, in the order that accelerate draws from the seed."""
    sampler = SeedableRandomSampler(examples, data_seed=seed)  # counts its epochs itself
    found: list[list[Example]] = []
    size = args.per_device_train_batch_size * args.world_size  # of all processes together
    while len(found) < args.max_steps:
        epoch = BatchSampler(sampler, size, args.dataloader_drop_last)
        found += [[examples[i] for i in batch] for batch in epoch]
    return found[: args.max_steps]


class MemberLosses:
    """The losses of each member in the steps that trained it: since the last log, and before."""

    def __init__(self, members: Iterable[str]) -> None:
        self._steps, self._logged_steps = Counter[str](), Counter[str]()
        self._sums: dict[str, Any] = dict.fromkeys(members, 0.0)
        self._logged_sums = dict.fromkeys(self._sums, 0.0)

    def add(self, losses: Mapping[str, torch.Tensor]) -> None:
        """Add parts of the current step's losses."""
        for name, loss in losses.items():
            self._sums[name] += loss.detach()

    def add_up(self) -> None:
        """Add up the losses since the last log over all processes."""
        if self._sums:
            sums = [torch.as_tensor(total, dtype=torch.float32) for total in self._sums.values()]
            self._sums = dict(zip(self._sums, add_up(sums), strict=True))

    def end_step(self, learning: Iterable[str]) -> None:
        """End the step of these members."""
        self._steps.update(learning)

    def means(self) -> dict[str, float]:
        """Mean losses over the steps since the last log, for members that made a step."""
        return {name: float(self._sums[name]) / steps for name, steps in self._steps.items()}

    def begin_anew(self) -> None:
        """Start again after a log."""
        self._logged_steps += self._steps
        self._logged_sums = {name: total + float(self._sums[name]) for name, total in self._logged_sums.items()}
        self._steps = Counter()
        self._sums = dict.fromkeys(self._sums, 0.0)

    def logged_means(self) -> dict[str, float]:
        """Mean losses over all logged steps."""
        return {name: total / max(self._logged_steps[name], 1) for name, total in self._logged_sums.items()}
