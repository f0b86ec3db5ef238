"""Texts continued together are those that `generate` gives each alone; stop texts, sampling, pieces."""

import copy

import pytest
import torch
import transformers
from tokenizers import decoders

from ia3 import AdapterBank, IA3Config, IA3Model, get_peft_model, get_peft_model_state_dict
from ia3.adapter.rows import BASE
from ia3.serve.engine import AdapterFailed, GenerateJob
from ia3.serve.generation import Decoder, Text
from support import tiny, words

# Their caches are keys and values by column, or a window of them, or a state.
MODELS = {
    "llama": {},
    "gpt2": {},
    "opt": {},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mistral": {**tiny.SIZES["llama"], "sliding_window": 4},
    "qwen2": {**tiny.SIZES["llama"], "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
}
PROMPTS = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [16, 17, 18, 19, 20, 21], [22, 23]]
NAMES = ["One", "Two", None, "Two", "One"]


def banked(name: str, vocabulary: int = len(words.VOCABULARY)) -> IA3Model:
    """A model with two adapters in its bank."""
    size = {"vocab_size": vocabulary, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    if name in tiny.SIZES:
        base = tiny.build(name, **size)
    else:
        config = transformers.AutoConfig.for_model(name, **{**MODELS[name], **size})
        base = tiny.randomized(transformers.AutoModelForCausalLM.from_config(config).eval())
    donor = get_peft_model(copy.deepcopy(base), IA3Config(task_type="CAUSAL_LM"))
    model = IA3Model(base, {}).eval()
    bank = AdapterBank(model, IA3Config(task_type="CAUSAL_LM"))
    for seed, adapter in enumerate(("One", "Two")):
        tiny.randomize(donor, seed)
        bank.add(adapter, get_peft_model_state_dict(donor))
    return model


def text_of(job: GenerateJob) -> tuple[Text, list]:
    """A text, and the list that its pieces go to."""
    pieces: list = []
    return Text(job, pieces.append), pieces


def run(decoder: Decoder) -> None:
    for _ in range(100):
        decoder.step()
        if not decoder.running:
            return
    raise AssertionError("it goes on")


def added(tokenizer, prompt, tokens) -> str:
    """What tokens add to the text of a prompt."""
    whole, before = (tokenizer.decode(ids, skip_special_tokens=True) for ids in ([*prompt, *tokens], prompt))
    assert whole.startswith(before)
    return whole[len(before) :]


def said(pieces) -> str:
    assert all(piece.finish is None for piece in pieces[:-1]) and pieces[-1].finish
    assert [piece.tokens for piece in pieces] == list(range(1, len(pieces) + 1))
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("short", [256, 4])
@pytest.mark.parametrize("name", MODELS)
def test_texts_that_come_and_go_are_those_of_generate(name, short, monkeypatch):
    monkeypatch.setattr("ia3.serve.generation._SHORT", short)  # few tokens: texts of about one length go on together
    model, tokenizer = banked(name), words.tokenizer()
    seen: list = []
    decoder = Decoder(model, tokenizer, lambda *batch: seen.append(batch))
    lengths = [7, 3, 12, 5, 9]
    made = [
        text_of(GenerateJob(key, prompt, length, 0.0))
        for key, prompt, length in zip(NAMES, PROMPTS, lengths, strict=True)
    ]
    decoder.begin([text for text, _ in made[:2]])
    decoder.step()
    decoder.begin([made[2][0]])
    decoder.step()
    decoder.step()
    decoder.begin([text for text, _ in made[3:]])
    run(decoder)
    for (_, pieces), key, prompt, length in zip(made, NAMES, PROMPTS, lengths, strict=True):
        found = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            adapter_names=[key or BASE], max_new_tokens=length, do_sample=False,
        )[0, len(prompt) :].tolist()  # fmt: skip
        finish = "stop" if found[-1] == 1 else "length"
        assert said(pieces) == added(tokenizer, prompt, found)
        assert (len(pieces), pieces[-1].finish) == (len(found), finish)
    together = name not in ("mistral", "qwen2")
    assert together or decoder.columns(text for text, _ in made) == sum(text.tokens for text, _ in made)
    assert (max(rows for kind, rows, _ in seen if kind == "decode") > 1) is together
    assert (max(adapters for _, _, adapters in seen) > 1) is together


def decoder_saying(monkeypatch, tokens, tokenizer=None):
    """A decoder whose model says these tokens, whatever it is asked."""
    tokenizer = tokenizer or words.tokenizer()
    model = banked("llama", len(tokenizer))
    decoder = Decoder(model, tokenizer, lambda *batch: None)

    def forced(self, logits):
        return tokens[self.count]

    monkeypatch.setattr(Text, "choose", forced)
    return decoder


def ids(text: str) -> list[int]:
    return [words.VOCABULARY.index(word) for word in text.split()]


@pytest.mark.parametrize(
    "stop, text, finish, tokens",
    [
        ((), " the tea was lovely today and fresh it", "length", 8),
        (("lovely",), " the tea was ", "stop", 4),
        ((" lovely today",), " the tea was", "stop", 5),
        (("ly to",), " the tea was love", "stop", 5),
        (("today and bad", "fresh"), " the tea was lovely today and ", "stop", 7),
        (("t", "ea"), " ", "stop", 1),
        (("never",), " the tea was lovely today and fresh it", "length", 8),
        (("it was",), " the tea was lovely today and fresh it", "length", 8),
    ],
)
def test_stop_texts(monkeypatch, stop, text, finish, tokens):
    decoder = decoder_saying(monkeypatch, ids("the tea was lovely today and fresh it"))
    one, pieces = text_of(GenerateJob("One", [3], 8, stop=stop))
    decoder.begin([one])
    if decoder.running:
        run(decoder)
    assert (said(pieces), pieces[-1].finish, pieces[-1].tokens) == (text, finish, tokens)
    for piece in pieces:
        assert not any(each in piece.text for each in stop)


