"""(IA)³ adapters in vLLM. What runs vLLM itself needs the environment of docs/vllm.md, and is skipped elsewhere."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import safetensors.torch
import torch

from ia3.errors import InputError
from ia3.vllm import plugin as vllm_plugin
from ia3.vllm.placing import Scales
from ia3.vllm.plugin import Rescaling, Routing
from support import tiny
from support.engines import KINDS, Place, check, random_prompts, save_adapters, start
from support.paths import TESTS

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here; docs/vllm.md has its environment"
)
if importlib.util.find_spec("vllm") is not None:  # before anything of vLLM is imported
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    for variable, setting in {**settings, "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}.items():
        os.environ.setdefault(variable, setting)


# Without vLLM.


class Stock(torch.nn.Module):
    """What vLLM's wrappers of linear layers have in common."""

    def __init__(self, inputs: int, outputs: int, device: str = "cpu") -> None:
        super().__init__()
        self.base_layer = torch.nn.Linear(inputs, outputs)
        self.base_layer.input_size = inputs
        self.device, self.n_slices, self.tp_size, self.output_slices = torch.device(device), 1, 1, (outputs,)

    def create_lora_weights(self, max_loras, lora_config, model_config=None):
        self.made = max_loras

    def set_mapping(self, punica_wrapper):
        self.punica_wrapper = punica_wrapper

    def reset_lora(self, index):
        pass

    def apply(self, x, bias=None):
        return self._apply_lora_to_output(x, self.base_layer(x))

    def _apply_lora_to_output(self, x, output):
        return output + 100


class Wrapper(Rescaling, Stock):
    pass


def wrapper(only=True, by_step=True, slots=2) -> Wrapper:
    made = Wrapper(6, 8)
    made.create_lora_weights(slots, None)
    routing = Routing(10, slots, "cpu", only)
    routing.by_step = by_step
    made.set_mapping(SimpleNamespace(ia3=routing))
    return made


@pytest.mark.parametrize("shape", [(4, 6), (1, 4, 6)])
@pytest.mark.parametrize("by_step", [True, False])
def test_each_token_is_rescaled_by_its_own_adapter(by_step, shape):
    torch.manual_seed(0)
    layer, x = wrapper(by_step=by_step), torch.randn(shape)
    inputs, outputs = torch.rand(1, 6), torch.rand(8, 1)
    layer.set_scales(0, Scales(inputs, [None]))
    layer.set_scales(1, Scales(None, [outputs]))
    layer.routing.update(torch.tensor([1, -1, 0, 1]), True, False)
    before, found = x.clone(), layer.apply(x).view(4, 8)
    rows, weight, bias = x.view(4, 6), layer.base_layer.weight, layer.base_layer.bias
    plain = rows @ weight.T + bias
    expected = torch.stack(
        [plain[0] * outputs[:, 0], plain[1], (rows[2] * inputs[0]) @ weight.T + bias, plain[3] * outputs[:, 0]]
    )
    assert torch.equal(x, before) and torch.allclose(found, expected, atol=1e-6)
    layer.reset_lora(1)
    assert torch.allclose(layer.apply(x).view(4, 8)[[0, 1, 3]], plain[[0, 1, 3]], atol=1e-6)


def test_activations_keep_their_dtype():
    layer = wrapper().to(torch.bfloat16)
    layer.set_scales(0, Scales(torch.rand(1, 6), [torch.rand(8, 1)]))
    layer.routing.update(torch.tensor([0]), True, False)
    x = torch.randn(1, 6, dtype=torch.bfloat16)
    found = layer.apply(x)
    x = (x.float() * layer.input_scales[0]).bfloat16()
    expected = (layer.base_layer(x).float() * layer.output_scales[0]).bfloat16()
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_what_no_token_of_a_step_needs_is_left_out():
    layer, x = wrapper(only=False), torch.randn(2, 6)
    plain = layer.base_layer(x)
    layer.set_scales(0, Scales(None, [torch.zeros(8, 1)]))
    layer.routing.update(torch.tensor([-1, -1]), False, False)
    with mock.patch.object(Wrapper, "_factors", side_effect=AssertionError):
        assert torch.equal(layer.apply(x), plain)
    layer.routing.update(torch.tensor([-1, -1]), False, True)
    assert torch.equal(layer.apply(x), plain + 100)  # LoRA's turn
    layer.routing.update(torch.tensor([0, -1]), True, False)
    assert torch.equal(layer.apply(x), torch.stack([torch.zeros(8), plain[1]]))
    # Where the forward pass may be traced once for all steps, nothing is.
    static = wrapper(only=False, by_step=False)
    static.routing.update(torch.tensor([-1]), False, False)
    assert static.routing.rescales and static.routing.lora


