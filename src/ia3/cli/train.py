"""`ia3 train`: train adapters from a few labelled examples and compare them with the untrained model."""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ia3.adapter.pretrained import EMBEDDED_MODEL
from ia3.adapter.stored import REPORT_NAME, is_ours
from ia3.cli.bars import Bars
from ia3.cli.common import (
    MAX_SEED,
    ActsFromOption,
    ChoicesOption,
    DelimiterOption,
    DeviceMapOption,
    DtypeOption,
    EncoderOption,
    ExamplesOption,
    InitOption,
    JsonOption,
    LabelColumnOption,
    LabelColumnsOption,
    LabelSeparatorOption,
    MemoryOption,
    MultiLabelOption,
    OpinionsOption,
    PriorOption,
    RayOption,
    RecipeOption,
    ReportOption,
    StepsOption,
    TemplateOption,
    TestDataOption,
    TestRowsOption,
    TextColumnOption,
    WorkersOption,
    connecting,
    console,
    parse_choices,
    print_json,
    quiet,
    recipe_for,
    require_folder,
    require_ray,
    say_seen,
    saying_how_to_go_on,
    text_columns,
)
from ia3.cli.free_text import (
    ChatOption,
    MetricOption,
    TextExamplesOption,
    is_text,
    print_prompt,
    with_options,
)
from ia3.cli.results import print_fleet_table, print_table
from ia3.errors import InputError, about, brief, shown
from ia3.processes import connect

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.evaluation.drawing import Source
    from ia3.evaluation.experiment import Experiment, Outcome, Trial
    from ia3.task.kinds import AnyTask

EMBEDDED_TASK = "courses"


