"""Read JSON and YAML safely, and write JSON."""

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

# Limits of nested levels, and of values with YAML's aliases expanded. Ordinary files stay far below. Larger ones could
# exhaust the stack or the memory.
_DEEPEST = 50
_MOST_VALUES = 1_000_000

# The advice for a file from another source.
_AGAIN = "copy or download it again"


@contextmanager
def reading(path: str | os.PathLike, expected: str, advice: str = _AGAIN) -> Iterator[None]:
    """Convert all errors of reading untrusted content in a `with` block to `InputError`.

    A damaged or hostile file can raise many errors: `RecursionError` for deep nesting, `OverflowError` for a number,
    `MemoryError` for a size, `KeyError` for a field. For the user they mean the same: the file is invalid. An
    `InputError` passes unchanged.

    Args:
        path: the file or folder, for the message.
        expected: the expected content.
        advice: what to do.
    """
    where = excerpt(os.fspath(path))
    try:
        yield
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(
            f"Expected UTF-8 text in {where}: {error.reason} at byte {error.start}; save the file as UTF-8."
        ) from error
    except OSError as error:
        raise InputError(f"Cannot read {where}: {error.strerror or reason(error)}; expected {expected}.") from error
    except Exception as error:
        raise InputError(f"Expected {expected} in {where}: {reason(error)}; {advice}.") from error


def parse_json(data: bytes | str, path: str | os.PathLike, advice: str = _AGAIN) -> Any:
    """Parse JSON.

    Args:
        data: the text.
        path: its file, for an error message.
        advice: what to do, for an error message.

    Raises:
        InputError: the text is not JSON, or has values beyond the limits.
    """
    with reading(path, "JSON", advice):
        text = data if isinstance(data, str) else data.decode("utf-8")
        values = json.loads(text)
        # This check is fast, and such values are rare.
        if text.count("[") + text.count("{") > _DEEPEST or re.search(r"\\u[dD][89a-fA-F]|\d{300}", text):
            _measure(values, {})
        return values


def read_json(path: str | os.PathLike, advice: str = _AGAIN) -> dict[str, Any]:
    """The fields of a JSON file. Raises `InputError` as `parse_json`, and if it holds no object."""
    with reading(path, "JSON", advice):
        data = Path(path).read_bytes()
    values = parse_json(data, path, advice)
    if not isinstance(values, dict):
        raise InputError(
            f"Expected a JSON object in {excerpt(os.fspath(path))}, found {type(values).__name__}; {advice}."
        )
    return values


def to_json(value: Any) -> str:
    """A value as JSON, in the format of our files."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(value), encoding="utf-8")


def read_fields(path: Path, loader: Any, such_as: str, data: bytes | None = None) -> dict[str, Any]:
    """The fields of a YAML file.

    Args:
        path: the existing file.
        loader: the PyYAML loader class.
        such_as: names of fields, for an error message.
        data: the file's content, if it was read already; None: read it.

    Raises:
        InputError: the file is not YAML or not a mapping, or has values beyond the limits.
    """
    import yaml

    with reading(path, "YAML", "correct it"):
        text = (path.read_bytes() if data is None else data).decode("utf-8")
        try:
            values = yaml.load(text, Loader=loader)
        except yaml.YAMLError as error:  # its last lines say what is wrong, and where
            raise ValueError(" ".join(str(error).split())) from error
        if _measure(values, {})[0] > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES} values, aliases followed")
    if not isinstance(values, dict):
        raise InputError(f"Expected fields such as {such_as} in {excerpt(str(path))}, found {type(values).__name__}.")
    return values


def _measure(value: Any, known: dict[int, tuple[int, int]], depth: int = 0) -> tuple[int, int]:
    """The number of values in a value, itself included, and its number of levels.

    Args:
        value: a value of JSON or YAML, where aliases can repeat a list or put it inside itself.
        known: identity of an object → its result.
        depth: the number of levels around it.

    Raises:
        ValueError: there are too many levels, or a text has a lone surrogate, which cannot be written or printed.
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
