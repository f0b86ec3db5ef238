"""The tasks that come with the package: each one whole, its example rendered in the words of each template."""

import pytest

from ia3 import Task
from ia3.task.task import embedded_tasks

NLI = ["anli_r1", "anli_r2", "anli_r3", "cb", "rte"]
CHOICE = ["copa", "hellaswag", "story_cloze", "winogrande"]
RAFT = [
    "ade_corpus_v2",
    "banking_77",
    "neurips_impact_statement_risks",
    "one_stop_english",
    "overruling",
    "semiconductor_org_types",
    "systematic_review_inclusion",
    "tai_safety_research",
    "terms_of_service",
    "tweet_eval_hate",
    "twitter_complaints",
]
ALL = sorted([*NLI, *CHOICE, *RAFT, "courses", "food-reviews", "sst2", "wic", "wsc"])


def test_all_are_there():
    assert embedded_tasks() == ALL


@pytest.mark.parametrize("name", ALL)
def test_the_example_in_each_templates_words(name):
    task = Task.load(name)
    assert task.name == name and task.description and task.example
    assert task.train or name == "story_cloze"
    task.check([task.example])
    shown = [name for name in task.columns if isinstance(task.example[name], str)]
    for index, template in enumerate(task.templates):
        prompt, answers = task.prompt(task.example, template=index), task.answers(task.example, template=index)
        assert "  " not in prompt and not prompt.endswith(" ") and "{" not in prompt
        assert task.label(task.example) in answers
        assert template.name or len(task.templates) == 1
    # Every text column of the example is seen in some template, or in its answers.
    texts = [
        text
        for index in range(len(task.templates))
        for text in (task.prompt(task.example, template=index), *task.answers(task.example, template=index).values())
    ]
    assert all(
        any(task.example[column].strip(" .") in text for text in texts) for column in shown if column != "question"
    )
    assert set(task.truncate) <= set(task.columns)
    names = [template.name for template in task.templates]
    assert len(set(names)) == len(names) and (3 <= len(names) <= 5 or name in [*RAFT, "food-reviews"])


def test_the_rounds_of_anli_differ_in_their_rows_only():
    dumps = [Task.load(name).model_dump(exclude={"name", "description", "train", "test"}) for name in NLI[:3]]
    assert dumps[0] == dumps[1] == dumps[2]


def test_raft_is_measured_as_the_benchmark_does():
    for name in RAFT:
        task = Task.load(name)
        assert task.metric == "macro_f1" and task.label_column == "Label"
        assert task.train == f"hf://datasets/ought/raft/data/{name}/train.csv"
    banking = Task.load("banking_77")
    assert len(banking.labels) == 77 and banking.answers(banking.example)["card_swallowed"] == "card swallowed"


@pytest.mark.parametrize(
    "name, row, label",
    [
        ("copa", {"label": 1}, "choice2"),
        ("cb", {"label": 1}, "contradiction"),
        ("anli_r3", {"label": "1"}, "neutral"),
        ("wsc", {"label": False}, "False"),
        ("wic", {"label": 1}, "True"),
        ("sst2", {"label": 0}, "negative"),
        ("hellaswag", {"label": 3}, "3"),
        ("winogrande", {"answer": 2}, "2"),
        ("story_cloze", {"answer_right_ending": "2"}, "2"),
    ],
)
def test_labels_as_other_copies_have_them(name, row, label):
    task = Task.load(name)
    assert task.label({**task.example, **row}) == label


def test_copa_reads_on_from_the_premise():
    task = Task.load("copa")
    row = {**task.example, "question": "effect"}
    assert task.prompt(task.example) == "The kettle began to whistle because"
    assert task.prompt(row) == "The kettle began to whistle so"
    assert list(task.answers(row).values()) == ["the cat sat down beside the stove", "the water had started to boil"]


def test_hellaswag_without_the_marks_of_its_source():
    task = Task.load("hellaswag")
    row = {
        "activity_label": "Home",
        "ctx": "[header] How to sit [title] Sit down. [step] Then",
        "endings": ["rest. [substeps] Wait.", "[title] Stand."],
        "label": "0",
    }
    assert task.prompt(row) == "How to sit Sit down. Then"
    assert task.answers(row) == {"0": "rest. Wait.", "1": "Stand."}


@pytest.mark.parametrize("name", ["rt", "banking77"])
def test_names_that_come_close(name):
    with pytest.raises(Exception, match=r"'(rte|banking_77)'.*see ia3 tasks"):
        Task.load(name)
