"""Candidate wordings for rows that come without one: `candidates`."""

import pytest

from ia3 import Task
from ia3.task.candidates import FOREIGN, FORMS, are_codes, candidates, in_words, language_of


def made(labels, columns=("text",), label="label", text="The tea is here and it was for you.", **options):
    rows = [dict.fromkeys(columns, text)]
    return candidates(rows, columns, label, {one: one for one in labels}, **options)


def prompts(*args, **options):
    return [one.prompt for one in made(*args, **options)]


@pytest.mark.parametrize(
    "label, words",
    [
        ("RequestRefund", "request refund"),
        ("request_refund", "request refund"),
        ("request-refund", "request refund"),
        ("card__lost", "card lost"),
        ("HTTPError", "HTTP error"),
        ("ATMUse", "ATM use"),
        ("POSITIVE", "positive"),
        ("Sci/Tech", "sci tech"),
        ("très bon", "très bon"),
        ("not ironic", "not ironic"),
    ],
)
def test_labels_are_read_as_words(label, words):
    assert in_words(label) == words


def test_all_candidates_differ_and_begin_with_the_same_text():
    found = made(["joy", "anger"], ["message"], "emotion")
    assert len({(one.prompt, str(one.choices)) for one in found}) == len(found) > len(FORMS)
    assert all(one.prompt.startswith("{{ message }}\n") and one.asks_behind for one in found)
    assert "{{ message }}\nThe emotion of this message is" in [one.prompt for one in found]


def test_the_made_up_template_is_one_of_them():
    for labels in (["joy", "anger"], [f"label {letter}{letter}" for letter in "abcdefghijklmn"], ["1", "2"]):
        task = Task.infer([{"text": "tea", "label": label} for label in labels])
        assert task.templates[0].prompt in [one.prompt for one in task.candidates]


def test_a_given_template_leaves_no_choice():
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    assert not Task.infer(rows, template="{{ text }} is").candidates
    assert not Task.load("rte").candidates


def test_a_file_keeps_no_candidates(tmp_path):
    task = Task.infer([{"text": "a", "label": "joy"}, {"text": "b", "label": "anger"}])
    task.save(tmp_path / "task.yaml")
    assert task.candidates and not Task.load(tmp_path / "task.yaml").candidates


def test_a_vague_label_column_is_called_by_the_file():
    assert "{{ text }}\nThe emotion of this text is" in prompts(["joy", "anger"], name="emotion")
    assert "{{ text }}\nThe label of this text is" in prompts(["joy", "anger"], name="train")
    assert "{{ text }}\nThe label of this text is" in prompts(["joy", "anger"], name="sst2")
    assert "{{ text }}\nThe mood of this text is" in prompts(["joy", "anger"], label="mood", name="emotion")


def test_answers_are_words_and_also_as_written():
    own = [one.choices for one in made(["AskPrice", "RequestRefund"])]
    assert {"AskPrice": "ask price", "RequestRefund": "request refund"} in own and None in own
    # Letters alone tell these apart.
    assert all(one.choices is None for one in made(["It", "it"]))


def test_given_answers_stay():
    assert all(one.choices is None for one in made(["Positive", "Negative"], own=True))
    assert not all(one.choices is None for one in made(["Positive", "Negative"]))


def test_negated_labels_are_asked_as_yes_or_no():
    found = {one.prompt: one.choices for one in made(["ironic", "not ironic"])}
    assert found["{{ text }}\nQuestion: Is this ironic?\nAnswer:"] == {"ironic": "yes", "not ironic": "no"}
    found = {one.prompt: one.choices for one in made(["not_spam", "spam"])}
    assert found["{{ text }}\nIs the text spam?"] == {"spam": "yes", "not_spam": "no"}


def test_what_is_left_over_is_said_to_be_not_the_other_label():
    rows = [{"text": "Lovely tea.", "score": "great"}, {"text": "Stale.", "score": "other"}]
    found = candidates(rows, ["text"], "score", {"great": "great", "other": "other"})
    assert found[0].prompt == "{{ text }}\nThe author feels"
    assert found[0].choices == {"great": "great", "other": "not great"}
    assert any(one.choices is None for one in found)  # as they are, too
    both = candidates(rows, ["text"], "score", {"none": "none", "other": "other"})
    assert not any("not" in str(one.choices) for one in both)


def test_yes_and_no_are_asked_about_the_column():
    found = prompts(["yes", "no"], label="urgent")
    assert "{{ text }}\nQuestion: Is it urgent?\nAnswer:" in found and "{{ text }}\nUrgent?" in found


def test_two_texts_are_related():
    found = {one.prompt: one.choices for one in made(["entailment", "neutral", "contradiction"], ["premise", "claim"])}
    both = "premise: {{ premise }}\nclaim: {{ claim }}\n"
    assert both + "The relation of the two texts is" in found
    assert found[both + "The claim is"] == {"entailment": "true", "neutral": "neither", "contradiction": "false"}
    assert "{{ premise }}\nQuestion: {{ claim }} True, Neither or False?\nAnswer:" in found
    assert both + "The author feels" not in found


@pytest.mark.parametrize(
    "text, language",
    [
        ("Der Tee ist nicht gut und ich bin auf die Suppe wütend", "German"),
        ("Le thé est très bon et je ne suis pas dans la rue", "French"),
        ("El té no es bueno y la sopa es de ayer", "Spanish"),
        ("The tea is not good and I want to go", "English"),
        ("tea", "English"),
        ("お茶はとても美味しいです", ""),
        ("Чай очень вкусный", ""),
    ],
)
def test_the_texts_say_the_language(text, language):
    rows = [{"text": text}] * 3
    assert language_of(rows, ["text"], ["a"]) == language
    found = prompts(["lob", "tadel"], text=text)
    for name, forms in FOREIGN.items():
        assert (f"{{{{ text }}}}\n{forms[0]}" in found) == (name == language)
    assert ("{{ text }}\nThis is a request about" in found) == (
        language == "English"
    )  # the last of the English forms go


def test_labels_in_another_script_have_no_english_forms():
    found = prompts(["похвала", "жалоба"], text="Чай очень вкусный")
    assert "{{ text }}\n→" in found and "{{ text }}\nThe author feels" not in found


@pytest.mark.parametrize(
    "labels, codes", [("1 2 3", 1), ("A17 B2", 1), ("a b", 1), ("-1 0.5", 1), ("joy 2", 0), ("x1y z", 0)]
)
def test_codes_have_few_candidates(labels, codes):
    labels = labels.split()
    assert are_codes(labels) == bool(codes)
    assert (len(made(labels)) < 10) == bool(codes)


def test_names_with_marks_of_templates_are_plain_text():
    rows = [{"a {{b": "tea", "label %}": label} for label in ("x{%", "{{y", "z")]
    task = Task.infer(rows, "label %}", "a {{b")
    for candidate in task.candidates:
        assert candidate.fill({"a {{b": "tea"}).startswith("tea\n")
