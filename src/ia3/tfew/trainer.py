"""The recipe: `transformers.Trainer` with T-Few's loss, optimizer and schedule."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainingArguments

from ia3.errors import InputError
from ia3.tfew.choices import (
    Question,
    batches,
    collate,
    normalized_scores,
    padding_id,
    to_device,
    token_log_probs,
)
from ia3.tfew.losses import tfew_loss
from ia3.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.tfew.task import Task


def training_arguments(output_dir: str | os.PathLike, steps: int = 1000, **kwargs: Any) -> TrainingArguments:
    """The paper's settings (Liu et al. 2022, section 3.3) as `transformers.TrainingArguments`.

    Adafactor with a learning rate of 3e-3 that rises over the first 6% of the steps and falls linearly to zero, in
    batches of 8.

    Args:
        output_dir: where checkpoints go.
        steps: optimizer steps; 1,000 in the paper. A model under 1B memorizes a few dozen examples within 60.
        **kwargs: any other field of `TrainingArguments`, or another value for one of these.
    """
    paper: dict[str, Any] = {
        "max_steps": steps,
        "optim": "adafactor",
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.06,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "label_names": ["label"],
        "logging_steps": 1,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return TrainingArguments(output_dir=str(output_dir), **{**paper, **kwargs})


class TFewTrainer(Trainer):
    """Trains the active adapter on a task with T-Few's three losses.

    `evaluate()` measures the loss and the task's metrics; checkpoints hold the adapter and the state of training, and
    `train(resume_from_checkpoint=…)` goes on from one.

    Args:
        model: an `IA3Model` around a causal language model.
        args: `training_arguments(…)`, or any `TrainingArguments`.
        processing_class: the model's tokenizer.
        task: says what the rows mean.
        train_dataset: labelled rows, a list of dictionaries or a `datasets.Dataset`.
        eval_dataset: the same, for `evaluate()`.
        unlikelihood_weight, length_normalized_weight, length_normalization: see `tfew_loss`.
        **kwargs: the other arguments of `transformers.Trainer`.

    Raises:
        InputError: rows do not fit the task (see `Task.questions`), or show one label only.
    """

    # `compute_loss` returns a mean over the batch, whatever arguments the wrapped model takes.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        processing_class: PreTrainedTokenizerBase,
        task: Task,
        train_dataset: Sequence[Mapping[str, Any]],
        eval_dataset: Sequence[Mapping[str, Any]] | None = None,
        unlikelihood_weight: float = 1.0,
        length_normalized_weight: float = 1.0,
        length_normalization: float = 1.0,
        **kwargs: Any,
    ) -> None:
        questions = training_questions(task, processing_class, train_dataset, model)
        held_out = None if eval_dataset is None else task.questions(processing_class, eval_dataset, model=model)
        if held_out is not None:
            kwargs.setdefault("compute_metrics", metrics_of(task))
        weights = (unlikelihood_weight, length_normalized_weight, length_normalization)
        self._set_up(model, args, processing_class, questions, held_out, weights, **kwargs)

    def _set_up(
        self,
        model: nn.Module,
        args: TrainingArguments,
        processing_class: PreTrainedTokenizerBase,
        train_dataset: Any,
        eval_dataset: Any,
        weights: tuple[float, float, float],
        **kwargs: Any,
    ) -> None:
        """Become a trainer of questions; `weights` are the last three arguments of `tfew_loss`."""
        self.weights = dict(
            zip(("unlikelihood_weight", "length_normalized_weight", "length_normalization"), weights, strict=True)
        )
        super().__init__(
            model,
            args,
            data_collator=collate_questions,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """T-Few's loss of a batch; with `return_outputs`, the index of the best-scoring choice of each question too."""
        losses, best = self._losses(model, inputs)
        total = torch.stack(list(losses.values())).sum()
        return (total, best) if return_outputs else total

    def _losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str | None, torch.Tensor], torch.Tensor]:
        """For each adapter that questions name the loss of its own, a scalar; the best choice of each question (B,)."""
        questions: list[Question] = inputs["questions"]
        best = torch.empty_like(inputs["label"])
        losses: dict[str | None, list[torch.Tensor]] = {}
        # The loss is a mean, so that the parts of a batch add up: parts of similar length, of which little is padding.
        for group in batches(questions):
            part = collate(model, [questions[i] for i in group], padding_id(self.processing_class))  # type: ignore[arg-type]
            part = to_device(part, best.device)
            log_probs = token_log_probs(model, part)
            for name, rows in _by_adapter([questions[i] for i in group]).items():
                mine = log_probs[rows], part["mask"][rows], part["label"][rows]
                share = len(mine[0]) / inputs["counts"][name]
                losses.setdefault(name, []).append(tfew_loss(*mine, **self.weights).total * share)
            scores = normalized_scores(log_probs.detach(), part["mask"], self.weights["length_normalization"])
            best[group] = scores.argmax(-1)
        return {name: torch.stack(parts).sum() for name, parts in losses.items()}, best

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The loss, the index of the best-scoring choice (B,), and the label (B,)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, best = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), None if prediction_loss_only else best, inputs["label"]


def training_questions(
    task: Task, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], model: nn.Module
) -> list[Question]:
    """Labelled rows as questions.

    Raises:
        InputError: rows do not fit the task (see `Task.questions`), or show one label only.
    """
    questions = task.questions(tokenizer, rows, model=model)
    shown = {question.label for question in questions}
    if len(shown) < 2:
        names = ", ".join(repr(list(task.choices)[label]) for label in shown if label is not None) or "none"
        raise InputError(
            f"Expected training rows of at least two labels, found only {names} in {len(questions)} rows; T-Few learns "
            f"from the difference."
        )
    return questions


def metrics_of(task: Task) -> Callable[[Any], dict[str, float]]:
    """A task's metrics as the `compute_metrics` of a trainer whose predictions are indices of choices."""
    names = list(task.choices)
    return lambda result: task.metrics([names[i] for i in result.label_ids], [names[i] for i in result.predictions])


def collate_questions(questions: list[Question]) -> dict[str, Any]:
    """A batch: `questions` as they are, packed later where the model is at hand; their labels, `label` (B,); and
    `counts`, how many of them each adapter has, which stay those of the whole when the batch is divided."""
    return {
        "label": torch.tensor([question.label for question in questions]),
        "questions": questions,
        "counts": Counter(question.adapter for question in questions),
    }


def divided(inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A batch as smaller ones, each of which goes through the model at once; their losses add up to the batch's."""
    questions: list[Question] = inputs["questions"]
    for group in batches(questions):
        yield {**inputs, "label": inputs["label"][group], "questions": [questions[i] for i in group]}


def _by_adapter(questions: Sequence[Question]) -> dict[str | None, list[int] | slice]:
    """Which questions are whose; a slice when all are one adapter's, for then nothing has to be copied."""
    names = list(dict.fromkeys(question.adapter for question in questions))
    if len(names) == 1:
        return {names[0]: slice(None)}
    return {name: [i for i, question in enumerate(questions) if question.adapter == name] for name in names}
