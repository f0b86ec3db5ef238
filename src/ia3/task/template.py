"""Templates: a Jinja template that turns a row into a prompt, with answer texts."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.nodes
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from ia3.errors import InputError, brief, reason, shown
from ia3.task import sandbox

Row = Mapping[str, Any]

Choices = dict[str, str] | str
"""Label → answer text, each a Jinja template; or a template of a row's answers, whose labels are positions."""

# Between a prompt and its answer, and between answer choices, in published prompt collections.
BAR = "|||"

# The maximum of a task's answers that may be templates, because each is compiled.
_MOST_ANSWERS = 256

# Variables of a template beside the columns: the whole row, and the row's answer texts.
_GIVEN = {"row", "answer_choices"}


_ENVIRONMENT = sandbox.Environment()
# Here a list stays a list, because it holds a row's answers.
_LISTS = sandbox.Environment(lambda value: BAR.join(map(str, value)) if isinstance(value, (list, _List)) else value)


def _one_text(value: Any) -> Any:
    if isinstance(value, (list, tuple, set, dict)):
        raise ValueError(
            f"expected a text, found {brief(value)}; join a list's items, {{{{ … | join(', ') }}}}, or write JSON, {{{{ … | tojson }}}}"
        )
    return value


# Here a list is no text: nobody wants a model to learn Python's signs around its items.
_TEXTS = sandbox.Environment(_one_text)


def parse(source: str) -> jinja2.nodes.Template:
    """A template as a tree. Raises `ValueError` for an invalid template."""
    _compiled(source)  # also finds unknown filters
    return sandbox.parse(source)


@functools.lru_cache(maxsize=1024)
def _compiled(source: str, environment: sandbox.Environment = _ENVIRONMENT) -> jinja2.Template:
    return environment.compiled(sandbox.parse(source))


@functools.lru_cache(maxsize=1024)
def _compiled_prompt(source: str) -> jinja2.Template:
    return _ENVIRONMENT.compiled(_prompt_tree(source))


def _prompt_tree(source: str) -> jinja2.nodes.Template:
    tree = parse(source)
    _cut_at_bar(tree)
    return tree


def _cut_at_bar(node: jinja2.nodes.Node) -> bool:
    """Remove the text of a template after `|||`, also inside a condition; return whether there was any."""
    found = False
    for _, value in node.iter_fields():
        children = value if isinstance(value, list) else [value]
        for i, child in enumerate(children):
            if isinstance(child, jinja2.nodes.TemplateData) and BAR in child.data:
                child.data = child.data.partition(BAR)[0]
                del children[i + 1 :]
                found = True
            elif isinstance(child, jinja2.nodes.Node) and _cut_at_bar(child):
                found = True
                if isinstance(child, jinja2.nodes.Output):
                    del children[i + 1 :]
    return found


@functools.lru_cache(maxsize=1024)
def _says_answer(source: str) -> bool:
    return BAR in source and _cut_at_bar(parse(source))


@functools.lru_cache(maxsize=1024)
def _sees_answers(source: str) -> bool:
    return "answer_choices" in sandbox.names_in(_prompt_tree(source))


@functools.lru_cache(maxsize=1024)
def _columns(source: str) -> tuple[str, ...]:
    """The columns that a template names before `|||`, directly or as `row["…"]`, in alphabetical order."""
    if not has_jinja(source):
        return ()
    tree = _prompt_tree(source)
    names = sandbox.names_in(tree) - _GIVEN
    for node in tree.find_all((jinja2.nodes.Getitem, jinja2.nodes.Getattr)):
        if isinstance(node.node, jinja2.nodes.Name) and node.node.name == "row":
            name = node.attr if isinstance(node, jinja2.nodes.Getattr) else getattr(node.arg, "value", None)
            names |= {name} if isinstance(name, str) else set()
    return tuple(sorted(names))


