"""Packed rows score as plain rows do, and both as (prompt + choice) alone in float64."""

import math
import random

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from ia3 import IA3Config, IA3Model, InputError, Scorer, Task, score_choices
from ia3.scoring.batch import groups, normalized_scores
from ia3.scoring.decoder import pack, plain_rows
from ia3.scoring.question import Question
from support import tiny, words
from support.asked import CAUSAL, alone, questions, scorer


@pytest.fixture(scope="module")
def models():
    return {name: tiny.build(name) for name in CAUSAL}


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("layout", [pack, plain_rows])
@settings(max_examples=25)
@given(made=questions)
def test_both_layouts_score_as_each_row_alone(models, name, layout, made):
    model, batch = models[name], layout(made)
    with torch.no_grad():
        scores = normalized_scores(scorer(model).log_probs(batch), batch["mask"])
    for row, question in zip(scores, made, strict=True):
        expected = alone(model, question)
        assert row[: len(expected)].tolist() == pytest.approx(expected, abs=1e-4)
        assert row[len(expected) :].tolist() == [-math.inf] * (scores.shape[1] - len(expected))


@given(st.permutations(range(6)))
def test_what_there_is_for_each_choice_in_the_callers_order(order):
    question = Question([5], [[6 + place] for place in range(6)], order=tuple(order))
    found = question.as_listed(question.choices)
    assert [found[question.listed(index)] for index in range(6)] == question.choices
    assert Question([5], question.choices).as_listed("abcdef") == list("abcdef")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_of_vectors_are_the_same_packed_and_plain(attention):
    made = [Question([5, 6, 7], [[8, 9], [8, 10, 11], [12]], 1), Question([5, 9, 4, 3, 3], [[7], [20, 21]], 0)]
    gradients = []
    for layout in (pack, plain_rows):
        base = tiny.build("llama")
        base.set_attn_implementation(attention)
        model = IA3Model(base, IA3Config())
        tiny.randomize(model)
        batch = layout(made)
        scorer(model).log_probs(batch).sum().backward()
        gradients.append([p.grad for p in tiny.adapter_parameters(model).values()])
    for packed, plain in zip(*gradients, strict=True):
        assert packed.abs().max() > 0
        torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-4)


def test_common_beginnings_are_shared_and_last_tokens_left_out():
    batch = pack([Question([5, 6], [[7, 8, 9], [7, 8, 10], [7, 11], [12]])])
    # Behind the prompt: 7, then 8 below it. 9, 10, 11 and 12 are only predicted.
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]]
    assert int(batch["keep"]) == 3
    assert batch["position"][0].tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 0], [0, 0, 0]]


def test_tree_mask_lets_a_token_see_prompt_and_ancestors_only():
    batch = pack([Question([5, 6], [[7, 8, 9], [10, 11]]), Question([5], [[6]])])
    seen = (batch["attention_mask"][:, 0] == 0).int().tolist()
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 10], [0, 5, 0, 0, 0]]
    assert seen[0] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert seen[1][1] == [0, 1, 0, 0, 0]  # the padding in front of a shorter prompt is not seen
    assert batch["position_ids"].tolist()[0] == [0, 1, 2, 3, 2]


@given(made=questions, limit=st.integers(1, 60))
def test_batches_hold_each_question_once_and_keep_to_the_limit(made, limit):
    found = list(groups(made, limit))
    assert sorted(i for group in found for i in group) == list(range(len(made)))
    for group in found:
        rows = pack([made[i] for i in group])["input_ids"]
        assert len(group) == 1 or rows.shape[0] * max(len(made[i].prompt) for i in group) <= limit


@given(
    sizes=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 12)), min_size=1, max_size=30),
    limit=st.integers(16, 4096),
)
def test_padding_of_a_batch_is_a_tenth_or_a_few_tokens(sizes, limit):
    made = [Question([5] * prompt, [list(range(choice)), [7]]) for prompt, choice in sizes]
    for group in groups(made, limit):
        some = [made[i] for i in group]
        rows = pack(some)["input_ids"]
        used = sum(len(question.prompt) + max(len(choice) - 1 for choice in question.choices) for question in some)
        assert rows.numel() - used <= max(8, rows.numel() / 10)


@pytest.mark.parametrize("count", [8, 64, 200])
@pytest.mark.parametrize("lengths", ["queries", "reviews", "articles"])
def test_padding_of_realistic_lengths_is_under_a_tenth(lengths, count):
    """Rows of a training step, of a small file and of a larger one, in tokens; twenty of each."""
    chance = random.Random(0)
    draw = {
        "queries": lambda: chance.randint(8, 30),
        "reviews": lambda: max(8, int(chance.lognormvariate(4.2, 0.7))),
        "articles": lambda: max(50, int(chance.lognormvariate(5.8, 0.5))),
    }[lengths]
    used = room = 0
    for _ in range(20):
        sizes = [draw() for _ in range(count)]
        for group in groups([Question([5] * size, [[6], [7, 8]]) for size in sizes]):
            used += sum(sizes[i] + 1 for i in group)
            room += (max(sizes[i] for i in group) + 1) * len(group)
    assert 1 - used / room < 0.1


