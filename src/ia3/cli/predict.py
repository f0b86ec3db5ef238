"""`ia3 predict`: a label and probabilities for each text or row, of one adapter or of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ia3.adapter.config import adapter_folders
from ia3.cli.answers import Answer, delimiter_like, print_table, to_json, write
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
    console,
    load_adapted,
    load_bank,
    moved,
    print_json,
)
from ia3.cli.free_text import is_text
from ia3.cli.free_text import predict as predict_texts
from ia3.errors import InputError, about, brief, shown, similar
from ia3.files import parse_bytes
from ia3.folder import AdapterFolder

if TYPE_CHECKING:
    from ia3.adapter.model import IA3Model
    from ia3.opinions.opinions import Opinions
    from ia3.task.kinds import AnyTask
    from ia3.task.task import Row, Task

# What an adapter is called that is asked alone.
_ALONE = "default"


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
    json_output: bool = JsonOption,
) -> None:
    """Label texts, or the rows of a file, with a trained adapter: the label and each label's probability; or generate the
    answer, if the adapter's task asks for a text.

    Probabilities are calibrated when the adapter is: ia3 train --folds 4, or ia3 evaluate --calibrate.

    A file can mix rows of many adapters, of different tasks: ia3 predict adapters --data rows.csv --adapter-column task

    Or many adapters answer each row: ia3 predict adapters --data rows.csv --all-adapters

    Those that act from the question on (ia3 train --acts-from) share one reading of each text.
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
    if output is not None and output.suffix.lower() not in (".csv", ".jsonl"):
        raise InputError(f"Expected --output to end in .csv or .jsonl, found {str(output)!r}.")
    from ia3.evaluation.drawing import read
    from ia3.task.free_text import FreeText
    from ia3.task.reading import require_delimited

    require_delimited(delimiter, data)
    parse_bytes(memory, "memory for what is read once")
    there = {} if not options else _adapters_in(Path(adapter), options[0])
    each = adapter_column is None and bool(options)
    if adapter_column is not None and data is not None:
        rows: Sequence[Any] = read(data, delimiter=delimiter)
        asked = [[name] for name in _adapter_of_each(adapter, there, rows, adapter_column)]
        known = {name: AdapterFolder(there[name]) for [name] in asked}
    else:
        names = _chosen(adapter, there, adapters) if each else [_ALONE]
        known = {name: AdapterFolder(there[name] if each else adapter) for name in names}
        task = None if each else known[_ALONE].any_task or known[_ALONE].required_task()
        rows = list(texts or []) if data is None else read(data, task, delimiter)
        asked = [names] * len(rows)
    generating = {"--max-new-tokens": max_new_tokens, "--temperature": temperature, "--seed": seed}
    own = known[_ALONE].any_task if _ALONE in known else None
    if own is not None and is_text(own, {"--abstain-below": abstain_below, "--prior": prior}, generating):
        assert isinstance(own, FreeText)
        if data is None and len(own.columns) != 1:
            raise _not_texts(own)
        delimited = delimiter_like(data, delimiter)
        predict_texts(
            out,
            known[_ALONE],
            own,
            rows,
            model,
            dtype,
            device_map,
            zero_shot,
            max_new_tokens,
            temperature or 0.0,
            seed or 0,
            output,
            delimited,
            json_output,
        )
        return
    tasks = {name: folder.required_task() for name, folder in known.items()}
    opinions = {}
    for name, folder in known.items():
        with about(f"Adapter {name!r}" if each else None):
            opinions[name] = moved(folder.opinions, prior, tasks[name].labels)
    for name, task in tasks.items():
        if data is None and len(task.columns) != 1:
            raise _not_texts(task, f"Adapter {name!r}" if each else None)
    for number, (row, names) in enumerate(zip(rows, asked, strict=True), 1):
        for name in names:  # before a model is loaded, what cannot be used
            with about(f"Adapter {name!r}" if each else None):
                wording = tasks[name].wording(row, number)
                _ = wording.prompt, wording.answers
    with out.status("Loading …"):
        alone = not options and not zero_shot
        loaded = (
            load_adapted(known[_ALONE], model, dtype, device_map)
            if alone
            else load_bank(known, model, dtype, device_map)
        )
    with Bars(out) as bars:
        found = _answered(bars, loaded, known, tasks, opinions, rows, asked, zero_shot, abstain_below, memory)
    items = [row if data is not None else {tasks[asked[0][0]].columns[0]: row} for row in rows]
    if output is not None:
        write(output, items, found, each, delimiter_like(data, delimiter))
        out.print(f"{len(rows)} rows written to {output}", markup=False)
    if json_output:
        print_json([to_json(its, each, named=adapter_column is not None) for its in found])
    elif output is None:
        print_table(out, items, found, named=bool(options))


