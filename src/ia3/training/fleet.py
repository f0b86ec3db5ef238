"""Many adapters trained at once on one model in memory: `FleetTrainer`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler
from transformers import TrainingArguments

from ia3.adapter.adapted import find_adapted
from ia3.adapter.model import IA3Model
from ia3.errors import InputError, shown
from ia3.scoring.question import Question
from ia3.scoring.scorer import Scorer
from ia3.training.recipe import Recipe
from ia3.training.trainer import (
    Example,
    TFewTrainer,
    evaluation_examples,
    metrics_of,
    training_examples,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.task.task import Task


@dataclass(frozen=True)
class Member:
    """An adapter of a fleet, and what it learns.

    Attributes:
        name: the adapter's name in the model.
        task: says what the rows mean.
        rows: labelled rows to learn from: a list of dictionaries, a DataFrame, a `datasets.Dataset` (see `as_rows`).
        seed: decides the order of the rows and the draw of templates, as the arguments' seed does for an adapter that
            is trained alone.
        learning_rate: the highest; None: the arguments'.
        eval_rows: labelled rows for `evaluate()`.
    """

    name: str
    task: Task
    rows: Any
    seed: int = 0
    learning_rate: float | None = None
    eval_rows: Any = None


class FleetTrainer(TFewTrainer):
    """Trains several adapters of one model at once: several tasks, several seeds of a task, several learning rates.

    A step is a step of every member: a batch of `per_device_train_batch_size` rows of each, all of which go through the
    model together, in parts of limited size. Each adapter ends where a `TFewTrainer` with its seed and its learning rate
    would have brought it alone, to rounding: it sees its rows in the same order and the same words, it stops early when
    it would have stopped, and its loss, the norm to which its gradients are clipped, and the optimizer's state are its
    own. Random draws within the model are not: dropout in the
    base model falls on other numbers than in a run alone.

    Logs have the sum of the members' losses (`loss`) and each one's (`loss/NAME`); the metrics of `train()` have
    `train_loss` and `train_loss/NAME`, means over its steps. `evaluate()` measures each member that has `eval_rows` on
    them: `eval_NAME_loss`, `eval_NAME_accuracy`, …. Checkpoints hold all adapters of the model. To the arguments, the
    whole training is one epoch.

    Args:
        model: an `IA3Model` that has the members' adapters; they become trainable, and all others are frozen.
        args: `recipe.training_arguments(…)`, or any `TrainingArguments` with `max_steps`; of their seeds, `data_seed`
            decides every member's order when it is given, as it does alone.
        processing_class: the model's tokenizer.
        members: who learns what.
        recipe: as in `TFewTrainer`.
        **kwargs: the other arguments of `transformers.Trainer`, without `optimizers`.

    Raises:
        InputError: no members, a name that is given twice or is no adapter's, merged adapters, rows that do not fit a
            member's task or show one label only, or arguments that have no meaning for a fleet.
    """

    def __init__(
        self,
        model: IA3Model,
        args: TrainingArguments,
        processing_class: PreTrainedTokenizerBase,
        members: Iterable[Member],
        recipe: Recipe | None = None,
        **kwargs: Any,
    ) -> None:
        members, recipe = list(members), recipe or Recipe()
        _check(model, args, members, kwargs)
        if len(members) == 1:
            self.task = members[0].task
            kwargs.setdefault("compute_metrics", metrics_of(self.task))
        self.members = {member.name: member for member in members}
        # One that is active has all rows without being named, also in a model that cannot tell rows apart.
        self._alone = len(members) == 1 and model.active_adapters == [members[0].name]
        examples, held_out = {}, {}
        scorer = Scorer(model, processing_class)
        for member in members:
            seed = member.seed if args.data_seed is None else args.data_seed
            name = None if self._alone else member.name
            try:
                found = training_examples(scorer, member.task, member.rows, recipe, seed, name)
                examples[member.name] = _batches(found, args, seed)
                if member.eval_rows is not None:
                    held_out[member.name] = evaluation_examples(scorer, member.task, member.eval_rows, recipe, name)
            except InputError as error:
                if len(members) == 1:
                    raise
                raise InputError(f"Member {member.name!r}: {error}") from error
        steps = _Steps([[one for batch in step for one in batch] for step in zip(*examples.values(), strict=True)])
        model.set_requires_grad([name for name in model.peft_config if name not in self.members], False)
        model.set_requires_grad(list(self.members))
        self._parameters = {name: list(model.adapter_parameters(name)) for name in self.members}
        self._count_anew()
        learners = [None] if self._alone else list(self.members)
        self._set_up(scorer, args, steps, held_out or None, recipe, learners, **kwargs)
        # Whatever asks for clipping, here or in `Trainer`, asks the accelerator.
        self.accelerator.clip_grad_norm_ = self._clip_each  # type: ignore[method-assign]

    @property
    def trained_adapters(self) -> list[str]:
        """The members' adapters."""
        return list(self.members)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`."""
        self._count_anew()
        return super().train(*args, **kwargs)

    def _learned(self) -> dict[str, tuple[Task, Any]]:
        return {name: (member.task, member.rows) for name, member in self.members.items()}

    def steps_of(self, name: str) -> int:
        """After how many steps a member stopped, or how many there have been."""
        return self.stopping.stopped.get(None if self._alone else name, self.state.global_step)

    def _count_anew(self) -> None:
        # Each member's steps and its losses in them: since the last log, and before it.
        self._steps, self._logged_steps = Counter[str](), Counter[str]()
        self._sums: dict[str, Any] = dict.fromkeys(self.members, 0.0)
        self._logged_sums = dict.fromkeys(self.members, 0.0)

    def get_train_dataloader(self) -> DataLoader:
        """A batch of all members for each step, in order."""
        steps = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=1,
            sampler=SequentialSampler(self.train_dataset),  # type: ignore[arg-type]
            collate_fn=lambda items: self.data_collator(items[0]),
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(steps)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments' optimizer, with groups of parameters of one member each, at its learning rate."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(*args, **kwargs)
        groups, optimizer.param_groups = optimizer.param_groups, []
        for name, member in self.members.items():
            mine = set(self._parameters[name])
            rate = {} if member.learning_rate is None else {"lr": member.learning_rate}
            for group in groups:
                parameters = [parameter for parameter in group["params"] if parameter in mine]
                if parameters:
                    optimizer.add_param_group({**group, "params": parameters, **rate})
        return optimizer

    def _clip_each(self, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor:
        """Clip each member's gradients to a norm of their own; returns that of all, before. (`parameters` are all.)"""
        self.accelerator.unscale_gradients()
        norms = [nn.utils.clip_grad_norm_(mine, max_norm, norm_type) for mine in self._parameters.values()]
        return torch.linalg.vector_norm(torch.stack(norms), norm_type)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As `TFewTrainer.training_step`, for the members that have not stopped."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._steps.update(name for name in self.members if self.stopping.learns(None if self._alone else name))
        return loss

    def _foreseen(self) -> list[Question]:
        steps: _Steps = self.train_dataset  # type: ignore[assignment]
        examples = {id(example): example for step in steps.steps for example in step}
        return [question for example in examples.values() for question in example.questions]

    def _losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str | None, torch.Tensor], torch.Tensor]:
        losses, best = super()._losses(model, inputs)
        if model.training:
            for name, loss in losses.items():
                self._sums[next(iter(self.members)) if name is None else name] += loss.detach()
        return losses, best

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and with the sum of losses each member's."""
        if "loss" in logs:
            logs |= {f"loss/{name}": float(self._sums[name]) / steps for name, steps in self._steps.items()}
        if "loss" in logs or "train_loss" in logs:
            self._logged_steps += self._steps
            self._logged_sums = {name: total + float(self._sums[name]) for name, total in self._logged_sums.items()}
            self._steps, self._sums = Counter(), dict.fromkeys(self.members, 0.0)
        if "train_loss" in logs:
            means = {name: total / max(self._logged_steps[name], 1) for name, total in self._logged_sums.items()}
            logs |= {f"train_loss/{name}": mean for name, mean in means.items()}
        super().log(logs, *args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and metrics of each member that has `eval_rows`, or of the one that is named (`eval_dataset`)."""
        if isinstance(eval_dataset, str) and eval_dataset in self.members:
            self.compute_metrics = metrics_of(self.members[eval_dataset].task)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[arg-type]


class _Steps(Dataset):
    """The examples of each step."""

    def __init__(self, steps: list[list[Example]]) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> list[Example]:
        return self.steps[step]


def _batches(examples: list[Example], args: TrainingArguments, seed: int) -> list[list[Example]]:
    """The batch of each step of a run alone: epoch after epoch, in the orders that accelerate draws from the seed."""
    sampler = SeedableRandomSampler(examples, data_seed=seed)  # counts its epochs itself
    size = args.per_device_train_batch_size
    if args.dataloader_drop_last and len(examples) < size:
        raise InputError(
            f"Expected at least one batch of {size} rows, found {len(examples)} rows and dataloader_drop_last."
        )
    found: list[list[Example]] = []
    while len(found) < args.max_steps:
        epoch = BatchSampler(sampler, size, args.dataloader_drop_last)
        found += [[examples[i] for i in batch] for batch in epoch]
    return found[: args.max_steps]


def _check(model: Any, args: TrainingArguments, members: Sequence[Member], kwargs: Mapping[str, Any]) -> None:
    if find_adapted(model) is None:
        raise InputError(f"Expected an IA3Model with the members' adapters, found a {type(model).__name__}.")
    names = [member.name for member in members]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice or not names:
        raise InputError(
            f"Expected members with names that differ, found {shown(twice)} twice."
            if twice
            else "Expected at least one member, found none; for example [Member('default', task, rows)]."
        )
    model.require_adapters(names)
    if model.ia3_routing.merged:
        raise InputError(
            f"Expected adapters that are not merged, found {shown(model.ia3_routing.merged)}; call unmerge_adapter() first."
        )
    for member in members:
        rate = member.learning_rate
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise InputError(f"Member {member.name!r}: expected a learning rate above 0, found {rate}.")
    # What would make a member's training another one than alone, or nothing at all.
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
        "no `optimizers`, found some; a fleet makes its own of the arguments' `optim`": "optimizers" not in kwargs,
    }
    for text, met in requirements.items():
        if not met:
            raise InputError(f"For a fleet, expected {text}.")
