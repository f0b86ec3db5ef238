"""Tables that somebody labels and trains an adapter on, on the server's page: `Projects`.

Each is a folder in `.projects` below the adapters' folder:

    rows.csv          the table as it was sent
    project.json      `State`: which column, which labels
    embeddings.npy    what tells which texts are alike
    adapter.zip       the trained adapter, which is served, too

`.lock` beside them is locked by the one server that has the projects of this adapters' folder.
"""

from __future__ import annotations

import asyncio
import csv
import io
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from ia3.errors import InputError, brief, problems, shown
from ia3.files import new_folder, read_json, write_json
from ia3.files.atomic import temporary_in
from ia3.serve.adapter import FILES
from ia3.serve.background import Background, Cancelled, Job
from ia3.serve.store import NAME, Conflict, Store, storing
from ia3.task.reading import read_pieces, read_rows
from ia3.task.template import as_text, has_jinja, is_missing

if TYPE_CHECKING:
    import numpy as np

    from ia3.serve.engine import Engine

logger = logging.getLogger(__name__)

FOLDER = ".projects"
"""The folder of all projects, below the adapters' folder. No adapter's name begins with a dot."""

# Maxima. Each text is read by a model.
_MOST_ROWS, _MOST_LABELS, _MOST_PROJECTS = 5_000, 50, 100

# Rows of a label that cross-validation needs.
_LEAST = 2

# The rows that were labelled last say what is in doubt.
_MOST_KNOWN = 500

# Characters of a column's name; a longer one is a text, so that the line with names is missing.
_LONGEST_NAME = 60

# Characters of a label, also in requests' bodies.
_LONGEST_LABEL = 60

_ROWS, _STATE, _EMBEDDINGS, _ZIP, _LOCK = "rows.csv", "project.json", "embeddings.npy", "adapter.zip", ".lock"

Row = dict[str, Any]


class UnknownProject(InputError):
    """There is no project with this name."""


class Measured(BaseModel):
    """What is known of a trained adapter.

    Attributes:
        labelled: the number of rows that had labels.
        examples: the number of training rows, which are fewer if a label has very many.
        accuracy: the share of these that were predicted right by what had not seen them; None: nothing was cross-validated.
        majority: the share of the most frequent label.
    """

    labelled: int
    examples: int
    accuracy: float | None
    majority: float


class State(BaseModel):
    """The content of a project's file.

    Attributes:
        column: the column of the text.
        label_column: the column of the label in training and in the labels' file.
        labels: the names of the labels.
        given: row, from 1, → its label, in the order in which they were given; None: the row was skipped.
        from_table: so many of these were in the table already.
        measured: None: nothing was trained.
    """

    column: str
    label_column: str
    labels: list[str]
    given: dict[int, str | None]
    from_table: int
    measured: Measured | None = None


