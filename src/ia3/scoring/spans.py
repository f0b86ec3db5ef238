"""Generation that writes only fields as JSON whose values are parts of a text: `FieldsProcessor`."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LogitsProcessor

from ia3.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A place in the JSON text: literal bytes from an index on and what follows them, or a place in the row's texts.
Item = tuple[Any, ...]
State = frozenset[Item]

_END: Item = ("end",)
_TOKENS = -1  # the key of a trie's node for the tokens that end there


class Grammar:
    """The JSON objects that may be written about a row, byte by byte.

    Fields come in their order, each at most once; a value is a part of one of the texts, or a list of such. It begins and ends
    without white space.

    Args:
        fields: the names.
        texts: the row's.
    """

    def __init__(self, fields: Sequence[str], texts: Sequence[str]) -> None:
        self._keys = [json.dumps(name, ensure_ascii=False) for name in fields]
        data, self._starts, self._stops = bytearray(), list[int](), set[int]()
        for text in texts:
            for character in text:
                if not character.isspace():
                    self._starts.append(len(data))
                data += json.dumps(character, ensure_ascii=False)[1:-1].encode("utf-8", "replace")
                if not character.isspace():
                    self._stops.add(len(data))
            data.append(0)  # no JSON text holds it, so no value goes on in the next text
        self._data = bytes(data)
        # The answer may follow the prompt with or without a space.
        self.start: State = frozenset(item for text in ("{", " {") for item in self._literal(text, ("key", 0, "")))

    def moves(self, state: State) -> dict[int, State]:
        """Each byte that may come next → the state behind it."""
        found: dict[int, set[Item]] = {}
        for item in state:
            for byte, behind in self._moves(item):
                found.setdefault(byte, set()).update(behind)
        return {byte: frozenset(items) for byte, items in found.items()}

    def _moves(self, item: Item) -> Iterator[tuple[int, list[Item]]]:
        if item[0] == "literal":
            _, text, index, then = item
            yield text[index], [("literal", text, index + 1, then)] if index + 1 < len(text) else self._behind(then)
        elif item[0] == "value":
            _, place, used, field, several = item
            if self._data[place]:
                yield self._data[place], [("value", place + 1, True, field, several)]
            if used and place in self._stops:
                yield ord('"'), self._behind(("closed", field, several))

    def _behind(self, then: Item) -> list[Item]:
        """The items where a part of the text has ended."""
        kind, *rest = then
        if kind == "key":
            first, comma = rest
            keys = ((f"{comma}{self._keys[i]}: ", ("field", i)) for i in range(first, len(self._keys)))
            options = [*keys, ("}", _END)]
        elif kind == "field":
            options = [('"', ("open", rest[0], False)), ('["', ("open", rest[0], True))]
        elif kind == "open":
            return [("value", place, False, *rest) for place in self._starts]
        elif kind == "closed":
            field, several = rest
            if not several:
                return self._behind(("key", field + 1, ", "))
            options = [(', "', ("open", field, True)), ("]", ("key", field + 1, ", "))]
        else:
            return [_END]
        return [item for text, behind in options for item in self._literal(text, behind)]

    def _literal(self, text: str, then: Item) -> list[Item]:
        return [("literal", text.encode(), 0, then)]


class FieldsProcessor(LogitsProcessor):
    """Lets `generate` choose only tokens that continue an object of the `Grammar` of each row. Not for beams.

    Args:
        tokenizer: the model's.
        grammars: of each row of the batch.
        ends: the tokens that end a text.
        start: how many tokens stand before what is generated.

    Raises:
        InputError: the tokenizer cannot write JSON.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, grammars: Sequence[Grammar], ends: Collection[int], start: int
    ) -> None:
        require_json(tokenizer)
        self._trie, self._bytes = _tokens_of(tokenizer)
        self._grammars, self._ends, self._start = grammars, ends, start
        self._states: list[State] = [grammar.start for grammar in grammars]
        self._read = start

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for column in range(self._read, input_ids.shape[1]):
            for row, token in enumerate(input_ids[:, column].tolist()):
                self._advance(row, token)
        self._read = input_ids.shape[1]
        found = torch.full_like(scores, -torch.inf)
        for row, state in enumerate(self._states):
            allowed = self._allowed(self._grammars[row], state, self._trie)
            # Where a character of the text has no token, the value cannot go on: the text ends.
            index = [*allowed] or [*self._ends]
            found[row, index] = scores[row, index]
            if torch.isneginf(
                found[row]
            ).all():  # the model forces another token here, such as the one that opens a text
                found[row] = scores[row]
        return found  # type: ignore[return-value]

    def _advance(self, row: int, token: int) -> None:
        state = self._states[row]
        for byte in self._bytes.get(token, b""):
            state = self._grammars[row].moves(state).get(byte, frozenset())
        self._states[row] = frozenset() if token in self._ends else state

    def _allowed(self, grammar: Grammar, state: State, node: dict[int, Any]) -> Iterator[int]:
        """The tokens below a node of the trie that a state allows."""
        for byte, behind in grammar.moves(state).items():
            child = node.get(byte)
            if child is not None:
                yield from child.get(_TOKENS, ())
                yield from self._allowed(grammar, behind, child)


def require_json(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `InputError` if a tokenizer has no tokens for JSON's signs; T5's has no braces."""
    trie, _ = _tokens_of(tokenizer)
    lacking = [sign for sign in '{}[]":,' if not _writes(trie, sign.encode())]
    if lacking:
        raise InputError(
            f"Expected a model that can write JSON, found a tokenizer without {' '.join(lacking)}",
            "take another",
            argument="model",
        )


def _writes(trie: dict[int, Any], text: bytes) -> bool:
    node: Any = trie
    for byte in text:
        node = node.get(byte, {})
    return bool(node)


_known: weakref.WeakKeyDictionary[Any, tuple[dict[int, Any], dict[int, bytes]]] = weakref.WeakKeyDictionary()


def _tokens_of(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[int, Any], dict[int, bytes]]:
    """The tokens of a tokenizer as a trie of their bytes, and token → bytes; without special ones."""
    if tokenizer not in _known:
        texts = _bytes_of(tokenizer)
        trie: dict[int, Any] = {}
        for token, text in texts.items():
            node = trie
            for byte in text:
                node = node.setdefault(byte, {})
            node.setdefault(_TOKENS, []).append(token)
        _known[tokenizer] = trie, texts
    return _known[tokenizer]


def _bytes_of(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """Token → the bytes that it adds to a text: of byte-level tokens, SentencePiece's, or others as they are decoded."""
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))  # type: ignore[attr-defined]
    level = {character: byte for byte, character in zip(*_alphabet(), strict=True)} if "ByteLevel" in decoder else {}
    special, found = {*tokenizer.all_special_ids}, {}
    for name, token in tokenizer.get_vocab().items():
        raw = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
        if token in special:
            continue
        if level:
            text = bytes(level[character] for character in name) if {*name} <= level.keys() else b""
        elif raw:
            text = bytes([int(raw[1], 16)])
        else:
            text = name.replace("▁", " ").encode()
        if text:
            found[token] = text
    return found


def _alphabet() -> tuple[list[int], list[str]]:
    """All bytes, and the characters that stand for them in byte-level tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [*map(chr, printable), *(chr(256 + number) for number in range(len(others)))]
    assert {*characters} == {*ByteLevel.alphabet()}
    return [*printable, *others], characters
