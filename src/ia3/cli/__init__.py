"""The command line, `ia3`: one file per command."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from ia3.cli import (
    compare,
    convert,
    evaluate,
    export,
    inspect,
    merge,
    predict,
    pretrain,
    push,
    raft,
    serve,
    suggest,
    tasks,
    train,
)
from ia3.errors import InputError, excerpt, reason
from ia3.processes import count, is_first

app = typer.Typer(
    name="ia3",
    help="Adapt a pretrained transformer to a task with a few dozen labelled examples, using (IA)³ and T-Few.\n\n"
    "Start with: ia3 train (real model, real data, no download; about a minute on two cores).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("predict")(predict.predict)
app.command("evaluate")(evaluate.evaluate)
app.command("suggest")(suggest.suggest)
app.command("compare")(compare.compare)
app.command("merge")(merge.merge)
app.command("export")(export.export)
app.command("inspect")(inspect.inspect)
app.command("pretrain")(pretrain.pretrain)
app.command("raft")(raft.raft)
app.command("convert")(convert.convert)
app.command("serve")(serve.serve)
app.command("push")(push.push)
app.add_typer(tasks.app, name="tasks")


# Options whose names differ from their arguments.
_OPTIONS = {"per_label": "--examples-per-label", "source": "--data"}


def _version(wanted: bool) -> None:
    if wanted:
        from ia3 import __version__

        typer.echo(f"ia3 {__version__}")
        raise typer.Exit


class _Notices(logging.Handler):
    """Prints the package's messages on standard error, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message, argument = record.getMessage(), getattr(record, "argument", None)
        self.say(message if argument is None else f"{message.removesuffix('.')} ({_option(argument)}).")

    def say(self, message: object, *_: Any) -> None:
        line = f"ia3: {' '.join(str(message).split())}"
        if line not in self._said and is_first():
            self._said.add(line)
            typer.echo(line, err=True)


@contextmanager
def _our_lines_alone() -> Iterator[None]:
    """In a `with` block, print the package's logs and warnings as lines of the command; of libraries only errors."""
    notices, own, others = _Notices(), logging.getLogger("ia3"), logging.lastResort
    level = None if others is None else others.level
    own.addHandler(notices)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.filterwarnings("ignore", module=r"(?!ia3(\.|$))")
        warnings.showwarning = notices.say
        try:
            if others is not None:
                others.setLevel(logging.ERROR)
            yield
        finally:
            own.removeHandler(notices)
            if others is not None and level is not None:
                others.setLevel(level)


@app.callback()
def _options(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Options of the whole program."""
    if count() > 1 and context.invoked_subcommand not in ("train", "pretrain"):
        raise InputError(
            f"Expected one process, found WORLD_SIZE={count()}; a launcher can start ia3 train and ia3 pretrain, but not ia3 "
            f"{context.invoked_subcommand}: unset it."
        )
    if context.invoked_subcommand != "serve":  # which has a log
        context.with_resource(_our_lines_alone())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Bad input: one line on standard error, exit code 2. (Ctrl-C: exit code 130, by typer.)"""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what comes of them is said in one line
    try:
        app(arguments)
    except InputError as error:
        _fail(error.worded(_option))
    except OSError as error:
        # A full disk, a folder that may not be written: the user's to mend, like bad input.
        where = f" ({excerpt(str(error.filename))})" if error.filename else ""
        _fail(f"{error.strerror or error}{where}; what was saved before is still whole.")
    except Exception as error:
        if not _is_failed_write(error):
            raise
        _fail(f"Cannot write a file: {reason(error)}; is the disk full? What was saved before is still whole.")


def _option(argument: str) -> str:
    """The command's option for an argument of the package."""
    return _OPTIONS.get(argument, f"--{argument.replace('_', '-')}")


def _is_failed_write(error: Exception) -> bool:
    """Whether the error means that torch or safetensors could not write; they have their own error types for it."""
    text = str(error)
    return type(error).__name__ == "SafetensorError" or "iostream error" in text or "PytorchStreamWriter" in text


def _fail(message: str) -> None:
    sys.stdout.flush()
    if is_first():
        typer.echo(f"ia3: {' '.join(message.split())}", err=True)
    raise SystemExit(2)
