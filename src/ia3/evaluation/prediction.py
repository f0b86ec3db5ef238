"""Labels and probabilities for rows: `predict`, and `predict_each` where several adapters answer each row."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ia3.adapter.rows import BASE
from ia3.errors import InputError, about
from ia3.opinions.asking import HeadJob, head_jobs, heads_read, heads_say
from ia3.opinions.opinions import Opinions
from ia3.scoring import MEMORY
from ia3.scoring.prefix import Prefix
from ia3.scoring.readings import Readings
from ia3.scoring.scorer import Scorer
from ia3.task.rows import items_of
from ia3.task.task import Task
from ia3.task.unequal import Costs, least_costly
from ia3.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ia3.scoring.question import Question
    from ia3.task.wording import Wording

# So many questions are in words and tokens at a time.
_AT_ONCE = 4096


@dataclass(frozen=True)
class Prediction:
    """A row's label, and the probability of each label.

    Attributes:
        label: the most probable label, or with costs the one with the least expected cost; where rows may have several, a tuple
            of those whose probability reaches their threshold, in alphabetical order. None: it is not sure enough
            (`abstain_below`).
        probabilities: label → probability; the sum is 1, but where each label is decided by itself.
        scores: label → length-normalized log-probability of its answer text, or what several opinions make of it (see
            `Opinions`). Probabilities are computed from scores.
        costs: what mistakes cost, as of a task.
        thresholds: label → the probability from which on a row has it; empty: rows have one label.
    """

    label: str | tuple[str, ...] | None
    probabilities: dict[str, float]
    scores: dict[str, float] = field(repr=False)
    costs: Costs = field(default_factory=dict, repr=False)
    thresholds: Mapping[str, float] = field(default_factory=dict, repr=False)

    @property
    def best(self) -> Any:
        """The label, with the least expected cost (see `least_costly`), or the labels, however unsure."""
        if self.thresholds:
            return tuple(sorted(label for label in self.probabilities if self._has(label)))
        return least_costly(self.probabilities, self.costs)

    @property
    def labels(self) -> list[str] | None:
        """The label or labels as a list, whatever the task; None: it is not sure enough."""
        if self.label is None:
            return None
        return [self.label] if isinstance(self.label, str) else list(self.label)

    def at(self, temperature: float) -> Prediction:
        """The prediction from the same scores at another temperature."""
        return self.of(self.scores, temperature, costs=self.costs, thresholds=self.thresholds)

    @property
    def sureness(self) -> float:
        """The probability of the best label; of labels that are decided one by one, that of the least sure decision."""
        if not self.thresholds:
            return self.probabilities[self.best]
        return min(p if self._has(label) else 1 - p for label, p in self.probabilities.items())

    def _has(self, label: str) -> bool:
        # A temperature changes no decision. A threshold of 1 means never.
        threshold = self.thresholds[label]
        return threshold < 1 and self.scores[label] >= math.log(threshold / (1 - threshold))

    @classmethod
    def of(
        cls,
        scores: Mapping[str, float],
        temperature: float = 1.0,
        abstain_below: float = 0.0,
        costs: Costs | None = None,
        thresholds: Mapping[str, float] | None = None,
    ) -> Prediction:
        """The softmax of scores / temperature; with thresholds their sigmoid. The result does not depend on the order of the
        labels."""
        if thresholds:
            each = {label: 1 / (1 + math.exp(-max(score / temperature, -700.0))) for label, score in scores.items()}
            found = cls(None, each, dict(scores), thresholds=thresholds)
            return replace(found, label=found.best) if found.sureness >= abstain_below else found
        highest = max(scores.values())
        powers = {label: math.exp((score - highest) / temperature) for label, score in scores.items()}
        total = math.fsum(powers.values())  # exact in any order
        probabilities = {label: power / total for label, power in powers.items()}
        found = cls(None, probabilities, dict(scores), costs or {})
        return replace(found, label=found.best) if found.sureness >= abstain_below else found


def predict(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | Sequence[Task],
    rows: Any,
    on_progress: Callable[[list[int]], None] | None = None,
    adapter_names: Sequence[str] | None = None,
    temperature: float | Sequence[float] = 1.0,
    abstain_below: float = 0.0,
    template: int = 0,
    recipe: Recipe | None = None,
    prefix: Prefix | None = None,
    readings: Readings | None = None,
    opinions: Opinions | None = None,
    memory: int | str = MEMORY,
) -> list[Prediction]:
    """Predict for each row the label whose answer text has the best length-normalized log-probability; for a task with costs, the
    label with the least expected cost.

    Probabilities are the softmax of these scores, the distribution that the length-normalized loss trains.

    Args:
        model: a language model, adapted or not.
        tokenizer: its tokenizer.
        task: the task of the rows, or a task for each row. Labels of rows are not read.
        rows: a DataFrame, a `datasets.Dataset`, dictionaries, one dictionary, or texts; see `as_rows`.
        on_progress: called with the indices of the rows that each batch finished.
        adapter_names: the adapter for each row; None: the active adapters.
        temperature: divides the scores to calibrate the probabilities (see `Calibration`); one number, or one per row.
        abstain_below: give no label if its probability is lower.
        template: the index of the task's template to use; balanced opinions ask in the first ones.
        recipe: decides length normalization and what to do about long prompts; None: the paper's.
        prefix: a text before each row's prompt, such as shots (see `predict_in_context`).
        readings: keeps what the base model reads of the rows' texts from call to call (see `Readings`).
        opinions: what answers beside the vectors, for all rows; None: the vectors alone.
        memory: as of `Readings`, for texts that are asked more than once, where no readings are given.

    Raises:
        InputError: the numbers of tasks or temperatures and rows differ, or a temperature or threshold is out of range;
            see also `Scorer.questions` and `score_choices`.
    """
    items, recipe = items_of(rows, task if isinstance(task, Task) else None), recipe or Recipe()
    tasks = [task] * len(items) if isinstance(task, Task) else list(task)
    temperatures = [temperature] * len(items) if isinstance(temperature, (int, float)) else list(temperature)
    for name, values in {"task": tasks, "temperature": temperatures}.items():
        if len(values) != len(items):
            raise InputError(f"Expected a {name} for each of the {len(items)} rows, found {len(values)}.")
    its = opinions or Opinions()
    if template and its.balance:
        raise InputError(
            f"Expected the first templates, for which the opinions are balanced, found template {template}."
        )
    wordings = [
        [one.wording(item, number, template + place) for place in its.asking(len(one.templates))]
        for number, (item, one) in enumerate(zip(items, tasks, strict=True), 1)
    ]
    _check(temperatures, abstain_below)
    scorer = Scorer(model, tokenizer, readings, memory)
    count = len(wordings)
    each = [its] * count
    scores = _scored(scorer, wordings, [recipe] * count, each, temperatures, adapter_names, on_progress, prefix)
    return [
        Prediction.of(row, temperature, abstain_below, one.costs, its.thresholds)
        for row, temperature, one in zip(scores, temperatures, tasks, strict=True)
    ]


@dataclass(frozen=True)
class Respondent:
    """Who answers, and in which task: an adapter, or the base model.

    Attributes:
        adapter: its name in the model, "__base__" for the base model.
        task: says what a row means; its first template asks, or the first few, which balanced opinions list.
        recipe: its length normalization, and what it does about long prompts.
        temperature: divides the scores, so that probabilities are calibrated (see `Calibration`).
        opinions: what answers, and how much each part counts.
    """

    adapter: str
    task: Task
    recipe: Recipe = field(default_factory=Recipe)
    temperature: float = 1.0
    opinions: Opinions = field(default_factory=Opinions)


def predict_each(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Any,
    respondents: Sequence[Sequence[Respondent]],
    on_progress: Callable[[list[int]], None] | None = None,
    abstain_below: float = 0.0,
    readings: Readings | None = None,
    memory: int | str = MEMORY,
) -> list[list[Prediction]]:
    """What several adapters say to each row, each in its own task: `predict` for one text and many adapters.

    The base model, and adapters that act from the question on (`IA3Config.acts_from`), share one reading of a row's text;
    what they are asked about it goes through the model in common batches. Other adapters read for themselves.

    Args:
        model: an `IA3Model` that has the adapters, or whose bank has them.
        tokenizer: its tokenizer.
        rows: as of `predict`; a text is a row to each task that reads one column.
        respondents: for each row those that answer it.
        on_progress: called with the indices of the rows that each batch answered, once for each answer.
        abstain_below: give no label where the best one's probability is lower.
        readings: keeps what the base model makes of the rows' texts from call to call; None: of texts that are asked about more than
            once, during this call.
        memory: as of `predict`.

    Returns:
        For each row a prediction of each of its respondents, in their order.

    Raises:
        InputError: see `predict`; an error about a row in one adapter's task names the adapter.
    """
    items = items_of(rows)
    if len(respondents) != len(items):
        raise InputError(f"Expected respondents for each of the {len(items)} rows, found {len(respondents)}.")
    _check([one.temperature for its in respondents for one in its], abstain_below)
    scorer = Scorer(model, tokenizer, readings, memory)
    found: list[list[Prediction]] = [[] for _ in items]
    for part in _parts([len(its) for its in respondents]):
        asked = [(index, one) for index in part for one in respondents[index]]
        wordings = []
        for index, one in asked:
            with about(f"Adapter {one.adapter!r}" if one.adapter != BASE else None):
                some = [
                    one.task.wording(items[index], index + 1, place)
                    for place in one.opinions.asking(len(one.task.templates))
                ]
                for wording in some:
                    _ = wording.prompt, wording.answers
            wordings.append(some)
        scores = _scored(
            scorer,
            wordings,
            [one.recipe for _, one in asked],
            [one.opinions for _, one in asked],
            [one.temperature for _, one in asked],
            [one.adapter for _, one in asked],
            None if on_progress is None else lambda done, asked=asked: on_progress([asked[i][0] for i in done]),
        )
        for (index, one), its in zip(asked, scores, strict=True):
            found[index].append(
                Prediction.of(its, one.temperature, abstain_below, one.task.costs, one.opinions.thresholds)
            )
    return found


def _parts(counts: Sequence[int]) -> Iterator[list[int]]:
    """Rows, as indices, in parts of not many more than `_AT_ONCE` questions, given how many each row is asked."""
    part: list[int] = []
    filled = 0
    for index, count in enumerate(counts):
        part.append(index)
        filled += count
        if filled >= _AT_ONCE:
            yield part
            part, filled = [], 0
    if part:
        yield part


def _check(temperatures: Sequence[float], abstain_below: float) -> None:
    for one in temperatures:
        if not (math.isfinite(one) and one > 0):
            raise InputError(f"Expected a temperature above 0, found {one}.")
    if not 0 <= abstain_below <= 1:
        raise InputError(f"Expected a threshold (abstain_below) from 0 to 1, found {abstain_below}.")


def _scored(
    scorer: Scorer,
    wordings: Sequence[Sequence[Wording]],
    recipes: Sequence[Recipe],
    opinions: Sequence[Opinions],
    temperatures: Sequence[float],
    adapter_names: Sequence[str] | None,
    on_progress: Callable[[list[int]], None] | None,
    prefix: Prefix | None = None,
) -> list[dict[str, float]]:
    """The scores of each row's labels, by the recipe and the opinions that each has, in the wordings that ask it."""
    if adapter_names is not None and len(adapter_names) != len(wordings):
        raise InputError(f"Expected adapter_names for the {len(wordings)} prompts, found {len(adapter_names)}.")
    if prefix is not None and any(its.heads for its in opinions):
        raise InputError("Expected vectors alone behind a prefix, found a head.")
    # A row's questions stand together, that of the first template first.
    firsts = [0, *itertools.accumulate(map(len, wordings))]
    row_of = [row for row, some in enumerate(wordings) for _ in some]
    flat = [wording for some in wordings for wording in some]
    alike: dict[Literal["truncate", "refuse"], list[int]] = {}
    for index, row in enumerate(row_of):
        alike.setdefault(recipes[row].long_prompts, []).append(index)
    by_index: dict[int, Question] = {}
    for long_prompts, indices in alike.items():
        some = scorer.questions([flat[index] for index in indices], False, long_prompts, prefix)
        by_index.update(zip(indices, some, strict=True))
    jobs = [
        (row, name, job)
        for row, its in enumerate(opinions)
        for name, job in head_jobs(its, flat[firsts[row]], by_index[firsts[row]]).items()
    ]
    asks = [index for index, row in enumerate(row_of) if opinions[row].vectors]
    if adapter_names is not None:
        names = [adapter_names[row_of[index]] for index in asks]
        named = scorer.named([by_index[index] for index in asks], names)
        by_index.update(zip(asks, named, strict=True))
    questions = [(row_of[index], by_index[index], recipes[row_of[index]].length_normalization) for index in asks]
    by_heads, each = _answered(scorer, len(wordings), jobs, questions, on_progress, prefix)
    by_vectors = dict(zip(asks, each, strict=True))
    found = []
    for row, its in enumerate(opinions):
        scored = []
        for index in range(firsts[row], firsts[row + 1]):
            labels = flat[index].answers
            values = by_vectors[index] if index in by_vectors else [0.0] * len(labels)
            scored.append(dict(zip(labels, values, strict=True)))
        found.append(its.together(scored, by_heads[row], temperatures[row]))
    return found


