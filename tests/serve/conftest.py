"""A tiny model with adapters, and servers of it."""

import shutil

import pytest

from ia3 import IA3Config, get_peft_model, load_base
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
