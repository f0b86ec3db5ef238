"""Commands on tasks whose answers are texts: options, and what `ia3 predict`, `evaluate` and `compare` do for them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ia3.answering import load_adapted
from ia3.cli.answers import shortened, text_of, write_rows
from ia3.cli.bars import Bars
from ia3.cli.common import print_json, table
from ia3.errors import InputError, shown

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.evaluation.generation import Generated
    from ia3.folder import AdapterFolder
    from ia3.task.free_text import FreeText
    from ia3.task.kinds import AnyTask
    from ia3.task.task import Row

TextExamplesOption = typer.Option(
    None,
    "--examples",
    min=0,
    help="For a task whose answer is text: training examples, drawn at random; 0: all rows. \\[default: 64, or all if there are "
    "fewer]",
    show_default=False,
)
ChatOption = typer.Option(
    False,
    "--chat",
    help="For a task whose answer is text: the prompt is a user's message in the model's chat template, the answer the "
    "assistant's. The adapter's folder keeps it.",
)
MetricOption = typer.Option(
    None,
    "--metric",
    help="For a task whose answer is text: exact_match, token_f1, rouge_l, micro_f1 and exact_match of fields, or a Python "
    "function of (predictions, references) that returns a number, by its dotted name. \\[default: the task's]",
    show_default=False,
)


def is_text(
    task: AnyTask | Sequence[AnyTask], of_labels: Mapping[str, Any], of_texts: Mapping[str, Any] | None = None
) -> bool:
    """Whether the answers of a task, or of the first of several, are texts.

    Args:
        task: one or several.
        of_labels: the options that are for tasks with labels alone, with their values.
        of_texts: those that are for tasks whose answers are texts.

    Raises:
        InputError: an option is given that does not apply.
    """
    from ia3.task.free_text import FreeText

    first = task[0] if isinstance(task, Sequence) else task
    generates = isinstance(first, FreeText)
    found = [
        option
        for option, value in (of_labels if generates else of_texts or {}).items()
        if value not in (None, 0, False)
    ]
    if found:
        kind = "whose answer is text" if generates else "which has labels"
        raise InputError(
            f"Expected options that apply to the task {first.name!r}, {kind}, found {shown(found)}; leave out."
        )
    return generates


def with_options(task: FreeText, chat: bool, metric: str | None) -> FreeText:
    """The task with options of the command."""
    if metric is not None:
        import_from_here()
    changes = {**({"chat": True} if chat else {}), **({} if metric is None else {"metric": metric})}
    return type(task).create(task.model_dump() | changes) if changes else task


def trusted(out: Console, task: FreeText, metric: str | None) -> FreeText:
    """The task of an adapter's folder with --metric. A folder may come from anywhere: a function that it names does not run
    unless --metric names it too."""
    from ia3.task.text_metrics import is_function

    if is_function(task.metric):
        if metric is None:
            out.print(f"The task's own metric runs only with --metric {task.metric}.", style="yellow", markup=False)
        task = task.model_copy(update={"metric": task.METRICS[0]})
    return with_options(task, False, metric)


def import_from_here() -> None:
    """Let --metric name a function in a file of this folder, as `python -m` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def print_prompt(out: Console, task: FreeText, example: Row) -> None:
    """Say what a run asks, and the answer to an example."""
    out.print("The prompt, and an answer:", style="dim")
    for line in task.template.rstrip().splitlines():
        out.print(f"  {line}", markup=False)
    out.print(f"  → {shortened(task.answer_of(example))}", markup=False)


def predict(
    out: Console,
    folder: AdapterFolder,
    task: FreeText,
    rows: Sequence[Any],
    model: str | None,
    dtype: str,
    device_map: str | None,
    zero_shot: bool,
    max_new_tokens: int | None,
    temperature: float,
    seed: int,
    output: Path | None,
    delimiter: str,
    json_output: bool,
) -> None:
    """`ia3 predict` for an adapter of a task whose answer is text."""
    from ia3.task.rows import as_rows

    items = as_rows(rows, task)
    task.check(items, labelled=False)
    with out.status("Loading …"):
        adapted, tokenizer = load_adapted(folder, model, dtype, device_map)
        from ia3.evaluation.generation import generate
    found: dict[str, list[Generated]] = {}
    with Bars(out) as bars:
        for name in ["prediction", *(["zero_shot_prediction"] if zero_shot else [])]:
            stage = bars.stage("Generating" if name == "prediction" else "Zero-shot", len(items))
            options: dict[str, Any] = {
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "seed": seed,
                "on_progress": lambda done, stage=stage: stage.advance(len(done)),
            }
            if name == "prediction":
                found[name] = generate(adapted, tokenizer, task, items, **options)
            else:
                with adapted.disable_adapter():
                    found[name] = generate(adapted, tokenizer, task, items, **options)
    results = [{name: its[i].result for name, its in found.items()} for i in range(len(items))]
    unfinished = sum(not one.finished for one in found["prediction"])
    if unfinished:
        out.print(
            f"{unfinished} of {len(items)} answers are cut off at the maximum of tokens (--max-new-tokens).",
            style="yellow",
            soft_wrap=True,
        )
    if output is not None:
        write_rows(output, [{**row, **its} for row, its in zip(items, results, strict=True)], delimiter)
        out.print(f"{len(items)} rows written to {output}", markup=False)
    if json_output:
        ended = [{"finished": one.finished} for one in found["prediction"]]
        print_json([{**its, **end} for its, end in zip(results, ended, strict=True)])
    elif output is None:
        from rich.markup import escape

        listed = table("text", *(name.replace("_", " ") for name in found), left=1 + len(found))
        listed.columns[1].style = "bold"
        for row, its in zip(items, results, strict=True):
            listed.add_row(escape(text_of(task.columns, row)), *(escape(_shown(value)) for value in its.values()))
        out.print(listed)


def evaluate(
    out: Console,
    folder: AdapterFolder,
    task: FreeText,
    rows: Sequence[Row],
    model: str | None,
    dtype: str,
    device_map: str | None,
    metric: str | None,
    json_output: bool,
) -> None:
    """`ia3 evaluate` for an adapter of a task whose answer is text."""
    from ia3.evaluation.results import shown_metric, titles_of

    task = trusted(out, task, metric)
    seen = folder.seen()
    known = 0 if seen is None else sum(map(seen, rows))
    if known:
        out.print(f"{known} of {len(rows)} rows duplicate training examples.", style="yellow", markup=False)
    references = [task.reference(row, number) for number, row in enumerate(rows, 1)]
    with out.status("Loading …"):
        adapted, tokenizer = load_adapted(folder, model, dtype, device_map)
        from ia3.evaluation.generation import generate
    with Bars(out) as bars:
        stage = bars.stage("Evaluating", len(rows))
        found = generate(adapted, tokenizer, task, rows, lambda done: stage.advance(len(done)))
    scores = task.metrics([one.result for one in found], references)
    unfinished = sum(not one.finished for one in found)
    if json_output:
        print_json({**scores, "rows": len(rows), "unfinished": unfinished})
        return
    titles = titles_of(scores)
    listed = table("", *titles.values(), title=f"{len(rows)} rows")
    listed.add_row("all", *(shown_metric(scores[name]) for name in titles))
    out.print(listed)
    parts = [name for name in scores if name not in titles]
    if parts:
        listed = table("", "F1")
        for name in parts:
            listed.add_row(name.partition(": ")[2], shown_metric(scores[name]))
        out.print(listed)
    if unfinished:
        out.print(f"{unfinished} answers are cut off at the maximum of tokens (max_new_tokens of the task).")


def _shown(value: Any) -> str:
    """A result for a table."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
