"""What people see: tables on a narrow screen lose nothing, and standard error holds the command's own lines alone."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from rich.console import Console

from ia3.cli import compare, main, raft, results
from ia3.cli.answers import shortened
from ia3.cli.bars import Bars
from ia3.task.task import embedded_tasks
from support import words
from support.screen import require_whole

LABELS = {"pos": "sadness or something very much like it", "neg": "happiness that nothing could ever disturb"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, rows with long labels, and an adapter that has learned them."""
    folder = tmp_path_factory.mktemp("screen")
    words.save_model(folder / "model")
    rows = [{**row, "label": LABELS[row["label"]]} for row in words.different(60)]
    words.write_csv(folder / "train.csv", rows)
    words.write_csv(folder / "test.csv", rows[:6])
    choices = ",".join(f"{label}={text}" for label, text in zip(LABELS.values(), ("good", "bad"), strict=True))
    arguments = ["--data", folder / "train.csv", "--output", folder / "adapter", "--steps", 2, "--choices", choices]
    with pytest.raises(SystemExit) as ended:
        main(["train", "--model", str(folder / "model"), *map(str, arguments)])
    assert not ended.value.code
    return folder


@pytest.fixture
def narrow(ia3, monkeypatch):
    """Runs the command line on a screen of 80 characters; standard output."""

    def run(*arguments):
        monkeypatch.setenv("COLUMNS", "80")
        code, out, err = ia3(*arguments)
        assert code == 0, err
        return out

    return run


@pytest.fixture
def screen():
    """A console of 80 characters, which writes to its `file`."""
    return Console(file=io.StringIO(), width=80, highlight=False)


def test_inspect_shows_whole_modules(place, narrow):
    out = narrow("inspect", place / "adapter")
    require_whole(
        out, ["model.layers.*.mlp.down_proj", "model.layers.*.self_attn.k_proj", "model.layers.*.self_attn.v_proj"]
    )


def test_evaluate_shows_whole_labels(place, narrow):
    require_whole(narrow("evaluate", place / "adapter", "--data", place / "test.csv"), LABELS.values())


def test_predict_shows_whole_labels_and_texts(place, narrow):
    text = "the tea was lovely and the soup was stale"
    out = narrow("predict", place / "adapter", text)
    assert "probability" in out  # labels this long leave no room for a column each
    require_whole(out, [text, next(label for label in LABELS.values() if label.split()[0] in out)])


def test_a_long_text_keeps_its_ends():
    text = f"begin {'tea ' * 40}end"
    short = shortened(text)
    assert len(short) <= 60 and short.startswith("begin tea") and short.endswith("tea end") and " … " in short
    assert shortened(text[:60]) == text[:60]


def test_tasks_shows_whole_names(narrow):
    require_whole(narrow("tasks"), embedded_tasks())


def test_train_shows_whole_names_of_many_adapters(screen):
    names = [f"a-task-with-a-name-of-some-length/seed-{seed}-lr-0.001" for seed in range(2)]
    scores = {"accuracy": 0.512, "macro_f1": 0.345}
    measured = {"test_rows": 200, "zero_shot": scores, "trained": scores, "majority": scores}
    more = {"steps": 1, "train_seconds": 1.0, "trainable_parameters": 160, "adapter_bytes": 900}
    results.print_fleet_table(screen, {name: {**measured, **more} for name in names}, {"a-task/lr-0.001": names})
    require_whole(screen.file.getvalue(), [*names, "a-task/lr-0.001 median (IQR)"])


def test_progress_shows_whole_names(screen):
    with Bars(screen) as bars:
        bars.stage("Zero-shot a-task-with-a-name/seed-0-lr-0.001, template 2", 3).note("accuracy 88.9%")
    assert "…" not in screen.file.getvalue() and re.sub(r"\s", "", screen.file.getvalue()).count("Zero-shot") == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_a_file_has_a_line_now_and_then_instead_of_a_moving_bar(monkeypatch, terminal):
    clock = iter([0, 10, 31, 40, 70])
    monkeypatch.setattr("ia3.cli.bars.time", SimpleNamespace(monotonic=lambda: next(clock, 71)))
    out = Console(file=io.StringIO(), width=80, highlight=False, force_terminal=terminal)
    with Bars(out) as bars:
        stage = bars.stage("Training", 8)
        for _ in range(3):
            stage.advance(2)
        stage.reach(8)
    said = re.findall(r"Training: \d of 8", out.file.getvalue())
    assert said == ([] if terminal else ["Training: 4 of 8", "Training: 8 of 8"])


def test_compare_shows_whole_numbers(screen):
    numbers = dict.fromkeys(
        ("inference_flops", "inference_flops_uncached", "inference_flops_estimate", "training_flops"), 1.25e12
    )
    sizes = {"kv_cache_bytes": 123456, "disk_bytes": 240000, "training_flops_estimate": None}
    scores = {"accuracy": 0.512, "macro_f1": 0.345}
    balanced = {"accuracy": 0.612, "macro_f1": 0.445}
    row = {**scores, "balanced": balanced, "seconds": 0.123, **numbers, **sizes}
    compare.print_comparison(screen, [{**row, "method": name} for name in ("zero-shot", "8-shot", "16-shot", "t-few")])
    lines = screen.file.getvalue().splitlines()
    assert "…" not in screen.file.getvalue() and sum("51.2%" in line for line in lines) == 1
    assert [line.count("1.2e12") for line in lines if "training FLOPs" in line] == [4]


def test_raft_shows_whole_names(screen):
    scores = {"accuracy": 0.5, "macro_f1": 0.5}
    its = {"cross_validation": scores, "majority": scores, "test_rows": 5000, "seconds": 123.4}
    names = ("neurips_impact_statement_risks", "systematic_review_inclusion")
    raft._print_table(screen, dict.fromkeys(names, its), {"macro_f1": 0.5, "majority_macro_f1": 0.4}, 5)
    require_whole(screen.file.getvalue(), names)


COMMANDS = """
import json, sys
from ia3.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as ended:
        assert not ended.code
"""


def test_standard_error_has_the_notices_of_the_commands_once_and_nothing_else(place, tmp_path):
    """In a program of its own: what other libraries say, they say when they are loaded."""
    table = tmp_path / "rows.parquet"
    pd.DataFrame(words.rows(4)).to_parquet(table)
    rows = words.rows(60)
    data = words.write_csv(tmp_path / "rows.csv", [row for row in rows if row["label"] == "pos"] + rows[1:11:2], ";")
    commands = [
        ["predict", place / "adapter", "-d", table, "-o", tmp_path / "out.csv"],  # says nothing
        ["train", "-m", place / "model", "-d", data, "--steps", 2, "--seeds", "0,1", "-o", tmp_path / "out"],
    ]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "80", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps([[*map(str, command)] for command in commands])],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"ia3: Columns of {str(data)!r} are separated by ';' (--delimiter).",
        "ia3: Fewer than 16 training examples for 1 of 2 labels, the fewest for 'neg': 5; all of these are taken.",
    ]
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 5


def test_our_own_warnings_are_lines_too(place, ia3, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in Path(place, "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "something_newer": 1}))
    code, _, err = ia3("inspect", folder)
    assert code == 0 and err == "ia3: Ignoring keys of a newer or another config: 'something_newer'.\n"
