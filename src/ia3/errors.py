"""The one error that is the user's to mend: what was expected, what was found, what to do, in one line."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

# Of a message, and of a piece of input in it. What a file holds must not crowd out what to do about it.
_LONGEST = 600
_LONGEST_PIECE = 200
_LONGEST_NAME = 80

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = _LONGEST_PIECE
_repr.maxlist = _repr.maxtuple = _repr.maxset = _repr.maxfrozenset = _repr.maxdict = 20


class InputError(ValueError):
    """Bad input: a file, column, label, model, adapter or value that cannot be used.

    The message is one line that says what was expected, what was found and what to do. The command line prints it and
    exits with code 2. The middle of a message that is too long is left out.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(excerpt(message, _LONGEST))


def excerpt(text: str, limit: int = _LONGEST_PIECE) -> str:
    """A text as one line of at most `limit` printable characters, without its middle when it is longer."""
    if len(text) > limit:
        end = limit // 3
        text = f"{text[: limit - end - 1]}…{text[-end:]}"
    text = re.sub(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*", " ", text).strip()
    # A control character would act on the terminal, and a lone surrogate cannot be printed.
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def brief(value: Any, limit: int = _LONGEST_PIECE) -> str:
    """A value's `repr` for an error message, at most `limit` characters long, however large or deep the value is."""
    try:
        return excerpt(_repr.repr(value), limit)
    except ValueError:  # an integer of thousands of digits
        return f"a very large {type(value).__name__}"


def reason(error: BaseException) -> str:
    """The first line of what another library's error says; its type when it says nothing."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return excerpt((str(error).strip().splitlines() or [type(error).__name__])[0])


def shown(names: Iterable[Any], limit: int = 5, room: int = _LONGEST_PIECE) -> str:
    """Names for an error message: the first few, quoted, and how many more there are.

    Args:
        names: of any kind.
        limit: how many to list at most.
        room: for how many characters; the first name has room in any case.
    """
    names = list(names)
    listed: list[str] = []
    for name in names[:limit]:
        text = brief(name, _LONGEST_NAME)
        room -= len(text) + 2
        if listed and room < 0:
            break
        listed.append(text)
    more = len(names) - len(listed)
    return (", ".join(listed) or "none") + (f" and {more} more" if more else "")


def similar(name: str, names: Iterable[str]) -> str:
    """For an error message about an unknown name: the names that come close to it, else the first few there are."""
    names = list(names)
    close = difflib.get_close_matches(name[:_LONGEST_PIECE], names)
    return f"close to it: {shown(close)}" if close else f"there are {shown(names)}"


def problems(error: ValidationError, whole: str) -> str:
    """What is wrong with the fields of a pydantic model, in one line; `whole` stands for the model itself."""
    found = [
        (".".join(map(str, item["loc"])) or whole, item["msg"].removeprefix("Value error, "))
        for item in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(f"{excerpt(where, _LONGEST_NAME)}: {excerpt(what)}" for where, what in found[:3]) + more