def train(
    model: str = typer.Option(
        EMBEDDED_MODEL,
        "--model",
        "-m",
        help="Base model: a folder, a .gguf file, a hub id (owner/name, owner/name@v1), 'smollm2' or 'minilm' (from packages); 'auto', or "
        "several with commas between them: the training examples choose.",
    ),
    dtype: str = DtypeOption,
    device_map: str | None = DeviceMapOption,
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
        None,
        "--tasks",
        help="Several tasks, one adapter per task: rte,cb,a.yaml, or a pattern in quotes, 'tasks/*.yaml'. All train at once.",
        show_default=False,
    ),
    test_data: str | None = TestDataOption,
    delimiter: str | None = DelimiterOption,
    template: str | None = TemplateOption,
    grades: str | None = typer.Option(
        None,
        help="The labels from the lowest to the highest, if they have an order: low,medium,high. Predictions then have an "
        "expected value and its spread.",
        show_default=False,
    ),
    choices: str | None = ChoicesOption,
    multi_label: bool = MultiLabelOption,
    label_separator: str | None = LabelSeparatorOption,
    label_columns: str | None = LabelColumnsOption,
    examples_per_label: int | None = ExamplesOption,
    class_weight: str | None = typer.Option(
        None,
        "--class-weight",
        help="How much a row of each label counts in training: 'balanced', so that each label counts the same however many rows "
        "it has, or weights such as fraud=5 (others: 1). \\[default: the task's, otherwise all rows the same]",
        show_default=False,
    ),
    text_examples: int | None = TextExamplesOption,
    test_rows: int = TestRowsOption,
    recipe: str | None = RecipeOption,
    steps: int | None = StepsOption,
    init: str | None = InitOption,
    acts_from: str | None = ActsFromOption,
    opinions: str | None = OpinionsOption,
    encoder: str | None = EncoderOption,
    prior: str | None = PriorOption,
    unlabelled: str | None = typer.Option(
        None,
        "--unlabelled",
        help="Rows without labels, .csv, .jsonl, …: how frequent labels are is estimated on them, instead of --prior, and heads "
        "learn from them if cross-validation agrees.",
        show_default=False,
    ),
    memory: str = MemoryOption,
    seed: int | None = typer.Option(
        None,
        min=0,
        max=MAX_SEED,
        help="Random seed; decides which examples are drawn, and their order. \\[default: 0]",
        show_default=False,
    ),
    seeds: str | None = typer.Option(
        None, "--seeds", help="Several seeds, one adapter per seed: 0,1,2. All train at once.", show_default=False
    ),
    learning_rates: str | None = typer.Option(
        None,
        "--learning-rates",
        help="Learning rates, one adapter per rate: 1e-3,3e-3. All train at once. \\[default: the recipe's]",
        show_default=False,
    ),
    folds: int = typer.Option(
        0,
        min=0,
        help="Number of cross-validation parts of the training examples, to weigh opinions by, or to calibrate the "
        "probabilities of vectors alone; 0: at most 4 for opinions, otherwise none.",
    ),
    all_templates: bool = typer.Option(
        False,
        "--all-templates",
        help="Evaluate each of the task's templates, and report the median; vectors answer alone.",
    ),
    output: Path | None = typer.Option(
        None,
        "--output",
        "-o",
        help="Folder of the adapter. \\[default: adapters/NAME; adapters/fleet with --tasks]",
        show_default=False,
    ),
    learning_curve: str | None = typer.Option(
        None,
        "--learning-curve",
        help="Also train on parts of the examples, so many per label (of texts: in all): 4,8. The report shows whether more would help.",
        show_default=False,
    ),
    report: Path | None = ReportOption,
    chat: bool = ChatOption,
    metric: str | None = MetricOption,
    resume: bool = typer.Option(False, "--resume", help="Continue from the last checkpoint of an interrupted run."),
    ray: str | None = RayOption,
    workers: int | None = WorkersOption,
    json_output: bool = JsonOption,
) -> None:
    """Train an adapter, and compare it with the untrained model.

    Without arguments: SmolLM2-135M learns from 128 titles of university courses to tell their subjects, one of eight. It is
    tested on 200 others.

    --model auto takes the smallest of the installed models that is as good as the best by cross-validation on the training
    examples; --model minilm,smollm2,FOLDER chooses among these.

    With your own data: ia3 train --data train.csv --text-column text --label-column label

    Without --template or --task, some dozens of wordings are tried untrained on the training examples. Training draws from
    the best few; ia3 tasks suggest prints all. The table has zero-shot as it is, and with answers that are balanced on the
    training examples.

    --seeds, --tasks and --learning-rates train one adapter for each combination. All train at once in about the memory
    of one model, and each gets the result of a separate run. Each has a subfolder of the output folder, such as seed-0,
    TASK/seed-0 or seed-0-lr-0.001. The paper's protocol is: ia3 train --tasks rte,cb,copa --seeds 0,1,2,3,4
    --all-templates

    --ray deals the adapters to workers, on this machine or on a cluster; each has one model. If a worker dies, another one goes
    on from the last checkpoint. Adapters and results are those of a run without it.

    Beside the vectors, a head on the model's hidden states answers, and one on a sentence encoder's if one is installed;
    cross-validation on the training examples weighs them (--opinions, --encoder).

    Rows may have several labels each: --label-separator, --label-columns, or lists in a .jsonl file. Each label is then decided
    by itself; the table has F1 of labels, and the share of rows whose labels are all right.

    A task file with `answer: "{{ summary }}"` instead of choices trains a model to write the answer (see --chat, --metric,
    --examples).

    Writes adapter_config.json and adapter_model.safetensors (which PEFT also reads, with --acts-from start), opinions.json,
    head.safetensors, sentences.safetensors, words.safetensors, calibration.json, task.yaml, recipe.yaml, metrics.json, README.md and
    report.html, a page on how good it is, into the output folder.
    """
    from ia3.evaluation.drawing import read
    from ia3.evaluation.experiment import Experiment

    out = console(json_output)
    own = {
        "--task": task,
        "--data": data,
        "--test-data": test_data,
        "--text-column": text_column,
        "--label-column": label_column,
        "--template": template,
        "--choices": choices,
        "--grades": grades,
        "--multi-label": multi_label or None,
        "--label-separator": label_separator,
        "--label-columns": label_columns,
        "--unlabelled": unlabelled,
        "--prior": None if prior == "balanced" else prior,
    }
    _together("--seed", seed, "--seeds", seeds)
    _together("--prior", prior, "--unlabelled", unlabelled)
    for option, value in own.items():
        _together(option, value, "--tasks", tasks)
    all_seeds = (seed or 0) if seeds is None else numbers("--seeds", seeds, int)
    rates = None if learning_rates is None else numbers("--learning-rates", learning_rates, float)
    rows: dict[str, Any]
    if tasks is None:
        several = label_sets(multi_label, label_separator, label_columns)
        source = source_of(
            task, data, test_data, label_column, text_column, choices, template, delimiter, grades, several
        )
        rows = {"task": source.task, "rows": source.rows, "test": source.test}
        name = source.task.name
    else:
        sources = _sources(tasks, delimiter)
        rows = {key: [getattr(source, key) for source in sources] for key in ("task", "rows", "test")}
        name = "fleet"
    generates = is_text(
        rows["task"],
        {
            "--text-column": text_column,
            "--label-column": label_column,
            "--choices": choices,
            "--multi-label": multi_label or None,
            "--label-separator": label_separator,
            "--label-columns": label_columns,
            "--class-weight": class_weight,
            "--grades": grades,
            "--examples-per-label": examples_per_label,
            "--unlabelled": unlabelled,
            "--prior": prior,
            "--opinions": opinions,
            "--encoder": encoder,
            "--folds": folds,
            "--all-templates": all_templates,
        },
        {"--examples": text_examples, "--chat": chat, "--metric": metric},
    )
    if class_weight is not None:
        rows["task"] = _weighed(rows["task"], class_weight)
    if generates:
        several = isinstance(rows["task"], list)
        changed: Any = [with_options(one, chat, metric) for one in (rows["task"] if several else [rows["task"]])]
        rows["task"] = changed if several else changed[0]
    require_ray(ray, workers)
    experiment = Experiment(
        **rows,
        folder=output or folder_of("adapters", name),
        model=model,
        dtype=dtype,
        device_map=device_map,
        examples_per_label=text_examples if generates else examples_per_label,
        test_rows=test_rows,
        seed=all_seeds,
        learning_rate=rates,
        folds=folds,
        all_templates=all_templates,
        memory=memory,
        prior=_prior(prior, rows["task"]),
        unlabelled=None if unlabelled is None else read(unlabelled, rows["task"], delimiter),
        learning_curve=() if learning_curve is None else numbers("--learning-curve", learning_curve, int),
        report=report,
    )
    experiment.check_report()
    for path in experiment.folders:
        require_folder(path)
    if folds:
        _check_folds(experiment.trials, folds)
    trains = {"steps": steps, "learning_rates": learning_rates}
    _require_use(opinions, trains)
    from ia3.evaluation.choosing import named_models  # with torch, so that wrong rows are told without waiting for it

    models = named_models(model)
    if models is not None:
        if generates:
            raise InputError(
                "Expected one model for a task whose answer is text, found several", "name it by", argument="model"
            )
        if resume:
            raise InputError(
                "Expected the model of the interrupted run with --resume, found several",
                "name it by",
                argument="model",
            )
        if device_map is not None:
            raise InputError("Expected one model, found several", "leave out", argument="device_map")
        # A sentence encoder answers by itself.
        forms = {"--opinions": opinions, "--encoder": encoder, "--unlabelled": unlabelled, "--prior": prior}
        given = [option for option, value in forms.items() if value not in (None, "none")]
        model = experiment.model = _chosen(out, models, experiment, dtype, encoder or "auto", given)
    experiment.recipe = recipe_for(
        model,
        recipe,
        generates,
        steps=steps,
        init=init,
        acts_from=acts_from,
        opinions=opinions,
        encoder=encoder,
    )
    _require_use(experiment.recipe.opinions, trains)
    quiet()
    with saying_how_to_go_on():
        if ray is None:
            _describe(out, experiment, experiment.checkpoint() if resume else None)
            with Bars(out) as bars:
                outcome = experiment.run(bars, resume)
        else:
            outcome = _on_ray(out, experiment, ray, workers, resume)
    folder = outcome.folder
    if json_output:
        print_json({"output": str(folder), **outcome.results})
        return
    if outcome.several:
        print_fleet_table(out, outcome.trials, outcome.groups)
    else:
        print_table(out, outcome.results)
    first = experiment.trials[0]
    hint = f' Try it: ia3 predict {folder / first.name} "some text"' if len(first.task.columns) == 1 else ""
    out.print(f"\nSaved in {folder}.{hint}", markup=False, soft_wrap=True)
    depth = first.name.count("/") + 1 if outcome.several else 0
    if report is not None or is_ours(folder / first.name / REPORT_NAME):  # not so where the user's own stayed
        page = report or folder.joinpath(*["*"] * depth, REPORT_NAME)
        out.print(f"How good is it? {page}", markup=False, soft_wrap=True)


