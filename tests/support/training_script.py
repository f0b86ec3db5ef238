"""Trains adapters in as many processes as there are, and saves them."""

import os
from pathlib import Path

import torch

from ia3.evaluation.running import with_adapters
from ia3.task.task import Task
from ia3.training.members import Member
from ia3.training.recipe import Recipe
from ia3.training.trainer import TFewTrainer
from support import tiny, words

TASK = Task(template=words.TEMPLATE, choices=words.CHOICES)


def trained(
    folder: Path, place: str, names: list[str | None], checkpoint: str | None = None, batches: int = 1
) -> dict[str, torch.Tensor]:
    """The vectors after training, of one member, or of several with 20, 23, … rows; and what early stopping looked at last."""
    torch.manual_seed(0)
    base = tiny.build("llama")
    recipe = Recipe.small().changed(steps=8, batch_size=6, opinions="vectors", acts_from=place)
    model = with_adapters(base, {name or "default": place for name in names}, recipe)
    arguments = recipe.training_arguments(
        folder, seed=3, save_strategy="steps", save_steps=4, use_cpu=True, gradient_accumulation_steps=batches
    )
    members = [
        Member(TASK, words.different(20 + 3 * i, seed=i), name, learning_rate=0.003 * (i + 1))
        for i, name in enumerate(names)
    ]
    run = TFewTrainer(model, arguments, words.tokenizer(), members, recipe)
    run.silence()
    run.train(resume_from_checkpoint=checkpoint)
    found = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    last = [its["last"] for its in run.stopping.state()["attributes"]["learners"]]
    return {**found, "last": torch.tensor(last), "loss": torch.tensor(run.state.log_history[-1]["train_loss"])}


def main(folder: Path, checkpoint: str | None = None) -> None:
    several = ["one", "two", "three"]
    found = {
        "from the start": trained(folder / "start", "start", [None]),
        "from the question on": trained(folder / "question", "question", [None]),
        "in two batches": trained(folder / "batches", "start", [None], batches=2),
        "several": trained(folder / "several", "question", several),
    }
    if checkpoint is not None:
        found["resumed"] = trained(folder / "resumed", "question", several, checkpoint)
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, folder / "found.pt")
