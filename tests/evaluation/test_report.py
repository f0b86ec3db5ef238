"""The report: what it says is what was measured, nothing of it can do harm, and nothing needs the network."""

import json
import re

import numpy as np
import pytest

from ia3 import Experiment, Prediction, Recipe, Task
from ia3.evaluation.doubts import HeldOut
from ia3.evaluation.report import plots
from ia3.evaluation.report.findings import Findings, Method, Point
from ia3.evaluation.report.page import MOST_LABELS, page_of
from ia3.evaluation.results import METHODS, OF_OPINIONS
from ia3.task.fields import Fields
from ia3.task.free_text import FreeText
from support import words
from support.pages import Page

HOSTILE = (
    '<script>alert(1)</script><img src="http://e.com/x" onerror=alert(2)> & "quoted" \'$\\frac{x}$ {{ 137 * 719 }}'
)
METHOD_TABLE = re.compile(r"\d+ test rows")

pytestmark = pytest.mark.usefixtures("drawn_plots")


def predictions(labels, names, chance, thresholds=None):
    """Right with a probability of about 0.7."""
    found = []
    for its in labels:
        scores = chance.normal(size=len(names)) + [1.5 * (name in its if thresholds else name == its) for name in names]
        if thresholds:
            scores = scores - 0.75
        found.append(Prediction.of(dict(zip(names, scores.tolist(), strict=True)), thresholds=thresholds))
    return found


def labelled(names=("pos", "neg"), count=60, sets=False, text="the tea was {}", seed=0):
    """Findings on made-up rows."""
    chance = np.random.default_rng(seed)
    names = list(names)
    task = Task(name="teas", template="{{ text }} is", choices={name: name for name in names}, multi_label=sets)
    thresholds = dict.fromkeys(names, 0.5) if sets else None

    def truths(count):
        if sets:
            return [tuple(name for name in sorted(names) if chance.random() < 0.4) for _ in range(count)]
        return [names[i] for i in chance.integers(0, len(names), count)]

    def rows(labels, start):
        listed = [list(its) if sets else its for its in labels]
        return [{"text": text.format(start + i), "label": its} for i, its in enumerate(listed)]

    truth, known = truths(count), truths(40)
    methods = []
    for number, title in enumerate(("trained", "vectors alone", "zero-shot", "TF-IDF baseline")):
        answers = predictions(truth, names, chance, thresholds)
        answers = [one.best for one in answers] if number == 3 else answers
        said = Method("", {}, answers).said
        cost = (0.001 * 7**number, 1e6 * 3**number) if number < 3 else (None, None)
        methods.append(Method(title, task.metrics(truth, said), answers, *cost))
    part = predictions(truth, names, chance, thresholds)
    return Findings(
        task,
        "teas",
        {"base model": "tiny", "seed": 0},
        rows(known, 1000),
        rows(truth, 0),
        methods,
        methods[0],
        HeldOut(range(40), predictions(known, names, chance, thresholds), known),
        [Point(4, 8, task.metrics(truth, [one.best for one in part]), part)],
        {"key": {0: 0.01, 1: 0.02}, "value": {0: 0.03, 1: 0.01}, "feed-forward": {0: 0.02, 1: 0.05}},
        "on 4 test rows in one batch",
    )


def written(task, truth, said, rows):
    methods = [Method("trained", task.metrics(said, truth), said, 0.1, None, 3.0)]
    methods.append(Method("zero-shot", task.metrics(said[::-1], truth), said[::-1], 0.2))
    return Findings(task, "texts", {}, rows, rows, methods, methods[0], costs_from="on all test rows, in batches")


def free_text():
    task = FreeText.create({"template": "{{ review }} In short:", "answer": "{{ summary }}"})
    rows = [{"review": f"the tea was {word} today", "summary": word} for word in ("good", "bad", "fine", "stale")]
    return written(task, [row["summary"] for row in rows], ["good", "very bad", "no", "fresh"], rows)


def fields():
    task = Fields.create({"template": "{{ text }} Details:", "fields": ["who", "when"]})
    rows = [{"text": f"Book it for {who} today", "who": who, "when": "today"} for who in ("Ann", "Bob", "Eve")]
    truth = [task.reference(row) for row in rows]
    return written(task, truth, [truth[0], {"who": None, "when": "today"}, {"who": "it", "when": ["it", "for"]}], rows)


