"""Candidate wordings for rows that come without one: `candidates`. All are plain text; data ranks them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from pydantic import ValidationError

from ia3.task.template import Row, Template, quoted, verbatim

# The maximum of labels that a question lists.
MOST_LISTED = 10

# Behind a text, in the order in which they are worth trying. {label} and {text} are the columns' names.
FORMS = (
    "The author feels",
    "The question is about",
    "This text is about",
    "In one word:",
    "The {label} of this {text} is",
    "The tone is",
    "{Label}:",
    "The topic of this text is",
    "If I had to describe this text in a word, I would say it is",
    "In short:",
    "This {text} is",
    "It was rated as",
    "The purpose of this message is",
    "All in all, it was",
    "The speaker wants to ask about",
    "Overall, I would call it",
    "The feeling expressed here is",
    "It is",
    "Category:",
    "The {label} is",
    "My opinion:",
    "This is a request about",
    "That sounds",
    "The problem is",
    "Topic:",
    "I feel",
    "I would like to",
    "Tag:",
    "A word for this is",
    "The answer is",
)

# Behind two or more texts. {first} and {second} are the names of the first two columns.
RELATIONS = (
    "The {label} is",
    "{Label}:",
    "The relation of the two texts is",
    "Together, they are",
    "In one word:",
    "In short:",
    "The answer is",
    "Compared with the {first}, the {second} is",
    "Given the {first}, the {second} is",
    "The {first} and the {second} are a case of",
    "This is",
    "The {label} of the {first} and the {second} is",
)

# Behind a text in any language, and behind labels that have no words.
NEUTRAL = ("{Label}:", "→", "=", "{label} =", "#")

# Behind a text of one of these languages.
FOREIGN = {
    "German": (
        "Dieser Text handelt von",
        "Thema:",
        "Kurz gesagt:",
        "Mit einem Wort:",
        "Der Ton ist",
        "Alles in allem war es",
        "Es geht um",
        "Kategorie:",
    ),
    "French": (
        "Ce texte parle de",
        "Sujet :",
        "En bref :",
        "En un mot :",
        "Le ton est",
        "Dans l'ensemble, c'était",
        "Il s'agit de",
        "Catégorie :",
    ),
    "Spanish": (
        "Este texto trata de",
        "Tema:",
        "En resumen:",
        "En una palabra:",
        "El tono es",
        "En general, fue",
        "Se trata de",
        "Categoría:",
    ),
}

# Frequent words that tell these languages apart.
_FREQUENT = {
    "English": "the and is of to in it that this for was with are not you have but be my on",
    "German": "der die das und ist nicht ich zu ein eine mit den von es auf sich für war dem wir aber auch sehr",
    "French": "le la les et est pas je un une des du que pour dans il ce avec sur très mais nous vous ne",
    "Spanish": "el la los y es no un una que de en por para con se lo las muy pero mi del como más",
}

# Labels that ask to be said in other words, all of a task's or none.
SYNONYMS = (
    {"positive": "great", "negative": "terrible", "neutral": "okay"},
    {"entailment": "true", "contradiction": "false", "neutral": "neither", "not entailment": "false"},
)

_AFFIRMED, _DENIED = {"yes", "true", "y", "1"}, {"no", "false", "n", "0"}

# Labels of what is not the other label; alone, such a word is no opposite of it.
_REST = {"other", "others", "rest", "none", "neither", "unknown", "misc", "miscellaneous", "else", "anything else"}

# Names of columns and files that do not say what labels mean.
_VAGUE = "label labels class category target y gold tag type task data dataset train training test dev rows texts"

# So few candidates say all that names of columns and labels without words can.
_FEW = ("The {label} of this {text} is", "The {label} is")

# The language is told by this number of rows, and of characters of each.
_LOOKED_AT, _CHARACTERS = 50, 500


def candidates(
    rows: Sequence[Row],
    text_columns: Sequence[str],
    label_column: str,
    choices: Mapping[str, str],
    own: bool = False,
    name: str = "",
) -> list[Template]:
    """Templates for labelled rows that come without one, those first that are worth trying first.

    >>> rows = [{"text": "Where is my card?", "label": "LostCard"}, {"text": "Cash is late", "label": "cash"}]
    >>> candidates(rows, ["text"], "label", {"LostCard": "LostCard", "cash": "cash"})[1]
    Template(name='', prompt='{{ text }}\\nThe question is about', choices={'LostCard': 'lost card', 'cash': 'cash'}, …)

    All begin with the same text, which a model then reads once, but for those that ask about one column's claim.

    Args:
        rows: some rows, which say which language they are in.
        text_columns: the columns with texts, in order.
        label_column: the column with the label, whose name says what it means.
        choices: label → answer text, of templates that have none of their own.
        own: whether the user chose the answer texts. Then all templates have these.
        name: what the rows are called, such as their file. It says what labels mean if their column does not.
    """
    split = {label: verbatim(in_words(label)) for label in choices}
    # Two labels may be one when their letters are all small.
    said = dict(choices) if own or len(set(split.values())) < len(split) else split
    made = Template(prompt=made_template(text_columns, label_column, list(choices.values())))
    text, meaning = _texts(text_columns), _named(label_column)
    if (
        meaning in _VAGUE.split()
        and name.lower() not in _VAGUE.split()
        and re.fullmatch(r"[^\W\d]+([-_ ][^\W\d]+)*", name)
    ):
        meaning = in_words(name)
    names = {
        "label": meaning,
        "Label": _capital(meaning),
        "text": _named(text_columns[-1]),
        "first": _named(text_columns[0]),
        "second": _named(text_columns[min(1, len(text_columns) - 1)]),
    }

    def behind(forms: Iterable[str], answers: Mapping[str, str] = said) -> list[Template]:
        found = []
        for form in forms:
            asked = "\n".join(verbatim(line) for line in form.format(**names).splitlines())
            its = None if answers == choices else dict(answers)
            found.append(Template(prompt=f"{text}\n{asked}", choices=its))
        return found

    if are_codes(choices.values() if own else choices):
        return _different([*behind((*NEUTRAL[:3], *_FEW), choices), made])
    found: list[Template] = []
    if not own:
        found += _in_other_words(text_columns, behind, list(choices))
    language = language_of(rows, text_columns, choices)
    forms = FORMS if len(text_columns) == 1 else RELATIONS
    if language != "English":
        found += behind((*NEUTRAL, *FOREIGN.get(language, ())))
        forms = forms[:12] if all(map(str.isascii, said.values())) else ()
    found += [*behind(forms), made, *behind(NEUTRAL)]
    # As they are written in the data, where that differs.
    found += behind(("{Label}:", "The {label} of this {text} is"), choices)
    return _different(found)


def _in_other_words(text_columns: Sequence[str], behind: Any, labels: Sequence[str]) -> list[Template]:
    """Templates whose answers are other words than the labels."""
    found: list[Template] = []
    plain = {label: in_words(label) for label in labels}
    for synonyms in SYNONYMS:
        other = {label: synonyms.get(words, "") for label, words in plain.items()}
        if not all(other.values()) or len(set(other.values())) < len(other):
            continue
        if "true" not in synonyms.values():
            found += behind(("All in all, it was", "It is"), other)
        elif len(text_columns) == 2:
            *most, last = map(_capital, other.values())
            first, second = map(field, text_columns)
            found.append(
                Template(prompt=f"{first}\nQuestion: {second} {', '.join(most)} or {last}?\nAnswer:", choices=other)
            )
            found += behind(("The {second} is", "Therefore, the {second} is"), other)
    if len(labels) == 2:
        for label, other in (labels, labels[::-1]):
            denied, word = plain[other], plain[label]
            if denied in (f"not {word}", f"no {word}", f"non {word}", f"un{word}", f"in{word}"):
                answers = {label: "yes", other: "no"}
                asked = (f"Question: Is this {word}?\nAnswer:", f"Is the {{text}} {word}?", f"{_capital(word)}:")
                found += behind((form.replace(word, _braced(word)) for form in asked), answers)
            elif denied in _REST and word not in _REST:
                forms = FORMS if len(text_columns) == 1 else RELATIONS
                found += behind(forms, {label: verbatim(word), other: verbatim(f"not {word}")})
            elif word in _AFFIRMED and denied in _DENIED:
                found += behind(("Question: Is it {label}?\nAnswer:", "Is this {text} {label}?", "{Label}?"))
    return found


def made_template(text_columns: Sequence[str], label_column: str, answers: Sequence[str]) -> str:
    """The template for rows whose wording nothing is known of: the text, or each column's name and text, a question that
    lists the answers where they are few, and "Answer:"."""
    text = _texts(text_columns)
    if len(answers) > MOST_LISTED:
        return f"{text}\n\n{verbatim(label_column.replace('_', ' ').capitalize())}:"
    name = verbatim(label_column.replace("_", " "))
    return f"{text}\n\nQuestion: What is the {name}, {', '.join(answers[:-1])} or {answers[-1]}?\nAnswer:"


def field(column: str) -> str:
    """A template that gives a column's text."""
    text = f"{{{{ {column} }}}}"
    with contextlib.suppress(ValidationError):
        if Template(prompt=text).columns == (column,):
            return text
    return f"{{{{ row[{quoted(column)}] }}}}"