class Project:
    """A table, and what is known of it.

    Args:
        folder: its folder, whose name is the project's and the adapter's.
        state: which is changed here.
        rows: of the table.

    Attributes:
        texts: row, from 1, → its text; of equal texts the first, and none that is empty.
        jobs: the work that runs or waits, the newest last, each with what is done when it ends.
        problem: why the last work failed, or None.
        removed: nothing is written any more.
    """

    def __init__(self, folder: Path, state: State, rows: Sequence[Row]) -> None:
        self.folder, self.state = folder, state
        self.texts = _texts(rows, state.column)
        self._rows = rows
        self.jobs: dict[Job, asyncio.Future[None]] = {}
        self.problem: str | None = None
        self.removed = False
        self._saving = asyncio.Lock()

    @classmethod
    def load(cls, folder: Path) -> Project:
        """The project in a folder. Raises `InputError` if its files are damaged."""
        try:
            state = State.model_validate(read_json(folder / _STATE))
        except ValidationError as error:
            raise InputError(f"Cannot use {_STATE}: {problems(error, 'it')}.") from None
        rows = read_rows(folder / _ROWS)
        if state.column in rows[0]:
            project = cls(folder, state, rows)
            if state.given.keys() <= project.texts.keys():
                return project
        raise InputError(f"Expected {_STATE} and {_ROWS} of one table, found those of two; restore or remove them.")

    @property
    def name(self) -> str:
        """Its name, and its adapter's."""
        return self.folder.name

    @property
    def labelled(self) -> dict[int, str]:
        """Row → its label, without rows that were skipped."""
        return {number: label for number, label in self.state.given.items() if label is not None}

    @property
    def embeddings(self) -> Path:
        """The file of the texts' embeddings, in their order."""
        return self.folder / _EMBEDDINGS

    @property
    def zip(self) -> Path:
        """The file of the trained adapter."""
        return self.folder / _ZIP

    def to_dict(self) -> dict[str, Any]:
        """The project for clients."""
        state, counts = self.state, Counter(self.labelled.values())
        last = [*state.given.items()][state.from_table :][-1:]
        return {
            "name": self.name,
            "column": state.column,
            "rows": len(self.texts),
            "labels": {label: counts[label] for label in state.labels},
            "skipped": len(state.given) - counts.total(),
            "last": next(({"row": row, "text": self.texts[row], "label": label} for row, label in last), None),
            "job": next((job.to_dict() for job in reversed(self.jobs)), None),
            "problem": self.problem,
            "trained": None if state.measured is None else state.measured.model_dump(),
        }

    def require(self) -> None:
        """Raise `UnknownProject` if it was removed meanwhile."""
        if self.removed:
            raise _unknown(self.name)

    async def save(self) -> None:
        """Write the state, which is then on disk. Raises `UnknownProject` if the project was removed."""
        async with self._saving:
            self.require()  # or its folder would come back
            content = self.state.model_dump()
            with storing():
                await asyncio.to_thread(write_json, self.folder / _STATE, content)

    async def remove(self) -> None:
        """Remove its folder, when its work has ended."""
        self.removed = True
        await self.cancel("read", "train")
        async with self._saving:
            with storing():
                await asyncio.to_thread(_remove, self.folder)

    def works(self, kind: str) -> bool:
        """Whether such a job runs or waits."""
        return any(job.kind == kind for job in self.jobs)

    async def cancel(self, *kinds: str) -> None:
        """End jobs of these kinds, and wait for their end."""
        some = {job: ended for job, ended in self.jobs.items() if job.kind in kinds}
        for job in some:
            job.cancel()
        await asyncio.gather(*some.values())

    async def give(self, row: int, label: str | None) -> None:
        """Label a row, or skip it. Raises `InputError` if there is no such row or label."""
        if row not in self.texts:
            raise InputError(f"Expected the number of a row with a text, found {row}.")
        if label is not None and label not in self.state.labels:
            raise InputError(f"Expected a label of {shown(self.state.labels)}, found {brief(label)}.")
        self.state.given = {number: its for number, its in self.state.given.items() if number != row} | {row: label}
        await self.save()

    async def take_back(self, row: int) -> None:
        """Forget a row's label. Raises `InputError` if it has none."""
        if row not in self.state.given:
            raise InputError(f"Expected a row that was labelled or skipped, found {row}.")
        del self.state.given[row]
        self.state.from_table = min(self.state.from_table, len(self.state.given))
        await self.save()

    async def name_labels(self, labels: Sequence[str]) -> None:
        """Add labels, or take away some. Raises `InputError` for labels that rows have, and for those that cannot be told apart."""
        _require_labels(labels)
        lost = [label for label in dict.fromkeys(self.labelled.values()) if label not in labels]
        if lost:
            raise InputError(f"Expected labels with those that rows have, found none of {shown(lost)}.")
        _require_task(self.name, self.state.column, self.state.label_column, labels)
        self.state.labels = list(labels)
        await self.save()

    def examples(self) -> list[Row]:
        """The labelled rows, with a text and a label each. Raises `InputError` if they are too few to train on."""
        state, counts = self.state, Counter(self.labelled.values())
        few = [f"{counts[label]} of {brief(label, 80)}" for label in state.labels if counts[label] < _LEAST]
        if few:
            more = f" and {len(few) - 5} more" if len(few) > 5 else ""
            raise InputError(
                f"Expected at least {_LEAST} rows of each label, found {', '.join(few[:5])}{more}",
                "label more rows, or remove labels that you do not need",
            )
        return [
            {state.column: self.texts[number], state.label_column: label} for number, label in self.labelled.items()
        ]

    def labels_file(self) -> str:
        """The labelled rows with all their columns as CSV, as `ia3 train` reads them; equal texts have equal labels."""
        by_text = {self.texts[number]: label for number, label in self.labelled.items()}
        name = self.state.label_column
        text = io.StringIO()
        names = list(dict.fromkeys([*self._rows[0], name]))
        # Lines end in \r\n, because only characters of the line's end are quoted: a bare \r would end the row for who reads it.
        writer = csv.DictWriter(text, names, lineterminator="\r\n")
        writer.writeheader()
        for row in self._rows:
            its = by_text.get(as_text(row[self.state.column]))
            if its is not None:
                writer.writerow({**row, name: its})
        return text.getvalue()


