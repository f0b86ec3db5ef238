"""Rows with several labels: `ia3 train` without settings beside one-vs-rest logistic regressions, on NLU++.

    python -m benchmarks.label_sets --data DIR [--domains banking,hotels] [--texts 5,20] [--seeds 0,1,2]

DIR holds NLU++ (Casanueva et al. 2022, CC BY 4.0): `banking/fold0.json` to `fold4.json`, the same for `hotels`. A seed puts a
domain's texts into order; the first two fifths are test rows. Training texts are drawn from the others until each intent has as
many as `--texts` says, or all there are; intents that no training text has are left out of the test rows.

A regression's strength and the threshold of all its labels are those with the best macro-F1 in 5-fold cross-validation on the
training texts; `0.5` beside it is the macro-F1 at scikit-learn's own threshold. `own states` are the means of the language model's
hidden states over the text: the layer is chosen in the same way.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.multiclass import OneVsRestClassifier

from ia3.adapter.pretrained import EMBEDDED_MODEL, load_base
from ia3.evaluation.experiment import Experiment
from ia3.opinions.sentences import Sentences
from ia3.scoring.scorer import Scorer
from ia3.task.label_sets import metrics_of_sets
from ia3.task.task import Task

STRENGTHS = (10.0, 100.0)
THRESHOLDS = np.linspace(0.05, 0.6, 12)
LAYERS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--domains", default="banking,hotels")
    parser.add_argument("--texts", default="5,20")
    parser.add_argument("--seeds", default="0,1,2")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for domain in given.domains.split(","):
        rows = [row for part in range(5) for row in json.loads((given.data / domain / f"fold{part}.json").read_text())]
        states, embeddings = read([row["text"] for row in rows])
        for texts in given.texts.split(","):
            for seed in map(int, given.seeds.split(",")):
                train, test, names = draw(rows, int(texts), seed)
                y = np.array([[name in row.get("intents", []) for name in names] for row in rows], dtype=int)
                scores = regressions({"MiniLM": embeddings[:, None], "own states": states}, y, train, test, names)
                scores["ours"], scores["ours, seconds"] = ours(rows, names, train, test, seed)
                for name, score in scores.items():
                    found[domain, texts][name].append(score)
                said = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
                print(f"{domain} {texts} seed {seed}, {len(train)} texts, {len(names)} intents: {said}", flush=True)
    for (domain, texts), methods in found.items():
        for name, scores in methods.items():
            print(f"{domain} | {texts} | {name} | {statistics.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f}")


def draw(rows: list[Any], texts: int, seed: int) -> tuple[list[int], list[int], list[str]]:
    """Training rows, test rows, and the intents that training rows have."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    cut = len(rows) * 2 // 5
    counts: Counter[str] = Counter()
    train = []
    for index in order[cut:]:
        its = rows[index].get("intents", []) or [""]
        if any(counts[intent] < texts for intent in its):
            train.append(index)
            counts.update(its)
    return train, order[:cut], sorted(intent for intent in counts if intent)


def read(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Means of hidden states (N, layers, width), and embeddings (N, width)."""
    model, tokenizer = load_base(EMBEDDED_MODEL)
    scorer = Scorer(model, tokenizer)
    states = scorer.states(scorer.encode(texts, [["?"]] * len(texts))).float().numpy()
    layers = states[:, : states.shape[1] // 2]  # the other half are the states of the last token
    return layers[:, :: layers.shape[1] // LAYERS], Sentences("minilm").embeddings(texts)[:, 0]


def regressions(
    features: dict[str, np.ndarray], y: np.ndarray, train: list[int], test: list[int], names: list[str]
) -> dict[str, float]:
    """The macro-F1 of one-vs-rest regressions on (N, places, width), at the threshold that was found and at 0.5."""
    found = {}
    for name, states in features.items():
        tried = []
        for place in range(states.shape[1]):
            x = states[:, place]
            if name != "MiniLM":
                x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6) / np.sqrt(x.shape[1])
            for strength in STRENGTHS:
                model = OneVsRestClassifier(LogisticRegression(C=strength, max_iter=200))
                folds = KFold(5, shuffle=True, random_state=0)
                held_out = cross_val_predict(model, x[train], y[train], cv=folds, method="predict_proba")
                tried += [(macro_f1(y[train], held_out >= cut, names), cut, x, model) for cut in THRESHOLDS]
        _, threshold, x, model = max(tried, key=lambda one: one[0])
        said = model.fit(x[train], y[train]).predict_proba(x[test])
        found[name] = macro_f1(y[test], said >= threshold, names)
        found[f"{name}, 0.5"] = macro_f1(y[test], said >= 0.5, names)
    return found


def ours(rows: list[Any], names: list[str], train: list[int], test: list[int], seed: int) -> tuple[float, float]:
    """The macro-F1 of `ia3 train` on the same rows, and the seconds that the whole of it took."""
    known = {*names}
    made = [
        [{"text": rows[i]["text"], "labels": [n for n in rows[i].get("intents", []) if n in known]} for i in some]
        for some in (train, test)
    ]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        task = Task.infer(made[0], label_column="labels")
        outcome = Experiment(task, *made, folder=folder, examples_per_label=0, test_rows=0, seed=seed).run()
    return outcome.results["trained"]["macro_f1"], time.perf_counter() - started


def macro_f1(y: np.ndarray, given: np.ndarray, names: list[str]) -> float:
    """As the package measures it: over the labels that a row has, or is given."""
    sets = ([[name for name, has in zip(names, row, strict=True) if has] for row in some] for some in (y, given))
    return metrics_of_sets(*sets)["macro_f1"]


if __name__ == "__main__":
    main()