def _parts(tree: jinja2.nodes.Template) -> list[jinja2.nodes.Node]:
    """What a template prints and does, one thing after another."""
    found: list[jinja2.nodes.Node] = []
    for node in tree.body:
        pieces = node.nodes if isinstance(node, jinja2.nodes.Output) else None
        found += [node] if pieces is None else [jinja2.nodes.Output([piece], lineno=node.lineno) for piece in pieces]
    return found


def _printed(part: jinja2.nodes.Node) -> str | None:
    """The column that a part of a template prints as it is: `{{ text }}`, `{{ row["text"] }}`; None for anything else."""
    if not isinstance(part, jinja2.nodes.Output):
        return None
    [node] = part.nodes
    if isinstance(node, jinja2.nodes.Name):
        return node.name
    if isinstance(node, (jinja2.nodes.Getitem, jinja2.nodes.Getattr)) and isinstance(node.node, jinja2.nodes.Name):
        name = node.attr if isinstance(node, jinja2.nodes.Getattr) else getattr(node.arg, "value", None)
        return name if node.node.name == "row" and isinstance(name, str) else None
    return None


@functools.lru_cache(maxsize=1024)
def _compiled_question(source: str) -> jinja2.Template | None:
    """What a prompt says behind all that it takes of a row; None when nothing is left."""
    behind: list[jinja2.nodes.Node] = []
    for part in reversed(_parts(_prompt_tree(source))):
        # A name that is set in front of this part counts as a column, for it may have been made of one.
        if sandbox.names_in(_tree_of([part])) - {"answer_choices"}:
            break
        behind.insert(0, part)
    return _ENVIRONMENT.compiled(_tree_of(behind)) if behind else None


@functools.lru_cache(maxsize=1024)
def _question(source: str, answers: tuple[str, ...]) -> str:
    """`Template.question`, once for all rows that have the same answers."""
    behind = _compiled_question(source)
    return "" if behind is None else _render(behind, {}, answer_choices=list(answers)).rstrip()


def _tree_of(nodes: list[jinja2.nodes.Node]) -> jinja2.nodes.Template:
    return jinja2.nodes.Template(nodes, lineno=1)


def has_jinja(source: str) -> bool:
    """Whether a template is more than plain text."""
    return any(mark in source for mark in ("{{", "{%", "{#"))


def verbatim(text: str) -> str:
    """A template that gives exactly this text."""
    return f"{{{{ {quoted(text)} }}}}" if has_jinja(text) or BAR in text else text


def quoted(text: str) -> str:
    """A text as a string literal in a template's expression, without characters that end the expression."""
    return repr(text).replace("|", "\\x7c")