class Projects:
    """The projects of a server. Unless documented otherwise, methods are called on the event loop.

    Args:
        store: gets the trained adapters.
        engine: whose base model they are for.
    """

    def __init__(self, store: Store, engine: Engine) -> None:
        self._store, self._engine = store, engine
        self._root = Path(store.root, FOLDER)
        self._open: dict[str, Project] = {}
        self._changing = asyncio.Lock()
        self._background = Background()
        self._lock: int | None = None

    def require_training(self) -> None:
        """Raise `InputError` if no adapters can be trained here: where none can be uploaded, and beside some engines."""
        self._store.require_folder()
        if self._engine.source is None:
            raise InputError("Expected an engine that leaves memory for training, found another; use --engine local.")

    @property
    def refused(self) -> str | None:
        """Why no adapters can be trained here; None: they can, and no other server takes the projects that there are."""
        try:
            self.require_training()
            if self._root.is_dir():
                self._claim()
        except InputError as error:
            return str(error)
        return None

    async def names(self) -> list[str]:
        """The names of all projects."""

        def found() -> list[str]:
            return sorted(each.name for each in self._root.iterdir() if NAME.fullmatch(each.name) and each.is_dir())

        return await asyncio.to_thread(found) if await asyncio.to_thread(self._root.is_dir) else []

    async def get(self, name: str) -> Project:
        """A project.

        Raises:
            UnknownProject: there is none with this name.
            InputError: its files are damaged.
            Conflict: another server has the projects.
        """
        async with self._changing:
            if name not in self._open:
                if name not in await self.names():
                    raise _unknown(name)
                self._claim()
                self._open[name] = await asyncio.to_thread(Project.load, self._root / name)
            return self._open[name]

    async def create(
        self, name: str, table: str, column: str, labels: Sequence[str], label_column: str | None
    ) -> Project:
        """Make a project of a table, and begin to read its texts.

        Args:
            name: for the project and its adapter.
            table: CSV, with the columns' names in its first line.
            column: the column of the text.
            labels: names of labels, further to those in the table.
            label_column: the column with labels so far; None: no row has one.

        Raises:
            InputError: the table, column or labels cannot be used.
            Conflict: there is a project or an adapter with this name, there are too many, or another server has them.
            NotStored: the adapters' folder cannot be written to.
        """
        self.require_training()
        self._store.require_name(name, new=True)
        rows = await asyncio.to_thread(rows_of, table)
        state = await asyncio.to_thread(_first_state, name, rows, column, labels, label_column)
        async with self._changing:
            self._claim()
            known = await self.names()
            if name in known:
                raise Conflict(f"There is another project {name!r}; choose another name, or remove that one.")
            if len(known) >= _MOST_PROJECTS:
                raise Conflict(f"Expected at most {_MOST_PROJECTS} projects; remove one first.")
            with storing():
                await asyncio.to_thread(_write, self._root / name, table, state)
            project = self._open[name] = Project(self._root / name, state, rows)
        self._begin(project, "read", self._read)
        return project

    async def remove(self, name: str) -> None:
        """Remove a project with its labels. Its adapter is served on.

        Raises:
            UnknownProject: there is none with this name.
            Conflict: another server has the projects.
            NotStored: the adapters' folder cannot be written to.
        """
        async with self._changing:
            if name not in await self.names():
                raise _unknown(name)
            self._claim()
            project = self._open.pop(name, None)
            if project is not None:
                await project.remove()
                return
            with storing():
                await asyncio.to_thread(_remove, self._root / name)

    async def suggest(self, project: Project, count: int) -> list[dict[str, Any]]:
        """The rows whose labels would teach most, the best first, each with its number and text. None as long as texts are read,
        which begins anew if it has failed."""
        if not await asyncio.to_thread(project.embeddings.is_file):
            self.require_training()
            if not project.works("read"):
                self._begin(project, "read", self._read)
            return []
        found = await asyncio.to_thread(
            _suggested, project.embeddings, [*project.texts], project.labelled, {*project.state.given}, count
        )
        return [{"row": number, "text": project.texts[number]} for number in found]

    def train(self, project: Project) -> None:
        """Begin to train a project's adapter; it is served at the end.

        Raises:
            InputError: labels are too few; see also `require_training`.
            Conflict: it is being trained already.
        """
        self.require_training()
        project.examples()
        self._begin(project, "train", self._train)

    async def stop(self) -> None:
        """End all work, and leave the projects to other servers."""
        for project in [*self._open.values()]:
            await project.cancel("read", "train")
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _claim(self) -> None:
        """Keep other servers from the projects until `stop`: each has the labels in its memory, and would write over the other's.

        Raises `Conflict` if another server has them. Does not wait for a lock, and is not called by two threads.
        """
        if self._lock is not None:
            return
        with storing():
            self._root.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._root / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise Conflict("Another server has the projects of this folder; label and train there.") from None
        except (ImportError, OSError):  # not POSIX, or a file system without locks
            pass
        self._lock = lock

    def _begin(self, project: Project, kind: str, work: Callable[[Project, Job], Coroutine[Any, Any, None]]) -> None:
        project.require()
        if project.works(kind):
            raise Conflict(f"Project {project.name!r} is being trained already; wait for its end, or cancel it.")
        job, project.problem = Job(kind), None

        async def run() -> None:
            try:
                await work(project, job)
            except Cancelled:
                pass
            except InputError as error:
                project.problem = self._store.public(str(error))
            except Exception:
                logger.exception("a job has failed")
                project.problem = "Something went wrong here; see the server's log."
            finally:
                del project.jobs[job]

        project.jobs[job] = asyncio.ensure_future(run())

    def _model(self) -> dict[str, Any]:
        return {"model": self._engine.source, "dtype": self._engine.dtype}

    async def _read(self, project: Project, job: Job) -> None:
        texts = [*project.texts.values()]
        await self._background.run(job, {**self._model(), "texts": texts, "output": str(project.embeddings)})

    async def _train(self, project: Project, job: Job) -> None:
        columns = {"column": project.state.column, "label_column": project.state.label_column}
        what = {**self._model(), **columns, "name": project.name, "rows": project.examples()}
        with storing(), temporary_in(project.folder, "training") as folder:
            found = await self._background.run(job, {**what, "output": str(folder)})
            job.stage, job.done, job.total, job.note = "Checking the adapter …", 0, 0, ""
            made = folder / "adapter"
            await self._store.upload(
                project.name, {name: _copying(made / name) for name in FILES if (made / name).is_file()}
            )
            os.replace(folder / _ZIP, project.zip)
        project.state.measured = Measured(**found)
        await project.save()