def test_a_gradient_reads_the_vocabulary_once_for_all_rows(llama):
    """A slice of the hidden states is not contiguous, and its product with a gradient would be one for each row."""
    seen = []
    llama.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    batch = pack([Question([5, 6, 7, 8], [[9, 10], [11]]), Question([5, 6], [[9], [11]])])
    scorer(IA3Model(llama, IA3Config())).log_probs(batch)
    assert seen == [True]


def test_rows_of_several_tasks_become_questions_in_their_order_and_each_prompt_tokens_once(llama, monkeypatch):
    tasks = [Task(template=text, choices={"a": "good", "b": "not good"}) for text in ("tea {{ text }}", "{{ text }} :")]
    wordings = [tasks[i % 2].wording({"text": word}, i + 1) for i, word in enumerate(["was", "is", "cake", "soup"])]
    tokenizer, asked = words.tokenizer(), []
    encode = type(tokenizer)._encode_plus

    def counting(self, text, *args, **kwargs):
        asked.extend([text] if isinstance(text, str) else text)
        return encode(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "_encode_plus", counting)
    found = Scorer(llama, tokenizer).questions(wordings, labelled=False)
    assert [tokenizer.decode(question.prompt) for question in found] == ["tea was", "is :", "tea cake", "soup :"]
    assert [asked.count(wording.prompt) for wording in wordings] == [1, 1, 1, 1]


