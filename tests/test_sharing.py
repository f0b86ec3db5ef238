"""Adapters go to the hub and come back, with all that their folders hold; their cards are true."""

import json
import os
import subprocess
import sys

import pytest

from ia3 import AdapterFolder, FewShotClassifier, InputError
from ia3.cli import main
from support import hub as local_hub
from support import words


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, and an adapter trained on it."""
    folder = tmp_path_factory.mktemp("sharing")
    words.save_model(folder / "model")
    words.write_csv(folder / "train.csv", words.rows(60))
    arguments = ["train", "--model", folder / "model", "--data", folder / "train.csv", "--steps", "4"]
    arguments += ["--template", words.TEMPLATE, "--choices", "pos=good,neg=not good", "--output", folder / "reviews"]
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert not ended.value.code
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that this process uses."""
    with local_hub.running(monkeypatch, tmp_path / "cache") as found:
        yield found


@pytest.fixture
def ia3(capsys, monkeypatch):
    """Runs the command line in this process: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_an_adapter_goes_there_and_back(place, hub, ia3, tmp_path, monkeypatch):
    code, out, err = ia3("push", place / "reviews", "owner/reviews", "--json")
    assert code == 0, err
    repository = hub.repositories["owner/reviews"]
    assert json.loads(out)["url"] == f"{hub.url}/owner/reviews/commit/{repository.branches['main']}"
    sent = {path.name: path.read_bytes() for path in (place / "reviews").iterdir()}
    assert sent.keys() == repository.files.keys()
    assert [name for name in sent if sent[name] != repository.files[name]] == ["README.md"]
    here, there = (ia3("predict", where, "tea not good", "--json") for where in (place / "reviews", "owner/reviews"))
    assert here[0] == there[0] == 0, there[2]
    assert here[1] == there[1]
    # Another process on another machine, with nothing but the hub.
    done = subprocess.run(
        [sys.executable, "-m", "ia3", "predict", "owner/reviews@main", "tea not good", "--json"],
        env={**os.environ, **local_hub.environment(hub, tmp_path / "elsewhere")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == here[1]
    assert list((tmp_path / "elsewhere" / "hub").glob("models--owner--reviews/snapshots/*/adapter_model.safetensors"))
