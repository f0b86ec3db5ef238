"""Files of rows in commands: their delimiter, how many examples are drawn, and what an adapter is called after them."""

import csv
import json

import pytest

from ia3 import InputError, Task
from ia3.task.raft import RaftTask
from support import words

CHOICES = "pos=good,neg=bad"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, rows whose delimiter no file shows by itself, and a task that knows it."""
    folder = tmp_path_factory.mktemp("files")
    words.save_model(folder / "model")
    words.write_csv(folder / "train.csv", words.different(60), "^")
    words.write_csv(folder / "test.csv", words.different(8, seed=1), "^")
    fields = {"template": "{{ text }} answer :", "choices": {"pos": "good", "neg": "bad"}}
    files = {name: str(folder / f"{name}.csv") for name in ("train", "test")}
    Task.create({**fields, "name": "plain", **files}).save(folder / "plain.yaml")
    Task.create({**fields, "name": "knows", **files, "delimiter": "^"}).save(folder / "knows.yaml")
    return folder


@pytest.fixture
def run(ia3, place):
    """Runs a command on the tiny model for a step; standard output."""

    def run(command, *arguments, code=0, **options):
        if command in ("train", "compare", "pretrain"):
            options = {"model": place / "model", "steps": 1, **options}
        found, out, err = ia3(command, *arguments, **options)
        assert found == code, err
        return out if not code else err

    return run


@pytest.fixture
def adapter(run, place, tmp_path):
    """An adapter that was trained on such a file."""
    run("train", task=place / "knows.yaml", output=tmp_path / "adapter")
    return tmp_path / "adapter"


class TestDelimiter:
    def test_of_train(self, run, place, tmp_path):
        options = {"data": place / "train.csv", "test_data": place / "test.csv", "choices": CHOICES}
        out = run("train", "--json", delimiter="^", output=tmp_path / "out", **options)
        assert json.loads(out)["train_examples"] == 32 and json.loads(out)["test_rows"] == 8
        assert "found 'text^label'; in a file" in run("train", code=2, output=tmp_path / "no", **options)
        words.write_csv(tmp_path / "train.csv", words.different(40), ";")
        options["data"] = tmp_path / "train.csv"
        assert "separated by" not in run(
            "train", delimiter=";", output=tmp_path / "two", **{**options, "test_data": None}
        )

    def test_of_the_files_of_tasks(self, run, place, tmp_path):
        tasks = f"{place / 'plain.yaml'},{place / 'knows.yaml'}"
        found = json.loads(run("train", "--json", tasks=tasks, delimiter="^", output=tmp_path / "out"))["members"]
        assert {name: its["test_rows"] for name, its in found.items()} == {"plain": 8, "knows": 8}
        run("pretrain", tasks=tasks, delimiter="^", output=tmp_path / "start")
        run("pretrain", tasks=place / "knows.yaml", output=tmp_path / "start")
        for command in ("train", "pretrain"):
            assert "the columns are 'text^label'" in run(command, code=2, tasks=tasks, output=tmp_path / "no")

    def test_of_evaluate(self, run, place, adapter):
        assert json.loads(run("evaluate", adapter, "--json"))["rows"] == 8  # the task's own
        assert json.loads(run("evaluate", adapter, "--json", data=place / "test.csv"))["rows"] == 8
        words.write_csv(adapter.parent / "other.csv", words.different(4), "^")
        assert (
            json.loads(run("evaluate", adapter, "--json", data=adapter.parent / "other.csv", delimiter="^"))["rows"]
            == 4
        )
        run("evaluate", adapter, code=2, data=adapter.parent / "other.csv")

    def test_of_compare_and_tasks(self, run, place, tmp_path):
        options = {"task": place / "plain.yaml", "data": place / "train.csv", "test_data": place / "test.csv"}
        run("compare", "--json", shots="2", delimiter="^", output=tmp_path / "out", **options)
        run("compare", code=2, shots="2", output=tmp_path / "no", **options)
        shown = {"data": place / "train.csv", "row": 2}
        assert words.different(2)[1]["text"] in run("tasks", "show", place / "plain.yaml", delimiter="^", **shown)
        run("tasks", "show", place / "plain.yaml", code=2, data=tmp_path / "nowhere.csv", delimiter="^")

    @pytest.mark.parametrize(
        "name, delimiter, given, written",
        [
            ("rows.csv", ",", None, ","),
            ("rows.csv", ";", None, ";"),
            ("rows.csv", "^", "^", "^"),
            ("rows.csv", "\t", "tab", "\t"),
            ("rows.tsv", "\t", None, ","),
        ],
    )
    def test_of_predict_is_that_of_what_it_writes(self, run, adapter, tmp_path, name, delimiter, given, written):
        rows = [{"text": "the tea, was lovely", "more": "0,5"}, {"text": "soup; and ^ cake", "more": "1"}]
        data = words.write_csv(tmp_path / name, rows, delimiter)
        for source, output in ((data, tmp_path / "a.csv"), (tmp_path / "a.csv", tmp_path / "b.csv")):
            run("predict", adapter, data=source, output=output, delimiter=given)
        with (tmp_path / "a.csv").open(newline="") as file:
            found = list(csv.DictReader(file, delimiter=written))
        assert [{key: row[key] for key in ("text", "more")} for row in found] == rows
        assert all(row["prediction"] in ("pos", "neg") for row in found)
        assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()

    def test_of_raft(self, run, tmp_path):
        labels = ("overruling", "not overruling")
        rows = [{"Sentence": f"so it is {i}", "ID": str(i), "Label": labels[i % 2]} for i in range(50)]
        words.write_csv(tmp_path / "overruling" / "train.csv", rows, "^")
        words.write_csv(tmp_path / "overruling" / "test_unlabeled.csv", [{"Sentence": "no", "ID": "50"}], "^")
        assert len(RaftTask.load("overruling", tmp_path, "^").train) == 50
        with pytest.raises(InputError, match="RAFT's overruling, training rows"):
            RaftTask.load("overruling", tmp_path)
        options = {"tasks": "overruling", "data": tmp_path, "output": tmp_path / "out"}
        assert "training rows" in run("raft", code=2, **options)
        assert "folds" in run("raft", code=2, delimiter="^", folds=51, **options)  # the rows have been read

    @pytest.mark.parametrize(
        "options, message",
        [
            (
                {"data": "rows.jsonl", "delimiter": ";"},
                "a .csv or .tsv file with a delimiter, found 'rows.jsonl'; leave out --delimiter.",
            ),
            (
                {"data": "train.csv", "delimiter": ";;"},
                "a delimiter of one character, such as ';', or 'tab', found ';;'; see --delimiter.",
            ),
            ({"task": "sst2", "delimiter": ";"}, "a .csv or .tsv file with a delimiter"),
        ],
    )
    def test_that_is_none_or_not_honoured(self, run, place, tmp_path, monkeypatch, options, message):
        monkeypatch.chdir(place)
        (place / "rows.jsonl").write_text('{"text": "tea", "label": "pos"}\n')
        err = run("train", code=2, output=tmp_path / "out", **options)
        assert message in err and err.count("\n") == 1 and not (tmp_path / "out").exists()

    def test_texts_have_none(self, run, adapter):
        assert "with a delimiter, found none; leave out --delimiter." in run(
            "predict", adapter, "tea", code=2, delimiter=";"
        )


class TestExamples:
    @pytest.fixture
    def scarce(self, tmp_path):
        """20 rows of one label, and 4 of the other."""
        rows = words.different(60)
        few = [row for row in rows if row["label"] == "neg"][:4]
        return words.write_csv(tmp_path / "scarce.csv", [row for row in rows if row["label"] == "pos"][:20] + few, ",")

    def test_as_many_as_there_are_unless_a_number_is_asked_for(self, ia3, place, scarce, tmp_path):
        options = {"model": place / "model", "data": scarce, "choices": CHOICES, "steps": 1}
        said = "Fewer than 16 training examples for 1 of 2 labels, the fewest for 'neg': 4; all of these are taken."
        code, out, err = ia3("train", "--json", seeds="0,1", output=tmp_path / "out", **options)
        members = json.loads(out)["members"]
        assert code == 0 and [its["train_examples"] for its in members.values()] == [20, 20]
        assert [its["test_rows"] for its in members.values()] == [4, 4] and err.count(said) == 1
        options["test_data"] = scarce
        code, out, err = ia3("compare", "--json", shots="2", output=tmp_path / "compared", **options)
        assert code == 0 and json.loads(out)["rows"][-1]["examples"] == 20 and err.count(said) == 1

    @pytest.mark.parametrize("command", ["train", "compare"])
    def test_a_number_that_is_asked_for_has_to_be_there(self, run, scarce, tmp_path, command):
        options = {"data": scarce, "choices": CHOICES, "examples_per_label": 16, "output": tmp_path / "out"}
        err = run(command, code=2, **options)
        assert err == (
            "ia3: Expected 16 training examples for each label, found fewer for 1 of 2 labels, the fewest for 'neg': 4; ask "
            "for fewer, or take what there is, without --examples-per-label.\n"
        )
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["emotion.train.csv", "emotion/train.csv", "emotion_train.csv"])
def test_an_adapter_is_named_after_its_file_without_the_split(run, place, tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    words.write_csv(tmp_path / file, words.different(40), ",")
    out = run("train", "--json", data=file, choices=CHOICES, examples_per_label=4)
    assert json.loads(out)["task"] == "emotion"
    assert Task.from_file(tmp_path / "adapters" / "emotion" / "task.yaml").name == "emotion"
