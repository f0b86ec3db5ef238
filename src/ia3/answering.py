"""Adapters of folders answer rows: `Answering`; and what they answered, as JSON and as cells of a table."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ia3.adapter.config import CONFIG_NAME
from ia3.adapter.pretrained import quiet
from ia3.errors import InputError, about, brief, shown, similar
from ia3.scoring import MEMORY

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ia3.adapter.model import IA3Model
    from ia3.evaluation.prediction import Prediction, Respondent
    from ia3.folder import AdapterFolder
    from ia3.opinions.opinions import Opinions
    from ia3.task.task import Row, Task

ALONE = "default"
"""The name of an adapter that is asked alone."""


@dataclass
class Answering:
    """Adapters that answer rows, each in its own task.

        answering = Answering({"tickets": AdapterFolder("adapters/tickets")})
        answering.check(row, 1, ["tickets"])
        [[answer]] = answering.answers([row], [["tickets"]])

    The base model is loaded when the first rows are answered.

    Attributes:
        folders: name → folder; an adapter that is asked alone is called `ALONE`.
        each: several adapters answer each row.
        model: the base model; None: the one that the adapters name.
        dtype: the type of its weights, as `load_base` takes it.
        device_map: where they go, as `load_base` takes it.
        prior: how frequent labels are where predictions are made, as `prior_of` takes it; None: as in training.
        zero_shot: also ask the untrained model.
        abstain_below: give no label where the best one's probability is lower.
        memory: as of `Readings`.
    """

    folders: Mapping[str, AdapterFolder]
    each: bool = False
    model: str | None = None
    dtype: str = "auto"
    device_map: str | None = None
    prior: str | None = None
    zero_shot: bool = False
    abstain_below: float = 0.0
    memory: int | str = MEMORY

    @functools.cached_property
    def tasks(self) -> dict[str, Task]:
        """Name of an adapter → its task. Raises `InputError` if a folder has no task with choices."""
        return {name: folder.required_task() for name, folder in self.folders.items()}

    @functools.cached_property
    def opinions(self) -> dict[str, Opinions]:
        """Name of an adapter → its opinions, moved to the prior. Raises `InputError` if they cannot be."""
        found = {}
        for name, folder in self.folders.items():
            with self._about(name):
                found[name] = _moved(folder.opinions, self.prior, self.tasks[name].labels)
        return found

    def check(self, row: Any, number: int, names: Sequence[str]) -> None:
        """Raise `InputError` if adapters cannot be asked about a row, given its number; no model is needed."""
        for name in names:
            with self._about(name):
                wording = self.tasks[name].wording(row, number)
                _ = wording.prompt, wording.answers

    @functools.cached_property
    def loaded(self) -> tuple[IA3Model, PreTrainedTokenizerBase]:
        """The base model with all adapters, and its tokenizer."""
        if self._is_alone:
            return load_adapted(self.folders[ALONE], self.model, self.dtype, self.device_map)
        return load_bank(self.folders, self.model, self.dtype, self.device_map)

    def answers(
        self,
        rows: Sequence[Any],
        asked: Sequence[Sequence[str]],
        on_progress: Callable[[list[int]], None] | None = None,
    ) -> list[list[Answer]]:
        """For each row the answer of each adapter that is asked, with that of the untrained model where it is wanted.

        Args:
            rows: dictionaries, or texts.
            asked: for each row the adapters' names.
            on_progress: called with the indices of the rows that each batch answered, once for each answer.
        """
        from ia3.evaluation.prediction import predict, predict_each

        model, tokenizer = self.loaded
        if self._is_alone:
            folder, task = self.folders[ALONE], self.tasks[ALONE]
            alone = predict(
                model,
                tokenizer,
                task,
                rows,
                on_progress,
                temperature=folder.temperature,
                abstain_below=self.abstain_below,
                recipe=folder.recipe,
                opinions=self.opinions[ALONE],
                memory=self.memory,
            )
            return [[Answer(ALONE, task, item)] for item in alone]
        everyone = [self._respondents(names) for names in asked]
        how: dict[str, Any] = {"abstain_below": self.abstain_below, "memory": self.memory}
        predictions = predict_each(model, tokenizer, rows, everyone, on_progress, **how)
        adapters, untrained = self._known
        answers = []
        for names, its, items in zip(asked, everyone, predictions, strict=True):
            said = {id(one): item for one, item in zip(its, items, strict=True)}
            beside = {name: said[id(one)] for name, one in untrained.items() if name in names}
            answers.append(
                [Answer(name, self.tasks[name], said[id(adapters[name])], beside.get(name)) for name in names]
            )
        return answers

    def count(self, asked: Sequence[Sequence[str]]) -> int:
        """How many answers there are to give, given each row's adapters; those of the untrained model count too."""
        if self._is_alone:
            return len(asked)
        return sum(len(self._respondents(names)) for names in asked)

    @property
    def _is_alone(self) -> bool:
        return [*self.folders] == [ALONE] and not self.zero_shot

    @functools.cached_property
    def _known(self) -> tuple[dict[str, Respondent], dict[str, Respondent]]:
        """Name of an adapter → who answers; and who answers beside it without training."""
        from ia3.adapter.rows import BASE
        from ia3.evaluation.prediction import Respondent

        adapters = {
            name: Respondent(name, self.tasks[name], folder.recipe, folder.temperature, self.opinions[name])
            for name, folder in self.folders.items()
        }
        # Adapters of one task have one untrained model beside them, which is asked once.
        untrained: dict[str, Respondent] = {}
        for name, folder in self.folders.items() if self.zero_shot else ():
            base = Respondent(BASE, self.tasks[name], folder.recipe)
            untrained[name] = next((one for one in untrained.values() if one == base), base)
        return adapters, untrained

    def _respondents(self, names: Sequence[str]) -> list[Respondent]:
        its = [who[name] for who in self._known for name in names if name in who]
        return list({id(one): one for one in its}.values())

    def _about(self, name: str) -> about:
        return about(f"Adapter {name!r}" if self.each else None)


