"""A text classifier with scikit-learn's interface: `FewShotClassifier`."""

from __future__ import annotations

import collections
import json
import numbers
import os
import random
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from ia3.adapter.pretrained import EMBEDDED_MODEL
from ia3.adapter.stored import CARD_NAME, METRICS_NAME
from ia3.errors import InputError, brief, shown
from ia3.files import CONFIG_NAME, to_json
from ia3.folder import AdapterFolder
from ia3.opinions.opinions import Opinions
from ia3.task.rows import as_row, items_of
from ia3.task.task import Task
from ia3.task.template import Row, as_text, is_missing
from ia3.training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ia3.adapter.model import IA3Model
    from ia3.evaluation.prediction import Prediction
    from ia3.scoring.readings import Readings

# The key of the labels, with their types, in metrics.json.
_CLASSES = "classes"

Files = dict[str, bytes]
"""An adapter's folder in memory: name → content."""


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """A classifier of texts, trained on a few dozen labelled examples.

        classifier = FewShotClassifier().fit(texts, labels)
        classifier.predict(["I was charged twice this month"])
        classifier.save("adapters/tickets")

    It is a scikit-learn estimator and works in pipelines, cross-validation, grid searches and `joblib.dump`. Training
    makes an (IA)³ adapter and does not change the base model. All classifiers in a process share the base model if they
    name the same one. The last base model stays in memory. `joblib.dump` stores only the adapter; `predict` then loads
    the base model by its name.

    Rows are texts, or have several columns: a DataFrame, dictionaries, or an array, whose columns are "x0", "x1", ….
    Labels are texts, integers or booleans. Where rows have several labels each, y is an indicator matrix, as of
    scikit-learn's MultiLabelBinarizer.

    Args:
        model: the base model: a folder, a hub id, "smollm2" or "minilm", as `load_base` takes it.
        template: the prompt, a Jinja template that names columns; one column if rows are texts. None: the rows of `fit`
            choose a wording; `task_` has it.
        choices: label → answer text. None: the labels.
        task: a `Task`, its file or the name of a built-in one, instead of template and choices.
        recipe: how to train: a `Recipe`, "paper", "small", "sentence" or a file. None: the one for a model of that kind and size.
        dtype: the type of the base model's weights, as `load_base` takes it.
        random_state: decides the order in which training sees the rows, and the random templates.
        verbose: show progress during training.
        class_weight: how much a row of each label counts: "balanced", n / (k · n_label), or label → weight, as scikit-learn's;
            None: the task's, or all the same.
        device_map: where the base model's weights go, as `load_base` takes it: "auto" for one that no device holds alone.

    Attributes:
        classes_: the labels, in the order of `predict_proba`'s columns; of an indicator matrix the names of its columns, or
            their numbers.
        task_: the `Task` of the classifier.
        recipe_: the `Recipe` that it was trained with.
        temperature_: divides the scores; 1 unless a calibrated adapter was loaded.
        opinions_: what answers, and how much each part counts (`Opinions`).
        n_features_in_, feature_names_in_: the columns of a DataFrame or an array.
    """

    def __init__(
        self,
        model: str | os.PathLike = EMBEDDED_MODEL,
        template: str | None = None,
        choices: Mapping[Any, str] | None = None,
        task: Task | str | os.PathLike | None = None,
        recipe: Recipe | str | os.PathLike | None = None,
        dtype: str = "auto",
        random_state: int | np.random.RandomState | None = 0,
        verbose: bool = False,
        class_weight: Literal["balanced"] | Mapping[Any, float] | None = None,
        device_map: str | None = None,
    ) -> None:
        self.model = model
        self.template = template
        self.choices = choices
        self.task = task
        self.recipe = recipe
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose
        self.class_weight = class_weight
        self.device_map = device_map

    def __sklearn_tags__(self) -> Any:
        """The estimator's capabilities for scikit-learn."""
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.dict = True
        tags.input_tags.allow_nan = True  # a row may have empty cells beside others
        tags.classifier_tags.multi_label = True
        tags.classifier_tags.poor_score = True  # for numbers, because it reads them as text
        return tags

    def fit(self, X: Any, y: Any) -> FewShotClassifier:
        """Train on all labelled rows.

        Args:
            X: N texts or rows.
            y: N labels. If y is a Series, the prompt contains its name. Or whether each row has each label (N, labels); a
                DataFrame's columns name them, otherwise `choices` gives answer texts to their numbers.

        Raises:
            InputError: a row or label is missing or empty, all labels are equal, `choices` or `task` lack a label, or a
                parameter names no model, task or recipe.
        """
        if y is None:
            raise InputError("FewShotClassifier requires y to be passed, but the target y is None.")
        name, seed = _path("model", self.model), self.random_state
        check_random_state(seed)
        if not isinstance(seed, numbers.Integral):
            seed = check_random_state(seed).randint(2**31)
        recipe = _loaded("recipe", self.recipe, Recipe, Recipe.load)
        items = self._items(X, reset=True)
        several = _indicators(y)
        values: Any = _label_values(y) if several is None else several[1]
        if len(items) != len(values):
            raise InputError(f"Expected a label for each of the {len(items)} rows, found {len(values)}.")
        cells: list[Any] = [_in_words(value) for value in values] if several is None else _label_sets(*several)
        task = self._task(items, cells, getattr(y, "name", None), None if several is None else several[0])
        if self.class_weight is not None:
            weights = self.class_weight
            if isinstance(weights, Mapping):
                weights = {_in_words(label): weight for label, weight in weights.items()}
            task = task.changed(class_weight=weights)
        rows = [
            {
                **as_row(item, task, number),
                task.label_column: cell,
                **{name: name in cell for name in task.label_columns},
            }
            for number, (item, cell) in enumerate(zip(items, cells, strict=True), 1)
        ]
        task.check(rows)
        from ia3.evaluation.drawing import require_different

        require_different(rows, [task.fingerprint(row) for row in rows])
        by_label = (
            _values_by_label(task, rows, values) if several is None else {_in_words(name): name for name in several[0]}
        )
        base = _base(name, self.dtype, self.device_map, [*by_label])
        recipe = recipe or Recipe.for_model(name)
        if task.multi_label:
            from ia3.evaluation.label_sets import require_label_sets

            require_label_sets(task, rows, recipe)
        from ia3.scoring.readings import Readings

        readings = Readings()  # what the search for a wording reads, training asks
        recipe = base.where_vectors_pay(task, rows, recipe)
        task = base.worded(task, rows, recipe, readings)
        labels = [*by_label.values()]
        self._files, opinions = base.train(task, rows, recipe, int(seed), self.verbose, labels, readings)
        self._keep(base, task, recipe, 1.0, opinions, by_label, object if values.dtype == object else None)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The most probable label of each row (N,), with the type of the labels in `fit`; for a task with costs, the label with the
        least expected cost. Where rows have several labels, whether each row has each label (N, labels)."""
        found = self._predictions(X)
        if self.task_.multi_label:
            return np.array([[int(label in item.best) for label in self._labels] for item in found])
        return self.classes_[[self._labels.index(item.best) for item in found]]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each label (N, labels), in the order of `classes_`.

        Raises:
            NotFittedError: before `fit`.
            InputError: a row is empty or lacks a column.
        """
        found = self._predictions(X)
        return np.array([[item.probabilities[label] for label in self._labels] for item in found])

    def _predictions(self, X: Any) -> list[Prediction]:
        check_is_fitted(self)
        from ia3.evaluation.prediction import predict

        task = self.task_
        rows = [as_row(item, task, number) for number, item in enumerate(self._items(X, reset=False), 1)]
        with self._lent() as (model, tokenizer):
            return predict(
                model,
                tokenizer,
                task,
                rows,
                temperature=self.temperature_,
                recipe=self.recipe_,
                opinions=self.opinions_,
            )

    def save(self, folder: str | os.PathLike) -> None:
        """Write the adapter's folder for the commands, as `ia3 train` does: `ia3 predict FOLDER "some text"`.

        Raises:
            NotFittedError: before `fit`.
        """
        check_is_fitted(self)
        with self._lent() as (model, _):
            model.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None, **kwargs: Any) -> str:
        """Upload the adapter's folder to a hub repository: `FewShotClassifier.load("owner/name")`.

        Args and result: see `AdapterFolder.push_to_hub`.

        Raises:
            NotFittedError: before `fit`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            return AdapterFolder(folder).push_to_hub(repo_id, private, token, **kwargs)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        model: str | os.PathLike | None = None,
        dtype: str = "auto",
        device_map: str | None = None,
    ) -> FewShotClassifier:
        """Load a classifier from a folder that `save` or `ia3 train` wrote.

        Args:
            folder: the adapter's folder or hub id ("owner/name", "owner/name@v1").
            model: the base model; None: the one that the adapter names.
            dtype: the type of its weights.
            device_map: where they go.

        Raises:
            InputError: the folder has no adapter, or one for another model, without a task, or with answers that differ
                from row to row.
        """
        found = AdapterFolder(folder)
        task = found.required_task()
        name = found.config.base if model is None else model
        if name is None:
            raise InputError(f"The adapter in {brief(str(folder))} names no base model; say which: load(…, model=…).")
        labels = _labels_of(task)
        values = found.metrics.get(_CLASSES, labels)
        if not isinstance(values, list) or sorted(map(_in_words, values)) != sorted(labels):
            raise InputError(
                f"Expected the labels {shown(labels)} as {_CLASSES!r} in {METRICS_NAME} of {brief(str(folder))}, found "
                f"{brief(values)}; delete it."
            )
        made = cls(name, task=task, recipe=found.recipe, dtype=dtype, device_map=device_map)
        base = _base(_path("model", name), dtype, device_map, labels, found.config.task_type)
        made._files = base.load(found)
        by_label = {_in_words(value): value for value in values}
        made._keep(base, task, found.recipe, found.temperature, found.opinions, by_label)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """The state without the base model."""
        return {name: value for name, value in super().__getstate__().items() if name != "_base"}  # type: ignore[misc]

    def _keep(
        self,
        base: _Base,
        task: Task,
        recipe: Recipe,
        temperature: float,
        opinions: Opinions,
        by_label: Mapping[str, Any],
        dtype: type | None = None,
    ) -> None:
        """Set the fitted attributes; `by_label` maps the task's labels to those that `predict` returns."""
        classes = np.array([*by_label.values()], dtype=dtype)
        order = np.arange(len(classes)) if task.multi_label else classes.argsort()
        self.classes_, self._labels = classes[order], [[*by_label][i] for i in order]
        self.task_, self.recipe_, self.temperature_, self.opinions_ = task, recipe, temperature, opinions
        self._base, self._loading = base, (base.name, self.dtype, self.device_map)

    @contextmanager
    def _lent(self) -> Iterator[tuple[IA3Model, PreTrainedTokenizerBase]]:
        """In a `with` block, the base model with this adapter, and its tokenizer."""
        if "_base" not in vars(self):
            self._base = _base(*self._loading, self._labels, json.loads(self._files[CONFIG_NAME])["task_type"])
        with self._base.lent(self._files) as model:
            yield model, self._base.tokenizer

    def _items(self, X: Any, reset: bool) -> list[Any]:
        """X as texts or dictionaries. Without `reset`, a table must have the same columns as in `fit`."""
        if reset:
            vars(self).pop("n_features_in_", None)  # scikit-learn keeps it if it finds no columns
        if hasattr(X, "iloc") and hasattr(X, "columns"):
            if reset or hasattr(self, "feature_names_in_"):
                validate_data(self, X, reset=reset, skip_check_array=True)
        elif _is_array(X):
            cells: Any = validate_data(self, X, reset=reset, dtype=None, ensure_all_finite="allow-nan")
            if cells.shape[1] == 1:
                return ["" if is_missing(cell) else str(cell) for cell in cells[:, 0]]
            names = getattr(self, "feature_names_in_", [f"x{number}" for number in range(cells.shape[1])])
            X = [
                {name: None if cell != cell else cell for name, cell in zip(names, row, strict=True)}  # NaN is missing
                for row in cells.tolist()
            ]
        items = items_of(X, None if reset else self.task_)
        if not items:
            raise InputError("Expected at least one row, found none.")
        return items

    def _task(self, items: Sequence[Any], cells: Sequence[Any], name: Any, several: Sequence[Any] | None) -> Task:
        """The task of the parameters, or one made from rows and labels; `name` is the label column, and `several` the labels of
        which rows have several."""
        task = _loaded("task", self.task, Task, Task.load)
        if task is not None:
            if self.template is not None or self.choices is not None:
                raise InputError("Expected a task, or template and choices, found both; a task has its own.")
            if sorted(_labels_of(task)) != sorted(map(_in_words, several or _labels_of(task))):
                raise InputError(
                    f"Expected the labels {shown(_labels_of(task))} as columns of y, found {shown(several or ())}."
                )
            if task.multi_label and several is None:
                raise InputError(
                    "Expected an indicator matrix as y for a multi-label task, found one label for each row."
                )
            return task
        choices = self.choices
        if choices is not None:
            if not isinstance(choices, Mapping):
                raise InputError(f"Expected choices as a dictionary, label → answer text, found {brief(choices)}.")
            choices = {_in_words(label): text for label, text in choices.items()}
        named = dict.fromkeys(str(key) for item in items if isinstance(item, Mapping) for key in item)
        columns = list(named) or ["text"]
        if isinstance(name, str) and name:
            if name in columns:
                raise InputError(f"Expected rows without the column of their labels, {brief(name)}; drop it from X.")
        else:
            name = "label"
            while name in columns:
                name += "_"
        cells = cells if several is None else [[_in_words(label) for label in several], *cells]  # also labels of no row
        rows = [{**dict.fromkeys(columns), name: cell} for cell in cells]
        return Task.infer(rows, name, columns if self.template is None else None, choices, self.template)


