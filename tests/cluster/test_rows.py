"""`ia3 predict --ray`: each row of each file once, as the command answers it without Ray, also if a worker dies."""

import csv
import json
import shutil
import threading
import time
from collections import Counter

import pyarrow
import pytest
import torch
from pyarrow import parquet

from ia3 import IA3Config, IA3Model, InputError, Task, load_base
from ia3.cluster import connection
from ia3.cluster.job import Output, sources_of
from ia3.cluster.rows import _Reading, _Writer
from support import words

TASKS = {
    "taste": Task(name="taste", template="review : {{ text }} answer :", choices={"pos": "good", "neg": "not good"}),
    "heat": Task(
        name="heat",
        template="{{ text }} is",
        choices={"low": "fine", "high": "bad", "none": "not"},
        grades=["none", "low", "high"],
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and two adapters with random vectors, each with its task."""
    folder = tmp_path_factory.mktemp("place")
    words.save_model(folder / "model")
    for name, task in TASKS.items():
        base, _ = load_base(str(folder / "model"), dtype="float32")
        model = IA3Model(base, IA3Config(task_type="CAUSAL_LM", base_model_name_or_path=str(folder / "model")))
        with torch.no_grad():
            for parameter in model.adapter_parameters("default"):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        model.save_pretrained(folder / "adapters" / name)
        task.save(folder / "adapters" / name / "task.yaml")
    return folder


def rows(count, seed=0):
    """Rows that name an adapter each."""
    some = words.different(count, seed=seed)
    return [{"id": number, "adapter": [*TASKS][number % 3 > 0], "text": row["text"]} for number, row in enumerate(some)]


def write_parquet(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(found), path)


def written(table_row):
    """A row of a written table, as JSON has it."""
    return {**table_row, "probabilities": dict(table_row["probabilities"])}


@pytest.mark.slow
def test_each_file_is_what_the_command_writes_without_ray(started_ray, ia3, place, tmp_path):
    found = rows(60)
    (tmp_path / "rows/deep").mkdir(parents=True)
    lines = "\n".join(map(json.dumps, found))
    (tmp_path / "rows/deep/a.jsonl").write_text(lines)
    words.write_csv(tmp_path / "rows/b.csv", found, ";")
    write_parquet(tmp_path / "rows/c.parquet", found)
    (tmp_path / "rows/empty.jsonl").write_text("")
    write_parquet(tmp_path / "rows/none.parquet", found[:1])
    parquet.write_table(parquet.read_table(tmp_path / "rows/none.parquet").slice(0, 0), tmp_path / "rows/none.parquet")
    options = {"adapter_column": "adapter", "dtype": "float32"}
    code, out, err = ia3(
        "predict",
        place / "adapters",
        "--json",
        **options,
        data=tmp_path / "rows",
        output=tmp_path / "answered",
        ray="local",
    )
    assert code == 0, err
    done = json.loads(out)
    assert (done["files"], done["rows"], done["errors"], done["earlier"]) == (5, 180, 0, 0)
    for name, source in (("a.jsonl", "deep/a.jsonl"), ("b.csv", "b.csv")):
        alone = {**options, "data": tmp_path / "rows" / source, "output": tmp_path / name}
        assert ia3("predict", place / "adapters", **alone)[0] == 0
    answered = tmp_path / "answered"
    alone = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    shared = [json.loads(line) for line in (answered / "deep/a.jsonl").read_text().splitlines()]
    tabled = [written(row) for row in parquet.read_table(answered / "c.parquet").to_pylist()]
    for each in (shared, tabled):
        for one, other in zip(each, alone, strict=True):
            one = {name: value for name, value in one.items() if value is not None}  # of the other task
            assert one.pop("probabilities") == pytest.approx(other["probabilities"], abs=1e-5)
            for name in ("expected", "spread"):
                assert one.pop(name, None) == pytest.approx(other.get(name), abs=1e-5)
            assert one.items() <= other.items() and one["prediction"] == other["prediction"]
    alone, shared = (
        list(csv.DictReader(path.open(), delimiter=";")) for path in (tmp_path / "b.csv", answered / "b.csv")
    )
    for one, other in zip(shared, alone, strict=True):
        assert one.keys() == other.keys()
        for name, cell in other.items():
            assert one[name] == cell or float(one[name]) == pytest.approx(float(cell), abs=1e-4)
    assert (answered / "empty.jsonl").read_text() == ""
    assert parquet.read_schema(answered / "none.parquet").equals(parquet.read_schema(answered / "c.parquet"))
    # A second run has nothing to do, but for what is new or was removed.
    (answered / "b.csv").unlink()
    before = (answered / "c.parquet").stat().st_mtime_ns
    shutil.copy(tmp_path / "rows/c.parquet", tmp_path / "rows/new.parquet")
    again = ("predict", place / "adapters", "--json")
    code, out, err = ia3(*again, **options, data=tmp_path / "rows", output=answered, ray="local")
    assert code == 0, err
    done = json.loads(out)
    assert (done["files"], done["earlier"], done["answered"], done["rows"]) == (6, 4, 120, 240)
    assert (answered / "c.parquet").stat().st_mtime_ns == before
    # Another job's folder is left alone; and a file whose answers are there must not change.
    code, _, err = ia3(*again, **options, data=tmp_path / "rows", output=answered, ray="local", abstain_below=0.9)
    assert code == 2 and "found that of one with another 'abstain_below'" in err and "--output" in err
    write_parquet(tmp_path / "rows/new.parquet", found[:2])
    code, _, err = ia3(*again, **options, data=tmp_path / "rows", output=answered, ray="local")
    assert code == 2 and "was changed; remove" in err


@pytest.mark.slow
def test_no_row_is_lost_or_answered_twice_if_a_worker_dies(started_ray, ia3, place, tmp_path, kill):
    for number in range(6):
        write_parquet(
            tmp_path / f"rows/{number}.parquet",
            [{**row, "id": row["id"] + 2000 * number} for row in rows(2000, number)],
        )
    done, killed = tmp_path / "answered/.job/done", []

    def watch():
        while not killed:
            if done.is_dir() and list(done.iterdir()) and kill("MapWorker"):
                killed.append(True)
            time.sleep(0.01)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    options = {"adapter_column": "adapter", "data": tmp_path / "rows/*.parquet", "output": tmp_path / "answered"}
    code, out, err = ia3("predict", place / "adapters", "--json", **options, ray="local")
    killed.append(False)
    assert code == 0 and killed[0], err
    assert json.loads(out)["rows"] == 12000
    found = parquet.read_table(tmp_path / "answered", columns=["id", "adapter", "prediction"]).to_pylist()
    assert Counter(row["id"] for row in found) == Counter(range(12000))
    assert all(row["prediction"] in TASKS[row["adapter"]].labels for row in found)


@pytest.mark.slow
def test_rows_that_cannot_be_answered_are_kept_beside(started_ray, ia3, place, tmp_path):
    wrong = [*rows(6), {"id": 6, "adapter": "gone", "text": "the tea"}, {"id": 7, "adapter": "taste"}, *rows(2)]
    (tmp_path / "wrong.jsonl").write_text("\n".join(map(json.dumps, wrong)))
    options = {"adapter_column": "adapter", "data": tmp_path / "wrong.jsonl", "output": tmp_path / "answered"}
    code, out, err = ia3("predict", place / "adapters", **options, ray="local")
    assert code == 0 and "10 rows of 1 files" in out and "2 of them in errors.parquet" in out, err
    found = [json.loads(line) for line in (tmp_path / "answered/wrong.jsonl").read_text().splitlines()]
    assert [row["id"] for row in found] == [row["id"] for row in wrong]
    assert ["prediction" in row for row in found] == [True] * 6 + [False] * 2 + [True] * 2
    errors = parquet.read_table(tmp_path / "answered/errors.parquet").to_pylist()
    assert [(one["file"], one["row"]) for one in errors] == [("wrong.jsonl", 7), ("wrong.jsonl", 8)]
    assert "found 'gone'" in errors[0]["error"] and "text" in errors[1]["error"] and "(row" not in errors[0]["error"]


@pytest.mark.slow
def test_several_adapters_answer_each_row(started_ray, ia3, place, tmp_path):
    write_parquet(tmp_path / "rows/a.parquet", rows(10))
    options = {"data": tmp_path / "rows", "output": tmp_path / "answered"}
    code, _, err = ia3("predict", place / "adapters", "--all-adapters", "--zero-shot", **options, ray="local")
    assert code == 0, err
    for row in parquet.read_table(tmp_path / "answered/a.parquet").to_pylist():
        assert row["adapters"].keys() == TASKS.keys()
        assert row["adapters"]["taste"]["label"] in ("pos", "neg") and row["adapters"]["heat"]["expected"] > 0
        assert dict(row["adapters"]["taste"]["zero_shot"]["probabilities"]).keys() == {"pos", "neg"}


@pytest.mark.slow
def test_a_later_file_without_a_column_ends_the_job(started_ray, ia3, place, tmp_path):
    write_parquet(tmp_path / "rows/a.parquet", rows(10))
    write_parquet(tmp_path / "rows/b.parquet", [{"id": 1, "adapter": "taste", "words": "the tea"}])
    options = {"adapter_column": "adapter", "data": tmp_path / "rows", "output": tmp_path / "answered"}
    code, _, err = ia3("predict", place / "adapters", **options, ray="local")
    assert code == 2 and "'b.parquet': The template names 'text', but the columns are" in err
    assert sorted(path.name for path in (tmp_path / "answered").iterdir()) == [".job", "a.parquet"]


@pytest.fixture
def refused(ia3, place, tmp_path, monkeypatch):
    """Runs the command, which must end before Ray is asked for, and leave no output; returns its error."""

    def connected(*_):
        raise InputError("Ray was asked for.")

    monkeypatch.setattr(connection, "connected", connected)

    def run(data, adapter="adapters", **options):
        options = {"adapter_column": "adapter", "output": tmp_path / "answered", "ray": "local", **options}
        code, _, err = ia3("predict", place / adapter, data=data, **options)
        assert code == 2 and not (tmp_path / "answered").exists()
        return err

    return run


def test_what_is_refused_before_ray_starts(refused, tmp_path):
    write_parquet(tmp_path / "rows/a.parquet", rows(2))
    write_parquet(tmp_path / "no/a.parquet", [{"id": 1, "adapter": "taste", "words": "x"}])
    write_parquet(tmp_path / "empty/a.parquet", rows(2))
    parquet.write_table(parquet.read_table(tmp_path / "empty/a.parquet").slice(0, 0), tmp_path / "empty/a.parquet")
    (tmp_path / "other.txt").write_text("text")
    (tmp_path / "broken.parquet").write_text("PAR1")
    write_parquet(tmp_path / "taken/errors.parquet", rows(2))
    assert "Ray was asked for" in refused(tmp_path / "rows")
    assert "Expected files of rows at" in refused(tmp_path / "gone/*.parquet")
    assert "Expected files that end in .parquet" in refused(tmp_path / "other.txt")
    assert "Expected rows in" in refused(tmp_path / "empty")
    assert "broken.parquet" in refused(tmp_path / "broken.parquet")
    assert "Expected files with other names than errors.parquet" in refused(tmp_path / "taken")
    assert "no/a.parquet': The template names 'text', but the columns are" in refused(tmp_path / "no")
    assert "Expected a column 'which'" in refused(tmp_path / "rows", adapter_column="which")
    for output in (tmp_path / "rows", tmp_path / "rows" / "answered"):
        assert "Expected a folder outside that of the rows" in refused(tmp_path / "rows", output=output)
    assert "found the file" in refused(tmp_path / "rows", output=tmp_path / "other.txt")
    assert "a new or empty folder, or this job's" in refused(tmp_path / "rows", output=tmp_path / "no")
    assert "Expected labels with --ray, found --seed" in refused(tmp_path / "rows", seed=1)
    assert "Expected --data and --output with --ray" in refused(tmp_path / "rows", output=None)
    assert "Expected an adapter in" in refused(tmp_path / "rows", adapter_column=None, adapters="none")


def test_csv_files_want_tasks_with_the_same_labels(refused, place, tmp_path):
    task = Task(name="own", template="{{ text }}", choices="{{ answers }}", label_column="label")
    shutil.copytree(place / "adapters", place / "more", dirs_exist_ok=True)
    task.save(place / "more/heat/task.yaml")
    words.write_csv(tmp_path / "a.csv", rows(3))
    assert "same labels for all rows in .csv files, found 'own'" in refused(tmp_path / "a.csv", adapter="more")


def test_a_file_that_changes_while_it_is_read(tmp_path):
    write_parquet(tmp_path / "a.parquet", rows(2))
    [source] = sources_of(str(tmp_path / "a.parquet"))
    with source.local() as path:
        assert path == str(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet' to stay as it is .*, found that it was changed"), source.local():
        write_parquet(tmp_path / "a.parquet", rows(3))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(InputError, match="Cannot read"), source.local():
        pass


def test_a_change_in_the_middle_is_the_last_thing_read(tmp_path):
    path = words.write_csv(tmp_path / "a.csv", rows(3000))
    pieces = _Reading(sources_of(str(path)), None)(pyarrow.table({"file": [0]}))
    first = next(pieces).to_pylist()[0]
    words.write_csv(path, rows(3001))
    *_, last = pieces
    assert first["error"] is None and "found that it was changed" in last.to_pylist()[0]["error"]


def test_files_at_an_address_are_read_and_written_there(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({f"/{tmp_path.name}/rows/{name}": b'{"text": "a"}\n' for name in ("b.jsonl", "deep/a.jsonl")})
    sources = sources_of(f"memory://{tmp_path.name}/rows/")
    assert [source.name for source in sources] == ["b.jsonl", "deep/a.jsonl"]
    with sources[1].local() as path, open(path) as file:
        assert file.read() == '{"text": "a"}\n'
    output = Output(f"memory://{tmp_path.name}/answered", {"model": "a"})
    assert output.done(sources) == {}
    output.begin()
    with output.writing("deep/a.jsonl") as path:
        path.write_text("answers")
    output.finish(sources[1], {"rows": 1, "errors": [[1, "wrong"]]})
    assert memory.cat(f"/{tmp_path.name}/answered/deep/a.jsonl") == b"answers"
    [(name, record)] = output.done(sources).items()
    assert name == "deep/a.jsonl" and output.write_errors({name: record}) == 1
    assert memory.exists(f"/{tmp_path.name}/answered/errors.parquet")
    assert output.write_errors({}) == 0 and not memory.exists(f"/{tmp_path.name}/answered/errors.parquet")
    with pytest.raises(InputError, match="found that of one with another 'model'"):
        Output(f"memory://{tmp_path.name}/answered", {"model": "b"}).done(sources)


def test_names_are_relative_to_the_folder_in_front_of_a_pattern(tmp_path):
    for name in ("a/x.jsonl", "b/x.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    assert [source.name for source in sources_of(f"{tmp_path}/*/x.jsonl")] == ["a/x.jsonl", "b/x.jsonl"]
    assert [source.name for source in sources_of(f"{tmp_path}/a/x.jsonl")] == ["x.jsonl"]


def test_pieces_that_do_not_follow_are_noticed(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with (
        _Writer(sources_of(str(tmp_path / "a.jsonl")), Output(str(tmp_path / "out"), {})) as writer,
        pytest.raises(RuntimeError, match="rows from 5 of file 0, not from 0"),
    ):
        writer.take({"file": 0, "start": 5, "error": None, "data": None})
    assert not list(tmp_path.glob("out/*.jsonl"))
