"""`ia3 tasks`: list the built-in tasks, show one of them, and suggest a wording for rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ia3.cli.bars import Bars
from ia3.cli.common import (
    MAX_SEED,
    BaseOption,
    ChoicesOption,
    DelimiterOption,
    DtypeOption,
    ExamplesOption,
    JsonOption,
    LabelColumnOption,
    LabelColumnsOption,
    LabelSeparatorOption,
    MultiLabelOption,
    TextColumnOption,
    console,
    print_json,
    quiet,
    recipe_for,
    table,
)
from ia3.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.task.task import Row, Task

app = typer.Typer(
    help="List the built-in tasks, show one: ia3 tasks show rte, or suggest a wording: ia3 tasks suggest --data x.csv",
    no_args_is_help=False,
)


@app.callback(invoke_without_command=True)
def tasks(context: typer.Context, json_output: bool = JsonOption) -> None:
    """List the built-in tasks, show one: ia3 tasks show rte, or suggest a wording: ia3 tasks suggest --data x.csv"""
    if context.invoked_subcommand is not None:
        return
    from ia3.task.task import Task, embedded_tasks

    found = [_summary(Task.embedded(name)) for name in embedded_tasks()]
    if json_output:
        print_json(found)
        return
    from rich.markup import escape

    out = console()
    listed = table("name", "answers", "training rows", "templates", left=3)
    for item in found:
        answers = item["answers"] if item["labels"] is None else f"{len(item['labels'])}, {item['answers']}"
        listed.add_row(item["name"], answers, escape(item["train"] or "your own copy (--data)"), str(item["templates"]))
    out.print(listed)
    out.print("ia3 tasks show NAME prints one; ia3 train --task NAME trains on it.")


@app.command("show")
def show(
    task: str = typer.Argument(help="A built-in task, or a task.yaml.", show_default=False),
    data: str | None = typer.Option(
        None,
        "--data",
        "-d",
        help="File with the row to show: .csv, .jsonl, … \\[default: the task's invented row]",
        show_default=False,
    ),
    delimiter: str | None = DelimiterOption,
    row: int = typer.Option(1, min=1, help="Number of the row in --data, from 1."),
    json_output: bool = JsonOption,
) -> None:
    """Print a task, and a row in the wording of each template. Without --data, nothing is downloaded."""
    from ia3.evaluation.drawing import read
    from ia3.task.reading import require_delimited
    from ia3.task.task import Task

    wanted = Task.load(task)
    require_delimited(delimiter, data)
    if data is None:
        example = wanted.example
    else:
        rows = read(data, wanted, delimiter)
        if row > len(rows):
            raise InputError(f"Expected a --row of {data!r}, which has {len(rows)} rows; found {row}.")
        example = rows[row - 1]
    prompts = [] if example is None else _rendered(wanted, example, None if data is None else row)
    if json_output:
        print_json({**_summary(wanted), "description": wanted.description, "example": example, "prompts": prompts})
    else:
        _print(console(), wanted, prompts)


@app.command("suggest")
def suggest(
    data: str = typer.Option(
        ...,
        "--data",
        "-d",
        help="Labelled rows: .csv, .tsv, .jsonl, a data set's folder or hub id.",
        show_default=False,
    ),
    model: str = BaseOption,
    dtype: str = DtypeOption,
    text_column: str | None = TextColumnOption,
    label_column: str | None = LabelColumnOption,
    delimiter: str | None = DelimiterOption,
    choices: str | None = ChoicesOption,
    multi_label: bool = MultiLabelOption,
    label_separator: str | None = LabelSeparatorOption,
    label_columns: str | None = LabelColumnsOption,
    examples_per_label: int | None = ExamplesOption,
    seed: int = typer.Option(0, min=0, max=MAX_SEED, help="Random seed; decides which examples are drawn."),
    output: Path | None = typer.Option(
        None, "--output", "-o", help="File for a task with the best wordings, such as task.yaml.", show_default=False
    ),
    json_output: bool = JsonOption,
) -> None:
    """Rank wordings for labelled rows by what the untrained model answers.

    These are the wordings that ia3 train chooses from if it gets neither --template nor --task, tried on the same training
    examples. Answers are balanced, and log-loss and accuracy are means over labels, so that frequent labels and answers
    count no more than others.
    """
    from ia3.cli.results import print_wordings
    from ia3.cli.train import label_sets, source_of
    from ia3.evaluation.drawing import drawn
    from ia3.task.task import Task

    if output is not None and output.is_dir():
        raise InputError(f"Expected a file for --output, found the folder {str(output)!r}.")
    out = console(json_output)
    several = label_sets(multi_label, label_separator, label_columns)
    source = source_of(None, data, None, label_column, text_column, choices, None, delimiter, several=several)
    assert isinstance(source.task, Task)  # of rows without a task file
    source.check()
    examples = drawn(source, examples_per_label, 1, seed).examples
    quiet()
    with out.status("Loading the model …"):
        from ia3.adapter.pretrained import load_base
        from ia3.evaluation.wordings import choose_wording

        base, tokenizer = load_base(model, source.task.labels, dtype)
    recipe = recipe_for(model, None)
    with Bars(out) as bars:
        task, ranking = choose_wording(base, tokenizer, source.task, examples, recipe, bars)
    if output is not None:
        task.save(output)
    if json_output:
        print_json([one.to_dict() for one in ranking])
        return
    if not ranking:
        out.print(f"There is nothing to rank: {model} reads no answers.", markup=False)
        return
    print_wordings(out, "Wordings, untrained", ranking, len(source.task.candidates))
    labels = ranking[0].labels
    out.print(
        f"Guessing one of {labels} labels has a log-loss of {math.log(labels):.2f} and an accuracy of {1 / labels:.0%}."
    )
    if output is not None:
        out.print(
            f"The best {len(task.templates)} are in {output}: ia3 train --task {output} --data {data}", markup=False
        )
    else:
        out.print("Take one with --template, or the best with --output task.yaml and --task task.yaml.", markup=False)


def _summary(task: Task) -> dict[str, Any]:
    from ia3.task.template import has_jinja

    choices = [task.choices if template.choices is None else template.choices for template in task.templates]
    if isinstance(choices[0], str):
        answers = "a list for each row"
    else:
        texts = [text for own in choices if isinstance(own, dict) for text in own.values()]
        answers = "from columns" if any(map(has_jinja, texts)) else "fixed"
    return {
        "name": task.name,
        "answers": answers,
        "labels": task.labels,
        "columns": task.columns,
        "label_column": task.label_column,
        "metric": task.metric,
        "templates": len(task.templates),
        "train": task.train,
        "test": task.test,
    }


def _rendered(task: Task, row: Row, number: int | None) -> list[dict[str, Any]]:
    """The row in the wording of each template, and its label, if it has one."""
    found = []
    for index, template in enumerate(task.templates):
        labelled = template.says_answer or all(column in row for column in task.answer_columns)
        found.append(
            {
                "template": template.name,
                "prompt": task.prompt(row, number, index),
                "answers": task.answers(row, number, index),
                "label": task.truth(row, number, index) if labelled else None,
            }
        )
    return found


def _print(out: Console, task: Task, prompts: list[dict[str, Any]]) -> None:
    summary = _summary(task)
    out.print(f"{task.name}: {task.description or 'a task'}", markup=False, style="bold", soft_wrap=True)
    for title, value in {
        "columns": ", ".join(task.columns),
        "label": task.label_column,
        "answers": summary["answers"] + ("" if task.labels is None else f", {len(task.labels)}"),
        "metric": task.metric.replace("_", "-"),
        "training rows": task.train,
        "test rows": task.test,
    }.items():
        if value:
            out.print(f"  {title + ':':<15}{value}", markup=False, soft_wrap=True)
    for index, item in enumerate(prompts, 1):
        title = f"template {index}" + (f", {item['template']}" if item["template"] else "")
        out.print(f"\n{title}", markup=False, style="dim")
        out.print(item["prompt"], markup=False, soft_wrap=True)
        for label, text in item["answers"].items():
            right = item["label"] if task.multi_label else [item["label"]]
            mark = "→" if label in (right or ()) else " "
            out.print(f"{mark} {label}: {text}", markup=False, soft_wrap=True)
    if not prompts:
        for template in task.templates:
            out.print(f"\n{template.prompt.rstrip()}", markup=False, soft_wrap=True)
        out.print("\nAn example: ia3 tasks show … --data rows.csv", style="dim")
