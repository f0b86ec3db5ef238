"""Tasks that find fields of a text: their file, answers and metrics."""

import json

import pytest

from ia3 import InputError
from ia3.task.fields import Fields, field_metrics
from ia3.task.kinds import load_task

FIELDS = {"template": "{{ text }} Details:", "fields": ["date", "person"]}
TEXT = "Call Ann  Lee or Bob tomorrow"


def answer(**row):
    return Fields.create(FIELDS).wording({"text": TEXT, **row}).answer


def test_a_file_is_read_as_it_was_written(tmp_path):
    (tmp_path / "task.yaml").write_text("name: f\nfields: [date, person]\ntemplate: '{{ text }} Details:'\n")
    task = load_task(tmp_path / "task.yaml")
    assert isinstance(task, Fields) and task.fields == ["date", "person"] and task.metric == "micro_f1"
    task.save(tmp_path / "again.yaml")
    assert load_task(tmp_path / "again.yaml") == task


def test_the_answer_is_json_of_the_fields_that_there_are():
    assert answer(date="tomorrow", person=None) == '{"date": "tomorrow"}'
    assert answer(person=["Ann Lee", "Bob"]) == '{"person": ["Ann  Lee", "Bob"]}'  # in the text's white space
    assert answer(person='["Bob"]') == '{"person": "Bob"}'  # a list in a CSV file
    assert answer(date="", person=float("nan")) == "{}"


def test_what_was_generated_becomes_an_object_of_all_fields():
    task = Fields.create(FIELDS)

    def result(text):
        return task.result(text, {})

    assert result(' {"date": "a, \\"b"}') == {"date": 'a, "b', "person": None}
    assert result('{"date": "x", "person": ["y", "z"]}') == {"date": "x", "person": ["y", "z"]}
    assert result('{"date": "x", "person": ["y", "z') == {"date": "x", "person": "y"}
    assert result('{"date": "x", "pers') == {"date": "x", "person": None}
    assert result('{"da') == result("") == result("[1]") == {"date": None, "person": None}
    row = {"text": TEXT, "date": "tomorrow", "person": ["Ann Lee", "Bob"]}
    assert task.reference(row) == {"date": "tomorrow", "person": ["Ann  Lee", "Bob"]}


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"fields": []}, "expected fields, names of columns that differ, found none"),
        ({"fields": ["a", "a"]}, "names of columns that differ"),
        ({"fields": ["text", "date"]}, "without the fields, which it gives away"),
        ({"answer": "{{ x }}"}, "answer or fields, one of the two"),
        ({"metric": "token_f1"}, "expected a metric of micro_f1, exact_match"),
    ],
)
def test_bad_files(changes, error):
    with pytest.raises(InputError, match=error):
        Fields.create({**FIELDS, **changes})


def test_values_are_parts_of_the_text():
    task = Fields.create(FIELDS)
    rows = [{"text": TEXT, "date": "tomorrow", "person": ""}, {"text": TEXT, "date": "tonight"}]
    with pytest.raises(
        InputError, match=r"a value of 'date' that is a part of the row's text, found 'tonight' \(row 2\)"
    ):
        task.check(rows)
    with pytest.raises(InputError, match="a column of each field in some row, found none for 'person'"):
        task.check([{"text": TEXT, "date": "tomorrow"}])
    task.check([{"text": TEXT}], labelled=False)


def test_metrics_count_values():
    predictions = [{"date": "a", "person": ["x", "y"]}, {"date": None, "person": "z"}, {"date": None, "person": None}]
    references = [{"date": "a", "person": "y"}, {"date": "b", "person": None}, {"date": None, "person": None}]
    found = field_metrics(predictions, references, ["date", "person", "other"])
    assert found == {
        "micro_f1": pytest.approx(2 * 2 / (4 + 3)),
        "exact_match": pytest.approx(1 / 3),
        "precision": pytest.approx(2 / 4),
        "recall": pytest.approx(2 / 3),
        "f1: date": pytest.approx(2 / 3),
        "f1: person": pytest.approx(2 / 4),
    }
    assert field_metrics([{"date": "a\n b"}], [{"date": "a b"}], ["date"])["exact_match"] == 1
    assert field_metrics([{}], [{}], ["date"])["micro_f1"] == 1
    assert json.dumps(found)