def _not_texts(task: AnyTask, owner: str | None = None) -> InputError:
    """The error for texts that a task of several columns cannot take."""
    columns = shown(task.columns, 20)
    return InputError(f"Expected rows with the columns {columns}, found texts alone; give a file: --data.", owner=owner)


def _answered(
    bars: Bars,
    loaded: tuple[IA3Model, Any],
    known: Mapping[str, AdapterFolder],
    tasks: Mapping[str, Task],
    opinions: Mapping[str, Opinions],
    rows: Sequence[Any],
    asked: Sequence[Sequence[str]],
    zero_shot: bool,
    abstain_below: float,
    memory: str,
) -> list[list[Answer]]:
    """For each row the answer of each adapter that is asked, with that of the untrained model where it is wanted."""
    from ia3.adapter.rows import BASE
    from ia3.evaluation.prediction import Respondent, predict, predict_each
    from ia3.scoring.readings import Readings

    model, tokenizer = loaded
    if model.peft_config:  # an adapter alone
        folder, task = known[_ALONE], tasks[_ALONE]
        stage = bars.stage("Predicting", len(rows))
        alone = predict(
            model,
            tokenizer,
            task,
            rows,
            lambda done: stage.advance(len(done)),
            temperature=folder.temperature,
            abstain_below=abstain_below,
            recipe=folder.recipe,
            opinions=opinions[_ALONE],
        )
        return [[Answer(_ALONE, task, item)] for item in alone]
    respondents = {
        name: Respondent(name, tasks[name], folder.recipe, folder.temperature, opinions[name])
        for name, folder in known.items()
    }
    # Adapters of one task have one untrained model beside them, which is asked once.
    untrained: dict[str, Respondent] = {}
    for name, folder in known.items() if zero_shot else ():
        base = Respondent(BASE, tasks[name], folder.recipe)
        untrained[name] = next((one for one in untrained.values() if one == base), base)
    everyone = []
    for names in asked:
        its = [who[name] for who in (respondents, untrained) for name in names if name in who]
        everyone.append(list({id(one): one for one in its}.values()))
    stage = bars.stage("Predicting", sum(map(len, everyone)))
    several = max(map(len, everyone)) > 1
    predictions = predict_each(
        model,
        tokenizer,
        rows,
        everyone,
        lambda done: stage.advance(len(done)),
        abstain_below,
        Readings(memory) if several else None,
    )
    answers = []
    for names, its, items in zip(asked, everyone, predictions, strict=True):
        said = {id(one): item for one, item in zip(its, items, strict=True)}
        answers.append(
            [
                Answer(name, tasks[name], said[id(respondents[name])], said[id(untrained[name])] if zero_shot else None)
                for name in names
            ]
        )
    return answers


def _adapters_in(folder: Path, option: str) -> dict[str, str]:
    """The adapters in a folder: name → their folders."""
    if not folder.is_dir():
        raise InputError(f"Expected a folder of adapters with {option}, found no {str(folder)!r} here.")
    there = adapter_folders(str(folder))
    if not there:
        raise InputError(f"Expected adapters in subfolders of {str(folder)!r}, as {option} asks for them.")
    return there


def _adapter_of_each(folder: str, there: Mapping[str, str], rows: Sequence[Row], column: str) -> list[str]:
    """The adapter of each row, named by a column."""
    names = []
    for number, row in enumerate(rows, 1):
        if column not in row:
            raise InputError(
                f"Expected a column {column!r}, found {shown(row, 20)}", "see --adapter-column", row=number
            )
        name = "" if row[column] is None else str(row[column]).strip()
        if name not in there:
            raise InputError(
                f"Expected an adapter in {folder!r}, found {brief(name)}", similar(name, there), row=number
            )
        names.append(name)
    return names


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