class _Base:
    """A base model that classifiers share. It holds one classifier's adapter at a time.

    Args:
        name: the name or path to load it from.
        dtype: the type of its weights.
        device_map: where they go.
        labels: the labels of an encoder's head.
        kind: as `load_base` takes it.
    """

    def __init__(
        self, name: str, dtype: str, device_map: str | None, labels: Sequence[str], kind: str | None = None
    ) -> None:
        from ia3.adapter.model import IA3Model
        from ia3.adapter.pretrained import load_base

        base, self.tokenizer = load_base(name, labels, dtype, kind, device_map)
        self.name = str(base.name_or_path)
        self.model = IA3Model(base, {}).eval()
        self._files: Files | None = None  # the files of the adapter in the model
        self._lock = threading.RLock()

    @contextmanager
    def lent(self, files: Files) -> Iterator[IA3Model]:
        """In a `with` block, the model has the adapter of these files, and is locked for other threads."""
        with self._lock:
            if self._files is not files:
                with tempfile.TemporaryDirectory() as folder:
                    for name, data in files.items():
                        Path(folder, name).write_bytes(data)
                    self._load(folder)
                self._files = files
            yield self.model

    def load(self, folder: AdapterFolder) -> Files:
        """Load an adapter into the model, and return its files."""
        with self._lock:
            self._load(folder)
            return self._written()

    def where_vectors_pay(self, task: Task, rows: Sequence[Row], recipe: Recipe) -> Recipe:
        """The recipe, with heads alone where no vectors are worth their time."""
        from ia3.evaluation.forming import where_vectors_pay
        from ia3.evaluation.progress import Progress
        from ia3.scoring.families import family_of

        reads_answers = family_of(self.model, self.tokenizer).reads_answers
        return where_vectors_pay(recipe, [(task, rows)], reads_answers, 0, Progress())

    def worded(self, task: Task, rows: Sequence[Row], recipe: Recipe, readings: Readings) -> Task:
        """The task in the wordings that suit labelled rows best, if it has candidates."""
        from ia3.evaluation.wordings import choose_wording

        with self._lock:
            self._remove()
            return choose_wording(self.model, self.tokenizer, task, rows, recipe, readings=readings)[0]

    def train(
        self,
        task: Task,
        rows: Sequence[Row],
        recipe: Recipe,
        seed: int,
        verbose: bool,
        classes: Sequence[Any],
        readings: Readings,
    ) -> tuple[Files, Opinions]:
        """Train an adapter; return its files and opinions. `classes` are the task's labels with the user's types."""
        from ia3.adapter.config import IA3Config
        from ia3.adapter.pretrained import task_type
        from ia3.evaluation.card import trained_card
        from ia3.evaluation.forming import form_opinions, forms_opinions
        from ia3.evaluation.label_sets import form_label_sets, require_reading
        from ia3.evaluation.learner import Learner
        from ia3.evaluation.progress import Progress
        from ia3.evaluation.start import Start
        from ia3.opinions.priors import weighted_shares
        from ia3.training.described import described
        from ia3.training.members import Member
        from ia3.training.trainer import TFewTrainer

        with self._lock, _own_randomness(), tempfile.TemporaryDirectory() as folder:
            self._remove()
            if recipe.init is None:
                kind, place = task_type(self.model.model), recipe.place(self.model.model, task)
                config = IA3Config(
                    task_type=kind,
                    base_model_name_or_path=self.name,
                    target_modules=recipe.target_modules,
                    acts_from=place,
                )
                self.model.add_adapter("default", config)
            else:
                Start(recipe.init).load(self.model, "default")
                self.model.peft_config["default"].base_model_name_or_path = self.name
            self.model.set_adapter("default")
            arguments = recipe.training_arguments(folder, seed=seed, save_strategy="no", disable_tqdm=not verbose)
            kept = readings if self.model.waits_for_question() else None
            trainer = TFewTrainer(
                self.model, arguments, self.tokenizer, Member(task, rows, known=task.taught(rows)), recipe, kept
            )
            reads_answers = trainer.scorer.family.reads_answers
            require_reading([task], reads_answers)
            forms = task.multi_label or forms_opinions(recipe, task, reads_answers)
            if not verbose:
                trainer.silence()
            if recipe.opinions != "head":
                trainer.train()
            else:
                self.model.adapter_folders["default"] = described(task, recipe, rows, None)
            self.model.eval()
            files, opinions = self._written(), Opinions()
            if forms:
                form = form_label_sets if task.multi_label else form_opinions
                learner = Learner(self.model, self.tokenizer, task, rows, recipe, seed, folder, kept)
                opinions = form(Progress(), "", learner).opinions
                if not task.multi_label:
                    labels = [task.label(row) for row in rows]
                    shares = weighted_shares(labels, task.weights(labels), _labels_of(task))
                    opinions = opinions.toward(shares, shares)
                files |= opinions.files()
            metrics = json.loads(files[METRICS_NAME])
            metrics[_CLASSES] = [value.item() if isinstance(value, np.generic) else value for value in classes]
            files[METRICS_NAME] = to_json(metrics).encode()
            known = {"opinions": {"weights": opinions.weights}, **metrics}
            files[CARD_NAME] = trained_card(task, recipe, known, self.model.peft_config["default"]).encode()
        return files, opinions

    def _load(self, folder: AdapterFolder | str) -> None:
        self._remove()
        self.model.load_adapter(folder, "default")
        self.model.set_adapter("default", inference_mode=True)

    def _remove(self) -> None:
        self._files = None
        for name in list(self.model.peft_config):
            self.model.delete_adapter(name)

    def _written(self) -> Files:
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


