"""The results of an experiment: an adapter's folder with metrics and model card, and summaries of several adapters."""

from __future__ import annotations

import functools
import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3.adapter.stored import (
    CALIBRATION_NAME,
    CARD_MARK,
    CARD_NAME,
    METRICS_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    SEEN,
    TASK_NAME,
)
from ia3.files import to_json
from ia3.task.grades import Grades
from ia3.task.label_sets import indicators
from ia3.task.task import Task

if TYPE_CHECKING:
    from ia3.adapter.model import IA3Model
    from ia3.evaluation.calibration import Calibration
    from ia3.evaluation.prediction import Prediction
    from ia3.opinions.opinions import Opinions
    from ia3.task.kinds import AnyTask
    from ia3.task.task import Row, Template
    from ia3.training.recipe import Recipe

METHODS = {
    "zero_shot": "zero-shot",
    "zero_shot_balanced": "zero-shot, balanced",
    "trained": "trained",
    "tfidf": "TF-IDF baseline",
    "majority": "majority class",
}
OF_OPINIONS = {"vectors": "vectors alone", "head": "head alone", "sentences": "sentence encoder alone"}
METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
OF_LABEL_SETS = {"macro_f1": "macro-F1", "micro_f1": "micro-F1", "accuracy": "exact match"}
OF_COSTS = {"mean_cost": "mean cost"}
OF_TEXTS = {"exact_match": "exact match", "token_f1": "token F1", "rouge_l": "ROUGE-L", "micro_f1": "micro-F1"}
OF_GRADES = {"mean_absolute_error": "mean error", "quadratic_kappa": "kappa"}


def titles_of(scores: Mapping[str, float]) -> dict[str, str]:
    """The metrics that tables show, with their titles; those of a part, such as "f1: date", are not among them."""
    if "accuracy" in scores:
        return OF_LABEL_SETS if "micro_f1" in scores else METRICS
    return {name: OF_TEXTS.get(name, name) for name in scores if ":" not in name}


def shown_metric(value: float) -> str:
    """A metric for a table: percent, or as it is where it is not between 0 and 1, such as one of the user's."""
    return f"{value:.1%}" if 0 <= value <= 1 else f"{value:.3g}"


def majority(labels: Sequence[str]) -> str:
    """The most frequent label; of several, the first."""
    return Counter(labels).most_common(1)[0][0]


def majority_metrics(task: Task, labels: Sequence[str]) -> dict[str, float]:
    """The metrics of always predicting the most frequent label, the baseline for any method."""
    return task.metrics(labels, [majority(labels)] * len(labels))


def tfidf_answers(task: Task, examples: Sequence[Row], test: Sequence[Row]) -> list[Any] | None:
    """What a logistic regression on TF-IDF features of words and pairs of words says to test rows: what a few lines of
    scikit-learn would do. None where it cannot be: examples without a word, or with one label."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MultiLabelBinarizer

    from ia3.opinions.sentences import sentence_of

    texts, others = ([sentence_of(wording) for wording in task.wordings(rows)] for rows in (examples, test))
    regression, maker = LogisticRegression(C=10, max_iter=1000), MultiLabelBinarizer()
    known = [task.truth(row) for row in examples]
    if task.multi_label:
        regression, known = OneVsRestClassifier(regression), maker.fit_transform(known)
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), regression)
    try:
        found = model.fit(texts, known).predict(others)
    except ValueError:
        return None
    return [*maker.inverse_transform(found)] if task.multi_label else found.tolist()


def median_metrics(some: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each metric over templates, as the paper reports it (Liu et al. 2022, section 3.1)."""
    return {metric: statistics.median(scores[metric] for scores in some) for metric in some[0]}


