"""Prompts that the model has no positions for."""

import bisect
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ia3 import InputError, Prefix, Task
from ia3.scoring.fitting import _longest
from support import tiny, words
from support.asked import scorer

TEMPLATE = "review : {{ text }} answer :"
CHOICES = {"pos": "good", "neg": "not good"}


@pytest.fixture(scope="module")
def short():
    return tiny.build("llama", vocab_size=len(words.VOCABULARY), max_position_embeddings=12)


@pytest.mark.parametrize(
    "truncate, kept", [([], "review : tea tea tea tea cake ? answer :"), (["kind"], None), (["kind", "text"], None)]
)
def test_the_end_of_a_column_is_cut(short, truncate, kept, caplog):
    template = "review : {{ text }} {{ kind }} ? answer :"
    task = Task(template=template, choices=CHOICES, truncate=truncate)
    tokenizer = words.tokenizer()
    row = {"text": "tea " * 20, "kind": "cake", "label": "neg"}
    if truncate == ["kind"]:
        with pytest.raises(InputError, match=r"at most 10 tokens, found more even without 'kind' \(row 2\)"):
            scorer(short).questions(task.wordings([{**row, "text": "tea"}, row]))
        return
    short_row = {"text": "tea", "kind": "cake", "label": "pos"}
    found = scorer(short).questions(task.wordings([short_row, row]))
    assert [question.cut for question in found] == [None, "text"]
    prompt = tokenizer.decode(found[1].prompt)
    assert len(found[1].prompt) + 2 == 12 and prompt.endswith("? answer :") and prompt.startswith("review : tea")
    assert kept is None or prompt == kept
    assert tokenizer.decode(found[0].prompt) == "review : tea cake ? answer :"
    assert "1 of 2 prompts are longer than the model's context; the end of 'text' is cut off" in caplog.text


def test_a_list_loses_its_last_items(short):
    task = Task(template="{% for turn in turns %}{{ turn }} , {% endfor %} answer :", choices=CHOICES)
    turns = ["the tea", "the soup", "not the cake", "a review"]
    for cell in (turns, json.dumps(turns)):
        (question,) = scorer(short).questions(task.wordings([{"turns": cell}]), labelled=False)
        assert words.tokenizer().decode(question.prompt) == "the tea , the soup , answer :"


def test_refused(short):
    task = Task(template=TEMPLATE, choices=CHOICES)
    rows = [{"text": "tea", "label": "pos"}, {"text": "tea " * 9, "label": "pos"}]
    with pytest.raises(InputError, match=r"at most 10 tokens, found 13 \(row 2\)"):
        scorer(short).questions(task.wordings(rows), long_prompts="refuse")


@given(dense=st.lists(st.integers(0, 9), max_size=300), room=st.integers(0, 400), most=st.integers(0, 400))
def test_the_longest_beginning(dense, room, most):
    """Whatever the places of the tokens are; `dense` has the characters in front of each."""
    ends = [0, *itertools.accumulate(dense)]
    fits = [length for length in range(most + 1) if bisect.bisect_right(ends, length) <= room]
    found = _longest(most, room, lambda length: bisect.bisect_right(ends, length))
    assert found == (max(fits) if fits else None)


@pytest.mark.parametrize("characters", [1, 4, 7, 120])
def test_few_texts_are_tokenized(characters):
    asked = []

    def tokens(length):
        asked.append(length)
        return 20 + length // characters

    assert _longest(900_000, 1020, tokens) == 1001 * characters - 1
    assert len(asked) <= 20 and sum(asked) < 12 * 1000 * characters + 100_000


def test_what_has_too_many_characters_is_not_tokenized(short, caplog):
    """It counts as too long."""
    task = Task(template="{{ text }} answer :", choices=CHOICES)
    row = {"text": "tea" + " " * 20_000 + "soup"}
    with pytest.raises(InputError, match=r"at most 10 tokens, found one of more than 10000 characters \(row 1\)"):
        scorer(short).questions(task.wordings([row]), False, "refuse")
    (question,) = scorer(short).questions(task.wordings([row]), False)
    assert words.tokenizer().decode(question.prompt) == "tea answer :" and "cut off" in caplog.text
    whole = Task(template="{{ text[-4:] }} answer :", choices=CHOICES)
    (question,) = scorer(short).questions(whole.wordings([row]), False)
    assert words.tokenizer().decode(question.prompt) == "soup answer :", "what counts is the prompt"


@given(sizes=st.lists(st.integers(0, 30), min_size=2, max_size=2), order=st.permutations(["a", "b"]))
def test_what_fits_is_used_up(short, sizes, order):
    task = Task(template="review {{ a }} : {{ b }} answer", choices=CHOICES, truncate=order)
    row = {"a": "tea " * sizes[0], "b": "soup " * sizes[1]}
    if not sum(sizes):
        return
    (question,) = scorer(short).questions(task.wordings([row]), labelled=False)
    assert len(question.prompt) == min(10, 3 + sum(sizes))
    text = words.tokenizer().decode(question.prompt).split()
    left = {"a": text.count("tea"), "b": text.count("soup")}
    # The second column is touched only where the first one has nothing left.
    first, second = order
    size = dict(zip("ab", sizes, strict=True))
    assert left[second] == size[second] or not left[first]


@pytest.mark.parametrize("name", ["llama", "bart"])
@pytest.mark.parametrize("separator", [" , , ", "\n\n"])
def test_what_separates_a_prompt_from_a_prefix_takes_room(name, separator, caplog):
    """With the longest text that fits behind a prefix, and one word more."""
    model = tiny.build(name, vocab_size=len(words.VOCABULARY), max_position_embeddings=24)
    tokenizer, task = words.tokenizer(), Task(template=TEMPLATE, choices=CHOICES)
    prefix = Prefix(model, tokenizer, "tea is good", separator)
    between = len(separator.split())
    room = 24 - 3 - between - 4 - (2 if name == "llama" else 0)  # but for an encoder, of the answers as well
    fits, longer = ([{"text": "cake " * count}] for count in (room, room + 1))
    (asked,) = scorer(model).questions(task.wordings(fits), False, "refuse", prefix)
    assert asked.prompt[-4 - room - between :] == tokenizer(separator + task.prompt(fits[0]))["input_ids"]
    with pytest.raises(InputError, match=r"Expected prompts of at most \d+ tokens, found \d+ \(row 1\)"):
        scorer(model).questions(task.wordings(longer), False, "refuse", prefix)
    (cut,) = scorer(model).questions(task.wordings(longer), False, prefix=prefix)
    assert cut == asked and "lose their beginning" not in caplog.text


def test_answers_without_room_for_a_prompt(short):
    task = Task(template="{{ text }}", choices={"a": "tea " * 12, "b": "tea"})
    with pytest.raises(InputError, match="Expected answers of fewer than 12 tokens"):
        scorer(short).questions(task.wordings([{"text": "tea"}]), labelled=False)