def rows_of(table: str) -> list[Row]:
    """The rows of a CSV text, checked. Blocks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, _ROWS)
        path.write_text(table.lstrip("\ufeff\r\n"), encoding="utf-8", newline="")
        try:
            rows = next(read_pieces(path, _MOST_ROWS + 1), [])
        except InputError as error:
            error.message = error.message.replace(repr(str(path)), "the table").replace(str(path), "the table")
            error.argument, error.advice = None, error.advice.partition(" See")[0]
            raise
    assert isinstance(rows, list)  # as those of CSV are
    if not rows:
        raise InputError("Expected rows in the table, found none.")
    odd = [name for name in rows[0] if not _is_name(name)]
    if odd:
        raise InputError(
            f"Expected the columns' names in the first line, found {brief(odd[0], 80)}", "add a line such as text above"
        )
    if len(rows) > _MOST_ROWS:
        raise InputError(f"Expected at most {_MOST_ROWS} rows, found more; take some at random.")
    return rows


def described(rows: Sequence[Row]) -> dict[str, Any]:
    """A table for somebody who chooses its columns."""
    columns = []
    for name in rows[0]:
        cells = [as_text(row[name]) for row in rows if not is_missing(row[name])]
        different = sorted({*cells})
        columns.append(
            {
                "name": name,
                "filled": len(cells),
                "examples": list(dict.fromkeys(cells))[:3],
                "labels": different if 2 * len(different) <= len(cells) and len(different) <= _MOST_LABELS else None,
            }
        )
    return {"rows": len(rows), "columns": columns}


def _is_name(text: str) -> bool:
    """Whether a text may be a column's name: neither a cell of a table without names, nor a template."""
    try:
        float(text)
    except ValueError:
        return 0 < len(text) <= _LONGEST_NAME and not text.isspace() and not has_jinja(text)
    return False


