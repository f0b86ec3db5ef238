"""`ia3 suggest`: from a pool to rows to label, and again with what was learned."""

import csv
import json

import pytest

from ia3.cli import main
from support import words
from support.sentences import write

POOL = [row["text"] for row in words.different(40, seed=2)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suggest")
    words.save_model(folder / "model")
    write(folder / "encoder")
    words.write_csv(folder / "pool.csv", [{"id": str(i), "text": text} for i, text in enumerate([*POOL, POOL[0], ""])])
    return folder


@pytest.fixture
def ia3(place, capsys, monkeypatch):
    monkeypatch.chdir(place)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


def test_the_way_from_a_pool_to_an_adapter_and_back(ia3, place):
    code, out, err = ia3("suggest", "--data", "pool.csv", "-n", "8", "--encoder", "encoder", "-o", "first.csv")
    assert code == 0 and "8 rows written to first.csv; fill in the column 'label'." in out, err
    with open(place / "first.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({row["text"] for row in rows}) == 8 and {row["label"] for row in rows} == {""}
    known = {row["text"]: row["label"] for row in words.different(40, seed=2)}
    words.write_csv(place / "labelled.csv", [{**row, "label": known[row["text"]]} for row in rows])
    train = ["train", "--data", "labelled.csv", "--text-column", "text", "--model", "model", "--opinions", "head"]
    train += [
        "--template",
        words.TEMPLATE,
        "--examples-per-label",
        "0",
        "--test-data",
        "labelled.csv",
        "--output",
        "adapter",
    ]
    code, _, err = ia3(*train)
    assert code == 0, err
    for more in (["--encoder", "encoder"], []):
        code, out, err = ia3("suggest", "-d", "pool.csv", "-n", "5", "-a", "adapter", *more, "--json")
        assert code == 0, err
        found = json.loads(out)
        assert len(found) == 5
        # What the adapter has learned from is not asked again.
        assert not {one["text"] for one in found} & {row["text"] for row in rows}
        assert all(one["text"] == [*POOL, POOL[0], ""][one["row"] - 1] for one in found)


def test_several_text_columns(ia3, place):
    words.write_csv(place / "two.csv", [{"title": text, "body": text} for text in POOL])
    code, out, err = ia3("suggest", "-d", "two.csv", "-n", "3", "--model", "model", "--text-column", "title,body")
    assert code == 0 and "3 of " in out, err
    code, _, err = ia3("suggest", "-d", "two.csv", "-n", "3", "--model", "model", "--text-column", "title,name")
    assert code == 2 and "Expected a column 'name', found the columns 'title', 'body'" in err


def test_rows_that_have_a_label_are_left_out(ia3, place):
    rows = [{"text": text, "label": "" if number < 3 else "pos"} for number, text in enumerate(POOL)]
    words.write_csv(place / "half.csv", rows)
    code, out, _ = ia3("suggest", "-d", "half.csv", "-n", "3", "--model", "model")
    assert code == 0 and "3 of 3 rows" in out
    code, _, err = ia3("suggest", "-d", "half.csv", "-n", "4", "--model", "model")
    assert code == 2 and "Expected a --count of at most 3, the different rows without a label, found 4." in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "pool.csv", "-o", "x.txt"], "Expected --output to end in .csv or .jsonl"),
        (["-d", "pool.csv", "--text-column", "words"], "Expected a column 'words'"),
        (["-d", "nothing.csv"], "nothing.csv"),
        (["-d", "pool.csv", "-a", "model"], "adapter"),
    ],
)
def test_bad_input_is_said_in_one_line(ia3, arguments, message):
    code, _, err = ia3("suggest", *arguments)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
