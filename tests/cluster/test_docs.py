"""The commands of docs/ray.md run as they stand there, with a tiny model."""

import re
import shlex

import pyarrow
import pytest
from pyarrow import parquet

from support import words
from support.paths import ROOT


def block(page: str, name: str) -> str:
    found = re.search(rf"<!-- example: {name} -->\n```\w+\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S)
    assert found is not None
    return found[1]


@pytest.mark.slow
def test_the_commands(started_ray, ia3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words.save_model(tmp_path / "model")
    task = block("tasks.md", "task.yaml")
    (tmp_path / "task.yaml").write_text(task)
    (tmp_path / "urgency.yaml").write_text(task.replace("name: tickets", "name: urgency"))
    names = {"pos": "billing", "neg": "technical"}
    tickets = [{"message": row["text"], "queue": names[row["label"]]} for row in words.different(60)]
    for name in ("tickets", "checked"):
        words.write_csv(tmp_path / f"{name}.csv", tickets)
    (tmp_path / "rows").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([{"message": row["message"]} for row in tickets]), "rows/new.parquet")
    for name, more in (
        ("ray-train", ["--model", "model", "--steps", "2", "--opinions", "vectors"]),
        ("ray-predict", []),
    ):
        program, *arguments = shlex.split(block("ray.md", name))
        code, _, err = ia3(*arguments, *more)
        assert program == "ia3" and not code, err
    found = parquet.read_table("answered/new.parquet")
    assert found.column_names == ["message", "prediction", "probabilities"] and len(found) == 60
    assert {*found.column("prediction").to_pylist()} <= {*names.values()}
    for name in ("tickets/seed-1", "urgency/seed-0"):
        assert (tmp_path / "adapters/shared" / name / "adapter_model.safetensors").is_file()
