"""Form the opinions of an adapter whose rows have several labels: `form_label_sets`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ia3.errors import InputError, shown
from ia3.evaluation.forming import FOLDS, QUICK, Formed, held_out_scores, states_of
from ia3.evaluation.learner import Learner, fold_of_each
from ia3.evaluation.prediction import Prediction
from ia3.evaluation.progress import Progress
from ia3.opinions.label_sets import decide, fit_label_sets
from ia3.opinions.opinions import HEAD, SENTENCES, VECTORS, WORDS, Opinions
from ia3.opinions.sentences import Sentences, sentence_of
from ia3.opinions.words import Words
from ia3.processes import from_first
from ia3.scoring.scorer import Scorer
from ia3.task.label_sets import indicators

if TYPE_CHECKING:
    from ia3.task.task import Row, Task
    from ia3.training.recipe import Recipe

MOST_ROWS = 10_000
"""For heads: their regression takes the cube of the rows' number, and memory for its square."""


def form_label_sets(progress: Progress, title: str, learner: Learner, folds: int = 0) -> Formed:
    """Fit heads on the rows of a multi-label task, weigh them and the vectors, and find each label's threshold.

    Arguments as of `form_opinions`. Heads' held-out scores cost nothing (`fit_label_sets`). Vectors train once for each fold; where
    that takes long and heads answer as well, they do not count.
    """
    task, rows, recipe = learner.task, learner.rows, learner.recipe
    wordings = task.wordings(rows)
    labels = [one.labels for one in wordings]
    names = sorted({label for its in labels for label in its})
    y = indicators(labels, names)
    held_out: dict[str, np.ndarray] = {}
    heads, encoder = {}, None
    if recipe.opinions != VECTORS:
        encoder = Sentences.found(recipe.encoder)
        scorer = Scorer(learner.model, learner.tokenizer, learner.readings)
        questions = scorer.questions(wordings, labelled=False, long_prompts=recipe.long_prompts)
        sentences = [sentence_of(wording) for wording in wordings]

        def read(name: str, ask: Callable[[Callable[[list[int]], None]], np.ndarray]) -> np.ndarray:
            stage = progress.stage(f"{name} {title}".strip(), len(wordings))
            found = ask(lambda done: stage.advance(len(done)))
            stage.end()
            return found

        states = {HEAD: read("Head", lambda told: states_of(scorer, questions, told))}
        if encoder is not None:
            states[SENTENCES] = read("Sentence encoder", lambda told: encoder.embeddings(sentences, told))
        states[WORDS] = Words().embeddings(sentences)
        with progress.waiting("Fitting heads …"):
            fingerprints = [one.fingerprint for one in wordings]
            heads, held_out[HEAD] = from_first(lambda: fit_label_sets(states, labels, fingerprints))
    balance: list[dict[str, float]] = []
    unseen = [label for label in task.labels or () if label not in names]
    count = min(folds or FOLDS, len({one.fingerprint for one in wordings}))
    long = not folds and len(rows) * len(names) > QUICK
    divides = bool(folds) or _divides(task, rows, count, learner.seed)
    asked = recipe.opinions == VECTORS or (recipe.opinions != HEAD and not long and divides)
    if asked:
        stage = progress.stage(f"Cross-validation {title}".strip(), recipe.steps)
        every = [*names, *unseen]
        scores = held_out_scores(learner, count, stage, every)
        stage.end()
        balance, centred_scores = centred(scores, every)
        held_out[VECTORS] = centred_scores[:, : len(names)]
    decided = decide(held_out, y)
    # Heads are parts of one regression, so that they have one weight.
    weights = {name: decided.weights[HEAD] for name in heads if HEAD in decided.weights}
    weights |= {VECTORS: decided.weights[VECTORS]} if VECTORS in decided.weights else {}
    if unseen and VECTORS not in weights:
        progress.say(f"No rows have {shown(unseen)}; heads alone answer, so that no row is given it.")
    # A label without rows is given where vectors raise it from the bias, which is that of rare labels, to one half.
    thresholds = dict.fromkeys(task.labels or (), 0.5) | dict(zip(names, decided.thresholds.tolist(), strict=True))
    opinions = Opinions.of(
        weights,
        heads,
        balance if VECTORS in weights else (),
        None if encoder is None else encoder.name,
        decided.bias,
        thresholds,
    )
    together = decided.bias + np.sum([weight * held_out[name] for name, weight in decided.weights.items()], axis=0)
    predictions = [
        Prediction.of(dict(zip(names, row.tolist(), strict=True)), thresholds=thresholds) for row in together
    ]
    low, high = decided.thresholds.min(), decided.thresholds.max()
    why = f"each label is decided by itself, by thresholds of {low:.2f} to {high:.2f}"
    if recipe.opinions == "auto" and not asked:
        reason = "take long to cross-validate" if long else "are too few to cross-validate"
        why += f"; {len(rows)} rows of {len(names)} labels {reason}, so vectors do not count"
    return Formed(opinions, predictions, labels, why, range(len(rows)))


def _divides(task: Task, rows: Sequence[Row], folds: int, seed: int) -> bool:
    """Whether rows can be divided into folds, beside each of which there are labels to train on."""
    try:
        fold_of_each(task, rows, folds, seed)
    except InputError:
        return False
    return True


def centred(scores: Sequence[np.ndarray], names: Sequence[str]) -> tuple[list[dict[str, float]], np.ndarray]:
    """For scores (N, K) in each template, the shift of each label that makes its mean 0, and the mean of the shifted scores."""
    shifts = [-some.mean(0) for some in scores]
    mean = np.mean([some + shift for some, shift in zip(scores, shifts, strict=True)], axis=0)
    return [dict(zip(names, shift.tolist(), strict=True)) for shift in shifts], mean


def by_answers(scores: np.ndarray, names: Sequence[str], label_sets: Sequence[Sequence[str]]) -> Opinions:
    """Opinions of the answers' scores (N, K) alone, whose thresholds suit N labelled rows: the untrained model's."""
    balance, held_out = centred([scores], names)
    decided = decide({VECTORS: held_out}, indicators(label_sets, names))
    thresholds = dict(zip(names, decided.thresholds.tolist(), strict=True))
    return Opinions.of(decided.weights, balance=balance, bias=decided.bias, thresholds=thresholds)


def require_label_sets(task: Task, rows: Sequence[Row], recipe: Recipe) -> None:
    """Raise `InputError` if a multi-label task's training rows teach nothing, or are too many for heads."""
    if recipe.opinions != VECTORS and len(rows) > MOST_ROWS:
        raise InputError(
            f"Expected at most {MOST_ROWS} training rows for heads on rows with several labels, found {len(rows)}",
            "take fewer for each label; see",
            argument="examples_per_label",
        )
    labels = [task.labels_of(row, number) for number, row in enumerate(rows, 1)]
    found = sorted({label for its in labels for label in its})
    if len(found) < 2 or all(set(its) == set(labels[0]) for its in labels):
        raise InputError(
            f"Expected training rows with different labels, of at least two, found {', '.join(found) or 'none'} in "
            f"{len(rows)} rows."
        )
    if len({task.fingerprint(row, number) for number, row in enumerate(rows, 1)}) < 2:
        raise InputError("Expected training rows with different texts, found the same one in all.")


def require_reading(tasks: Sequence[Task], reads_answers: bool) -> None:
    """Raise `InputError` if one of the tasks is multi-label and the model reads no answers."""
    if not reads_answers and any(task.multi_label for task in tasks):
        raise InputError(
            "Expected a language model for rows with several labels, found one that reads no answers",
            "take smollm2, or another; see",
            argument="model",
        )
