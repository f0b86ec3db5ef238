"""Training on questions with answer choices: `ChoiceTrainer`, `transformers.Trainer` with T-Few's loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from ia3.errors import InputError
from ia3.scoring.batch import Batch, normalized_scores, to_device
from ia3.scoring.question import Question
from ia3.scoring.scorer import Scorer
from ia3.trainer import Trainer
from ia3.training.averaging import MovingAverage
from ia3.training.examples import ONE, Example, collate_examples
from ia3.training.losses import tfew_loss
from ia3.training.recipe import Recipe
from ia3.training.stopping import StopAtFloor


class ChoiceTrainer(Trainer):
    """Trains a model to choose among answers, by T-Few's loss; a classifier by cross-entropy alone.

    The loss is a sum over members, whose examples share the batches: for each a mean over its own. A member stops early
    and is averaged by itself. A process trains on one device, the first that it sees (`CUDA_VISIBLE_DEVICES`); several
    devices take several processes (`torchrun`).

    Args:
        scorer: of the model, which may be any, adapted or not.
        args: all about steps and optimizer.
        train_dataset: `Example`s, a list of them for a batch if the members train in step (see `Steps`).
        recipe: its loss (a classifier's is cross-entropy always), its early stopping, and its average.
        members: whose examples they are.
        eval_dataset: `Example`s for `evaluate()`, or several data sets by name.
        **kwargs: the other arguments of `transformers.Trainer`.
    """

    # `compute_loss` returns a mean over the batch, whatever arguments the wrapped model takes.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        scorer: Scorer,
        args: TrainingArguments,
        train_dataset: Any,
        recipe: Recipe,
        members: Sequence[str] = (ONE,),
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        self.recipe, self.scorer = recipe, scorer
        self._loss_weights = recipe.loss_weights
        if not scorer.family.reads_answers:  # the likelihood of the right label is cross-entropy
            others = dict.fromkeys(("unlikelihood_weight", "length_normalized_weight"), 0.0)
            self._loss_weights |= {"likelihood_weight": 1.0, **others}
        self.stopping = StopAtFloor(recipe.early_stopping, members)
        self._average: MovingAverage | None = None
        # `Trainer` would spread one process over all the devices it sees (`nn.DataParallel`) and copy the model to each
        # of them in every step. This is how it keeps a model on one device that is split over several.
        args = copy(args)
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(
            scorer.model,
            args,
            data_collator=collate_examples,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=scorer.tokenizer,
            **kwargs,
        )
        self.add_callback(self.stopping)
        # Several processes have to pass through the model, forward and backward, equally often: each once a batch.
        self._one_process = self.args.world_size == 1 and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments' optimizer; with the recipe's `ema_decay` it averages what it trains."""
        optimizer = super().create_optimizer(*args, **kwargs)
        stepped = getattr(optimizer, "optimizer", optimizer)  # the one of an earlier training has a wrapper around it
        if self.recipe.ema_decay and (self._average is None or self._average.optimizer is not stepped):
            self._average = MovingAverage(stepped, self.recipe.ema_decay)
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`; the result is the average over steps where the recipe has an `ema_decay`.

        With `load_best_model_at_end` it is the best checkpoint, whose vectors are those of its step.
        """
        self.scorer.try_packing(self._foreseen())
        self._describe()
        output = super().train(*args, **kwargs)
        if self._average is not None and not self.args.load_best_model_at_end:
            self._average.use()
        return output

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `transformers.Trainer.evaluate`; `eval_dataset` may be labelled rows, where the trainer has one task."""
        return super().evaluate(self._asked(eval_dataset), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.predict`; `test_dataset` may be labelled rows, where the trainer has one task."""
        return super().predict(self._asked(test_dataset), *args, **kwargs)

    def _asked(self, dataset: Any) -> Any:
        """Labelled rows as examples; a name, examples or None as they are."""
        if dataset is None or isinstance(dataset, str):
            return dataset
        if isinstance(dataset, list) and dataset and isinstance(dataset[0], Example):
            return dataset
        return self._held_out(dataset)

    def _held_out(self, rows: Any) -> list[Example]:
        """Labelled rows as examples to measure on."""
        raise InputError("Expected rows of one task, found a trainer of several; give each member its eval_rows.")

    def _describe(self) -> None:
        """Let the model know what belongs beside its adapters in a folder, so that every command can use them."""

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(*args, **kwargs)
        self._describe()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.stopping.all_stopped:  # a run that goes on from where it stopped
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward, in the words of templates drawn for this step; returns the loss, summed over members.

        They go part by part, so that memory holds the activations of one; together where several processes train.
        """
        inputs = self._drawn(inputs)
        if not self._one_process:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()  # before anything is shared: an evaluation shares more
        inputs = _some(inputs, [i for i, name in enumerate(inputs["members"]) if self.stopping.learns(name)])
        losses = []
        for group, batch in self.scorer.through(model).training_batches(inputs["questions"]):
            part = {**_some(inputs, group), "batch": batch}
            losses.append(super().training_step(model, part, num_items_in_batch))
        if not losses:  # nobody learns any more
            return torch.zeros((), device=self.args.device)
        return torch.stack(losses[::-1]).sum()

    def _foreseen(self) -> list[Question]:
        """Questions that training is known to ask."""
        dataset: Any = self.train_dataset
        examples: list[Example] = dataset if isinstance(dataset, list) else getattr(dataset, "examples", [])
        return [question for example in examples for question in example.questions]

    def _drawn(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if "examples" not in inputs:
            return inputs
        inputs = {**inputs}
        questions = [example.drawn(self.state.global_step) for example in inputs.pop("examples")]
        return {**inputs, "questions": questions}

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

    def _mean(self, loss: torch.Tensor) -> float:
        """A batch's term of the loss over all processes and, as each of its parts gives a share, over an optimizer step."""
        if self.args.world_size > 1:
            loss = self.accelerator.reduce(loss, "mean")  # type: ignore[assignment]
        return float(loss) / self.current_gradient_accumulation_steps

    def _losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The loss of each member, a scalar; the best choice of each question (B,)."""
        questions: list[Question] = inputs["questions"]
        scorer = self.scorer.through(model)
        best = torch.empty_like(inputs["label"])
        losses: dict[str, list[torch.Tensor]] = {}
        doubts: dict[str, list[torch.Tensor]] = {}
        # The loss is a mean, so that the parts of a batch add up: parts of similar length, of which little is padding.
        for group, part in self._parts(scorer, inputs):
            asked = [questions[i] for i in group]
            part = to_device(part, best.device)
            log_probs = scorer.log_probs(part)
            for name, rows in _by_member([inputs["members"][i] for i in group]).items():
                mine = log_probs[rows], part["mask"][rows], part["label"][rows]
                share = len(mine[0]) / inputs["counts"][name]
                loss = tfew_loss(*mine, **self._loss_weights)
                losses.setdefault(name, []).append(loss.total * share)
                doubts.setdefault(name, []).append(loss.length_normalized.detach() * share)
            scores = normalized_scores(log_probs.detach(), part["mask"], self.recipe.length_normalization)
            found = [
                question.listed(choice) for question, choice in zip(asked, scores.argmax(-1).tolist(), strict=True)
            ]
            best[group] = torch.tensor(found, device=best.device)
        if model.training and self.stopping.rule is not None:
            self.stopping.add({name: self._mean(torch.stack(parts).sum()) for name, parts in doubts.items()})
        return {name: torch.stack(parts).sum() for name, parts in losses.items()}, best

    def _parts(self, scorer: Scorer, inputs: dict[str, Any]) -> Iterator[tuple[list[int], Batch]]:
        """A batch's questions in parts that go through the model at once: indices, and the part."""
        questions = inputs["questions"]
        if scorer.model.training and ("batch" in inputs or not self._one_process):
            batch = inputs["batch"] if "batch" in inputs else scorer.collate(questions)
            return iter([([*range(len(questions))], batch)])
        return scorer.batches(questions)

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


def _some(inputs: dict[str, Any], indices: list[int]) -> dict[str, Any]:
    """Some of a batch's questions; `counts` stay those of the whole."""
    lists = {name: [inputs[name][i] for i in indices] for name in ("questions", "members")}
    return {**inputs, "label": inputs["label"][indices], **lists}


def _by_member(members: Sequence[str]) -> dict[str, list[int] | slice]:
    """Which questions are whose; a slice when all are one member's, for then nothing has to be copied."""
    names = list(dict.fromkeys(members))
    if len(names) == 1:
        return {names[0]: slice(None)}
    return {name: [i for i, its in enumerate(members) if its == name] for name in names}
