"""Trains adapters in as many processes as there are, and saves them."""

import os
from pathlib import Path

import torch

from ia3 import processes
from ia3.adapter.placement import is_sharded
from ia3.evaluation.running import with_adapters
from ia3.task.task import Task
from ia3.training.members import Member
from ia3.training.recipe import Recipe
from ia3.training.trainer import TFewTrainer
from support import tiny, words

TASK = Task(template=words.TEMPLATE, choices=words.CHOICES)


def trained(
    folder: Path,
    place: str,
    names: list[str | None],
    checkpoint: str | None = None,
    batches: int = 1,
    sharded: bool = False,
) -> dict[str, torch.Tensor]:
    """The vectors after training, of one member, or of several with 20, 23, … rows; what early stopping looked at last; the loss;
    and what evaluation finds. With `sharded`, each of several processes has a share of each layer."""
    torch.manual_seed(0)
    base = tiny.build("llama")
    recipe = Recipe.small().changed(steps=8, batch_size=6, opinions="vectors", acts_from=place)
    model = with_adapters(base, {name or "default": place for name in names}, recipe)
    options = {"gradient_accumulation_steps": batches, "fsdp": sharded and processes.count() > 1}
    arguments = recipe.training_arguments(
        folder, seed=3, save_strategy="steps", save_steps=4, use_cpu=True, per_device_eval_batch_size=4, **options
    )
    members = [
        Member(
            TASK,
            words.different(20 + 3 * i, seed=i),
            name,
            learning_rate=0.003 * (i + 1),
            eval_rows=words.different(16, seed=9),
        )
        for i, name in enumerate(names)
    ]
    run = TFewTrainer(model, arguments, words.tokenizer(), members, recipe)
    run.silence()
    run.train(resume_from_checkpoint=checkpoint)
    found = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    last = [its["last"] for its in run.stopping.state()["attributes"]["learners"]]
    loss = torch.tensor(run.state.log_history[-1]["train_loss"])
    if sharded and processes.count() > 1:
        assert is_sharded(model) and all(type(value) is torch.Tensor for value in found.values())
    measured = torch.tensor(
        [value for key, value in sorted(run.evaluate().items()) if key.endswith(("_loss", "_accuracy"))]
    )
    return {**found, "last": torch.tensor(last), "loss": loss, "measured": measured}


def main(folder: Path, checkpoint: str | None = None) -> None:
    several = ["one", "two", "three"]
    found = {
        "from the start": trained(folder / "start", "start", [None]),
        "from the question on": trained(folder / "question", "question", [None]),
        "in two batches": trained(folder / "batches", "start", [None], batches=2),
        "several": trained(folder / "several", "question", several),
        "shares, from the question on": trained(
            folder / "question_shares", "question", [None], batches=2, sharded=True
        ),
        "shares, several": trained(folder / "several_shares", "question", several, sharded=True),
    }
    if checkpoint is not None:
        found["resumed"] = trained(folder / "resumed", "question", several, checkpoint)
        found["resumed in shares"] = trained(folder / "resumed_shares", "question", several, checkpoint, sharded=True)
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, folder / "found.pt")
