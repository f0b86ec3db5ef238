"""Shared by the tests of commands."""

import pytest

from ia3.cli import main


@pytest.fixture
def ia3(capsys, monkeypatch):
    """Runs the command line in this process: exit code, standard output, standard error.

    Options may come as keywords; None leaves one out.
    """
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