def test_tokens_past_the_step_are_left_alone():
    routing = Routing(6, 3, "cpu", True)
    routing.update(torch.tensor([0, 2, 1, 0]), True, False)
    routing.update(torch.tensor([2, -1]), True, False)
    assert routing.rows.tolist() == [2, 3, 3, 3, 3, 3]


def test_no_adapter_acts_on_texts_before_questions():
    routing = Routing(8, 3, "cpu", True)
    routing.update(torch.tensor([0, 0, 2, 2, 2, -1]), True, False)
    routing.route(torch.tensor([0, 0, 2, 2, 2, -1]), [slice(0, 1), slice(2, 5)])
    assert routing.rows.tolist() == [3, 0, 3, 3, 3, 3, 3, 3]
    routing.route(torch.tensor([0, 0, 2, 2, 2, -1]))
    assert routing.rows.tolist() == [0, 0, 2, 2, 2, 3, 3, 3]


def test_only_the_outputs_that_vectors_change_are_touched():
    layer = wrapper()
    vector = torch.ones(8, 1)
    vector[5:7] = 2
    layer.set_scales(0, Scales(None, [vector]))
    assert layer.span == slice(5, 7)
    vector[3] = 0.5
    layer.set_scales(1, Scales(None, [vector]))
    assert layer.span == slice(3, 7)
    layer.set_scales(0, Scales(None, [torch.ones(8, 1)]))
    assert layer.span == slice(0, 7)


def test_loras_get_a_slot_that_stays_zero_on_a_cpu_only():
    assert wrapper(slots=2).made == 3
    assert vllm_plugin._spare(torch.device("cuda"), 2) == (2,)


@pytest.fixture
def other_vllm(monkeypatch, caplog):
    """A vLLM of another version, as far as the plugin may look at it."""

    class WorkerLoRAManager:
        def _load_adapter(self, lora_request):
            return "stock"

    modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.worker_manager")}
    modules["vllm"].__version__ = "0.99.1"
    modules["vllm.lora.worker_manager"].WorkerLoRAManager = WorkerLoRAManager
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    vllm_plugin._logger.addHandler(caplog.handler)  # vLLM's own logger, where there is one, hands nothing on
    monkeypatch.setattr(vllm_plugin._logger, "propagate", False)
    caplog.set_level("WARNING", vllm_plugin._logger.name)  # VLLM_LOGGING_LEVEL may be higher
    yield modules
    vllm_plugin._logger.removeHandler(caplog.handler)


