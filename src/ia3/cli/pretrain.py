"""`ia3 pretrain`: initial vectors from a mixture of tasks, for `ia3 train --init`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ia3.cli.bars import Bars
from ia3.cli.common import (
    MAX_SEED,
    BaseOption,
    DelimiterOption,
    DeviceMapOption,
    DtypeOption,
    JsonOption,
    console,
    print_json,
    quiet,
    require_folder,
    saying_how_to_go_on,
)
from ia3.errors import InputError, shown

if TYPE_CHECKING:
    from ia3.task.task import Row, Task


def pretrain(
    tasks: str = typer.Option(
        ...,
        "--tasks",
        help="Tasks of the mixture: built-in tasks (see ia3 tasks) and task files, rte,cb,mine.yaml.",
        show_default=False,
    ),
    output: Path = typer.Option(..., "--output", "-o", help="Folder of the adapter.", show_default=False),
    delimiter: str | None = DelimiterOption,
    model: str = BaseOption,
    dtype: str = DtypeOption,
    device_map: str | None = DeviceMapOption,
    steps: int | None = typer.Option(
        None, min=1, help="Optimizer steps. \\[default: the recipe's, 100,000]", show_default=False
    ),
    recipe: str | None = typer.Option(
        None,
        "--recipe",
        help="Training recipe, except the loss: 'paper', 'small' or a recipe.yaml. \\[default: the paper's "
        "pre-training, batches of 16]",
        show_default=False,
    ),
    cap: int | None = typer.Option(
        None,
        min=1,
        help="Maximum of rows that count for a task's share of the mixture. \\[default: 500,000]",
        show_default=False,
    ),
    seed: int = typer.Option(0, min=0, max=MAX_SEED, help="Random seed; decides which rows are drawn."),
    resume: bool = typer.Option(False, "--resume", help="Continue from the last checkpoint of an interrupted run."),
    json_output: bool = JsonOption,
) -> None:
    """Train initial vectors for ia3 train on a mixture of tasks: ia3 train --init FOLDER.

    Each training example is a row of a task, rendered by one of its templates, with the right answer. Tasks are drawn
    in proportion to their sizes. The loss is only the answer's likelihood.

    Writes adapter_config.json and adapter_model.safetensors (which PEFT also reads), recipe.yaml, metrics.json and
    README.md into the output folder.
    """
    out = console(json_output)
    require_folder(output)
    chosen = _read(tasks, delimiter)
    from ia3.evaluation.pretraining import Pretraining
    from ia3.training.pretrain import CAP, PRETRAINING
    from ia3.training.recipe import Recipe

    plan = (PRETRAINING if recipe is None else Recipe.load(recipe)).changed(steps=steps)
    pretraining = Pretraining(chosen, output, model, dtype, plan, cap or CAP, seed, device_map)

    quiet()
    with saying_how_to_go_on(), Bars(out) as bars:
        results = pretraining.run(bars, resume)
    if json_output:
        print_json({"output": str(output), **results})
        return
    out.print(
        f"{results['steps']} steps in {results['train_seconds']:.0f} s, loss {results['final_loss']:.3f} in the last tenth of "
        f"them. Saved in {output}. Start from it: ia3 train --init {output}",
        markup=False,
        soft_wrap=True,
    )


def _read(names: str, delimiter: str | None) -> list[tuple[Task, list[Row]]]:
    """Tasks and their training rows."""
    from ia3.evaluation.drawing import read
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
