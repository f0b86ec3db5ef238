"""`ia3 compare`: accuracy and cost of zero-shot, in-context learning and T-Few on one task and model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ia3.adapter.pretrained import EMBEDDED_MODEL
from ia3.adapter.stored import REPORT_NAME, is_ours
from ia3.answering import load_base_of
from ia3.cli.bars import Bars
from ia3.cli.common import (
    MAX_SEED,
    ChoicesOption,
    DelimiterOption,
    DtypeOption,
    ExamplesOption,
    JsonOption,
    LabelColumnOption,
    RecipeOption,
    ReportOption,
    StepsOption,
    TemplateOption,
    TestDataOption,
    TestRowsOption,
    TextColumnOption,
    console,
    print_json,
    quiet,
    recipe_for,
    require_folder,
    say_seen,
    table,
)
from ia3.cli.free_text import ChatOption, MetricOption, TextExamplesOption, is_text, trusted, with_options
from ia3.cli.train import folder_of, numbers, source_of
from ia3.errors import InputError
from ia3.folder import AdapterFolder

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.evaluation.wordings import Ranked


def compare(
    model: str | None = typer.Option(
        None,
        "--model",
        "-m",
        help="Base model: a folder, a .gguf file, a hub id (owner/name, owner/name@v1), 'smollm2' or 'minilm'. \\[default: the adapter's, else "
        "smollm2]",
        show_default=False,
    ),
    dtype: str = DtypeOption,
    data: str | None = typer.Option(
        None, "--data", "-d", help="Labelled rows: examples and shots. \\[default: the task's]", show_default=False
    ),
    text_column: str | None = TextColumnOption,
    label_column: str | None = LabelColumnOption,
    task: str | None = typer.Option(
        None,
        "--task",
        help="A built-in task, or a task.yaml. \\[default: the adapter's; titles of courses without --data]",
        show_default=False,
    ),
    test_data: str | None = TestDataOption,
    delimiter: str | None = DelimiterOption,
    template: str | None = TemplateOption,
    choices: str | None = ChoicesOption,
    shots: str | None = typer.Option(
        None, help="Numbers of shots: 4,8,16. \\[default: 8,16, if they fit the context]", show_default=False
    ),
    adapter: str | None = typer.Option(
        None, help="Folder of a trained adapter to evaluate, instead of training one.", show_default=False
    ),
    examples_per_label: int | None = ExamplesOption,
    text_examples: int | None = TextExamplesOption,
    chat: bool = ChatOption,
    metric: str | None = MetricOption,
    test_rows: int = TestRowsOption,
    recipe: str | None = RecipeOption,
    steps: int | None = StepsOption,
    seed: int = typer.Option(
        0, min=0, max=MAX_SEED, help="Random seed; decides which examples are drawn, and their order."
    ),
    output: Path | None = typer.Option(
        None,
        "--output",
        "-o",
        help="Folder of compare.png, compare.json and report.html. \\[default: comparisons/NAME]",
        show_default=False,
    ),
    report: Path | None = ReportOption,
    json_output: bool = JsonOption,
) -> None:
    """Compare accuracy and cost of T-Few, zero-shot and in-context learning.

    Without arguments: SmolLM2-135M on titles of courses. The costs are those of the paper's Table 1 and some more: FLOPs to
    label one example, FLOPs to train, bytes of keys and values, bytes on disk, seconds.

    In-context learning reads the shots once and keeps their keys and values; the table also has the cost of reading
    them again for each example. The untrained methods also have balanced accuracy: an untrained model prefers some answers
    whatever it reads, and training rows show how much. Without --template or --task, the training rows choose the wording
    of all methods. Writes a picture, compare.png, the numbers, compare.json, and report.html, a page with intervals and mistakes.

    For a task whose answer is text the methods have its metrics, and each row's shots are read again.
    """
    from ia3.evaluation.drawing import drawn
    from ia3.evaluation.experiment import require_page
    from ia3.task.task import Task

    out = console(json_output)
    if adapter is not None:
        for option, value in {"--recipe": recipe, "--steps": steps, "--chat": chat or None}.items():
            if value is not None:
                raise InputError(f"Expected --adapter or {option}, one of the two, found both.")
    trained = None if adapter is None else AdapterFolder(adapter)
    if trained is not None and trained.recipe.opinions == "head":
        raise InputError(
            f"Expected an adapter with trained vectors to compare, found one whose head answers alone in {adapter!r}; use ia3 evaluate."
        )
    counts = None if shots is None else numbers("--shots", shots, int)
    own = trained.any_task or trained.required_task() if trained is not None and task is None else task
    source = source_of(own, data, test_data, label_column, text_column, choices, template, delimiter)
    generates = is_text(
        source.task,
        {
            "--text-column": text_column,
            "--label-column": label_column,
            "--choices": choices,
            "--examples-per-label": examples_per_label,
        },
        {"--examples": text_examples, "--chat": chat, "--metric": metric},
    )
    if isinstance(source.task, Task):
        source.task.require_one_label()
    else:
        is_own = trained is not None and task is None
        changed = trusted(out, source.task, metric) if is_own else with_options(source.task, chat, metric)
        source = replace(source, task=changed)
    source.check()
    seen = None if trained is None else trained.seen()
    if adapter is not None and seen is None and source.test is None:
        raise InputError(
            f"Expected test rows that the adapter has not seen (--test-data): {adapter} does not say which rows it was "
            f"trained on."
        )
    chosen = drawn(source, text_examples if generates else examples_per_label, test_rows, seed, seen)
    examples, test = chosen.examples, chosen.test
    if not test:
        raise InputError(
            "Expected labelled rows to measure on (--test-data): none remain after training; give some, or train on "
            f"fewer ({'--examples' if generates else '--examples-per-label'})."
        )
    for count in counts or ():
        if not 1 <= count <= len(examples):
            raise InputError(f"Expected --shots from 1 to {len(examples)}, the training examples, found {count}.")
    folder = output or folder_of("comparisons", source.task.name)
    require_folder(folder)
    require_page(report)
    if report is None and not is_ours(folder / REPORT_NAME):
        raise InputError(
            f"Expected a folder without a {REPORT_NAME} of yours, found it in {str(folder)!r}; name another: --report."
        )
    plan = (
        trained.recipe if trained is not None else recipe_for(model or EMBEDDED_MODEL, recipe, generates, steps=steps)
    )

    quiet()
    with out.status("Loading the model …"):
        from ia3.adapter.pretrained import load_base
        from ia3.evaluation.comparison import USUAL_SHOTS, Comparison
        from ia3.evaluation.comparison_text import TextComparison
        from ia3.evaluation.wordings import choose_wording

        if generates:
            from ia3.evaluation.generation import require_generator

            require_generator(model or (None if trained is None else trained.config.base) or EMBEDDED_MODEL)
        if trained is None:
            base, tokenizer = load_base(model or EMBEDDED_MODEL, source.task.labels, dtype)
        else:
            base, tokenizer = load_base_of(trained, model, dtype)
    ranking: list[Ranked] = []
    if isinstance(source.task, Task):
        with Bars(out) as bars:
            asked, ranking = choose_wording(base, tokenizer, source.task, examples, plan, bars)
            if ranking:
                bars.wordings("Wordings", ranking, len(asked.templates))
        comparison = Comparison(base, tokenizer, asked, examples, test, plan, seed, trained)
    else:
        plan = plan.likelihood_only
        comparison = TextComparison(base, tokenizer, source.task, examples, test, plan, seed, trained, metric)
    drawn_shots = comparison.shots(counts)
    out.print(
        f"{source.task.name} on {base.name_or_path}: {len(examples)} training examples, {len(test)} test rows",
        markup=False,
        style="bold",
        soft_wrap=True,
    )
    say_seen(out, [chosen])
    missing = [str(count) for count in USUAL_SHOTS if counts is None and count not in drawn_shots]
    if missing and comparison.reads_examples:
        out.print(
            f"No {' and no '.join(missing)} examples in context: there are {len(examples)}, and they must fit "
            f"into the model's context with the longest test row.",
            style="yellow",
            soft_wrap=True,
        )
    with Bars(out) as bars:
        rows = comparison.run(drawn_shots, bars)
    comparison.save(folder, rows, report)
    if json_output:
        tried = {"wordings": [one.to_dict() for one in ranking]} if ranking else {}
        print_json({"rows": rows, **tried})
        return
    print_comparison(out, rows)
    out.print(
        f"\nSaved in {folder}.\nHow good are they? {report or folder / REPORT_NAME}", markup=False, soft_wrap=True
    )


def print_comparison(out: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A column per method, so that names and numbers fit a narrow screen; costs are rounded."""
    from ia3.evaluation.comparison import BESIDE_METRICS
    from ia3.evaluation.results import shown_metric, titles_of

    scores = {name: value for name, value in rows[0].items() if name not in BESIDE_METRICS}
    titles = titles_of(scores)
    lines: dict[str, Callable[[Mapping[str, Any]], str]] = {
        title: lambda row, name=name: shown_metric(row[name]) for name, title in titles.items()
    }
    lines |= {
        "balanced accuracy": lambda row: f"{row['balanced']['accuracy']:.1%}" if row["balanced"] else "",
        "its macro-F1": lambda row: f"{row['balanced']['macro_f1']:.1%}" if row["balanced"] else "",
        "FLOPs an example": lambda row: _power(row["inference_flops"]),
        "shots read again": lambda row: _power(row["inference_flops_uncached"]),
        "estimate": lambda row: _power(row["inference_flops_estimate"]),
        "training FLOPs": lambda row: _power(row["training_flops"]),
        "its estimate": lambda row: _power(row["training_flops_estimate"]),
        "keys and values": lambda row: _size(row["kv_cache_bytes"]),
        "on disk": lambda row: _size(row["disk_bytes"]),
        "s an example": lambda row: f"{row['seconds']:.3g}",
    }
    if not any(row["balanced"] for row in rows):  # answers differ from row to row
        lines = {name: cell for name, cell in lines.items() if name not in ("balanced accuracy", "its macro-F1")}
    shown = table("", *(row["method"] for row in rows))
    for name, cell in lines.items():
        shown.add_row(name, *map(cell, rows))
    for column, row in zip(shown.columns[1:], rows, strict=True):
        column.style = "bold" if row is rows[-1] else ""
    out.print(shown)
    if any(row["balanced"] for row in rows):
        out.print("Balanced: without the answers' own frequency, which is estimated on training rows.")
    out.print("Estimates are the paper's, 2·N FLOPs a token (N in encoder-decoders), shots read for each example.")


def _power(number: float | None) -> str:
    return "unknown" if number is None else f"{number:.1e}".replace("e+", "e") if number else "0"


def _size(number: int) -> str:
    for unit, size in {"GB": 10**9, "MB": 10**6, "kB": 10**3}.items():
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"
