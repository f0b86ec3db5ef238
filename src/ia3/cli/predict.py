"""`ia3 predict`: a label and probabilities for each text or row."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ia3.cli.common import (
    AdapterArgument,
    JsonOption,
    ModelOption,
    console,
    load_adapted,
    load_task,
    print_json,
    progress,
)
from ia3.errors import InputError, shown

if TYPE_CHECKING:
    from ia3.tfew.predict import Prediction
    from ia3.tfew.task import Task


def predict(
    adapter: str = AdapterArgument,
    texts: list[str] | None = typer.Argument(None, metavar="[TEXT]...", help="Texts to label.", show_default=False),
    data: str | None = typer.Option(
        None, "--data", "-d", help="Rows to label, instead of TEXT: .csv, .tsv, .jsonl, …", show_default=False
    ),
    output: Path | None = typer.Option(
        None,
        "--output",
        "-o",
        help="Write rows with label and probabilities to a .csv or .jsonl file.",
        show_default=False,
    ),
    model: str | None = ModelOption,
    json_output: bool = JsonOption,
) -> None:
    """Label texts, or the rows of a file, with a trained adapter: the label and each label's probability."""
    out = console(json_output)
    if bool(texts) == bool(data):
        raise InputError('Expected texts or --data, one of the two; for example: ia3 predict ADAPTER "some text".')
    if output is not None and output.suffix.lower() not in (".csv", ".jsonl"):
        raise InputError(f"Expected --output to end in .csv or .jsonl, found {str(output)!r}.")
    from ia3.tfew.task import read_rows

    task = load_task(adapter)
    rows = read_rows(data) if data else _text_rows(task, texts or [])
    task.check(rows, labelled=False)
    with out.status("Loading …"):
        adapted, tokenizer = load_adapted(adapter, model)
        from ia3.tfew.predict import predict as predict_rows
    with progress(out) as bars:
        bar = bars.add_task("Predicting", total=len(rows), note="")
        found = predict_rows(adapted, tokenizer, task, rows, lambda count: bars.advance(bar, count))
    if output is not None:
        _write(output, rows, found)
        out.print(f"{len(rows)} rows written to {output}", markup=False)
    if json_output:
        print_json([{"label": item.label, "probabilities": item.probabilities} for item in found])
    elif output is None:
        _print_table(out, task, rows, found)


def _text_rows(task: Task, texts: list[str]) -> list[dict[str, str]]:
    columns = task.columns
    if len(columns) != 1:
        raise InputError(
            f"Expected a task with one text column for texts on the command line, found {shown(columns)}; use --data."
        )
    return [{columns[0]: text} for text in texts]


def _write(path: Path, rows: list[dict], found: list[Prediction]) -> None:
    from ia3.files import replacing

    with replacing(path) as temporary:
        if path.suffix.lower() == ".jsonl":
            lines = [
                json.dumps(
                    {**row, "prediction": item.label, "probabilities": item.probabilities},
                    ensure_ascii=False,
                    default=str,
                )
                for row, item in zip(rows, found, strict=True)
            ]
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
            return
        text = io.StringIO()
        labels = list(found[0].probabilities)
        added = ["prediction", *(f"probability_{label}" for label in labels)]
        # All columns of all rows; those of an earlier prediction are replaced.
        names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in added]
        writer = csv.DictWriter(text, names + added, lineterminator="\n")
        writer.writeheader()
        for row, item in zip(rows, found, strict=True):
            probabilities = {f"probability_{label}": f"{value:.6f}" for label, value in item.probabilities.items()}
            writer.writerow({**row, "prediction": item.label, **probabilities})
        temporary.write_text(text.getvalue(), encoding="utf-8")


def _print_table(out, task: Task, rows: list[dict], found: list[Prediction]) -> None:
    from rich.markup import escape
    from rich.table import Table

    # With many labels, the best few say enough.
    few = len(task.choices) <= 6
    table = Table()
    table.add_column("text", max_width=60, no_wrap=True, overflow="ellipsis")
    table.add_column("label", style="bold")
    for name in task.choices if few else ("probability",):
        table.add_column(escape(name), justify="right")
    column = (task.columns or list(rows[0]))[0]
    for row, item in zip(rows, found, strict=True):
        values = item.probabilities.values() if few else [item.probabilities[item.label]]
        text = " ".join(str(row.get(column, "")).split())
        table.add_row(escape(text), escape(item.label), *(f"{value:.1%}" for value in values))
    out.print(table)
