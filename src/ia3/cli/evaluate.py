"""`ia3 evaluate`: metrics of a trained adapter on labelled rows."""

from __future__ import annotations

from pathlib import Path

import typer

from ia3.answering import load_adapted
from ia3.cli.bars import Bars
from ia3.cli.common import (
    AdapterArgument,
    DelimiterOption,
    DeviceMapOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    console,
    print_json,
    table,
)
from ia3.cli.free_text import MetricOption, is_text
from ia3.cli.free_text import evaluate as evaluate_texts
from ia3.folder import AdapterFolder


def evaluate(
    adapter: str = AdapterArgument,
    data: str | None = typer.Option(
        None,
        "--data",
        "-d",
        help="Labelled rows: .csv, .tsv, .jsonl, … \\[default: the task's test rows]",
        show_default=False,
    ),
    delimiter: str | None = DelimiterOption,
    calibrate: bool = typer.Option(
        False,
        "--calibrate",
        help="Fit the temperature of the adapter's probabilities to these rows, except its training rows, "
        "and store it in the folder.",
    ),
    metric: str | None = MetricOption,
    model: str | None = ModelOption,
    dtype: str = DtypeOption,
    device_map: str | None = DeviceMapOption,
    json_output: bool = JsonOption,
) -> None:
    """Evaluate a trained adapter on labelled rows: accuracy, macro-F1, each label's precision and recall, and the
    calibration of its probabilities; or the metrics of the texts that it generates (see --metric)."""
    from ia3.errors import InputError
    from ia3.evaluation.calibration import Calibration
    from ia3.evaluation.drawing import read
    from ia3.evaluation.results import METRICS, OF_LABEL_SETS, majority, report
    from ia3.task.reading import require_delimited
    from ia3.task.task import Task

    out = console(json_output)
    folder = AdapterFolder(adapter)
    task = folder.any_task or folder.required_task()
    is_text(task, {"--calibrate": calibrate}, {"--metric": metric})
    source = data or task.test
    if source is None:
        raise InputError("Expected labelled rows (--data): the task names no test rows.")
    require_delimited(delimiter, source)
    rows = read(source, task, delimiter)
    task.check(rows)
    if not isinstance(task, Task):
        if not rows:
            raise InputError("Expected labelled rows to measure on, found none.")
        evaluate_texts(out, folder, task, rows, model, dtype, device_map, metric, json_output)
        return
    labels = [task.truth(row, number) for number, row in enumerate(rows, 1)]
    if calibrate and not Path(adapter).is_dir():
        raise InputError(f"Expected a folder here with --calibrate, found {adapter!r}: the result is stored in it.")
    recipe, temperature, seen = folder.recipe, folder.temperature, folder.seen()
    unseen = [number for number, row in enumerate(rows) if seen is None or not seen(row)]
    if calibrate and not unseen:
        raise InputError("Expected rows for --calibrate that the adapter was not trained on, found none.")
    if len(unseen) < len(rows):
        text = f"{len(rows) - len(unseen)} of {len(rows)} rows duplicate training examples"
        text += "; probabilities are calibrated without them." if calibrate else "."
        out.print(text, style="yellow", markup=False, soft_wrap=True)
    with out.status("Loading …"):
        adapted, tokenizer = load_adapted(folder, model, dtype, device_map)
        from ia3.evaluation.prediction import predict as predict_rows
    with Bars(out) as bars:
        stage = bars.stage("Evaluating", len(rows))
        found = predict_rows(
            adapted,
            tokenizer,
            task,
            rows,
            lambda done: stage.advance(len(done)),
            recipe=recipe,
            opinions=folder.opinions,
        )
    fitted = None
    if calibrate:
        fitted = Calibration.fit([found[number] for number in unseen], [labels[number] for number in unseen])
        folder.calibrate(fitted)

    measured = report(task, found, labels, temperature)
    per_label = measured.pop("labels")
    result = {**measured, **({} if fitted is None else {"calibration": fitted.model_dump()}), "labels": per_label}
    if json_output:
        print_json(result)
        return
    from rich.markup import escape

    named = OF_LABEL_SETS if task.multi_label else METRICS
    title = f"{len(rows)} rows: " + ", ".join(f"{title} {result[name]:.1%}" for name, title in named.items())
    shown = table("label", "precision", "recall", "F1", "rows", title=title)
    for name, values in result["labels"].items():
        numbers = (f"{values[key]:.1%}" for key in ("precision", "recall", "f1"))
        shown.add_row(escape(name), *numbers, str(values["rows"]))
    out.print(shown)
    if task.costs:
        out.print(f"Mean cost {result['mean_cost']:.2f}")
    out.print(
        f"Probabilities (temperature {result['temperature']:.2f}): log-loss {result['log_loss']:.3f}, expected "
        f"calibration error {result['calibration_error']:.1%}"
    )
    if fitted is not None:
        out.print(
            f"Calibrated: temperature {fitted.temperature:.2f}; log-loss {fitted.log_loss:.3f}, expected calibration "
            f"error {fitted.calibration_error:.1%}"
        )
    most = majority(labels)
    most = ", ".join(most) or "none" if task.multi_label else most
    out.print(f"Always answering {most!r} would be right in {result['majority']['accuracy']:.1%}.", markup=False)
