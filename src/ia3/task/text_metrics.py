"""How well generated texts agree with the right ones: exact match, token F1, ROUGE-L, and functions of the user's."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ia3.errors import InputError, brief, needs, reason

TEXT_METRICS = ("exact_match", "token_f1", "rouge_l")
"""The metrics of texts, each between 0 and 1."""


def text_metrics(predictions: Sequence[str], references: Sequence[str], metric: str = "token_f1") -> dict[str, float]:
    """The metrics of generated texts, each a mean over them.

    - exact_match: the part of texts that are right, both normalized as SQuAD's evaluation does (Rajpurkar et al. 2016).
    - token_f1: the harmonic mean of precision and recall of the normalized text's words, as in SQuAD.
    - rouge_l: the F-measure of the longest common subsequence of words (Lin 2004), by the package rouge-score; left out if
      that is not installed.

    Args:
        predictions: N texts.
        references: the right ones.
        metric: one that must be there: one of these, or the dotted name of a function (predictions, references) → number,
            whose result has this name.

    Raises:
        InputError: rouge_l is asked for and not installed, or a function does not exist, fails or gives no number.
    """
    pairs = [(words_of(one), words_of(other)) for one, other in zip(predictions, references, strict=True)]
    found = {
        "exact_match": _mean([float(one == other) for one, other in pairs]),
        "token_f1": _mean([_f1(one, other) for one, other in pairs]),
    }
    if metric == "rouge_l" or importlib.util.find_spec("rouge_score") is not None:
        found["rouge_l"] = _rouge_l(predictions, references)
    return found | by_function(metric, predictions, references)


def words_of(text: str) -> list[str]:
    """The words of a text as SQuAD's evaluation normalizes it: in lower case, without punctuation and articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    if not prediction or not reference:  # as SQuAD's evaluation: nothing agrees with nothing alone
        return float(prediction == reference)
    common = (Counter(prediction) & Counter(reference)).total()
    return 2 * common / (len(prediction) + len(reference))


def require_metric(name: str) -> None:
    """Raise the errors that `text_metrics` would for a metric's name, before there is anything to measure."""
    if is_function(name):
        function_of(name)
    elif name == "rouge_l":
        _rouge_scorer()


def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise needs("The metric rouge_l", "rouge-score", "rouge") from error
    return RougeScorer


def _rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    scorer = _rouge_scorer()(["rougeL"], tokenizer=_Words())
    pairs = zip(predictions, references, strict=True)
    return _mean([scorer.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in pairs])


class _Words:
    """Words as rouge-score's own tokenizer finds them, but in all scripts, not only in ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def is_function(name: str) -> bool:
    """Whether a text can be the dotted name of a function."""
    return "." in name and all(part.isidentifier() for part in name.split("."))


def by_function(name: str, predictions: Sequence[object], references: Sequence[object]) -> dict[str, float]:
    """What the function with this dotted name gives, by its name; nothing if it is not dotted. Errors as of
    `text_metrics`."""
    if not is_function(name):
        return {}
    function = function_of(name)
    try:
        value = float(function(list(predictions), list(references)))  # type: ignore[arg-type]
    except Exception as error:
        raise InputError(f"The metric {name} failed: {type(error).__name__}: {reason(error)}.") from error
    if not math.isfinite(value):
        raise InputError(f"Expected a number from the metric {name}, found {value}.")
    return {name: value}


def function_of(name: str) -> Callable[..., object]:
    """The function with a dotted name, whose module is imported. Raises `InputError` if there is none."""
    module, _, last = name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), last)
    except Exception as error:  # a module can raise any error
        raise InputError(f"Cannot import the metric {brief(name)}: {reason(error)}.") from error
    if not callable(function):
        raise InputError(f"Expected a function for the metric {name}, found a {type(function).__name__}.")
    return function


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