def report(task: Task, predictions: Sequence[Prediction], labels: Sequence[str], temperature: float) -> dict[str, Any]:
    """Evaluate predictions of labelled rows: metrics, calibration, and precision and recall of each label."""
    import numpy as np
    from sklearn.metrics import precision_recall_fscore_support

    from ia3.evaluation.calibration import Calibration

    predictions = [prediction.at(temperature) for prediction in predictions]
    found = [prediction.best for prediction in predictions]
    names = task.labels or sorted({*labels, *found})
    truth, said = labels, found
    if task.multi_label:
        truth, said = (indicators(some, names) for some in (labels, found))
    each: Any = {"zero_division": 0, **({"average": None} if task.multi_label else {"labels": names})}
    measured = np.array(precision_recall_fscore_support(truth, said, **each))
    return {
        **task.metrics(labels, found),
        **_of_expected(task, predictions, labels),
        "majority": majority_metrics(task, labels),
        "rows": len(labels),
        "temperature": temperature,
        **Calibration.quality(predictions, labels, temperature),
        "labels": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
            for name, p, r, f, n in zip(names, *measured.tolist(), strict=True)
        },
    }


def _of_expected(task: Task, predictions: Sequence[Prediction], labels: Sequence[str]) -> dict[str, float]:
    """The mean absolute error of grades' expected values; nothing for labels without an order."""
    if not task.grades:
        return {}
    grades = Grades(task.grades)
    errors = [
        abs(grades.of(one.probabilities).expected - grades.values[y])
        for one, y in zip(predictions, labels, strict=True)
    ]
    return {"expected_absolute_error": statistics.fmean(errors)}


def summary(members: Mapping[str, dict[str, Any]], seeds: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The median and interquartile range for each group of seeds, method and metric, between 0 and 1."""
    found: dict[str, Any] = {}
    for shared, names in seeds.items():
        some = [members[name] for name in names if "trained" in members[name]]
        if some:
            found[shared] = {
                method: {
                    metric: spread([results[method][metric] for results in some])
                    for metric in titles_of(some[0]["trained"])
                }
                for method in METHODS
                if all(method in results for results in some)
            }
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median and the interquartile range of values."""
    import numpy as np

    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "interquartile_range": high - low}


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
    card = functools.partial(_model_card, folder, task, recipe)
    seen = {SEEN: [task.fingerprint(row) for row in examples]}
    results = save_measured(folder, model, adapter, recipe, {**results, **seen}, card, texts)
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


def _model_card(folder: Path, task: AnyTask, recipe: Recipe, results: dict[str, Any]) -> str:
    lines = []
    if "trained" in results:
        titles = titles_of(results["trained"])
        lines = [
            f"| {results['test_rows']} test rows | {' | '.join(titles.values())} |",
            "|---" + "|---:" * len(titles) + "|",
        ]
        lines += [
            f"| {name} | {' | '.join(shown_metric(results[key][metric]) for metric in titles)} |"
            for key, name in METHODS.items()
            if key in results
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
    kind = "A text classifier" if isinstance(task, Task) else "Generates text"
    return f"""---
base_model: {json.dumps(base)}
library_name: peft
tags:
- ia3
- t-few
---

{CARD_MARK}

# {task.name}

{task.description or kind}: an (IA)³ adapter ([arXiv:2205.05638](https://arxiv.org/abs/2205.05638)) for
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


def _wording(task: AnyTask, template: Template) -> str:
    """A template and its answers, for a model card."""
    if not isinstance(task, Task):
        chat = " (a user's message in the tokenizer's chat template)" if task.chat else ""
        answer = task.answer or f"JSON of {', '.join(task.answer_columns)}"
        return f"```\n{template.prompt.rstrip()}\n```\n\nThe answer{chat}: `{answer}`"
    own = task.choices if template.choices is None else template.choices
    answers = [f"- `{label}`: {text}" for label, text in own.items()] if isinstance(own, dict) else [f"- `{own}`"]
    return f"```\n{template.prompt.rstrip()}\n```\n\nLabels and their answers:\n\n" + "\n".join(answers)