def adapter_of(row: Row, column: str, there: Mapping[str, Any], folder: str, number: int | None = None) -> str:
    """The adapter that a row's column names.

    Args:
        row: the row.
        column: the column.
        there: the known adapters, by name.
        folder: where they are, for an error message.
        number: the row's number, for an error message.

    Raises:
        InputError: the row has no such column, or the column names none of them.
    """
    if column not in row:
        raise InputError(f"Expected a column {column!r}, found {shown(row, 20)}", argument="adapter_column", row=number)
    name = "" if row[column] is None else str(row[column]).strip()
    if name not in there:
        raise InputError(f"Expected an adapter in {folder!r}, found {brief(name)}", similar(name, there), row=number)
    return name


@dataclass(frozen=True)
class Answer:
    """What an adapter answered to a row.

    Attributes:
        adapter: its name.
        task: in which it was asked.
        found: its answer.
        zero_shot: the untrained model's in the same task; None: it was not asked.
    """

    adapter: str
    task: Task
    found: Prediction
    zero_shot: Prediction | None = None


def to_json(answers: Sequence[Answer], each: bool, named: bool = False, label: str = "label") -> dict[str, Any]:
    """The answers to one row.

    Args:
        answers: one, or with `each` of several adapters, by whose names they are told apart.
        each: every adapter answered the row.
        named: say whose answer it is.
        label: the name of the field with the label of the only answer.
    """
    if each:
        return {"adapters": {one.adapter: to_json([one], False) for one in answers}}
    [one] = answers
    grade = one.task.grade(one.found.probabilities)
    graded = {} if grade is None else grade._asdict()
    which = {"adapter": one.adapter} if named else {}
    beside = {} if one.zero_shot is None else {"zero_shot": _labelled(one, one.zero_shot, "label")}
    return {**which, **_labelled(one, one.found, label), **graded, **beside}


def _labelled(answer: Answer, found: Prediction, label: str) -> dict[str, Any]:
    given = {f"{label}s": found.labels} if answer.task.multi_label else {label: found.label}
    return {**given, "probabilities": found.probabilities}


def with_answers(rows: Sequence[Row], answers: Sequence[Sequence[Answer]], each: bool) -> list[dict[str, Any]]:
    """Rows with their answers as fields, for JSON; a row without answers stays as it is."""
    pairs = zip(rows, answers, strict=True)
    return [{**row, **(to_json(its, each, label="prediction") if its else {})} for row, its in pairs]


