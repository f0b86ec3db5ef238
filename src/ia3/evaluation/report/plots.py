"""The report's plots, as SVG that takes its colours and font from the page around it."""

from __future__ import annotations

import importlib.util
import io
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

# Stand for the page's custom properties, which differ between light and dark; no other colour is drawn.
_INK, _FAINT = "#010101", "#020202"
_SERIES = [f"#0303{number:02x}" for number in range(1, 9)]
_PROPERTIES = {_INK: "--ink", _FAINT: "--faint", **{color: f"--c{n}" for n, color in enumerate(_SERIES, 1)}}
_MARKERS = "osD^vPX*"

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ia3",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.5,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "figure.figsize": (4.6, 3.2),
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Spot:
    """A method in a plot: its place and the interval of its height."""

    title: str
    x: float
    y: float
    low: float
    high: float


def can_draw(what: str = "The report's plots are") -> bool:
    """Whether matplotlib is installed; if not, a warning says that `what` left out."""
    if _has_matplotlib():
        return True
    logger.warning('%s left out, for matplotlib is not installed: pip install "ia3[report]".', what)
    return False


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _drawn(name: str, alt: str, draw: Callable[[Figure], None]) -> Markup:
    """A figure as inline SVG; nothing without matplotlib. `name` makes its ids differ from those of the page's other figures."""
    if not _has_matplotlib():
        return Markup("")
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure()
        FigureCanvasSVG(figure)
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"(?<=[\d.]px )[^\"]*?sans-serif", "inherit", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    for color, known in _PROPERTIES.items():
        svg = svg.replace(color, f"var({known})")
    width = re.search(r'width="([\d.]+)pt"', svg)
    svg = re.sub(r'\b(width|height)="[\d.]+pt" ', "", svg, count=2)
    limit = f' style="max-width: {float(width[1]) * 4 / 3:.0f}px"' if width else ""
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}"{limit} ', 1))


def intervals(spots: Sequence[Spot], metric: str) -> Markup:
    """Methods below each other, with their intervals."""

    def draw(figure: Figure) -> None:
        figure.set_size_inches(4.6, 0.7 + 0.3 * len(spots))
        axes = figure.add_subplot()
        for place, spot in enumerate(reversed(spots)):
            axes.plot([100 * spot.low, 100 * spot.high], [place, place], color=_SERIES[0], solid_capstyle="butt")
            axes.plot(100 * spot.y, place, "o", color=_SERIES[0], markersize=6)
        axes.set_yticks(range(len(spots)), [spot.title for spot in reversed(spots)])
        axes.set_ylim(-0.6, len(spots) - 0.4)
        axes.set_xlabel(f"{metric}, %")
        axes.grid(axis="x")

    said = "; ".join(f"{spot.title} {spot.y:.1%}, from {spot.low:.1%} to {spot.high:.1%}" for spot in spots)
    return _drawn("intervals", f"{metric} with 95 % intervals: {said}", draw)


def costs(spots: Sequence[Spot], name: str, metric: str, cost: str, unit: str = "") -> Markup:
    """Methods by what a row costs, on a logarithmic scale, and their metric."""

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

        figure.set_size_inches(4.6, 3.0 + 0.17 * len(spots))
        axes = figure.add_subplot()
        for number, spot in enumerate(spots):
            _errors(axes, spot, number)
        axes.set_xscale("log")
        axes.margins(0.15)
        wide = max(spot.x for spot in spots) > 30 * min(spot.x for spot in spots)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=8))
        axes.xaxis.set_major_formatter(EngFormatter(unit))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(cost)
        axes.set_ylabel(f"{metric}, %")
        axes.grid()
        _legend(figure)

    said = "; ".join(f"{spot.title} {spot.y:.1%} at {spot.x:.3g}" for spot in spots)
    return _drawn(name, f"{metric} against {cost}: {said}", draw)


def _errors(axes: Axes, spot: Spot, number: int) -> None:
    height = 100 * spot.y
    around = [[max(height - 100 * spot.low, 0)], [max(100 * spot.high - height, 0)]]
    how = {"color": _SERIES[number % 8], "marker": _MARKERS[number % 8], "linestyle": "none", "elinewidth": 1}
    axes.errorbar([spot.x], [height], yerr=around, label=spot.title, **how)  # type: ignore[arg-type]


def _legend(figure: Figure) -> None:
    """Below the plot, so that it hides nothing."""
    figure.legend(loc="outside lower center", ncols=2, handletextpad=0.3, columnspacing=1)


def reliability(sure: Sequence[float], right: Sequence[float], counts: Sequence[int], edges: Sequence[float]) -> Markup:
    """How often answers are right, by how probable they were said to be, and how many there are of each.

    Args:
        sure, right: the mean probability and the share of right answers in each bin that has some.
        counts: answers in each bin.
        edges: of the bins.
    """

    def draw(figure: Figure) -> None:
        figure.set_size_inches(4.6, 4.2)
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        top.plot([0, 1], [0, 1], "--", color=_FAINT, linewidth=1)
        top.plot(sure, right, "o-", color=_SERIES[0])
        top.set_ylabel("share that is right")
        top.set_ylim(-0.03, 1.03)
        top.grid()
        below.stairs(counts, edges, fill=True, color=_SERIES[0])
        below.set_ylabel("answers")
        below.set_xlabel("probability that was said")
        below.set_xlim(0, 1)

    said = "; ".join(f"{one:.0%} said, {other:.0%} right" for one, other in zip(sure, right, strict=True))
    return _drawn("reliability", f"Reliability diagram: {said}", draw)


def learning_curve(spots: Sequence[Spot], metric: str, unit: str) -> Markup:
    """A metric by the number of examples."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        xs = [spot.x for spot in spots]
        axes.fill_between(
            xs,
            [100 * spot.low for spot in spots],
            [100 * spot.high for spot in spots],
            color=_SERIES[0],
            alpha=0.2,
            linewidth=0,
        )
        axes.plot(xs, [100 * spot.y for spot in spots], "o-", color=_SERIES[0])
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.minorticks_off()
        axes.set_xlabel(unit)
        axes.set_ylabel(f"{metric}, %")
        axes.grid()

    said = "; ".join(f"{spot.x:g}: {spot.y:.1%}" for spot in spots)
    return _drawn("curve", f"{metric} by {unit}: {said}", draw)


def moved(found: Mapping[str, Mapping[int, float]]) -> Markup:
    """How far vectors are from ones, by layer: a line for each kind."""

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        figure.set_size_inches(4.6, 2.9 + 0.17 * len(found))
        axes = figure.add_subplot()
        for number, (kind, layers) in enumerate(found.items()):
            how = {"color": _SERIES[number % 8], "marker": _MARKERS[number % 8], "markersize": 4}
            axes.plot([*layers], [*layers.values()], label=kind, **how)  # type: ignore[arg-type]
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("mean |l − 1|")
        axes.set_ylim(bottom=0)
        axes.grid()
        _legend(figure)

    tops = {kind: max(layers, key=lambda layer: layers[layer]) for kind, layers in found.items()}
    said = "; ".join(f"{kind} most in layer {layer}, {found[kind][layer]:.3g}" for kind, layer in tops.items())
    return _drawn("moved", f"Mean distance of the vectors from ones, by layer: {said}", draw)
