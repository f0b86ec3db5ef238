"""The HTTP service's vLLM engine against ia3's own scoring; needs the environment of docs/vllm.md."""

import asyncio
import importlib.util
import json
import multiprocessing
import os
import shutil
from dataclasses import replace

import peft
import pytest
import torch
import transformers

from ia3 import IA3Config, PeftModel, Scorer, get_peft_model
from ia3.errors import InputError
from ia3.scoring.question import Question
from ia3.serve.engine import AdapterFailed, GenerateJob, ScoreJob
from ia3.serve.local import LocalEngine
from ia3.serve.vllm import VllmEngine, _together
from ia3.task.task import Task
from ia3.training.recipe import Recipe
from support import tiny, words

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here; docs/vllm.md has its environment"
)
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
TASK = Task(template="review : {{ text }} answer :", choices={"pos": "good", "neg": "not good"})
SETTINGS = {"dtype": "float32", "block_size": 32, "max_model_len": 96, "enforce_eager": True, "max_num_seqs": 8}
if importlib.util.find_spec("vllm") is not None:
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    for variable, setting in settings.items():
        os.environ.setdefault(variable, setting)


def test_when_one_part_fails_the_others_are_cancelled():
    ended = []

    async def part(number: int) -> int:
        try:
            if number == 1:
                raise InputError("no")
            await asyncio.sleep(60)
        finally:
            ended.append(number)
        return number

    async def run() -> None:
        with pytest.raises(InputError, match="no"):
            await _together([part(number) for number in range(3)])

    asyncio.run(run())
    assert sorted(ended) == [0, 1, 2]


@pytest.mark.parametrize(
    "message",
    [
        "{}",
        "Call to add_lora method failed: {}",
        "Call to add_lora method failed: Worker failed with error '{}', please check the stack trace above for the root",
    ],
)
def test_an_adapters_error_is_told_without_what_processes_put_around_it(message):
    class Refusing:
        async def add_lora(self, request):
            raise RuntimeError(message.format("Adapter 'a' does not fit; don't use it."))

    engine = VllmEngine("anything")
    engine._engine, engine._adapters["a"] = Refusing(), None
    with pytest.raises(AdapterFailed, match=r"^Adapter 'a' does not fit; don't use it\.$") as error:
        asyncio.run(engine._request("a"))
    assert error.value.owner == "Adapter 'a'"


def test_scores_stand_in_the_callers_order(monkeypatch):
    async def following(text, tokens, adapter, read):
        return {token: -float(token) for token in tokens}

    engine, question = VllmEngine("anything"), Question([5], [[6], [7, 8]], order=(1, 0))
    monkeypatch.setattr(engine, "_next", following)
    assert asyncio.run(engine.score([ScoreJob(None, question, 0.0)])) == [[-15.0, -6.0]]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model with a tokenizer, two adapters, and two that act from the question on."""
    folder = tmp_path_factory.mktemp("engine")
    base = tiny.build("llama", vocab_size=len(words.VOCABULARY), pad_token_id=0, eos_token_id=1, **SIZES)
    base.save_pretrained(folder / "base")
    words.tokenizer().save_pretrained(folder / "base")
    for number, name in enumerate(("one", "two", "asks", "asks too")):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        acts_from = "question" if name.startswith("asks") else "start"
        model = get_peft_model(model, IA3Config(task_type="CAUSAL_LM", acts_from=acts_from))
        torch.manual_seed(number)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "ia3_l" in path:
                    parameter.copy_(1 + 0.6 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
    return folder


def questions(count: int) -> list[Question]:
    """Of choices of one token and of several, some with a common beginning, more than one request can ask for."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, len(words.VOCABULARY), (length,), generator=generator).tolist()

    prompts = [tokens(length) for length in torch.randint(4, 60, (count,), generator=generator).tolist()]
    first = [[3], [4], [5]], [[3, 6], [3, 7, 8], [9]], [[5, 6, 7, 8, 9], [5, 6, 7, 8, 10], [11, 12]]
    return [Question(prompt, list(first[i % 3])) for i, prompt in enumerate(prompts)]


