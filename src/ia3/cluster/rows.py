"""Files of rows that Ray's workers answer, by Ray Data: `Job`.

One task reads files in pieces, workers with the model and all adapters answer them, and this process writes the answered pieces, in
their order, into a file for each file that was read.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ia3
from ia3.adapter.pretrained import quiet
from ia3.answering import (
    Answer,
    Answering,
    adapter_of,
    columns_of,
    to_csv,
    to_json,
    to_lines,
    with_answers,
    with_cells,
)
from ia3.cluster.connection import Workers
from ia3.cluster.job import Output, Source, digest_of, sources_of
from ia3.errors import InputError, about, brief, reason, shown
from ia3.evaluation.prediction import Prediction
from ia3.evaluation.progress import Progress
from ia3.folder import AdapterFolder
from ia3.task.grades import Grade
from ia3.task.reading import as_delimiter, delimiter_of, is_delimited, read_pieces, require_delimited, rows_of

if TYPE_CHECKING:
    import pyarrow

    from ia3.task.task import Task

# Rows of a piece: what a worker answers at once, and does again if another one died.
_PIECE = 1024

# What kills a worker so often is not tried again.
_DEATHS = 3

# Files that are read at the same time.
_READERS = 2

# A number of a source and of its first row, and what is there: rows, or the end with an error or without one.
_FILE, _START, _ERROR, _DATA = "file", "start", "error", "data"


@dataclass(frozen=True)
class Asked:
    """What is asked about each row, and how; this is sent to all workers.

    Attributes:
        adapters: name → name of a file → content, of every adapter.
        folder: the folder of adapters, for error messages.
        column: the column that names a row's adapter; None: each row asks all adapters.
        each: all adapters answer each row, by their names; otherwise there is one, called `ALONE`, or the column says which.
        options: of `Answering`.
        delimiter: of `.csv` and `.tsv` files; None: detect it.
    """

    adapters: Mapping[str, Mapping[str, bytes]]
    folder: str
    column: str | None
    each: bool
    options: Mapping[str, Any]
    delimiter: str | None = None

    @classmethod
    def of(cls, answering: Answering, folder: str, column: str | None = None, delimiter: str | None = None) -> Asked:
        """What is asked of adapters that are in folders here; the arguments are the attributes of the same names."""
        options = {
            name: getattr(answering, name)
            for name in ("model", "dtype", "device_map", "prior", "zero_shot", "abstain_below", "memory")
        }
        adapters = {name: its.contents() for name, its in answering.folders.items()}
        character = None if delimiter is None else as_delimiter(delimiter)
        return cls(adapters, folder, column, answering.each, options, character)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the answers, as JSON."""
        names = [] if self.column is not None else [*self.adapters]
        of_answers = {name: value for name, value in self.options.items() if name not in ("memory", "device_map")}
        return {
            **of_answers,
            "adapters": digest_of(self.adapters),
            "adapter_column": self.column,
            "names": names,
            "delimiter": self.delimiter,
        }

    def answering(self) -> Answering:
        """The adapters, read from their contents, and asked for their tasks and opinions."""
        with tempfile.TemporaryDirectory() as place:
            folders = {}
            for number, (name, contents) in enumerate(self.adapters.items()):
                folder = Path(place, str(number))
                folder.mkdir()
                for file, data in contents.items():
                    (folder / file).write_bytes(data)
                folders[name] = AdapterFolder(folder)
            found = Answering(folders, self.each, **self.options)
            _ = found.tasks, found.opinions, found.loaded
            return found

    def names(self, row: Mapping[str, Any], number: int) -> list[str]:
        """The adapters that a row asks. Raises `InputError` if its column names none."""
        if self.column is None:
            return [*self.adapters]
        return [adapter_of(row, self.column, self.adapters, self.folder, number)]


@dataclass(frozen=True)
class Done:
    """What a job did.

    Attributes:
        files: answered files, with those of earlier runs.
        earlier: those of earlier runs.
        rows: rows of all files.
        errors: those of them that could not be answered.
        answered: rows that this run read.
        seconds: the time from the first to the last of these.
    """

    files: int
    earlier: int
    rows: int
    errors: int
    answered: int
    seconds: float

    @property
    def rate(self) -> float:
        """Rows a second of this run."""
        return self.answered / self.seconds if self.seconds else 0.0


