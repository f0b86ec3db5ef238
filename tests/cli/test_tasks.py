"""`ia3 tasks`, and built-in tasks by name."""

import json

import pytest

from ia3.task.task import embedded_tasks
from support import tiny, words


def test_the_list(ia3):
    code, out, _ = ia3("tasks")
    assert code == 0 and all(name in out for name in embedded_tasks())
    code, out, _ = ia3("tasks", "--json")
    found = {item["name"]: item for item in json.loads(out)}
    assert code == 0 and list(found) == embedded_tasks()
    assert [found[name]["answers"] for name in ("rte", "copa", "hellaswag")] == [
        "fixed",
        "from columns",
        "a list for each row",
    ]
    assert len(found["banking_77"]["labels"]) == 77 and found["hellaswag"]["labels"] is None
    assert found["rte"]["train"] == "aps/super_glue:rte" and found["rte"]["templates"] == 4


@pytest.mark.parametrize("name", ["rte", "hellaswag", "tai_safety_research"])
def test_one_with_its_example(ia3, name):
    code, out, _ = ia3("tasks", "show", name)
    assert code == 0 and out.startswith(f"{name}: ") and out.count("→") == out.count("template ")
    code, out, _ = ia3("tasks", "show", name, "--json")
    shown = json.loads(out)
    assert shown["prompts"][0]["label"] in shown["prompts"][0]["answers"] and shown["example"]


def test_a_row_of_a_file(ia3, tmp_path):
    (tmp_path / "rows.csv").write_text("premise,hypothesis\nIt rains.,It is wet.\nTea is hot.,Tea is cold.\n")
    code, out, _ = ia3("tasks", "show", "rte", data=tmp_path / "rows.csv", row=2)
    assert code == 0 and "Tea is hot." in out and "→" not in out
    for options, message in [
        ({"row": 3}, "which has 2 rows; found 3"),
        ({"data": tmp_path / "none.csv"}, "found no"),
    ]:
        code, _, err = ia3("tasks", "show", "rte", **{"data": tmp_path / "rows.csv", **options})
        assert code == 2 and message in err and err.count("\n") == 1


def test_a_file_without_an_example(ia3, tmp_path):
    (tmp_path / "task.yaml").write_text("template: '{{ text }} :'\nchoices: {a: good, b: bad}\n")
    code, out, _ = ia3("tasks", "show", tmp_path / "task.yaml")
    assert code == 0 and "{{ text }} :" in out and "--data" in out
    code, out, _ = ia3("tasks", "show", tmp_path / "task.yaml", "--json")
    assert code == 0 and json.loads(out)["prompts"] == []


def test_an_unknown_name(ia3):
    code, _, err = ia3("tasks", "show", "rtr")
    assert code == 2 and "close to it: 'rte'" in err


def test_training_on_a_built_in_task_by_name(ia3, tmp_path):
    """With a local copy of the data, whose labels are numbers."""
    tiny.build("llama", vocab_size=len(words.VOCABULARY)).save_pretrained(tmp_path / "model")
    words.tokenizer().save_pretrained(tmp_path / "model")
    lines = [f"{row['text']},{int(row['label'] == 'pos')}" for row in words.different(24)]
    (tmp_path / "rows.csv").write_text("\n".join(["sentence,label", *lines]) + "\n")
    task = json.loads(ia3("tasks", "show", "sst2", "--json")[1])
    assert task["labels"] == ["positive", "negative"]
    # The tiny tokenizer knows few words: a file with the same aliases in these.
    (tmp_path / "sst2.yaml").write_text(
        "templates: ['review : {{ sentence }} answer :', '{{ sentence }} , what is it ?']\n"
        "choices: {positive: good, negative: not good}\naliases: {1: positive, 0: negative}\n"
    )
    arguments = ["train", "--model", tmp_path / "model", "--data", tmp_path / "rows.csv", "--steps", "2"]
    arguments += ["--examples-per-label", "4", "--json", "--output"]
    code, out, _ = ia3(*arguments, tmp_path / "a", "--task", tmp_path / "sst2.yaml")
    assert code == 0 and json.loads(out)["test_rows"] == 16
    code, out, err = ia3(*arguments, tmp_path / "b", "--task", "sst2")
    assert code == 2 and "the same to this model's tokenizer" in err
    code, _, err = ia3(*arguments, tmp_path / "b", "--task", "sst")
    assert code == 2 and "close to it: 'sst2'" in err
