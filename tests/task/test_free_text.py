"""Tasks whose answers are texts: their file, their wordings, their metrics."""

import pytest
from rouge_score.rouge_scorer import RougeScorer

from ia3 import InputError, Task
from ia3.task.free_text import FreeText, few_rows
from ia3.task.kinds import load_task
from ia3.task.task import embedded_tasks
from ia3.task.text_metrics import text_metrics

FIELDS = {"template": "{{ review }} In short:", "answer": "{{ summary }}"}
ROW = {"review": "Stale, dented cans.", "summary": " Stale "}


def test_a_file_is_read_as_it_was_written(tmp_path):
    task = FreeText.create({**FIELDS, "name": "short", "chat": "true", "max_new_tokens": "8", "truncate": ["review"]})
    task.save(tmp_path / "task.yaml")
    found = load_task(tmp_path / "task.yaml")
    assert found == task and found.chat is True and found.max_new_tokens == 8
    assert isinstance(load_task(embedded_tasks()[0]), Task)


def test_a_wording_has_prompt_and_answer():
    [wording] = FreeText.create(FIELDS).wordings([ROW])
    assert (wording.prompt, wording.answer) == ("Stale, dented cans. In short:", "Stale")
    assert wording.fingerprint == FreeText.create(FIELDS).fingerprint({"review": ROW["review"], "summary": "other"})
    assert wording.text_of(wording.prompt) == "Stale, dented cans."


def test_a_template_does_not_see_the_answer():
    task = FreeText.create({**FIELDS, "template": "{{ review }} {{ row }}"})
    assert "summary" not in task.wording(ROW).prompt
    # One column of an answer of several may stand in the prompt.
    task = FreeText.create({"template": "{{ name }}: {{ text }}", "answer": "Dear {{ name }}, {{ reply }}"})
    assert task.wording({"name": "Jo", "text": "?", "reply": "No."}).answer == "Dear Jo, No."


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"template": "{{ review }} {{ summary }}"}, "without the answer's column 'summary'"),
        ({"answer": "yes"}, "an answer that names a column"),
        ({"template": "Write:"}, "a prompt that names columns"),
        ({"template": "{{ review }} {{ answer_choices }}"}, "without |||"),
        ({"template": "{{ review }} ||| x"}, "without |||"),
        ({"choices": {"a": "b"}}, "an answer without choices"),
        ({"metric": "f1"}, "expected a metric of exact_match, token_f1, rouge_l"),
        ({"truncate": ["title"]}, "expected columns of the template"),
        ({"answer": "{{ summary"}, "answer: expected a Jinja template"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_bad_files(changes, error):
    with pytest.raises(InputError) as raised:
        FreeText.create({**FIELDS, **changes})
    assert error in str(raised.value) and "\n" not in str(raised.value)


def test_a_task_with_choices_is_not_made_of_one(tmp_path):
    FreeText.create(FIELDS).save(tmp_path / "task.yaml")
    with pytest.raises(InputError, match="Expected a task with choices, found one whose answer is text"):
        Task.load(tmp_path / "task.yaml")


@pytest.mark.parametrize("cell", ["", None, float("nan"), " "])
def test_a_missing_answer_is_named_by_its_row(cell):
    task = FreeText.create(FIELDS)
    with pytest.raises(InputError, match=r"Expected an answer in 'summary', found none \(row 2\)"):
        task.check([ROW, {**ROW, "summary": cell}])
    task.check([{"review": "x"}], labelled=False)


def test_a_list_is_no_answer_until_it_is_joined():
    row = {"text": "tea", "tags": ["hot", "green"]}
    task = FreeText.create({"template": "{{ text }}", "answer": "{{ tags }}"})
    with pytest.raises(InputError, match=r"expected a text, found \['hot', 'green'\]; join .*tojson.*\(row 1\)"):
        task.check([row])
    for answer, text in {"{{ tags | join(', ') }}": "hot, green", "{{ tags | tojson }}": '["hot", "green"]'}.items():
        assert FreeText.create({"template": "{{ text }}", "answer": answer}).answer_of(row) == text
    assert task.answer_of({**row, "tags": '["hot", "green"]'}) == '["hot", "green"]'  # a text already


def test_rows_are_drawn_at_random():
    rows = [{"review": str(number), "summary": "x"} for number in range(100)]
    task = FreeText.create(FIELDS)
    assert len(few_rows(rows, task)) == 64 and few_rows(rows, task) == few_rows(rows, task)
    assert few_rows(rows, task, 5, seed=1) != few_rows(rows, task, 5, seed=2)
    with pytest.raises(InputError, match="from 1 to 100 training examples, found 101"):
        few_rows(rows, task, 101)


def test_exact_match_and_token_f1_are_squads():
    found = text_metrics(["The Red, fox!", "a", "cat dog", "x"], ["red fox", "", "dog  bird dog", "y"])
    assert found["exact_match"] == 2 / 4
    assert found["token_f1"] == pytest.approx((1 + 1 + 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3) + 0) / 4)


def test_rouge_l_is_rouge_scores_in_ascii_and_sees_other_scripts():
    pairs = [("The cat sat_on it", "a cat on it"), ("x-y z", "z x y"), ("", "a")]
    scorer = RougeScorer(["rougeL"])
    expected = [scorer.score(right, said)["rougeL"].fmeasure for said, right in pairs]
    assert text_metrics(*zip(*pairs, strict=True))["rouge_l"] == pytest.approx(sum(expected) / 3)
    assert text_metrics(["котка спи"], ["котка"])["rouge_l"] == pytest.approx(2 / 3)


def test_a_function_is_a_metric(tmp_path, monkeypatch):
    (tmp_path / "own_metrics.py").write_text(
        "def share(predictions, references):\n    return sum(map(str.__eq__, predictions, references)) / len(references)\n"
        "def broken(predictions, references):\n    raise RuntimeError('no')\n"
        "def endless(predictions, references):\n    return float('inf')\nnumber = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert text_metrics(["a", "b"], ["a", "c"], "own_metrics.share")["own_metrics.share"] == 0.5
    for name, error in {
        "broken": "failed: RuntimeError: no",
        "endless": "Expected a number",
        "number": "Expected a function",
        "other": "Cannot import",
    }.items():
        with pytest.raises(InputError, match=error):
            text_metrics(["a"], ["a"], f"own_metrics.{name}")
