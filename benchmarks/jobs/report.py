"""What was measured: medians, quartiles and ratios; the table; the picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .rows import COLUMNS, Row

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Numbers of two columns that are farther apart than this are not the same job's.
SAME = 1e-2

# So little memory is noise.
_LEAST_MB = 1.0


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, high = (float(value) for value in np.percentile(values, [25, 75]))
    return {"median": statistics.median(values), "quartiles": [low, high]}


def summary(
    row: Row,
    seconds: Mapping[str, Sequence[Mapping[str, float]]],
    peaks: Mapping[str, float],
    found: Mapping[str, Sequence[float]],
    errors: Mapping[str, str],
) -> dict[str, Any]:
    """What a row gave.

    Args:
        row: which.
        seconds: column → of each repeat, the seconds of each phase, as measured.
        peaks: column → MB.
        found: column → the numbers that all columns have to agree on.
        errors: column → why it has none.

    Returns:
        As JSON: `columns` with the seconds of the whole job (a phase's are scaled from what was measured); `ratios`, of
        the same repeat's times, and of peak memory; `differences` from our numbers; a curve's `points`.
    """
    columns: dict[str, dict[str, Any]] = {name: {"error": why} for name, why in errors.items()}
    for name, runs in seconds.items():
        scaled = [
            {phase: took * row.phases[phase].whole / row.phases[phase].measured for phase, took in run.items()}
            for run in runs
        ]
        totals = [sum(run.values()) for run in scaled]
        columns[name] = {
            "seconds": totals,
            **spread(totals),
            "phases": {phase: spread([run[phase] for run in scaled]) for phase in scaled[0]},
            "peak_mb": peaks[name],
        }
    made: dict[str, Any] = {"title": row.title, "sample": row.sample, "columns": columns}
    if row.curve:
        made["curve"] = row.curve
        made["points"] = {
            name: [{"at": int(phase), **values} for phase, values in column["phases"].items()]
            for name, column in columns.items()
            if "phases" in column
        }
    made["ratios"] = ratios(columns)
    mine = found.get("ours") or []
    made["differences"] = {
        name: _difference(row, mine, its) for name, its in found.items() if name != "ours" and its and mine
    }
    return made


def ratios(columns: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each peer's time and memory over ours, and ours over the floor's."""
    made = {}
    for name in columns:
        pair = ("ours", "floor") if name == "floor" else (name, "ours")
        if name == "ours" or any("seconds" not in columns.get(each, {}) for each in pair):
            continue
        over, under = (columns[each] for each in pair)
        times = [a / b for a, b in zip(over["seconds"], under["seconds"], strict=True)]
        memory = over["peak_mb"] / max(_LEAST_MB, under["peak_mb"])
        made["/".join(pair)] = {"values": times, **spread(times), "memory": memory}
    return made


def _difference(row: Row, mine: Sequence[float], its: Sequence[float]) -> float | None:
    """The largest difference; of generated tokens, the share of different ones; None: they cannot be compared."""
    if len(mine) != len(its) or not np.isfinite([*mine, *its]).all():
        return None
    if row.kind == "generate":
        return statistics.mean(a != b for a, b in zip(mine, its, strict=True))
    return max(abs(a - b) for a, b in zip(mine, its, strict=True))


def table(result: Mapping[str, Any]) -> RenderableType:
    """The ratios, a line for each row."""
    from rich.table import Table

    shown = Table(title="Times of whole jobs: ours in seconds, then ratios: median [quartiles], (memory)")
    shown.add_column("job", overflow="fold")
    shown.add_column("ours, s (MB)", justify="right", overflow="fold")
    pairs = [f"{name}/ours" for name in COLUMNS if name not in ("ours", "floor")] + ["ours/floor"]
    pairs = [pair for pair in pairs if any(pair in row["ratios"] for row in result["rows"].values())]
    for pair in pairs:
        over, under = (COLUMNS[name] for name in pair.split("/"))
        shown.add_column(f"{over} / {under}", justify="right", overflow="fold")
    for row in result["rows"].values():
        ours = row["columns"].get("ours", {})
        mine = f"{ours['median']:.3g} ({ours['peak_mb']:.0f})" if "median" in ours else "failed"
        shown.add_row(row["title"], mine, *(_ratio(row["ratios"].get(pair)) for pair in pairs))
    return shown


def _ratio(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = found["quartiles"]
    return f"{found['median']:.3g} [{low:.3g}–{high:.3g}] ({found['memory']:.3g})"


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader has to know beside the table."""
    lines = []
    for row in result["rows"].values():
        if row["sample"]:
            lines.append(f"{row['title']}: all columns measured on {row['sample']}, and scaled linearly.")
        for name, column in row["columns"].items():
            if "error" in column:
                lines.append(f"{row['title']}: {COLUMNS[name]} failed: {column['error']}")
        for name, difference in row["differences"].items():
            if difference is None or difference > SAME:
                by = "in number or are not finite" if difference is None else f"by {difference:.2g}"
                lines.append(f"{row['title']}: results of {COLUMNS[name]} differ from ours {by}.")
    lines += [f"Left out: {COLUMNS[name]}: {why}." for name, why in result["left_out"].items()]
    return lines


def show(out: Console, result: Mapping[str, Any]) -> None:
    """The table and what to know."""
    out.print(table(result))
    for line in notes(result):
        out.print(line, markup=False)


def picture(result: Mapping[str, Any], path: Path) -> None:
    """Ratios as bars with their quartiles, and the curves."""
    from matplotlib.figure import Figure

    jobs = {name: row for name, row in result["rows"].items() if row["ratios"] and "curve" not in row}
    curves = [row for row in result["rows"].values() if "curve" in row]
    figure = Figure(figsize=(13, max(4.5, 1.5 + 0.55 * len(jobs))), layout="constrained")
    grid = figure.add_gridspec(max(1, len(curves)), 2, width_ratios=(3, 2))
    axes = figure.add_subplot(grid[:, 0])
    colours = dict(
        zip(COLUMNS, ("tab:red", "tab:pink", "tab:blue", "tab:orange", "tab:green", "tab:gray"), strict=True)
    )
    pairs = [f"{name}/ours" for name in COLUMNS if name not in ("ours", "floor")] + ["ours/floor"]
    pairs = [pair for pair in pairs if any(pair in row["ratios"] for row in jobs.values())]
    height = 0.8 / max(1, len(pairs))
    for number, pair in enumerate(pairs):
        over, under = pair.split("/")
        its = [(place, row["ratios"][pair]) for place, row in enumerate(jobs.values()) if pair in row["ratios"]]
        middle = [found["median"] for _, found in its]
        bounds = [
            [found["median"] - found["quartiles"][0] for _, found in its],
            [found["quartiles"][1] - found["median"] for _, found in its],
        ]
        axes.barh(
            [place + (number - (len(pairs) - 1) / 2) * height for place, _ in its],
            middle,
            height,
            xerr=np.maximum(bounds, 0),
            color=colours[over if under == "ours" else "floor"],
            label=f"{COLUMNS[over]} / {COLUMNS[under]}",
        )
    if pairs:
        axes.set_xscale("log")
        axes.legend()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(jobs)), list(jobs))
    axes.invert_yaxis()
    axes.set_xlabel("ratio of times")
    for place, row in enumerate(curves):
        axes = figure.add_subplot(grid[place, 1])
        for name, points in row["points"].items():
            x, y = [point["at"] for point in points], [point["median"] for point in points]
            bounds = [
                [point["median"] - point["quartiles"][0] for point in points],
                [point["quartiles"][1] - point["median"] for point in points],
            ]
            axes.errorbar(x, y, np.maximum(bounds, 0), marker="o", color=colours[name], label=COLUMNS[name])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(row["curve"])
        axes.set_ylabel("seconds")
        axes.set_title(row["title"], fontsize="medium")
        if row["curve"] == "adapters in memory":
            axes.set_xscale("log")
        axes.legend()
    figure.savefig(path, dpi=120)