def as_text(value: Any) -> str:
    """A label as text. YAML reads `yes` as true; whole numbers may come as floats."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def is_missing(value: Any) -> bool:
    """Whether a cell is empty."""
    return value is None or value != value or not str(value).strip()  # NaN differs from itself


def choices_as_text(value: Any) -> Any:
    """Choices from a file: labels and answers as text; a list of labels becomes label → label."""
    if isinstance(value, (list, tuple)):
        _require_texts(value)
        value = {label: label for label in value}
    if isinstance(value, Mapping):
        _require_texts(value.values())
        texts = {as_text(label): as_text(answer) for label, answer in value.items()}
        if len(texts) < len(value) or len(texts) < 2:
            raise ValueError(f"expected at least two labels that differ as text, found {brief(list(value))}")
        answers = list(texts.values())
        if not all(answers) or len(set(answers)) < len(answers):
            raise ValueError(f"expected answer texts that differ and are not empty, found {brief(answers)}")
        templates = list(filter(has_jinja, answers))
        if len(templates) > _MOST_ANSWERS:
            raise ValueError(f"expected at most {_MOST_ANSWERS} answers that are templates, found {len(templates)}")
        for template in templates:
            parse(template)
        return texts
    if isinstance(value, str):
        parse(value)
        if not has_jinja(value):  # the same answers for every row
            return choices_as_text({str(place): part for place, part in enumerate(value.split(BAR))})
    return value


def _require_texts(values: Iterable[Any]) -> None:
    for value in values:
        if value is None or isinstance(value, (Mapping, list, tuple, set)):
            raise ValueError(
                f"expected choices as `label: text`, a line for each and without dashes, or as a list of labels, found "
                f"{brief(value)} as a text"
            )


def columns_of(choices: Choices) -> set[str]:
    """The columns that answer texts name."""
    sources = choices.values() if isinstance(choices, dict) else [choices]
    return {name for source in sources for name in _columns(source)}


def answers_of(choices: Choices, row: Row) -> dict[str, str]:
    """Label → answer text, for a row. Raises `InputError` if there are none or two are equal."""
    if isinstance(choices, dict) and not has_jinja("\n".join(choices.values())):  # at once: each row of a file asks
        return choices
    require(row, columns_of(choices))
    if isinstance(choices, dict):
        texts, most = [], sandbox.most_characters()
        for source in choices.values():
            with sandbox.bounded(most - sum(map(len, texts))):  # of all answers together
                texts.append(_render(_compiled(source), row).strip())
    else:
        texts = [part.strip() for part in _render(_compiled(choices, _LISTS), row, _LISTS).split(BAR)]
    if len(texts) < 2 or not all(texts) or len(set(texts)) < len(texts):
        raise InputError(f"Expected at least two answer texts that differ, found {brief(texts)}", "correct the row")
    labels = choices if isinstance(choices, dict) else map(str, range(len(texts)))
    return dict(zip(labels, texts, strict=True))


def rendered(source: str, row: Row) -> str:
    """A template's text for a row, without white space around it.

    Raises:
        InputError: it cannot be rendered, or prints a list or a dictionary.
    """
    require(row, _columns(source))
    return _render(_compiled(source, _TEXTS), row, _TEXTS).strip()


def _render(template: jinja2.Template, row: Row, environment: sandbox.Environment = _ENVIRONMENT, **seen: Any) -> str:
    values = {name: _cell(value) for name, value in row.items()}
    try:
        return environment.rendered(template, {**values, "row": values, **seen})
    except sandbox.TooLong:
        raise
    except Exception as error:  # a template can raise any error
        raise InputError(f"Cannot render the template: {reason(error)}", f"the columns are {shown(row, 20)}") from error


def require(row: Row, names: Iterable[str]) -> None:
    """Raise `InputError` if the row lacks a column that a template names."""
    missing = sorted(name for name in names if name not in row)
    if missing:
        raise InputError(
            f"The template names {shown(missing)}, but the columns are {shown(row, 20)}",
            "rename the column, or change the template",
        )


def items_of(value: Any) -> list[Any] | None:
    """The items of a cell that is a list, or a list as JSON in a text file; otherwise None."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):  # a text that starts with a bracket, but is no JSON
            return None
    return value if isinstance(value, list) else None


class _List(str):
    """A list that a cell of a file holds as JSON. Templates iterate over its items, and print the cell's text."""

    items: list[Any]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


def _cell(value: Any) -> Any:
    """A cell as templates see it."""
    if isinstance(value, str) and (items := items_of(value)) is not None:
        value = _List(value)
        value.items = items
    return "" if value is None else value