def _answered(
    scorer: Scorer,
    count: int,
    jobs: Sequence[tuple[int, str, HeadJob]],
    questions: Sequence[tuple[int, Question, float]],
    on_progress: Callable[[list[int]], None] | None,
    prefix: Prefix | None,
) -> tuple[list[dict[str, dict[str, float]]], list[list[float]]]:
    """Ask heads and vectors about rows; what both read of a text is read once.

    Returns for each row what its heads say (opinion → label → score), and for each question the scores of its choices.

    Args:
        scorer: asks the model.
        count: the number of rows.
        jobs: heads' jobs, with the row and the opinion.
        questions: for vectors, with the row and the power of length normalization.
        on_progress, prefix: as of `predict`.
    """
    # A row is done when nothing of it is left to ask.
    left = Counter([*(row for row, *_ in jobs), *(row for row, *_ in questions)])

    def answered(rows: list[int]) -> None:
        left.subtract(rows)
        if on_progress is not None:
            on_progress([row for row in dict.fromkeys(rows) if not left[row]])

    jobs_of: list[list[int]] = [[] for _ in range(count)]
    questions_of: list[list[int]] = [[] for _ in range(count)]
    for index, (row, *_) in enumerate(jobs):
        jobs_of[row].append(index)
    for index, (row, *_) in enumerate(questions):
        questions_of[row].append(index)
    said: list[dict[str, dict[str, float]]] = [{} for _ in range(count)]
    scores: list[list[float]] = [[] for _ in questions]

    def ask(part: Sequence[int]) -> None:
        some = [jobs[index] for row in part for index in jobs_of[row]]
        told = heads_say(scorer, [job for *_, job in some], lambda done: answered([some[k][0] for k in done]))
        for (row, name, _), its in zip(some, told, strict=True):
            said[row][name] = its
        indices = [index for row in part for index in questions_of[row]]
        powers = [questions[index][2] for index in indices]
        found = scorer.score(
            [questions[index][1] for index in indices],
            powers[0] if len(set(powers)) == 1 else powers,
            on_progress=lambda done: answered([questions[indices[k]][0] for k in done]),
            prefix=prefix,
        )
        for index, its in zip(indices, found, strict=True):
            scores[index] = its.tolist()

    if prefix is not None:  # which is read once, and the texts behind it whole
        ask(range(count))
        return said, scores
    asked = [question for _, question, _ in questions]
    scorer = scorer.keeping([*heads_read(job for *_, job in jobs), *asked])
    reads = [
        [*heads_read(jobs[index][2] for index in jobs_of[row]), *(asked[index] for index in questions_of[row])]
        for row in range(count)
    ]
    for part in scorer.parts(reads):
        ask(part)
    return said, scores
