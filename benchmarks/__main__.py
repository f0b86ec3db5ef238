"""`python -m benchmarks`: whole jobs against what else one would use, and against the floor."""

from __future__ import annotations

import json
import os
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ia3.adapter.pretrained import EMBEDDED_MODEL
from ia3.errors import InputError
from ia3.files import replacing

from .jobs.report import picture, show
from .jobs.run import JSON_NAME, Settings, chosen, plan, run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def bench(
    only: str | None = typer.Option(
        None,
        "--only",
        help="Some rows: import, help, load, train-2, train-77, score-2, score-6, score-77, generate, mixed, load-adapter, "
        "switch-adapter, curve-rows, curve-choices, curve-adapters. \\[default: all]",
        show_default=False,
    ),
    repeats: int = typer.Option(3, min=1, help="How often each column does each job, one after the other."),
    model: str = typer.Option(
        EMBEDDED_MODEL, "--model", "-m", help="Base model: a folder, a hub id or 'smollm2' (embedded)."
    ),
    threads: int = typer.Option(os.cpu_count() or 1, min=1, help="Threads of each process."),
    whole: bool = typer.Option(False, "--whole", help="Do whole jobs, of which samples are measured otherwise: hours."),
    adapterhub: str | None = typer.Option(
        None,
        "--adapterhub",
        metavar="PYTHON",
        help="Interpreter of an environment with AdapterHub's adapters (which needs transformers 4), to be measured too.",
        show_default=False,
    ),
    output: Path = typer.Option(Path("bench"), "--output", "-o", help="Folder of bench.json and bench.png."),
    resume: bool = typer.Option(False, "--resume", help="Do not repeat the rows that are in the folder's bench.json."),
    json_output: bool = typer.Option(
        False, "--json", help="Print machine-readable JSON on standard output and nothing else."
    ),
) -> None:
    """Measure whole jobs in time and memory: ours, PEFT with transformers.Trainer, the algorithm of T-Few's authors,
    AdapterHub's adapters, and the floor, the frozen model's bare passes over the fewest tokens that a job needs.

    Takes about ten minutes on two cores. Ctrl-C leaves the rows that are done; --resume does the others.
    """
    out = Console(stderr=json_output, highlight=False)
    rows = chosen(only, whole)
    planned = plan(Settings(model, repeats, threads, whole), rows, output / JSON_NAME, adapterhub, resume)
    try:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=out,
        ) as bars:
            bar = bars.add_task("Measuring", total=None, note="")

            def on_step(done: int, total: int, note: str) -> None:
                bars.update(bar, completed=done, total=total, note=note)

            result = run(planned, on_step)
    except KeyboardInterrupt:
        where = output / JSON_NAME
        said = f"{where} has the rows that are done; go on with --resume" if where.is_file() else "no row was done"
        typer.echo(f"benchmarks: interrupted; {said}.", err=True)
        raise
    with replacing(output / "bench.png") as temporary:
        picture(result, temporary)
    if json_output:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
        return
    show(out, result)
    out.print(f"Written: {output / JSON_NAME} and {output / 'bench.png'}", markup=False)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Bad input: one line on standard error, exit code 2."""
    try:
        app(arguments, prog_name="python -m benchmarks")
    except InputError as error:
        typer.echo(f"benchmarks: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
