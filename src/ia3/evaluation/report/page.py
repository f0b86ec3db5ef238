"""Findings as a page: `page_of`, one HTML file that needs nothing else."""

from __future__ import annotations

from collections import Counter
from importlib import resources
from typing import Any

import numpy as np
from markupsafe import Markup

from ia3.adapter.stored import CARD_MARK
from ia3.errors import excerpt
from ia3.evaluation.balance import can_balance
from ia3.evaluation.calibration import Calibration
from ia3.evaluation.doubts import Doubt, doubts, duplicates, truth_of
from ia3.evaluation.intervals import Measure, bootstrap, interval, measures
from ia3.evaluation.report import plots
from ia3.evaluation.report.findings import Findings, Method
from ia3.evaluation.report.plots import Spot
from ia3.evaluation.results import OF_COSTS, OF_GRADES, shown_metric, titles_of
from ia3.task.fields import Fields
from ia3.task.free_text import FreeText
from ia3.task.label_sets import indicators
from ia3.task.task import Row

# A table of more labels is too wide to read; the pairs that are confused most say what it would.
MOST_LABELS = 14
_MOST_PAIRS = 20

# So many rows of each kind are listed.
MOST_ROWS = 50

# So many characters of a row's column are shown.
_LONGEST = 400

_BINS = 10


def page_of(found: Findings) -> str:
    """The page, whose texts are escaped, however strange rows and labels are."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"percent": shown_metric, "number": _number, "seconds": _seconds, "signed": _signed}
    template = environment.from_string(
        resources.files("ia3.evaluation.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    return template.render(mark=Markup(CARD_MARK), found=found, **_parts(found))


def _parts(found: Findings) -> dict[str, Any]:
    """What the template fills in, part by part; None for a part that there is nothing to say in."""
    measured = _Measured(found) if found.test and found.methods else None
    labelled = not isinstance(found.task, FreeText) and found.chosen is not None and bool(found.chosen.predictions)
    one_label = labelled and not found.task.multi_label
    return {
        "measured": measured,
        "intervals": measured and measured.intervals(),
        "cost_plots": measured.cost_plots() if measured else [],
        "curve": measured and measured.curve(),
        "confusion": _confusion(found) if one_label else None,
        "each_label": _each_label(found) if labelled and not one_label else None,
        "reliability": _reliability(found) if labelled else None,
        "mistakes": _mistakes(found, measured) if found.chosen is not None else None,
        "doubts": None if found.held_out is None else _doubts(found),
        "duplicates": _duplicates(found),
        "repeated": _repeated(found),
        "moved": plots.moved(found.moved) if found.moved else None,
        "text_task": isinstance(found.task, FreeText),
        "most": MOST_ROWS,
    }


class _Measured:
    """What was measured on test rows, with intervals.

    Attributes:
        metric: the headline metric, which plots show.
        titles: metric → its title, of those that tables show.
        lines: of the table of methods.
    """

    def __init__(self, found: Findings) -> None:
        self._found = found
        self.truth = [truth_of(found.task, row) for row in found.test]
        scores = found.methods[0].metrics
        more = {name: title for name, title in (OF_GRADES | OF_COSTS).items() if name in scores}
        self.titles = titles_of(scores) | more
        self._measures = {
            (id(one), name): measure
            for one in (*found.methods, *found.points)
            for name, measure in measures(found.task, self.truth, _said(one)).items()
            # Not for a median over templates, of which these are one template's answers.
            if name in one.metrics and abs(measure.value - one.metrics[name]) < 1e-9
        }
        self._values = bootstrap(self._measures)
        usual = found.task.metric
        known = [
            name
            for name in (usual, "token_f1", "micro_f1", *self.titles)
            if (id(found.methods[0]), name) in self._measures
        ]
        self.metric = known[0] if known else usual
        self.title = self.titles.get(self.metric, self.metric)
        self.lines = [self._line(one) for one in found.methods]

    def interval(self, one: Any, name: str) -> tuple[float, float] | None:
        """The 95 % interval of a method's metric; None where there is none."""
        values = self._values.get((id(one), name))
        return None if values is None else interval(values)

    def measure(self, one: Method) -> Measure | None:
        """The headline metric of a method's answers."""
        return self._measures.get((id(one), self.metric))

    def _line(self, one: Method) -> dict[str, Any]:
        cells = [
            {
                "value": one.metrics[name],
                "interval": self.interval(one, name),
                "share": name not in OF_GRADES | OF_COSTS,
            }
            for name in self.titles
        ]
        return {"method": one, "cells": cells, "behind": self._behind(one), "chosen": one is self._found.chosen}

    def _behind(self, one: Method) -> tuple[float, tuple[float, float] | None] | None:
        """How far the headline metric is above the chosen method's on the same rows, with the interval of that."""
        chosen = self._found.chosen
        mine, others = (self._values.get((id(its), self.metric)) for its in (one, chosen))
        if chosen is None or one is chosen or mine is None or others is None:
            return None
        return one.metrics[self.metric] - chosen.metrics[self.metric], interval(mine - others)

    def _spot(self, title: str, x: float, one: Any) -> Spot:
        value = one.metrics[self.metric]
        return Spot(title, x, value, *(self.interval(one, self.metric) or (value, value)))

    def intervals(self) -> Markup:
        """The picture of the table."""
        return plots.intervals([self._spot(one.title, 0.0, one) for one in self._found.methods], self.title)

    def cost_plots(self) -> list[Markup]:
        """The headline metric against seconds, and against FLOPs."""
        made = []
        for key, (what, unit) in {"seconds": ("time a row", "s"), "flops": ("FLOPs a row", "")}.items():
            some = [(one, getattr(one, key)) for one in self._found.methods if getattr(one, key)]
            if len(some) > 1:
                spots = [self._spot(one.title, x, one) for one, x in some]
                made.append(plots.costs(spots, key, self.title, what, unit))
        return [plot for plot in made if plot]

    def curve(self) -> dict[str, Any] | None:
        """The learning curve, all examples last."""
        found = self._found
        if not found.points or found.chosen is None:
            return None
        unit = "examples" if isinstance(found.task, FreeText) else "examples in all"
        some = [(one.examples, one) for one in found.points]
        spots = [self._spot("", x, one) for x, one in [*some, (len(found.examples), found.chosen)]]
        sizes = [*(one.size for one in found.points), None]
        return {"plot": plots.learning_curve(spots, self.title, unit), "spots": [*zip(sizes, spots, strict=True)]}


