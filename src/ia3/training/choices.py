"""Training on questions with answer choices: `ChoiceTrainer`, `transformers.Trainer` with T-Few's loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from ia3.adapter.placement import is_sharded, is_spread, shard
from ia3.errors import InputError
from ia3.processes import add_up, add_up_gradients, count, leave_at_exit, not_fsdp2, sharded_by_launcher
from ia3.scoring.batch import Batch, groups, normalized_scores, pass_tokens, to_device, training_groups
from ia3.scoring.encoder import SentenceEncoder
from ia3.scoring.question import Question
from ia3.scoring.scorer import Scorer
from ia3.trainer import Trainer
from ia3.training.averaging import MovingAverage
from ia3.training.examples import ONE, Example, collate_examples
from ia3.training.losses import contrastive_loss, tfew_loss
from ia3.training.recipe import Recipe
from ia3.training.stopping import StopAtFloor


class ChoiceTrainer(Trainer):
    """Trains a model to choose among answers with T-Few's loss; an encoder with a head with cross-entropy only; a
    sentence encoder with the contrastive loss over all pairs of a batch.

    Members share the batches. The loss is the sum over members of the mean over each member's examples. Each member has
    its own early stopping and average. A process trains on one device, the first visible one (`CUDA_VISIBLE_DEVICES`);
    several devices need several processes (`torchrun`). Each of them then has a part of every batch, so that the result is
    that of one process with the same batches, and gradients, which are few numbers, are added up once a step. With FSDP 2
    (`TrainingArguments(fsdp=True)`, `accelerate launch`) each has a share of the base model's layers, too; see `shard`. A model
    with a `device_map` stays where it is.

    Args:
        scorer: the scorer of the model, which may be adapted or not.
        args: steps, batch size and optimizer.
        train_dataset: `Example`s; if several members train, one list of them per step (see `Steps`).
        recipe: decides the loss (always cross-entropy for an encoder), early stopping and average.
        members: the names of the members.
        eval_dataset: `Example`s for `evaluate()`, or several data sets by name.
        **kwargs: the other arguments of `transformers.Trainer`.
    """

    # `compute_loss` returns a mean over the batch, for any arguments of the wrapped model.
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
        if not scorer.family.reads_answers:  # then the likelihood of the right label is the cross-entropy
            others = dict.fromkeys(("unlikelihood_weight", "length_normalized_weight"), 0.0)
            self._loss_weights |= {"likelihood_weight": 1.0, **others}
        if scorer.family.embeds and recipe.early_stopping is not None:
            raise InputError(
                f"Expected a recipe without early_stopping for a sentence encoder, whose loss has no such floor, found "
                f"{recipe.name!r}; use the recipe 'sentence'."
            )
        self.stopping = StopAtFloor(recipe.early_stopping, members)
        self._average: MovingAverage | None = None
        # `Trainer` would spread one process over all visible devices (`nn.DataParallel`) and copy the model to each of
        # them in every step. With `_n_gpu` 1, as for a model that is split over devices, it does not.
        args = copy(args)
        args._n_gpu = min(args.n_gpu, 1)
        self._sharded = _sharded(scorer.model, args)
        if is_spread(scorer.model) and args.world_size > 1:
            raise InputError(
                "Expected one process for a model with a device_map, found several; start one, or load the model without it."
            )
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
        # A sentence encoder's loss compares all texts of a batch, so that each process reads all of them.
        self._shares = self.args.world_size > 1 and not scorer.family.embeds
        if self.args.world_size > 1:
            leave_at_exit()
        if self.args.world_size > 1 or is_spread(scorer.model):
            self.accelerator.prepare_model = self._placed  # type: ignore[method-assign]

    def _placed(self, model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        """A model on its device, without a wrapper: gradients are added up by `training_step`."""
        return model if self._sharded or is_spread(model) else model.to(self.args.device)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not (self._sharded or is_spread(model)):
            super()._move_model_to_device(model, device)

    def get_train_dataloader(self) -> DataLoader:
        """The dataloader of `transformers.Trainer`; with several processes, whole batches for each of them."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=self._train_batch_size * self.args.world_size,
            sampler=self._get_train_sampler(),
            collate_fn=self.data_collator,
            drop_last=self.args.dataloader_drop_last,
        )
        return prepare_data_loader(
            loader,
            num_processes=1,
            process_index=0,
            use_seedable_sampler=self.accelerator.use_seedable_sampler,
            data_seed=self.args.data_seed,
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments' optimizer; with the recipe's `ema_decay` it averages the parameters."""
        optimizer = super().create_optimizer(*args, **kwargs)
        stepped = getattr(optimizer, "optimizer", optimizer)  # that of an earlier training is wrapped
        if self.recipe.ema_decay and (self._average is None or self._average.optimizer is not stepped):
            self._average = MovingAverage(stepped, self.recipe.ema_decay)
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `transformers.Trainer.train`. With the recipe's `ema_decay`, the result is the average over steps.

        With `load_best_model_at_end` the result is the best checkpoint, with the vectors of its step.
        """
        self.scorer.foresee(self._foreseen())
        self._describe()
        output = super().train(*args, **kwargs)
        if self._average is not None and not self.args.load_best_model_at_end:
            self._average.use()
        return output

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as `transformers.Trainer.evaluate`. With one task, `eval_dataset` may also be labelled rows."""
        return super().evaluate(self._asked(eval_dataset), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict as `transformers.Trainer.predict`. With one task, `test_dataset` may also be labelled rows."""
        return super().predict(self._asked(test_dataset), *args, **kwargs)

    def _asked(self, dataset: Any) -> Any:
        """Labelled rows as examples; a name, examples or None unchanged."""
        if dataset is None or isinstance(dataset, str):
            return dataset
        if isinstance(dataset, list) and dataset and isinstance(dataset[0], Example):
            return dataset
        return self._held_out(dataset)

    def _held_out(self, rows: Any) -> list[Example]:
        """Labelled rows as evaluation examples."""
        raise InputError("Expected rows of one task, found a trainer of several; give each member its eval_rows.")

    def _describe(self) -> None:
        """Give the model the other files of its adapters' folders (task, recipe, …), so that every command can use
        them."""

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(*args, **kwargs)
        self._describe()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.stopping.all_stopped:  # a resumed run that has already stopped
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward with the templates drawn for this step; return the loss, summed over members.

        Parts of the batch run one after another, so that memory holds the activations of one part.
        """
        inputs = self._drawn(inputs)
        model.train()  # before prefixes are shared: evaluation shares more
        inputs = _some(inputs, [i for i, name in enumerate(inputs["members"]) if self.stopping.learns(name)])
        if self._shares and not self._sharded:
            inputs = _some(inputs, self._dealt(inputs)[self.args.process_index])
        losses, before = [], self.stopping.step_losses
        for part in self._training_parts(self.scorer.through(model), inputs):
            losses.append(super().training_step(model, part, num_items_in_batch))
        # All members may have stopped, or a process may have no example.
        loss = torch.stack(losses[::-1]).sum() if losses else torch.zeros((), device=self.args.device)
        return self._added_up(loss, before) if self._shares else loss

    def _added_up(self, loss: torch.Tensor, before: Sequence[float]) -> torch.Tensor:
        """The loss of all processes; adds up their gradients, and what early stopping looks at.

        Args:
            loss: of this process's part of the batch.
            before: what early stopping has of earlier batches of the optimizer step, which is of all processes already.
        """
        earlier = torch.tensor(before, device=loss.device, dtype=torch.float32)
        doubts = torch.tensor(self.stopping.step_losses, device=loss.device, dtype=torch.float32) - earlier
        assert self.model is not None
        if self.accelerator.sync_gradients:
            parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            loss, doubts = add_up_gradients(parameters, [loss, doubts])
        else:
            loss, doubts = add_up([loss, doubts])
        self.stopping.step_losses = (earlier + doubts).tolist()
        return loss

    def _training_parts(self, scorer: Scorer, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The parts of a batch, each for a forward and a backward pass before the next."""
        if isinstance(scorer.family, SentenceEncoder):  # its loss is of all pairs of a member's questions
            for name in dict.fromkeys(inputs["members"]):
                yield _some(inputs, [i for i, its in enumerate(inputs["members"]) if its == name])
            return
        if self._shares and self._sharded:
            yield from self._equal_parts(scorer, inputs)
            return
        for group, batch in scorer.training_batches(inputs["questions"]):
            yield {**_some(inputs, group), "batch": batch}

    def _dealt(self, inputs: dict[str, Any]) -> list[list[int]]:
        """For each process its part of a batch, as indices."""
        all_of_them = [*range(len(inputs["members"]))]
        return [all_of_them[process :: self.args.world_size] for process in range(self.args.world_size)]

    def _equal_parts(self, scorer: Scorer, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """This process's parts of a batch, as many as each other process has, because all put layers together at the same time.
        A process that has none left makes a pass that does not count."""
        questions, tokens = inputs["questions"], pass_tokens(scorer.model)
        scorer.foresee(questions)  # together, so that no process alone has to find out which rows are exact
        divided = [
            [[mine[i] for i in group] for group in training_groups([questions[i] for i in mine], tokens)]
            for mine in self._dealt(inputs)
        ]
        parts = divided[self.args.process_index]
        for number in range(max(map(len, divided))):
            group = parts[number] if number < len(parts) else [0]
            batch = scorer.collate([questions[i] for i in group])
            yield {**_some(inputs, group), "batch": batch, "counted": number < len(parts)}

    def _foreseen(self) -> list[Question]:
        """Questions that training will ask, as far as known."""
        return _questions(self.train_dataset)

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
        """T-Few's loss of a batch; with `return_outputs`, also the index of the best choice of each question (B,)."""
        losses, best = self._losses(model, inputs)
        total = torch.stack(list(losses.values())).sum()
        return (total, best) if return_outputs else total

    def _mean(self, loss: torch.Tensor) -> float:
        """A part's share of the mean loss over the optimizer step."""
        return float(loss) / self.current_gradient_accumulation_steps

    def _losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The loss of each member, a scalar; the best choice of each question (B,)."""
        questions: list[Question] = inputs["questions"]
        scorer = self.scorer.through(model)
        if model.training and isinstance(scorer.family, SentenceEncoder):
            return self._contrasts(scorer.family, inputs), inputs["label"]
        best = torch.empty_like(inputs["label"])
        losses: dict[str, list[torch.Tensor]] = {}
        doubts: dict[str, list[torch.Tensor]] = {}
        # The loss is a mean over the batch, so the parts add up. Parts have similar lengths, so there is little
        # padding.
        for group, part in self._parts(scorer, inputs):
            asked = [questions[i] for i in group]
            part = to_device(part, best.device)
            log_probs = scorer.log_probs(part)
            for name, rows in _by_member([inputs["members"][i] for i in group]).items():
                mine = log_probs[rows], part["mask"][rows], part["label"][rows]
                weights = _weights([inputs["weights"][i] for i in group], best.device)
                share = len(mine[0]) / inputs["counts"][name] if inputs.get("counted", True) else 0.0
                loss = tfew_loss(*mine, **self._loss_weights, weights=None if weights is None else weights[rows])
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

    def _contrasts(self, family: SentenceEncoder, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The contrastive loss of each member."""
        questions, device = inputs["questions"], inputs["label"].device
        order, found = [], []
        for group in groups(questions, pass_tokens(family.model)):
            order += group
            found.append(family.embeddings(to_device(family.pack([questions[i] for i in group]), device)))
        embeddings = torch.cat(found)[torch.tensor(order, device=device).argsort()]
        weights = _weights(inputs["weights"], device)
        return {
            name: contrastive_loss(
                embeddings[rows],
                inputs["label"][rows],
                self.recipe.temperature,
                None if weights is None else weights[rows],
            )
            for name, rows in _by_member(inputs["members"]).items()
        }

    def _parts(self, scorer: Scorer, inputs: dict[str, Any]) -> Iterator[tuple[list[int], Batch]]:
        """Divide a batch's questions into parts for single passes: indices, and the part."""
        questions = inputs["questions"]
        if "batch" in inputs or self._sharded:  # of which evaluation makes a pass for each batch, as other processes do
            batch = inputs["batch"] if "batch" in inputs else scorer.collate(questions)
            return iter([([*range(len(questions))], batch)])
        return scorer.batches(questions)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """Measure as `transformers.Trainer.evaluation_loop`."""
        if self._sharded:  # so that no process alone has to find out which rows are exact
            self.scorer.foresee(_questions(dataloader.dataset))
        return super().evaluation_loop(dataloader, *args, **kwargs)

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


def _sharded(model: nn.Module, args: TrainingArguments) -> bool:
    """Whether processes have shares of a model's layers; they get them here if that is asked for, which the arguments then forget.

    Raises:
        InputError: another way to divide a model is asked for, or vectors are divided, too.
    """
    wanted = sharded_by_launcher()
    if args.deepspeed:
        raise not_fsdp2("DeepSpeed")
    if args.fsdp:
        plugin: dict[str, Any] = args.fsdp_plugin_args or {}
        if plugin.get("fsdp_version") != 2:
            raise not_fsdp2(f"fsdp_version {plugin.get('fsdp_version')}")
        for name in ("cpu_offload", "activation_checkpointing"):
            if plugin.get(name):
                raise not_fsdp2(f"fsdp_config {name}")
        wanted, args.fsdp, args.fsdp_plugin_args = True, None, None
    if wanted and args.world_size == 1:
        raise InputError(f"Expected several processes for FSDP, found WORLD_SIZE={count()}; start them by torchrun.")
    if wanted and not is_sharded(model):
        shard(model, args.device)
    if any(parameter.requires_grad and hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise InputError(
            "Expected vectors that are whole in each process, found shares of them; divide the model by `shard`."
        )
    return is_sharded(model)


def _questions(dataset: Any) -> list[Question]:
    """The questions of a data set's examples, as far as they are known."""
    examples: list[Example] = dataset if isinstance(dataset, list) else getattr(dataset, "examples", [])
    return [question for example in examples for question in example.questions]


def _some(inputs: dict[str, Any], indices: list[int]) -> dict[str, Any]:
    """Some of a batch's questions; `counts` stay those of the whole batch."""
    lists = {name: [inputs[name][i] for i in indices] for name in ("questions", "members", "weights")}
    return {**inputs, "label": inputs["label"][indices], **lists}


def _weights(weights: Sequence[float], device: torch.device) -> torch.Tensor | None:
    """Weights of questions as a tensor (B,); None if all are 1."""
    return None if all(weight == 1 for weight in weights) else torch.tensor(weights, device=device)


def _by_member(members: Sequence[str]) -> dict[str, list[int] | slice]:
    """Member → indices of its questions; a slice if all belong to one member, to avoid copies."""
    names = list(dict.fromkeys(members))
    if len(names) == 1:
        return {names[0]: slice(None)}
    return {name: [i for i, its in enumerate(members) if its == name] for name in names}
