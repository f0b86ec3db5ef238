"""JSON and YAML, read with whatever they hold, and written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ia3.errors import InputError, brief, excerpt, reason
from ia3.files.atomic import replacing

# Of lists and mappings inside each other, and of values when YAML's aliases are followed. What people write stays far
# below; what goes beyond would exhaust the stack or the memory of whoever walks through it.
_DEEPEST = 50
_MOST_VALUES = 1_000_000

# What to do about a file that somebody else made.
_AGAIN = "copy or download it again"


@contextmanager
def reading(path: str | os.PathLike, expected: str, advice: str = _AGAIN) -> Iterator[None]:
    """Within `with`, content that may come from anywhere is read; whatever its reader raises becomes an `InputError`.

    A damaged or hostile file makes a reader fail in ways of its own: `RecursionError` for what is nested too deep,
    `OverflowError` for a number, `MemoryError` for a size, `KeyError` for a field. To the user they are one: the file
    is not what it should be. An `InputError` raised inside passes as it is.

    Args:
        path: the file or folder, for the message.
        expected: what it should be.
        advice: what to do about it.
    """
    where = excerpt(os.fspath(path))
    try:
        yield
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"Expected UTF-8 text in {where}: {error.reason} at byte {error.start}.") from error
    except OSError as error:
        raise InputError(f"Cannot read {where}: {error.strerror or reason(error)}; expected {expected}.") from error
    except Exception as error:
        raise InputError(f"Expected {expected} in {where}: {reason(error)}; {advice}.") from error


def parse_json(data: bytes | str, path: str | os.PathLike, advice: str = _AGAIN) -> Any:
    """What JSON says.

    Args:
        data: the text.
        path: where it stands, for an error message.
        advice: what to do about it.

    Raises:
        InputError: no JSON, or values that this program could not walk through or print.
    """
    with reading(path, "JSON", advice):
        text = data if isinstance(data, str) else data.decode("utf-8")
        values = json.loads(text)
        # All are rare, and this is fast.
        if text.count("[") + text.count("{") > _DEEPEST or re.search(r"\\u[dD][89a-fA-F]|\d{300}", text):
            _measure(values, {})
        return values


def read_json(path: str | os.PathLike, advice: str = _AGAIN) -> dict[str, Any]:
    """The fields of a JSON file. Raises `InputError` as `parse_json` does, and when there is no object."""
    with reading(path, "JSON", advice):
        data = Path(path).read_bytes()
    values = parse_json(data, path, advice)
    if not isinstance(values, dict):
        raise InputError(
            f"Expected a JSON object in {excerpt(os.fspath(path))}, found {type(values).__name__}; {advice}."
        )
    return values


def to_json(value: Any) -> str:
    """A value as we write JSON files."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, in whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(value), encoding="utf-8")


def read_fields(path: Path, loader: Any, such_as: str, data: bytes | None = None) -> dict[str, Any]:
    """The fields of a YAML file.

    Args:
        path: the file, which is there.
        loader: PyYAML's class for it.
        such_as: names of fields, for an error message.
        data: what was read from it already; None: read it.

    Raises:
        InputError: no YAML, no mapping, or values that this program could not walk through or print.
    """
    import yaml

    with reading(path, "YAML", "correct it"):
        text = (path.read_bytes() if data is None else data).decode("utf-8")
        try:
            values = yaml.load(text, Loader=loader)
        except yaml.YAMLError as error:  # which says in its last lines what is wrong, and where
            raise ValueError(" ".join(str(error).split())) from error
        if _measure(values, {})[0] > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES} values, aliases followed")
    if not isinstance(values, dict):
        raise InputError(f"Expected fields such as {such_as} in {excerpt(str(path))}, found {type(values).__name__}.")
    return values


def _measure(value: Any, known: dict[int, tuple[int, int]], depth: int = 0) -> tuple[int, int]:
    """How many values a value holds, itself included, and in how many levels.

    Args:
        value: of JSON or YAML, in which aliases make one list stand in many places, or within itself.
        known: what has been found, by the object's identity.
        depth: in how many levels it stands.

    Raises:
        ValueError: there are too many levels, or a text holds half a surrogate pair, which no file or terminal takes.
        OverflowError: an integer has hundreds of digits.
    """
    if isinstance(value, str):
        if not value.isascii():
            value.encode()
        return 1, 0
    if isinstance(value, int):
        float(value)
    if not isinstance(value, (dict, list, tuple, set)):
        return 1, 0
    count, levels = known.get(id(value), (0, 0))
    if depth + max(levels, 1) > _DEEPEST:
        raise ValueError(f"more than {_DEEPEST} levels of lists and mappings")
    if not count:
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        found = [_measure(part, known, depth + 1) for part in parts]
        count, levels = 1 + sum(part[0] for part in found), 1 + max((part[1] for part in found), default=0)
        known[id(value)] = count, levels
    return count, levels


_UNITS = {"": 1} | {
    prefix + infix: base**power
    for infix, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}


def parse_bytes(size: int | str, what: str) -> int:
    """A number of bytes, given as one or such as "512MB" or "2GiB". Raises `InputError`, which says `what` it is to be."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]i?)?B?", str(size), re.IGNORECASE)
    if match is None or not isinstance(size, (int, str)):
        raise InputError(f"Expected {what} in bytes, or such as '512MB' or '2GiB', found {brief(size)}.")
    return int(float(match[1]) * _UNITS[(match[2] or "").capitalize()])
