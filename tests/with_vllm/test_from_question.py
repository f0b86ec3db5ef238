"""Adapters that act from the question on, in vLLM. What runs vLLM itself needs the environment of docs/vllm.md."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from ia3 import IA3Config, PeftModel, get_peft_model
from ia3.errors import InputError
from ia3.vllm import from_question
from ia3.vllm.from_question import Places, StepAdapters, block_keys, check_request
from ia3.vllm.plugin import register
from support import tiny
from support.engines import NEW, Place, save_adapters, start
from support.paths import TESTS

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here; docs/vllm.md has its environment"
)
if importlib.util.find_spec("vllm") is not None:  # before anything of vLLM is imported
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    for variable, setting in {**settings, "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}.items():
        os.environ.setdefault(variable, setting)


# Without vLLM.


def step(new=(), known=(), finished=()):
    """What the scheduler says: new requests (id, place, tokens read), and those that are known (id, tokens read)."""
    made = [
        SimpleNamespace(
            req_id=name,
            num_computed_tokens=read,
            sampling_params=SimpleNamespace(extra_args=None if place is None else {"acts_from": place}),
        )
        for name, place, read in new
    ]
    cached = SimpleNamespace(req_ids=[name for name, _ in known], num_computed_tokens=[read for _, read in known])
    return SimpleNamespace(finished_req_ids=set(finished), scheduled_new_reqs=made, scheduled_cached_reqs=cached)


def test_a_texts_tokens_are_found_over_the_steps_in_which_it_is_read():
    places = Places()
    places.note(step([("a", 5, 0), ("b", None, 0), ("c", 3, 2)]))
    rows = StepAdapters((), [7] * 4 + [0] * 3 + [8] * 4, "abc", [4, 3, 4]).rows
    assert [tuple(row) for row in rows] == [
        ("a", 7, slice(0, 4)),
        ("b", 0, slice(4, 7)),
        ("c", 8, slice(7, 11)),
    ]
    assert places.texts(rows) == [slice(0, 4), slice(7, 8)]
    places.note(step([("d", 0, 0)], [("a", 4), ("b", 3), ("c", 6)]))
    rows = StepAdapters((), [8, 7, 7, 7, 9, 9], "cad", [1, 3, 2]).rows  # in another order
    assert places.texts(rows) == [slice(1, 2)]
    places.note(step([("c", None, 0)], [("a", 0)], ["c", "d"]))  # one is read anew, and an id is used again
    assert places.texts(StepAdapters((), [7, 7, 8, 8], "ac", [2, 2]).rows) == [slice(0, 2)]
    assert places.told == {"a": 5}


def test_blocks_before_the_question_have_the_base_models_key():
    lora, image = ("lora", "a", "/a"), ("mm", "x", 1)
    assert block_keys((lora,), 32, 32) is None
    assert block_keys((lora, image), 40, 32) == (image,)
    assert block_keys((lora, image), 31, 32) == (("lora", "a", "/a", 31), image)
    assert block_keys((lora,), 30, 32) != block_keys((lora,), 31, 32)


def request(place=None, lora="asks", tokens=6, **fields):
    extra = None if place is None else {"acts_from": place, "other": 1}
    adapter = None if lora is None else SimpleNamespace(lora_name=lora)
    made = {"prompt_token_ids": [3] * tokens, "prompt_embeds": None, "resumable": False, "lora_request": adapter}
    return SimpleNamespace(**{**made, "sampling_params": SimpleNamespace(extra_args=extra), **fields})


@pytest.fixture
def kinds(monkeypatch):
    monkeypatch.setattr(from_question, "acts_from_question", lambda adapter: adapter.lora_name == "asks")


REFUSED = {
    "none": ({}, r"found none; give it as extra_args=\{'acts_from': n\}"),
    "too far": ({"place": 7}, "from 0 to the 6 tokens of the prompt, found 7"),
    "negative": ({"place": -1}, "found -1"),
    "true": ({"place": True}, "found True"),
    "text": ({"place": "3"}, "found '3'"),
    "embedding": ({"sampling_params": None}, "a request for text"),
    "in parts": ({"place": 3, "resumable": True}, "behind a whole prompt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_without_a_place_is_refused(kinds, name):
    fields, message = REFUSED[name]
    with pytest.raises(InputError, match="^Adapter 'asks' acts from the question on, expected .*" + message) as raised:
        check_request(request(**fields))
    assert "\n" not in str(raised.value)


def test_others_lose_a_place_that_they_have_no_use_for(kinds):
    for lora in (None, "reads"):
        asked = request(3, lora)
        before = asked.sampling_params.extra_args
        check_request(asked)
        assert asked.sampling_params.extra_args == {"other": 1} and before == {"acts_from": 3, "other": 1}
        check_request(request(lora=lora))
        check_request(request(lora=lora, sampling_params=None))
    for place in (0, 6):
        check_request(asked := request(place))
        assert from_question.place_of(asked.sampling_params) == place


# With vLLM.

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
BLOCK = 32


class Asking(Place):
    """Beside the others two adapters, "asks" and "asks2", that act from the question on."""

    @functools.cache  # noqa: B019
    def model(self, name):
        if name not in ("asks", "asks2"):
            return super().model(name)
        base = transformers.AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        return PeftModel.from_pretrained(base, self.folder / name).eval()

    def expected(self, name, prompt, place, count=NEW):
        """The tokens, and the log-probabilities of the first."""
        extra = {"acts_from": [place]} if name in ("asks", "asks2") else {}
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "eos_token_id": None}
        ids = torch.tensor([prompt])
        made = self.model(name).generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **extra)
        with torch.no_grad():
            logits = self.model(name)(ids, attention_mask=torch.ones_like(ids), **extra).logits[0, -1]
        return made[0, len(prompt) :].tolist(), logits.log_softmax(-1)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Asking:
    folder = tmp_path_factory.mktemp("question")
    tiny.build("llama", **SIZES).save_pretrained(folder / "base")
    save_adapters(folder / "base", folder)
    for number, name in enumerate(("asks", "asks2")):
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        model = get_peft_model(base, IA3Config(task_type="CAUSAL_LM", acts_from="question"))
        torch.manual_seed(20 + number)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "ia3_l" in path:
                    parameter.copy_(1 + 0.6 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
    return Asking(folder / "base", folder)


@pytest.fixture(scope="module")
def llm(place):
    """An engine that reads at most 24 tokens in a step: long texts are read in parts."""
    return start(
        Path(place.base), max_lora_rank=8, max_loras=5, max_cpu_loras=8, block_size=BLOCK, max_num_batched_tokens=24
    )


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, tiny.VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(llm, place, rows, count=NEW):
    """What the engine says to rows (adapter, prompt, place), compared with what our own model says."""
    from vllm import SamplingParams

    some = list(range(3, 40))
    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=count,
            ignore_eos=True,
            detokenize=False,
            logprob_token_ids=some,
            extra_args=None if acts_from is None else {"acts_from": acts_from},
        )
        for _, _, acts_from in rows
    ]
    prompts = [{"prompt_token_ids": prompt} for _, prompt, _ in rows]
    adapters = [place.request(name) for name, _, _ in rows]
    outputs = llm.generate(prompts, sampling, lora_request=adapters, use_tqdm=False)
    for (name, prompt, acts_from), output in zip(rows, outputs, strict=True):
        expected, scores = place.expected(name, prompt, acts_from, count)
        found = output.outputs[0]
        assert list(found.token_ids) == expected, (name, acts_from)
        first = torch.tensor([found.logprobs[0][token].logprob for token in some])
        assert torch.allclose(first, scores[some], atol=1e-4), (name, acts_from)
    return outputs


def test_the_place_makes_a_difference(place):
    prompt = tokens(60, 0)
    found = {tuple(place.expected(name, prompt, start)[0]) for name in ("asks", "asks2") for start in (0, 20, 50)}
    assert len({*found, tuple(place.expected(None, prompt, None)[0])}) == 7


@needs_vllm
def test_rows_of_all_kinds_and_places_share_batches_parts_and_caches(llm, place):
    text = tokens(50, 1)
    prompts = [[*text, *tokens(12, seed)] for seed in (2, 3)]
    rows = [
        (name, prompt, start)
        for prompt in prompts
        for name, start in [
            ("asks", 50),
            (None, None),
            ("asks", 10),
            ("asks2", 50),
            ("peft", None),
            ("asks", 0),
            ("lora", 50),
            ("asks2", 62),
            ("asks", 32),
        ]
    ]
    ask(llm, place, rows)
    ask(llm, place, rows[::-1])  # all of it is in the cache
    for row in (rows[2], rows[0], rows[5], rows[8]):  # one at a time
        ask(llm, place, [row])
    # What is generated fills blocks, too.
    ask(llm, place, [("asks", prompts[0], 50), ("asks", prompts[0], 62), ("asks2", prompts[1], 40)], count=50)
    longer = [*prompts[0], *place.expected("asks", prompts[0], 50, 40)[0]]
    ask(llm, place, [("asks", longer, start) for start in (50, 62, 70, 100)])


@needs_vllm
def test_a_text_is_read_once_for_the_base_model_and_all_adapters(llm, place):
    text = tokens(3 * BLOCK, 5)

    def cached(name, start, question):
        (output,) = ask(llm, place, [(name, [*text, *question], start)], count=2)
        return output.num_cached_tokens

    assert cached(None, None, [5, 6]) == 0
    assert cached("asks", len(text), [7]) == 3 * BLOCK
    assert cached("asks2", len(text), [7, 8]) == 3 * BLOCK
    assert cached("asks", 2 * BLOCK, [7]) == 2 * BLOCK
    assert cached("asks", 2 * BLOCK - 1, [7]) == BLOCK  # what stands behind another place is another's
    assert cached("asks", 2 * BLOCK, [9]) == 3 * BLOCK
    assert cached("asks2", 2 * BLOCK, [9]) == 2 * BLOCK
    assert cached("peft", None, [9]) == 0
    assert cached("lora", 3 * BLOCK, [9]) == 0  # and has no use for the place
    # An adapter reads a text for the base model.
    text = tokens(2 * BLOCK, 6)
    assert cached("asks", 2 * BLOCK, [5]) == 0
    assert cached(None, None, [5]) == 2 * BLOCK


@needs_vllm
def test_a_request_that_cannot_be_right_is_refused_alone(llm, place):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    prompt = {"prompt_token_ids": tokens(9, 7)}
    for extra, message in ((None, "found none; give it as"), ({"acts_from": 10}, "from 0 to the 9 tokens")):
        with pytest.raises(VLLMValidationError, match="^Adapter 'asks' acts from the question on.*" + message):
            llm.generate([prompt], SamplingParams(extra_args=extra), lora_request=place.request("asks"), use_tqdm=False)
    ask(llm, place, [("asks", prompt["prompt_token_ids"], 4)])  # it goes on


@needs_vllm
def test_a_worker_whose_adapter_is_another_than_the_request_says_refuses(llm, place):
    from ia3.vllm.from_question import StepRow

    ask(llm, place, [("asks", tokens(9, 8), 4), ("peft", tokens(9, 8), None)], count=1)
    manager = llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager
    asks, peft = place.numbers["asks"], place.numbers["peft"]
    manager.ia3_leave_out_texts([StepRow("unknown", peft, slice(0, 2)), StepRow("base", 0, slice(2, 3))])
    with pytest.raises(InputError, match="'asks' acts from another place than its request says"):
        manager.ia3_leave_out_texts([StepRow("unknown", asks, slice(0, 2))])
    manager.ia3_places.told["placed"] = 1
    with pytest.raises(InputError, match="'peft' acts from another place"):
        manager.ia3_leave_out_texts([StepRow("placed", peft, slice(0, 2))])
    del manager.ia3_places.told["placed"]


@needs_vllm
def test_the_other_runner_says_in_which_order_its_requests_are():
    """vLLM's second model runner, which does not run on CPUs."""
    import numpy
    from vllm.lora.request import LoRARequest
    from vllm.v1.worker.gpu.lora_utils import LoraState

    register()
    state, adapter = LoraState(4), LoRARequest("asks", 7, "/asks")
    state.add_request("a", 3, adapter)
    state.add_request("b", 1, None)
    prompts, numbers, adapters = state.make_lora_inputs(["b", "a"], numpy.array([1, 3]), numpy.array([2, 4]))
    assert prompts == (0, 7) and numbers == (0, 0, 7, 7, 7, 7) and adapters == {adapter}
    assert adapters.rows == [("b", 0, slice(0, 2)), ("a", 7, slice(2, 6))]


