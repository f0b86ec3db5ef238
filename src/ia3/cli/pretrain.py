"""`ia3 pretrain`: vectors from a mixture of tasks, for `ia3 train --init`."""

from __future__ import annotations

import functools
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ia3.adapter.stored import CARD_MARK
from ia3.cli.common import (
    MAX_SEED,
    BaseOption,
    DelimiterOption,
    DtypeOption,
    JsonOption,
    console,
    print_json,
    progress,
    quiet,
    read,
)
from ia3.cli.results import write_adapter
from ia3.cli.resume import begin, checkpoint_of, fingerprint, say_interrupted
from ia3.cli.run import with_adapters
from ia3.errors import InputError, shown

if TYPE_CHECKING:
    from rich.progress import Progress

    from ia3.task.task import Row, Task
    from ia3.training.recipe import Recipe


def pretrain(
    tasks: str = typer.Option(
        ...,
        "--tasks",
        help="What to draw from: built-in tasks (see ia3 tasks) and task files, rte,cb,mine.yaml.",
        show_default=False,
    ),
    output: Path = typer.Option(..., "--output", "-o", help="Folder of the adapter.", show_default=False),
    delimiter: str | None = DelimiterOption,
    model: str = BaseOption,
    dtype: str = DtypeOption,
    steps: int | None = typer.Option(
        None, min=1, help="Optimizer steps. \\[default: the recipe's, 100,000]", show_default=False
    ),
    recipe: str | None = typer.Option(
        None,
        "--recipe",
        help="How to train, but for the loss: 'paper', 'small' or a recipe.yaml. \\[default: the paper's "
        "pre-training, batches of 16]",
        show_default=False,
    ),
    cap: int | None = typer.Option(
        None,
        min=1,
        help="More rows than this do not make a task more frequent. \\[default: 500,000]",
        show_default=False,
    ),
    seed: int = typer.Option(0, min=0, max=MAX_SEED, help="Decides what is drawn."),
    resume: bool = typer.Option(False, "--resume", help="Go on from the last checkpoint of an interrupted run."),
    json_output: bool = JsonOption,
) -> None:
    """Train vectors on a mixture of tasks, for ia3 train to start from: ia3 train --init FOLDER.

    Each example is a row of a task, drawn in proportion to the tasks' sizes, in the words of one of its templates, with
    its right answer. The loss is that answer's likelihood alone.

    Writes adapter_config.json and adapter_model.safetensors (which PEFT reads too), recipe.yaml, metrics.json and
    README.md into the output folder.
    """
    out = console(json_output)
    if output.is_file():
        raise InputError(f"Expected a folder for --output, found the file {str(output)!r}.")
    chosen = _read(tasks, delimiter)
    from ia3.training.pretrain import CAP, PRETRAINING, MixtureTrainer, likelihood_only
    from ia3.training.recipe import Recipe

    plan = likelihood_only(PRETRAINING if recipe is None else Recipe.load(recipe)).changed(steps=steps)
    cap = cap or CAP
    settings = {
        "model": model,
        "dtype": dtype,
        "recipe": plan.model_dump(),
        "cap": cap,
        "seed": seed,
        "tasks": {
            task.name: {"task": task.model_dump(), "rows": fingerprint(rows)}
            for task, rows in sorted(chosen, key=lambda pair: pair[0].name)
        },
    }
    checkpoints = output / "checkpoints"
    checkpoint = checkpoint_of(checkpoints, settings, "tasks") if resume else None

    quiet()
    with out.status("Loading the model …"):
        from transformers import set_seed

        from ia3.adapter.pretrained import load_base

        base, tokenizer = load_base(model, [], dtype)
        network = with_adapters(base, ["default"], plan.init)
    logged = max(1, plan.steps // 1000)
    arguments = plan.training_arguments(
        checkpoints,
        seed=seed,
        logging_steps=logged,
        save_strategy="steps",
        save_steps=logged * max(1, min(100, plan.steps // 4) // logged),  # no logged mean goes over a checkpoint
        save_total_limit=2,
        disable_tqdm=True,
    )
    set_seed(seed)
    with progress(out) as bars:
        trainer = MixtureTrainer(network, arguments, tokenizer, chosen, plan, cap, callbacks=[_bar(bars)])
        trainer.silence()
        mixture = trainer.mixture
        bars.console.print(
            "\n".join(f"{share:6.1%} {name}" for name, share in mixture.shares.items()), style="dim", markup=False
        )
        if checkpoint is None:
            begin(checkpoints, settings)
        else:
            bars.console.print(f"Going on from {checkpoint}", style="dim", markup=False, soft_wrap=True)
        started = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except KeyboardInterrupt:
            bars.stop()
            say_interrupted(checkpoints)
            raise typer.Exit(130) from None
        seconds = time.perf_counter() - started
    counts = mixture.drawn
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    results = {
        "model": base.name_or_path,
        "recipe": plan.name,
        "steps": plan.steps,
        "seed": seed,
        "cap": cap,
        "train_seconds": round(seconds, 2),
        "train_loss": statistics.mean(losses),
        "final_loss": statistics.mean(losses[-max(1, len(losses) // 10) :]),
        "tasks": {
            task.name: {"rows": len(rows), "share": mixture.shares[task.name], "drawn": counts[task.name]}
            for task, rows in mixture.tasks
        },
        "trainable_parameters": sum(parameter.numel() for parameter in network.adapter_parameters("default")),
    }
    results = write_adapter(output, network, "default", plan, results, functools.partial(_card, output, plan))
    shutil.rmtree(checkpoints, ignore_errors=True)
    if json_output:
        print_json({"output": str(output), **results})
        return
    out.print(
        f"{plan.steps} steps in {seconds:.0f} s, loss {results['final_loss']:.3f} in the last tenth of them. Saved in "
        f"{output}. Start from it: ia3 train --init {output}",
        markup=False,
        soft_wrap=True,
    )


def _read(names: str, delimiter: str | None) -> list[tuple[Task, list[Row]]]:
    """Tasks and their training rows."""
    from ia3.task.reading import require_delimited
    from ia3.task.task import Task

    paths = [part.strip() for part in names.split(",") if part.strip()]
    if not paths:
        raise InputError(f"Expected tasks with commas between them for --tasks, found {names!r}.")
    tasks = [Task.load(path) for path in paths]
    twice = [task.name for i, task in enumerate(tasks) if task.name in [other.name for other in tasks[:i]]]
    if twice:
        raise InputError(f"Expected tasks with names that differ, found {shown(twice)} twice; change `name:` in one.")
    require_delimited(delimiter, *(task.train for task in tasks))
    found: list[tuple[Task, list[Row]]] = []
    for path, task in zip(paths, tasks, strict=True):
        if task.train is None:
            raise InputError(f"Expected training rows, found no `train:` in {path}.")
        found.append((task, [*read(task.train, task, delimiter)]))
    return found


def _bar(bars: Progress) -> Any:
    """A trainer's callback that shows steps and loss."""
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            done, total = state.global_step, state.max_steps
            self.id = bars.add_task("Pre-training", total=total, completed=done, note="")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            bars.update(self.id, completed=state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                bars.update(self.id, note=f"loss {float(logs['loss']):.3f}")

    return Bar()


def _card(folder: Path, recipe: Recipe, results: dict[str, Any]) -> str:
    rows = [f"| {name} | {its['rows']} | {its['drawn']} |" for name, its in results["tasks"].items()]
    start = "" if recipe.init is None else f", starting from `{recipe.init}`"
    return f"""---
base_model: {json.dumps(results["model"])}
library_name: peft
tags:
- ia3
- t-few
---

{CARD_MARK}

# {folder.name}

(IA)³ vectors ([arXiv:2205.05638](https://arxiv.org/abs/2205.05638)) for `{results["model"]}` to start training from, made by
`ia3 pretrain` on a mixture of {len(rows)} tasks: {results["steps"]} steps of {recipe.batch_size} examples with the right
answer's likelihood as the loss (seed {results["seed"]}{start}).
{results["trainable_parameters"]:,} numbers, {results["adapter_bytes"] / 1000:.0f} kB.

| task | rows | examples drawn |
|---|---:|---:|
{chr(10).join(rows)}

## Use

```
ia3 train --init {folder.name} --data rows.csv
```
"""