def _said(one: Any) -> list[Any]:
    return Method("", one.metrics, one.answers).said


def _confusion(found: Findings) -> dict[str, Any]:
    """Counts of right and given labels: a table if they are few, and the pairs that are confused most if they are many."""
    assert found.chosen is not None
    task: Any = found.task
    counts = Counter(zip((task.truth(row) for row in found.test), found.chosen.said, strict=True))
    names = list(task.grades or sorted({label for pair in counts for label in pair} | {*(task.labels or ())}))
    rows_of = Counter(task.truth(row) for row in found.test)
    pairs = [(pair, count) for pair, count in counts.most_common() if pair[0] != pair[1]]
    rows = None
    if len(names) <= MOST_LABELS:
        rows = [
            {
                "label": truth,
                "total": rows_of[truth],
                "cells": [{"count": counts[truth, name], "right": name == truth} for name in names],
            }
            for truth in names
        ]
    listed = [
        {"truth": truth, "said": said, "count": count, "total": rows_of[truth]}
        for (truth, said), count in pairs[:_MOST_PAIRS]
    ]
    return {"names": names, "rows": rows, "pairs": listed, "more": len(pairs) - len(listed)}


def _each_label(found: Findings) -> list[dict[str, Any]]:
    """For each label of a multi-label task how many rows have it, how many of these are found, and how many others are given it."""
    assert found.chosen is not None
    task: Any = found.task
    names = list(task.labels)
    right, given = (indicators(some, names) for some in ([task.truth(row) for row in found.test], found.chosen.said))
    sums = zip(names, right.sum(0), (right * given).sum(0), ((1 - right) * given).sum(0), strict=True)
    return [
        {
            "label": name,
            "rows": int(rows),
            "found": int(hits),
            "wrong": int(wrong),
            "f1": float(2 * hits / max(rows + hits + wrong, 1)),
        }
        for name, rows, hits, wrong in sums
    ]


def _reliability(found: Findings) -> dict[str, Any]:
    """How often answers are right by their probability: of each label's decision where rows may have several."""
    assert found.chosen is not None
    task: Any = found.task
    predictions, truth = found.chosen.predictions, [task.truth(row) for row in found.test]
    if task.multi_label:
        sure = np.array([p for one in predictions for p in one.probabilities.values()])
        right = np.array(
            [name in its for one, its in zip(predictions, truth, strict=True) for name in one.probabilities],
            dtype=float,
        )
    else:
        sure = np.array([one.probabilities[one.best] for one in predictions])
        right = np.array([one.best == label for one, label in zip(predictions, truth, strict=True)], dtype=float)
    edges = np.linspace(0, 1, _BINS + 1)
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    some = np.unique(bins)
    means = tuple([float(values[bins == b].mean()) for b in some] for values in (sure, right))
    counts = np.bincount(bins, minlength=_BINS).tolist()
    quality = Calibration.quality(predictions, truth, 1.0)
    lines = [
        {"low": edges[b], "high": edges[b + 1], "count": counts[b], "sure": one, "right": other}
        for b, one, other in zip(some, *means, strict=True)
    ]
    return {"plot": plots.reliability(means[0], means[1], counts, edges.tolist()), "quality": quality, "lines": lines}


