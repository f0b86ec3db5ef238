"""Shared fixtures. Test files everywhere under `tests/` may take what `tests/support` has: `from support import tiny`."""

import gc
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may depend on the network; read when huggingface_hub is imported
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # NumPy's threads of several workers wait for each other; read when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from ia3.adapter import pretrained
from ia3.evaluation.report import plots
from ia3.opinions import sentences
from support import tiny

# No time limit for an example, and the same examples in every run.
settings.register_profile("ia3", deadline=None, derandomize=True, database=None)
settings.load_profile("ia3")


@pytest.fixture(params=tiny.NAMES)
def arch(request) -> str:
    """Each architecture in turn."""
    return request.param


@pytest.fixture
def llama():
    """A tiny Llama."""
    return tiny.build("llama")


@pytest.fixture
def gpt2():
    """A tiny GPT-2, whose attention makes queries, keys and values in one fused projection."""
    return tiny.build("gpt2")


# Tiny models are slowed down by more threads. Real ones get all, or their process's share: threads of two processes on the
# same cores wait for each other for minutes.
THREADS = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
torch.set_num_threads(1)

os.fsync = lambda handle: None  # no power fails here, and a save waits for the disk longer than a tiny model trains


# A report's plots take longer than a tiny model trains.
DRAWN, plots._drawn = plots._drawn, lambda name, alt, draw: plots.Markup("<svg></svg>")


@pytest.fixture(scope="module")
def drawn_plots():
    """Reports have their plots."""
    undrawn, plots._drawn = plots._drawn, DRAWN
    yield
    plots._drawn = undrawn


@pytest.fixture
def all_threads():
    """As many threads as there are for this process, for a real model."""
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(1)


FILE, IMPORTED = None, 0


def pytest_runtest_setup(item):
    """Give tiny models no sentence encoder, and spare the garbage collector what stays for good: what has been imported, and what a file's tests have left behind.

    `Trainer.train` collects garbage, as much else does: with torch and transformers in memory, and all that a compiler
    remembers, this takes longer than a tiny model's training itself.
    """
    global FILE, IMPORTED
    # A sentence encoder that is installed gives no opinion beside tiny models: it would take most of the time.
    sentences.sentence_folder = pretrained.sentence_folder if "slow" in item.keywords else lambda: None
    if "slow" not in item.keywords and (item.path != FILE or len(sys.modules) >= IMPORTED + 100):
        FILE, IMPORTED = item.path, len(sys.modules)
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items):
    """Slow tests come first: `pytest --dist worksteal` takes tests off the end of a worker's list, and leaves these together."""
    items.sort(key=lambda item: "slow" not in item.keywords)
    for item in items:
        if "slow" in item.keywords:
            item.fixturenames.insert(0, "all_threads")


@pytest.fixture
def ia3(capsys, monkeypatch):
    """Runs the command line in this process: exit code, standard output, standard error.

    Options may come as keywords; None leaves one out.
    """
    from ia3.cli import main

    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments, **options):
        for key, value in options.items():
            if value is not None:
                arguments += (f"--{key.replace('_', '-')}", value)
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        code = ended.value.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run