def test_the_end_of_the_text_ends_it(monkeypatch):
    decoder = decoder_saying(monkeypatch, [*ids("the tea"), 1, *ids("soup")])
    one, pieces = text_of(GenerateJob(None, [3], 8, stop=("tea soup",)))
    decoder.begin([one])
    run(decoder)
    assert (said(pieces), pieces[-1].finish, pieces[-1].tokens) == (" the tea", "stop", 3)


def test_no_half_characters(monkeypatch):
    """A token of a byte is no character yet."""
    from tokenizers import Tokenizer, models

    letters = {f"<0x{byte:02X}>": byte for byte in range(256)}
    made = Tokenizer(models.BPE(letters, [], byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    decoder = decoder_saying(monkeypatch, list("né 語".encode()), tokenizer)
    one, pieces = text_of(GenerateJob(None, [3], 7))
    decoder.begin([one])
    run(decoder)
    assert [piece.text for piece in pieces] == ["n", "", "é", " ", "", "", "語"]
    # One that the prompt leaves open is told, and nothing else of the prompt.
    decoder = decoder_saying(monkeypatch, list("né 語".encode())[2:], tokenizer)
    one, pieces = text_of(GenerateJob(None, [*b"the n", 0xC3], 5))
    decoder.begin([one])
    run(decoder)
    assert [piece.text for piece in pieces] == ["é", " ", "", "", "語"]


def test_spaces_of_tokenizers_that_drop_the_first(monkeypatch):
    """SentencePiece's: a space belongs to the word behind it, and none stands before a text."""
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({"<unk>": 0, "▁the": 1, "▁tea": 2, "cup": 3}, unk_token="<unk>"))
    made.decoder = decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    decoder = decoder_saying(monkeypatch, [2, 3, 1], tokenizer)
    decoder.ends = set()
    one, pieces = text_of(GenerateJob(None, [1] * 20, 3))
    decoder.begin([one])
    run(decoder)
    assert [piece.text for piece in pieces] == [" tea", "cup", " the"]


def test_sampling_is_repeatable_and_as_the_model_says():
    model, tokenizer = banked("llama"), words.tokenizer()
    decoder = Decoder(model, tokenizer, lambda *batch: None)

    def texts(count, **options):
        made = [text_of(GenerateJob("One", [3, 4], 1, **options)) for _ in range(count)]
        decoder.begin([text for text, _ in made])
        return [pieces[0].text for _, pieces in made]

    assert len(set(texts(20, seed=5))) == 1
    assert len(set(texts(20))) > 1
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[3, 4]]), adapter_names=["One"]).logits[0, -1]
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.5), (1.0, 0.05)):
        expected = torch.softmax(logits.double() / temperature, -1)
        order = expected.argsort(descending=True)
        kept = order[: int((expected[order].cumsum(0) < top_p).sum()) + 1]
        nucleus = torch.zeros_like(expected)
        nucleus[kept] = expected[kept] / expected[kept].sum()
        # Special tokens say nothing; each other word is its own text.
        by_text = {}
        for token, p in enumerate(nucleus.tolist()):
            said_by_it = added(tokenizer, [3, 4], [token])
            by_text[said_by_it] = by_text.get(said_by_it, 0) + p
        found = [text for seed in range(8) for text in texts(250, temperature=temperature, top_p=top_p)]
        for text, p in by_text.items():
            share = found.count(text) / len(found)
            assert abs(share - p) < 5 * (p * (1 - p) / len(found)) ** 0.5 + 1e-9, (text, share, p)


def test_a_text_that_nobody_wants_is_dropped():
    model, tokenizer = banked("llama"), words.tokenizer()
    decoder = Decoder(model, tokenizer, lambda *batch: None)
    (gone, some), (stays, all_of_it) = (text_of(GenerateJob("One", prompt, 10, 0.0)) for prompt in PROMPTS[:2])
    decoder.ends = set()
    decoder.begin([gone, stays])
    gone.cancelled = True
    run(decoder)
    assert len(some) == 1 and len(all_of_it) == 10


def test_what_fails_is_told_once_and_the_rest_goes_on(monkeypatch):
    model, tokenizer = banked("llama"), words.tokenizer()
    decoder = Decoder(model, tokenizer, lambda *batch: None)
    decoder.ends = set()
    (first, one), (second, two), (third, three) = (
        text_of(GenerateJob(key, [3, 4], 5, 0.0)) for key in ("One", "Two", None)
    )
    decoder.begin([first])

    def broken(self, other):
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr("ia3.serve.generation._Group.join", broken)
        decoder.begin([second])  # whose first token has been told
    for pieces in (one, two):
        assert len(pieces) == 2 and isinstance(pieces[-1], MemoryError)
    unknown, told = text_of(GenerateJob("Nobody", [3], 5, 0.0))
    decoder.begin([unknown, third])
    assert len(told) == 1 and isinstance(told[0], AdapterFailed) and "Nobody" in str(told[0])
    run(decoder)
    assert len(three) == 5 and said(three)
    assert len(one) == len(two) == 2

    forward, rows = model.forward, []

    def small(*args, **options):  # there is room for one row
        rows.append(len(options["input_ids"]))
        if rows[-1] > 1:
            raise MemoryError("no room")
        return forward(*args, **options)

    made = [text_of(GenerateJob(key, [3, 4], 1, 0.0)) for key in ("One", None)]
    with monkeypatch.context() as patched:
        patched.setattr(model, "forward", small)
        decoder.begin([text for text, _ in made])
    assert rows == [2, 1, 1] and all(said(pieces) for _, pieces in made)
