"""What is generated in batches is what greedy decoding gives for each row alone."""

from dataclasses import replace

import pytest
import torch

import ia3
from ia3 import InputError, Scorer
from ia3.evaluation.costs import count_flops, flops_of
from ia3.evaluation.generation import generate, shots_before
from ia3.task.free_text import FreeText
from support import tiny, words

TASK = FreeText.create({"template": "review : {{ text }} answer :", "answer": "{{ said }}", "max_new_tokens": 6})
ROWS = [{"text": text} for text in ("tea", "the soup was stale today", "it was a cake and it was bitter today", "cake")]
SHOT = {"text": "the tea was fresh", "said": "good"}


def greedy(model, prompt: list[int], most: int) -> list[int]:
    """Token by token, without a cache, up to the end of the text."""
    found: list[int] = []
    while len(found) < most:
        if model.config.is_encoder_decoder:
            start = [model.config.decoder_start_token_id, *found]
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([start])).logits
        else:
            logits = model(input_ids=torch.tensor([prompt + found])).logits
        token = int(logits[0, -1].argmax())
        if token == tiny.EOS:
            break
        found.append(token)
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "opt"])
@torch.no_grad()
def test_rows_of_a_batch_are_generated_as_alone(name):
    tokenizer = words.tokenizer()
    # A seed for which some texts end early and others do not.
    model = tiny.build(name, vocab_size=len(words.VOCABULARY), seed=3)
    done: list[int] = []
    found = generate(model, tokenizer, TASK, ROWS, done.extend)
    for row, one in zip(ROWS, found, strict=True):
        expected = greedy(model, tokenizer(f"review : {row['text']} answer :")["input_ids"], 6)
        assert one.text == tokenizer.decode(expected, skip_special_tokens=True) and one.result == one.text
        assert one.finished == (len(expected) < 6)
    assert sorted(done) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generating_costs_what_reading_does_but_for_attention(name):
    model, tokenizer = tiny.build(name, vocab_size=len(words.VOCABULARY), seed=3), words.tokenizer()
    generate(model, tokenizer, TASK, ROWS[1:2])  # tries once whether padding is exact
    with count_flops() as counter:
        found = generate(model, tokenizer, TASK, ROWS[1:2])
    [question] = (one.question for one in found)
    assert tokenizer.decode(question.prompt) == "review : the soup was stale today answer :"
    assert tokenizer.decode(question.choices[0], skip_special_tokens=True) == found[0].text
    read = flops_of(Scorer(model, tokenizer), [question])
    assert read == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert read > flops_of(Scorer(model, tokenizer), [replace(question, choices=[question.choices[0][:2]])])


def test_a_model_for_which_padding_is_not_exact_reads_rows_of_one_length_together(monkeypatch):
    model, seen = tiny.build("llama", vocab_size=len(words.VOCABULARY)), []
    monkeypatch.setattr("ia3.evaluation.generation.trials.packs", lambda *_: False)
    generate_ = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: seen.append(given["attention_mask"]) or generate_(**given))
    generate(model, words.tokenizer(), TASK, ROWS)
    assert [len(mask) for mask in seen] == [1, 1, 2] and all(bool(mask.all()) for mask in seen)


def test_drawn_tokens_depend_on_the_seed_alone():
    model = tiny.build("llama", vocab_size=len(words.VOCABULARY))
    state = torch.random.get_rng_state()
    texts = [
        [one.text for one in generate(model, words.tokenizer(), TASK, ROWS, temperature=1.0, seed=seed)]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(state, torch.random.get_rng_state())


def test_shots_stand_before_the_prompt_and_a_blank_line_ends_the_answer(monkeypatch):
    assert shots_before(TASK, [SHOT]) == "review : the tea was fresh answer : good\n\n"
    model, tokenizer = tiny.build("llama", vocab_size=len(words.VOCABULARY)), words.tokenizer()
    asked = tokenizer(shots_before(TASK, [SHOT]) + "review : tea answer :")["input_ids"]
    said = generate(model, tokenizer, TASK, ROWS[:1], shots=[SHOT])[0].text
    assert said == tokenizer.decode(greedy(model, asked, 6), skip_special_tokens=True)
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_, **__: "good\n\nreview :")
    monkeypatch.setattr(type(tokenizer), "batch_decode", lambda its, ids, **_: ["good\n\n"] * len(ids))
    [found] = generate(model, tokenizer, TASK, ROWS[:1], shots=[SHOT])
    assert (found.result, found.finished) == ("good", True)


@pytest.mark.parametrize(
    "given, error", [({"temperature": -1}, "temperature of 0"), ({"max_new_tokens": -2}, "new token")]
)
def test_bad_numbers(given, error):
    with pytest.raises(InputError, match=error):
        generate(tiny.build("llama"), words.tokenizer(), TASK, ROWS, **given)


def test_adapters_must_act_from_the_start():
    model = tiny.adapt("llama", ia3, acts_from="question")
    with pytest.raises(InputError, match="acts from the question on"):
        generate(model, words.tokenizer(), TASK, ROWS)
