"""`ia3 train`: from a few labelled examples to adapters, and how much better they are than the untrained model."""

from __future__ import annotations

import functools
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ia3.cli.common import (
    MAX_SEED,
    BaseOption,
    ChoicesOption,
    DelimiterOption,
    DtypeOption,
    ExamplesOption,
    InitOption,
    JsonOption,
    LabelColumnOption,
    RecipeOption,
    StepsOption,
    TemplateOption,
    TestDataOption,
    TestRowsOption,
    TextColumnOption,
    console,
    parse_choices,
    print_json,
    quiet,
    read,
    recipe_for,
)
from ia3.cli.results import print_fleet_table, print_table, summary, write_json
from ia3.cli.run import Job, Run, run_jobs
from ia3.errors import InputError, brief, shown

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.task.task import Row, Task

EMBEDDED_TASK = "food-reviews"

# What a task cannot be named when its adapter's folder stands beside these.
_TAKEN = ("checkpoints", "metrics.json")


def train(
    model: str = BaseOption,
    dtype: str = DtypeOption,
    data: str | None = typer.Option(
        None,
        "--data",
        "-d",
        help="Labelled rows: .csv, .tsv, .jsonl, a data set's folder or hub id. \\[default: the task's]",
        show_default=False,
    ),
    text_column: str | None = TextColumnOption,
    label_column: str | None = LabelColumnOption,
    task: str | None = typer.Option(
        None,
        "--task",
        help="A built-in task (see ia3 tasks), or a task.yaml: templates, choices and data in one file.",
        show_default=False,
    ),
    tasks: str | None = typer.Option(
        None, "--tasks", help="Several, an adapter for each: rte,cb,a.yaml. All train at once.", show_default=False
    ),
    test_data: str | None = TestDataOption,
    delimiter: str | None = DelimiterOption,
    template: str | None = TemplateOption,
    choices: str | None = ChoicesOption,
    examples_per_label: int | None = ExamplesOption,
    test_rows: int = TestRowsOption,
    recipe: str | None = RecipeOption,
    steps: int | None = StepsOption,
    init: str | None = InitOption,
    seed: int | None = typer.Option(
        None,
        min=0,
        max=MAX_SEED,
        help="Decides which examples are drawn, and their order. \\[default: 0]",
        show_default=False,
    ),
    seeds: str | None = typer.Option(
        None, "--seeds", help="Several, an adapter for each: 0,1,2. All train at once.", show_default=False
    ),
    learning_rates: str | None = typer.Option(
        None,
        "--learning-rates",
        help="Several, an adapter for each: 1e-3,3e-3. All train at once. \\[default: the recipe's]",
        show_default=False,
    ),
    folds: int = typer.Option(
        0,
        min=0,
        help="Cross-validate on the training examples in so many parts, and calibrate probabilities by them; 0: do not.",
    ),
    all_templates: bool = typer.Option(
        False, "--all-templates", help="Measure with each of the task's templates, and report the median."
    ),
    output: Path | None = typer.Option(
        None,
        "--output",
        "-o",
        help="Folder of the adapter. \\[default: adapters/NAME; adapters/fleet with --tasks]",
        show_default=False,
    ),
    resume: bool = typer.Option(False, "--resume", help="Go on from the last checkpoint of an interrupted run."),
    json_output: bool = JsonOption,
) -> None:
    """Train an adapter, and compare it with the untrained model.

    Without arguments: SmolLM2-135M learns from 32 food reviews whether a review is great, and is tested on 200 others.

    With your own data: ia3 train --data train.csv --text-column text --label-column label

    --seeds, --tasks and --learning-rates train many adapters at once, one for each combination, in about the memory of
    one model and each as it would have been trained alone. Each has its own folder in the output folder, such as seed-0,
    TASK/seed-0 or seed-0-lr-0.001. The paper's protocol is: ia3 train --tasks rte,cb,copa --seeds 0,1,2,3,4 --all-templates

    Writes adapter_config.json and adapter_model.safetensors (which PEFT reads too), task.yaml, recipe.yaml,
    metrics.json and README.md into the output folder.
    """
    out = console(json_output)
    _together("--seed", seed, "--seeds", seeds)
    _together("--task", task, "--tasks", tasks)
    own = {
        "--data": data,
        "--test-data": test_data,
        "--text-column": text_column,
        "--label-column": label_column,
        "--template": template,
        "--choices": choices,
    }
    for option, value in own.items():
        _together(option, value, "--tasks", tasks)
    all_seeds = [seed or 0] if seeds is None else numbers("--seeds", seeds, int)
    rates = [None] if learning_rates is None else numbers("--learning-rates", learning_rates, float)
    if tasks is None:
        sources = [source_of(task, data, test_data, label_column, text_column, choices, template, delimiter)]
    else:
        sources = _sources(tasks, delimiter)
    fleet = not (tasks is None and seeds is None and learning_rates is None)
    folder = output or folder_of("adapters", "fleet" if tasks is not None else sources[0].task.name)

    jobs, draws_of_tasks = [], []
    for source in sources:
        source.task.check(source.rows)
        source.task.check(source.test or [])
        draws = {one: drawn(source, examples_per_label, test_rows, one) for one in all_seeds}
        draws_of_tasks.append(list(draws.values()))
        for one, draw in draws.items():
            for rate in rates:
                task_part = "" if tasks is None else source.task.name
                seed_part = "" if seeds is None else f"seed-{one}"
                rate_part = "" if learning_rates is None else f"lr-{rate}"
                name = _joined("/", task_part, _joined("-", seed_part, rate_part))
                shared = _joined("/", task_part, rate_part)
                jobs.append(Job(name, shared, source.task, one, rate, draw.examples, draw.test))
    for path in dict.fromkeys(path for job in jobs for path in (folder / job.name, (folder / job.name).parent, folder)):
        if path.is_file():
            raise InputError(f"Expected a folder for --output, found the file {str(path)!r}.")
    if folds:
        from ia3.evaluation.calibration import fold_of_each

        for job in jobs:
            try:
                fold_of_each(job.task, job.examples, folds, job.seed)
            except InputError as error:
                raise InputError(f"{job.titled('Cannot cross-validate')} (--folds {folds}): {error}") from error
    chosen = recipe_for(model, recipe, steps=steps, init=init)
    run = Run(model, jobs, chosen, examples_per_label, folder, folds, all_templates, dtype)
    checkpoint = run.checkpoint() if resume else None
    _describe(out, run, draws_of_tasks, checkpoint)

    quiet()
    results = run_jobs(out, run, checkpoint)
    by_seed: dict[str, list[str]] = {}
    for job in jobs:
        by_seed.setdefault(job.shared, []).append(job.name)
    together = {"members": results, "summary": summary(results, by_seed)}
    if fleet:
        write_json(folder / "metrics.json", together)
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    if json_output:
        print_json({"output": str(folder), **(together if fleet else results[""])})
        return
    if fleet:
        print_fleet_table(out, results, by_seed)
    else:
        print_table(out, results[""])
    hint = f' Try it: ia3 predict {folder / jobs[0].name} "some text"' if len(jobs[0].task.columns) == 1 else ""
    out.print(f"\nSaved in {folder}.{hint}", markup=False, soft_wrap=True)


