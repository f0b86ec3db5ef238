"""What `ia3 train` leaves: an adapter's folder with its metrics and its model card, and tables on the screen."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3.adapter.stored import (
    CALIBRATION_NAME,
    CARD_MARK,
    CARD_NAME,
    METRICS_NAME,
    RECIPE_NAME,
    SEEN,
    TASK_NAME,
    to_json,
)
from ia3.cli.common import table
from ia3.files import replacing

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.adapter.model import IA3Model
    from ia3.evaluation.calibration import Calibration
    from ia3.task.task import Row, Task, Template
    from ia3.training.recipe import Recipe

_METHODS = {"zero_shot": "zero-shot", "trained": "trained", "majority": "majority class"}
_METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1"}


def write(
    folder: Path,
    model: IA3Model,
    adapter: str,
    task: Task,
    recipe: Recipe,
    results: dict[str, Any],
    examples: Sequence[Row],
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Save an adapter and all that belongs to it; returns the results with the adapter's size.

    What the examples were that it learned from, metrics.json says in fingerprints, for programs alone.
    """
    texts = {TASK_NAME: task.to_yaml()}
    if calibration is not None:
        results = {**results, "calibration": calibration.model_dump()}
        texts[CALIBRATION_NAME] = calibration.to_json()
    card = functools.partial(_model_card, folder, task, recipe)
    seen = {SEEN: [task.fingerprint(row) for row in examples]}
    results = write_adapter(folder, model, adapter, recipe, {**results, **seen}, card, texts)
    del results[SEEN]
    return results


def write_adapter(
    folder: Path,
    model: IA3Model,
    adapter: str,
    recipe: Recipe,
    results: dict[str, Any],
    card: Callable[[dict[str, Any]], str],
    texts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Save an adapter with its recipe, its metrics, a model card that is made of them and other files, in whole or not
    at all; returns the metrics with the adapter's size."""
    from ia3.adapter.checkpoint import save_adapter

    measured = dict(results)

    def beside(adapter_bytes: int) -> dict[str, bytes]:
        measured["adapter_bytes"] = adapter_bytes
        more = {RECIPE_NAME: recipe.to_yaml(), METRICS_NAME: to_json(measured), CARD_NAME: card(measured)}
        return {name: text.encode() for name, text in {**more, **(texts or {})}.items()}

    save_adapter(model, folder, adapter, beside=beside)
    return measured


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, in whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(value), encoding="utf-8")


def print_table(out: Console, results: dict[str, Any]) -> None:
    """One adapter's results."""
    if "trained" in results:
        scores = table("", *_METRICS.values(), title=f"{results['test_rows']} test rows")
        for key, name in _METHODS.items():
            style = "bold" if key == "trained" else None
            scores.add_row(name, *(f"{results[key][metric]:.1%}" for metric in _METRICS), style=style)
        out.print(scores)
    if "cross_validation" in results:
        scores, calibration = results["cross_validation"], results["calibration"]
        out.print(
            f"Cross-validated on the examples: accuracy {scores['accuracy']:.1%}, macro-F1 {scores['macro_f1']:.1%}; "
            f"temperature {calibration['temperature']:.2f}"
        )
    out.print(
        f"{results['steps']} steps in {results['train_seconds']:.0f} s; {results['trainable_parameters']:,} trained "
        f"parameters; adapter of {results['adapter_bytes'] / 1000:.0f} kB"
    )


def print_fleet_table(out: Console, members: Mapping[str, dict[str, Any]], seeds: Mapping[str, Sequence[str]]) -> None:
    """A fleet's results: a row for each member, each group of seeds' median and interquartile range, and their mean.

    Args:
        out: the console.
        members: results by the member's name.
        seeds: names of members that differ in the seed alone, by what they share.
    """
    from rich.markup import escape

    measured = {name: results for name, results in members.items() if "trained" in results}
    if measured:
        scores = table("", "rows", *_METHODS.values(), title="Accuracy (macro-F1) on test rows")
        for name, results in measured.items():
            scores.add_row(escape(name), str(results["test_rows"]), *_cells([results]))
        for shared, names in seeds.items():
            some = [measured[name] for name in names if name in measured]
            if len(some) > 1:
                scores.add_row(escape(f"{shared} median (IQR)".strip()), "", *_cells(some), style="bold")
        groups = [[measured[name] for name in names if name in measured] for names in seeds.values()]
        groups = [some for some in groups if some]
        if len(groups) > 1:
            scores.add_row("mean of all", "", *_means(groups), style="bold")
        out.print(scores)
    first = next(iter(members.values()))
    out.print(
        f"{first['steps']} steps of {len(members)} adapters in {first['train_seconds']:.0f} s; "
        f"{first['trainable_parameters']:,} trained parameters in each"
    )


