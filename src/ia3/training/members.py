"""What a trainer trains: each `Member` an adapter with its task and rows; how several of them train in step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from torch.utils.data import BatchSampler, Dataset
from transformers import TrainingArguments

from ia3.adapter.adapted import find_adapted
from ia3.errors import InputError, shown
from ia3.training.examples import ONE, Example

if TYPE_CHECKING:
    import torch

    from ia3.task.task import Task


@dataclass(frozen=True)
class Member:
    """An adapter to train, with its task and rows.

    Attributes:
        task: says what the rows mean.
        rows: labelled rows to learn from: a list of dictionaries, a DataFrame, a `datasets.Dataset` (see `as_rows`).
        name: the adapter's name in the model; one member may leave it out and train what is active.
        seed: decides the order of the rows and the draw of templates; None: the arguments'.
        learning_rate: the highest; None: the arguments'.
        eval_rows: labelled rows for `evaluate()`.
        title: what errors call it, if not by its name.
    """

    task: Task
    rows: Any
    name: str | None = None
    seed: int | None = None
    learning_rate: float | None = None
    eval_rows: Any = None
    title: str | None = None

    def seed_in(self, args: TrainingArguments) -> int:
        """What decides its order: the arguments' `data_seed` where they have one, else its own, else their `seed`."""
        return next(seed for seed in (args.data_seed, self.seed, args.seed) if seed is not None)

    @property
    def owner(self) -> str:
        """What errors call it."""
        return repr(self.title) if self.title else f"Member {self.name!r}"


def listed(members: Member | Iterable[Member]) -> list[Member]:
    """One member or several as a list. Raises `InputError` for none, and for what is no member."""
    found = [members] if isinstance(members, Member) else list(members)
    if not found:
        raise InputError("Expected at least one member, found none; for example Member(task, rows).")
    for one in found:
        if not isinstance(one, Member):
            kind = type(one if isinstance(members, (list, tuple)) else members).__name__
            raise InputError(f"Expected a Member or several, found a {kind}; for example Member(task, rows).")
    return found


def only_active(members: Sequence[Member], model: nn.Module) -> bool:
    """Whether the members train what is active in the model, and nothing else.

    Their questions then name no adapter, and models that cannot tell rows apart can be trained too.
    """
    [first, *others] = members
    adapted = find_adapted(model)
    active = [] if adapted is None else adapted.active_adapters
    return not others and (first.name is None or active == [first.name])


def by_name(members: Sequence[Member], model: nn.Module) -> dict[str, Member]:
    """Members by their names; one without has the active adapter's.

    Raises:
        InputError: a name that is missing, given twice or no adapter's, merged adapters, or a learning rate that is none.
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
    """The arguments with a member's own seed and learning rate."""
    args = copy(args)
    if member.seed is not None:
        args.data_seed = member.seed_in(args)
    if member.learning_rate is not None:
        args.learning_rate = member.learning_rate
    return args


def check_in_step(args: TrainingArguments, kwargs: Mapping[str, Any]) -> None:
    """Raise `InputError` for what would make several members' training another one than alone, or nothing at all."""
    strategy = getattr(args, "train_sampling_strategy", "random")
    seedable = getattr(args.accelerator_config, "use_seedable_sampler", True)
    alone = args.world_size == 1 and not args.deepspeed and not args.fsdp
    requirements = {
        f"max_steps above 0, found {args.max_steps}; members' epochs differ in length": args.max_steps > 0,
        f"gradient_accumulation_steps of 1, found {args.gradient_accumulation_steps}; batches go through the model in "
        f"parts anyway, so make them larger (per_device_train_batch_size)": args.gradient_accumulation_steps == 1,
        f"one process, found {args.world_size}, or DeepSpeed or FSDP": alone,
        f"train_sampling_strategy 'random' with use_seedable_sampler, found {str(strategy)!r} and {seedable}": seedable
        and strategy == "random",
        "no `optimizers`, found some; the trainer makes its own of the arguments' `optim`": "optimizers" not in kwargs,
    }
    for text, met in requirements.items():
        if not met:
            raise InputError(f"For several members, expected {text}.")


def check_batch(examples: Sequence[Example], args: TrainingArguments) -> None:
    """Raise `InputError` for rows that are too few for a batch, where only whole ones are taken."""
    size = args.per_device_train_batch_size
    if args.dataloader_drop_last and len(examples) < size:
        raise InputError(
            f"Expected at least one batch of {size} rows, found {len(examples)} rows and dataloader_drop_last."
        )


class Steps(Dataset):
    """The examples of each step of members that train in step: a batch of each member, which it would have had alone.

    Args:
        members: each one's examples.
        seeds: and what decides their order.
        args: `max_steps` of them, and batches' size.
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
    """The batch of each step of a run alone: epoch after epoch, in the orders that accelerate draws from the seed."""
    sampler = SeedableRandomSampler(examples, data_seed=seed)  # counts its epochs itself
    found: list[list[Example]] = []
    while len(found) < args.max_steps:
        epoch = BatchSampler(sampler, args.per_device_train_batch_size, args.dataloader_drop_last)
        found += [[examples[i] for i in batch] for batch in epoch]
    return found[: args.max_steps]


class MemberLosses:
    """Each member's losses in the steps in which it learned: since the last log, and before it."""

    def __init__(self, members: Iterable[str]) -> None:
        self._steps, self._logged_steps = Counter[str](), Counter[str]()
        self._sums: dict[str, Any] = dict.fromkeys(members, 0.0)
        self._logged_sums = dict.fromkeys(self._sums, 0.0)

    def add(self, losses: Mapping[str, torch.Tensor]) -> None:
        """Parts of the current step's losses."""
        for name, loss in losses.items():
            self._sums[name] += loss.detach()

    def end_step(self, learning: Iterable[str]) -> None:
        """These members have made a step."""
        self._steps.update(learning)

    def means(self) -> dict[str, float]:
        """Means over the steps since the last log, of those that made any."""
        return {name: float(self._sums[name]) / steps for name, steps in self._steps.items()}

    def begin_anew(self) -> None:
        """What is there has been logged."""
        self._logged_steps += self._steps
        self._logged_sums = {name: total + float(self._sums[name]) for name, total in self._logged_sums.items()}
        self._steps = Counter()
        self._sums = dict.fromkeys(self._sums, 0.0)

    def logged_means(self) -> dict[str, float]:
        """Means over all steps that have been logged."""
        return {name: total / max(self._logged_steps[name], 1) for name, total in self._logged_sums.items()}
