"""A tokenizer of whole words for tiny models, and a toy task that a tiny model can learn."""

import csv
import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from support import tiny

GOOD = ["lovely", "tasty", "fresh", "perfect"]
BAD = ["awful", "stale", "broken", "bitter"]
OTHER = [
    "the",
    "a",
    "tea",
    "was",
    "it",
    "and",
    "is",
    "soup",
    "cake",
    "today",
    "review",
    ":",
    "answer",
    "text",
    "what",
    "question",
    ",",
    "or",
    "?",
    "not",
    "good",
    "bad",
    "fine",
    "bill",
    "fault",
    "billing",
    "technical",
    "pos",
    "neg",
]
TEMPLATE, CHOICES = "review : {{ text }} answer :", {"pos": "good", "neg": "not good"}
SPECIAL = ["<pad>", "</s>", "<unk>"]
VOCABULARY = [*SPECIAL, *GOOD, *BAD, *OTHER]


def tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """Splits at white space; unknown words become `<unk>`."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **{**special, **kwargs})


def rows(count: int = 40, seed: int = 0) -> list[dict[str, str]]:
    """Rows with columns `text` and `label`: one telling word in a sentence, label pos or neg."""
    chance = random.Random(seed)
    made = []
    for i in range(count):
        label = ("pos", "neg")[i % 2]
        word = chance.choice(GOOD if label == "pos" else BAD)
        made.append({"text": f"the {chance.choice(['tea', 'soup', 'cake'])} was {word} today", "label": label})
    return made


def different(count: int = 40, seed: int = 0) -> list[dict[str, str]]:
    """The same, no two of them in the same words."""
    return [{**row, "text": f"{row['text']} {number}"} for number, row in enumerate(rows(count, seed))]


def closing(opening: str = "", **kwargs) -> PreTrainedTokenizerFast:
    """The same, with `</s>` behind each text, as T5's; and perhaps a token before it, as BERT's."""
    made = tokenizer(**kwargs)
    opening = opening and f"{opening} "
    special = [(token, VOCABULARY.index(token)) for token in (*opening.split(), "</s>")]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=f"{opening}$A </s>", special_tokens=special)
    return made


def enclosing() -> PreTrainedTokenizerFast:
    """The same, with a token before each text and one behind it, as BERT's."""
    return closing("question", cls_token="question", sep_token="</s>")


def save_model(folder) -> None:
    """A tiny causal language model that knows these words, with its tokenizer, as the command line loads one."""
    tiny.build("llama", vocab_size=len(VOCABULARY)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def write_csv(path, rows, delimiter=","):
    """A file of rows, whose path it returns; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


_MERGES = ["Ġ {", '" :', '": Ġ', '":Ġ "', '" }', "a b", '{ "', 'Ġ{ "', ", Ġ"]


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, and of some tokens that reach over the parts of JSON."""
    names = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in _MERGES)]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    made = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in _MERGES]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")
