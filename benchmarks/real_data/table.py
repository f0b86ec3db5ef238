"""The tables of docs/results.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .cells import SEEDS
from .data import TASKS
from .methods import METHODS, OTHERS, Cells

# Field of a record → title, factor, digits.
MEASURES = {
    "accuracy": ("Accuracy in percent", 100, 1),
    "macro_f1": ("Macro-F1 in percent; always the same label has a low one", 100, 1),
    "log_loss": ("Log-loss, the mean of -log p(right label), in nats", 1, 2),
    "calibration_error": ("Expected calibration error in percent, 15 bins", 100, 1),
    "cpu_seconds": ("CPU seconds of one thread, from the training rows to the answers", 1, 0),
}
_OUTSIDE = {"outside_auroc": "AUROC", "accepted_right": "accepted and right"}


def report(cells: Cells) -> str:
    """All tables, as Markdown."""
    parts = [f"{title}:\n\n{table(cells, measure)}" for measure, (title, _, _) in MEASURES.items()]
    return "\n\n".join(
        [
            parts[0],
            f"`ours` against the others, accuracy in points; a gap is a mean over the draws that both have, ± its standard "
            f"deviation:\n\n{against_best(cells)}\n\n{against_each(cells)}",
            *parts[1:],
            f"CLINC150's queries out of scope: AUROC of the best label's probability, and the share of the queries in scope "
            f"that are accepted and right where 5 % of those out of scope are accepted, in percent:\n\n{abstaining(cells)}",
        ]
    )


def table(cells: Cells, measure: str) -> str:
    """A line for each method: mean ± standard deviation over draws, and the mean over tasks; in parentheses the number of draws
    where some are missing. The last mean leaves out copa, which is not for all methods."""
    _, factor, digits = MEASURES[measure]
    common = [name for name in TASKS if name != "copa"]
    lines = []
    for method in METHODS:
        each = {name: _values(cells, name, method, measure, factor) for name in TASKS}
        if not any(each.values()):
            continue
        means = [
            f"{statistics.mean(statistics.mean(each[name]) for name in some):.{digits}f}"
            if all(each[name] for name in some)
            else "–"
            for some in (TASKS, common)
        ]
        lines.append([method, *(_spread(each[name], digits) for name in TASKS), *means])
    return _markdown(["", *TASKS, "mean", "without copa"], lines)


def against_best(cells: Cells) -> str:
    """For each task the method that is best beside ours, and the gap to it."""
    lines, gaps = [], []
    for name in TASKS:
        found = {method: _gaps(cells, name, method) for method in OTHERS}
        found = {method: its for method, its in found.items() if its}
        if not found:
            continue
        best = min(found, key=lambda method: statistics.mean(found[method]))
        gaps.append(statistics.mean(found[best]))
        own, other = (
            statistics.mean(
                100 * cells[name, method, seed]["accuracy"] for seed in SEEDS if _both(cells, name, best, seed)
            )
            for method in ("ours", best)
        )
        lines.append([name, f"{own:.1f}", best, f"{other:.1f}", _spread(found[best], 1, sign="+")])
    if gaps:
        lines.append(["mean", "", "", "", f"{statistics.mean(gaps):+.1f}"])
    return _markdown(["", "ours", "best other", "its accuracy", "gap"], lines)


def against_each(cells: Cells) -> str:
    """For each other method the mean gap over the tasks that both have, from the strongest method."""
    found = []
    for method in OTHERS:
        means = [statistics.mean(its) for name in TASKS if (its := _gaps(cells, name, method))]
        if means:
            found.append((statistics.mean(means), method, means))
    lines = [
        [
            method,
            f"{mean:+.1f}",
            str(len(means)),
            str(sum(gap > 0 for gap in means)),
            str(sum(gap < 0 for gap in means)),
        ]
        for mean, method, means in sorted(found)
    ]
    return _markdown(["", "mean gap", "tasks", "ours better", "ours worse"], lines)


def abstaining(cells: Cells) -> str:
    """What the rows outside all labels have shown."""
    lines = []
    for method in METHODS:
        each = [_values(cells, "clinc150@3", method, measure, 100) for measure in _OUTSIDE]
        if any(each):
            lines.append([method, *(_spread(values, 1) for values in each)])
    return _markdown(["", *_OUTSIDE.values()], lines)


def _values(cells: Cells, name: str, method: str, measure: str, factor: float) -> list[float]:
    some = [cells[key] for seed in SEEDS if (key := (name, method, seed)) in cells]
    return [factor * record[measure] for record in some if measure in record]


def _both(cells: Cells, name: str, method: str, seed: int) -> bool:
    return all((name, one, seed) in cells for one in ("ours", method))


def _gaps(cells: Cells, name: str, method: str) -> list[float]:
    """How much more accurate ours is, by draw, in points."""
    pairs = [
        (cells[name, "ours", seed], cells[name, method, seed]) for seed in SEEDS if _both(cells, name, method, seed)
    ]
    return [100 * (own["accuracy"] - other["accuracy"]) for own, other in pairs]


def _spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    few = f" ({len(values)})" if len(values) < len(SEEDS) else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{spread}{few}"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])