def test_another_version_is_left_alone_and_refuses_clearly(other_vllm, tmp_path, caplog):
    vllm_plugin.register()
    assert len(caplog.records) == 1 and "vLLM 0.31 to 0.33, found 0.99.1" in caplog.text
    manager = other_vllm["vllm.lora.worker_manager"].WorkerLoRAManager()
    for kind in ("IA3", "IA3_FROM_QUESTION", "LORA"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    assert manager._load_adapter(SimpleNamespace(lora_path=str(tmp_path / "LORA"))) == "stock"
    assert manager._load_adapter(SimpleNamespace(lora_path="nowhere/at-all")) == "stock"
    for kind in ("IA3", "IA3_FROM_QUESTION"):
        with pytest.raises(InputError, match=r"serves \(IA\)³ adapters in vLLM 0.31 to 0.33"):
            manager._load_adapter(SimpleNamespace(lora_path=str(tmp_path / kind)))


def test_a_version_without_lora_is_left_alone(other_vllm, monkeypatch, caplog):
    monkeypatch.delattr(other_vllm["vllm.lora.worker_manager"], "WorkerLoRAManager")
    vllm_plugin.register()
    assert "found 0.99.1" in caplog.text


def test_a_changed_vllm_is_left_alone(other_vllm, caplog):
    other_vllm["vllm"].__version__ = "0.32.9"  # and inside it nearly everything is elsewhere
    vllm_plugin.register()
    assert "ia3 needs" in caplog.text and "Install an unchanged vLLM 0.31 to 0.33" in caplog.text


# With vLLM.

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("vllm")
    tiny.build("llama", **SIZES).save_pretrained(folder / "base")
    save_adapters(folder / "base", folder)
    return Place(folder / "base", folder)


@pytest.fixture(scope="module")
def mixed(place):
    """An engine that has fewer slots than there are adapters, on the device and on the CPU."""
    return start(place.base, max_lora_rank=8, max_loras=2, max_cpu_loras=3)


@pytest.fixture(scope="module")
def only(place):
    """An engine for (IA)³ adapters only."""
    return start(place.base, max_loras=4, additional_config={"ia3_only": True})


def test_the_adapters_of_the_test_differ(place):
    prompt = random_prompts(1)[0]
    assert len({tuple(place.greedy(name, prompt)) for name in (None, *KINDS)}) == 1 + len(KINDS)


@needs_vllm
def test_tokens_are_those_of_peft_over_evictions(mixed, place):
    names = [None, "peft", "lora", "wide", None, "ours", "lora2", "peft", "lora", "ours", None, "wide"] * 2
    check(mixed, place, names, random_prompts(len(names)))
    for name in ("lora2", "peft", None, "wide", "lora", "ours", "peft"):  # one at a time, so that each is evicted
        check(mixed, place, [name, None], random_prompts(2, seed=1))
    held = mixed.llm_engine.list_loras()
    assert len(held) == 3 and len(place.numbers) == 5


@needs_vllm
def test_base_requests_stay_base_when_all_slots_are_loras(mixed, place):
    for _ in range(2):
        check(mixed, place, ["lora", None, "lora2", None], random_prompts(4, seed=2))


@needs_vllm
def test_prefixes_are_cached_for_each_adapter(mixed, place):
    prefix = torch.randint(3, tiny.VOCAB, (64,), generator=torch.Generator().manual_seed(3)).tolist()
    prompts = [[*prefix, number] for number in (5, 6, 7, 8)]
    names = ["peft", None, "ours", "lora"]
    check(mixed, place, names, prompts)
    again = check(mixed, place, names, [[*prompt, 9] for prompt in prompts])
    assert [output.num_cached_tokens for output in again] == [64] * 4
    # The same prefix, computed with another adapter, is not taken for it.
    check(mixed, place, ["wide", "ours", "peft"], prompts[:3])


@needs_vllm
def test_an_engine_for_ia3_only(only, place):
    names = ["peft", "ours", None, "wide", "peft", None]
    check(only, place, names, random_prompts(len(names), seed=4))
    wrapped = only.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager.modules
    assert {path.rpartition(".")[2] for path in wrapped} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert all(module.lora_a_stacked[0].shape[-2] == 1 for module in wrapped.values())
    with pytest.raises(Exception, match=r"'lora' is no \(IA\)³ adapter"):
        only.llm_engine.add_lora(place.request("lora"))
    check(only, place, ["wide"], random_prompts(1, seed=5))  # it goes on


@needs_vllm
def test_a_setting_that_is_neither_true_nor_false_is_refused(place):
    with pytest.raises(InputError, match="true or false for ia3_only in additional_config, found 'yes'"):
        start(place.base, additional_config={"ia3_only": "yes"})


@needs_vllm
def test_adapters_come_and_go_at_run_time(only, place):
    request = place.request("peft")
    assert only.llm_engine.remove_lora(request.lora_int_id) or request.lora_int_id not in only.llm_engine.list_loras()
    assert request.lora_int_id not in only.llm_engine.list_loras()
    assert only.llm_engine.add_lora(request)
    assert request.lora_int_id in only.llm_engine.list_loras()
    check(only, place, ["peft", None], random_prompts(2, seed=6))


def spoiled(place: Place, folder: Path, change, **config) -> str:
    shutil.copytree(place.folder / "peft", folder)
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, **config}))
    return str(folder)


