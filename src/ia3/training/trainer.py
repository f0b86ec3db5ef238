"""The recipe: `transformers.Trainer` with T-Few's loss, optimizer and schedule."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from ia3.errors import InputError, shown
from ia3.scoring.batch import Batch, normalized_scores, to_device
from ia3.scoring.question import Question
from ia3.scoring.scorer import Scorer
from ia3.trainer import Trainer
from ia3.training.described import described
from ia3.training.losses import tfew_loss
from ia3.training.recipe import EarlyStopping, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.task.task import Task


@dataclass(frozen=True)
class Example:
    """A training row, as a question in the words of each template that training may draw.

    Attributes:
        questions: one for each template.
        key: with the step, decides which is drawn; differs from row to row.
    """

    questions: tuple[Question, ...]
    key: str = ""

    def drawn(self, step: int) -> Question:
        """The question that is asked in a step, the same whenever and in whatever batch it is asked."""
        if len(self.questions) == 1:
            return self.questions[0]
        return random.Random(f"{self.key} {step}").choice(self.questions)


class TFewTrainer(Trainer):
    """Trains the active adapter on a task with T-Few's three losses; a classifier with cross-entropy alone.

    `evaluate()` measures the loss and the task's metrics, in the words of its first template; checkpoints hold the
    adapter and the state of training, and `train(resume_from_checkpoint=…)` goes on from one. A process trains on one
    device, the first that it sees (`CUDA_VISIBLE_DEVICES`); several devices take several processes (`torchrun`).

    Args:
        model: an `IA3Model` around a causal language model, an encoder-decoder, or a classifier of the task's labels.
        args: `recipe.training_arguments(…)`, or any `TrainingArguments`, which say all about steps and optimizer.
        processing_class: the model's tokenizer.
        task: says what the rows mean.
        train_dataset: labelled rows: a list of dictionaries, a DataFrame, a `datasets.Dataset` (see `as_rows`).
        eval_dataset: the same, for `evaluate()`.
        recipe: its loss (a classifier's is cross-entropy always), its templates, its early stopping and what it does
            about long prompts; None: the paper's.
        **kwargs: the other arguments of `transformers.Trainer`.

    Raises:
        InputError: rows do not fit the task (see `Scorer.questions`), or show one label only.
    """

    # `compute_loss` returns a mean over the batch, whatever arguments the wrapped model takes.
    loss_is_scaled_for_ga = False

    task: Task | None = None
    """What its rows mean; None for a trainer of several tasks."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        processing_class: PreTrainedTokenizerBase,
        task: Task,
        train_dataset: Any,
        eval_dataset: Any = None,
        recipe: Recipe | None = None,
        **kwargs: Any,
    ) -> None:
        recipe = recipe or Recipe()
        self.task = task
        seed = args.seed if args.data_seed is None else args.data_seed
        scorer = Scorer(model, processing_class)
        examples = training_examples(scorer, task, train_dataset, recipe, seed)
        held_out = None
        if eval_dataset is not None:
            held_out = evaluation_examples(scorer, task, eval_dataset, recipe)
        kwargs.setdefault("compute_metrics", metrics_of(task))
        self._task, self._rows = task, train_dataset
        self._set_up(scorer, args, examples, held_out, recipe, [None], **kwargs)

    def _set_up(
        self,
        scorer: Scorer,
        args: TrainingArguments,
        train_dataset: Any,
        eval_dataset: Any,
        recipe: Recipe,
        learners: Sequence[str | None],
        **kwargs: Any,
    ) -> None:
        """Become a trainer of examples; `learners` are the adapters that their questions name."""
        self.recipe, self.scorer = recipe, scorer
        self._loss_weights = recipe.loss_weights
        if not scorer.family.reads_answers:  # the likelihood of the right label is cross-entropy
            others = dict.fromkeys(("unlikelihood_weight", "length_normalized_weight"), 0.0)
            self._loss_weights |= {"likelihood_weight": 1.0, **others}
        self.stopping = StopAtFloor(recipe.early_stopping, learners)
        self._average: MovingAverage | None = None
        # `Trainer` would spread one process over all the devices it sees (`nn.DataParallel`) and copy the model to each
        # of them in every step. This is how it keeps a model on one device that is split over several.
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
        """As `transformers.Trainer.evaluate`; `eval_dataset` may be labelled rows, as the trainer takes them."""
        return super().evaluate(self._asked(eval_dataset), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.predict`; `test_dataset` may be labelled rows, as the trainer takes them."""
        return super().predict(self._asked(test_dataset), *args, **kwargs)

    def _asked(self, dataset: Any) -> Any:
        """Labelled rows as examples of the trainer's one task; a name, examples or None as they are."""
        if dataset is None or isinstance(dataset, str):
            return dataset
        if isinstance(dataset, list) and dataset and isinstance(dataset[0], Example):
            return dataset
        if self.task is None:
            raise InputError("Expected rows of one task, found a trainer of several; give each member its eval_rows.")
        return evaluation_examples(self.scorer, self.task, dataset, self.recipe, self.stopping.learners[0])

    def _learned(self) -> dict[str, tuple[Task, Sequence[Mapping[str, Any]]]]:
        """The task and the training rows of each adapter that is trained on one."""
        return dict.fromkeys(self.trained_adapters, (self._task, self._rows))

    def _describe(self) -> None:
        """Let the model know what belongs beside its adapters in a folder, so that every command can use them."""
        model = self._adapted()
        if model is not None:
            for name, (task, rows) in self._learned().items():
                before = model.adapter_folders.get(name)
                model.adapter_folders[name] = described(task, self.recipe, rows, before)

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
        """Forward and backward, in the words of templates drawn for this step; returns the loss, summed over adapters.

        They go part by part, so that memory holds the activations of one; together where several processes train.
        """
        inputs = self._drawn(inputs)
        if not self._one_process:
            return super().training_step(model, inputs, num_items_in_batch)
        learning = [i for i, question in enumerate(inputs["questions"]) if self.stopping.learns(question.adapter)]
        model.train()  # before anything is shared: an evaluation shares more
        asked = [inputs["questions"][i] for i in learning]
        losses = []
        for group, batch in self.scorer.through(model).training_batches(asked):
            label = inputs["label"][[learning[i] for i in group]]
            part = {**inputs, "label": label, "questions": [asked[i] for i in group], "batch": batch}
            losses.append(super().training_step(model, part, num_items_in_batch))
        if not losses:  # nobody learns any more
            return torch.zeros((), device=self.args.device)
        return torch.stack(losses[::-1]).sum()

    def _foreseen(self) -> list[Question]:
        """Questions that training is known to ask."""
        dataset: Any = self.train_dataset
        examples: list[Example] = dataset if isinstance(dataset, list) else []
        return [question for example in examples for question in example.questions]

    def _drawn(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if "examples" not in inputs:
            return inputs
        questions = [example.drawn(self.state.global_step) for example in inputs["examples"]]
        return {"label": inputs["label"], "questions": questions, "counts": inputs["counts"]}

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

    def _losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str | None, torch.Tensor], torch.Tensor]:
        """For each adapter that questions name the loss of its own, a scalar; the best choice of each question (B,)."""
        questions: list[Question] = inputs["questions"]
        scorer = self.scorer.through(model)
        best = torch.empty_like(inputs["label"])
        losses: dict[str | None, list[torch.Tensor]] = {}
        doubts: dict[str | None, list[torch.Tensor]] = {}
        # The loss is a mean, so that the parts of a batch add up: parts of similar length, of which little is padding.
        for group, part in self._parts(scorer, inputs):
            asked = [questions[i] for i in group]
            part = to_device(part, best.device)
            log_probs = scorer.log_probs(part)
            for name, rows in _by_adapter(asked).items():
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


class MovingAverage:
    """The exponential moving average of the parameters that an optimizer trains, over its steps.

    It is kept in the optimizer's state, so that checkpoints have it. Of the first steps it is the mean, up to the one
    from which on the decay forgets faster. Parameters that have no gradient in a step, such as those of a fleet's member
    that has stopped, keep theirs.

    Args:
        optimizer: what is stepped, not a wrapper around it.
        decay: from 0, the last step alone, to below 1; the mean is over about (1 + decay) / (1 - decay) steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        self.optimizer = optimizer
        self.decay = decay
        optimizer.register_step_post_hook(self._update)

    def _update(self, *_: Any) -> None:
        for parameter in self._parameters():
            if parameter.grad is not None:
                state = self.optimizer.state[parameter]
                steps = state["averaged_steps"] = state.get("averaged_steps", 0) + 1
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.detach(), max(1 - self.decay, 1 / steps))

    def use(self) -> None:
        """Let the parameters be their average."""
        with torch.no_grad():
            for parameter in self._parameters():
                if "average" in self.optimizer.state[parameter]:
                    parameter.copy_(self.optimizer.state[parameter]["average"])

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])


class StopAtFloor(TrainerCallback, ExportableState):
    """Stops each learner when the term that it has to choose by has stayed at the floor, and training when all have.

    Args:
        rule: what the floor is; None: nobody stops.
        learners: names of adapters; None is the active one's.
    """

    def __init__(self, rule: EarlyStopping | None, learners: Sequence[str | None]) -> None:
        self.rule = rule
        self.learners = list(learners)
        self.stopped: dict[str | None, int] = {}  # and after which step
        self._step: dict[str | None, float] = {}
        self._last: dict[str | None, list[float]] = {name: [] for name in learners}

    def add(self, losses: Mapping[str | None, float]) -> None:
        """Parts of the current step's length-normalized term."""
        for name, loss in losses.items():
            self._step[name] = self._step.get(name, 0.0) + loss

    @property
    def all_stopped(self) -> bool:
        """Whether nobody learns any more."""
        return len(self.stopped) == len(self.learners)

    def learns(self, name: str | None) -> bool:
        """Whether a learner has not stopped."""
        return name not in self.stopped

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin anew, or go on from the state of a checkpoint."""
        self._step = {}
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        found = [None] * len(self.learners) if saved is None else saved["attributes"]["learners"]
        pairs = list(zip(self.learners, found, strict=True))
        self.stopped = {name: its["stopped"] for name, its in pairs if its and its["stopped"] is not None}
        self._last = {name: its["last"] if its else [] for name, its in pairs}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the step's losses."""
        if self.rule is not None:
            for name, loss in self._step.items():
                last = self._last[name] = [*self._last[name], loss][-self.rule.steps :]
                if len(last) == self.rule.steps and sum(last) / len(last) <= self.rule.floor:
                    self.stopped.setdefault(name, state.global_step)
            if self.all_stopped:
                control.should_training_stop = True
        self._step = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to keep."""
        learners = [{"stopped": self.stopped.get(name), "last": self._last[name]} for name in self.learners]
        return {"args": {}, "attributes": {"learners": learners}}


def training_examples(
    scorer: Scorer, task: Task, rows: Any, recipe: Recipe, seed: int, adapter: str | None = None
) -> list[Example]:
    """Labelled rows as examples.

    Args:
        scorer: prompts are shortened to what its model has positions for.
        task: says what the rows mean.
        rows: as `as_rows` takes them.
        recipe: says which templates are drawn.
        seed: decides the draw.
        adapter: whom to name in the questions.

    Raises:
        InputError: rows do not fit the task (see `Scorer.questions`), or show one label only.
    """
    wordings = list(task.checked(rows))
    labels = list(dict.fromkeys(its[0].label for its in wordings))
    if len(labels) < 2:
        raise InputError(
            f"Expected training rows of at least two labels, found only {shown(labels)} in {len(wordings)} rows; T-Few "
            f"learns from the difference."
        )
    templates = range(len(task.templates)) if recipe.templates == "random" else [0]
    asked = [scorer.questions([its[i] for its in wordings], long_prompts=recipe.long_prompts) for i in templates]
    return [
        Example(tuple(replace(question, adapter=adapter) for question in questions), f"{seed} {number}")
        for number, questions in enumerate(zip(*asked, strict=True))
    ]


def evaluation_examples(
    scorer: Scorer, task: Task, rows: Any, recipe: Recipe, adapter: str | None = None
) -> list[Example]:
    """Labelled rows in the words of the task's first template; arguments and errors as of `training_examples`."""
    wordings = task.wordings(rows)
    if not wordings:
        raise InputError("Expected labelled rows to measure on, found none.")
    questions = scorer.questions(wordings, long_prompts=recipe.long_prompts)
    return [Example((replace(question, adapter=adapter),)) for question in questions]


def metrics_of(task: Task) -> Callable[[Any], dict[str, float]]:
    """A task's metrics as the `compute_metrics` of a trainer whose predictions are indices of choices."""

    def name(index: int) -> str:
        return str(index) if task.labels is None else task.labels[index]

    return lambda result: task.metrics([*map(name, result.label_ids)], [*map(name, result.predictions)])


def collate_examples(examples: Sequence[Example]) -> dict[str, Any]:
    """A batch: `questions` in the first template's words, packed later where the model is at hand; their labels as the
    task lists them, `label` (B,); `counts`, how many of them each adapter has, which stay those of the whole when the
    batch is divided; and `examples`, where another template could be drawn."""
    questions = [example.questions[0] for example in examples]
    labels = [-100 if question.label is None else question.listed(question.label) for question in questions]
    batch = {
        "label": torch.tensor(labels),
        "questions": questions,
        "counts": Counter(question.adapter for question in questions),
    }
    if any(len(example.questions) > 1 for example in examples):
        batch["examples"] = list(examples)
    return batch


def _by_adapter(questions: Sequence[Question]) -> dict[str | None, list[int] | slice]:
    """Which questions are whose; a slice when all are one adapter's, for then nothing has to be copied."""
    names = list(dict.fromkeys(question.adapter for question in questions))
    if len(names) == 1:
        return {names[0]: slice(None)}
    return {name: [i for i, question in enumerate(questions) if question.adapter == name] for name in names}