class Job:
    """Answer all rows of files: a folder with an answered file for each of them.

        job = Job("s3://bucket/rows/*.parquet", "s3://bucket/answered", asked, answering)
        with connected("auto") as workers:
            done = job.run(workers)

    A `.parquet` file has the columns of its source and the fields that `ia3 predict` writes as JSON, a `.jsonl` and a `.csv` file are
    those that it writes. A row that cannot be answered has no answer, and is listed in errors.parquet. A second run does what is
    missing.

    Args:
        data: a path, a pattern or a folder, here or at an address.
        output: the folder for the answered files.
        asked: what is asked.
        answering: the same adapters, to look at the first row before a worker is started.

    Raises:
        InputError: there are no rows; the first row cannot be answered; or the folder is another job's.
    """

    def __init__(self, data: str, output: str, asked: Asked, answering: Answering) -> None:
        self.asked = asked
        self.sources = sources_of(data)
        require_delimited(asked.delimiter, *(source.name for source in self.sources))
        self.output = Output(output, asked.settings)
        self.earlier = self.output.done(self.sources)
        self.left = [source for source in self.sources if source.name not in self.earlier]
        if any(is_delimited(source.name) for source in self.left):
            _columns(answering)
        if self.left:
            self._look(answering)

    def _look(self, answering: Answering) -> None:
        """Raise `InputError` if there is no row, or the first one lacks a column."""
        for source in self.left:
            with source.local() as path:
                piece = next(iter(read_pieces(path, 1, _delimiter_for(path, self.asked.delimiter))), None)
            rows = [] if piece is None else rows_of(piece)
            if rows:
                _require_columns(self.asked, answering, rows[0], source.path)
                return
        if not self.earlier:
            raise InputError(f"Expected rows in {shown([source.path for source in self.left])}, found none.")

    def run(self, workers: Workers | None, progress: Progress | None = None) -> Done:
        """Answer the files that are left.

        Args:
            workers: of `connected`; None will do where no file is left.
            progress: shows files, rows, and rows a second.

        Raises:
            InputError: a file was changed while it was read, cannot be read, or lacks a column; files that are done stay.
        """
        self.output.begin()
        records = dict(self.earlier)
        stage = (progress or Progress()).stage("Files", len(self.sources), len(self.earlier))
        read, started = 0, time.monotonic()
        with _Writer(self.left, self.output) as writer:
            for piece in self._answered(workers) if self.left and workers else ():
                count, record = writer.take(piece)
                read += count
                if record is not None:
                    records[self.left[piece[_FILE]].name] = record
                    stage.advance(1)
                stage.note(f"{read:,} rows, {read / (time.monotonic() - started):,.0f} a second")
        seconds = time.monotonic() - started
        errors = self.output.write_errors(records)
        rows = sum(record["rows"] for record in records.values())
        return Done(len(records), len(self.earlier), rows, errors, read, seconds)

    def _answered(self, workers: Workers) -> Iterator[dict[str, Any]]:
        """The answered pieces of all files that are left, in their order."""
        import ray.data
        from ray.exceptions import RayError, RayTaskError

        read = _Reading(self.left, self.asked.delimiter)
        items = [{_FILE: number} for number in range(len(self.left))]
        data = ray.data.from_items(items, override_num_blocks=len(items))
        data.context.target_max_block_size = 1  # a piece is a block, which a worker takes as a whole
        data.context.execution_options.preserve_order = True
        data.context.enable_progress_bars = data.context.print_on_execution_start = False
        whole: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
        # Readers have no core of their own: workers may have them all.
        data = data.map_batches(read, num_cpus=0, compute=ray.data.TaskPoolStrategy(size=_READERS), **whole)
        with warnings.catch_warnings():
            # Ray 2.60 has no other way yet to say how often a worker may die.
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            data = data.map_batches(
                _Worker,
                fn_constructor_args=(self.asked, [source.name for source in self.left], ia3.__version__, os.getcwd()),
                compute=ray.data.ActorPoolStrategy(size=workers.count),
                max_restarts=_DEATHS,
                max_task_retries=_DEATHS,
                **workers.resources,
                **whole,
            )
        try:
            for batch in data.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield from cast("pyarrow.Table", batch).to_pylist()
        except RayTaskError as error:
            raise InputError(f"A worker ended with an error: {reason(error.cause)}.") from error
        except RayError as error:
            raise InputError(
                f"Expected workers that live, found that they died again and again: {reason(error)}",
                "if memory is short, have fewer by",
                argument="workers",
            ) from error


class _Reading:
    """Reads files, given by their numbers, in pieces; what is wrong is a piece too."""

    def __init__(self, sources: Sequence[Source], delimiter: str | None) -> None:
        self._sources, self._delimiter = sources, delimiter

    def __call__(self, batch: pyarrow.Table) -> Iterator[pyarrow.Table]:
        for number in batch.column(_FILE).to_pylist():
            start = 0
            try:
                with self._sources[number].local() as path:
                    delimiter = _delimiter_for(path, self._delimiter)
                    for piece in read_pieces(path, _PIECE, delimiter):
                        yield _piece(number, start, (piece, delimiter))
                        start += len(piece)
                    if not start:  # whose columns are wanted all the same
                        yield _piece(number, 0, (_nothing(path), delimiter))
            except InputError as error:
                yield _piece(number, start, error=str(error))
            else:
                yield _piece(number, start)