def _mistakes(found: Findings, measured: _Measured | None) -> dict[str, Any] | None:
    """The test rows that are answered wrongly, the most confident answers first; of texts the worst first."""
    if measured is None or found.chosen is None:
        return None
    lines = []
    for index, (row, truth, said) in enumerate(zip(found.test, measured.truth, found.chosen.said, strict=True)):
        if said == truth:
            continue
        line = {
            "text": _text(found.task, row),
            "truth": _shown(found.task, row, truth),
            "said": _shown(found.task, row, said),
        }
        lines.append(line | _how_sure(found, measured, index, truth))
    lines.sort(key=lambda line: -line["order"])
    return {"lines": lines[:MOST_ROWS], "count": len(lines), "rows": len(found.test)}


def _how_sure(found: Findings, measured: _Measured, index: int, truth: Any) -> dict[str, Any]:
    """How sure a wrong answer is, or how bad a text."""
    assert found.chosen is not None
    one = found.chosen.answers[index]
    if found.chosen.predictions and not one.thresholds:
        p = one.probabilities[one.best]
        return {"p_said": p, "p_truth": one.probabilities[truth], "order": p}
    if found.chosen.predictions:
        wrong = {name: p for name, p in one.probabilities.items() if (name in one.best) != (name in truth)}
        worst = max(wrong, key=lambda name: wrong[name] if name in one.best else 1 - wrong[name])
        sure = wrong[worst] if worst in one.best else 1 - wrong[worst]
        return {
            "wrong": [{"label": name, "p": p, "given": name in one.best} for name, p in wrong.items()],
            "order": sure,
        }
    measure = measured.measure(found.chosen)
    score = 0.0 if measure is None else float(measure.of(measure.parts[index]))
    return {"score": score, "order": -score}


def _doubts(found: Findings) -> dict[str, Any]:
    """The training rows whose labels held-out predictions contradict."""
    assert found.held_out is not None
    some = doubts(found.held_out)
    lines = [
        {"doubt": one, "says": _says(one), "text": _text(found.task, found.examples[one.row])}
        for one in some[:MOST_ROWS]
    ]
    return {"lines": lines, "count": len(some), "rows": len(found.held_out.rows)}


def _says(one: Doubt) -> tuple[str, str]:
    """What a row's label is, and what it may be."""
    if one.label is None:
        return f"without {one.other}", f"with {one.other}"
    return (one.label, one.other) if one.other is not None else (f"with {one.label}", f"without {one.label}")


def _duplicates(found: Findings) -> dict[str, Any]:
    """Training rows in the same words."""
    groups = duplicates(found.task, found.examples)
    lines = []
    for one in groups[:MOST_ROWS]:
        first = found.examples[one.rows[0]]
        # Compared by what they say, for fields are dictionaries.
        counts = Counter(_shown(found.task, first, label) for label in one.labels)
        lines.append({"group": one, "counts": counts.most_common(), "text": _text(found.task, first)})
    contradict = sum(one.contradict for one in groups)
    return {"lines": lines, "count": len(groups), "contradict": contradict, "rows": len(found.examples)}


def _repeated(found: Findings) -> int:
    """How many test rows duplicate training rows."""
    known = {found.task.fingerprint(row) for row in found.examples}
    return sum(found.task.fingerprint(row) in known for row in found.test)


def _text(task: Any, row: Row) -> list[tuple[str, str]]:
    """The columns that the prompt reads, without names if there is one."""
    texts = [(name, excerpt(str(row[name]), _LONGEST)) for name in task.columns if name in row]
    return [("", texts[0][1])] if len(texts) == 1 else texts


def _shown(task: Any, row: Row, value: Any) -> str:
    """A label, labels, a text or fields, for people."""
    if isinstance(task, Fields):
        parts = {name: its if isinstance(its, list) else [its] for name, its in value.items() if its is not None}
        return excerpt("; ".join(f"{name}: {', '.join(its)}" for name, its in parts.items()) or "nothing", _LONGEST)
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    if isinstance(task, FreeText) or can_balance(task):
        return excerpt(str(value), _LONGEST)
    return excerpt(f"{value}: {task.answers(row)[value]}", _LONGEST)  # answers differ from row to row


def _number(value: float) -> str:
    """A large number in three digits: 1.35e+09 as 1.35 G."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _signed(value: float) -> str:
    """A difference of shares in points."""
    return f"{100 * value:+.1f}".replace("-", "−")
