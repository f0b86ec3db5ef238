"""Form the opinions of a trained adapter's folder on its training rows: `form_opinions`."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import log_softmax

from ia3.errors import InputError
from ia3.evaluation.balance import can_balance, shift_of
from ia3.evaluation.calibration import fold_of_each, trained_on_others
from ia3.evaluation.prediction import Prediction, predict
from ia3.evaluation.progress import Progress, Stage
from ia3.opinions.head import Head, fit_head
from ia3.opinions.opinions import HEAD, SENTENCES, USUAL, VECTORS, Opinions, weigh
from ia3.opinions.priors import shares_of
from ia3.opinions.self_training import Examples, self_train
from ia3.opinions.sentences import Sentences, sentence_of
from ia3.scoring.readings import Readings
from ia3.scoring.scorer import Scorer
from ia3.task.candidates import are_codes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.adapter.model import IA3Model
    from ia3.task.task import Row, Task
    from ia3.training.recipe import Recipe

Read = Callable[[Callable[[list[int]], None]], np.ndarray]
"""Reads rows; gets a function that is told which are done."""

_FOLDS = 4

# Up to this number of rows times labels, vectors train once more for each fold; with more, that takes long.
_QUICK = 2_000

# Templates that ask the vectors, at most: each costs a question more.
_ASKING = 3


@dataclass(frozen=True)
class Formed:
    """Opinions, and what they are worth.

    Attributes:
        opinions: with their weights.
        held_out: the training rows, each predicted by what has not seen it; None: nothing was cross-validated.
        why: how the weights came about, for people.
    """

    opinions: Opinions
    held_out: list[Prediction] | None
    why: str


def form_opinions(
    progress: Progress,
    title: str,
    model: IA3Model,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    recipe: Recipe,
    folds: int = 0,
    seed: int = 0,
    output_dir: str | os.PathLike = "cross-validation",
    readings: Readings | None = None,
    unlabelled: Sequence[Row] = (),
) -> Formed:
    """Fit heads on the training rows, and weigh them and the vectors by cross-validation.

    Args:
        progress, title: show the steps.
        model: gets an adapter per fold during the call.
        tokenizer: the model's tokenizer.
        task: with the same labels for all rows.
        rows: the training rows.
        recipe: how vectors are trained; with `opinions` "head" heads answer alone.
        folds: the number of cross-validation parts; 0: 4, or as many as the rarest label has rows. Where vectors take long
            to train (many rows and labels), their weight is then a usual one.
        seed, output_dir, readings: as of `cross_validate`.
        unlabelled: rows without labels, from which heads learn where that lowers the cross-validated log-loss (see
            `self_train`).
    """
    labels = [task.label(row, number) for number, row in enumerate(rows, 1)]
    names = sorted(set(labels))
    y = [names.index(label) for label in labels]
    # Duplicates share a fold, so they are one row here.
    different = {
        task.fingerprint(row, number): label for number, (row, label) in enumerate(zip(rows, labels, strict=True), 1)
    }
    count = folds or min(_FOLDS, *(Counter(different.values())[name] for name in names))
    each = fold_of_each(task, rows, count, seed) if count > 1 else None
    wordings = [*task.wordings(rows), *task.wordings(unlabelled)]
    heads: dict[str, Head] = {}
    held_out: dict[str, np.ndarray] = {}
    examples: dict[str, Examples] = {}

    def fit(name: str, its_title: str, read: Read, more: Sequence[str]) -> None:
        """Fit an opinion's head on what is read of the rows, and of a text for each of some more labels."""
        stage = progress.stage(f"{its_title} {title}".strip(), len(wordings) + len(more))
        states = read(lambda done: stage.advance(len(done)))
        pool = states[len(rows) : len(wordings)]
        known = np.delete(states, np.s_[len(rows) : len(wordings)], axis=0)
        examples[name] = Examples(known, [*labels, *more], pool)
        heads[name], held = fit_head(known, [*labels, *more], None if each is None else [*each, *[-1] * len(more)])
        if held is not None:
            held_out[name] = held
            _note(stage, task, labels, _predictions(held, names))
        stage.end()

    scorer = Scorer(model, tokenizer, readings)
    questions = scorer.questions(wordings, labelled=False, long_prompts=recipe.long_prompts)
    fit(HEAD, "Head", lambda told: scorer.states(questions, told).numpy(), [])
    encoder = Sentences.found(recipe.encoder)
    if encoder is not None:
        # An answer's text is an example of its label, the only one besides one row or three.
        answers = {label: text for label, text in wordings[0].answers.items() if label in names}
        answers = {} if are_codes(answers.values()) else answers
        texts = [*map(sentence_of, wordings), *answers.values()]
        fit(SENTENCES, "Sentence encoder", lambda told: encoder.embeddings(texts, told), [*answers])
    balance: list[dict[str, float]] = []
    asked = [*heads] if recipe.opinions == HEAD else [VECTORS, *heads]
    weights = dict.fromkeys(asked, USUAL if len(asked) > 1 else 1.0)
    if each is None:
        why = "usual weights: a label has a single row, or duplicates"
    elif VECTORS in asked and not folds and len(rows) * len(names) > _QUICK:
        why = f"usual weights: {len(rows)} rows of {len(names)} labels take long"
    else:
        if VECTORS in asked:
            stage = progress.stage(f"Cross-validation {title}".strip(), recipe.steps)
            readings = Readings() if readings is None else readings
            shares, said = np.array([*shares_of(labels, names).values()]), []
            with trained_on_others(
                model, tokenizer, task, rows, recipe, count, seed, output_dir, stage, readings
            ) as by_fold:
                for template in _asking(task, recipe):
                    found = predict(
                        model, tokenizer, task, rows, None, by_fold, template=template, recipe=recipe, readings=readings
                    )
                    scores = np.array([[one.scores[name] for name in names] for one in found])
                    shift = shift_of(scores, shares)
                    balance.append(dict(zip(names, shift.tolist(), strict=True)))
                    said.append(log_softmax(scores + shift, axis=1))
            held_out[VECTORS] = np.mean(said, axis=0)
            stage.end()
            _note(stage, task, labels, _predictions(held_out[VECTORS], names))
        held_out = {name: held_out[name] for name in asked}
        weights = weigh(held_out, y) if len(asked) > 1 else weights
        why = f"weighed on {len(rows)} training rows in {count} folds"
        if unlabelled:
            some = {name: heads[name] for name in weights if name in heads}
            both = max((len(examples[name].labels) for name in some), default=0)
            parts = [*each, *[-1] * (both - len(rows))]
            made, held = self_train({name: examples[name] for name in some}, some, weights, parts)
            again = weigh({**held_out, **held}, y) if len(asked) > 1 else weights
            before, after = (_log_loss(ws, hs, y) for ws, hs in ((weights, held_out), (again, {**held_out, **held})))
            why += f"; {len(unlabelled)} rows without labels: log-loss {before:.3f} → {after:.3f}"
            if after < before:
                heads |= made
                held_out |= held
                weights = again
            else:
                why += ", so they are left out"
    opinions = Opinions.of(weights, heads, balance, None if encoder is None else encoder.name)
    if each is None or held_out.keys() != {*asked}:
        return Formed(opinions, None, why)
    together = sum(weight * held_out[name] for name, weight in opinions.weights.items())
    return Formed(opinions, _predictions(log_softmax(together, axis=1), names), why)