KINDS = {
    "labels": labelled,
    "many": lambda: labelled([f"label number {i}" for i in range(77)]),
    "sets": lambda: labelled(["new", "pin", "card"], sets=True),
    "text": free_text,
    "fields": fields,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    found = KINDS[request.param]()
    return request.param, found, page_of(found)


def test_a_page_of_each_kind_is_whole_and_needs_no_network(kind):
    _, _, html = kind
    page = Page(html)  # each tag is closed
    assert len(page.ids) == len(set(page.ids))
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "form", "base")
        for name, value in attributes.items():
            if name in ("href", "src", "xlink:href"):
                assert value.startswith("#") or value == "data:,"
                assert not value.startswith("#") or value == "#" or value[1:] in page.ids
            assert not name.startswith("on")
    assert "url(http" not in html and "@import" not in html and "@font-face" not in html
    urls = set(re.findall(r"https?://[^\"'\s<)]+", html))
    assert all(url.startswith("http://www.w3.org/") for url in urls)  # names of namespaces
    [policy] = [one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "#0101" not in html and "#0202" not in html and "#0303" not in html  # colours are the page's
    assert "prefers-color-scheme: dark" in html
    # The same findings make the same page.
    assert page_of(kind[1]) == html


def test_people_who_do_not_see_it_can_read_it(kind):
    page = Page(kind[2])
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1 and page.all("main") == [{}]
    assert all(one.get("scope") in ("col", "row") for one in page.all("th"))
    assert all(one.get("role") == "img" and one.get("aria-label") for one in page.all("svg"))
    assert all(one.get("aria-label") and one.get("tabindex") == "0" for one in page.all("div") if "role" in one)
    assert all(caption or "right" in lines[0] for caption, lines in page.tables.items())


def test_each_kind_has_the_parts_that_make_sense(kind):
    name, _, html = kind
    ids = set(Page(html).ids)
    assert {"methods", "mistakes", "training-rows"} <= ids
    assert ("reliability" in ids) == ("labels" in ids) == ("doubts" in ids) == (name in ("labels", "many", "sets"))
    assert ("curve" in ids) == ("vectors" in ids) == ("costs" in ids and name != "text" and name != "fields")


def test_the_table_of_methods_has_their_metrics_and_intervals():
    found = labelled()
    page = Page(page_of(found))
    [caption] = [caption for caption in page.tables if METHOD_TABLE.match(caption)]
    lines, numbers = page.tables[caption][1:], page.numbers[caption][1:]
    assert [line[0] for line in lines] == [one.title for one in found.methods]
    for one, line, its in zip(found.methods, lines, numbers, strict=True):
        assert its == [one.metrics["accuracy"], one.metrics["macro_f1"]]
        value, low, high = (float(part.rstrip("%")) for part in re.findall(r"[\d.]+%", line[1]))
        assert value == pytest.approx(100 * one.metrics["accuracy"], abs=0.05)
        error = 100 * np.sqrt(one.metrics["accuracy"] * (1 - one.metrics["accuracy"]) / 60)
        assert value - low == pytest.approx(1.96 * error, rel=0.25) and low < value < high
    difference = float(lines[2][3].split()[0].replace("−", "-"))
    first, third = (found.methods[i].metrics["accuracy"] for i in (0, 2))
    assert difference == pytest.approx(100 * (third - first), abs=0.06) and lines[0][3] == "–"


def test_medians_over_templates_have_no_interval_of_one_template():
    found = labelled()
    one = Method("trained", {"accuracy": 0.123, "macro_f1": 0.2}, found.methods[0].answers)
    page = Page(page_of(Findings(found.task, "teas", {}, found.examples, found.test, [one], one)))
    assert page.tables["60 test rows"][1][:3] == ["trained", "12.3%", "20.0%"]


def test_the_confusion_matrix_counts_all_rows_and_many_labels_have_pairs_instead():
    found = labelled(["a", "b", "c"])
    page = Page(page_of(found))
    lines = page.tables["Confusion matrix"]
    assert lines[0][1:-1] == ["a", "b", "c"]
    counts = np.array([[int(cell or 0) for cell in line[1:]] for line in lines[1:]])
    assert (counts[:, :-1].sum(1) == counts[:, -1]).all() and counts[:, -1].sum() == 60
    assert np.trace(counts) == round(60 * found.methods[0].metrics["accuracy"])
    many = Page(page_of(labelled([f"label {number:02}" for number in range(MOST_LABELS + 1)])))
    assert "Confusion matrix" not in many.tables
    [pairs] = [lines for lines in many.tables.values() if lines[0] == ["right", "said", "rows", "of"]]
    counts = [int(line[2]) for line in pairs[1:]]
    assert counts == sorted(counts, reverse=True) and len(counts) == 20
    assert all(line[0] != line[1] and int(line[2]) <= int(line[3]) for line in pairs[1:])


def test_mistakes_are_the_wrong_rows_the_most_confident_first():
    found = labelled()
    html = page_of(found)
    part = html[html.index('id="mistakes"') : html.index('id="training-rows"')]
    wrong = [
        (one.probabilities[one.best], row["text"])
        for one, row in zip(found.methods[0].answers, found.test, strict=True)
        if one.best != row["label"]
    ]
    listed = re.findall(r"the tea was \d+", part)
    assert listed == [text for _, text in sorted(wrong, key=lambda pair: -pair[0])] and len(listed) > 3
    shown = [float(p) for p in re.findall(r"said</dt><dd>\w+ <span class=\"p\">([\d.]+)%", part)]
    assert shown == sorted(shown, reverse=True) and len(shown) == len(listed)


def test_what_rows_labels_and_names_say_is_shown_and_does_nothing():
    found = labelled([HOSTILE, "neg"], text=HOSTILE.replace("{", "{{").replace("}", "}}") + " {}")
    html = page_of(Findings(**{**vars(found), "title": HOSTILE, "facts": {HOSTILE: HOSTILE}}))
    page = Page(html)
    assert "<script" not in html and "<img" not in html and not page.all("img")
    assert "<script>alert(1)</script>" in page.text and "{{ 137 * 719 }}" in page.text and "98503" not in page.text
    # Names in plots, too, which neither matplotlib nor a browser may read as markup.
    svg = str(plots.intervals([plots.Spot(HOSTILE, 1, 0.5, 0.4, 0.6)], "accuracy"))
    assert "<script" not in svg and "<img" not in svg and "frac{x}" in svg


def test_nothing_was_measured():
    found = labelled()
    page = Page(page_of(Findings(found.task, "teas", {}, found.examples, [], held_out=found.held_out)))
    assert "Nothing was measured" in page.text and "methods" not in page.ids and "doubts" in page.ids


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An experiment with a learning curve on rows of which one is there twice, with another label."""
    folder = tmp_path_factory.mktemp("run")
    words.save_model(folder / "model")
    rows = words.different(32)
    rows.append({"text": rows[0]["text"].upper(), "label": "neg"})
    task = Task(name="teas", template=words.TEMPLATE, choices=words.CHOICES)
    experiment = Experiment(
        task,
        rows,
        words.different(24, seed=1),
        folder=folder / "adapter",
        model=str(folder / "model"),
        recipe=Recipe.small().changed(steps=4),
        examples_per_label=0,
        learning_curve=[4, 2],
    )
    return experiment, experiment.run()


def test_an_experiments_report_says_what_its_metrics_say(run):
    _, outcome = run
    results = json.loads((outcome.folder / "metrics.json").read_text())
    page = Page((outcome.folder / "report.html").read_text(encoding="utf-8"))
    [caption] = [caption for caption in page.tables if METHOD_TABLE.match(caption)]
    lines = zip(page.tables[caption][1:], page.numbers[caption][1:], strict=True)
    found = {line[0]: numbers for line, numbers in lines}
    opinions = {title: results["opinions"][key] for key, title in OF_OPINIONS.items() if key in results["opinions"]}
    expected = {title: results[key] for key, title in METHODS.items() if key in results} | opinions
    assert found == {title: [its["accuracy"], its["macro_f1"]] for title, its in expected.items()}
    assert {"trained", "vectors alone", "head alone", "zero-shot, balanced", "TF-IDF baseline"} <= set(found)
    assert "1 with different labels" in page.text and "in 33 training rows" in page.text
    assert {"costs", "curve", "labels", "reliability", "mistakes", "vectors"} <= set(page.ids)
    curve = page.tables["accuracy by training examples"][1:]
    assert [line[:2] for line in curve] == [["2", "4"], ["4", "8"], ["all", "33"]]
    scores = [*(one["trained"]["accuracy"] for one in results["learning_curve"]), results["trained"]["accuracy"]]
    assert [its[0] for its in page.numbers["accuracy by training examples"][1:]] == scores
    assert [one["size"] for one in results["learning_curve"]] == [2, 4]
    vectors = page.tables["Mean |l − 1| by layer and kind"]
    assert vectors[0] == ["layer", "feed-forward", "key", "value"] and [line[0] for line in vectors[1:]] == ["0", "1"]
    assert all(float(cell) > 0 for line in vectors[1:] for cell in line[1:])


def test_points_of_a_learning_curve_are_nested_and_leave_the_test_rows_and_the_adapter_as_they_are(run, tmp_path):
    experiment, outcome = run
    [trial] = experiment.trials
    parts = [[id(row) for row in point.examples] for point in experiment.points]
    assert set(parts[0]) < set(parts[1]) < {id(row) for row in trial.examples}
    assert all(point.test is trial.test for point in experiment.points)
    assert sorted(path.name for path in outcome.folder.iterdir() if path.is_dir()) == []
    plain = Experiment(**{**vars_of(experiment), "folder": tmp_path, "learning_curve": ()}).run()
    for key in ("trained", "zero_shot", "zero_shot_balanced", "cross_validation"):
        assert plain.results[key] == pytest.approx(outcome.results[key], abs=1e-6)
    assert "learning_curve" not in plain.results


def vars_of(experiment):
    names = ("task", "rows", "test", "model", "recipe", "examples_per_label")
    return {name: getattr(experiment, name) for name in names}