def _unknown(name: str) -> UnknownProject:
    return UnknownProject(f"There is no project {name[:100]!r}.")


def _texts(rows: Sequence[Row], column: str) -> dict[int, str]:
    found: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if not is_missing(row[column]):
            found.setdefault(as_text(row[column]), number)
    return {number: text for text, number in found.items()}


def _first_state(name: str, rows: Sequence[Row], column: str, labels: Sequence[str], label_column: str | None) -> State:
    for asked in (column, label_column):
        if asked is not None and asked not in rows[0]:
            raise InputError(f"Expected a column of {shown(rows[0])}, found {brief(asked)}.")
    if column == label_column:
        raise InputError(f"Expected two columns for text and label, found {brief(column)} for both.")
    texts = _texts(rows, column)
    if len(texts) < 2 * _LEAST:
        raise InputError(
            f"Expected at least {2 * _LEAST} different texts in the column {brief(column)}, found {len(texts)}",
            "choose another",
        )
    given: dict[int, str | None] = {}
    if label_column is not None:
        cells = {number: rows[number - 1][label_column] for number in texts}
        given = {number: as_text(cell).strip() for number, cell in cells.items() if not is_missing(cell)}
    else:
        label_column = "label"
        while label_column in rows[0]:
            label_column += "_"
    names = list(dict.fromkeys([*labels, *(label for label in given.values() if label is not None)]))
    _require_labels(names)
    _require_task(name, column, label_column, names)
    return State(column=column, label_column=label_column, labels=names, given=given, from_table=len(given))


def _require_labels(labels: Sequence[str]) -> None:
    if len(labels) < 2:
        raise InputError(f"Expected at least two labels, found {shown(labels)}; there is nothing to tell apart.")
    if len(labels) > _MOST_LABELS:
        raise InputError(
            f"Expected at most {_MOST_LABELS} labels, found {len(labels)}; is it the column of the labels?"
        )
    long = [label for label in labels if len(label) > _LONGEST_LABEL]
    if long:
        raise InputError(
            f"Expected labels of at most {_LONGEST_LABEL} characters, found {brief(long[0], 80)}; is it the column of the labels?"
        )
    if len({*labels}) < len(labels):
        raise InputError(f"Expected labels that differ, found {shown(labels, 20)}.")


def _require_task(name: str, column: str, label_column: str, labels: Sequence[str]) -> None:
    """Raise `InputError` for labels that no task can have, such as two with the same answer."""
    from ia3.task.task import Task

    Task.infer([{column: "text", label_column: label} for label in labels], label_column, column, name=name)


def _write(folder: Path, table: str, state: State) -> None:
    with new_folder(folder) as temporary:
        (temporary / _ROWS).write_text(table.lstrip("\ufeff\r\n"), encoding="utf-8", newline="")
        write_json(temporary / _STATE, state.model_dump())


def _remove(folder: Path) -> None:
    """Remove a folder, in one step for those who look."""
    with temporary_in(folder.parent, folder.name) as temporary:
        os.rename(folder, temporary / folder.name)


def _copying(path: Path) -> Callable[[Path], Awaitable[None]]:
    async def copy(to: Path) -> None:
        await asyncio.to_thread(shutil.copyfile, path, to)

    return copy


def _suggested(
    path: Path, numbers: Sequence[int], labelled: Mapping[int, str], given: set[int], count: int
) -> list[int]:
    """The numbers of rows to label next. Blocks."""
    import numpy as np

    from ia3.evaluation.suggesting import suggest

    embeddings = np.load(path, allow_pickle=False)
    place = {number: index for index, number in enumerate(numbers)}
    left = [number for number in numbers if number not in given]
    if not left:
        return []
    unknown = embeddings[[place[number] for number in left]]
    known = [*labelled.items()][-_MOST_KNOWN:]
    probabilities: np.ndarray | None = None
    if len({label for _, label in known}) > 1:
        from ia3.opinions.head import fit_head

        states = embeddings[[place[number] for number, _ in known]]
        head, _ = fit_head(states[:, None], [label for _, label in known])
        probabilities = np.exp(head.log_probs(unknown[:, None]))
    return [left[index] for index in suggest(unknown, min(count, len(left)), probabilities)]