# Base models that classifiers use, by name, type, file stamps and labels. The one used last stays in memory.
_BASES: weakref.WeakValueDictionary[tuple, _Base] = weakref.WeakValueDictionary()
_USED_LAST: collections.deque[_Base] = collections.deque(maxlen=1)
_LOADING = threading.Lock()


def _base(name: str, dtype: str, device_map: str | None, labels: Sequence[str], kind: str | None = None) -> _Base:
    """The base model of this name, loaded if it is not in memory."""
    from ia3.adapter.pretrained import HEADED, find_base, task_type

    found, source = find_base(name)
    files = sorted(os.scandir(source), key=lambda file: file.name) if os.path.isdir(source) else []
    stamp = tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    # An encoder has a head for its labels; other models serve any labels.
    key = (found, dtype, device_map, stamp, *([kind] if kind in HEADED else []))
    with _LOADING:
        base = _BASES.get(key) or _BASES.get((*key, *sorted(labels)))
        if base is None:
            _USED_LAST.clear()  # so that memory never holds both
            base = _Base(name, dtype, device_map, labels, kind)
            head = sorted(labels) if task_type(base.model.model) in HEADED else ()
            _BASES[(*key, *head)] = base
        _USED_LAST.append(base)
    return base


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Restore the global random generators after a `with` block."""
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _path(parameter: str, value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"Expected a name or a path as {parameter}, found {brief(value)}.")
    return str(os.fspath(value))


def _loaded(name: str, value: Any, kind: type, load: Callable[[str], Any]) -> Any:
    """A parameter's object: itself if it has this type or is None, otherwise loaded from the name or path."""
    return value if value is None or isinstance(value, kind) else load(_path(name, value))


