"""`ia3 predict`: a label and probabilities for each text or row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ia3.adapter.config import adapter_folders
from ia3.cli.bars import Bars
from ia3.cli.common import (
    AdapterArgument,
    DelimiterOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    console,
    load_adapted,
    load_bank,
    print_json,
    table,
)
from ia3.errors import InputError, brief, shown, similar
from ia3.folder import AdapterFolder

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.evaluation.prediction import Prediction
    from ia3.task.task import Row, Task
    from ia3.training.recipe import Recipe


# Characters of a text in a table.
_TEXT_WIDTH = 60


def predict(
    adapter: str = AdapterArgument,
    texts: list[str] | None = typer.Argument(None, metavar="[TEXT]...", help="Texts to label.", show_default=False),
    data: str | None = typer.Option(
        None, "--data", "-d", help="Rows to label, instead of TEXT: .csv, .tsv, .jsonl, …", show_default=False
    ),
    delimiter: str | None = DelimiterOption,
    output: Path | None = typer.Option(
        None,
        "--output",
        "-o",
        help="Write rows with label and probabilities to a .csv or .jsonl file. A .csv has the delimiter "
        "of a .csv input.",
        show_default=False,
    ),
    adapter_column: str | None = typer.Option(
        None,
        help="Column of --data with the name of each row's adapter; ADAPTER is then the folder of all adapters.",
        show_default=False,
    ),
    abstain_below: float = typer.Option(
        0.0, min=0.0, max=1.0, help="Give no label if the best label's probability is lower."
    ),
    model: str | None = ModelOption,
    dtype: str = DtypeOption,
    json_output: bool = JsonOption,
) -> None:
    """Label texts, or the rows of a file, with a trained adapter: the label and each label's probability.

    Probabilities are calibrated when the adapter is: ia3 train --folds 4, or ia3 evaluate --calibrate.

    A file can mix rows of many adapters, of different tasks: ia3 predict adapters --data rows.csv --adapter-column task
    """
    out = console(json_output)
    if bool(texts) == bool(data):
        raise InputError('Expected texts or --data, one of the two; for example: ia3 predict ADAPTER "some text".')
    if adapter_column is not None and data is None:
        raise InputError("Expected --data with --adapter-column, a column of it; found texts.")
    if output is not None and output.suffix.lower() not in (".csv", ".jsonl"):
        raise InputError(f"Expected --output to end in .csv or .jsonl, found {str(output)!r}.")
    from ia3.evaluation.drawing import read
    from ia3.task.reading import require_delimited
    from ia3.task.rows import as_rows

    require_delimited(delimiter, data)
    if data is not None and adapter_column is not None:
        rows = read(data, delimiter=delimiter)
        names = _adapter_of_each(Path(adapter), rows, adapter_column)
        known = {name: AdapterFolder(Path(adapter, name)) for name in dict.fromkeys(names)}
        tasks = [known[name].required_task() for name in names]
    else:
        names, known = None, {"": AdapterFolder(adapter)}
        task = known[""].required_task()
        if data is None and len(task.columns) != 1:
            raise InputError(
                f"Expected rows with the columns {shown(task.columns, 20)}, found texts alone; give a file: --data."
            )
        rows = read(data, task, delimiter) if data else as_rows(texts, task)
        tasks = [task] * len(rows)
    for number, (task, row) in enumerate(zip(tasks, rows, strict=True), 1):
        task.prompt(row, number)  # before a model is loaded, what cannot be used
        task.answers(row, number)
    temperatures = [known[name].temperature for name in names or [""] * len(rows)]
    recipe = _recipe_of([*known.values()])
    with out.status("Loading …"):
        if names is None:
            adapted, tokenizer = load_adapted(known[""], model, dtype)
        else:
            adapted, tokenizer = load_bank(known, model, dtype)
        from ia3.evaluation.prediction import predict as predict_rows
    with Bars(out) as bars:
        stage = bars.stage("Predicting", len(rows))
        found = predict_rows(
            adapted,
            tokenizer,
            tasks,
            rows,
            lambda done: stage.advance(len(done)),
            names,
            temperature=temperatures,
            abstain_below=abstain_below,
            recipe=recipe,
        )
    if output is not None:
        _write(output, rows, found, _delimiter_like(data, delimiter))
        out.print(f"{len(rows)} rows written to {output}", markup=False)
    if json_output:
        adapters = [{"adapter": name} for name in names] if names else [{}] * len(found)
        print_json(
            [
                {**which, "label": item.label, "probabilities": item.probabilities}
                for which, item in zip(adapters, found, strict=True)
            ]
        )
    elif output is None:
        _print_table(out, tasks, rows, found, names)


def _recipe_of(folders: Sequence[AdapterFolder]) -> Recipe:
    """The recipe of all adapters, which decides how rows are scored."""
    first, *others = folders
    for other in others:
        for name in ("length_normalization", "long_prompts"):
            one, its = getattr(first.recipe, name), getattr(other.recipe, name)
            if one != its:
                raise InputError(
                    f"Expected adapters whose recipes agree in {name}, found {one} in {str(first)!r} and {its} in "
                    f"{str(other)!r}; label their rows separately."
                )
    return first.recipe


def _adapter_of_each(folder: Path, rows: Sequence[Row], column: str) -> list[str]:
    """The adapter of each row, named by a column: a subfolder of `folder`."""
    if not folder.is_dir():
        raise InputError(f"Expected a folder of adapters with --adapter-column, found no {str(folder)!r} here.")
    there = adapter_folders(str(folder))
    if not there:
        raise InputError(f"Expected adapters in subfolders of {str(folder)!r}, as --adapter-column names them.")
    names = []
    for number, row in enumerate(rows, 1):
        if column not in row:
            raise InputError(
                f"Expected a column {column!r}, found {shown(row, 20)}", "see --adapter-column", row=number
            )
        name = "" if row[column] is None else str(row[column]).strip()
        if name not in there:
            raise InputError(
                f"Expected an adapter in {str(folder)!r}, found {brief(name)}", similar(name, there), row=number
            )
        names.append(name)
    return names


def _delimiter_like(data: str | None, delimiter: str | None) -> str:
    """The delimiter of the CSV file to write: that of the CSV file that was read."""
    from ia3.task.reading import as_delimiter, delimiter_of

    if data is None or Path(data).suffix.lower() != ".csv":
        return ","
    return delimiter_of(data) if delimiter is None else as_delimiter(delimiter)


def _write(path: Path, rows: Sequence[Row], found: list[Prediction], delimiter: str) -> None:
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
        labels = list(dict.fromkeys(label for item in found for label in item.probabilities))
        added = ["prediction", *(f"probability_{label}" for label in labels)]
        # All columns of all rows; those of an earlier prediction are replaced.
        names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in added]
        writer = csv.DictWriter(text, names + added, delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        for row, item in zip(rows, found, strict=True):
            probabilities = {f"probability_{label}": f"{value:.6f}" for label, value in item.probabilities.items()}
            # Lists, such as a row's answers, as tasks read them from a CSV file.
            cells = {
                name: json.dumps(cell, ensure_ascii=False, default=str) if isinstance(cell, (list, dict)) else cell
                for name, cell in row.items()
            }
            writer.writerow({**cells, "prediction": item.label or "", **probabilities})
        temporary.write_text(text.getvalue(), encoding="utf-8")


def _print_table(
    out: Console, tasks: list[Task], rows: Sequence[Row], found: list[Prediction], adapters: list[str] | None
) -> None:
    from rich.markup import escape

    # With many labels, or different ones, or ones that leave no room, the best label's probability says enough.
    labels = list(found[0].probabilities)
    width = sum(max(len(name), len("100.0%")) + 3 for name in (*labels, max(labels, key=len)))
    few = len(labels) <= 6 and width + _TEXT_WIDTH // 2 <= out.width
    few = few and all(list(item.probabilities) == labels for item in found)
    names = ([] if adapters is None else ["adapter"]) + ["text", "label"]
    shown_rows = table(*names, *(labels if few else ["probability"]), left=len(names))
    shown_rows.columns[len(names) - 1].style = "bold"
    for i, (task, row, item) in enumerate(zip(tasks, rows, found, strict=True)):
        values = item.probabilities.values() if few else [item.probabilities[item.best]]
        text = " ".join(str(row.get((task.columns or list(row))[0], "")).split())
        which = [] if adapters is None else [escape(adapters[i])]
        shown_rows.add_row(
            *which, escape(_shortened(text)), escape(item.label or "—"), *(f"{value:.1%}" for value in values)
        )
    out.print(shown_rows)


def _shortened(text: str) -> str:
    """A long text without its middle. Its start and end distinguish it from others."""
    beginning = _TEXT_WIDTH * 2 // 3
    return text if len(text) <= _TEXT_WIDTH else f"{text[:beginning]} … {text[beginning + 3 - _TEXT_WIDTH :]}"
