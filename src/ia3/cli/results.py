"""Results as tables on the screen."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from ia3.cli.common import table
from ia3.evaluation.results import METHODS, OF_COSTS, OF_GRADES, OF_OPINIONS, shown_metric, spread, titles_of

if TYPE_CHECKING:
    from rich.console import Console

    from ia3.evaluation.choosing import Considered
    from ia3.evaluation.wordings import Ranked


def print_table(out: Console, results: dict[str, Any]) -> None:
    """Print the results of one adapter."""
    if "trained" in results:
        more = {name: title for name, title in (OF_GRADES | OF_COSTS).items() if name in results["trained"]}
        titles = titles_of(results["trained"])
        scores = table("", *titles.values(), *more.values(), title=f"{results['test_rows']} test rows")
        opinions = results.get("opinions", {})

        def cells(its: Mapping[str, float]) -> list[str]:
            return [*(shown_metric(its[name]) for name in titles), *(f"{its[name]:.2f}" for name in more)]

        for key, name in METHODS.items():
            if key not in results:  # no balance where answers differ from row to row
                continue
            if key == "trained":
                for opinion, its in OF_OPINIONS.items():
                    if opinion in opinions:
                        weight = f" (weight {opinions['weights'].get(opinion, 0):.2f})"
                        scores.add_row(its + weight, *cells(opinions[opinion]))
            style = "bold" if key == "trained" else None
            scores.add_row(name, *cells(results[key]), style=style)
        out.print(scores)
    if "opinions" in results:
        out.print(f"Opinions: {results['opinions']['why']}.", markup=False)
    if "cross_validation" in results:
        scores = results["cross_validation"]
        temperature = f"; temperature {results['calibration']['temperature']:.2f}" if "calibration" in results else ""
        said = ", ".join(f"{title} {scores[name]:.1%}" for name, title in titles_of(scores).items())
        out.print(f"Cross-validated on the examples: {said}{temperature}")
    out.print(f"{_training(results)}; adapter of {results['adapter_bytes'] / 1000:.0f} kB")


def print_wordings(out: Console, title: str, ranking: Sequence[Ranked], tried: int) -> None:
    """Print wordings, the best first, and what each has untrained on the rows that it was tried on."""
    from rich.markup import escape

    made = table("wording", "answers", "log-loss", "accuracy", "rows", left=2, title=f"{title}: the best of {tried}")
    for one in ranking:
        own = one.template.choices
        answers = " | ".join(islice(own.values(), 4)) if isinstance(own, dict) else "the labels"
        made.add_row(
            escape(one.template.prompt.replace("\n", " ⏎ ")),
            escape(answers),
            f"{one.log_loss:.2f} ± {one.error:.2f}",
            f"{one.accuracy:.0%}",
            str(one.rows),
        )
    out.print(made)


def print_models(out: Console, considered: Sequence[Considered]) -> None:
    """Print base models that were compared, the chosen one first, and why it was chosen."""
    from rich.markup import escape

    made = table(
        "model",
        "parameters",
        "log-loss",
        "behind the best",
        "accuracy",
        title="Cross-validated on the examples, heads alone",
    )
    for one in considered:
        behind = f"{one.behind:.3f} ± {one.error:.3f}" if one.behind else "–"
        made.add_row(escape(one.name), f"{one.parameters:,}", f"{one.log_loss:.3f}", behind, f"{one.accuracy:.1%}")
    out.print(made)
    first, *others = considered
    smaller = any(one.log_loss < first.log_loss for one in others)
    why = "the smallest of those that are as good as the best within a standard error" if smaller else "the best"
    out.print(f"{first.name}: {why}.", markup=False)


def print_fleet_table(out: Console, members: Mapping[str, dict[str, Any]], seeds: Mapping[str, Sequence[str]]) -> None:
    """Print the results of several adapters: a line per adapter, the median and IQR of each group, and the mean.

    Args:
        out: the console.
        members: the results, by the adapter's name.
        seeds: groups of adapters that differ only in the seed: what they share → their names.
    """
    from rich.markup import escape

    measured = {name: results for name, results in members.items() if "trained" in results}
    if measured:
        kinds = dict.fromkeys(tuple(_two(results["trained"]).values()) for results in measured.values())
        named = " or ".join(f"{first[:1].upper()}{first[1:]} ({second})" for first, second in kinds)
        scores = table("", "rows", *METHODS.values(), title=f"{named} on test rows")
        for name, results in measured.items():
            scores.add_row(escape(name), str(results["test_rows"]), *_cells([results]))
        for shared, names in seeds.items():
            some = [measured[name] for name in names if name in measured]
            if len(some) > 1:
                scores.add_row(escape(f"{shared} median (IQR)".strip()), "", *_cells(some), style="bold")
        groups = [[measured[name] for name in names if name in measured] for names in seeds.values()]
        groups = [some for some in groups if some]
        if len(groups) > 1 and len(kinds) == 1:  # a mean of different metrics says nothing
            scores.add_row("mean of all", "", *_means(groups), style="bold")
        out.print(scores)
    first = next(iter(members.values()))
    out.print(_training(first, f" of {len(members)} adapters", " in each"))


def _training(results: Mapping[str, Any], whose: str = "", each: str = "") -> str:
    """What training did."""
    if not results["steps"]:
        return "No vectors were trained"
    seconds, parameters = results["train_seconds"], results["trainable_parameters"]
    return f"{results['steps']} steps{whose} in {seconds:.0f} s; {parameters:,} trained parameters{each}"


def _two(scores: Mapping[str, float]) -> dict[str, str]:
    """The two metrics of a narrow table, with their titles."""
    return dict(islice(titles_of(scores).items(), 2))


def _cells(some: Sequence[dict[str, Any]]) -> list[str]:
    """Two metrics of each method: median and interquartile range, or the value if all are equal."""
    cells = []
    for method in METHODS:
        if not all(method in results for results in some):
            cells.append("–")
            continue
        texts = []
        for metric in _two(some[0][method]):
            values = [100 * results[method][metric] for results in some]
            its = spread(values)
            width = f" ({its['interquartile_range']:.1f})" if len(set(values)) > 1 else ""
            texts.append(f"{its['median']:.1f}%{width}")
        cells.append(f"{texts[0]} ({texts[1]})" if len(some) == 1 else f"{texts[0]}, {texts[1]}")
    return cells


def _means(groups: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """Two metrics of each method: the mean of the groups' medians."""
    cells = []
    for method in METHODS:
        if not all(method in results for some in groups for results in some):
            cells.append("–")
            continue
        medians = [
            statistics.mean(statistics.median(results[method][metric] for results in some) for some in groups)
            for metric in _two(groups[0][0][method])
        ]
        cells.append(f"{medians[0]:.1%} ({medians[1]:.1%})")
    return cells
