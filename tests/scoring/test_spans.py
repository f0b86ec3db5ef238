"""What `FieldsProcessor` lets a model write, against all that may be written, counted out."""

import itertools
import json
import random

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ia3 import InputError
from ia3.evaluation.generation import generate
from ia3.scoring.spans import FieldsProcessor, Grammar, _alphabet, require_json
from ia3.task.fields import Fields
from support import tiny, words
from support.words import byte_level

TOKENIZER = byte_level()
END = TOKENIZER.eos_token_id


def allowed(texts, fields, written: list[int]) -> list[set[int]]:
    """The tokens that may come behind none of those that are written, behind the first, …, behind all."""
    processor = FieldsProcessor(TOKENIZER, [Grammar(fields, texts)], [END], 0)
    found = []
    for length in range(len(written) + 1):
        scores = processor(torch.tensor([written[:length]], dtype=torch.long), torch.zeros(1, len(TOKENIZER)))
        found.append({*torch.isfinite(scores[0]).nonzero().flatten().tolist()})
    return found


def objects(texts, fields, most: int) -> set[str]:
    """All that may be written, with lists of up to so many values."""
    parts = {text[i:j] for text in texts for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    parts = sorted(part for part in parts if part == part.strip())
    values = [*parts, *(list(some) for n in range(1, most + 1) for some in itertools.product(parts, repeat=n))]
    found = set()
    for count in range(len(fields) + 1):
        for names in itertools.combinations(fields, count):
            for some in itertools.product(values, repeat=count):
                found.add(json.dumps(dict(zip(names, some, strict=True)), ensure_ascii=False))
    return found


def test_a_token_is_allowed_if_and_only_if_some_object_goes_on_with_it():
    texts, fields = ['a"', "ü b"], ["x", "y"]
    # With lists of one value more than are looked at, no list ends at the bound.
    wholes = objects(texts, fields, 2)
    prefixes = {whole.encode()[:n] for whole in wholes for n in range(len(whole.encode()) + 1)}
    alphabet = {token: _bytes(token) for token in range(2, len(TOKENIZER))}
    one_value = sorted(
        whole for whole in wholes if not any(type(its) is list and len(its) > 1 for its in json.loads(whole).values())
    )
    for whole in random.Random(0).sample(one_value, 6):
        written = TOKENIZER(whole)["input_ids"]
        for length, found in enumerate(allowed(texts, fields, written)):
            so_far = b"".join(alphabet[token] for token in written[:length])
            expected = {token for token, its in alphabet.items() if so_far + its in prefixes}
            if not length:  # a space may stand before it
                expected |= {token for token, its in alphabet.items() if its[:1] == b" " and its[1:] in prefixes}
            if so_far.decode(errors="replace") in wholes:
                expected |= {END}
            assert found == expected, (whole, so_far)


def _bytes(token: int) -> bytes:
    characters = dict(zip(*reversed(_alphabet()), strict=True))
    return bytes(characters[character] for character in TOKENIZER.convert_ids_to_tokens(token))


def test_any_model_writes_parts_of_the_text_alone():
    task = Fields.create({"template": "{{ text }}", "fields": ["when", "who"], "max_new_tokens": 60})
    chance = random.Random(1)
    rows = [{"text": " ".join("".join(chance.choices('abü"\\\n€', k=4)) for _ in range(4))} for _ in range(12)]
    model = tiny.build("llama", vocab_size=len(TOKENIZER))
    greedy = generate(model, TOKENIZER, task, rows)
    drawn = [generate(model, TOKENIZER, task, rows, temperature=3.0, seed=seed) for seed in range(3)]
    some = [one for found in (greedy, *drawn) for one in zip(rows, found, strict=True)]
    assert sum(made.finished for _, made in some) > 3
    count = 0
    for row, made in some:
        if made.finished:
            assert list(json.loads(made.text)) == sorted(json.loads(made.text))
        for value in made.result.values():
            for part in value if isinstance(value, list) else [value] if value else []:
                count += 1
                assert part in row["text"] and part == part.strip()
    assert count > 10


def test_all_rows_of_a_batch_have_a_text_of_their_own():
    task = Fields.create({"template": "{{ text }}", "fields": ["x"], "max_new_tokens": 30})
    model, rows = tiny.build("llama", vocab_size=len(TOKENIZER)), [{"text": "abc"}, {"text": "a longer text"}]
    together = generate(model, TOKENIZER, task, rows)
    assert together == [generate(model, TOKENIZER, task, [row])[0] for row in rows]


def test_sentencepiece_writes_its_bytes():
    names = ["<pad>", "</s>", "▁{", '{"', '"', ":", "▁", "}", "x", "[", "]", ",", "a", "<0xC3>", "<0xBC>"]
    made = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")
    processor = FieldsProcessor(tokenizer, [Grammar(["x"], ["aü"])], [1], 0)
    written: list[int] = []
    for name in ['{"', "x", '"', ":", "▁", '"', "<0xC3>", "<0xBC>", '"', "}", "</s>"]:
        scores = processor(torch.tensor([written], dtype=torch.long), torch.zeros(1, len(names)))
        assert torch.isfinite(scores[0, names.index(name)]), name
        written.append(names.index(name))


def test_a_tokenizer_without_braces_is_refused():
    with pytest.raises(InputError, match=r"found a tokenizer without \{ \}"):
        require_json(words.tokenizer())