def _together(one: str, value: Any, other: str, others: Any) -> None:
    """Refuse two options that exclude each other."""
    if value is not None and others is not None:
        raise InputError(f"Expected {one} or {other}, one of the two, found both.")


def _names_a_folder(name: str) -> bool:
    return Path(name).name == name and not name.startswith(".")


def folder_of(root: str, name: str) -> Path:
    """The folder in `root` that a task's results go into by default.

    Raises:
        InputError: a name that leads elsewhere.
    """
    if not _names_a_folder(name):
        raise InputError(
            f"Expected a task's name that can name a folder, found {brief(name)}; change it, or give --output."
        )
    return Path(root, name)


def _joined(separator: str, *parts: str) -> str:
    return separator.join(part for part in parts if part)


def numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """Numbers with commas between them, each once."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found):
        raise InputError(f"Expected {option} as different numbers with commas between them, found {text!r}.")
    if kind is float and not all(math.isfinite(number) and number > 0 for number in found):
        raise InputError(f"Expected {option} above 0, found {text!r}.")
    if option == "--seeds" and not all(0 <= number <= MAX_SEED for number in found):
        raise InputError(f"Expected {option} from 0 to {MAX_SEED}, found {text!r}.")
    return found


@dataclass(frozen=True)
class Source:
    """A task with the rows to draw training examples from, and the test rows, where they are given."""

    task: Task
    rows: Sequence[Row]
    test: Sequence[Row] | None

    @functools.cached_property
    def fingerprints(self) -> list[str]:
        """That of each row to draw from."""
        return [self.task.fingerprint(row, number) for number, row in enumerate(self.rows, 1)]


def _sources(files: str, delimiter: str | None) -> list[Source]:
    """Several tasks, which name folders and therefore differ in their names."""
    paths = [part.strip() for part in files.split(",") if part.strip()]
    if not paths:
        raise InputError(f"Expected tasks with commas between them for --tasks, found {files!r}.")
    sources = [source_of(path, delimiter=delimiter) for path in paths]
    names = [source.task.name for source in sources]
    for path, name in zip(paths, names, strict=True):
        if names.count(name) > 1:
            raise InputError(
                f"Expected tasks with names that differ, found {brief(name)} twice; change `name:` in {path}."
            )
        if not _names_a_folder(name) or name in _TAKEN:
            raise InputError(
                f"Expected a task's name that can name a folder, found {brief(name)}; change it in {path}."
            )
    return sources


def source_of(
    task: str | Task | None = None,
    data: str | None = None,
    test_data: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    choices: str | None = None,
    template: str | None = None,
    delimiter: str | None = None,
) -> Source:
    """The task and rows that options of these names describe; the embedded ones without any."""
    from ia3.task.reading import name_of, require_delimited
    from ia3.task.task import Task

    given = parse_choices(choices)
    if task is None and data is not None:
        require_delimited(delimiter, data, test_data)
        rows = read(data, delimiter=delimiter)
        description = Task.infer(rows, label_column, text_column, given, template, name_of(data))
    else:
        if task is None:
            description = Task.embedded(EMBEDDED_TASK)
        else:
            description = task if isinstance(task, Task) else Task.load(task)
        if text_column is not None:
            raise InputError("--text-column goes with --data; a task's template names its columns itself.")
        changes = {
            "label_column": label_column,
            "choices": given,
            "templates": None if template is None else [template],
        }
        values = description.model_dump() | {key: value for key, value in changes.items() if value is not None}
        description = Task.create(values)
        source = data or description.train
        if source is None:
            raise InputError(
                f"Expected training rows: neither --data nor a `train:` in {task if isinstance(task, str) else description.name}."
            )
        require_delimited(delimiter, source, test_data or (description.test if data is None else None))
        rows = read(source, description, delimiter)
    source = test_data or (description.test if data is None else None)
    test = None if source is None else list(read(source, description, delimiter))
    return Source(description, list(rows), test)


@dataclass(frozen=True)
class Draw:
    """What is trained on, and what is measured on.

    Attributes:
        examples: the rows that were drawn.
        test: the given test rows, or those that training leaves over.
        left_out: how many more it would leave over, but for their words, which training sees in another row.
        repeated: how many of the given test rows are in words that training sees; they stay.
    """

    examples: list[Row]
    test: list[Row]
    left_out: int = 0
    repeated: int = 0


def drawn(
    source: Source, per_label: int | None, test_rows: int, seed: int, seen: Callable[[Row], bool] | None = None
) -> Draw:
    """Training examples and test rows.

    Args:
        source: what to draw from.
        per_label: how many examples of each label; None: the usual number, as far as there are; 0: all rows.
        test_rows: at most so many; 0: all.
        seed: decides the draw.
        seen: what an adapter that is trained already has learned from: these rows are its examples, each once, where
            the source has any of them, and no test rows where none are given.
    """
    from ia3.task.task import few_shot

    learned: dict[str, Row] = {}
    if seen is not None:
        learned = {key: row for row, key in zip(source.rows, source.fingerprints, strict=True) if seen(row)}
    if learned:
        examples = list(learned.values())
    else:
        examples = list(source.rows) if per_label == 0 else few_shot(source.rows, source.task, per_label, seed)
    known = {source.task.fingerprint(row) for row in examples}

    def is_known(row: Row, key: str) -> bool:
        return key in known or (seen is not None and seen(row))

    def sampled(rows: Sequence[Row]) -> list[Row]:
        # Of given test rows the same whatever the seed, so that runs can be compared.
        return random.Random(0).sample(rows, test_rows) if 0 < test_rows < len(rows) else list(rows)

    if source.test is not None:
        test = sampled(source.test)
        return Draw(examples, test, repeated=sum(is_known(row, source.task.fingerprint(row)) for row in test))
    used = {id(row) for row in examples}
    rest = [(row, key) for row, key in zip(source.rows, source.fingerprints, strict=True) if id(row) not in used]
    test = [row for row, key in rest if not is_known(row, key)]
    return Draw(examples, sampled(test), left_out=len(rest) - len(test))


def say_seen(out: Console, draws: Sequence[Draw]) -> None:
    """Say how many rows of a task are in words that training sees; one number, or the smallest and the largest."""
    for what, counts in {
        "rows in the very words of training examples are left out of the test rows.": [one.left_out for one in draws],
        "test rows are in the very words of training examples.": [one.repeated for one in draws],
    }.items():
        if any(counts):
            span = " to ".join(dict.fromkeys(map(str, (min(counts), max(counts)))))
            out.print(f"{span} {what}", style="yellow", markup=False, soft_wrap=True)


def _describe(out: Console, run: Run, draws_of_tasks: Sequence[Sequence[Draw]], checkpoint: str | None) -> None:
    """Say what will be done; `draws_of_tasks` has the draws of each task."""
    by_task: dict[int, list[Job]] = {}
    for job in run.jobs:
        by_task.setdefault(id(job.task), []).append(job)
    for jobs, draws in zip(by_task.values(), draws_of_tasks, strict=True):
        task = jobs[0].task
        text = f"{task.name} on {run.model}: {len(jobs[0].examples)} training examples, {len(jobs[0].test)} test rows"
        if jobs[0].name:
            text += f", for each of {shown([job.name for job in jobs], 20)}"
        out.print(text, markup=False, style="bold", soft_wrap=True)
        say_seen(out, draws)
        count = len(task.templates)
        more = "" if count == 1 else f" ({count} templates are drawn from; the first measures)"
        out.print(f"The prompt, and its answer choices{more}:", style="dim")
        example = (jobs[0].examples or jobs[0].test)[0]
        for line in task.templates[0].prompt.rstrip().splitlines():
            out.print(f"  {line}", markup=False)
        out.print("  → " + " | ".join(task.answers(example).values()), markup=False)
    if checkpoint is not None:
        out.print(f"Going on from {checkpoint}", style="dim", markup=False)
