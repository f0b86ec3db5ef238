"""The error that a user can fix: one line with what was expected, what was found and what to do."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

# The longest message, and the longest piece of input in it, so that input leaves room for the advice.
_LONGEST = 600
_LONGEST_PIECE = 200
_LONGEST_NAME = 80

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = _LONGEST_PIECE
_repr.maxlist = _repr.maxtuple = _repr.maxset = _repr.maxfrozenset = _repr.maxdict = 20


class InputError(ValueError):
    """Bad input: a file, column, label, model, adapter or value that cannot be used.

    Its text is one line: what was expected, what was found and what to do. The command line prints it and exits with
    code 2. If a message is too long, its middle is left out.

    >>> str(InputError("Expected a label, found none", "fill or drop the row", row=3, owner="Task 'tickets'"))
    "Task 'tickets': Expected a label, found none (row 3); fill or drop the row."

    The code that raises the error sets the fields that it knows; callers add more (see `about`). The text is composed
    when it is read.

    Attributes:
        message: what was expected and what was found.
        advice: what to do, without a full stop; empty if the message says it.
        row: the number of the row in its file or list, from 1.
        owner: the owner of the rows or files, such as a task or a member. A message that begins with a small letter
            continues the owner: "Adapter 'tickets' holds NaN".
        argument: the name of the argument to change; the advice ends with it.
    """

    def __init__(
        self,
        message: str = "",
        advice: str = "",
        *,
        row: int | None = None,
        owner: str | None = None,
        argument: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.advice = excerpt(message, _LONGEST), excerpt(advice, _LONGEST)
        self.row, self.owner, self.argument = row, owner, argument

    def __str__(self) -> str:
        return self.worded()

    def worded(self, named: Callable[[str], str] = str, owned: bool = True) -> str:
        """The text.

        Args:
            named: converts an argument's name to the user's name for it.
            owned: False leaves the owner out.
        """
        joint = " " if self.message[:1].islower() else ": "
        before = f"{self.owner}{joint}" if owned and self.owner is not None else ""
        place = "" if self.row is None else f" (row {self.row})"
        advice = self.advice if self.argument is None else f"{self.advice or 'see'} {named(self.argument)}"
        behind = place + (f"; {advice}" if advice else "")
        if advice or self.message.endswith("."):
            behind += "" if advice.endswith(("?", "!")) else "."
        message = self.message.removesuffix(".") if behind else self.message
        room = _LONGEST - len(before) - len(behind)
        return excerpt(before + excerpt(message, max(room, _LONGEST_PIECE)) + behind, _LONGEST)


def needs(what: str, package: str, extra: str) -> InputError:
    """The error where a package of an extra is missing.

    >>> str(needs("Serving", "uvicorn", "serve"))
    'Serving needs the package uvicorn; install it: pip install "ia3[serve]".'
    """
    return InputError(f"{what} needs the package {package}", f'install it: pip install "ia3[{extra}]"')


class about:
    """In a `with` block, add an owner to an `InputError`, before the one that it has, and a row if it has none."""

    def __init__(self, owner: str | None = None, *, row: int | None = None) -> None:
        self._owner, self._row = owner, row

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, InputError):
            return
        if self._owner is not None:
            error.owner = self._owner if error.owner is None else f"{self._owner}: {error.owner}"
        if error.row is None:
            error.row = self._row


def excerpt(text: str, limit: int = _LONGEST_PIECE) -> str:
    """A text as one line of at most `limit` printable characters; a longer text loses its middle."""
    if len(text) > limit:
        end = limit // 3
        text = f"{text[: limit - end - 1]}…{text[-end:]}"
    text = re.sub(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*", " ", text).strip()
    # A control character would change the terminal, and a lone surrogate cannot be printed.
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def brief(value: Any, limit: int = _LONGEST_PIECE) -> str:
    """A value's `repr` for an error message, with at most `limit` characters, also for large or deep values."""
    try:
        return excerpt(_repr.repr(value), limit)
    except ValueError:  # an integer of thousands of digits
        return f"a very large {type(value).__name__}"


def reason(error: BaseException) -> str:
    """The first line of another library's error; its type if it has no text."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return excerpt((str(error).strip().splitlines() or [type(error).__name__])[0])


def shown(names: Iterable[Any], limit: int = 5, room: int = _LONGEST_PIECE, total: int | None = None) -> str:
    """Names for an error message: the first few, quoted, and the number of further ones.

    Args:
        names: values of any type.
        limit: the maximum of names to list.
        room: the maximum of characters; the first name is always listed.
        total: the number of names if these are only some of them.
    """
    names = list(names)
    listed: list[str] = []
    for name in names[:limit]:
        text = brief(name, _LONGEST_NAME)
        room -= len(text) + 2
        if listed and room < 0:
            break
        listed.append(text)
    more = (len(names) if total is None else total) - len(listed)
    return (", ".join(listed) or "none") + (f" and {more} more" if more else "")


def similar(name: str, names: Iterable[str], total: int | None = None) -> str:
    """For an error message about an unknown name: similar names, or otherwise the first few names; see `shown`."""
    names = list(names)
    close = difflib.get_close_matches(name[:_LONGEST_PIECE], names)
    return f"close to it: {shown(close)}" if close else f"there are {shown(names, total=total)}"


def problems(error: ValidationError, whole: str) -> str:
    """The errors in the fields of a pydantic model, in one line; `whole` names the model itself."""
    found = []
    for item in error.errors(include_url=False, include_context=False):
        what = item["msg"].removeprefix("Value error, ").removesuffix(".")
        # Our own errors say what they found.
        if item["type"] not in ("value_error", "missing", "extra_forbidden") and isinstance(
            item["input"], (str, int, float)
        ):
            what += f", found {brief(item['input'])}"
        found.append((".".join(map(str, item["loc"])) or whole, what))
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(f"{excerpt(where, _LONGEST_NAME)}: {excerpt(what)}" for where, what in found[:3]) + more
