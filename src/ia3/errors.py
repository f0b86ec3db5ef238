"""The one error that is the user's to mend: what was expected, what was found, what to do, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class InputError(ValueError):
    """Bad input: a file, column, label, model, adapter or value that cannot be used.

    The message is one line that says what was expected, what was found and what to do. The command line prints it and
    exits with code 2.
    """


def reason(error: BaseException) -> str:
    """The first line of what another library's error says; its type when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shown(names, limit: int = 5) -> str:
    """Names for an error message: the first few, quoted, and how many more there are."""
    names = list(names)
    text = ", ".join(repr(name) for name in names[:limit]) or "none"
    return text + (f" and {len(names) - limit} more" if len(names) > limit else "")


def similar(name: str, names: Iterable[str]) -> str:
    """For an error message about an unknown name: the names that come close to it, else the first few there are."""
    names = list(names)
    close = difflib.get_close_matches(name, names)
    return f"close to it: {shown(close)}" if close else f"there are {shown(names)}"


def problems(error: ValidationError, whole: str) -> str:
    """What is wrong with the fields of a pydantic model, in one line; `whole` stands for the model itself."""
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or whole}: {item['msg'].removeprefix('Value error, ')}"
        for item in error.errors()
    )