def with_cells(
    rows: Sequence[Row], answers: Sequence[Sequence[Answer]], each: bool, added: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows with their answers as cells of the columns `added` (see `columns_of`), for CSV; empty ones for a row without answers.
    Columns of an earlier prediction are replaced."""
    found = []
    for row, its in zip(rows, answers, strict=True):
        cells = _cells_of(its, each)
        own = {name: cell for name, cell in row.items() if name not in added}
        found.append({**own, **{name: cells.get(name, "") for name in added}})
    return found


def to_lines(rows: Sequence[Row]) -> str:
    """Rows as JSON, one a line."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def to_csv(rows: Sequence[Row], names: Sequence[str], delimiter: str, header: bool = True) -> str:
    """Rows as CSV with these columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, names, delimiter=delimiter, lineterminator="\n")
    if header:
        writer.writeheader()
    for row in rows:
        # Lists, such as a row's answers, as tasks read them from a CSV file.
        writer.writerow(
            {
                name: json.dumps(cell, ensure_ascii=False, default=str) if isinstance(cell, (list, dict)) else cell
                for name, cell in row.items()
            }
        )
    return text.getvalue()


def _parts(answer: Answer, each: bool) -> list[tuple[str, dict[str, str]]]:
    """The cells of an answer, by what the names of their columns begin with: `prediction`, `expected` and `spread` of grades,
    and `probability_…` of each label."""
    whose = f"{answer.adapter} " if each else ""
    said = [(whose, answer.found)]
    said += [] if answer.zero_shot is None else [(f"{whose}zero_shot_", answer.zero_shot)]
    parts = []
    for start, found in said:
        grade = answer.task.grade(found.probabilities)
        graded = {} if grade is None else {name: f"{value:.4f}" for name, value in grade._asdict().items()}
        shares = {f"probability_{label}": f"{value:.6f}" for label, value in found.probabilities.items()}
        label = json.dumps(found.labels, ensure_ascii=False) if answer.task.multi_label else found.label
        parts.append((start, {"prediction": "" if found.label is None else str(label), **graded, **shares}))
    return parts


def columns_of(answers: Sequence[Sequence[Answer]], each: bool) -> list[str]:
    """The names of all columns of `_parts`, for each adapter and for the untrained model beside it."""
    names: dict[str, dict[str, None]] = {}
    for its in answers:
        for start, cells in (part for answer in its for part in _parts(answer, each)):
            names.setdefault(start, {}).update(dict.fromkeys(cells))
    return [f"{start}{name}" for start, known in names.items() for name in known]


def _cells_of(answers: Sequence[Answer], each: bool) -> dict[str, str]:
    """A row's cells for `columns_of`."""
    parts = [part for answer in answers for part in _parts(answer, each)]
    return {f"{start}{name}": cell for start, cells in parts for name, cell in cells.items()}


def load_adapted(
    folder: AdapterFolder, model: str | None, dtype: str = "auto", device_map: str | None = None
) -> tuple[IA3Model, PreTrainedTokenizerBase]:
    """A base model with the adapter of a folder in it, and its tokenizer.

    Args:
        folder: the adapter's folder.
        model: the base model; None: the one that the adapter names.
        dtype: the type of its weights, as `load_base` takes it.
        device_map: where they go, as `load_base` takes it.
    """
    base, tokenizer = load_base_of(folder, model, dtype, device_map)
    from ia3.adapter.model import IA3Model

    return IA3Model.from_pretrained(base, folder), tokenizer


def load_base_of(
    folder: AdapterFolder, model: str | None, dtype: str, device_map: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model of an adapter, without the adapter. The arguments are those of `load_adapted`."""
    return _load_base([folder], model, dtype, device_map)


def load_bank(
    folders: Mapping[str, AdapterFolder], model: str | None, dtype: str, device_map: str | None = None
) -> tuple[IA3Model, PreTrainedTokenizerBase]:
    """A base model with a bank of adapters, and its tokenizer.

    Args:
        folders: name → the adapter's folder; at least one.
        model: the base model; None: the one that all adapters name.
        dtype: the type of its weights, as `load_base` takes it.
        device_map: where they go, as `load_base` takes it.
    """
    base, tokenizer = _load_base([*folders.values()], model, dtype, device_map)
    from ia3.adapter.model import IA3Model
    from ia3.bank import AdapterBank

    adapted = IA3Model(base, {}).eval()
    # With columns for adapters of both kinds.
    bank = AdapterBank(adapted, dataclasses.replace(next(iter(folders.values())).config, acts_from="start"))
    for name, folder in folders.items():
        bank.load(folder, name)
        folder.require_unchanged()
    return adapted, tokenizer


def _load_base(
    folders: Sequence[AdapterFolder], model: str | None, dtype: str, device_map: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model that adapters name, or the given one."""
    first, *others = folders
    name = model or first.config.base
    if not name:
        raise InputError(f"The adapter's {CONFIG_NAME} in {str(first)!r} names no base model; say which: --model.")
    for other in others:
        its = other.config.base
        if model is None and its != name:
            raise InputError(
                f"Expected adapters of one base model, found {name!r} in {str(first)!r} and {its!r} in {str(other)!r}; "
                f"give --model if they are the same."
            )
    quiet()
    from ia3.adapter.pretrained import HEADED, load_base

    kind, labels = first.config.task_type, None
    if kind in HEADED and first.task is not None:
        labels = first.task.labels
    return load_base(name, labels, dtype, kind, device_map)


def _moved(opinions: Opinions, prior: str | None, labels: Sequence[str] | None) -> Opinions:
    """An adapter's opinions for --prior.

    Raises:
        InputError: shares that do not fit the labels, or an adapter whose folder does not say what it has seen.
    """
    from ia3.opinions.priors import prior_of

    if prior is None:
        return opinions
    if not opinions.seen or labels is None:
        raise InputError(
            "Expected an adapter that says how frequent labels were in its training, found one that does not",
            "train it with --opinions auto, or leave out",
            argument="prior",
        )
    return opinions.toward(prior_of(prior, labels))
