"""`ia3 suggest`: the rows whose labels would teach most."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ia3.adapter.pretrained import EMBEDDED_MODEL
from ia3.answering import load_adapted
from ia3.cli.answers import delimiter_like, write_rows
from ia3.cli.bars import Bars
from ia3.cli.common import (
    MAX_SEED,
    DelimiterOption,
    DtypeOption,
    JsonOption,
    TextColumnOption,
    console,
    print_json,
    quiet,
    table,
    text_columns,
)
from ia3.errors import InputError, about, brief
from ia3.folder import AdapterFolder

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from ia3.evaluation.progress import Progress
    from ia3.task.task import Row

# Characters of a text in the table.
_TEXT_WIDTH = 80


def suggest(
    data: str = typer.Option(
        ..., "--data", "-d", help="Rows without labels: .csv, .tsv, .jsonl, …", show_default=False
    ),
    adapter: str | None = typer.Option(
        None,
        "--adapter",
        "-a",
        help="Folder of an adapter that knows some labels already: what it doubts comes first. \\[default: none, for the first labels]",
        show_default=False,
    ),
    count: int = typer.Option(32, "--count", "-n", min=1, help="How many rows to suggest."),
    text_column: str | None = TextColumnOption,
    label_column: str | None = typer.Option(
        None, help="Column for the label; rows that have one are left out. \\[default: the adapter's, else 'label']"
    ),
    delimiter: str | None = DelimiterOption,
    output: Path | None = typer.Option(
        None,
        "--output",
        "-o",
        help="Write the rows to a .csv or .jsonl file, with an empty column for the label.",
        show_default=False,
    ),
    model: str | None = typer.Option(
        None, "--model", "-m", help="Base model. \\[default: the adapter's, else smollm2]", show_default=False
    ),
    encoder: str | None = typer.Option(
        None,
        "--encoder",
        help="What tells which rows are alike: a sentence encoder ('minilm', a folder or hub id); 'none': the base model; or "
        "'auto': minilm if it is installed. \\[default: auto]",
        show_default=False,
    ),
    dtype: str = DtypeOption,
    seed: int = typer.Option(0, min=0, max=MAX_SEED, help="Random seed."),
    json_output: bool = JsonOption,
) -> None:
    """Name the rows whose labels would teach most, so that somebody labels 32 rows well rather than 64 at random.

    First labels: ia3 suggest --data pool.csv --output to-label.csv

    Fill in the column, train, and ask which rows the adapter doubts: ia3 suggest --data pool.csv --adapter adapters/tickets

    Rows are put into as many clusters as are wanted, by a sentence encoder's embeddings, or the base model's if none is
    installed. Each cluster gives the row nearest to its centre; with an adapter, rows that it doubts count more.
    """
    from ia3.evaluation.drawing import read
    from ia3.opinions.sentences import sentence
    from ia3.task.reading import require_delimited
    from ia3.task.task import column_of
    from ia3.task.template import is_missing, require

    out = console(json_output)
    if output is not None and output.suffix.lower() not in (".csv", ".jsonl"):
        raise InputError(f"Expected --output to end in .csv or .jsonl, found {str(output)!r}.")
    require_delimited(delimiter, data)
    folder = None if adapter is None else AdapterFolder(adapter)
    task = None if folder is None else folder.required_task()
    if task is not None and text_column is not None:
        raise InputError("--text-column goes without --adapter, whose task names its columns.")
    rows = read(data, task, delimiter)
    if not rows:
        raise InputError(f"Expected rows in {brief(data)}, found none.")
    to_fill = [label_column or "label"] if task is None or label_column is not None else task.answer_columns
    if task is None:
        asked = text_columns(text_column, rows[0]) or [None]
        columns = [column_of(one, list(rows[0]), "text", "text_column", to_fill) for one in asked]
    else:
        columns = task.templates[0].columns
        for number, row in enumerate(rows, 1):
            with about(row=number):
                require(row, columns)
    texts = [sentence(row, columns) for row in rows]
    seen = None if folder is None else folder.seen()
    some: dict[str, int] = {}
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        if text.strip() and all(is_missing(row.get(name)) for name in to_fill) and not (seen is not None and seen(row)):
            some.setdefault(text, index)
    if not some:
        raise InputError(f"Expected rows without a label in {brief(data)}, found none.")
    if count > len(some):
        raise InputError(
            f"Expected a --count of at most {len(some)}, the different rows without a label, found {count}."
        )
    quiet()
    from ia3.evaluation import suggesting  # with torch, so that wrong rows are told without waiting for it

    with Bars(out) as bars:
        probabilities = (
            None if folder is None else _probabilities(bars, folder, [rows[i] for i in some.values()], model, dtype)
        )
        name = model or (None if folder is None else folder.config.base) or EMBEDDED_MODEL
        embeddings = suggesting.embeddings_of([*some], name, encoder or "auto", dtype, bars)
    chosen = [[*some.values()][place] for place in suggesting.suggest(embeddings, count, probabilities, seed)]
    found = [{**rows[index], **dict.fromkeys(to_fill, "")} for index in chosen]
    if output is not None:
        write_rows(output, found, delimiter_like(data, delimiter))
        which = f"the column{'s' if len(to_fill) > 1 else ''} {', '.join(map(repr, to_fill))}"
        out.print(f"{count} rows written to {output}; fill in {which}.", markup=False)
    if json_output:
        print_json([{"row": index + 1, "text": texts[index]} for index in chosen])
    elif output is None:
        from rich.markup import escape

        shown = table("row", "text", left=2, title=f"{count} of {len(some)} rows")
        for index in chosen:
            shown.add_row(str(index + 1), escape(brief(" ".join(texts[index].split()), _TEXT_WIDTH)))
        out.print(shown)


def _probabilities(
    bars: Progress, folder: AdapterFolder, rows: Sequence[Row], model: str | None, dtype: str
) -> np.ndarray:
    """What an adapter says to rows: (N, labels)."""
    import numpy as np

    with bars.waiting("Loading …"):
        adapted, tokenizer = load_adapted(folder, model, dtype)
    from ia3.evaluation.prediction import predict

    task = folder.required_task()
    if task.labels is None:
        raise InputError(
            "Expected an adapter of a task with the same labels for all rows", "leave out", argument="adapter"
        )
    stage = bars.stage("Predicting", len(rows))
    found = predict(
        adapted,
        tokenizer,
        task,
        rows,
        lambda done: stage.advance(len(done)),
        temperature=folder.temperature,
        recipe=folder.recipe,
        opinions=folder.opinions,
    )
    each = np.array([[one.probabilities[label] for label in task.labels] for one in found])
    # Where labels are decided one by one, each decision is in doubt.
    return np.concatenate([each, 1 - each], axis=1) if task.multi_label else each
