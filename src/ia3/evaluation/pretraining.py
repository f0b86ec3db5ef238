"""Train initial vectors on a mixture of tasks and save them with metrics: `Pretraining`."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3 import processes
from ia3.adapter.pretrained import EMBEDDED_MODEL, load_base
from ia3.evaluation.card import pretrained_card
from ia3.evaluation.checkpoints import checkpoint_of, interruptible, settings_of
from ia3.evaluation.progress import Progress, training_stages
from ia3.evaluation.running import with_adapters
from ia3.evaluation.saving import save_measured
from ia3.training.pretrain import CAP, PRETRAINING, MixtureTrainer

if TYPE_CHECKING:
    from ia3.task.task import Row, Task
    from ia3.training.recipe import Recipe


@dataclass
class Pretraining:
    """Train vectors on a mixture of tasks and save them; what `ia3 pretrain` does.

    Under `torchrun` or `accelerate launch`, processes share batches; the first one writes.

    Attributes:
        tasks: the tasks with their labelled rows.
        folder: the adapter's folder.
        model: the base model, as `load_base` takes it.
        dtype: the type of its weights.
        device_map: where they go, as of `Experiment`.
        recipe: how to train, except the loss, which is the right answer's likelihood; None: the paper's.
        cap: the maximum of rows that count for a task's share.
        seed: decides which rows are drawn.
    """

    tasks: Sequence[tuple[Task, Sequence[Row]]]
    folder: str | os.PathLike
    model: str = EMBEDDED_MODEL
    dtype: str = "auto"
    recipe: Recipe | None = None
    cap: int = CAP
    seed: int = 0
    device_map: str | None = None

    @property
    def plan(self) -> Recipe:
        """The recipe of the training."""
        return (self.recipe or PRETRAINING).likelihood_only

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return Path(self.folder) / "checkpoints"

    def settings(self) -> dict[str, Any]:
        """All settings that decide the result."""
        tasks = {
            task.name: {"task": task, "rows": rows} for task, rows in sorted(self.tasks, key=lambda pair: pair[0].name)
        }
        return settings_of(
            model=self.model, dtype=self.dtype, recipe=self.plan, cap=self.cap, seed=self.seed, tasks=tasks
        )

    def checkpoint(self) -> str:
        """The checkpoint to resume from.

        Raises:
            InputError: there is none, or it belongs to a run with other settings.
        """
        return checkpoint_of(self.checkpoints, self.settings(), "tasks")

    def run(self, progress: Progress | None = None, resume: bool = False) -> dict[str, Any]:
        """Train and save; return the content of metrics.json.

        Args:
            progress: shows the progress.
            resume: continue from the last checkpoint of an interrupted run.

        Raises:
            InputError: see `checkpoint`, `load_base` and `Mixture`.
            Interrupted: on a keyboard interrupt during training.
        """
        from transformers import set_seed

        progress, plan, folder = progress or Progress(), self.plan, Path(self.folder)
        checkpoint = self.checkpoint() if resume else None
        if processes.sharded_by_launcher() and self.device_map is None:
            self.device_map = "shards"
        processes.connect([self.settings(), self.device_map])
        with progress.waiting("Loading the model …"):
            base, tokenizer = load_base(self.model, [], self.dtype, device_map=self.device_map)
            network = with_adapters(base, {"default": "start"}, plan)
        logged = max(1, plan.steps // 1000)
        arguments = plan.training_arguments(
            self.checkpoints,
            seed=self.seed,
            logging_steps=logged,
            save_strategy="steps",
            save_steps=logged * max(1, min(100, plan.steps // 4) // logged),  # no logged mean spans a checkpoint
            save_total_limit=2,
            disable_tqdm=True,
        )
        set_seed(self.seed)
        callbacks = [training_stages(progress, {"loss": "Pre-training"})]
        trainer = MixtureTrainer(network, arguments, tokenizer, self.tasks, plan, self.cap, callbacks=callbacks)
        trainer.silence()
        mixture = trainer.mixture
        progress.say("\n".join(f"{share:6.1%} {name}" for name, share in mixture.shares.items()))
        if checkpoint is not None:
            progress.say(f"Going on from {checkpoint}")
        started = time.perf_counter()
        with interruptible(self.checkpoints, self.settings(), checkpoint):
            trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.perf_counter() - started
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results = {
            "model": base.name_or_path,
            "recipe": plan.name,
            "steps": plan.steps,
            "seed": self.seed,
            "cap": self.cap,
            "train_seconds": round(seconds, 2),
            "train_loss": statistics.mean(losses),
            "final_loss": statistics.mean(losses[-max(1, len(losses) // 10) :]),
            "tasks": {
                task.name: {"rows": len(rows), "share": mixture.shares[task.name], "drawn": mixture.drawn[task.name]}
                for task, rows in mixture.tasks
            },
            "trainable_parameters": sum(parameter.numel() for parameter in network.adapter_parameters("default")),
        }
        config = network.peft_config["default"]
        what = folder, network, "default", plan, results
        results = processes.from_first(
            lambda: save_measured(*what, lambda measured: pretrained_card(plan, measured, config, folder.name))
        )
        if processes.is_first():
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        return results
