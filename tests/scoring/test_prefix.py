"""Prompts behind a prefix that is read once score as prompts behind it in one row do."""

import copy

import pytest
import torch
import transformers

from ia3 import IA3Config, IA3Model, InputError, Prefix, Scorer, score_choices
from ia3.scoring import beginning
from ia3.scoring.question import Question
from ia3.scoring.tokens import continuations
from support import tiny, words
from support.asked import COMMON, LAYOUTS, alone, made

SHOTS = "the tea was lovely answer : good\n\nthe soup was stale answer : not bad"
PROMPTS = ["review : the tea was", "the soup is", "the cake was lovely and the tea was not"]
CHOICES = [[" good", " not good", " not bad today"], [" bad"], [" fine", " awful and stale today", " not bad"]]


def layout(prefix: Prefix) -> str:
    return prefix._layout or "whole"


class TestPrefix:
    @pytest.mark.parametrize("at_once", [True, False])
    def test_a_window_is_found_out_behind_longer_rows_of_many_short_choices(self, at_once):
        model, tokenizer = made("mistral", **{**COMMON, "sliding_window": 12}), words.tokenizer()
        prompts = ["tea", "the tea was it and is soup cake today review a the tea was it and is"]
        choices = [[f" {word} was" for word in words.VOCABULARY[3:40]], [" good", " not good"]]
        [expected] = score_choices(model, tokenizer, ["the tea was good " + prompts[1]], choices[1:])
        prefix = Prefix(model, tokenizer, "the tea was good", " ")
        if not at_once:
            score_choices(model, tokenizer, prompts[:1], choices[:1], prefix=prefix)
        first = 0 if at_once else 1
        found = score_choices(model, tokenizer, prompts[first:], choices[first:], prefix=prefix)[-1]
        assert torch.allclose(found, expected, atol=1e-4)

    @pytest.mark.parametrize("name", LAYOUTS)
    def test_scores_are_those_of_one_row(self, name):
        sizes, attentions, expected = LAYOUTS[name]
        for attention in attentions:
            model = made(name, **sizes)
            if attention is not None:
                model.set_attn_implementation(attention)
            self.check(model, expected)

    def check(self, model, expected):
        tokenizer = words.tokenizer()
        prefix = Prefix(model, tokenizer, SHOTS)
        bytes_before, progress = prefix.nbytes, []
        found = score_choices(
            model, tokenizer, PROMPTS, CHOICES, batch_tokens=30, on_progress=progress.append, prefix=prefix
        )
        assert sorted(i for done in progress for i in done) == [0, 1, 2]
        for prompt, some, scores in zip(PROMPTS, CHOICES, found, strict=True):
            ids = [tokenizer(text)["input_ids"] for text in (SHOTS, prompt, *some)]
            question = Question(ids[0] + ids[1], ids[2:])
            assert scores.tolist() == pytest.approx(alone(model, question), abs=1e-4)
        assert layout(prefix) == expected
        assert prefix.nbytes == bytes_before  # nothing that batches add is kept
        again = score_choices(model, tokenizer, PROMPTS, CHOICES, prefix=prefix)
        for one, other in zip(found, again, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        without = score_choices(model, tokenizer, PROMPTS, CHOICES)
        assert max(float((a - b).abs().max()) for a, b in zip(found, without, strict=True)) > 1e-3

    def test_an_adapted_model_reads_with_its_active_adapters(self, llama):
        model = IA3Model(llama, {"one": IA3Config(), "two": IA3Config()})
        tokenizer, found = words.tokenizer(), {}
        for seed, adapter in enumerate(("one", "two")):
            tiny.randomize(model, seed, adapter)
            model.set_adapter(adapter)
            prefix = Prefix(model, tokenizer, SHOTS)
            found[adapter] = score_choices(model, tokenizer, PROMPTS, CHOICES, prefix=prefix)
            for prompt, some, scores in zip(PROMPTS, CHOICES, found[adapter], strict=True):
                ids = [tokenizer(text)["input_ids"] for text in (SHOTS, prompt, *some)]
                assert scores.tolist() == pytest.approx(alone(model, Question(ids[0] + ids[1], ids[2:])), abs=1e-4)
        assert (found["one"][0] - found["two"][0]).abs().max() > 1e-3
        # The cache is of the second adapter.
        model.set_adapter("one")
        with pytest.raises(InputError, match="active adapters that read the prefix"):
            score_choices(model, tokenizer, PROMPTS, CHOICES, prefix=prefix)
        model.set_adapter("two")
        with model.disable_adapter(), pytest.raises(InputError, match="active adapters"):
            score_choices(model, tokenizer, PROMPTS, CHOICES, prefix=prefix)
        with pytest.raises(InputError, match="active adapters"):
            score_choices(model, tokenizer, PROMPTS, CHOICES, prefix=prefix, adapter_names=["one"] * 3)
        with pytest.raises(InputError, match="active adapters"):
            score_choices(copy.deepcopy(model), tokenizer, PROMPTS, CHOICES, prefix=prefix)

    def test_an_adapter_that_has_been_trained_since_is_refused(self, llama):
        model = IA3Model(llama, IA3Config(init_ia3_weights=False))
        prefix = Prefix(model, words.tokenizer(), "the tea was good")
        score_choices(model, words.tokenizer(), ["the soup"], [[" good", " bad"]], prefix=prefix)
        with torch.no_grad():
            next(model.adapter_parameters("default")).mul_(2)
        with pytest.raises(InputError, match="trained since"):
            score_choices(model, words.tokenizer(), ["the soup"], [[" good", " bad"]], prefix=prefix)

    def test_a_question_that_nobody_asked_decides_nothing(self):
        """A long prompt with few choices and a short one with many fit a window that both together do not."""
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "window_size": 24}
        model = made("gpt_neo", vocab_size=len(words.VOCABULARY), attention_types=[[["global", "local"], 1]], **sizes)
        prefix = Prefix(model, words.tokenizer(), "the tea")
        prompts = ["was it " * 4, "was"]
        choices = [[" good", " bad"], [f" {word} was" for word in words.VOCABULARY[3:15]]]
        found = score_choices(model, words.tokenizer(), prompts, choices, prefix=prefix)
        assert layout(prefix) == "packed"
        whole = score_choices(model, words.tokenizer(), [f"the tea \n\n {prompt}" for prompt in prompts], choices)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, whole, strict=True))

    def test_memory_holds_one_expanded_layer(self, llama, monkeypatch):
        """What a batch's rows attend to is bounded, however short rows are, and rows of a batch share the prefix."""
        tokenizer, sizes = words.tokenizer(), []
        prefix = Prefix(llama, tokenizer, " ".join(["tea"] * 200))
        update = beginning.SharedLayer.update

        def counting(self, keys, values, *args, **kwargs):
            assert self.keys.shape == (1, 2, 200, 8)
            found = update(self, keys, values, *args, **kwargs)
            sizes.append(found[0].shape[0] * found[0].shape[2])
            return found

        monkeypatch.setattr(beginning.SharedLayer, "update", counting)
        monkeypatch.setattr(beginning, "_CACHED_TOKENS", 800)
        score_choices(llama, tokenizer, ["the tea was"] * 60, [[" good", " bad"]] * 60, batch_tokens=100, prefix=prefix)
        assert 400 < max(sizes) <= 800

    def test_what_marks_the_beginning_of_a_text_stands_there_only(self, llama):
        from tokenizers.processors import TemplateProcessing

        opening = words.tokenizer(bos_token="<unk>")
        opening.backend_tokenizer.post_processor = TemplateProcessing(
            single="<unk> $A </s>", special_tokens=[("<unk>", 2), ("</s>", 1)]
        )
        prefix = Prefix(llama, opening, "the tea")
        assert prefix.tokens == [2, *words.tokenizer()("the tea")["input_ids"]]
        questions = Scorer(llama, opening).encode(["the cake was"], [[" good"]], prefix=prefix)
        assert questions[0].prompt == words.tokenizer()("the cake was")["input_ids"]

    def test_the_separator_is_tokenized_with_the_prompt(self):
        """As it would be in one text: GPT-2's pattern splits two line ends before a word, and not at the end."""
        from tokenizers import Tokenizer, models, pre_tokenizers

        vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        vocabulary["ĊĊ"] = len(vocabulary)
        bpe = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe)
        whole = tokenizer("a\n\nb\n\nc")["input_ids"]
        shots = tokenizer("a\n\nb")["input_ids"]
        assert tokenizer("a\n\nb\n\n")["input_ids"] + tokenizer("c")["input_ids"] != whole
        assert shots + continuations(tokenizer, ["\n\nc"])[0] == whole

    def test_an_encoder_decoder_reads_shots_with_each_prompt(self):
        model, tokenizer = tiny.build("t5"), words.tokenizer()
        prefix = Prefix(model, tokenizer, SHOTS)
        assert prefix.nbytes == 0 and not prefix.is_cached
        found = score_choices(model, tokenizer, PROMPTS, CHOICES, prefix=prefix)
        expected = score_choices(model, tokenizer, [f"{SHOTS}\n\n{prompt}" for prompt in PROMPTS], CHOICES)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert not torch.equal(found[0], score_choices(model, tokenizer, PROMPTS, CHOICES)[0])

    @pytest.mark.parametrize(
        "name, text, message",
        [
            ("gpt2", "tea " * 64, "shorter than the model's 64 tokens, found one of 64"),
            ("gpt2", "", "at least one token"),
            ("bert", "tea", "BertForSequenceClassification: a classifier"),
        ],
    )
    def test_bad_input(self, name, text, message):
        with pytest.raises(InputError, match=message):
            Prefix(tiny.build(name), words.tokenizer(), text)

    def test_long_prompts_lose_their_beginning_and_keep_the_shots(self, gpt2, caplog):
        tokenizer = words.tokenizer()
        prefix = Prefix(gpt2, tokenizer, " ".join(["tea"] * 40))
        found = score_choices(gpt2, tokenizer, [" ".join(["cake"] * 50)], [[" good", " not bad"]], prefix=prefix)
        short = score_choices(gpt2, tokenizer, [" ".join(["cake"] * 22)], [[" good", " not bad"]], prefix=prefix)
        assert torch.equal(found[0], short[0]) and "lose their beginning" in caplog.text
