"""Messages: one line, and no input that crowds out what to do about it; what an error knows beside its message."""

import copy
import pickle

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from ia3 import InputError
from ia3.errors import about, brief, excerpt, problems, reason, shown, similar


@pytest.mark.parametrize(
    "text, line",
    [
        ("as it is", "as it is"),
        ("two\n  lines\r\nor\u2028three ", "two lines or three"),
        ("a\x1b[31mred", r"a\x1b[31mred"),
        ("half \ud800", r"half \ud800"),
        ("(IA)³ „é“", "(IA)³ „é“"),
        ("two  spaces", "two  spaces"),
    ],
)
def test_one_printable_line(text, line):
    assert excerpt(text) == line and str(InputError(text)) == line


def test_the_middle_of_a_long_text_is_left_out():
    found = excerpt("b" + "x" * 1000 + "e", 30)
    assert len(found) == 30 and found[0] == "b" and found[-1] == "e" and "…" in found
    message = str(InputError(f"Expected tea, found {'x' * 10**6!r}; drink it."))
    assert len(message) <= 600 and message.startswith("Expected tea") and message.endswith("drink it.")


@pytest.mark.parametrize(
    "error, text",
    [
        (InputError("Expected tea."), "Expected tea."),
        (InputError("Expected tea.", row=3), "Expected tea (row 3)."),
        (InputError("Is it tea?", row=3), "Is it tea? (row 3)"),
        (InputError("Expected tea", "drink it"), "Expected tea; drink it."),
        (InputError("Expected tea", "is it hot?"), "Expected tea; is it hot?"),
        (
            InputError("Expected tea", "drink it", row=3, owner="Task 'pot'"),
            "Task 'pot': Expected tea (row 3); drink it.",
        ),
        (InputError("holds NaN", "train it again", owner="Adapter 'a'"), "Adapter 'a' holds NaN; train it again."),
        (InputError("Expected tea", argument="cup_size"), "Expected tea; see cup_size."),
        (InputError("Expected tea", "leave out", row=1, argument="cup"), "Expected tea (row 1); leave out cup."),
        (InputError(), ""),
    ],
)
def test_what_is_known_of_an_error_stands_in_its_text(error, text):
    assert str(error) == text
    for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert str(other) == text and vars(other) == vars(error)


def test_an_argument_is_called_as_the_user_calls_it():
    error = InputError("Expected tea", "start anew without", argument="cup_size", owner="Task 'pot'")
    assert error.worded(lambda name: f"--{name}") == "Task 'pot': Expected tea; start anew without --cup_size."
    assert error.worded(owned=False) == "Expected tea; start anew without cup_size."


def test_a_long_message_crowds_out_neither_owner_row_nor_advice():
    text = str(InputError(f"Expected {'x' * 5000}", "drink it", row=3, owner="Task 'pot'"))
    assert text.startswith("Task 'pot': Expected xx") and text.endswith("xx (row 3); drink it.") and len(text) <= 600


class TestAbout:
    def test_who_knows_more_adds_it(self):
        with pytest.raises(InputError) as error, about("Group 'b'"), about("Task 'a'", row=7):
            raise InputError("Expected tea.")
        assert (error.value.row, error.value.owner) == (7, "Group 'b': Task 'a'")
        assert str(error.value) == "Group 'b': Task 'a': Expected tea (row 7)."

    def test_the_row_that_was_known_first_stays(self):
        with pytest.raises(InputError) as error, about(row=7):
            raise InputError("Expected tea.", row=0)
        assert error.value.row == 0 and error.value.owner is None

    def test_a_kind_of_error_stays_and_others_pass(self):
        class Cold(InputError):
            pass

        with pytest.raises(Cold, match=r"^Pot: Expected tea\.$"), about("Pot"):
            raise Cold("Expected tea.")
        with pytest.raises(KeyError, match=r"^'tea'$"), about("Pot", row=1):
            raise KeyError("tea")
        with about("Pot", row=1):
            pass


def deep() -> list:
    value: list = []
    for _ in range(5000):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value", ["x" * 10**6, 16**5000, 10**4200, deep(), list(range(10**5)), {"a" * 10**5: 1}, b"x" * 10**5, {1: "\n" * 9999}],
    ids=type,
)  # fmt: skip
def test_a_values_repr_is_short(value):
    assert len(brief(value)) <= 200 and brief(value).isprintable()


def test_short_values_are_whole():
    assert brief(["a", {"b": None}]) == "['a', {'b': None}]" and brief("it's") == '"it\'s"'


def test_names():
    assert (
        shown([]) == "none" and shown("ab") == "'a', 'b'" and shown("abcdefg") == "'a', 'b', 'c', 'd', 'e' and 2 more"
    )
    found = shown(["x" * 5000, *map(str, range(3))])
    assert len(found) < 120 and found.endswith("'0', '1', '2'")
    assert shown(["y" * 60] * 9, 9).endswith("and 6 more") and shown(["y" * 60] * 9, 9, room=900).count("'") == 18
    assert similar("x" * 10**5, ["tea"]) == "there are 'tea'"


def test_what_other_libraries_say():
    assert reason(ValueError("a\nb")) == "a" and reason(TimeoutError()) == "TimeoutError"
    assert reason(RecursionError("maximum")) == "it is nested too deep" and len(reason(ValueError("x" * 5000))) <= 200


def test_problems_with_fields():
    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid")

    with pytest.raises(ValidationError) as error:
        Strict.model_validate({"x" * 5000: 1, **dict.fromkeys("abcd", 1)})
    found = problems(error.value, "whole")
    assert found.endswith("; and 2 more") and len(found) < 400 and "Extra inputs" in found
