"""`ia3 compare`: zero-shot, in-context learning and T-Few on one task and model, how good they are and what they cost."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ia3.adapter.config import TaskType
from ia3.adapter.pretrained import EMBEDDED_MODEL
from ia3.adapter.stored import RECIPE_NAME
from ia3.cli.common import (
    MAX_SEED,
    ChoicesOption,
    DelimiterOption,
    DtypeOption,
    ExamplesOption,
    JsonOption,
    LabelColumnOption,
    RecipeOption,
    StepsOption,
    TemplateOption,
    TestDataOption,
    TestRowsOption,
    TextColumnOption,
    console,
    load_base_of,
    print_json,
    progress,
    quiet,
    recipe_for,
    table,
)
from ia3.cli.results import write_json
from ia3.cli.run import train_alone, with_adapters
from ia3.cli.train import drawn, folder_of, numbers, say_seen, source_of
from ia3.errors import InputError
from ia3.files import WEIGHTS_NAME, replacing
from ia3.folder import AdapterFolder

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ia3.adapter.model import IA3Model
    from ia3.evaluation.costs import Measured
    from ia3.task.task import Row, Task
    from ia3.training.recipe import Recipe

# Shots when none are asked for, as far as the rows and the model's context allow.
_USUAL_SHOTS = (8, 16)

_T_FEW = "t-few"


def compare(
    model: str | None = typer.Option(
        None,
        "--model",
        "-m",
        help="Base model: a folder, a hub id or 'smollm2'. \\[default: the adapter's, else smollm2]",
        show_default=False,
    ),
    dtype: str = DtypeOption,
    data: str | None = typer.Option(
        None, "--data", "-d", help="Labelled rows to draw examples from. \\[default: the task's]", show_default=False
    ),
    text_column: str | None = TextColumnOption,
    label_column: str | None = LabelColumnOption,
    task: str | None = typer.Option(
        None,
        "--task",
        help="A built-in task, or a task.yaml. \\[default: the adapter's; food reviews without --data]",
        show_default=False,
    ),
    test_data: str | None = TestDataOption,
    delimiter: str | None = DelimiterOption,
    template: str | None = TemplateOption,
    choices: str | None = ChoicesOption,
    shots: str | None = typer.Option(
        None, help="Examples in context: 4,8,16. \\[default: 8,16, as far as they fit]", show_default=False
    ),
    adapter: str | None = typer.Option(
        None, help="A trained adapter's folder, to measure in place of training one.", show_default=False
    ),
    examples_per_label: int | None = ExamplesOption,
    test_rows: int = TestRowsOption,
    recipe: str | None = RecipeOption,
    steps: int | None = StepsOption,
    seed: int = typer.Option(0, min=0, max=MAX_SEED, help="Decides which examples are drawn, and their order."),
    output: Path | None = typer.Option(
        None,
        "--output",
        "-o",
        help="Folder of compare.png and compare.json. \\[default: comparisons/NAME]",
        show_default=False,
    ),
    json_output: bool = JsonOption,
) -> None:
    """Compare T-Few with zero-shot and in-context learning: how often they are right, and what they cost.

    Without arguments: SmolLM2-135M on food reviews. The columns are those of the paper's Table 1, and some more: FLOPs to
    label one example, FLOPs to train, bytes of keys and values, bytes on disk, seconds.

    In-context learning's shots are read once and their keys and values are kept; what it costs to read them again for
    each example stands beside it. Writes a picture, compare.png, and the numbers, compare.json.
    """
    out = console(json_output)
    if adapter is not None:
        for option, value in {"--recipe": recipe, "--steps": steps}.items():
            if value is not None:
                raise InputError(f"Expected --adapter or {option}, one of the two, found both.")
    trained = None if adapter is None else AdapterFolder(adapter)
    counts = None if shots is None else numbers("--shots", shots, int)
    own = trained.required_task() if trained is not None and task is None else task
    source = source_of(own, data, test_data, label_column, text_column, choices, template, delimiter)
    source.task.check(source.rows)
    source.task.check(source.test or [])
    seen = None if trained is None else trained.seen()
    if adapter is not None and seen is None and source.test is None:
        raise InputError(
            f"Expected test rows that the adapter has not seen (--test-data): {adapter} does not say which rows it was "
            f"trained on."
        )
    chosen = drawn(source, examples_per_label, test_rows, seed, seen)
    examples, test = chosen.examples, chosen.test
    if not test:
        raise InputError(
            "Expected labelled rows to measure on (--test-data): training leaves none over; give some, or train on fewer "
            "(--examples-per-label)."
        )
    for count in counts or ():
        if not 1 <= count <= len(examples):
            raise InputError(f"Expected --shots from 1 to {len(examples)}, the training examples, found {count}.")
    folder = output or folder_of("comparisons", source.task.name)
    if folder.is_file():
        raise InputError(f"Expected a folder for --output, found the file {str(folder)!r}.")
    plan = trained.recipe if trained is not None else recipe_for(model or EMBEDDED_MODEL, recipe, steps=steps)

    quiet()
    with out.status("Loading the model …"):
        from ia3.adapter.pretrained import load_base

        if trained is None:
            base, tokenizer = load_base(model or EMBEDDED_MODEL, source.task.labels, dtype)
        else:
            base, tokenizer = load_base_of(trained, model, dtype)
        comparison = Comparison(base, tokenizer, source.task, examples, test, seed, plan)
        drawn_shots = comparison.shots(counts)
    out.print(
        f"{source.task.name} on {base.name_or_path}: {len(examples)} training examples, {len(test)} test rows",
        markup=False,
        style="bold",
        soft_wrap=True,
    )
    say_seen(out, [chosen])
    missing = [str(count) for count in _USUAL_SHOTS if counts is None and count not in drawn_shots]
    if missing and comparison.reads_examples:
        out.print(
            f"No {' and no '.join(missing)} examples in context: there are {len(examples)}, and they have to fit into the "
            f"model's context with the longest test row.",
            style="yellow",
            soft_wrap=True,
        )
    with progress(out) as bars:
        rows = [comparison.zero_shot(bars)]
        rows += [comparison.in_context(bars, count, some) for count, some in drawn_shots.items()]
        rows.append(comparison.t_few(bars, trained))
    settings = {
        "model": base.name_or_path,
        "task": source.task.name,
        "parameters": comparison.parameters,
        "train_examples": len(examples),
        "test_rows": len(test),
        "seed": seed,
    }
    with replacing(folder / "compare.png") as path:
        draw(path, rows, f"{source.task.name}, {Path(str(base.name_or_path)).name}, {len(test)} test rows")
        write_json(folder / "compare.json", {**settings, "rows": rows})
    if json_output:
        print_json({"rows": rows})
        return
    print_comparison(out, rows)
    out.print(f"\nSaved in {folder}.", markup=False, soft_wrap=True)


@dataclass
class Comparison:
    """One task and model, and the rows that all methods share.

    Attributes:
        base: the model; `t_few` puts an adapter into it.
        tokenizer: its tokenizer.
        task: what the rows mean.
        examples: what T-Few learns from, and shots are drawn from.
        test: what is measured on.
        seed: decides shots and the order of training.
        recipe: how T-Few trains, and by which all methods' answers are scored.
    """

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    examples: Sequence[Row]
    test: Sequence[Row]
    seed: int
    recipe: Recipe

    def __post_init__(self) -> None:
        from ia3.evaluation.costs import cache_bytes_per_token, count_parameters

        self.labels = [self.task.label(row) for row in self.test]
        self.parameters = count_parameters(self.base)
        self.cache_bytes = cache_bytes_per_token(self.base)

    def shots(self, counts: Sequence[int] | None) -> dict[int, list[Row]]:
        """The shots by their number.

        Raises:
            InputError: numbers were asked for, and one does not fit into the model's context.
        """
        from ia3.evaluation.icl import draw_shots, fitting

        if not self.reads_examples:
            if counts:
                raise InputError(
                    f"Expected no --shots for {type(self.base).__name__}: a classifier cannot read examples."
                )
            return {}
        wanted = counts or [count for count in _USUAL_SHOTS if count <= len(self.examples)]
        found = {}
        for count in wanted:
            some = draw_shots(self.examples, self.task, count, self.seed)
            fit = fitting(self.base, self.tokenizer, self.task, some, self.test)
            if fit == count:
                found[count] = some
            elif counts is not None:
                raise InputError(
                    f"Expected --shots that fit into the model's context with the longest test row, found {count}, of "
                    f"which {fit} fit; ask for fewer."
                )
        return found

    def zero_shot(self, bars: Progress) -> dict[str, Any]:
        """The model as it is."""
        return self._row("zero-shot", self._measure(bars, "zero-shot", self.base))

    def in_context(self, bars: Progress, count: int, shots: Sequence[Row]) -> dict[str, Any]:
        """The model with shots before each prompt."""
        from ia3.evaluation.costs import count_flops
        from ia3.evaluation.icl import shots_text
        from ia3.scoring.prefix import Prefix

        text = shots_text(self.task, shots)
        started = time.perf_counter()
        prefix = Prefix(self.base, self.tokenizer, text)
        seconds = time.perf_counter() - started
        with count_flops() as counter:  # again, because counting takes time of its own
            Prefix(self.base, self.tokenizer, text)
        measured = self._measure(bars, f"{count}-shot", self.base, prefix)
        again = counter.get_total_flops() if prefix.is_cached else 0
        return self._row(
            f"{count}-shot",
            measured,
            inference_flops_uncached=measured.flops + again,
            disk_bytes=len(prefix.text.encode()),
            examples=count,
            once_seconds=seconds,
        )

    def t_few(self, bars: Progress, trained: AdapterFolder | None) -> dict[str, Any]:
        """The model with an adapter: a trained one, or one that is trained now."""
        from ia3.adapter.model import IA3Model

        if trained is not None:
            model = IA3Model.from_pretrained(self.base, trained)
            costs = {"disk_bytes": Path(trained.vectors_file()).stat().st_size, **self._recorded(model, trained)}
        else:
            model, costs = self._train(bars)
        return self._row(_T_FEW, self._measure(bars, _T_FEW, model), **costs)

    def _train(self, bars: Progress) -> tuple[Any, dict[str, Any]]:
        from ia3.adapter.checkpoint import save_adapter

        recipe = self.recipe
        model = with_adapters(self.base, ["default"], recipe.init)
        with tempfile.TemporaryDirectory() as scratch:
            trainer, _, seconds = train_alone(
                bars, "training", model, self.tokenizer, self.task, self.examples, recipe, self.seed, scratch
            )
            save_adapter(model, scratch)
            size = Path(scratch, WEIGHTS_NAME).stat().st_size
        steps = trainer.steps_of("default")
        return model.eval(), {
            **self._training_flops(model, recipe, len(self.examples), steps),
            "disk_bytes": size,
            "examples": len(self.examples),
            "once_seconds": seconds,
            "recipe": recipe.name,
            "steps": steps,
        }

    def _recorded(self, model: IA3Model, folder: AdapterFolder) -> dict[str, Any]:
        """What an adapter's training cost, as far as its folder says; None where it does not."""
        found = folder.metrics
        steps, examples = found.get("steps"), found.get("train_examples")
        costs: dict[str, Any] = dict.fromkeys(("training_flops", "training_flops_estimate"))
        if steps and examples and folder.text(RECIPE_NAME) is not None:
            costs = self._training_flops(model, folder.recipe, examples, steps)
        seconds = found.get("train_seconds")
        return {
            **costs,
            "examples": examples,
            "once_seconds": None if seconds is None else seconds / (found.get("trained_at_once") or 1),
            "recipe": found.get("recipe"),
            "steps": steps,
        }

    def _training_flops(self, model: IA3Model, recipe: Recipe, examples: int, steps: int) -> dict[str, float]:
        """What so many steps on so many examples take: counted, and by the paper's estimate."""
        from ia3.evaluation.costs import estimated_flops, example_flops, examples_seen
        from ia3.scoring.question import row_length
        from ia3.scoring.scorer import Scorer

        seen = examples_seen(examples, recipe, steps)
        questions = Scorer(self.base, self.tokenizer).questions(self.task.wordings(self.examples))
        tokens = seen * sum(map(row_length, questions)) / len(questions)
        return {
            "training_flops": seen * example_flops(model, self.tokenizer, self.task, self.examples, recipe),
            "training_flops_estimate": estimated_flops(self.parameters, tokens, self._both, training=True),
        }

    def _measure(self, bars: Progress, title: str, model: Any, prefix: Any = None) -> Measured:
        from ia3.evaluation.costs import measure

        bar = bars.add_task(title, total=len(self.test), note="")
        measured = measure(
            model,
            self.tokenizer,
            self.task,
            self.test,
            prefix,
            lambda done: bars.advance(bar, len(done)),
            self.recipe,
        )
        bars.update(bar, note=f"accuracy {self._scores(measured)['accuracy']:.1%}")
        return measured

    def _scores(self, measured: Measured) -> dict[str, float]:
        return self.task.metrics(self.labels, [prediction.best for prediction in measured.predictions])

    @property
    def reads_examples(self) -> bool:
        """Whether the model can have examples in context; a classifier cannot."""
        from ia3.adapter.pretrained import task_type

        return task_type(self.base) != TaskType.SEQ_CLS

    @property
    def _both(self) -> bool:
        return bool(self.base.config.is_encoder_decoder)

    def _row(self, method: str, measured: Measured, **more: Any) -> dict[str, Any]:
        from ia3.evaluation.costs import estimated_flops

        return {
            "method": method,
            **self._scores(measured),
            "inference_flops": measured.flops,
            "inference_flops_uncached": measured.flops,
            "inference_flops_estimate": estimated_flops(self.parameters, measured.tokens, self._both),
            "training_flops": 0,
            "training_flops_estimate": 0,
            "kv_cache_bytes": round(self.cache_bytes * measured.tokens),
            "disk_bytes": 0,
            "seconds": measured.seconds,
            "once_seconds": 0.0,
            "tokens": measured.tokens,
            "examples": 0,
            **more,
        }