class TestScoreChoices:
    """The public function: text in, one tensor a prompt out."""

    def test_agrees_with_each_row_alone(self, llama):
        tokenizer = words.tokenizer()
        prompts = ["review : the tea was", "the soup is", "the cake was lovely and the tea was"]
        texts = [[" good", " not good"], [" bad"], [" fine", " awful and stale today", " not bad"]]
        progress = []
        scores = score_choices(llama, tokenizer, prompts, texts, batch_tokens=16, on_progress=progress.append)
        assert sorted(index for done in progress for index in done) == [0, 1, 2] and len(progress) > 1
        for prompt, some, found in zip(prompts, texts, scores, strict=True):
            ids = [tokenizer(text)["input_ids"] for text in (prompt, *some)]
            assert found.tolist() == pytest.approx(alone(llama, Question(ids[0], ids[1:])), abs=1e-4)
            assert found.dtype == torch.float32 and found.device.type == "cpu"

    @pytest.mark.parametrize("name, packed", [("llama", True), ("bloom", False)])
    def test_each_prompt_is_answered_by_its_adapter(self, name, packed):
        """In packed rows and in plain ones, in several batches that each hold more than one adapter."""
        sizes = {} if packed else {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": tiny.VOCAB}
        base = tiny.build("llama") if packed else transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))
        model = IA3Model(tiny.randomized(base.eval(), 0.2), {"one": IA3Config(), "two": IA3Config()})
        for seed, adapter in enumerate(model.peft_config):
            tiny.randomize(model, seed, adapter)
        tokenizer = words.tokenizer()
        prompts = ["the tea was", "review : the soup is", "a cake", "the cake was lovely and the tea was", "it is"]
        texts = [[" good", " not good"], [" bad"], [" fine", " awful and stale today"], [" good", " bad"], [" not bad"]]
        names = ["two", "one", "__base__", "one", "two"]
        batches_seen = []
        found = score_choices(
            model, tokenizer, prompts, texts, batch_tokens=20, on_progress=batches_seen.append, adapter_names=names
        )
        assert len(batches_seen) > 1 and max(map(len, batches_seen)) > 1
        assert ("position_ids" in scorer(model).collate(scorer(model).encode(prompts, texts))) is packed
        for row, adapter in enumerate(names):
            results = {}
            for each in ("one", "two", "__base__"):
                model.ia3_routing.switch(active=() if each == "__base__" else (each,))
                results[each] = score_choices(model, tokenizer, [prompts[row]], [texts[row]])[0]
            torch.testing.assert_close(found[row], results.pop(adapter), rtol=1e-4, atol=1e-4)
            assert all((found[row] - other).abs().max() > 1e-3 for other in results.values())
        assert model.ia3_routing.rows is None

    @pytest.mark.parametrize(
        "names, message",
        [
            (["one"], "the 3 prompts, found 1"),
            ([], "the 3 prompts, found 0"),
            ("one", "a list of a name for each row"),
            ([None, "one", "one"], "a list of a name for each row"),  # not the active one, for all
            (["one", "one", "own"], "Row 2: adapter 'own' does not exist; close to it: 'one'"),  # by the prompts' order
        ],
    )
    def test_adapter_names_that_do_not_fit(self, llama, names, message):
        model, seen = IA3Model(llama, IA3Config(), "one"), []
        with pytest.raises(InputError, match=message):
            score_choices(
                model,
                words.tokenizer(),
                ["the tea was", "the soup is today", "tea"],
                [["good"]] * 3,
                batch_tokens=1,
                on_progress=seen.append,
                adapter_names=names,
            )
        assert not seen and model.ia3_routing.rows is None
        with pytest.raises(InputError, match=r"IA3Model, .* found a LlamaForCausalLM"):
            score_choices(model.unload(), words.tokenizer(), ["tea"], [["good"]], adapter_names=["one"])

    def test_length_normalization_is_a_power(self, llama):
        tokenizer = words.tokenizer()
        made = scorer(llama).encode(["the tea was"], [["not good", "bad"]])
        for power in (0.0, 0.5, 1.0):
            found = score_choices(llama, tokenizer, ["the tea was"], [["not good", "bad"]], length_normalization=power)
            assert found[0].tolist() == pytest.approx(alone(llama, made[0], power), abs=1e-4)

    def test_each_question_may_have_a_power_of_its_own(self, llama):
        asks, powers = scorer(llama), [1.0, 0.0, 0.5]
        made = asks.encode(
            ["the tea was", "is the soup", "cake"], [["not good", "bad", "very good"][: 2 + i] for i in (0, 1, 0)]
        )
        for question, power, found in zip(made, powers, asks.score(made, powers), strict=True):
            assert found.tolist() == pytest.approx(question.as_listed(alone(llama, question, power)), abs=1e-5)

    def test_leaves_training_mode_as_it_was(self, llama):
        llama.train()
        score_choices(llama, words.tokenizer(), ["the tea"], [["good", "bad"]])
        assert llama.training

    def test_long_prompts_lose_their_beginning(self, gpt2, caplog):
        tokenizer = words.tokenizer()
        long = " ".join(["tea"] * 100 + ["was"])
        found = score_choices(gpt2, tokenizer, [long], [["good", "not bad"]])
        short = score_choices(gpt2, tokenizer, [" ".join(["tea"] * 61 + ["was"])], [["good", "not bad"]])
        assert torch.equal(found[0], short[0])
        assert "1 prompts are longer" in caplog.text

    def test_what_marks_the_beginning_of_a_text_stays(self):
        from tokenizers.processors import TemplateProcessing

        opening = words.tokenizer(bos_token="<unk>")
        opening.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
        short = tiny.build("llama", max_position_embeddings=4)
        made = Scorer(short, opening).encode(["tea was the cake"], [["good"]])[0]
        assert made.prompt == [2, *words.tokenizer()("the cake")["input_ids"]]

    def test_a_closing_token_of_the_tokenizer_does_not_close_the_prompt(self, llama):
        from tokenizers.processors import TemplateProcessing

        closing = words.tokenizer()
        closing.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        assert closing("the tea")["input_ids"][-1] == 1
        asked = ["the tea"], [["good"]]
        assert Scorer(llama, closing).encode(*asked) == scorer(llama).encode(*asked)

    @pytest.mark.parametrize(
        "prompts, texts, message",
        [
            (["a"], [], "as many lists of choices"),
            ("a", ["b"], "list of prompts"),
            (["tea"], [[]], "list of answer choices"),
            (["tea"], ["good"], "list of answer choices"),
            (["tea"], [["good", ""]], "at least one token"),
            ([""], [["good"]], "prompt with at least one token"),
            (["tea"], [["good " * 70]], "fewer than 64"),
        ],
    )
    def test_bad_input(self, gpt2, prompts, texts, message):
        with pytest.raises(InputError, match=message):
            score_choices(gpt2, words.tokenizer(), prompts, texts)

    def test_an_error_says_the_row_whatever_other_tasks_rows_stand_between(self, gpt2):
        short, long = (
            Task(template="{{ text }}", choices=["good", answer]) for answer in ("bad", "good " * 70 + "bad")
        )
        wordings = [task.wording({"text": "tea"}, number) for number, task in ((3, short), (4, short), (7, long))]
        with pytest.raises(
            InputError, match=r"fewer than 64 tokens, the model's context, found one of 71 \(row 7\); shorten"
        ) as error:
            Scorer(gpt2, words.tokenizer()).questions(wordings, labelled=False)
        assert error.value.row == 7

    def test_scores_that_are_no_numbers_are_refused(self, llama):
        llama.lm_head.weight.data[0, 0] = math.nan
        with pytest.raises(
            InputError, match=r"NaN or infinite scores \(row \d\); is the adapter or the base broken\?$"
        ):
            score_choices(llama, words.tokenizer(), ["tea"], [["good", "bad"]])

    def test_bfloat16(self):
        model = tiny.build("llama").bfloat16()
        assert "position_ids" in scorer(model).collate([Question([5, 6, 7, 8], [[9, 10], [11, 12, 13], [14]])])
        found = score_choices(model, words.tokenizer(), ["the tea was"], [["good", "not bad"]])[0]
        exact = score_choices(model.float(), words.tokenizer(), ["the tea was"], [["good", "not bad"]])[0]
        assert found.tolist() == pytest.approx(exact.tolist(), abs=0.2)
