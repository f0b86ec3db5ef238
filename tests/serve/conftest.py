"""A tiny model with adapters, and servers of it."""

import asyncio
import shutil

import pytest

from ia3 import IA3Config, Recipe, get_peft_model, load_base
from ia3.serve import job
from ia3.serve.background import Background
from support import tiny, words
from support.serving import CHAT, Running, save_adapter


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with `model` and `adapters`, of which tests get copies."""
    folder = tmp_path_factory.mktemp("served")
    words.save_model(folder / "model")
    words.tokenizer(chat_template=CHAT).save_pretrained(folder / "model")
    model = get_peft_model(load_base(str(folder / "model"))[0], IA3Config(task_type="CAUSAL_LM"))
    for seed, name in enumerate(("tea", "soup", "cake")):
        save_adapter(folder / "adapters" / name, model, seed)
    pair = {"template": "{{ first }} , {{ second }} ?", "choices": {"0": "good", "1": "bad", "2": "fine"}}
    save_adapter(folder / "adapters" / "nested" / "pair", model, 3, **pair)
    (folder / "adapters" / "tea" / "recipe.yaml").write_text("length_normalization: 0.5\n")
    calibration = '{"temperature": 2.5, "rows": 9, "log_loss": 1, "log_loss_before": 1, '
    calibration += '"calibration_error": 0, "calibration_error_before": 0}'
    (folder / "adapters" / "soup" / "calibration.json").write_text(calibration)
    tiny.randomize(model, 8)
    model.save_pretrained(folder / "spare")
    return folder


@pytest.fixture
def place(made, tmp_path):
    """A copy of `made` to change."""
    shutil.copytree(made, tmp_path / "served")
    return tmp_path / "served"


@pytest.fixture
def start():
    """Starts servers, and stops them after the test."""
    running: list[Running] = []

    def start(folder, **options) -> Running:
        running.append(Running(folder, **options))
        return running[-1]

    yield start
    for each in running:
        each.close()


@pytest.fixture(scope="module")
def running(made):
    """One server for all tests of a file that change nothing."""
    server = Running(made)
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def here(monkeypatch):
    """Projects' jobs run in a thread of this process instead of another process, and train for a few steps."""

    async def run(self, given, arguments):
        def tell(line):
            given.stage, given.done, given.total, given.note = line.values()

        async with self._one:
            work = {"read": job.read, "train": job.train}[given.kind]
            return await asyncio.to_thread(lambda: work(**arguments, progress=job.Told(tell)))

    monkeypatch.setattr(Background, "run", run)
    short = Recipe.small().changed(steps=4)
    monkeypatch.setattr(Recipe, "for_model", lambda *_: short)