def print_comparison(out: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A column for each method, which leaves room for names and numbers on a narrow screen; costs are rounded."""
    lines: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "accuracy": lambda row: f"{row['accuracy']:.1%}",
        "macro-F1": lambda row: f"{row['macro_f1']:.1%}",
        "FLOPs an example": lambda row: _power(row["inference_flops"]),
        "shots read again": lambda row: _power(row["inference_flops_uncached"]),
        "estimate": lambda row: _power(row["inference_flops_estimate"]),
        "training FLOPs": lambda row: _power(row["training_flops"]),
        "its estimate": lambda row: _power(row["training_flops_estimate"]),
        "keys and values": lambda row: _size(row["kv_cache_bytes"]),
        "on disk": lambda row: _size(row["disk_bytes"]),
        "s an example": lambda row: f"{row['seconds']:.3g}",
    }
    shown = table("", *(row["method"] for row in rows))
    for name, cell in lines.items():
        shown.add_row(name, *map(cell, rows))
    for column, row in zip(shown.columns[1:], rows, strict=True):
        column.style = "bold" if row["method"] == _T_FEW else ""
    out.print(shown)
    out.print("Estimates are the paper's, 2·N FLOPs a token (N in encoder-decoders), shots read for each example.")


def _power(number: float | None) -> str:
    return "unknown" if number is None else f"{number:.1e}".replace("e+", "e") if number else "0"


def _size(number: int) -> str:
    for unit, size in {"GB": 10**9, "MB": 10**6, "kB": 10**3}.items():
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"


def draw(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """A picture of accuracy against FLOPs an example, on a logarithmic scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        cost, again, accuracy = row["inference_flops"], row["inference_flops_uncached"], 100 * row["accuracy"]
        color, marker = {"zero-shot": ("tab:gray", "s"), _T_FEW: ("tab:red", "*")}.get(row["method"], ("tab:blue", "o"))
        if again > cost:
            axes.plot([cost, again], [accuracy, accuracy], ":", color=color, linewidth=1)
            axes.plot(again, accuracy, marker, color=color, markerfacecolor="white", markersize=8)
        axes.plot(cost, accuracy, marker, color=color, markersize=14 if marker == "*" else 8)
        axes.annotate(
            row["method"], (cost, accuracy), xytext=(6, -14 if marker == "*" else 6), textcoords="offset points"
        )
    axes.set_xscale("log")
    axes.margins(0.2)
    axes.set_xlabel("FLOPs an example at inference (hollow: shots read again for each example)")
    axes.set_ylabel("accuracy, %")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