def in_words(label: str) -> str:
    """A label as words: `RequestRefund`, `request_refund` and `request-refund` are "request refund"."""
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[_\s]+|(?<=\w)[-./](?=\w)", " ", label).strip()
    # Words in capitals stay: they are abbreviations, unless all are.
    return " ".join(text.lower() if text.isupper() else w if w[1:].isupper() else w.lower() for w in text.split())


def are_codes(labels: Iterable[str]) -> bool:
    """Whether labels are numbers or codes such as "A17", which no wording can name."""
    return all(re.fullmatch(r"\W*([A-Za-z]{0,3}[-_. ]?\d[\d.,-]*|[A-Za-z])\W*", label) for label in labels)


def language_of(rows: Sequence[Row], text_columns: Sequence[str], labels: Iterable[str]) -> str:
    """The language of rows' texts and labels, of those that are known here; "" for another; where it is not clear,
    English."""
    texts = [str(row.get(column) or "")[:_CHARACTERS] for row in islice(rows, _LOOKED_AT) for column in text_columns]
    letters = [one for one in "".join([*texts, *labels]) if one.isalpha()]
    if sum(ord(one) > 0x24F for one in letters) > len(letters) / 4:  # behind the Latin alphabets
        return ""
    words = re.findall(r"\w+", " ".join(texts).lower())
    counts = {name: sum(map(set(known.split()).__contains__, words)) for name, known in _FREQUENT.items()}
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] >= max(3, 2 * counts["English"]) else "English"


def _texts(columns: Sequence[str]) -> str:
    fields = [field(column) for column in columns]
    if len(fields) > 1:
        fields = [f"{verbatim(column.replace('_', ' '))}: {text}" for column, text in zip(columns, fields, strict=True)]
    return "\n".join(fields)


def _named(column: str) -> str:
    return in_words(column) or column


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _braced(text: str) -> str:
    """A text that `str.format` leaves as it is."""
    return text.replace("{", "{{").replace("}", "}}")


def _different(templates: Iterable[Template]) -> list[Template]:
    return list({(one.prompt, str(one.choices)): one for one in templates}.values())
