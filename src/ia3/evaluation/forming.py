"""Form the opinions of a trained adapter's folder on its training rows: `form_opinions`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import log_softmax

from ia3.errors import InputError, shown
from ia3.evaluation.balance import can_balance, shift_of
from ia3.evaluation.learner import Learner, fold_of_each
from ia3.evaluation.prediction import Prediction
from ia3.evaluation.progress import Progress, Stage
from ia3.opinions.head import Head, fit_head, weights_of
from ia3.opinions.opinions import HEAD, LEAST, MOST_ASKING, SENTENCES, USUAL, VECTORS, Opinions, weigh
from ia3.opinions.priors import shares_of
from ia3.opinions.self_training import Examples, self_train
from ia3.opinions.sentences import Sentences, sentence_of
from ia3.processes import dealt, from_first
from ia3.scoring.family import passes_in_step
from ia3.scoring.scorer import Scorer
from ia3.task.candidates import are_codes

if TYPE_CHECKING:
    from ia3.scoring.question import Question
    from ia3.task.task import Row, Task
    from ia3.training.recipe import Recipe

Read = Callable[[Callable[[list[int]], None]], np.ndarray]
"""Reads rows; gets a function that is told which are done."""

FOLDS = 4

# Up to this number of rows times labels, vectors train once more for each fold; with more, that takes long.
QUICK = 2_000

# Weights beside a sentence encoder where nothing can be cross-validated: with a row of a label, and its answer's text, the
# encoder tells more than a language model's states.
_UNKNOWN = {VECTORS: USUAL, HEAD: 0.4, SENTENCES: 1.2}


@dataclass(frozen=True)
class Formed:
    """Opinions, and what they are worth.

    Attributes:
        opinions: with their weights.
        held_out: predictions of training rows by what has not seen them, but for rows that are the only ones of their labels;
            None: nothing was cross-validated.
        labels: the labels of these rows; tuples of labels where rows may have several.
        why: how the weights came about, for people.
        rows: which of the training rows were held out, counted from 0.
    """

    opinions: Opinions
    held_out: list[Prediction] | None
    labels: list[Any]
    why: str
    rows: Sequence[int]


def form_opinions(
    progress: Progress, title: str, learner: Learner, folds: int = 0, unlabelled: Sequence[Row] = ()
) -> Formed:
    """Fit heads on the training rows, and weigh them and the vectors by cross-validation.

    Args:
        progress, title: show the steps.
        learner: the model and its training rows, which all have the same choice of labels. If its recipe's `opinions` is "head",
            heads answer alone.
        folds: the number of cross-validation parts; 0: 4, or as many as the rarest label of several rows has. Where vectors take
            long to train (many rows and labels), their weight is then a usual one.
        unlabelled: rows without labels, from which heads learn where that lowers the cross-validated log-loss (see
            `self_train`).
    """
    task, rows, recipe = learner.task, learner.rows, learner.recipe
    made = Forming(task, rows, unlabelled, folds, learner.seed, progress, title)
    scorer = Scorer(learner.model, learner.tokenizer, learner.readings)
    questions = scorer.questions(made.wordings, labelled=False, long_prompts=recipe.long_prompts)
    made.fit(HEAD, "Head", lambda told: states_of(scorer, questions, told))
    encoder = Sentences.found(recipe.encoder)
    if encoder is not None:
        made.fit_sentences(encoder)
    asked = [*made.heads] if recipe.opinions == HEAD else [VECTORS, *made.heads]
    balance: list[dict[str, float]] = []
    if made.folds is None:
        usual = {name: _UNKNOWN[name] if encoder is not None else USUAL for name in asked}
        weights = usual if len(asked) > 1 else dict.fromkeys(asked, 1.0)
        why = "usual weights: labels have single rows, or duplicates"
        why += "; rows without labels are not used" if unlabelled else ""
    elif VECTORS in asked and not folds and len(rows) * len(made.names) > QUICK:
        weights = {VECTORS: USUAL, **made.weights([*made.heads])}
        why = f"a usual weight of the vectors: {len(rows)} rows of {len(made.names)} labels take long"
        why += "; rows without labels are not used" if unlabelled else ""
    else:
        if VECTORS in asked:
            stage = progress.stage(f"Cross-validation {title}".strip(), recipe.steps)
            balance = made.balance(held_out_scores(learner, made.count, stage, [*made.names, *made.unseen]))
            stage.end()
            made.note(stage, VECTORS)
        weights = made.weights(asked)
        why = f"weighed on {len(made.known)} training rows in {made.count} folds"
        if unlabelled:
            weights, said = made.learn_from_pool(weights)
            why += said
    if made.unseen and VECTORS in asked:
        weights = {VECTORS: LEAST * max(weights.values()), **weights}  # nothing else knows these labels
    elif made.unseen:
        progress.say(
            f"Heads do not know {shown(made.unseen)}, which no training row has: it is never predicted. --opinions auto lets "
            f"vectors answer, too, if they are trained."
        )
    opinions = Opinions.of(weights, made.heads, balance, None if encoder is None else encoder.name)
    return Formed(opinions, made.together(opinions.weights), made.known, why, made.measured)


class Forming:
    """Opinions in the making.

    Args:
        task, rows, seed: as of `Learner`; the others as of `form_opinions`.

    Attributes:
        names: the labels that rows have, in alphabetical order.
        unseen: the labels that no row has, so that no head knows them, and nothing is held out.
        wordings: of the rows, and behind them of those without labels if rows can be divided.
        count: the number of folds.
        folds: the fold of each row, -1 for one that is the only one of its label; None: rows cannot be divided.
        measured: the indices of rows that are held out in turn.
        known: their labels.
        heads: opinion → its head.
        held_out: opinion → log-probabilities (measured rows, labels) for rows that it was not formed on.
    """

    def __init__(
        self,
        task: Task,
        rows: Sequence[Row],
        unlabelled: Sequence[Row],
        folds: int,
        seed: int,
        progress: Progress,
        title: str,
    ) -> None:
        self.task, self.progress, self.title = task, progress, title
        self.labels = [task.label(row, number) for number, row in enumerate(rows, 1)]
        self.names = sorted(set(self.labels))
        self.unseen = sorted({*(task.labels or ())} - {*self.names})
        self.class_weight = task.weights(self.labels)
        self.wordings = task.wordings(rows)
        # Duplicates share a fold, so they are one row here.
        different = dict(zip((one.fingerprint for one in self.wordings), self.labels, strict=True))
        counts = Counter(different.values())
        several = {name for name in self.names if counts[name] > 1}
        self.count = folds or min([FOLDS, *(counts[name] for name in several)])
        self.measured = [index for index, label in enumerate(self.labels) if label in several]
        self.folds: list[int] | None = None
        if len(several) > 1 and 2 * len(self.measured) >= len(rows):
            each = fold_of_each(task, rows, self.count, seed)
            self.folds = [fold if label in several else -1 for fold, label in zip(each, self.labels, strict=True)]
            self.wordings = [*self.wordings, *task.wordings(unlabelled)]  # nothing else says whether they help
        self.known = [self.labels[index] for index in self.measured]
        self.y = [self.names.index(label) for label in self.known]
        self.heads: dict[str, Head] = {}
        self.held_out: dict[str, np.ndarray] = {}
        self._examples: dict[str, Examples] = {}

    def fit(self, name: str, title: str, read: Read, more: Sequence[str] = ()) -> None:
        """Fit an opinion's head on what is read of the wordings and, behind them, of a text for each of some more labels."""
        stage = self.progress.stage(f"{title} {self.title}".strip(), len(self.wordings) + len(more))
        states = read(lambda done: stage.advance(len(done)))
        between = np.s_[len(self.labels) : len(self.wordings)]
        known = np.delete(states, between, axis=0)
        examples = Examples(known, [*self.labels, *more], states[between], self.class_weight)
        parts = None if self.folds is None else [*self.folds, *[-1] * len(more)]
        self._examples[name] = examples
        self.heads[name], held_out = from_first(
            lambda: fit_head(examples.states, examples.labels, parts, self.class_weight)
        )
        stage.end()
        if held_out is not None:
            self.held_out[name] = held_out
            self.note(stage, name)

    def fit_sentences(self, encoder: Sentences) -> None:
        """Fit the head on a sentence encoder's embeddings."""
        # An answer's text is an example of its label, the only one besides one row or three.
        answers = {label: text for label, text in self.wordings[0].answers.items() if label in self.names}
        answers = {} if are_codes(answers.values()) else answers
        texts = [*map(sentence_of, self.wordings), *answers.values()]
        self.fit(SENTENCES, "Sentence encoder", lambda told: encoder.embeddings(texts, told), [*answers])

    def balance(self, scores: Sequence[np.ndarray]) -> list[dict[str, float]]:
        """The balance of held-out scores (N, labels, behind them those that no row has) in each template; the vectors' opinion is
        what it makes of them.

        A label that no row has gets a small share of these rows, as in `shares_of`: a text for which its answer is more probable
        than for them stands out.
        """
        names = [*self.names, *self.unseen]
        counts = {name: count * self.class_weight.get(name, 1.0) for name, count in Counter(self.known).items()}
        shares = np.array([*shares_of(counts, names).values()])
        each = self._weights[self.y] if self.class_weight else None
        scores = [some[self.measured] for some in scores]
        shifts = [shift_of(some, shares, each) for some in scores]
        moved = [(some + shift)[:, : len(self.names)] for some, shift in zip(scores, shifts, strict=True)]
        self.held_out[VECTORS] = np.mean([log_softmax(some, axis=1) for some in moved], axis=0)
        return [dict(zip(names, shift.tolist(), strict=True)) for shift in shifts]

    @property
    def _weights(self) -> np.ndarray:
        """How much a row of each of `names` counts."""
        return weights_of(self.class_weight, self.names)

    def weights(self, asked: Sequence[str]) -> dict[str, float]:
        """The weights of some opinions."""
        if len(asked) == 1:
            return {asked[0]: 1.0}
        return weigh({name: self.held_out[name] for name in asked}, self.y, self._weights)

    def learn_from_pool(self, weights: dict[str, float]) -> tuple[dict[str, float], str]:
        """Let heads learn from rows without labels, where that lowers the log-loss; returns the weights, and what came of it."""
        some = {name: head for name, head in self.heads.items() if name in weights}
        if not some or self.folds is None:
            return weights, ""
        most = max(len(self._examples[name].labels) for name in some)
        parts = [*self.folds, *[-1] * (most - len(self.labels))]
        examples = {name: self._examples[name] for name in some}
        heads, held_out = from_first(lambda: self_train(examples, some, weights, parts))
        known, before = self.held_out, self._log_loss(weights)
        self.held_out = {**known, **held_out}
        again = self.weights([*weights])
        after = self._log_loss(again)
        said = f"; {len(self.wordings) - len(self.labels)} rows without labels: log-loss {before:.3f} → {after:.3f}"
        if after < before:
            self.heads |= heads
            return again, said
        self.held_out = known
        return weights, f"{said}, so they are left out"

    def together(self, weights: Mapping[str, float]) -> list[Prediction] | None:
        """What opinions with these weights say to held-out rows; None where that is not known."""
        if not weights.keys() <= self.held_out.keys():
            return None
        return self._predictions(sum(weight * self.held_out[name] for name, weight in weights.items()))

    def note(self, stage: Stage, name: str) -> None:
        """Say beside a stage how good an opinion is on held-out rows."""
        found = [one.best for one in self._predictions(self.held_out[name])]
        stage.note(f"cross-validated accuracy {self.task.metrics(self.known, found)['accuracy']:.1%}")

    def _log_loss(self, weights: Mapping[str, float]) -> float:
        together = np.sum([weight * self.held_out[name] for name, weight in weights.items()], axis=0)
        losses = -log_softmax(together, axis=1)[np.arange(len(self.y)), self.y]
        return float(np.average(losses, weights=self._weights[self.y]))

    def _predictions(self, scores: Any) -> list[Prediction]:
        """Predictions of scores (N, labels)."""
        log_probs = log_softmax(scores, axis=1)
        scores = [dict(zip(self.names, row.tolist(), strict=True)) for row in log_probs]
        return [Prediction.of(one, costs=self.task.costs) for one in scores]


