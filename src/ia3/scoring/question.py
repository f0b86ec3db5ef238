"""Prompts and answer choices as token ids: `Question`, and the tree that its choices form."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A prompt and its answer choices as token ids.

    Choices stand in an order of their own, that of their tokens: a sum over them, a tie between them, and a row that
    they are packed into, are the same to the last bit however a task lists its labels.

    Attributes:
        prompt: its tokens.
        choices: the tokens of each choice.
        label: the index of the right choice among `choices`; None when that is not known.
        adapter: whose answer is wanted, "__base__" for no adapter's; None: the active ones'. All questions of a batch
            say it, or none does.
        order: for each of `choices`, its index in the caller's list; None: the same.
        read: how many of the prompt's first tokens are the text that stands before what is asked about it. They are the same
            whatever is asked; adapters with `acts_from="question"` act on the others. 0: it begins with the question. An
            encoder reads the whole prompt before the decoder is asked.
        cut: the column whose end was cut off, so that the prompt fits; None: the row is whole.
        row: the number of its row, for errors.
    """

    prompt: list[int]
    choices: list[list[int]]
    label: int | None = None
    adapter: str | None = None
    order: tuple[int, ...] | None = None
    read: int = 0
    cut: str | None = field(default=None, compare=False)
    row: int | None = field(default=None, compare=False)

    @functools.cached_property
    def text(self) -> tuple[int, ...]:
        """The tokens before the question."""
        return tuple(self.prompt[: self.read])

    def behind(self, tokens: int) -> Question:
        """The question without so many of its first tokens."""
        return replace(self, prompt=self.prompt[tokens:], read=max(self.read - tokens, 0))

    def after(self, tokens: Sequence[int]) -> Question:
        """The question behind some more tokens, which are read before it."""
        return replace(self, prompt=[*tokens, *self.prompt], read=self.read + len(tokens))

    def only(self, listed: Collection[int]) -> Question:
        """The question with some of its choices, the right one among them, if it is known; `listed` are their indices in the
        caller's list."""
        kept = [index for index in range(len(self.choices)) if self.listed(index) in listed]
        return replace(
            self,
            choices=[self.choices[index] for index in kept],
            label=None if self.label is None else kept.index(self.label),
            order=tuple(self.listed(index) for index in kept),
        )

    def listed(self, index: int) -> int:
        """A choice's index in the caller's list."""
        return index if self.order is None else self.order[index]

    def as_listed(self, values: Iterable[T]) -> list[T]:
        """What there is for each of `choices`, in the order of the caller's list."""
        values = list(values)
        if self.order is None:
            return values
        return [value for _, value in sorted(zip(self.order, values, strict=True), key=lambda pair: pair[0])]


class Tree:
    """The choices of a question as a prefix tree. Node 0 is the end of the prompt; a node is a token that is read.

    `paths` has, for each choice, the node that predicts each of its tokens.
    """

    def __init__(self, choices: Sequence[Sequence[int]]) -> None:
        self.tokens, self.parents, self.depths = [-1], [-1], [0]
        self.paths: list[list[int]] = []
        children: dict[tuple[int, int], int] = {}
        for choice in choices:
            node, path = 0, [0]
            for token in choice[:-1]:
                if (node, token) not in children:
                    children[node, token] = len(self.tokens)
                    self.tokens.append(token)
                    self.parents.append(node)
                    self.depths.append(self.depths[node] + 1)
                node = children[node, token]
                path.append(node)
            self.paths.append(path)

    @property
    def farthest(self) -> int:
        """The choice whose last prediction stands farthest back in the row."""
        return max(range(len(self.paths)), key=lambda choice: self.paths[choice][-1])

    @property
    def seen(self) -> np.ndarray:
        """Which nodes each node sees, itself and those that lead to it: bool (nodes, nodes)."""
        found = np.eye(len(self.tokens), dtype=bool)
        for node in range(1, len(self.tokens)):
            found[node] |= found[self.parents[node]]
        return found


def tree_of(question: Question) -> Tree:
    """A question's choices as a prefix tree."""
    return Tree(question.choices)


def sizes_of(question: Question) -> tuple[int, int]:
    """How many tokens a question's packed row has: the prompt's, and those of the tree behind it.

    Both begin at the same column in all rows of a batch, whether one row of a decoder holds both or, in an
    encoder-decoder, the encoder has the one and the decoder the other.
    """
    return len(question.prompt), len(tree_of(question).tokens) - 1


def row_length(question: Question) -> int:
    """How many tokens a question's packed row has."""
    return sum(sizes_of(question))


def text_length(question: Question) -> int:
    """How many tokens are read of a question's prompt and its longest choice, in a row of their own."""
    return len(question.prompt) + max(map(len, question.choices)) - 1