def _require_use(opinions: str | None, trains: Mapping[str, Any]) -> None:
    """Refuse options for the training of vectors, argument → value, where none are trained."""
    for argument, value in trains.items():
        if opinions == "head" and value is not None:
            raise InputError(
                "Expected opinions with vectors, found 'head' alone, which trains none", "leave out", argument=argument
            )


def _on_ray(out: Console, experiment: Experiment, address: str, workers: int | None, resume: bool) -> Outcome:
    """Run an experiment on the workers of Ray."""
    from ia3.cluster.training import parts_to_resume, run

    if resume:
        parts_to_resume(experiment)
    with connecting(out, address, workers) as found:
        _describe(out, experiment, str(experiment.checkpoints) if resume else None)
        with Bars(out) as bars:
            return run(experiment, found, bars, resume)


def _chosen(
    out: Console, models: Sequence[str], experiment: Experiment, dtype: str, encoder: str, given: Sequence[str]
) -> str:
    """The model of several that suits the training examples; with options for opinions, of the language models."""
    from ia3.adapter.pretrained import reads_sentences
    from ia3.cli.results import print_models
    from ia3.evaluation.choosing import choose_model
    from ia3.task.task import Task

    if not isinstance(experiment.task, Task):
        raise InputError(
            "Expected one task where the examples choose the model, found --tasks", "name one by", argument="model"
        )
    trial = experiment.trials[0]
    quiet()
    if given:
        models = [name for name in models if not reads_sentences(name)]
        if not models:
            raise InputError(
                f"Expected a language model for {shown(given)}, found sentence encoders",
                "name one by",
                argument="model",
            )
    connect([models, trial.task.model_dump(), trial.examples, dtype, trial.seed, encoder])
    with Bars(out) as bars:
        considered = choose_model(models, trial.task, trial.examples, dtype, bars, trial.seed, encoder)
    print_models(out, considered)
    return considered[0].name