@needs_vllm
def test_layers_of_other_modalities_are_refused(llm, place, monkeypatch):
    manager = llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    monkeypatch.setattr(manager, "supports_tower_connector_lora", lambda: True)
    with pytest.raises(InputError, match=r"'asks' acts from the question on.*enable_tower_connector_lora"):
        manager._load_adapter(place.request("asks"))
    assert manager._load_adapter(place.request("peft"))


TWO_RANKS = """
import sys
sys.path[:0] = sys.argv[1], sys.argv[2]
from pathlib import Path
from test_from_question import Asking, ask, start, tokens
folder = Path(sys.argv[3])
place = Asking(folder / "base", folder)
settings = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
llm = start(place.base, max_lora_rank=8, max_loras=3, max_num_batched_tokens=24, **settings)
prompts = [[*tokens(40, 1), *tokens(9, seed)] for seed in (2, 3)]
rows = [("asks", 40), (None, None), ("asks2", 33), ("peft", None), ("asks", 0)]
ask(llm, place, [(name, prompt, acts_from) for prompt in prompts for name, acts_from in rows])
print("the same")
"""


@needs_vllm
@pytest.mark.slow
def test_two_ranks_say_the_same(place):
    done = subprocess.run(
        [sys.executable, "-c", TWO_RANKS, str(TESTS), str(TESTS / "with_vllm"), str(place.folder)],
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
    )
    assert "the same\n" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