def _is_array(X: Any) -> bool:
    """Whether X is an array of rows without column names, or lists that form one."""
    if isinstance(X, (list, tuple)):
        first = next(iter(X), None)
        return isinstance(first, (list, tuple, np.ndarray)) or (isinstance(first, numbers.Number) and first == first)
    if isinstance(X, np.ndarray) and X.ndim == 1:
        return X.dtype.kind not in "OUTS"
    pandas_or_datasets = hasattr(X, "iloc") or hasattr(X, "features")
    return (hasattr(X, "shape") or hasattr(X, "__array__")) and not pandas_or_datasets


def _indicators(y: Any) -> tuple[list[Any], np.ndarray] | None:
    """The labels of an indicator matrix, and the matrix (N, labels); None for one label for each row."""
    try:
        matrix = np.asarray(y.toarray() if hasattr(y, "toarray") else y)  # of a sparse matrix
    except ValueError:  # lists of different lengths
        matrix = np.array([*y], dtype=object)
    lists = matrix.dtype == object and any(isinstance(each, (list, tuple, set, frozenset)) for each in matrix.flat)
    if not lists and (matrix.ndim != 2 or matrix.shape[1] < 2):
        return None
    if lists or not np.isin(matrix, (0, 1)).all():
        raise InputError(
            "Expected a label for each row, or an indicator matrix of 0 and 1, found lists or other values",
            "make a matrix of lists of labels with sklearn.preprocessing.MultiLabelBinarizer",
        )
    return list(getattr(y, "columns", range(matrix.shape[1]))), matrix.astype(bool)


