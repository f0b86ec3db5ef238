"""The results of an experiment: metrics, their titles, baselines, and summaries of several adapters."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ia3.task.grades import Grades
from ia3.task.label_sets import indicators
from ia3.task.task import Task

if TYPE_CHECKING:
    from ia3.evaluation.prediction import Prediction
    from ia3.task.task import Row

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
