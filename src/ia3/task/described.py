"""What tasks of all kinds have: a name, sources of rows, and a YAML file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from typing_extensions import Self

from ia3.errors import InputError, brief, excerpt, problems
from ia3.files import read_fields, reading, replacing
from ia3.task.reading import as_delimiter, require_delimited

# YAML's spellings of no value.
NOTHING = ("", "~", "null")

# The fields that say what kind of task a file describes, if not one with choices.
ANSWER, FIELDS = "answer", "fields"


def read_yaml(path: Path, data: bytes | None = None) -> dict[str, Any]:
    """The fields of a YAML file, with all values as text: `yes` and `1` are labels here, not true and a number. Tags
    are ignored. `data` is the file's content, if it was read already."""
    if data is None and not os.path.isfile(path):
        raise InputError(f"Expected a task file, found no {brief(str(path))}.")
    return read_fields(path, _Loader, "template and choices", data)


def as_yaml(values: dict[str, Any]) -> str:
    """Fields as the YAML that `read_yaml` reads."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class Described(BaseModel):
    """The fields of every kind of task.

    Attributes:
        name: the name for folders and tables.
        description: a sentence for people.
        train, test: sources of labelled rows, as `read_rows` takes them.
        delimiter: the delimiter of sources that are `.csv` or `.tsv` files; None: detect it in each file.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = "task"
    description: str | None = None
    train: str | None = None
    test: str | None = None
    delimiter: str | None = None

    @field_validator("delimiter")
    @classmethod
    def _delimiter_is_a_character(cls, value: str | None) -> str | None:
        return None if value is None else as_delimiter(value)

    @model_validator(mode="after")
    def _delimiter_is_of_files(self) -> Self:
        require_delimited(self.delimiter, self.train, self.test)
        return self

    @classmethod
    def of_values(cls, values: Mapping[str, Any], path: Path) -> Self:
        """The task of a file's fields. Paths in it are relative to its folder. Errors as of `create`."""
        values = {
            key: value for key, value in values.items() if value not in NOTHING or (key, value) == ("separator", "")
        }
        for name in ("train", "test"):
            source = values.get(name)
            if isinstance(source, str) and source and os.path.exists(path.parent / source):
                values[name] = str((path.parent / source).resolve())
        return cls.create(values, where=str(path))

    @classmethod
    def create(cls, values: Mapping[str, Any], where: str = "the task") -> Self:
        """Make a task from fields. Raises `InputError`, one line, for wrong fields."""
        with reading(where, "a task", "correct it"):
            try:
                return cls.model_validate(dict(values))
            except ValidationError as error:
                raise InputError(f"Cannot use {excerpt(where)}: {problems(error, 'task')}.") from error

    def to_yaml(self) -> str:
        """The YAML that `from_file` reads."""
        return as_yaml(self.model_dump(exclude_defaults=True) | {"name": self.name})

    def save(self, path: str | os.PathLike) -> None:
        """Write the task as YAML, atomically."""
        with replacing(path) as temporary:
            temporary.write_text(self.to_yaml(), encoding="utf-8")


class _Loader(yaml.BaseLoader):
    """A YAML loader that reads every value as text and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that keeps text of several lines readable."""


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _represent_text)
