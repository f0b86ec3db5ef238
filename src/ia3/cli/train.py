"""`ia3 train`: from a few labelled examples to an adapter, and how much better it is than the untrained model."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ia3.cli.common import TASK_NAME, JsonOption, console, parse_choices, print_json, progress, quiet
from ia3.errors import InputError, shown
from ia3.files import replacing
from ia3.pretrained import EMBEDDED_MODEL

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.model import IA3Model
    from ia3.tfew.task import Row, Task

EMBEDDED_TASK = "food-reviews"

# Settings that a resumed run must share with the one that was interrupted.
_RUN_NAME = "run.json"


def train(
    model: str = typer.Option(
        EMBEDDED_MODEL, "--model", "-m", help="Base model: a folder, a hub id or 'smollm2' (embedded)."
    ),
    data: str | None = typer.Option(
        None,
        "--data",
        "-d",
        help="Labelled rows: .csv, .tsv, .jsonl, a data set's folder or hub id. [default: the task's]",
        show_default=False,
    ),
    text_column: str | None = typer.Option(
        None, help="Column with the text. [default: 'text', or the only other one]", show_default=False
    ),
    label_column: str | None = typer.Option(None, help="Column with the label. [default: 'label']", show_default=False),
    task: Path | None = typer.Option(
        None, "--task", help="A task.yaml instead: template, choices and data in one file.", show_default=False
    ),
    test_data: str | None = typer.Option(
        None,
        "--test-data",
        help="Labelled rows to measure on. [default: the task's, else rows of --data that training leaves over]",
        show_default=False,
    ),
    template: str | None = typer.Option(
        None,
        help="Jinja template of the prompt, such as '{{ text }} Sentiment:'. [default: made from column and labels]",
        show_default=False,
    ),
    choices: str | None = typer.Option(
        None, help="Answer text of each label: 'label=text,label=text'. [default: the labels]", show_default=False
    ),
    examples_per_label: int = typer.Option(16, min=1, help="Training examples of each label, drawn at random."),
    test_rows: int = typer.Option(200, min=0, help="Measure on at most so many test rows, drawn at random; 0: on all."),
    steps: int = typer.Option(40, min=1, help="Optimizer steps, of 8 examples each."),
    seed: int = typer.Option(0, help="Decides which examples are drawn, and their order."),
    output: Path | None = typer.Option(
        None, "--output", "-o", help="Folder of the adapter. [default: adapters/NAME]", show_default=False
    ),
    resume: bool = typer.Option(False, "--resume", help="Go on from the last checkpoint of an interrupted run."),
    json_output: bool = JsonOption,
) -> None:
    """Train an adapter, and compare it with the untrained model.

    Without arguments: SmolLM2-135M learns from 32 food reviews whether a review is great, and is tested on 200 others.

    With your own data: ia3 train --data train.csv --text-column text --label-column label

    Writes adapter_config.json and adapter_model.safetensors (which PEFT reads too), task.yaml, metrics.json and
    README.md into the output folder.
    """
    out = console(json_output)
    description, rows, test = _rows(task, data, test_data, label_column, text_column, choices, template)
    folder = output or Path("adapters", description.name)
    if folder.is_file():
        raise InputError(f"Expected a folder for --output, found the file {str(folder)!r}.")
    from ia3.tfew.task import few_shot

    description.check(rows)
    description.check(test or [])
    chosen = few_shot(rows, description, examples_per_label, seed)
    if test is None:
        used = {id(row) for row in chosen}
        test = [row for row in rows if id(row) not in used]
    if test_rows and len(test) > test_rows:
        # The same test rows whatever the seed, so that runs can be compared.
        test = random.Random(0).sample(test, test_rows)

    run = {
        "model": model,
        "task": description.model_dump(),
        "examples_per_label": examples_per_label,
        "steps": steps,
        "seed": seed,
        "examples": hashlib.sha256(json.dumps(chosen, default=str).encode()).hexdigest(),
    }
    checkpoint = _checkpoint(folder, run, resume)
    _describe(out, description, model, chosen, len(test), checkpoint)

    quiet()
    results = _run(out, run, description, chosen, test, folder, checkpoint)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if json_output:
        print_json({"output": str(folder), **results})
    else:
        _print_table(out, results)
        hint = f' Try it: ia3 predict {folder} "some text"' if len(description.columns) == 1 else ""
        out.print(f"\nSaved in {folder}.{hint}", markup=False, soft_wrap=True)


def _rows(
    task_file: Path | None,
    data: str | None,
    test_data: str | None,
    label_column: str | None,
    text_column: str | None,
    choices: str | None,
    template: str | None,
) -> tuple[Task, list[Row], list[Row] | None]:
    """The task, the rows to draw training examples from, and the test rows, where they are given."""
    from ia3.tfew.task import Task, read_rows

    given = parse_choices(choices)
    if task_file is None and data is not None:
        rows = read_rows(data)
        name = Path(data).stem.replace("_", "-") or "task"
        description = Task.infer(rows, label_column, text_column, given, template, name)
    else:
        description = Task.embedded(EMBEDDED_TASK) if task_file is None else Task.from_file(task_file)
        if text_column is not None:
            raise InputError("--text-column goes with --data; a task's template names its columns itself.")
        changes = {"label_column": label_column, "choices": given, "template": template}
        values = description.model_dump() | {key: value for key, value in changes.items() if value is not None}
        description = Task.create(values)
        source = data or description.train
        if source is None:
            raise InputError(f"Expected training rows: neither --data nor a `train:` in {task_file}.")
        rows = read_rows(source)
    source = test_data or (description.test if data is None else None)
    return description, list(rows), None if source is None else list(read_rows(source))


def _checkpoint(folder: Path, run: dict[str, Any], resume: bool) -> str | None:
    """The checkpoint to go on from; None for a new run."""
    if not resume:
        return None
    from ia3.trainer import last_checkpoint

    checkpoints = folder / "checkpoints"
    found = last_checkpoint(checkpoints) if checkpoints.is_dir() else None
    if found is None:
        raise InputError(f"Expected a checkpoint in {str(checkpoints)!r}, found none; start anew without --resume.")
    earlier = json.loads((checkpoints / _RUN_NAME).read_text(encoding="utf-8"))
    different = [key for key in run if earlier.get(key) != json.loads(json.dumps(run[key]))]
    if different:
        raise InputError(
            f"Expected the settings of the interrupted run, found another {shown(different)}; repeat its options, or "
            f"start anew without --resume."
        )
    return found


def _run(
    out: Console,
    run: dict[str, Any],
    task: Task,
    chosen: list[Row],
    test: list[Row],
    folder: Path,
    checkpoint: str | None,
) -> dict[str, Any]:
    """Measure, train, measure again, save. `run` has the settings that decide the result."""
    model_name, steps, seed = run["model"], run["steps"], run["seed"]
    labels = [task.label(row) for row in test]
    with out.status("Loading the model …"):
        from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed

        from ia3 import IA3Config, IA3Model, load_base
        from ia3.tfew import TFewTrainer, predict, training_arguments
        from ia3.trainer import last_checkpoint

        base, tokenizer = load_base(model_name)
        model = IA3Model(base, IA3Config(task_type="CAUSAL_LM", base_model_name_or_path=base.name_or_path))

    with progress(out) as bars:

        def measure(name: str) -> dict[str, float]:
            bar = bars.add_task(name, total=len(test), note="")
            found = predict(model, tokenizer, task, test, lambda count: bars.advance(bar, count))
            scores = task.metrics(labels, [prediction.label for prediction in found])
            bars.update(bar, note=f"{task.metric.replace('_', '-')} {scores[task.metric]:.1%}")
            return scores

        class Bar(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.bar = bars.add_task("Training", total=steps, completed=state.global_step, note="")

            def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
                if logs and "loss" in logs:
                    bars.update(self.bar, completed=state.global_step, note=f"loss {float(logs['loss']):.3f}")

        arguments = training_arguments(
            folder / "checkpoints",
            steps,
            seed=seed,
            save_strategy="steps",
            save_steps=max(1, min(10, steps // 4)),
            save_total_limit=2,
            disable_tqdm=True,
        )
        set_seed(seed)
        trainer = TFewTrainer(model, arguments, tokenizer, task, chosen, callbacks=[Bar()])
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        zero_shot = measure("Zero-shot") if test else None
        if checkpoint is None:  # a new run forgets the checkpoints of an earlier one
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            _write_json(folder / "checkpoints" / _RUN_NAME, run)
        started = time.perf_counter()
        try:
            trained = trainer.train(resume_from_checkpoint=checkpoint)
        except KeyboardInterrupt:
            bars.stop()
            whole = last_checkpoint(folder / "checkpoints")
            way = (
                f"go on from {whole} with the same command and --resume"
                if whole
                else "start again: there is no checkpoint yet"
            )
            typer.echo(f"ia3: interrupted; {way}.", err=True)
            raise typer.Exit(130) from None
        seconds = time.perf_counter() - started
        after = measure("Trained") if test else None

    results: dict[str, Any] = {}
    if zero_shot is not None and after is not None:
        # The majority of the training rows says nothing when they are balanced; the test rows' own is the fair bar.
        majority = Counter(labels).most_common(1)[0][0]
        results = {
            "zero_shot": zero_shot,
            "trained": after,
            "majority": task.metrics(labels, [majority] * len(labels)),
        }
    results |= {
        "train_seconds": round(seconds, 2),
        "train_loss": trained.training_loss,
        "steps": steps,
        "seed": seed,
        "train_examples": len(chosen),
        "test_rows": len(test),
        "trainable_parameters": model.get_nb_trainable_parameters()[0],
        "model": base.name_or_path,
        "task": task.name,
    }
    return _write(folder, model, task, results)


def _describe(out: Console, task: Task, model: str, chosen: list[Row], test_rows: int, checkpoint: str | None) -> None:
    out.print(
        f"{task.name} on {model}: {len(chosen)} training examples, {test_rows} test rows", markup=False, style="bold"
    )
    out.print("The prompt, and its answer choices:", style="dim")
    for line in task.template.rstrip().splitlines():
        out.print(f"  {line}", markup=False)
    out.print("  → " + " | ".join(f"{text}" for text in task.choices.values()), markup=False)
    if checkpoint is not None:
        out.print(f"Going on from {checkpoint}", style="dim", markup=False)


def _write(folder: Path, model: IA3Model, task: Task, results: dict[str, Any]) -> dict[str, Any]:
    """Save the adapter and all that belongs to it; returns the results with the adapter's size."""
    from ia3.checkpoint import WEIGHTS_NAME

    task.save(folder / TASK_NAME)
    model.save_pretrained(folder)
    results["adapter_bytes"] = (folder / WEIGHTS_NAME).stat().st_size
    _write_json(folder / "metrics.json", results)
    with replacing(folder / "README.md") as path:
        path.write_text(_model_card(folder, task, results), encoding="utf-8")
    return results


