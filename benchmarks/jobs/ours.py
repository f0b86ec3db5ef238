"""The jobs by this package, through the names that its users call."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .peers import ADAPTED, FEEDFORWARD, Clock, Result, WithVectors, quiet_arguments, timed_steps, vector


class Ours(WithVectors):
    """`IA3Model`, `TFewTrainer`, `predict`, `score_choices` and `AdapterBank`."""

    dtype = "float32"

    def import_libraries(self) -> None:
        super().import_libraries()
        from ia3.bank import AdapterBank
        from ia3.evaluation.prediction import predict
        from ia3.training.trainer import TFewTrainer

        assert AdapterBank and TFewTrainer and predict

    def load(self) -> tuple[Any, Any]:
        from ia3.adapter.pretrained import load_base

        model, tokenizer = load_base(self.folder, dtype=self.dtype)
        return model.requires_grad_(False), tokenizer

    def adapt(self, model: nn.Module) -> Any:
        from ia3.adapter.config import IA3Config
        from ia3.adapter.peft import get_peft_model

        config = IA3Config(task_type="CAUSAL_LM", target_modules=[*ADAPTED], feedforward_modules=[*FEEDFORWARD])  # type: ignore[arg-type]
        return get_peft_model(model, config)

    def prepare(self, job: dict[str, Any]) -> Callable[[], Result]:
        # Once for a model, the longest question is tried in two layouts; a sample's time is scaled, and this is not.
        for point in (*job.get("points", ()), job.get("tested", {})):
            if "prompts" in point:
                lengths = [len(ids) for ids in self.tokenizer(point["prompts"])["input_ids"]]
                longest = point["prompts"][lengths.index(max(lengths))]
                self.scores(self.model, ([longest], point["choices"], [0]))
        return super().prepare(job)

    def train(self, job: dict[str, Any]) -> Callable[[], Result]:
        from ia3.evaluation.prediction import predict
        from ia3.task.task import Task
        from ia3.training.members import Member
        from ia3.training.recipe import Recipe
        from ia3.training.trainer import TFewTrainer

        task = Task.create(job["task"])
        rows, tested = job["points"][0]["rows"], job["tested"]["rows"]
        recipe = Recipe.paper().changed(steps=job["steps"], batch_size=job["batch_size"], templates="first")

        def run() -> Result:
            clock, callback = Clock(), timed_steps()
            model = self.adapt(self.model)
            with tempfile.TemporaryDirectory() as folder:
                arguments = recipe.training_arguments(folder, **quiet_arguments())
                member = Member(task, rows)
                TFewTrainer(model, arguments, self.tokenizer, member, recipe, callbacks=[callback]).train()
            clock.lap("setup")
            found = predict(model, self.tokenizer, task, tested, recipe=recipe)
            clock.lap("evaluate")
            clock.seconds["setup"] -= callback.seconds
            clock.seconds["train"] = callback.seconds
            self.release(model)
            labels = task.labels or []
            return clock.seconds, [*callback.losses, *(row.scores[label] for row in found for label in labels)]

        return run

    def scores(self, model: nn.Module, texts: tuple[Sequence[str], Sequence[str], Sequence[int]]) -> list[float]:
        from ia3.scoring.scorer import score_choices

        prompts, choices, _ = texts
        found = score_choices(model, self.tokenizer, prompts, [choices] * len(prompts))
        return [score for row in found for score in row.tolist()]

    def hold(self, model: Any, count: int) -> None:
        from ia3.adapter.state_dict import get_peft_model_state_dict
        from ia3.bank import AdapterBank

        if model.adapter_bank is None:
            self.bank = AdapterBank(model)
        sizes = {key: value.shape for key, value in get_peft_model_state_dict(model).items()}
        for number in range(len(self.bank), count):
            self.bank.add(f"n{number}", {key: _filled(key, shape, number) for key, shape in sizes.items()})
        for number in range(count, len(self.bank)):
            self.bank.delete(f"n{number}")

    def mixed_logits(self, model: Any, ids: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        return self.last_logits(model, ids, adapter_names=list(names))


def _filled(key: str, shape: torch.Size, number: int) -> torch.Tensor:
    """An adapter's entry, as its vector stands in a checkpoint."""
    module = key.removeprefix("base_model.model.").removesuffix(".ia3_l")
    return vector(module, shape.numel(), number).view(shape)


class InBfloat16(Ours):
    """The same with the base model's weights in bfloat16, for processors that multiply it."""

    dtype = "bfloat16"
