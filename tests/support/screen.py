"""What a table on a screen says."""

import re


def cells(text):
    """The text of each column of the tables in it, lines joined."""
    lines = [re.split("[│┃]", line)[1:-1] for line in text.splitlines() if line[:1] in ("│", "┃")]
    return ["".join(line[i].strip() for line in lines if i < len(line)) for i in range(max(map(len, lines)))]


def require_whole(text, names):
    """Nothing is cut, and the first columns have all names."""
    assert "…" not in text
    found = " ".join(cells(text)[:2]).replace(" ", "")
    for name in names:
        assert name.replace(" ", "") in found, name
