"""`ia3 predict`: a label and probabilities for each text or row, of one adapter or of many."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ia3.adapter.config import adapter_folders
from ia3.answering import ALONE, Answering, adapter_of, to_json
from ia3.cli.answers import delimiter_like, print_table, write
from ia3.cli.bars import Bars
from ia3.cli.common import (
    MAX_SEED,
    AdapterArgument,
    DelimiterOption,
    DeviceMapOption,
    DtypeOption,
    JsonOption,
    MemoryOption,
    ModelOption,
    PriorOption,
    RayOption,
    WorkersOption,
    connecting,
    console,
    print_json,
    require_ray,
)
from ia3.cli.free_text import is_text
from ia3.cli.free_text import predict as predict_texts
from ia3.errors import InputError, brief, shown, similar
from ia3.files import parse_bytes
from ia3.folder import AdapterFolder

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.task.kinds import AnyTask


def predict(
    adapter: str = AdapterArgument,
    texts: list[str] | None = typer.Argument(None, metavar="[TEXT]...", help="Texts to label.", show_default=False),
    data: str | None = typer.Option(
        None,
        "--data",
        "-d",
        help="Rows to label, instead of TEXT: .csv, .tsv, .jsonl, …; with --ray a folder or a pattern in quotes, 'rows/*.parquet', also "
        "at an address.",
        show_default=False,
    ),
    delimiter: str | None = DelimiterOption,
    output: str | None = typer.Option(
        None,
        "--output",
        "-o",
        help="Write rows with label and probabilities to a .csv or .jsonl file. A .csv has the delimiter "
        "of a .csv input. With --ray: a folder for a file for each file of --data.",
        show_default=False,
    ),
    adapter_column: str | None = typer.Option(
        None,
        help="Column of --data with the name of each row's adapter; ADAPTER is then the folder of all adapters.",
        show_default=False,
    ),
    adapters: str | None = typer.Option(
        None,
        help="Several adapters answer each row: their names, such as a,b; ADAPTER is then the folder of all adapters.",
        show_default=False,
    ),
    all_adapters: bool = typer.Option(
        False, "--all-adapters", help="Every adapter in the folder ADAPTER answers each row, each in its own task."
    ),
    zero_shot: bool = typer.Option(
        False, "--zero-shot", help="Add the untrained model's answer to each adapter's answer."
    ),
    abstain_below: float = typer.Option(
        0.0, min=0.0, max=1.0, help="Give no label if the best label's probability is lower."
    ),
    prior: str | None = PriorOption,
    max_new_tokens: int | None = typer.Option(
        None,
        min=1,
        help="For an adapter that generates text: the maximum of tokens of an answer. \\[default: the task's]",
        show_default=False,
    ),
    temperature: float | None = typer.Option(
        None,
        min=0.0,
        help="For an adapter that generates text: draw tokens with this temperature. \\[default: 0, the most probable token]",
        show_default=False,
    ),
    seed: int | None = typer.Option(
        None, min=0, max=MAX_SEED, help="Random seed of --temperature. \\[default: 0]", show_default=False
    ),
    model: str | None = ModelOption,
    dtype: str = DtypeOption,
    device_map: str | None = DeviceMapOption,
    memory: str = MemoryOption,
    ray: str | None = RayOption,
    workers: int | None = WorkersOption,
    json_output: bool = JsonOption,
) -> None:
    """Label texts, or the rows of a file, with a trained adapter: the label and each label's probability; or generate the
    answer, if the adapter's task asks for a text.

    Probabilities are calibrated when the adapter is: ia3 train --folds 4, or ia3 evaluate --calibrate.

    A file can mix rows of many adapters, of different tasks: ia3 predict adapters --data rows.csv --adapter-column task

    Or many adapters answer each row: ia3 predict adapters --data rows.csv --all-adapters

    Those that act from the question on (ia3 train --acts-from) share one reading of each text.

    --ray answers many files (.parquet, .csv, .tsv, .jsonl) on many workers: ia3 predict adapters/tickets --data 'rows/*.parquet'
    --output answered --ray auto. Each answered file appears in whole; the same command again does what is missing. Rows that
    cannot be answered are listed in errors.parquet.
    """
    out = console(json_output)
    if bool(texts) == bool(data):
        raise InputError('Expected texts or --data, one of the two; for example: ia3 predict ADAPTER "some text".')
    if adapter_column is not None and data is None:
        raise InputError("Expected --data with --adapter-column, a column of it; found texts.")
    given = {"--adapter-column": adapter_column is not None, "--adapters": adapters is not None}
    options = [option for option, there in {**given, "--all-adapters": all_adapters}.items() if there]
    if len(options) > 1:
        raise InputError(f"Expected one of --adapter-column, --adapters and --all-adapters, found {shown(options)}.")
    require_ray(ray, workers)
    if ray is not None and (data is None or output is None):
        raise InputError("Expected --data and --output with --ray, files of rows and a folder for the answered ones.")
    file = None if output is None or ray is not None else Path(output)
    if file is not None and file.suffix.lower() not in (".csv", ".jsonl"):
        raise InputError(f"Expected --output to end in .csv or .jsonl, or a folder with --ray, found {output!r}.")
    from ia3.evaluation.drawing import read
    from ia3.task.free_text import FreeText
    from ia3.task.reading import require_delimited

    parse_bytes(memory, "memory for what is read once")
    there = {} if not options else _adapters_in(Path(adapter), options[0])
    each = adapter_column is None and bool(options)
    generating = {"--max-new-tokens": max_new_tokens, "--temperature": temperature, "--seed": seed}
    how = {
        "model": model,
        "dtype": dtype,
        "device_map": device_map,
        "prior": prior,
        "zero_shot": zero_shot,
        "abstain_below": abstain_below,
    }
    if ray is not None and data is not None and output is not None:
        for option, value in generating.items():
            if value is not None:
                raise InputError(f"Expected labels with --ray, found {option}, which is for generated text.")
        names = (
            [ALONE] if not options else [*there] if adapter_column is not None else _chosen(adapter, there, adapters)
        )
        folders = {name: AdapterFolder(there.get(name, adapter)) for name in names}
        answering = Answering(folders, each, **how, memory=memory)
        _on_ray(out, answering, adapter, adapter_column, data, delimiter, output, ray, workers, json_output)
        return
    require_delimited(delimiter, data)
    if adapter_column is not None and data is not None:
        rows: Sequence[Any] = read(data, delimiter=delimiter)
        asked = [[adapter_of(row, adapter_column, there, adapter, number)] for number, row in enumerate(rows, 1)]
        known = {name: AdapterFolder(there[name]) for [name] in asked}
    else:
        names = _chosen(adapter, there, adapters) if each else [ALONE]
        known = {name: AdapterFolder(there[name] if each else adapter) for name in names}
        task = None if each else known[ALONE].any_task or known[ALONE].required_task()
        rows = list(texts or []) if data is None else read(data, task, delimiter)
        asked = [names] * len(rows)
    own = known[ALONE].any_task if ALONE in known else None
    if own is not None and is_text(own, {"--abstain-below": abstain_below, "--prior": prior}, generating):
        assert isinstance(own, FreeText)
        if data is None and len(own.columns) != 1:
            raise _not_texts(own)
        delimited = delimiter_like(data, delimiter)
        predict_texts(
            out,
            known[ALONE],
            own,
            rows,
            model,
            dtype,
            device_map,
            zero_shot,
            max_new_tokens,
            temperature or 0.0,
            seed or 0,
            file,
            delimited,
            json_output,
        )
        return
    answering = Answering(known, each, **how, memory=memory)
    tasks = answering.tasks
    _ = answering.opinions
    for name, task in tasks.items():
        if data is None and len(task.columns) != 1:
            raise _not_texts(task, f"Adapter {name!r}" if each else None)
    for number, (row, names) in enumerate(zip(rows, asked, strict=True), 1):
        answering.check(row, number, names)  # before a model is loaded, what cannot be used
    with out.status("Loading …"):
        _ = answering.loaded
    with Bars(out) as bars:
        stage = bars.stage("Predicting", answering.count(asked))
        found = answering.answers(rows, asked, lambda done: stage.advance(len(done)))
    items = [row if data is not None else {tasks[asked[0][0]].columns[0]: row} for row in rows]
    if file is not None:
        write(file, items, found, each, delimiter_like(data, delimiter))
        out.print(f"{len(rows)} rows written to {file}", markup=False)
    if json_output:
        print_json([to_json(its, each, named=adapter_column is not None) for its in found])
    elif file is None:
        print_table(out, items, found, named=bool(options))


def _on_ray(
    out: Console,
    answering: Answering,
    folder: str,
    column: str | None,
    data: str,
    delimiter: str | None,
    output: str,
    address: str,
    workers: int | None,
    json_output: bool,
) -> None:
    """Answer files of rows on the workers of Ray, and say how many."""
    from ia3.cluster.rows import Asked, Job

    job = Job(data, output, Asked.of(answering, folder, column, delimiter), answering)
    try:
        with connecting(out, address, workers) if job.left else nullcontext() as found, Bars(out) as bars:
            done = job.run(found, bars)
    except KeyboardInterrupt:
        typer.echo("ia3: interrupted; files that are done stay, and the same command goes on.", err=True)
        raise typer.Exit(130) from None
    if json_output:
        print_json({"output": output, **dataclasses.asdict(done), "rows_per_second": done.rate})
        return
    out.print(
        f"{done.rows:,} rows of {done.files:,} files in {output}, {done.errors:,} of them in errors.parquet; {done.answered:,} rows "
        f"now, {done.rate:,.0f} a second",
        markup=False,
        soft_wrap=True,
    )


def _not_texts(task: AnyTask, owner: str | None = None) -> InputError:
    """The error for texts that a task of several columns cannot take."""
    columns = shown(task.columns, 20)
    return InputError(f"Expected rows with the columns {columns}, found texts alone; give a file: --data.", owner=owner)


def _adapters_in(folder: Path, option: str) -> dict[str, str]:
    """The adapters in a folder: name → their folders."""
    if not folder.is_dir():
        raise InputError(f"Expected a folder of adapters with {option}, found no {str(folder)!r} here.")
    there = adapter_folders(str(folder))
    if not there:
        raise InputError(f"Expected adapters in subfolders of {str(folder)!r}, as {option} asks for them.")
    return there


def _chosen(folder: str, there: Mapping[str, str], listed: str | None) -> list[str]:
    """The adapters of --adapters, each once; or all that are there."""
    if listed is None:
        return [*there]
    names = list(dict.fromkeys(name.strip() for name in listed.split(",")))
    for name in names:
        if not name:
            raise InputError(
                f"Expected --adapters as names with commas between them, found {brief(listed)}; there are {shown(there)}."
            )
        if name not in there:
            raise InputError(f"Expected an adapter in {folder!r}, found {brief(name)}", similar(name, there))
    return names
