"""docs/house.md is true: its rooms are the linter's, and what it names is where it says."""

import ast
import re
from importlib import resources

import pytest

from support.paths import ROOT

PAGE = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
SOURCE = ROOT / "src" / "ia3"
PLACES = [
    (path, name)
    for path, names in re.findall(r"^\|[^|]+\| `([\w/]+\.py)` \| (.+) \|$", PAGE, re.MULTILINE)
    for name in re.findall(r"`([\w.]+)`", names)
]


def names_in(body: list[ast.stmt]) -> dict[str, list[ast.stmt]]:
    """The functions, classes and variables that are made in a body, and the body of each."""
    found: dict[str, list[ast.stmt]] = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = node.body
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update((target.id, []) for target in targets if isinstance(target, ast.Name))
    return found


def test_the_page_answers_what_people_look_for():
    rows = re.search(r"^## Where is …$(.*)", PAGE, re.MULTILINE | re.DOTALL)
    assert rows is not None
    lines = [line for line in rows[1].splitlines() if line.startswith("| ") and ".py" in line]
    assert len(lines) == len({line for line in lines for path, _ in PLACES if f"`{path}`" in line}) > 15


@pytest.mark.parametrize("path, name", PLACES, ids=lambda value: value)
def test_what_the_page_names_is_there(path, name):
    body = ast.parse((SOURCE / path).read_text(encoding="utf-8")).body
    for part in name.split("."):
        names = names_in(body)
        assert part in names, f"{path} has no {name}; docs/house.md says so"
        body = names[part]


def test_the_rooms_of_the_page_are_those_that_the_linter_keeps_apart():
    drawn = re.search(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert drawn is not None
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.search(r"^layers = \[(.*?)\]", settings, re.MULTILINE | re.DOTALL)
    assert layers is not None
    rooms = [line.split()[0] for line in drawn[1].splitlines()]
    assert rooms == re.findall(r'"(\w+)"', layers[1])
    assert "exhaustive = true" in settings  # so that the linter names a room that is not drawn


def test_the_package_says_that_it_has_types():
    assert (resources.files("ia3") / "py.typed").is_file()
