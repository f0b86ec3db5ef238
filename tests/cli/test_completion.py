"""The shell completes commands and options of `ia3`."""

import os
import subprocess
import sys

import pytest

COMMAND = "import sys; sys.argv[0] = 'ia3'; from ia3.cli import main; main()"


def said(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_asks_the_command(shell):
    assert "_IA3_COMPLETE=complete_" in said(
        "--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"
    )


@pytest.mark.parametrize("typed, offered", [("ia3 pre", "predict pretrain"), ("ia3 train --labe", "--label-column --label-columns --label-separator")])  # fmt: skip
def test_what_is_offered(typed, offered):
    count = len(typed.split()) - 1
    assert (
        sorted(said(COMP_WORDS=typed, COMP_CWORD=str(count), _IA3_COMPLETE="complete_bash").split()) == offered.split()
    )