def without_long_training(
    recipe: Recipe, tasks: Sequence[tuple[Task, Sequence[Row]]], reads_answers: bool, folds: int, progress: Progress
) -> Recipe:
    """The recipe with heads alone where vectors take long to train, for their rows have many labels, and a sentence encoder is
    there, which tells many labels apart better.

    Args:
        recipe: one that says what answers ("vectors", "head") stays as it is.
        tasks: each task with its training rows; one where vectors are quick decides for all.
        reads_answers: whether the model is a language model.
        folds: as of `form_opinions`; a number is a wish to have all weighed.
        progress: told about it.
    """
    long = [len(rows) * len(task.labels or ()) > _QUICK for task, rows in tasks]
    if (
        recipe.opinions != "auto"
        or not reads_answers
        or folds
        or not all(long)
        or Sentences.found(recipe.encoder) is None
    ):
        return recipe
    task, rows = tasks[0]
    progress.say(
        f"No vectors are trained: that takes long for {len(rows)} rows of {len(task.labels or ())} labels, and heads with a "
        f"sentence encoder tell so many apart better. --folds 4 trains and weighs them all the same."
    )
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
    possible = task.labels is not None and can_balance(task) and reads_answers and not all_templates
    if recipe.opinions == HEAD and not possible:
        raise InputError(
            "Expected a language model, a task with the same labels for all rows, and its first template alone, for a head",
            "let vectors answer, too",
            argument="opinions",
        )
    return possible and recipe.opinions != VECTORS


def _asking(task: Task, recipe: Recipe) -> range:
    """The templates that ask the vectors: the first of those that training draws from."""
    drawn = len(task.templates) if recipe.templates == "random" else 1
    able = itertools.takewhile(lambda template: can_balance(task, template), range(min(drawn, _ASKING)))
    return range(len([*able]))


def _note(stage: Stage, task: Task, labels: Sequence[str], found: Sequence[Prediction]) -> None:
    stage.note(f"cross-validated accuracy {task.metrics(labels, [one.best for one in found])['accuracy']:.1%}")


def _log_loss(weights: Mapping[str, float], held_out: Mapping[str, np.ndarray], y: Sequence[int]) -> float:
    together = np.sum([weight * held_out[name] for name, weight in weights.items()], axis=0)
    return -float(log_softmax(together, axis=1)[np.arange(len(y)), list(y)].mean())


def _predictions(log_probs: np.ndarray, names: Sequence[str]) -> list[Prediction]:
    return [Prediction.of(dict(zip(names, row.tolist(), strict=True))) for row in log_probs]