def expected(place, name, question: Question, power: float) -> list[float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    if name is not None:
        library = PeftModel if name.startswith("asks") else peft.PeftModel
        model = library.from_pretrained(model, place / name)
    sums = Scorer(model.eval(), words.tokenizer()).score([question], 0.0)[0]
    return [float(score) / len(choice) ** power for score, choice in zip(sums, question.choices, strict=True)]


@needs_vllm
def test_an_engine_from_start_to_stop(place, tmp_path):
    async def run() -> None:
        engine = VllmEngine(str(place / "base"), slots=2, adapters=3, **SETTINGS)
        seen = []
        engine.observe = lambda *what: seen.append(what)
        await engine.start()
        try:
            await scores(engine)
            assert seen and all(kind == "step" and 1 <= adapters <= rows for kind, rows, adapters in seen)
            assert max(adapters for _, _, adapters in seen) > 1
            assert engine.statistics() == {"resident": 2, "hits": 9, "misses": 2, "evictions": 0}
            await texts(engine)
            await from_the_question(engine)
            await rows(engine)
            await refusals(engine)
            await changed_files(engine)
            await sudden_end(engine)
        finally:
            await engine.stop()

    async def scores(engine) -> None:
        for name in ("one", "two"):
            await engine.add(f"{name}@1", str(place / name), check=name == "one")
        asked = questions(9)
        names = [(None, "one", "two")[i // 3 % 3] for i in range(9)]
        powers = [(1.0, 0.0, 0.5)[i % 2] for i in range(9)]
        jobs = [
            ScoreJob(None if name is None else f"{name}@1", question, power)
            for name, question, power in zip(names, asked, powers, strict=True)
        ]
        for _ in range(2):  # the second time prompts are in the cache
            found = await engine.score(jobs)
            for name, question, power, scores in zip(names, asked, powers, found, strict=True):
                assert scores == pytest.approx(expected(place, name, question, power), abs=1e-4)
        assert await engine.score([]) == []

    async def texts(engine) -> None:
        prompt = questions(1)[0].prompt
        model = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(place / "base"), place / "one"
        ).eval()
        ids = torch.tensor([prompt])
        tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[
            0, len(prompt) :
        ]
        job = GenerateJob("one@1", prompt, 12, temperature=0)
        pieces = [piece async for piece in engine.generate(job)]
        text = words.tokenizer().decode(tokens, skip_special_tokens=True)
        assert "".join(piece.text for piece in pieces).split() == text.split()
        assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1) and pieces[-1].finish
        assert pieces[-1].tokens == len(tokens)
        stopping = GenerateJob("one@1", prompt, 12, temperature=0, stop=(text.split()[1],))
        pieces = [piece async for piece in engine.generate(stopping)]
        assert pieces[-1].finish == "stop" and "".join(piece.text for piece in pieces).split() == text.split()[:1]
        # Whoever leaves stops the generation.
        leaving = engine.generate(GenerateJob(None, prompt, 30))
        await leaving.__anext__()
        await leaving.aclose()

    async def from_the_question(engine) -> None:
        """What the other engine says of questions about a text, to adapters of both kinds."""
        text = (questions(3)[1].prompt * 40)[:40]
        asked = [
            replace(question, prompt=[*text, *question.prompt[:9]], read=read)
            for question in questions(3)
            for read in (0, 17, 40)
        ]
        keys = [None, "one@1", "asks@1", "asks too@1"]
        jobs = [ScoreJob(key, question, 0.5) for question in asked for key in keys]
        local = LocalEngine(str(place / "base"), [IA3Config.from_pretrained(place / "one")])
        await local.start()
        try:
            for key in keys[1:]:
                await local.add(key, str(place / key.removesuffix("@1")), check=True)
            for key in keys[2:]:
                await engine.add(key, str(place / key.removesuffix("@1")), check=True)
            both = zip(jobs, await engine.score(jobs), await local.score(jobs), strict=True)
            for job, found, other in both:
                assert found == pytest.approx(other, abs=1e-4), job
        finally:
            await local.stop()
        with pytest.raises(InputError, match=r"^Adapter 'asks@1' acts from the question on, expected the number"):
            [piece async for piece in engine.generate(GenerateJob("asks@1", text, 3))]
        for key in keys[2:]:
            await engine.drop(key)

    async def rows(engine) -> None:
        wordings = TASK.wordings(words.rows(3))
        made = engine.questions(wordings, Recipe.small())
        model = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
        assert made == Scorer(model, words.tokenizer()).questions(wordings, False)
        assert engine.context_length == 96 and engine.generates
        long = [{"text": "tea " * 200, "label": "pos"}]
        (cut,) = engine.questions(TASK.wordings(long), Recipe.small())
        assert len(cut.prompt) + max(map(len, cut.choices)) <= 96

    async def refusals(engine) -> None:
        question = questions(1)[0]
        with pytest.raises(InputError, match="'nobody' is not known"):
            await engine.score([ScoreJob("nobody", question)])
        bad = tmp_path / "bad"
        shutil.copytree(place / "one", bad)
        (bad / "adapter_model.safetensors").write_bytes(b"short")
        with pytest.raises(InputError, match=r"^Expected a whole safetensors file in .* it again\.$") as refused:
            await engine.add("bad@1", str(bad), check=True)
        assert not isinstance(refused.value, AdapterFailed)  # the files are whoever gives them's
        await engine.add("bad@2", str(bad), check=False)
        with pytest.raises(AdapterFailed, match="Expected a whole safetensors file"):
            await engine.score([ScoreJob(None, question), ScoreJob("bad@2", question)])
        (bad / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        assert "bad@1" not in engine._adapters
        with pytest.raises(InputError, match=r"^Expected an \(IA\)³ adapter .*, found peft_type 'LORA'\.$"):
            await engine.add("bad@3", str(bad), check=True)
        assert await engine.score([ScoreJob("one@1", question)])  # it goes on

    async def changed_files(engine) -> None:
        """A key stands for one content, whatever becomes of the files, also for one that acts from elsewhere."""
        folder = tmp_path / "changing"
        shutil.copytree(place / "one", folder)
        await engine.add("changing@1", str(folder), check=False)

        def change() -> None:
            shutil.rmtree(folder)
            shutil.copytree(place / "asks", folder)

        await engine.keep(["changing@1", "gone@1"], change)
        await engine.add("changing@2", str(folder), check=True)
        question = replace(questions(3)[2], read=3)
        for _ in range(2):
            for key, name in (("changing@1", "one"), ("changing@2", "asks"), ("one@1", "one"), ("two@1", "two")):
                (scores,) = await engine.score([ScoreJob(key, question)])  # there are fewer slots
                assert scores == pytest.approx(expected(place, name, question, 1.0), abs=1e-4)
        for number in range(8 - len(engine._adapters)):
            await engine.add(f"more@{number}", str(place / "one"), check=False)
        with pytest.raises(InputError, match="at most 8 adapters"):
            await engine.add("more@8", str(place / "one"), check=False)
        await engine.drop("changing@1")
        with pytest.raises(AdapterFailed):
            await engine.score([ScoreJob("changing@1", question)])

    async def sudden_end(engine) -> None:
        told = asyncio.get_running_loop().create_future()
        engine.on_end = told.set_result
        for process in multiprocessing.active_children():
            process.kill()
        assert type(await asyncio.wait_for(told, 60)).__name__ == "EngineDeadError"

    asyncio.run(run())
