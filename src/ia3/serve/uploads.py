"""Check uploaded files before other code reads them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import jinja2.nodes as nodes
import yaml

from ia3.adapter.config import IA3Config
from ia3.adapter.pretrained import SENTENCE_MODEL
from ia3.errors import InputError, brief, shown
from ia3.files import WEIGHTS_NAME, parse_json, reading
from ia3.folder import AdapterFolder
from ia3.opinions.opinions import HEADS
from ia3.serve.adapter import FILES
from ia3.task import sandbox
from ia3.task.template import has_jinja

# The limit of bytes of each small file.
_MOST_BYTES = 1 << 20
_DEEPEST = 20

# Allowed parts of an uploaded template: work and result cannot grow beyond the length of the template and the row.
_HARMLESS = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.Getattr, nodes.Getitem, nodes.If,
    nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Test, nodes.Filter, nodes.Concat,
    nodes.Add, nodes.Slice, nodes.List, nodes.Tuple, nodes.Keyword,
)  # fmt: skip
_FILTERS = {
    "capitalize", "default", "d", "first", "int", "last", "length", "lower", "replace", "string", "title", "trim",
    "truncate", "upper",
}  # fmt: skip

# The limit of values in a YAML file: 10,000 labels and their answers, which take a second to read.
_MOST_VALUES = 20_000

# The limit of columns and filters in all templates of a file. Each can be as long and as slow as a request's body.
_MOST_PARTS = 256


def check_names(files: Iterable[str]) -> None:
    """Raise `InputError` unless these are the names of an adapter's files."""
    files = set(files)
    needed = [name for name, its in FILES.items() if its]
    missing = [name for name in needed if name not in files]
    surplus = sorted(files - set(FILES))
    if missing or surplus:
        raise InputError(
            f"Expected files of an upload named {shown(FILES)}, of which {shown(needed)} are needed; missing: {shown(missing)}; "
            f"not taken: {shown(surplus)}."
        )


def check(folder: Path) -> None:
    """Raise `InputError` unless the small files in a folder are safe to read and use.

    The engine checks the vectors, because it knows their shapes.
    """
    for name in FILES:
        path = folder / name
        if not path.is_file() or name in (WEIGHTS_NAME, *HEADS.values()):  # not text; their readers check tensors
            continue
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"Expected {name} of at most {_MOST_BYTES} bytes, found {path.stat().st_size}.")
        with reading(name, f"YAML with at most {_DEEPEST} levels", "correct it"):
            text = path.read_text(encoding="utf-8")
            if name.endswith(".yaml"):
                _check_yaml(text, name)
            else:
                parse_json(text, name, "correct it")
    encoder = AdapterFolder(folder).opinions.encoder
    if encoder not in (None, SENTENCE_MODEL):
        # A name is a path or an address, which are not an uploader's to choose.
        raise InputError(
            f"Expected the sentence encoder {SENTENCE_MODEL} or none in an uploaded adapter, found {brief(encoder)}; put the "
            f"adapter below the server's root instead."
        )
    config = IA3Config.from_pretrained(folder)
    for field in ("target_modules", "exclude_modules", "feedforward_modules"):
        value = getattr(config, field)
        if isinstance(value, str) and value != "all-linear":
            # Matching a pattern can take forever.
            raise InputError(f"Expected {field} of an uploaded config as a list of names, found a regular expression.")


def _check_yaml(text: str, name: str) -> None:
    parts = values = 0
    # Whether the next node in each open collection is a mapping's key; None: the collection is a list.
    is_key: list[bool | None] = []
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent):
            raise InputError(f"Expected YAML without aliases in {name}: they can expand to more than fits into memory.")
        if isinstance(event, yaml.CollectionEndEvent):
            is_key.pop()
        if not isinstance(event, yaml.NodeEvent):
            continue
        named = bool(is_key) and is_key[-1] is True
        if is_key and is_key[-1] is not None:
            is_key[-1] = not is_key[-1]
        if isinstance(event, yaml.CollectionStartEvent):
            is_key.append(True if isinstance(event, yaml.MappingStartEvent) else None)
        if len(is_key) > _DEEPEST:
            raise InputError(f"Expected YAML with at most {_DEEPEST} levels in {name}, found more.")
        if not isinstance(event, yaml.ScalarEvent):
            continue
        values += 1
        if values > _MOST_VALUES:
            raise InputError(f"Expected at most {_MOST_VALUES} names and values in {name}, found more.")
        if has_jinja(event.value) and not named:  # a key is a name, such as a label, and never rendered
            parts += _check_template(event.value, name)
            if parts > _MOST_PARTS:
                raise InputError(
                    f"Expected at most {_MOST_PARTS} columns and filters in the templates of {name}, found more."
                )


def _check_template(source: str, name: str) -> int:
    """Check a template before it is compiled; return its number of columns and filters."""
    try:
        tree = sandbox.parse(source)
    except ValueError as error:
        raise InputError(f"Cannot use {name}: {error}.") from error
    found = list(tree.find_all(nodes.Node))
    for node in found:
        if not isinstance(node, _HARMLESS) or (isinstance(node, nodes.Filter) and not _is_harmless(node)):
            kind = node.name if isinstance(node, nodes.Filter) else type(node).__name__.lower()
            raise InputError(
                f"Expected an uploaded task's templates to hold text, columns, conditions and simple filters, found "
                f"{kind!r}; put the adapter below the server's root instead."
            )
    return sum(isinstance(node, (nodes.Name, nodes.Filter)) for node in found)


def _is_harmless(node: nodes.Filter) -> bool:
    if node.name == "replace":  # the new text must not be longer, not even after another filter (upper makes ß longer)
        values = [str(arg.value) for arg in node.args if isinstance(arg, nodes.Const)]
        its = len(values) == len(node.args) == 2 and not node.kwargs
        return its and 0 < len(values[1]) <= len(values[0]) and values[1].isascii()
    return node.name in _FILTERS
