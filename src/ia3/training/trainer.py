"""The trainer of one adapter or many at once: `TFewTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import TrainingArguments

from ia3.adapter.adapted import find_adapted
from ia3.errors import about
from ia3.scoring.family import waits_for_question
from ia3.scoring.readings import Readings
from ia3.scoring.scorer import Scorer
from ia3.task.task import Task
from ia3.training.choices import ChoiceTrainer
from ia3.training.described import described
from ia3.training.examples import Example, evaluation_examples, training_examples
from ia3.training.head import fill_head
from ia3.training.members import (
    Member,
    MemberLosses,
    Steps,
    arguments_of_one,
    by_name,
    check_batch,
    check_in_step,
    generates,
    listed,
    only_active,
)
from ia3.training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.task.kinds import AnyTask


class TFewTrainer(ChoiceTrainer):
    """Trains one adapter or several at once with T-Few's three losses; for tasks whose answer is text, with the likelihood of
    the answer alone; an encoder with a head with cross-entropy only; a sentence encoder with `contrastive_loss`, and then its
    head as a logistic regression on the embeddings.

        TFewTrainer(model, recipe.training_arguments("run"), tokenizer, Member(task, rows), recipe).train()

    `evaluate()` measures the loss and the task's metrics on the member's `eval_rows`, with the task's first template.
    Checkpoints hold the adapters and the state of training; `train(resume_from_checkpoint=…)` resumes from one. A
    process trains on one device, the first visible one (`CUDA_VISIBLE_DEVICES`); several devices need several processes
    (`torchrun`), which share each batch: `per_device_train_batch_size` examples for each of them.

    Several members (several tasks, seeds or learning rates) train together. Each step has a batch of
    `per_device_train_batch_size` examples for every member. All go through the model together, in parts of limited
    size.
    Each adapter has the result of a separate run, to rounding: the same order and wordings of its examples, the same
    early stop, and a separate loss, gradient clipping and optimizer state. Only random draws in the model, such as
    dropout in the base model, differ from a separate run.

    With several members, logs have the sum of the losses (`loss`) and each member's loss (`loss/NAME`). The metrics of
    `train()` have `train_loss` and `train_loss/NAME`, the means over a member's steps. `evaluate()` measures each
    member that has `eval_rows`: `eval_NAME_loss`, `eval_NAME_accuracy`, …. The whole training counts as one epoch.

    Args:
        model: an `IA3Model` around a causal language model, an encoder-decoder, or an encoder with a head for the
            task's labels. Adapters of named members become trainable, and all others are frozen. A single member
            without a name trains the active parameters of any model as they are.
        args: `recipe.training_arguments(…)`, or any `TrainingArguments`; they decide steps and optimizer. Several
            members need `max_steps`. If `data_seed` is set, it decides the order of all members.
        processing_class: the model's tokenizer.
        members: a `Member`, or several with names.
        recipe: decides the loss (except an encoder's), templates, early stopping and long prompts;
            None: the paper's.
        readings: keeps what the base model reads of the rows' texts, for adapters that act from the question on; None: the
            trainer keeps it.
        **kwargs: the other arguments of `transformers.Trainer`; not `optimizers` with several members.

    Raises:
        InputError: rows do not fit a member's task (see `Scorer.questions`), or all have the same label, or arguments
            do not apply to several members; see also `listed` and `by_name`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        processing_class: PreTrainedTokenizerBase,
        members: Member | Iterable[Member],
        recipe: Recipe | None = None,
        readings: Readings | None = None,
        **kwargs: Any,
    ) -> None:
        members, recipe = listed(members), recipe or Recipe()
        recipe = recipe.likelihood_only if generates(members) else recipe
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
        waiting = [None] if self._active else [[name] for name in self.members]
        if readings is None and any(waits_for_question(model, names) for names in waiting):
            readings = Readings()
        scorer = Scorer(model, processing_class, readings)
        examples, held_out = {}, {}
        for name, member in self.members.items():
            with about(member.owner if self._in_step else None):
                found = training_examples(scorer, member.task, member.rows, recipe, member.seed_in(args), member.known)
                check_batch(found, args)
                examples[name] = self._of(name, found)
                if member.eval_rows is not None:
                    found = evaluation_examples(scorer, member.task, member.eval_rows, recipe)
                    held_out[name] = self._of(name, found)
        self._examples, self._filled = examples, 0  # the step that the heads of a sentence encoder were fitted at
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
        # The parameters of each member, if there are several.
        self._parameters: dict[str, list[nn.Parameter]] = {}
        if self._in_step and adapted is not None:
            self._parameters = {name: list(adapted.adapter_parameters(name)) for name in self.members}
        self._each = MemberLosses(self.members)
        super().__init__(scorer, args, train_dataset, recipe, list(self.members), eval_dataset, **kwargs)
        if self._in_step:
            # `Trainer` and this class clip gradients through the accelerator.
            self.accelerator.clip_grad_norm_ = self._clip_each  # type: ignore[method-assign]

    def _of(self, name: str, examples: Sequence[Example]) -> list[Example]:
        """The examples as a member's. They name its adapter, unless members train only the active adapters."""
        return [example.of(name, None if self._active else name) for example in examples]

    @property
    def trained_adapters(self) -> list[str]:
        """The names of the members' adapters, or of the active ones."""
        return super().trained_adapters if self._active else list(self.members)

    def steps_of(self, name: str) -> int:
        """The number of steps of a member, up to its early stop."""
        return self.stopping.stopped.get(name, self.state.global_step)

    def logged_as(self, name: str) -> str:
        """The name of a member's loss in logs; the metrics of `train()` prepend `train_`."""
        return f"loss/{name}" if self._in_step else "loss"

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `transformers.Trainer.train`. With the recipe's `ema_decay`, the result is the average over steps.

        With `load_best_model_at_end` the result is the best checkpoint, with the vectors of its step.
        """
        self._each = MemberLosses(self.members)
        output = super().train(*args, **kwargs)
        self._fill_heads()
        return output

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and metrics of each member with `eval_rows`, or of the member that `eval_dataset` names.

        With one member, `eval_dataset` may also be labelled rows.
        """
        if self.state.global_step != self._filled:
            self._fill_heads()
        if isinstance(eval_dataset, str) and eval_dataset in self.members:
            if self._measures_each:
                self.compute_metrics = metrics_of(self.members[eval_dataset].task)
            if not self._in_step:
                eval_dataset = None
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _fill_heads(self) -> None:
        """Fit the heads of a sentence encoder to the vectors of this step."""
        self._filled = self.state.global_step
        if self.scorer.family.embeds:
            for name in self.members:
                fill_head(self.scorer, self._examples[name], name)

    def _held_out(self, rows: Any) -> list[Example]:
        if self._in_step:
            return super()._held_out(rows)
        [(name, member)] = self.members.items()
        return self._of(name, evaluation_examples(self.scorer, member.task, rows, self.recipe))

    def _describe(self) -> None:
        """Give the model the other files of its adapters' folders (task, recipe, …), so that every command can use
        them."""
        model = self._adapted()
        if model is not None:
            for name in self.trained_adapters:
                # Several active adapters are one member.
                member = self.members.get(name) or next(iter(self.members.values()))
                before = model.adapter_folders.get(name)
                model.adapter_folders[name] = described(member.task, self.recipe, member.rows, before)

    # Several members.

    def get_train_dataloader(self) -> DataLoader:
        """The dataloader of `transformers.Trainer`; with several members, one batch of all members per step, in
        order."""
        if not self._in_step:
            return super().get_train_dataloader()
        steps = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=1,
            sampler=SequentialSampler(self.train_dataset),  # type: ignore[arg-type]
            collate_fn=lambda items: self.data_collator(items[0]),
            pin_memory=self.args.dataloader_pin_memory,
        )
        return steps if self.args.world_size > 1 else self.accelerator.prepare(steps)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments' optimizer; with several members, one parameter group per member, with its learning rate."""
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
        """Clip each member's gradients separately; return the norm of all gradients before. `parameters` are all."""
        self.accelerator.unscale_gradients()
        norms = [nn.utils.clip_grad_norm_(mine, max_norm, norm_type) for mine in self._parameters.values()]
        return torch.linalg.vector_norm(torch.stack(norms), norm_type)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The same as `ChoiceTrainer.training_step`, for members that have not stopped."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._each.end_step(name for name in self.members if self.stopping.learns(name))
        return loss

    def _losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        losses, best = super()._losses(model, inputs)
        if model.training:
            self._each.add(losses)
        return losses, best

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; with several members, also each member's loss."""
        if self._in_step and self._shares and ("loss" in logs or "train_loss" in logs):
            self._each.add_up()
        if self._in_step and "loss" in logs:
            logs |= {self.logged_as(name): mean for name, mean in self._each.means().items()}
        if self._in_step and ("loss" in logs or "train_loss" in logs):
            self._each.begin_anew()
        if self._in_step and "train_loss" in logs:
            logs |= {f"train_{self.logged_as(name)}": mean for name, mean in self._each.logged_means().items()}
        super().log(logs, *args, **kwargs)


def metrics_of(task: AnyTask) -> Callable[[Any], dict[str, float]]:
    """The task's metrics as `compute_metrics` for a trainer whose predictions are indices of choices, the most probable ones even
    where mistakes have costs; none for texts."""
    if not isinstance(task, Task):
        return lambda _: {}

    def name(index: int) -> str:
        return str(index) if task.labels is None else task.labels[index]

    return lambda result: task.metrics([*map(name, result.label_ids)], [*map(name, result.predictions)])