def _prior(prior: str | None, task: AnyTask | Sequence[AnyTask]) -> str | dict[str, float]:
    """The prior of --prior. Raises `InputError` if it does not fit the task's labels."""
    from ia3.opinions.priors import BALANCED, prior_of

    if prior is None or prior == BALANCED:
        return prior or "file"
    labels = getattr(task, "labels", None)
    if labels is None:
        raise InputError("Expected a task with the same labels for all rows", "leave out", argument="prior")
    return prior_of(prior, labels)


def _weighed(task: Any, text: str) -> Any:
    """A task, or several, with the class weights of --class-weight: `label=weight,label=weight`, or a word."""
    if isinstance(task, list):
        return [_weighed(one, text) for one in task]
    parts = [part.rpartition("=") for part in text.split(",")]
    found = {label.strip(): weight.strip() for label, _, weight in parts}
    if text != "balanced" and ("" in found or len(found) < len(parts)):
        raise InputError(
            f"Expected 'balanced' or one weight for each label (fraud=5,other=1), found {brief(text)}",
            argument="class_weight",
        )
    return task.changed(class_weight=text if text == "balanced" else found)


def _together(one: str, value: Any, other: str, others: Any) -> None:
    """Refuse two options that exclude each other."""
    if value is not None and others is not None:
        raise InputError(f"Expected {one} or {other}, one of the two, found both.")


def _check_folds(trials: Sequence[Trial], folds: int) -> None:
    """Refuse --folds if the examples of a trial cannot be divided into that many parts."""
    from ia3.evaluation.learner import fold_of_each

    for trial in trials:
        with about(f"{trial.titled('Cannot cross-validate')} (--folds {folds})"):
            fold_of_each(trial.task, trial.examples, folds, trial.seed)


def folder_of(root: str, name: str) -> Path:
    """The default folder for a task's results, in `root`.

    Raises:
        InputError: the name leads to another place.
    """
    from ia3.evaluation.experiment import names_a_folder

    if not names_a_folder(name):
        raise InputError(
            f"Expected a task's name that can name a folder, found {brief(name)}; change it, or give --output."
        )
    return Path(root, name)


def numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """Different numbers, separated by commas."""
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


def _sources(files: str, delimiter: str | None) -> list[Source]:
    """Several tasks with their rows. Their names must differ, because they name folders."""
    from ia3.evaluation.experiment import TAKEN, names_a_folder

    named = [part.strip() for part in files.split(",") if part.strip()]
    paths = [path for part in named for path in (sorted(glob.glob(part)) if glob.has_magic(part) else [part])]
    if not paths:
        raise InputError(f"Expected tasks with commas between them for --tasks, found {files!r}.")
    sources = [source_of(path, delimiter=delimiter) for path in paths]
    names = [source.task.name for source in sources]
    for path, name in zip(paths, names, strict=True):
        if names.count(name) > 1:
            raise InputError(
                f"Expected tasks with names that differ, found {brief(name)} twice; change `name:` in {path}."
            )
        if not names_a_folder(name) or name in TAKEN:
            raise InputError(
                f"Expected a task's name that can name a folder, found {brief(name)}; change it in {path}."
            )
    return sources