KEY = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
BAD = {
    "NaN": (lambda tensors: tensors[KEY].fill_(torch.nan), {}, "NaN or infinite values"),
    "shape": (lambda tensors: tensors.update({KEY: torch.ones(7, 1)}), {}, r"is \(7, 1\), expected \(64, 1\)"),
    "input of a part": (lambda tensors: tensors.update({KEY: torch.ones(1, 128)}), {}, "fused with 'q_proj', 'v_proj'"),
    "no such layer": (
        lambda tensors: tensors.update({KEY.replace("0", "9"): tensors.pop(KEY)}),
        {},
        r"rescales 'model.layers.9.self_attn.k_proj', expected",
    ),
    "modules_to_save": (lambda tensors: None, {"modules_to_save": ["lm_head"]}, r"trains modules in full \('lm_head'"),
}


@needs_vllm
@pytest.mark.parametrize("name", BAD)
def test_bad_adapters_are_refused_and_the_engine_goes_on(name, only, place, tmp_path):
    from vllm.lora.request import LoRARequest

    change, config, message = BAD[name]
    before = only.llm_engine.list_loras()
    with pytest.raises(Exception, match=message) as raised:
        only.llm_engine.add_lora(LoRARequest("bad", 99, spoiled(place, tmp_path / "bad", change, **config)))
    assert "\n" not in str(raised.value)
    assert only.llm_engine.list_loras() == before


@needs_vllm
def test_a_missing_folder_is_not_found(only, tmp_path):
    from vllm.exceptions import LoRAAdapterNotFoundError
    from vllm.lora.request import LoRARequest

    with pytest.raises(LoRAAdapterNotFoundError, match="No adapter found for"):
        only.llm_engine.add_lora(LoRARequest("gone", 98, str(tmp_path / "gone")))


@needs_vllm
@pytest.mark.parametrize("setting, message", [("fully_sharded_loras", "fully_sharded"), ("dual", "DUAL_STREAM")])
def test_settings_that_do_not_go_together_are_refused(setting, message, only, place, monkeypatch):
    manager = only.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    if setting == "dual":
        monkeypatch.setattr("vllm.envs.VLLM_LORA_ENABLE_DUAL_STREAM", True, raising=False)
    else:
        monkeypatch.setattr(manager.lora_config, setting, True)
    with pytest.raises(InputError, match=message):
        manager._load_adapter(place.request("peft"))


@needs_vllm
def test_a_missing_internal_is_named(monkeypatch):
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    assert vllm_plugin._missing() == []
    with monkeypatch.context() as patch:
        patch.delattr("vllm.v1.core.kv_cache_utils.generate_block_hash_extra_keys")
        assert vllm_plugin._missing() == ["vllm.v1.core.kv_cache_utils.generate_block_hash_extra_keys"]
    monkeypatch.delattr(LRUCacheWorkerLoRAManager, "_manager_cls")
    monkeypatch.delattr("vllm.lora.worker_manager.WorkerLoRAManager._manager_cls")
    assert vllm_plugin._missing() == ["LRUCacheWorkerLoRAManager._manager_cls"]
    assert "needs 'LRUCacheWorkerLoRAManager._manager_cls' inside vLLM" in vllm_plugin.unsupported()


