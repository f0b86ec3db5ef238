"""Without the lm-evaluation-harness, an error says which extra installs it."""

import sys

import pytest

from ia3 import InputError
from ia3.harness import __main__ as command
from ia3.harness.running import evaluate_each


@pytest.fixture
def without(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval" or name == "ia3.harness.model"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)


def test_in_python(without):
    with pytest.raises(InputError, match=r"pip install 'ia3\[lm-eval\]'"):
        evaluate_each("smollm2", "__base__", ["copa"])


def test_in_the_command(without, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "ia3", "--model_args", "pretrained=smollm2"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2 and "ia3[lm-eval]" in capsys.readouterr().err
