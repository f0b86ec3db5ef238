"""Published prompt collections: their YAML, with templates of every kind in it."""

import datasets
import pytest

from ia3 import InputError, Task, read_prompts, read_rows
from support import tiny, words
from support.asked import scorer

COLLECTION = """\
dataset: owner/teas
subset: small
templates:
  0a: !Template
    answer_choices: bad ||| good
    id: 0a
    jinja: 'review : {{ text }} answer : ||| {{ answer_choices[label] }}'
    metadata: !TemplateMetadata
      choices_in_prompt: false
      metrics: [Accuracy]
      original_task: true
    name: plain
    reference: ''
  0b: !Template
    answer_choices: 'no ||| yes'
    id: 0b
    jinja: "{{ text }} , is it {{ answer_choices[1] }} or {{ answer_choices | join(' ||| ') }} ?\\n|||\\n{% if label == 1 %}\\
      {{ answer_choices[1] }}{% else %}{{ answer_choices[0] }}{% endif %}"
    metadata: !TemplateMetadata {original_task: true}
    name: answers in the prompt
    reference: ''
  0c: !Template
    answer_choices: ['not good', 'fine']
    id: 0c
    jinja: '{% if text %}what is {{ text }} ? ||| {{ answer_choices[label] }}{% else %}a tea ? ||| good{% endif %}'
    metadata: !TemplateMetadata {original_task: true}
    name: under a condition
    reference: ''
  0d: !Template
    answer_choices: bad ||| good
    id: 0d
    jinja: '{% if text == "tea" %} tea ? ||| {{ answer_choices[label] }} {% endif %}'
    metadata: !TemplateMetadata {original_task: true}
    name: of some rows
    reference: ''
  0e: !Template
    answer_choices: null
    id: 0e
    jinja: 'a review that is {{ ["bad", "good"][label] }} ||| {{ text }}'
    metadata: !TemplateMetadata {original_task: true}
    name: free
    reference: ''
  0f: !Template
    answer_choices: bad ||| good
    id: 0f
    jinja: '{{ text }} ||| {{ answer_choices[label] }}'
    metadata: !TemplateMetadata {original_task: false}
    name: another task
    reference: ''
  10: !Template
    answer_choices: bad ||| good ||| fine
    id: '10'
    jinja: '{{ text }} ||| {{ answer_choices[label] }}'
    metadata: !TemplateMetadata {original_task: true}
    name: three
    reference: ''
  11: !Template
    answer_choices: bad ||| good
    id: '11'
    jinja: '{{ text | choice }} ||| {{ answer_choices[label] }}'
    metadata: !TemplateMetadata {original_task: true}
    name: strange
    reference: ''
"""
NAMES = ["plain", "answers in the prompt", "under a condition"]


@pytest.fixture
def path(tmp_path):
    (tmp_path / "templates.yaml").write_text(COLLECTION)
    return tmp_path / "templates.yaml"


def test_templates_that_choose_between_answers_are_taken(path, caplog):
    caplog.set_level("INFO")
    task = Task.load(path)
    assert task == read_prompts(path) and task.name == "teas_small" and task.train == "owner/teas:small"
    assert [template.name for template in task.templates] == NAMES
    assert task.labels == ["0", "1"] and task.columns == ["text"]
    assert "5 of 8 templates cannot be used" in caplog.text
    for why in (
        "nothing to ask of some rows ('of some rows')",
        "no answer choices, but free text ('free')",
        "not the original task ('another task')",
        "number of answers ('three')",
        "No filter named 'choice'",
    ):
        assert why in caplog.text


@pytest.mark.parametrize("label", [0, 1, "0", "1"])
def test_prompts_and_answers(path, label):
    task = read_prompts(path)
    row = {"text": "soup", "label": label}
    prompts = ["review : soup answer :", "soup , is it yes or no ||| yes ?", "what is soup ?"]
    assert [task.prompt(row, template=i) for i in range(3)] == prompts
    assert [task.prompt({"text": "soup"}, template=i) for i in range(3)] == prompts
    assert [task.label(row, template=i) for i in range(3)] == [str(label)] * 3
    assert [list(task.answers(row, template=i).values()) for i in range(3)] == [
        ["bad", "good"],
        ["no", "yes"],
        ["not good", "fine"],
    ]
    (question,) = scorer(tiny.build("llama")).questions(task.wordings([row]))
    assert question.choices[question.label] == words.tokenizer()("good" if int(label) else "bad")["input_ids"]


