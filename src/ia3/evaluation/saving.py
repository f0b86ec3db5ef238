"""Save trained adapters with their metrics and model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3.adapter.stored import CALIBRATION_NAME, CARD_NAME, METRICS_NAME, RECIPE_NAME, REPORT_NAME, SEEN, TASK_NAME
from ia3.evaluation.card import trained_card
from ia3.files import to_json
from ia3.training.described import label_counts

if TYPE_CHECKING:
    from ia3.adapter.model import IA3Model
    from ia3.evaluation.calibration import Calibration
    from ia3.opinions.opinions import Opinions
    from ia3.task.kinds import AnyTask
    from ia3.task.task import Row
    from ia3.training.recipe import Recipe


def save_trained(
    folder: Path,
    model: IA3Model,
    adapter: str,
    task: AnyTask,
    recipe: Recipe,
    results: dict[str, Any],
    examples: Sequence[Row],
    calibration: Calibration | None = None,
    opinions: Opinions | None = None,
    page: str | None = None,
) -> dict[str, Any]:
    """Save an adapter with all files of its folder; return the results with the adapter's size.

    metrics.json records the training examples as fingerprints, for programs. `page` is the report.
    """
    texts: dict[str, str | bytes] = {TASK_NAME: task.to_yaml()}
    if calibration is not None:
        results = {**results, "calibration": calibration.model_dump()}
        texts[CALIBRATION_NAME] = calibration.to_json()
    if opinions is not None:
        texts |= opinions.files()
    if page is not None:
        texts[REPORT_NAME] = page
    config = model.peft_config[adapter]

    def card(measured: dict[str, Any]) -> str:
        return trained_card(task, recipe, measured, config)

    seen = {SEEN: [task.fingerprint(row) for row in examples]}
    results = {**results, **label_counts(task, examples), **seen}
    results = save_measured(folder, model, adapter, recipe, results, card, texts)
    del results[SEEN]
    return results


def save_measured(
    folder: Path,
    model: IA3Model,
    adapter: str,
    recipe: Recipe,
    results: dict[str, Any],
    card: Callable[[dict[str, Any]], str],
    texts: Mapping[str, str | bytes] | None = None,
) -> dict[str, Any]:
    """Save an adapter with its recipe, its metrics, a model card made from them, and other files, atomically; return
    the metrics with the adapter's size."""
    from ia3.adapter.checkpoint import save_adapter

    measured = dict(results)

    def beside(adapter_bytes: int) -> dict[str, bytes]:
        measured["adapter_bytes"] = adapter_bytes
        more = {RECIPE_NAME: recipe.to_yaml(), METRICS_NAME: to_json(measured), CARD_NAME: card(measured)}
        files = {**more, **(texts or {})}
        return {name: text.encode() if isinstance(text, str) else text for name, text in files.items()}

    save_adapter(model, folder, adapter, beside=beside)
    return measured
