"""Texts that are read once: whatever is asked of what they left scores, and teaches, as whole rows do."""

import functools
import itertools
import random
from dataclasses import replace

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ia3 import (
    IA3Config,
    IA3Model,
    InputError,
    Member,
    Readings,
    Recipe,
    Scorer,
    Task,
    TFewTrainer,
    predict,
    predict_each,
)
from ia3.evaluation.prediction import Respondent
from ia3.scoring import readings as room
from ia3.scoring import scorer as scoring
from ia3.scoring.encoder_decoder import EncoderDecoder
from ia3.scoring.question import Question
from ia3.training.losses import tfew_loss
from support import tiny, words
from support.asked import LAYOUTS, alone, made, scorer

TOKENIZER = words.tokenizer()


def asked(count: int = 6, seed: int = 0, adapter: str | None = None, longest: int = 30) -> list[Question]:
    """Questions of texts of different lengths, two of which are one text, each with some choices."""
    chance = random.Random(seed)

    def some(least: int, most: int) -> list[int]:
        return chance.choices(range(3, tiny.VOCAB), k=chance.randint(least, most))

    texts = [some(5, longest) for _ in range(count - 1)]
    found = []
    for index, text in enumerate([*texts, texts[0]]):
        choices = sorted([[3, *some(0, 1)], [4, *some(0, 2)], [5]][: 2 + index % 2])
        found.append(Question([*text, *some(1, 6)], choices, index % 2, adapter, read=len(text)))
    return found


def with_readings(model, memory="1MB"):
    one = scorer(model)
    one.readings = Readings(memory)
    return one


def asking(kind: str = "question", names=("default",), arch: str = "llama"):
    model = IA3Model(tiny.build(arch), {name: IA3Config(task_type="CAUSAL_LM", acts_from=kind) for name in names})
    for seed, name in enumerate(names):
        tiny.randomize(model, seed + 1, name)
    return model


class TestTheBaseModel:
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_scores_are_those_of_each_row_alone(self, name):
        sizes, attentions, layout = LAYOUTS[name]
        for attention in attentions:
            model = made(name, **sizes)
            if attention is not None:
                model.set_attn_implementation(attention)
            asks, questions = with_readings(model), asked()
            found = asks.score(questions, batch_tokens=60)
            for question, scores in zip(questions, found, strict=True):
                assert scores.tolist() == pytest.approx(alone(model, question), abs=1e-5)
            # A window shorter than the row, ALiBi, recurrence: rows are whole.
            assert asks.readings.read == (5 if layout == "packed" else 0)

    def test_a_text_is_read_once_whatever_is_asked_of_it(self, monkeypatch):
        model, questions = tiny.build("llama"), asked()
        asks = with_readings(model)
        asks.score(questions)
        assert asks.readings.read == len(asks.readings) == 5
        passes = []
        monkeypatch.setattr(room, "read_texts", lambda *args: passes.append(args))
        others = [replace(one, prompt=[*one.text, 7, 8], choices=[[9], [10, 11]]) for one in questions]
        for question, scores in zip(others, asks.score(others), strict=True):
            assert scores.tolist() == pytest.approx(alone(model, question), abs=1e-5)
        assert not passes

    def test_what_all_texts_begin_with_is_read_once(self, monkeypatch):
        model, start = tiny.build("llama"), random.Random(1).choices(range(3, tiny.VOCAB), k=60)
        questions = [one.after(start) for one in asked()]
        passes = []
        monkeypatch.setattr(
            room, "fill", lambda *args, its=room.fill, **more: passes.append(args[2]) or its(*args, **more)
        )
        asks = with_readings(model)
        for question, scores in zip(questions, asks.score(questions), strict=True):
            assert scores.tolist() == pytest.approx(alone(model, question), abs=1e-5)
        assert (1, 60) in [tuple(ids.shape) for ids in passes]
        assert sum(ids.numel() for ids in passes[-2:]) < 60 + 6 * 30

    @pytest.mark.parametrize("texts", [1.2, 2.5])
    def test_memory_holds_what_it_may_and_the_rest_is_read_again(self, texts):
        model, questions = tiny.build("llama"), asked(longest=8)
        asks = with_readings(model)
        asks.score(questions)
        most = max(reading.nbytes for reading in asks.readings._kept.values())
        asks.readings = Readings(int(most * texts))
        for _ in range(2):
            found = asks.score(questions)
            assert asks.readings.nbytes <= asks.readings.memory
            for question, scores in zip(questions, found, strict=True):
                assert scores.tolist() == pytest.approx(alone(model, question), abs=1e-5)
        assert asks.readings.read > 5

    def test_memory_for_no_text_keeps_one_at_a_time(self):
        model, questions = tiny.build("llama"), asked()
        asks = with_readings(model, 100)
        for question, scores in zip(questions, asks.score(questions), strict=True):
            assert scores.tolist() == pytest.approx(alone(model, question), abs=1e-5)
        assert len(asks.readings) == 1
        with pytest.raises(InputError, match="Expected memory for readings in bytes, or such as '512MB'"):
            Readings("much")

    def test_one_text_in_many_wordings_is_read_once_within_a_call(self, monkeypatch):
        model, text = tiny.build("llama"), list(range(3, 43))
        questions = [Question([*text, 3 + index], [[3], [4]], read=40) for index in range(8)]
        read = []
        monkeypatch.setattr(room, "read_texts", lambda *args, its=room.read_texts: read.append(args[1]) or its(*args))
        for question, scores in zip(questions, scorer(model).score(questions), strict=True):
            assert scores.tolist() == pytest.approx(alone(model, question), abs=1e-5)
        assert [tuple(text)] in read