def _label_sets(names: Sequence[Any], matrix: np.ndarray) -> list[list[str]]:
    """The labels of each row of an indicator matrix."""
    return [[_in_words(name) for name, its in zip(names, row, strict=True) if its] for row in matrix]


def _label_values(y: Any) -> Any:
    """The labels y as an array, checked: one per row, all of one type, at least two different."""
    if isinstance(y, (list, tuple)) and len({isinstance(value, str) for value in y}) > 1:
        y = np.array(y, dtype=object)  # numpy would convert all to text
    values = column_or_1d(y, warn=True)
    for number, value in enumerate(values, 1):
        if is_missing(value):
            raise InputError("Expected a label, found none", "fill or drop the row", row=number)
    kinds = sorted({type(value).__name__ for value in values})
    if len(kinds) > 1:
        raise InputError(f"Expected labels of one type, found {shown(kinds)}.")
    check_classification_targets(values)
    different = np.unique(values)
    if len(different) < 2:
        raise InputError(
            f"Expected labels of at least two classes, found one class, {shown(different.tolist())}; there is nothing to "
            f"tell apart."
        )
    return values


def _in_words(label: Any) -> str:
    """A label as text, the form that tasks use."""
    return as_text(label.item() if isinstance(label, np.generic) else label)


def _labels_of(task: Task) -> list[str]:
    """A task's labels. Raises `InputError` if the answers differ from row to row."""
    if task.labels is None:
        raise InputError(
            f"Expected a task with the same labels for all rows, found {brief(task.name)}, whose answers differ from row "
            f"to row; use TFewTrainer and predict."
        )
    return task.labels


def _values_by_label(task: Task, rows: Sequence[Row], values: Sequence[Any]) -> dict[str, Any]:
    """Each task label → the label that `predict` returns: the one in y, or converted to y's type if y lacks it."""
    found: dict[str, Any] = {}
    for number, (row, value) in enumerate(zip(rows, values, strict=True), 1):
        label = task.label(row, number)
        if found.setdefault(label, value) != value:
            raise InputError(
                f"Expected one name for the label {brief(label)}, found {brief(found[label])} and {brief(value)}",
                "use one of them",
                row=number,
            )
    kind = type(values[0])
    for label in _labels_of(task):
        if label not in found:
            try:
                found[label] = kind(label)
            except ValueError:
                found[label] = None
            if found[label] is None or _in_words(found[label]) != label:
                raise InputError(
                    f"Expected labels such as {brief(values[0])} in y, found {brief(label)} among the choices."
                )
    return {label: found[label] for label in _labels_of(task)}