class _Worker:
    """An actor with the model and the adapters, which answers pieces."""

    def __init__(self, asked: Asked, names: Sequence[str], version: str, place: str) -> None:
        quiet()
        self._asked, self._names, self._error = asked, names, ""
        try:
            if version != ia3.__version__:
                raise InputError(f"Expected ia3 {version} on every machine, found {ia3.__version__}; install the same.")
            if os.path.isdir(place):  # for relative paths
                os.chdir(place)
            self._answering = asked.answering()
        except InputError as error:
            self._error = str(error)

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        import pyarrow

        return pyarrow.concat_tables([self._answered(piece) for piece in batch.to_pylist()])

    def _answered(self, piece: Mapping[str, Any]) -> pyarrow.Table:
        number: int = piece[_FILE]
        start: int = piece[_START]
        error = piece[_ERROR] or self._error
        if error or piece[_DATA] is None:
            return _piece(number, start, error=error)
        read, delimiter = pickle.loads(piece[_DATA])
        rows = rows_of(read)
        try:
            if rows and not start:
                _require_columns(self._asked, self._answering, rows[0], self._names[number])
            answers, errors = self._each(rows, start)
        except InputError as wrong:
            return _piece(number, start, error=str(wrong))
        each = self._asked.each
        suffix = Path(self._names[number]).suffix.lower()
        if suffix == ".parquet":
            data: Any = _with_columns(read, answers, self._answering)
        elif suffix == ".jsonl":
            data = to_lines(with_answers(rows, answers, each)).encode()
        else:
            added = _columns(self._answering)
            names = [name for name in (rows[0] if rows else ()) if name not in added] + added
            data = to_csv(with_cells(rows, answers, each, added), names, delimiter or ",", not start).encode()
        return _piece(number, start, (len(rows), data, errors))

    def _each(self, rows: Sequence[Any], start: int) -> tuple[list[list[Answer]], list[tuple[int, str]]]:
        """The answers to each row, none where something is wrong with it; and the numbers of such rows, each with its error."""
        answers: list[list[Answer]] = [[] for _ in rows]
        errors = []
        asked = {}
        for index, row in enumerate(rows):
            try:
                asked[index] = self._asked.names(row, start + index + 1)
            except InputError as error:
                errors.append((start + index + 1, _said(error)))
        waiting = [[*asked]] if asked else []
        while waiting:
            some = waiting.pop()
            try:
                found = self._answering.answers([rows[index] for index in some], [asked[index] for index in some])
            except InputError as error:
                if len(some) == 1:
                    errors.append((start + some[0] + 1, _said(error)))
                else:  # each half for itself, until the wrong rows are found
                    waiting += [some[: len(some) // 2], some[len(some) // 2 :]]
                continue
            for index, its in zip(some, found, strict=True):
                answers[index] = its
        return answers, sorted(errors)


class _Writer(contextlib.ExitStack):
    """Writes answered pieces, which come in their order, to a file for each source.

    Args:
        sources: the sources.
        output: the folder.
    """

    def __init__(self, sources: Sequence[Source], output: Output) -> None:
        super().__init__()
        self._sources, self._output = sources, output
        self._number, self._rows = 0, 0
        self._errors: list[tuple[int, str]] = []
        self._file: contextlib.ExitStack | None = None
        self._write: Callable[[Any], Any] | None = None

    def take(self, piece: Mapping[str, Any]) -> tuple[int, dict[str, Any] | None]:
        """Write a piece; returns the number of its rows, and the record of the file if this was the end of it.

        Raises:
            InputError: the piece is an error.
        """
        if piece[_ERROR]:
            raise InputError(piece[_ERROR])
        if (piece[_FILE], piece[_START]) != (self._number, self._rows):
            raise RuntimeError(
                f"Ray gave rows from {piece[_START]} of file {piece[_FILE]}, not from {self._rows} of {self._number}."
            )
        source = self._sources[self._number]
        if piece[_DATA] is None:
            record = {"rows": self._rows, "errors": self._errors}
            assert self._file is not None
            self._file.close()
            self._output.finish(source, record)
            self._number, self._rows, self._errors, self._file = self._number + 1, 0, [], None
            return 0, record
        rows, data, errors = pickle.loads(piece[_DATA])
        if self._file is None:
            self._file = self.enter_context(contextlib.ExitStack())
            path = self._file.enter_context(self._output.writing(source.name))
            self._write = _opened(self._file, path, data, source.suffix)
        assert self._write is not None
        self._write(data)
        self._rows += rows
        self._errors += errors
        return rows, None


def _opened(stack: contextlib.ExitStack, path: Path, first: Any, suffix: str) -> Callable[[Any], Any]:
    """What writes pieces to a file, given the first of them; the stack closes it."""
    if suffix != ".parquet":
        return stack.enter_context(path.open("wb")).write
    from pyarrow import parquet

    writer = stack.enter_context(parquet.ParquetWriter(path, first.schema))
    return writer.write_table


def _require_columns(asked: Asked, answering: Answering, row: Mapping[str, Any], name: str) -> None:
    """Raise `InputError` if the first row of the file `name`, whose columns others have too, lacks one that is needed."""
    with about(repr(name)):
        if asked.column is not None and asked.column in row:
            try:
                names = asked.names(row, 1)
            except InputError:  # no such adapter: the row's own fault
                return
        else:
            names = asked.names(row, 1)
        for adapter in names:
            if not {*answering.tasks[adapter].columns} <= row.keys():  # which some templates do without
                answering.check(row, 1, [adapter])


def _delimiter_for(path: str, delimiter: str | None) -> str | None:
    """A file's delimiter; None if it has none."""
    if not is_delimited(path):
        return None
    return delimiter_of(path) if delimiter is None else delimiter


def _said(error: InputError) -> str:
    """What is wrong with a row, without its number in what a worker had."""
    error.row = None
    return str(error)


def _piece(number: int, start: int, value: Any = None, error: str | None = None) -> pyarrow.Table:
    """A piece as a row of Ray's."""
    import pyarrow

    schema = {_FILE: "int32", _START: "int64", _ERROR: "string", _DATA: "large_binary"}
    data = None if value is None else pickle.dumps(value)
    found = {_FILE: [number], _START: [start], _ERROR: [error], _DATA: [data]}
    return pyarrow.table(found, schema=pyarrow.schema(schema.items()))


def _nothing(path: str) -> list[Any] | pyarrow.Table:
    """The only piece of a file without rows."""
    if not path.lower().endswith(".parquet"):
        return []
    from pyarrow import parquet

    return parquet.read_schema(path).empty_table()


def _columns(answering: Answering) -> list[str]:
    """The columns of answers in CSV files, the same in all of them.

    Raises:
        InputError: labels differ from row to row, so that nobody knows the columns.
    """
    nothing = []
    for name, task in answering.tasks.items():
        if task.labels is None:
            raise InputError(
                f"Expected tasks with the same labels for all rows in .csv files, found {brief(task.name)}; give .parquet or .jsonl "
                "files."
            )
        found = Prediction(None, dict.fromkeys(task.labels, 0.0), {})
        nothing.append(Answer(name, task, found, found if answering.zero_shot else None))
    return columns_of([nothing], answering.each)


def _with_columns(table: pyarrow.Table, answers: Sequence[Sequence[Answer]], answering: Answering) -> pyarrow.Table:
    """A table with the fields of its rows' answers as columns; see `to_json`."""
    import pyarrow

    each = answering.each
    found = [_pairs(to_json(its, each, label="prediction")) if its else {} for its in answers]
    for name, kind in _types(answering).items():
        values = pyarrow.array([one.get(name) for one in found], kind)
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, values)
    return table


def _types(answering: Answering) -> dict[str, Any]:
    """Arrow's types of the fields that `to_json` writes, the same in all files."""
    import pyarrow

    shares = pyarrow.map_(pyarrow.string(), pyarrow.float64())

    def labelled(tasks: Sequence[Task], label: str) -> dict[str, Any]:
        one = {} if all(task.multi_label for task in tasks) else {label: pyarrow.string()}
        some = {f"{label}s": pyarrow.list_(pyarrow.string())} if any(task.multi_label for task in tasks) else {}
        return {**one, **some, "probabilities": shares}

    def fields(tasks: Sequence[Task], label: str) -> dict[str, Any]:
        graded = dict.fromkeys(Grade._fields, pyarrow.float64()) if any(task.grades for task in tasks) else {}
        beside = {"zero_shot": pyarrow.struct(labelled(tasks, "label").items())} if answering.zero_shot else {}
        return {**labelled(tasks, label), **graded, **beside}

    if not answering.each:
        return fields([*answering.tasks.values()], "prediction")
    each = [(name, pyarrow.struct(fields([task], "label").items())) for name, task in answering.tasks.items()]
    return {"adapters": pyarrow.struct(each)}


def _pairs(value: Any) -> Any:
    """What `to_json` made, with probabilities as Arrow takes a map: label and probability in pairs."""
    if not isinstance(value, dict):
        return value
    return {name: [*its.items()] if name == "probabilities" else _pairs(its) for name, its in value.items()}