def _write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_METHODS = {"zero_shot": "zero-shot", "trained": "trained", "majority": "majority class"}


def _print_table(out: Console, results: dict[str, Any]) -> None:
    from rich.table import Table

    if "trained" in results:
        table = Table(title=f"{results['test_rows']} test rows")
        for name in ("", "accuracy", "macro-F1"):
            table.add_column(name, justify="right" if name else "left")
        for key, name in _METHODS.items():
            style = "bold" if key == "trained" else None
            table.add_row(name, *(f"{results[key][metric]:.1%}" for metric in ("accuracy", "macro_f1")), style=style)
        out.print(table)
    out.print(
        f"{results['steps']} steps in {results['train_seconds']:.0f} s; {results['trainable_parameters']:,} trained "
        f"parameters; adapter of {results['adapter_bytes'] / 1000:.0f} kB"
    )


def _model_card(folder: Path, task: Task, results: dict[str, Any]) -> str:
    lines = []
    if "trained" in results:
        lines = [f"| {results['test_rows']} test rows | accuracy | macro-F1 |", "|---|---:|---:|"]
        lines += [
            f"| {name} | {results[key]['accuracy']:.1%} | {results[key]['macro_f1']:.1%} |"
            for key, name in _METHODS.items()
        ]
    base = results["model"]
    choices = "\n".join(f"- `{label}`: {text}" for label, text in task.choices.items())
    return f"""---
base_model: {json.dumps(base)}
library_name: peft
tags:
- ia3
- t-few
---

# {task.name}

{task.description or "A text classifier"}: an (IA)³ adapter ([arXiv:2205.05638](https://arxiv.org/abs/2205.05638)) for
`{base}`, trained by `ia3 train` with T-Few's recipe on {results["train_examples"]} labelled examples in
{results["steps"]} steps ({results["train_seconds"]:.0f} s, seed {results["seed"]}).
{results["trainable_parameters"]:,} numbers, {results["adapter_bytes"] / 1000:.0f} kB.

{chr(10).join(lines)}

## The prompt

```
{task.template.rstrip()}
```

Labels and their answers:

{choices}

## Use

```
ia3 predict {folder.name} --data rows.csv
```
"""
