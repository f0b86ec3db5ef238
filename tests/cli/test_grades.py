"""Grades from training to the service: an expected value beside each label."""

import csv
import json

import pytest

from ia3.cli import main
from support import words
from support.serving import Running


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grades")
    words.save_model(folder / "model")
    words.write_csv(folder / "rows.csv", words.different(40, seed=2))
    return folder


def test_they_go_from_the_command_to_predictions(place, monkeypatch, capsys):
    monkeypatch.chdir(place)

    def ia3(*arguments, code=0):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        out, err = capsys.readouterr()
        assert (ended.value.code or 0) == code, err
        return out if not code else err

    train = ["train", "--data", "rows.csv", "--template", words.TEMPLATE, "--model", "model", "--opinions", "head"]
    out = ia3(*train, "--grades", "neg,pos", "--output", "adapters/teas", "--test-rows", "8")
    assert "mean" in out and "kappa" in out
    metrics = json.loads((place / "adapters/teas/metrics.json").read_text())
    assert metrics["trained"]["mean_absolute_error"] == pytest.approx(1 - metrics["trained"]["accuracy"])
    [found] = json.loads(ia3("predict", "adapters/teas", "the tea was lovely", "--json"))
    p = found["probabilities"]["pos"]
    assert found["expected"] == pytest.approx(1 + p) and found["spread"] == pytest.approx((p * (1 - p)) ** 0.5)
    assert "expected" in ia3("predict", "adapters/teas", "the tea was lovely")
    ia3("predict", "adapters/teas", "--data", "rows.csv", "--output", "said.csv")
    with open(place / "said.csv", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    assert list(row)[-4:] == ["expected", "spread", "probability_neg", "probability_pos"] or "expected" in row
    assert float(row["expected"]) == pytest.approx(1 + float(row["probability_pos"]), abs=1e-4)
    measured = json.loads(ia3("evaluate", "adapters/teas", "--data", "rows.csv", "--json"))
    assert measured["expected_absolute_error"] <= 1 and "quadratic_kappa" in measured
    server = Running(place)
    try:
        said = server.http.post("/v1/classify", json={"adapter": "teas", "texts": ["the tea was lovely"]}).json()
    finally:
        server.close()
    assert said["predictions"][0]["expected"] == pytest.approx(found["expected"], abs=1e-5)
    err = ia3(*train, "--grades", "neg,great", "--output", "no", code=2)
    assert "expected each label once among the grades" in err and len(err.strip().splitlines()) == 1