class TestAdapters:
    def test_those_that_act_from_the_question_on_share_what_the_base_model_read(self):
        names = ("one", "two")
        model = asking(names=names)
        asks, plain = with_readings(model), scorer(model)
        for name in (*names, "__base__"):
            questions = asked(adapter=name)
            found = asks.score(questions)
            expected = [plain.score([question])[0] for question in questions]  # whole rows
            assert torch.allclose(torch.cat(found), torch.cat(expected), atol=1e-5)
        assert asks.readings.read == 5
        mixed = [replace(question, adapter=names[i % 2]) for i, question in enumerate(asked())]
        expected = [plain.score([question])[0] for question in mixed]
        assert torch.allclose(torch.cat(asks.score(mixed)), torch.cat(expected), atol=1e-5)
        assert asks.readings.read == 5

    def test_many_adapters_on_one_text(self):
        model = asking(names=[f"member{i}" for i in range(20)])
        text = list(range(3, 43))
        questions = [Question([*text, 50, 51], [[3], [4, 5]], adapter=f"member{i}", read=40) for i in range(20)]
        asks = with_readings(model)
        found = asks.score(questions)
        expected = [scorer(model).score([question])[0] for question in questions]
        assert torch.allclose(torch.cat(found), torch.cat(expected), atol=1e-5)
        assert len({round(float(scores[0]), 4) for scores in found}) == 20
        assert asks.readings.read == 1

    def test_one_that_acts_from_the_start_reads_for_itself(self):
        model, questions = asking("start"), asked()
        asks = with_readings(model)
        found = asks.score(questions)
        assert asks.readings.read == 0
        for question, scores in zip(questions, found, strict=True):
            assert scores.tolist() == pytest.approx(alone(model, question), abs=1e-5)
        with model.disable_adapter():
            asks.score(questions)
        assert asks.readings.read == 5

    def test_merged_weights_read_for_themselves(self):
        model, questions = asking("start"), asked()
        asks = with_readings(model)
        with model.disable_adapter():
            asks.score(questions)
        model.merge_adapter()
        found = asks.score(questions)
        assert asks.readings.read == 5
        for question, scores in zip(questions, found, strict=True):
            assert scores.tolist() == pytest.approx(alone(model, question), abs=1e-5)

    def test_what_others_train_reads_for_itself(self):
        """LoRA acts on the text, and a model that is trained itself reads otherwise after each step."""
        questions = [replace(one, prompt=[*range(3, 23)] * 4 + [5], read=80) for one in asked()]
        lora = peft.get_peft_model(tiny.build("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
        for model in (lora, tiny.build("llama").train()):
            asks = with_readings(model)
            for _, batch in asks.training_batches(questions):
                asks.log_probs(batch).sum().backward()
            assert asks.readings.read == 0
        assert all(one.grad is not None for one in lora.parameters() if one.requires_grad)
        found = with_readings(lora)
        for question, scores in zip(questions, found.score(questions), strict=True):
            assert scores.tolist() == pytest.approx(alone(lora, question), abs=1e-5)
        assert found.readings.read == 0

    def test_behind_a_prefix_too(self):
        model = asking()
        asks = scorer(model)
        text = TOKENIZER.decode(list(range(5, 25)))
        prefix = asks.prefix(text)
        questions = asks.encode(["soup cake today", "fine"], [[" was", " is"]] * 2, prefix=prefix)
        questions = [replace(question, read=1) for question in questions]
        found = asks.score(questions, prefix=prefix)
        whole = [question.after(prefix.tokens) for question in questions]
        expected = [scorer(model).score([question])[0] for question in whole]
        assert prefix.is_cached
        assert torch.allclose(torch.cat(found), torch.cat(expected), atol=1e-5)

    @pytest.mark.parametrize("kept", [False, True])
    def test_gradients_are_those_of_whole_rows(self, kept):
        def gradients(asks):
            model = asks.model
            model.zero_grad()
            model.train()
            total = 0.0
            for group, batch in asks.training_batches(questions):
                loss = tfew_loss(asks.log_probs(batch), batch["mask"], batch["label"]).total * len(group)
                loss.backward()
                total += float(loss.detach())
            return total, [one.grad.clone() for _, one in sorted(tiny.adapter_parameters(model).items())]

        model, questions = asking(), asked()
        asks = with_readings(model) if kept else scorer(model)
        found, plain = gradients(asks), gradients(scorer(model))
        assert found[0] == pytest.approx(plain[0], rel=1e-5)
        for one, other in zip(found[1], plain[1], strict=True):
            assert torch.allclose(one, other, atol=1e-5)
        assert not kept or asks.readings.read == 5


def whole(questions):
    """The same, to be asked in whole rows: nothing of them is a text that was read."""
    return [replace(question, read=0) for question in questions]


def prompts(count: int = 6, seed: int = 0, adapter: str | None = None) -> list[Question]:
    """Questions to an encoder-decoder, with closed prompts and choices."""
    found = []
    for question in asked(count, seed, adapter):
        prompt, choices = [*question.text, tiny.EOS], [[*choice, tiny.EOS] for choice in question.choices]
        found.append(replace(question, prompt=prompt, choices=choices, read=len(prompt)))
    return found


def different(count: int, first: int = 0) -> list[dict[str, str]]:
    """Labelled rows, no two of them the same to the tokenizer."""
    told = [
        (word, label)
        for pair in zip(words.GOOD, words.BAD, strict=True)
        for word, label in zip(pair, ("pos", "neg"), strict=True)
    ]
    found = [
        {"text": f"the {what} was {word} today", "label": label}
        for what in ("tea", "soup", "cake")
        for word, label in told
    ]
    return found[first : first + count]


def in_decoder(arch: str, names=("default",), kind: str = "question"):
    config = {"task_type": "SEQ_2_SEQ_LM", "acts_from": kind}
    model = IA3Model(tiny.build(arch), {name: IA3Config(**config) for name in names})
    for seed, name in enumerate(names):
        tiny.randomize(model, seed + 1, name)
    return model


def count_prompts(monkeypatch) -> list[int]:
    """How many prompts the encoder reads in each of its passes from now on."""
    passes = []
    encode = EncoderDecoder.encode

    def counted(self, ids, mask, **more):
        passes.append(len(ids))
        return encode(self, ids, mask, **more)

    monkeypatch.setattr(EncoderDecoder, "encode", counted)
    return passes


@pytest.mark.parametrize("arch", ["t5", "bart"])
class TestEncoderDecoders:
    """The encoder reads each prompt once; vectors act in the decoder."""

    def test_all_that_does_not_act_in_the_encoder_shares_its_states(self, arch, monkeypatch):
        names = ("one", "two")
        model = in_decoder(arch, names)
        asks, plain = with_readings(model), scorer(model)
        seen = []
        for name in (*names, "__base__"):
            questions = prompts(adapter=name)
            seen.append(torch.cat(asks.score(questions)))
            assert torch.allclose(seen[-1], torch.cat(plain.score(whole(questions))), atol=1e-5)
        assert not any(torch.allclose(one, other, atol=1e-3) for one, other in itertools.pairwise(seen))
        assert asks.readings.read == len(asks.readings) == 5
        passes = count_prompts(monkeypatch)
        mixed = [
            replace(one, adapter=[*names, "__base__"][i % 3], choices=[[9, 1], [7, 8, 1]])
            for i, one in enumerate(prompts())
        ]
        found = asks.score(mixed)
        assert not passes and asks.readings.read == 5
        assert torch.allclose(torch.cat(found), torch.cat(plain.score(whole(mixed))), atol=1e-5)
        with model.disable_adapter():
            assert torch.allclose(torch.cat(asks.score(prompts())), seen[-1], atol=1e-5)

    def test_prompts_are_read_several_a_pass_and_kept_without_padding(self, arch, monkeypatch):
        model = in_decoder(arch).to(torch.bfloat16)
        asks, questions = with_readings(model), prompts(20)
        asks.score(questions)
        texts = {question.text for question in questions}
        means = len(texts) * 3 * tiny.HIDDEN * 4  # of the embeddings and two layers, for heads
        assert asks.readings.nbytes == sum(map(len, texts)) * tiny.HIDDEN * 2 + means
        asks.readings.clear()
        passes = count_prompts(monkeypatch)
        asks.foresee(questions)
        assert sum(passes) == len(texts) and len(passes) < len(texts) / 2

    def test_one_that_acts_from_the_start_reads_for_itself(self, arch):
        model = in_decoder(arch, ("asks",))
        model.add_adapter("reads", IA3Config(task_type="SEQ_2_SEQ_LM"))
        tiny.randomize(model, 9, "reads")
        asks = with_readings(model)
        model.set_adapter("reads")  # which the encoder must not hear of when it reads for the other
        questions = [replace(one, adapter=["asks", "reads"][i % 2]) for i, one in enumerate(prompts())]
        found = asks.score(questions)
        assert asks.readings.read == 3
        assert torch.allclose(torch.cat(found), torch.cat(scorer(model).score(whole(questions))), atol=1e-5)
        model.merge_adapter()
        asks.score(prompts())
        assert asks.readings.read == 3

    @pytest.mark.parametrize("texts", [1.2, 2.5])
    def test_memory_holds_what_it_may_and_the_rest_is_read_again(self, arch, texts):
        model, questions = in_decoder(arch), prompts()
        asks, expected = with_readings(model), scorer(model).score(whole(questions))
        asks.score(questions)
        most = max(one.nbytes for one in asks.readings._kept.values())
        asks.readings = Readings(int(most * texts))
        for _ in range(2):
            found = asks.score(questions)
            assert 0 < asks.readings.nbytes <= asks.readings.memory
            assert torch.allclose(torch.cat(found), torch.cat(expected), atol=1e-5)
        assert asks.readings.read > 5
        asks.readings = Readings(100)
        assert torch.allclose(torch.cat(asks.score(questions)), torch.cat(expected), atol=1e-5)
        assert len(asks.readings) == 1

    def test_one_prompt_for_many_adapters_is_read_once_within_a_call(self, arch, monkeypatch):
        model = in_decoder(arch, [f"member{i}" for i in range(8)])
        text = [*range(3, 43), tiny.EOS]
        questions = [Question(text, [[3, 1], [4, 5, 1]], adapter=name, read=41) for name in model.peft_config]
        expected = scorer(model).score(whole(questions))
        scorer(model).score(questions)  # tries
        passes = count_prompts(monkeypatch)
        found = scorer(model).score(questions)
        assert passes == [1]
        assert torch.allclose(torch.cat(found), torch.cat(expected), atol=1e-5)

    @pytest.mark.parametrize("again", [False, True])
    def test_gradients_are_those_of_whole_rows(self, arch, again):
        """Also where layers are computed again in the backward pass, so that rows are plain."""

        def gradients(asks, questions):
            model.zero_grad()
            model.train()
            for group, batch in asks.training_batches(questions):
                assert ("question" in batch) is again
                loss = tfew_loss(asks.log_probs(batch), batch["mask"], batch["label"]).total * len(group)
                loss.backward()
            return [one.grad.clone() for _, one in sorted(tiny.adapter_parameters(model).items())]

        model, questions = in_decoder(arch), prompts()
        if again:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
        asks = with_readings(model)
        found, plain = gradients(asks, questions), gradients(scorer(model), whole(questions))
        for one, other in zip(found, plain, strict=True):
            assert other.abs().max() > 0
            assert torch.allclose(one, other, atol=1e-5)
        assert asks.readings.read == 5

    @pytest.mark.parametrize("adapters", [["default"], ["one", "two"]])
    def test_training_makes_the_steps_of_whole_rows(self, arch, adapters, tmp_path, monkeypatch):
        """With a template drawn for each example and step, after a zero-shot evaluation, and evaluated in between."""
        task = Task(
            templates=["review : {{ text }} answer :", "{{ text }} , what is it ?", "is it good ? {{ text }}"],
            choices={"pos": "good", "neg": "not good"},
        )
        rows, test = different(10), different(6, first=10)

        def trained(readings: bool):
            model = IA3Model(
                tiny.build(arch, vocab_size=len(words.VOCABULARY)),
                {name: IA3Config(task_type="SEQ_2_SEQ_LM", acts_from="question") for name in adapters},
            ).double()
            arguments = Recipe(steps=6).training_arguments(
                tmp_path, learning_rate=0.05, save_strategy="no", disable_tqdm=True, eval_strategy="steps", eval_steps=3
            )
            one = len(adapters) == 1
            members = [Member(task, rows, None if one else name, i, eval_rows=test) for i, name in enumerate(adapters)]
            kept = Readings()
            with monkeypatch.context() as patch:
                if not readings:
                    patch.setattr(scoring, "askable", lambda family, questions: [False] * len(questions))
                with model.disable_adapter():
                    before = predict(model, words.closing(), task, test, readings=kept)
                trainer = TFewTrainer(model, arguments, words.closing(), members, readings=kept)
                trainer.train()
            logs = [one for entry in trainer.state.log_history for key, one in entry.items() if key.endswith("loss")]
            vectors = [parameter.detach() for name in adapters for parameter in model.adapter_parameters(name)]
            return kept.read, logs, vectors, [one.scores for one in before]

        found, plain = trained(True), trained(False)
        assert (found[0], plain[0]) == (3 * 10 + 6, 0)
        assert found[1] == pytest.approx(plain[1], abs=1e-6) and len(set(found[1])) > 5
        for one, other in zip(found[2], plain[2], strict=True):
            assert (other - 1).abs().max() > 1e-3
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
        for one, other in zip(found[3], plain[3], strict=True):
            assert one == pytest.approx(other, abs=1e-6)

    def test_several_adapters_answer_about_a_text_that_is_read_once(self, arch):
        names = ("one", "two", "three")
        model = IA3Model(
            tiny.build(arch, vocab_size=len(words.VOCABULARY)),
            {name: IA3Config(task_type="SEQ_2_SEQ_LM", acts_from="question") for name in names},
        )
        for seed, name in enumerate(names):
            tiny.randomize(model, seed, name)
        task = Task(template="review : {{ text }} answer :", choices={"pos": "good", "neg": "not good"})
        rows, readings = different(5), Readings()
        everyone = [[Respondent(name, task) for name in (*names, "__base__")]] * 5
        found = predict_each(model, words.closing(), rows, everyone, readings=readings)
        assert readings.read == 5
        for place, name in enumerate((*names, "__base__")):
            expected = predict(model, words.closing(), task, rows, adapter_names=[name] * 5)
            for answers, one in zip(found, expected, strict=True):
                assert answers[place].scores == pytest.approx(one.scores, abs=1e-5)

    def test_an_encoder_that_mixes_the_rows_of_a_batch_reads_for_each_question(self, arch):
        model = in_decoder(arch)

        def mix(module, args, kwargs, output):
            return type(output)(last_hidden_state=output.last_hidden_state * (1 + 0.1 * len(output.last_hidden_state)))

        model.model.get_encoder().register_forward_hook(mix, with_kwargs=True)
        asks = with_readings(model)
        asks.score(prompts())
        assert asks.readings.read == 0

    def test_a_prompt_is_a_text_as_it_stands(self, arch):
        asks = Scorer(tiny.build(arch, vocab_size=len(words.VOCABULARY)), words.closing())
        task = Task(template="is it good ? {{ text }}", choices={"pos": "good", "neg": "bad"})
        for question in (
            *asks.questions(task.wordings([{"text": "the tea", "label": "pos"}])),
            *asks.encode(["the tea was"], [["good", "bad"]]),
        ):
            assert question.text == tuple(question.prompt) and question.prompt[-1] == tiny.EOS


class TestWhereTheQuestionBegins:
    task = Task(
        name="tea",
        label_column="label",
        choices={"good": "good", "bad": "bad"},
        templates=["review {{ text }} it was", "it was : {{ text }}", "{{ text }} {{ answer_choices | join(' ') }} it"],
    )

    @pytest.mark.parametrize(("template", "expected"), [(0, "it was"), (1, None), (2, "good bad it")])
    def test_behind_the_last_column(self, template, expected):
        asks = scorer(tiny.build("llama"))
        [question] = asks.questions(self.task.wordings([{"text": "the tea", "label": "good"}], template=template))
        if expected is None:
            assert question.read == 0
        else:
            behind = question.prompt[question.read :]
            assert behind == TOKENIZER(expected, add_special_tokens=False)["input_ids"]

    def test_a_text_has_the_same_tokens_whatever_is_asked(self):
        """Also where a tokenizer makes one token of a text's end and a question's beginning."""
        vocab = {char: i for i, char in enumerate("<abc.?!Ġ")} | {"a.": 8, "a.?": 9, "b!": 10}
        made = Tokenizer(models.BPE(vocab, [("a", "."), ("a.", "?"), ("b", "!")]))
        made.pre_tokenizer, made.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            decoders.ByteLevel(),
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<")
        asks = Scorer(tiny.build("llama"), tokenizer)
        found = set()
        for tail in ("?", "!", " b", ".?"):
            task = Task(
                name="t", label_column="y", choices={"1": "a", "2": "b"}, templates=["{{ x }}" + tail], separator=""
            )
            [question] = asks.questions(task.wordings([{"x": "ca.", "y": "1"}]))
            found.add(question.text)
            assert question.read < len(question.prompt)
        assert found == {(vocab["c"], vocab["a."]), (vocab["c"],)}


_family = functools.cache(lambda: scorer(tiny.build("llama")).family)


class TestParts:
    """Groups of texts that are needed together."""

    @given(
        groups=st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=12),
        known=st.lists(st.integers(0, 7), max_size=4),
        memory=st.integers(1, 12),
    )
    @settings(max_examples=60, deadline=None)
    def test_each_is_in_one_part_that_fits_and_equal_ones_are_together(self, groups, known, memory):
        family = _family()
        texts = [(3 + number, *range(3, 8)) for number in range(8)]
        readings = Readings()
        readings._have(family, [texts[0]])
        size = readings.nbytes
        readings.memory = size * memory
        readings.clear()
        readings._have(family, [texts[i] for i in dict.fromkeys(known)][:memory])
        parts = list(readings.parts(family, [[texts[i] for i in its] for its in groups]))
        assert sorted(index for part in parts for index in part) == list(range(len(groups)))
        for part in parts:
            sets = [{*groups[index]} for index in part]
            assert len(set().union(*sets)) <= max([memory, *map(len, sets)])
        # Groups of the same texts are together.
        of = {index: number for number, part in enumerate(parts) for index in part}
        for index, its in enumerate(groups):
            for other, same in enumerate(groups):
                assert {*its} != {*same} or of[index] == of[other]
