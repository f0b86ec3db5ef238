"""PEFT's adapters, trained with this project's optimizer, schedule and batches."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, set_seed

from ia3 import Member, Scorer, TFewTrainer, load_base
from ia3.adapter.pretrained import EMBEDDED_MODEL
from ia3.evaluation.balance import balancing_rows
from ia3.evaluation.calibration import Calibration
from ia3.evaluation.learner import fold_of_each
from ia3.evaluation.prediction import Prediction, predict
from ia3.scoring.question import Question
from ia3.task.task import Row
from ia3.training.choices import ChoiceTrainer
from ia3.training.examples import Example
from ia3.training.recipe import Recipe

from .data import Data
from .judging import Found

_LEARNING_RATES = [3e-4, 1e-3, 3e-3]
_FOLDS = 2


class StopAfter(TrainerCallback):
    """Stops after a number of steps, in the middle of the schedule, as early stopping does."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


class LikelihoodTrainer(ChoiceTrainer):
    """Trains on the right answers' tokens alone, in the words of the first template."""

    def __init__(self, model: Any, args: Any, processing_class: Any, member: Member, recipe: Recipe, **kw: Any) -> None:
        scorer = Scorer(model, processing_class)
        asked = scorer.questions(member.task.wordings(member.rows))
        examples = [Example((Question(q.prompt, [q.choices[q.label or 0]], label=0),)) for q in asked]
        super().__init__(scorer, args, examples, recipe, **kw)


def peft_ia3(data: Data, seed: int, steps: int) -> Found:
    """PEFT's IA3 on k_proj, v_proj and down_proj; likelihood of the right answer alone, first template only, for a number of
    steps: this loss has no floor to stop at."""
    import peft

    modules = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    config = peft.IA3Config(task_type="CAUSAL_LM", **modules)  # type: ignore[arg-type]
    alone = {"likelihood": 1.0, "unlikelihood": 0.0, "length_normalized": 0.0}
    recipe = Recipe.small().changed(**alone, templates="first", ema_decay=0.0)
    recipe = recipe.model_copy(update={"early_stopping": None})
    trained = _Trained(config, data, data.train, seed, recipe, LikelihoodTrainer, [StopAfter(steps)])
    return Found(trained.asked(data.test), trained.asked(data.outside), trained.details)


def lora(data: Data, seed: int) -> Found:
    """PEFT's LoRA, r = 8, alpha = 16, on q_proj and v_proj; T-Few's losses, templates, batches, early stop and average; AdamW
    with the learning rate that has the lowest log-loss in cross-validation on the training rows."""
    import peft

    modules = {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **modules)  # type: ignore[arg-type]

    def trained(rows: Sequence[Row], rate: float) -> _Trained:
        recipe = Recipe.small().changed(optimizer="adamw_torch", learning_rate=rate)
        return _Trained(config, data, rows, seed, recipe, TFewTrainer)

    started = time.process_time()
    losses = {rate: _held_out_loss(data, seed, rate, trained) for rate in _LEARNING_RATES}
    best = min(losses, key=losses.__getitem__)
    seconds = time.process_time() - started
    last = trained(data.train, best)
    details = {**last.details, "learning_rate": best, "held_out": losses, "choosing_seconds": seconds}
    return Found(last.asked(data.test), last.asked(data.outside), details)


def _held_out_loss(data: Data, seed: int, rate: float, trained: Any) -> float:
    """The log-loss of at most 256 training rows, each predicted by what has not seen it."""
    each = fold_of_each(data.task, data.train, _FOLDS, seed)
    asked = {id(row) for row in balancing_rows(data.train)}
    predictions: list[Prediction] = []
    labels: list[str] = []
    for fold in range(_FOLDS):
        held_out = [row for row, its in zip(data.train, each, strict=True) if its == fold and id(row) in asked]
        rows = [row for row, its in zip(data.train, each, strict=True) if its != fold]
        predictions += trained(rows, rate).asked(held_out)
        labels += [data.task.label(row) for row in held_out]
    return Calibration.quality(predictions, labels, 1.0)["log_loss"]


class _Trained:
    """A PEFT adapter, trained on rows."""

    def __init__(
        self,
        config: Any,
        data: Data,
        rows: Sequence[Row],
        seed: int,
        recipe: Recipe,
        trainer_class: Any,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        import peft

        self.task = data.task
        base, self.tokenizer = load_base(EMBEDDED_MODEL)
        set_seed(seed)
        self.model: Any = peft.get_peft_model(base, config)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = recipe.training_arguments(
                scratch, seed=seed, save_strategy="no", disable_tqdm=True, use_cpu=True
            )
            member = Member(data.task, rows)
            trainer = trainer_class(self.model, arguments, self.tokenizer, member, recipe, callbacks=[*callbacks])
            trainer.silence()
            started = time.process_time()
            trainer.train()
            seconds = time.process_time() - started
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.details = {"steps": trainer.state.global_step, "train_seconds": seconds, "parameters": parameters}

    def asked(self, rows: Sequence[Row]) -> list[Prediction]:
        """What it says to rows."""
        return predict(self.model.eval(), self.tokenizer, self.task, rows) if rows else []
