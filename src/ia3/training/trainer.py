"""One trainer, of one adapter or many at once: `TFewTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import TrainingArguments

from ia3.adapter.adapted import find_adapted
from ia3.errors import about
from ia3.scoring.scorer import Scorer
from ia3.training.choices import ChoiceTrainer
from ia3.training.described import described
from ia3.training.examples import Example, evaluation_examples, training_examples
from ia3.training.members import (
    Member,
    MemberLosses,
    Steps,
    arguments_of_one,
    by_name,
    check_batch,
    check_in_step,
    listed,
    only_active,
)
from ia3.training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.task.task import Task


class TFewTrainer(ChoiceTrainer):
    """Trains an adapter on a task, or several at once, with T-Few's three losses; a classifier with cross-entropy alone.

        TFewTrainer(model, recipe.training_arguments("run"), tokenizer, Member(task, rows), recipe).train()

    `evaluate()` measures loss and the task's metrics on the member's `eval_rows`, in the words of the task's first
    template; checkpoints hold the adapters and the state of training, and `train(resume_from_checkpoint=…)` goes on from
    one. A process trains on one device, the first that it sees (`CUDA_VISIBLE_DEVICES`); several devices take several
    processes (`torchrun`).

    Several members, which are several tasks, several seeds of a task, or several learning rates, train in step. A step is
    a step of every member: a batch of `per_device_train_batch_size` rows of each, all of which go through the model
    together, in parts of limited size. Each adapter ends where one member with its seed and its learning rate would end
    alone, to rounding: it sees its rows in the same order and the same words, it stops early when it would have stopped,
    and its loss, the norm to which its gradients are clipped, and the optimizer's state are its own. Random draws within
    the model are not: dropout in the base model falls on other numbers than in a run alone.

    Logs of several have the sum of the members' losses (`loss`) and each one's (`loss/NAME`); the metrics of `train()`
    have `train_loss` and `train_loss/NAME`, means over its steps. `evaluate()` measures each member that has `eval_rows`:
    `eval_NAME_loss`, `eval_NAME_accuracy`, …. To the arguments, the whole training is one epoch.

    Args:
        model: an `IA3Model` around a causal language model, an encoder-decoder, or a classifier of the task's labels.
            Adapters of members with names become trainable, and all others are frozen; one member without a name trains
            what is active, as it is, in any other model too.
        args: `recipe.training_arguments(…)`, or any `TrainingArguments`, which say all about steps and optimizer. Several
            members need `max_steps`. `data_seed`, when it is given, decides every member's order.
        processing_class: the model's tokenizer.
        members: who learns what: a `Member`, or several with names.
        recipe: its loss (a classifier's is cross-entropy always), its templates, its early stopping and what it does
            about long prompts; None: the paper's.
        **kwargs: the other arguments of `transformers.Trainer`; several members take no `optimizers`.

    Raises:
        InputError: see `listed` and `by_name`; rows do not fit a member's task (see `Scorer.questions`), or show one label
            only; or arguments have no meaning for several members.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        processing_class: PreTrainedTokenizerBase,
        members: Member | Iterable[Member],
        recipe: Recipe | None = None,
        **kwargs: Any,
    ) -> None:
        members, recipe = listed(members), recipe or Recipe()
        named, self._active = members[0].name is not None, only_active(members, model)
        self.members = by_name(members, model)
        self._in_step = len(self.members) > 1
        if self._in_step:
            check_in_step(args, kwargs)
            self._measures_each = kwargs.get("compute_metrics") is None
        else:
            [member] = self.members.values()
            args = arguments_of_one(args, member)
            kwargs["compute_metrics"] = kwargs.get("compute_metrics") or metrics_of(member.task)
            self._measures_each = False
        scorer = Scorer(model, processing_class)
        examples, held_out = {}, {}
        for name, member in self.members.items():
            with about(member.owner if self._in_step else None):
                found = training_examples(scorer, member.task, member.rows, recipe, member.seed_in(args))
                check_batch(found, args)
                examples[name] = self._of(name, found)
                if member.eval_rows is not None:
                    found = evaluation_examples(scorer, member.task, member.eval_rows, recipe)
                    held_out[name] = self._of(name, found)
        train_dataset: Any
        eval_dataset: Any
        if self._in_step:
            seeds = [member.seed_in(args) for member in self.members.values()]
            train_dataset, eval_dataset = Steps(examples.values(), seeds, args), held_out or None
        else:
            [train_dataset], [eval_dataset] = examples.values(), held_out.values() or [None]
        adapted = find_adapted(model)
        if named and adapted is not None:
            adapted.set_requires_grad([name for name in adapted.peft_config if name not in self.members], False)
            adapted.set_requires_grad(list(self.members))
        # Each member's parameters, where there are several.
        self._parameters: dict[str, list[nn.Parameter]] = {}
        if self._in_step and adapted is not None:
            self._parameters = {name: list(adapted.adapter_parameters(name)) for name in self.members}
        self._each = MemberLosses(self.members)
        super().__init__(scorer, args, train_dataset, recipe, list(self.members), eval_dataset, **kwargs)
        if self._in_step:
            # Whatever asks for clipping, here or in `Trainer`, asks the accelerator.
            self.accelerator.clip_grad_norm_ = self._clip_each  # type: ignore[method-assign]

    def _of(self, name: str, examples: Sequence[Example]) -> list[Example]:
        """Examples of a member. They name its adapter, unless that is active."""
        return [example.of(name, None if self._active else name) for example in examples]

    @property
    def trained_adapters(self) -> list[str]:
        """The members' adapters, or those that are active."""
        return super().trained_adapters if self._active else list(self.members)

    def steps_of(self, name: str) -> int:
        """After how many steps a member stopped, or how many there have been."""
        return self.stopping.stopped.get(name, self.state.global_step)

    def logged_as(self, name: str) -> str:
        """What logs call a member's loss; the metrics of `train()` have `train_` before it."""
        return f"loss/{name}" if self._in_step else "loss"

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`; the result is the average over steps where the recipe has an `ema_decay`.

        With `load_best_model_at_end` it is the best checkpoint, whose vectors are those of its step.
        """
        self._each = MemberLosses(self.members)
        return super().train(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and metrics of each member that has `eval_rows`, or of the one that is named (`eval_dataset`).

        The rows of one member may also be given here.
        """
        if isinstance(eval_dataset, str) and eval_dataset in self.members:
            if self._measures_each:
                self.compute_metrics = metrics_of(self.members[eval_dataset].task)
            if not self._in_step:
                eval_dataset = None
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _held_out(self, rows: Any) -> list[Example]:
        if self._in_step:
            return super()._held_out(rows)
        [(name, member)] = self.members.items()
        return self._of(name, evaluation_examples(self.scorer, member.task, rows, self.recipe))

    def _describe(self) -> None:
        """Let the model know what belongs beside its adapters in a folder, so that every command can use them."""
        model = self._adapted()
        if model is not None:
            for name in self.trained_adapters:
                # Several that are active at once are one member.
                member = self.members.get(name) or next(iter(self.members.values()))
                before = model.adapter_folders.get(name)
                model.adapter_folders[name] = described(member.task, self.recipe, member.rows, before)

    # Several members.

    def get_train_dataloader(self) -> DataLoader:
        """As `transformers.Trainer`'s; of several members a batch of all for each step, in order."""
        if not self._in_step:
            return super().get_train_dataloader()
        steps = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=1,
            sampler=SequentialSampler(self.train_dataset),  # type: ignore[arg-type]
            collate_fn=lambda items: self.data_collator(items[0]),
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(steps)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments' optimizer; of several members with groups of parameters of one each, at its learning rate."""
        made = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._in_step and not made:
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
        """As `ChoiceTrainer.training_step`, for the members that have not stopped."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._each.end_step(name for name in self.members if self.stopping.learns(name))
        return loss

    def _losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        losses, best = super()._losses(model, inputs)
        if model.training:
            self._each.add(losses)
        return losses, best

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and with the sum of several members' losses each one's."""
        if self._in_step and "loss" in logs:
            logs |= {self.logged_as(name): mean for name, mean in self._each.means().items()}
        if self._in_step and ("loss" in logs or "train_loss" in logs):
            self._each.begin_anew()
        if self._in_step and "train_loss" in logs:
            logs |= {f"train_{self.logged_as(name)}": mean for name, mean in self._each.logged_means().items()}
        super().log(logs, *args, **kwargs)


def metrics_of(task: Task) -> Callable[[Any], dict[str, float]]:
    """A task's metrics as the `compute_metrics` of a trainer whose predictions are indices of choices."""

    def name(index: int) -> str:
        return str(index) if task.labels is None else task.labels[index]

    return lambda result: task.metrics([*map(name, result.label_ids)], [*map(name, result.predictions)])
