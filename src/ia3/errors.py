"""The one error that is the user's to mend: what was expected, what was found, what to do, in one line."""


class InputError(ValueError):
    """Bad input: a file, column, label, model, adapter or value that cannot be used.

    The message is one line that says what was expected, what was found and what to do. The command line prints it and
    exits with code 2.
    """


def shown(names, limit: int = 5) -> str:
    """Names for an error message: the first few, quoted, and how many more there are."""
    names = list(names)
    text = ", ".join(repr(name) for name in names[:limit]) or "none"
    return text + (f" and {len(names) - limit} more" if len(names) > limit else "")
