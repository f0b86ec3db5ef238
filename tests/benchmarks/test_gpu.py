"""`benchmarks/gpu.sh`: one page, whatever there is to run on and whatever fails."""

import os
import subprocess
import sys
import time

import pytest
import torch

from support.paths import ROOT

PARTS = ("tests", "train", "train_step", "mixed")

# In place of Python: says that there is a GPU, and does of each part what BROKEN says.
STAND_IN = """#!/bin/sh
case "$*" in
*machine*) echo "GPU (torch)       a stand-in"; exit "${MACHINE:-0}" ;;
*prepare*) echo smollm2 ;;
*find_spec*) case "$*" in *"$MISSING"*) exit 1 ;; esac ;;
*"$SLOW"*) sleep 60 ;;
*test_cuda*) echo "FAILED tests/test_cuda.py::test_one - assert 1 == 2"; echo "1 failed, 2 passed in 3.00s"; exit 1 ;;
*) echo "table of $*" ;;
esac
"""


def run(folder, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """The script, which writes into a folder."""
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *options, str(folder)]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **hidden, **environment})


@pytest.fixture
def stand_in(tmp_path):
    """Environment of a run without Python."""
    file = tmp_path / "python"
    file.write_text(STAND_IN)
    file.chmod(0o755)
    return {"PYTHON": str(file), "MISSING": "nothing", "SLOW": "nothing"}


def test_without_a_gpu_each_part_is_skipped_in_a_line(tmp_path, monkeypatch):
    # A driver that sees a GPU which is hidden from torch is a failure.
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    done = run(tmp_path / "report")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in PARTS:
        assert f"\n== {part}: skipped: torch sees no GPU here\n" in done.stdout
    assert f"torch             {torch.__version__}" in done.stdout
    assert (tmp_path / "report" / "page.txt").read_text() == done.stdout

    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho H100, 80 GB, 570\n")
    done = run(tmp_path / "report")
    assert done.returncode == 1
    assert "GPU (nvidia-smi)  H100, 80 GB, 570" in done.stdout and "install torch built for this driver" in done.stdout
    assert "Failed: machine." in done.stdout


def test_a_part_that_fails_does_not_stop_the_others(tmp_path, stand_in):
    done = run(tmp_path / "report", **stand_in)
    assert done.returncode == 1
    assert "== tests: FAILED with status 1 after" in done.stdout
    assert "FAILED tests/test_cuda.py::test_one - assert 1 == 2\n1 failed, 2 passed in 3.00s\n" in done.stdout
    for part, arguments in {
        "train_step": "benchmarks/train_step.py --model smollm2 --repeats 5 --choices 2,6,77",
        "mixed": "benchmarks/mixed.py --model smollm2 --repeats 5 --adapters 1000",
    }.items():
        assert f"== {part}: done in" in done.stdout and f"table of {arguments}\n" in done.stdout
        assert (tmp_path / "report" / f"{part}.txt").read_text() == f"table of {arguments}\n"
    assert "\nFailed: tests. The whole output is in" in done.stdout


def test_a_part_that_takes_too_long_is_stopped_and_leaves_time_for_the_others(tmp_path, stand_in):
    started = time.monotonic()
    done = run(tmp_path / "report", "--seconds", "8", **{**stand_in, "SLOW": "gpu_parts.py train"})
    assert time.monotonic() - started < 30
    assert "== train: FAILED with status 124" in done.stdout and "Stopped after" in done.stdout
    assert "== mixed: done in" in done.stdout
    assert "\nFailed: tests train. The" in done.stdout


def test_what_is_not_installed_is_skipped(tmp_path, stand_in):
    done = run(tmp_path / "report", **{**stand_in, "MISSING": "peft"})
    for part in ("train_step", "mixed"):
        assert f"== {part}: skipped: it needs peft, psutil\n" in done.stdout
    assert "== train: done in" in done.stdout


@pytest.mark.parametrize("options", [("--fast",), ("--seconds", "soon"), ("one",)])
def test_wrong_arguments_are_said(tmp_path, options):
    done = run(tmp_path / "report", *options)
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and not done.stdout
    assert not (tmp_path / "report").exists()


@pytest.mark.slow
def test_a_rehearsal_does_every_part(tmp_path):
    done = run(tmp_path / "report", "--small")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in PARTS:
        assert f"== {part}: done in" in done.stdout
    for found in ("skipped in", "zero-shot", "PEFT/ours time", "share resident"):
        assert found in done.stdout