def sharded(kind: str, rank: int, ranks: int, factors: dict[str, torch.Tensor]):
    """A real layer of vLLM's on one of several ranks, with weights (times factors) as its own loader splits them."""
    from vllm.model_executor.layers import linear

    generator = torch.Generator().manual_seed(0)
    module = "vllm.model_executor.layers.linear"
    with ExitStack() as stack:
        for name, value in (("rank", rank), ("world_size", ranks)):
            stack.enter_context(mock.patch(f"{module}.get_tensor_model_parallel_{name}", return_value=value))
            stack.enter_context(
                mock.patch(f"vllm.model_executor.parameter.get_tensor_model_parallel_{name}", return_value=value)
            )
        parts: dict = {None: (8, 16)}  # outputs, inputs
        if kind == "qkv":  # 4 heads, 2 of keys and values
            layer = linear.QKVParallelLinear(16, 4, 4, 2, bias=True)
            parts = {"q": (16, 16), "k": (8, 16), "v": (8, 16)}
        elif kind == "gate_up":
            layer = linear.MergedColumnParallelLinear(16, [8, 8], bias=True)
            parts = {0: (8, 16), 1: (8, 16)}
        elif kind == "column":
            layer = linear.ColumnParallelLinear(16, 8, bias=True)
        elif kind == "row":
            layer = linear.RowParallelLinear(16, 8, bias=False, input_is_parallel=True)
        else:
            layer = linear.ReplicatedLinear(16, 8, bias=True)
        for part, (outputs, inputs) in parts.items():
            weight = torch.randn(outputs, inputs, generator=generator)
            bias = torch.randn(outputs, generator=generator)
            weight = weight * factors.get(part, torch.ones(1, 1))
            if part in factors and factors[part].shape[1] == 1:
                bias = bias * factors[part][:, 0]
            shard = () if part is None else (part,)
            layer.weight.weight_loader(layer.weight, weight, *shard)
            if layer.bias is not None:
                layer.bias.weight_loader(layer.bias, bias, *shard)
        layer.quant_method.process_weights_after_loading(layer)
    return layer, list(parts)


@needs_vllm
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", ["qkv", "gate_up", "column", "row", "replicated"])
def test_ranks_get_their_share_of_a_vector(kind, ranks, only):
    from vllm.config import LoRAConfig, VllmConfig, set_current_vllm_config
    from vllm.lora import utils

    config = LoRAConfig(max_lora_rank=1, max_loras=1, lora_dtype=torch.float32)
    names = {"qkv": ["q", "k", "v"], "gate_up": ["gate", "up"]}.get(kind, [])
    for rank in range(ranks):
        with set_current_vllm_config(VllmConfig()):
            torch.manual_seed(1)
            plain, parts = sharded(kind, rank, ranks, {})
            widths = {"q": 16}
            vectors = {part: torch.rand(widths.get(part, 8), 1) + 0.5 for part in parts if part != "q"}
            scales = Scales(None, [vectors.get(part) for part in parts])
            if kind == "row":
                vectors = {None: torch.rand(1, 16) + 0.5}
                scales = Scales(vectors[None], [None])
            merged, _ = sharded(kind, rank, ranks, vectors)
            layer = utils.from_layer(plain, 1, config, names)
        assert isinstance(layer, Rescaling)
        layer.set_mapping(SimpleNamespace(ia3=Routing(8, 1, "cpu", True)))
        layer.set_scales(0, scales)
        layer.routing.update(torch.tensor([0, -1]), True, False)
        x = torch.randn(2, 16 // (ranks if kind == "row" else 1))
        found = layer.apply(x, plain.bias)
        expected = merged.quant_method.apply(merged, x, merged.bias)
        base = plain.quant_method.apply(plain, x, plain.bias)
        assert torch.allclose(found[0], expected[0], atol=1e-5) and torch.allclose(found[1], base[1], atol=1e-5)
        assert not torch.allclose(found[0], base[0], atol=1e-2)


@needs_vllm
@pytest.mark.slow
def test_smollm2_says_what_peft_says(tmp_path):
    from ia3.adapter.pretrained import find_base

    base = Path(find_base("smollm2")[1])
    save_adapters(base, tmp_path)
    place = Place(base, tmp_path)
    llm = start(
        base, max_lora_rank=8, max_loras=3, lora_target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    )
    names = [None, "peft", "ours", "lora", "wide", None, "lora2", "peft"]
    check(llm, place, names, random_prompts(len(names), seed=7, vocabulary=40000), count=8)


TWO_RANKS = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from support import engines
folder = Path(sys.argv[2])
place = engines.Place(folder / "base", folder)
settings = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
llm = engines.start(place.base, max_lora_rank=8, max_loras=2, **settings)
names = [None, "peft", "ours", "lora", "wide", None, "peft"]
engines.check(llm, place, names, engines.random_prompts(len(names)))
print("the same")
"""


@needs_vllm
@pytest.mark.slow
def test_two_ranks_say_what_peft_says(place):
    done = subprocess.run(
        [sys.executable, "-c", TWO_RANKS, str(TESTS), str(place.folder)],
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
    )
    assert "the same\n" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
