"""`ia3 bench`: whole jobs against what else one would use, and against the floor."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from ia3.cli.bars import Bar, Bars
from ia3.cli.common import BaseOption, JsonOption, console, print_json


def bench(
    only: str | None = typer.Option(
        None,
        "--only",
        help="Some rows: import, help, load, train-2, train-77, score-2, score-6, score-77, generate, mixed, load-adapter, "
        "switch-adapter, curve-rows, curve-choices, curve-adapters. \\[default: all]",
        show_default=False,
    ),
    repeats: int = typer.Option(3, min=1, help="How often each column does each job, one after the other."),
    model: str = BaseOption,
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
    json_output: bool = JsonOption,
) -> None:
    """Measure whole jobs in time and memory: ours, PEFT with transformers.Trainer, the algorithm of T-Few's authors,
    AdapterHub's adapters, and the floor, the frozen model's bare passes over the fewest tokens that a job needs.

    Takes about ten minutes on two cores. Ctrl-C leaves the rows that are done; --resume does the others.
    """
    from ia3.bench.report import picture, show
    from ia3.bench.suite import JSON_NAME, Settings, chosen, plan, run
    from ia3.files import replacing

    out = console(json_output)
    rows = chosen(only, whole)
    planned = plan(Settings(model, repeats, threads, whole), rows, output / JSON_NAME, adapterhub, resume)
    try:
        with Bars(out) as bars:
            stages: list[Bar] = []

            def on_step(done: int, total: int, note: str) -> None:
                if not stages:
                    stages.append(bars.stage("Measuring", total))
                stages[0].reach(done)
                stages[0].note(note)

            result = run(planned, on_step)
    except KeyboardInterrupt:
        where = output / JSON_NAME
        said = f"{where} has the rows that are done; go on with --resume" if where.is_file() else "no row was done"
        typer.echo(f"ia3: interrupted; {said}.", err=True)
        raise
    with replacing(output / "bench.png") as temporary:
        picture(result, temporary)
    if json_output:
        print_json(result)
        return
    show(out, result)
    out.print(f"Written: {output / JSON_NAME} and {output / 'bench.png'}", markup=False)