class _Digits(str):
    """Digits in a text file. They index, compare, subtract and count both as text and as a number."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return int(str(self)) == other if isinstance(other, int) else str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __bool__(self) -> bool:
        return bool(int(str(self)))

    def __index__(self) -> int:
        return int(str(self))

    def __sub__(self, other: int) -> int:
        return int(str(self)) - int(other)

    def __rsub__(self, other: int) -> int:
        return int(other) - int(str(self))


def _numbered(row: Row) -> Row:
    """The row with digits as numbers, because published templates use labels as positions."""
    return {key: _Digits(v.strip()) if isinstance(v, str) and v.strip().isdecimal() else v for key, v in row.items()}


class Template(BaseModel):
    """A template of a task: prompt and answer texts.

    Attributes:
        name: the name for tables; may be empty.
        prompt: a Jinja template. It sees a row's columns by name, and the whole row as `row`, for names that are no
            identifiers: `{{ row["Review Text"] }}`; and the answer texts as a list, `answer_choices`. Text after `|||`
            is the right answer's text, like `target`.
        choices: the answer texts of this template, in the forms of `Task.choices`; None: the task's.
        target: a Jinja template of the right answer's text that sees a row and its `answer_choices`; None: the row's
            label decides.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = ""
    prompt: str
    choices: Choices | None = None
    target: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"prompt": value}
        if isinstance(value, Mapping) and BAR in str(value.get("prompt", "")):
            parts = str(value["prompt"]).split(BAR)
            try:
                for part in parts:
                    parse(part)
            except ValueError:  # inside a condition or a text
                return value
            if len(parts) > 2 or value.get("target") is not None:
                raise ValueError(f"expected one answer behind {BAR}, found several")
            value = {**value, "prompt": parts[0], "target": parts[1].strip()}
        return value

    @field_validator("choices", mode="before")
    @classmethod
    def _choices_are_text(cls, value: Any) -> Any:
        return choices_as_text(value)

    @field_validator("prompt", "target")
    @classmethod
    def _parses(cls, value: str | None) -> str | None:
        if value is not None:
            parse(value)
        return value

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the prompt names, in alphabetical order."""
        return _columns(self.prompt)

    @property
    def sees_answers(self) -> bool:
        """Whether the prompt names `answer_choices`."""
        return _sees_answers(self.prompt)

    @property
    def asks_behind(self) -> bool:
        """Whether the question stands behind what the prompt takes of a row, so that the row can be read before it."""
        return bool(self.columns) and bool(self.question(("a", "b")))

    @property
    def says_answer(self) -> bool:
        """Whether the template says which answer is right, instead of a label."""
        return self.target is not None or _says_answer(self.prompt)

    def fill(self, row: Row, answers: Iterable[str] = ()) -> str:
        """The prompt of a row, without trailing white space. It may be empty.

        Args:
            row: column → value.
            answers: the row's answer texts, if the template uses them.

        Raises:
            InputError: the template cannot be rendered.
        """
        return _render(_compiled_prompt(self.prompt), row, answer_choices=list(answers)).rstrip()

    def question(self, answers: Iterable[str] = ()) -> str:
        """What a prompt ends in behind the last that it takes of a row: "…?" of "{{ text }} …?". Arguments as of `fill`."""
        return _question(self.prompt, tuple(answers))

    def pieces(self, answers: Iterable[str] = ()) -> list[str | dict[str, str]] | None:
        """The prompt without Jinja: texts, and columns that stand there as they are; None if it is more than that.

        >>> Template(prompt="{{ text }} It was").pieces()
        [{'column': 'text'}, ' It was']

        Joined, without white space at its end, that is what `fill` returns. `answers` are as of `fill`.
        """
        tree, answers = _prompt_tree(self.prompt), list(answers)
        if next(tree.find_all((jinja2.nodes.Assign, jinja2.nodes.AssignBlock)), None) is not None:
            return None  # a name may be set that is a column's
        found: list[str | dict[str, str]] = []
        for part in _parts(tree):
            name = _printed(part)
            if not sandbox.names_in(_tree_of([part])) - {"answer_choices"}:
                found.append(_render(_ENVIRONMENT.compiled(_tree_of([part])), {}, answer_choices=answers))
            elif name in self.columns:
                found.append({"column": str(name)})
            else:
                return None
        return found

    def right_answer(self, row: Row, answers: Iterable[str]) -> str:
        """The right answer's text, if the template says it; arguments and errors are those of `fill`."""
        whole = self.prompt if self.target is None else self.target
        text = _render(_compiled(whole), _numbered(row), answer_choices=list(answers))
        return (text.rpartition(BAR)[2] if self.target is None else text).strip()