def label_sets(multi_label: bool, label_separator: str | None, label_columns: str | None) -> dict[str, Any]:
    """The options for rows with several labels, as fields of a task: those that are given."""
    fields: dict[str, Any] = {}
    if label_separator is not None:
        fields["label_separator"] = label_separator
    if label_columns is not None:
        fields["label_columns"] = [part.strip() for part in label_columns.split(",")]
    return {"multi_label": True, **fields} if fields or multi_label else {}


def source_of(
    task: str | AnyTask | None = None,
    data: str | None = None,
    test_data: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    choices: str | None = None,
    template: str | None = None,
    delimiter: str | None = None,
    grades: str | None = None,
    several: Mapping[str, Any] | None = None,
) -> Source:
    """The task and rows that these options describe; without options, the embedded ones. `several` is of `label_sets`."""
    from ia3.evaluation.drawing import Source, read
    from ia3.task.free_text import FreeText
    from ia3.task.kinds import load_task
    from ia3.task.reading import name_of, require_delimited
    from ia3.task.task import Task

    given = parse_choices(choices)
    ordered = [] if grades is None else [part.strip() for part in grades.split(",")]
    if task is None and data is not None:
        require_delimited(delimiter, data, test_data)
        rows = read(data, delimiter=delimiter)
        columns = text_columns(text_column, rows[0])
        description = Task.infer(
            rows, label_column, columns, given, template, name_of(data), ordered, **(several or {})
        )
    else:
        if task is None:
            description = Task.embedded(EMBEDDED_TASK)
        else:
            description = load_task(task) if isinstance(task, str) else task
        if isinstance(description, FreeText):
            if template is not None:
                description = type(description).create(description.model_dump() | {"template": template})
            return source_in(description, data, test_data, delimiter)
        if text_column is not None:
            raise InputError("--text-column goes with --data; a task's template names its columns itself.")
        changes = {
            "label_column": label_column,
            "choices": given,
            "grades": ordered or None,
            "templates": None if template is None else [template],
            **(several or {}),
        }
        description = description.changed(**{key: value for key, value in changes.items() if value is not None})
        return source_in(description, data, test_data, delimiter)
    test = None if test_data is None else list(read(test_data, description, delimiter))
    return Source(description, list(rows), test)


def source_in(description: AnyTask, data: str | None, test_data: str | None, delimiter: str | None) -> Source:
    """A task and the rows in these files, or in those that it names."""
    from ia3.evaluation.drawing import Source, read
    from ia3.task.reading import require_delimited

    source, tested = data or description.train, test_data or (description.test if data is None else None)
    if source is None:
        raise InputError(f"Expected training rows: neither --data nor a `train:` in {description.name}.")
    require_delimited(delimiter, source, tested)
    rows = read(source, description, delimiter)
    return Source(description, list(rows), None if tested is None else list(read(tested, description, delimiter)))


def _describe(out: Console, experiment: Experiment, checkpoint: str | None) -> None:
    """Say what the run will do."""
    from ia3.task.task import Task

    by_task: dict[int, list[Trial]] = {}
    for trial in experiment.trials:
        by_task.setdefault(id(trial.task), []).append(trial)
    for trials, draws in zip(by_task.values(), experiment.draws, strict=True):
        first, task = trials[0], trials[0].task
        text = (
            f"{task.name} on {experiment.model}: {len(first.examples)} training examples, {len(first.test)} test rows"
        )
        if first.name:
            text += f", for each of {shown([trial.name for trial in trials], 20)}"
        out.print(text, markup=False, style="bold", soft_wrap=True)
        say_seen(out, draws)
        example = (first.examples or first.test)[0]
        if not isinstance(task, Task):
            print_prompt(out, task, example)
            continue
        if task.candidates:
            how = f"The training examples choose the wording from {len(task.candidates)} (--template sets one). "
            if experiment.chosen_recipe.init is not None:  # whose wording it may be
                how = ""
            out.print(f"{how}The answer choices:", style="dim", soft_wrap=True)
            out.print("  → " + " | ".join(task.answers(example).values()), markup=False)
            continue
        count = len(task.templates)
        more = "" if count == 1 else f" (the first of {count} templates; training draws from all)"
        out.print(f"The prompt, and its answer choices{more}:", style="dim")
        for line in task.templates[0].prompt.rstrip().splitlines():
            out.print(f"  {line}", markup=False)
        out.print("  → " + " | ".join(task.answers(example).values()), markup=False)
    if checkpoint is not None:
        out.print(f"Going on from {checkpoint}", style="dim", markup=False)
