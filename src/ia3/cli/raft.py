"""`ia3 raft`: the eleven tasks of RAFT, from rows to a submission."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ia3.cli.bars import Bars
from ia3.cli.common import (
    MAX_SEED,
    BaseOption,
    DelimiterOption,
    DtypeOption,
    InitOption,
    JsonOption,
    RecipeOption,
    console,
    print_json,
    quiet,
    recipe_for,
    require_folder,
    table,
)
from ia3.errors import InputError, about, shown

if TYPE_CHECKING:
    from rich.console import Console


def raft(
    tasks: str | None = typer.Option(
        None, "--tasks", help="Some of the tasks: ade_corpus_v2,overruling. \\[default: all eleven]", show_default=False
    ),
    data: Path | None = typer.Option(
        None,
        "--data",
        "-d",
        help="Folder with TASK/train.csv and TASK/test_unlabeled.csv. \\[default: ought/raft on the hub]",
        show_default=False,
    ),
    delimiter: str | None = DelimiterOption,
    model: str = BaseOption,
    dtype: str = DtypeOption,
    recipe: str | None = RecipeOption,
    init: str | None = InitOption,
    folds: int = typer.Option(5, min=2, help="Number of cross-validation parts of the training rows."),
    seed: int = typer.Option(0, min=0, max=MAX_SEED, help="Random seed; decides the parts, and the order of examples."),
    output: Path = typer.Option(Path("adapters", "raft"), "--output", "-o", help="Folder of results."),
    resume: bool = typer.Option(False, "--resume", help="Skip tasks that are finished in the folder."),
    json_output: bool = JsonOption,
) -> None:
    """Train and cross-validate on each task of the RAFT benchmark, and write predictions for its leaderboard.

    Each task has 50 training rows. Cross-validation measures macro-F1 on them. The adapter that labels the test rows is
    trained on all of them, with all three loss terms, and with all 77 answers of banking_77.

    Writes TASK/predictions.csv (columns ID and Label) and the adapter, as ia3 train does, into the output folder.
    """
    out = console(json_output)
    require_folder(output)
    from ia3.evaluation.learner import fold_of_each
    from ia3.evaluation.raft import Raft
    from ia3.task.raft import RAFT_TASKS, TRAIN_ROWS, RaftTask

    names = RAFT_TASKS if tasks is None else [part.strip() for part in tasks.split(",") if part.strip()]
    if not names or len(set(names)) < len(names):
        raise InputError(f"Expected different tasks with commas between them for --tasks, found {tasks!r}.")
    chosen = {name: RaftTask.load(name, data, delimiter) for name in names}
    for name, one in chosen.items():
        with about(f"Cannot cross-validate on RAFT's {name} (--folds {folds})"):
            fold_of_each(one.task, one.train, folds, seed)
    plan = recipe_for(model, recipe, init=init)
    for name, one in chosen.items():
        if len(one.train) != TRAIN_ROWS:
            out.print(
                f"RAFT has {TRAIN_ROWS} training rows for each task, here {name} has {len(one.train)}: not comparable.",
                style="yellow",
                markup=False,
            )
    benchmark = Raft(chosen, output, model, plan, dtype, folds, seed)
    if resume:
        out.print(f"Finished before: {shown(benchmark.finished(), 11, room=400)}", markup=False, style="dim")

    quiet()
    try:
        with Bars(out) as bars:
            results = benchmark.run(bars, resume)
    except KeyboardInterrupt:
        typer.echo("ia3: interrupted; finish the other tasks with the same command and --resume.", err=True)
        raise typer.Exit(130) from None
    if json_output:
        print_json({"output": str(output), **results})
        return
    _print_table(out, results["tasks"], results["mean"], folds)
    out.print(
        f"\nSaved in {output}: TASK/predictions.csv is what RAFT's leaderboard takes.", markup=False, soft_wrap=True
    )


def _print_table(out: Console, results: Mapping[str, dict[str, Any]], means: Mapping[str, float], folds: int) -> None:
    title = f"RAFT: macro-F1 on training rows, {folds}-fold cross-validated"
    shown_results = table("task", "macro-F1", "majority class", "test rows", "seconds", title=title)
    for name, its in results.items():
        scores = (its["cross_validation"]["macro_f1"], its["majority"]["macro_f1"])
        shown_results.add_row(
            name, *(f"{score:.1%}" for score in scores), str(its["test_rows"]), f"{its['seconds']:.0f}"
        )
    rows, seconds = (sum(its[key] for its in results.values()) for key in ("test_rows", "seconds"))
    shown_means = (f"{means[key]:.1%}" for key in ("macro_f1", "majority_macro_f1"))
    shown_results.add_row("mean (and sums)", *shown_means, str(rows), f"{seconds:.0f}", style="bold")
    out.print(shown_results)