def states_of(scorer: Scorer, questions: Sequence[Question], told: Callable[[list[int]], None]) -> np.ndarray:
    """`Scorer.states` of questions, which processes share: float32 (N, places, width)."""

    def some(indices: list[int]) -> list[np.ndarray]:
        return [*scorer.states([questions[index] for index in indices], told).numpy()]

    return np.stack(dealt(len(questions), some, passes_in_step(scorer.model)))


def held_out_scores(learner: Learner, folds: int, stage: Stage, labels: Sequence[str]) -> list[np.ndarray]:
    """For each template that asks, the scores (N, labels) of rows by vectors that were trained without them."""
    learner = replace(learner, known=learner.task.taught(learner.rows))
    each = learner.held_out(folds, stage, _asking(learner.task, learner.recipe))
    return [np.array([[one.scores[label] for label in labels] for one in said]) for said in each]


def where_vectors_pay(
    recipe: Recipe, tasks: Sequence[tuple[Task, Sequence[Row]]], reads_answers: bool, folds: int, progress: Progress
) -> Recipe:
    """The recipe, with heads alone instead of all opinions where no vectors are worth their time: where no wording can name the
    labels; and where training takes long, for many rows have many labels, and a sentence encoder is there, which tells many
    labels apart better.

    Args:
        recipe: one that says what answers ("vectors", "head") stays as it is.
        tasks: each task with its training rows; one where vectors pay decides for all.
        reads_answers: whether the model is a language model.
        folds: as of `form_opinions`; a number is a wish to have all weighed.
        progress: told about it.
    """
    if recipe.opinions != "auto" or not reads_answers or folds:
        return recipe
    if not all(task.labels is not None and can_balance(task) for task, _ in tasks):  # vectors answer alone
        return recipe
    # Only inferred tasks have candidates; the answers of others were chosen by somebody.
    nameless = [
        bool(task.candidates) and isinstance(task.choices, dict) and are_codes(task.choices.values())
        for task, _ in tasks
    ]
    long = [len(rows) * len(task.labels or ()) > QUICK for task, rows in tasks]
    if all(nameless):
        why = "no wording can name labels that are numbers or codes. --choices gives them names,"
    elif all(long) and (Sentences.found(recipe.encoder) is not None or all(task.multi_label for task, _ in tasks)):
        task, rows = tasks[0]
        better = "take seconds" if task.multi_label else "with a sentence encoder tell so many apart better"
        why = f"that takes long for {len(rows)} rows of {len(task.labels or ())} labels, and heads {better}."
    else:
        return recipe
    progress.say(f"No vectors are trained: {why} --folds 4 trains and weighs them all the same.")
    return recipe.changed(opinions=HEAD)


def forms_opinions(recipe: Recipe, task: Task, reads_answers: bool, all_templates: bool = False) -> bool:
    """Whether more than vectors answer in the end.

    Args:
        recipe: which opinions are wanted.
        task: must have the same labels for all rows.
        reads_answers: whether the model is a language model.
        all_templates: each of the task's templates is measured, for which vectors answer alone.

    Raises:
        InputError: a head is to answer alone, and cannot.
    """
    lacks = {
        "a language model for a head, found one that reads no answers": not reads_answers,
        "a task with the same labels for all rows, for a head": task.labels is None or not can_balance(task),
        "a head to answer in the first template alone, found all templates": all_templates,
    }
    lacking = next((what for what, does in lacks.items() if does), None)
    if recipe.opinions == HEAD and lacking is not None:
        raise InputError(f"Expected {lacking}", "let vectors answer, too; see", argument="opinions")
    return lacking is None and recipe.opinions != VECTORS


def _asking(task: Task, recipe: Recipe) -> range:
    """The templates that ask the vectors: the first of those that training draws from."""
    drawn = len(task.templates) if recipe.templates == "random" else 1
    able = itertools.takewhile(lambda template: can_balance(task, template), range(min(drawn, MOST_ASKING)))
    return range(len([*able]))