def summary(members: Mapping[str, dict[str, Any]], seeds: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """For each group of seeds, method and metric: median and interquartile range, as numbers between 0 and 1."""
    found: dict[str, Any] = {}
    for shared, names in seeds.items():
        some = [members[name] for name in names if "trained" in members[name]]
        if some:
            found[shared] = {
                method: {metric: _spread([results[method][metric] for results in some]) for metric in _METRICS}
                for method in _METHODS
            }
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    """The median, and between which values the middle half lies."""
    import numpy as np

    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "interquartile_range": high - low}


def _cells(some: Sequence[dict[str, Any]]) -> list[str]:
    """For each method accuracy and macro-F1: median and interquartile range, or the value where all have the same."""
    cells = []
    for method in _METHODS:
        texts = []
        for metric in _METRICS:
            values = [100 * results[method][metric] for results in some]
            spread = _spread(values)
            width = f" ({spread['interquartile_range']:.1f})" if len(set(values)) > 1 else ""
            texts.append(f"{spread['median']:.1f}%{width}")
        cells.append(f"{texts[0]} ({texts[1]})" if len(some) == 1 else f"{texts[0]}, {texts[1]}")
    return cells


def _means(groups: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """For each method the mean over groups of their median accuracies and macro-F1s."""
    cells = []
    for method in _METHODS:
        medians = [
            statistics.mean(statistics.median(results[method][metric] for results in some) for some in groups)
            for metric in _METRICS
        ]
        cells.append(f"{medians[0]:.1%} ({medians[1]:.1%})")
    return cells


def _model_card(folder: Path, task: Task, recipe: Recipe, results: dict[str, Any]) -> str:
    lines = []
    if "trained" in results:
        lines = [f"| {results['test_rows']} test rows | accuracy | macro-F1 |", "|---|---:|---:|"]
        lines += [
            f"| {name} | {results[key]['accuracy']:.1%} | {results[key]['macro_f1']:.1%} |"
            for key, name in _METHODS.items()
        ]
    base = results["model"]
    how = f"{results['train_seconds']:.0f} s, seed {results['seed']}"
    if "learning_rate" in results:
        how += f", learning rate {results['learning_rate']}"
    if recipe.init is not None:
        how += f", starting from `{recipe.init}`"
    if "trained_at_once" in results:
        how += f", {results['trained_at_once']} adapters at once"
    wordings = "\n\n".join(_wording(task, template) for template in task.templates)
    return f"""---
base_model: {json.dumps(base)}
library_name: peft
tags:
- ia3
- t-few
---

{CARD_MARK}

# {task.name}

{task.description or "A text classifier"}: an (IA)³ adapter ([arXiv:2205.05638](https://arxiv.org/abs/2205.05638)) for
`{base}`, trained by `{results.get("command", "ia3 train")}` with T-Few's recipe ({recipe.name}) on {results["train_examples"]} labelled examples in
{results["steps"]} steps ({how}).
{results["trainable_parameters"]:,} numbers, {results["adapter_bytes"] / 1000:.0f} kB.

{chr(10).join(lines)}

## The prompt

{wordings}

## Use

```
ia3 predict {folder.name} --data rows.csv
```
"""


def _wording(task: Task, template: Template) -> str:
    """A template and its answers, for a model card."""
    own = task.choices if template.choices is None else template.choices
    answers = [f"- `{label}`: {text}" for label, text in own.items()] if isinstance(own, dict) else [f"- `{own}`"]
    return f"```\n{template.prompt.rstrip()}\n```\n\nLabels and their answers:\n\n" + "\n".join(answers)