def test_it_is_saved_as_a_task(path, tmp_path):
    task = read_prompts(path)
    task.save(tmp_path / "task.yaml")
    assert Task.load(tmp_path / "task.yaml") == task


def test_answers_from_columns_and_digits_that_are_text(tmp_path):
    (tmp_path / "templates.yaml").write_text(
        """\
dataset: gaps
templates:
  a: !Template
    answer_choices: '{{ option1 }} ||| {{ option2 }}'
    jinja: "{{ sentence }} ? ||| {% if answer == '1' %}{{ option1 }}{% else %}{{ option2 }}{% endif %}"
    metadata: !TemplateMetadata {original_task: true}
    name: text
  b: !Template
    answer_choices: '{{ [option1, option2] | join(" ||| ") }}'
    jinja: '{{ sentence }} , what ? ||| {{ answer_choices[(answer | int) - 1] }}'
    metadata: !TemplateMetadata {original_task: true}
    name: number
  c: !Template
    answer_choices: '{{ option1 }} ||| {{ option2 }}'
    jinja: '{{ sentence }} , which ? ||| {{ [answer_choices[answer -1], answer_choices[1 - (2 - answer)]][answer == 1] }}'
    metadata: !TemplateMetadata {original_task: true}
    name: difference
"""
    )
    task = Task.load(tmp_path / "templates.yaml")
    assert task.labels is None and task.columns == ["option1", "option2", "sentence"]
    row = {"sentence": "it was _", "option1": "tea", "option2": "soup"}
    for answer, label in (("1", "0"), ("2", "1")):
        assert [task.label({**row, "answer": answer}, template=i) for i in range(3)] == [label] * 3


def test_class_labels_of_data_sets_stay_numbers(path, tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    datasets.Dataset.from_dict({"text": ["tea"], "label": [1]}, features=features).save_to_disk(tmp_path / "set")
    task = read_prompts(path)
    (row,) = read_rows(tmp_path / "set", task.class_names)
    assert task.label(row) == "1"
    with pytest.raises(InputError, match="Cannot render the template"):
        task.label(read_rows(tmp_path / "set")[0])


def test_templates_by_name(path):
    task = read_prompts(path, ["of some rows", "another task"])
    assert [template.name for template in task.templates] == ["of some rows", "another task"]
    assert task.prompt({"text": "tea"}) == " tea ?"
    with pytest.raises(InputError, match=r"empty prompt \(row 3\)"):
        task.prompt({"text": "soup"}, 3)


@pytest.mark.parametrize(
    "names, message",
    [
        (["plain", "none"], "names of templates .*, found 'none'; there are 'plain', "),
        (["plain", "free"], r"found others: no answer choices, but free text \('free'\)"),
        (["plain", "three"], "number of answers"),
        (["strange"], "No filter named 'choice'"),
    ],
)
def test_names_that_cannot_be_used(path, names, message):
    with pytest.raises(InputError, match=message) as error:
        read_prompts(path, names)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("templates: {a: b}", "a mapping `templates`; found none"),
        ("templates: {}", "found others: none"),
        ("templates: {a: !Template {jinja: a, answer_choices: b ||| c, metadata: {original_task: true}}}", "no answer"),
        ("templates: {a: !Template {jinja: 'a ||| b', answer_choices: null}}", "not the original task"),
        ("templates: {a: !!python/object/apply:os.getcwd []}", "a mapping `templates`; found none"),
    ],
)
def test_files_that_hold_nothing_to_use(tmp_path, content, message):
    (tmp_path / "templates.yaml").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        Task.load(tmp_path / "templates.yaml")
    assert "\n" not in str(error.value)


def test_an_answer_that_is_not_a_choice(path):
    task = read_prompts(path)
    with pytest.raises(InputError, match="Cannot render the template"):
        task.label({"text": "tea", "label": 2})
    with pytest.raises(InputError, match="Cannot render the template"):
        task.label({"text": "tea"})
