"""Adapters as rows of one array: read, evicted, found again, and gathered while others write."""

import copy
import json
import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import ia3
from ia3 import IA3Config, InputError, get_peft_model_state_dict
from ia3.bank import AdapterBank
from ia3.bank.layout import Layout
from ia3.folder import AdapterFolder
from support import tiny

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

pytestmark = pytest.mark.filterwarnings("ignore:Adapter name 'a' should not be contained")


@pytest.fixture(scope="module")
def model():
    """A Llama with one adapter, which no test changes."""
    return tiny.adapt("llama", ia3)


def rows_of(bank, rows: int) -> int:
    """A budget for that many adapters and the base model's row."""
    return bank.statistics.row_bytes * (rows + 1)


def tensors(bank, value: float | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    """An adapter of the bank's kind: constant, or random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        entry.key: torch.randn(entry.shape, generator=generator) if value is None else torch.full(entry.shape, value)
        for entry in bank.entries
    }


def write(bank, folder, value: float | None = None, seed: int = 0, change=None, **fields) -> dict[str, torch.Tensor]:
    """Save such an adapter; `change(tensors)` before, `fields` of the config other than the bank's."""
    made = tensors(bank, value, seed)
    if change is not None:
        change(made)
    AdapterFolder.write(folder, IA3Config(**{**bank.config.to_dict(), **fields}), made)
    return made


def named(bank, row: torch.Tensor) -> dict[str, torch.Tensor]:
    """A gathered row as the tensors of a checkpoint, by what the bank says of its columns."""
    return {entry.key: row[entry.start : entry.start + entry.size].view(entry.shape) for entry in bank.entries}


def holds(bank, name: str, expected: dict[str, torch.Tensor]) -> bool:
    return tiny.same_bits(
        named(bank, bank.gather([name])[0]),
        {key: expected[key].to(bank.dtype) for key in sorted(expected)},
    )


def refuse_general_path(monkeypatch) -> None:
    monkeypatch.setattr(Layout, "pack", lambda *_: pytest.fail("not read as a row"))


def one_line(error) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


# Columns, and the base model's row.


def test_columns_are_in_the_order_of_a_safetensors_file(arch, tmp_path):
    model = tiny.adapt(arch, ia3)
    bank = AdapterBank(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as opened:
        found = {key: tuple(opened.get_tensor(key).shape) for key in opened.offset_keys()}
    assert list(found.items()) == [(entry.key, entry.shape) for entry in bank.entries]
    assert bank.width == sum(entry.size for entry in bank.entries) == bank.gather(["__base__"]).shape[1]
    starts = [entry.start for entry in bank.entries]
    assert starts == [sum(entry.size for entry in bank.entries[:i]) for i in range(len(starts))]
    for entry in bank.entries:
        if entry.parameter is None:
            layer = model.ia3_layers[entry.path]
            assert (
                entry.feedforward is layer.held["default"].feedforward and entry.shape == layer.ia3_l["default"].shape
            )
        else:
            assert entry.path in bank.modules
            assert (
                model.ia3_trained_modules[entry.path].original_module.state_dict()[entry.parameter].shape == entry.shape
            )
    assert {target.path for target in bank.targets} == set(model.ia3_layers)


def test_row_0_is_the_base_model(arch):
    base = tiny.build(arch)
    state = tiny.state(base)
    bank = AdapterBank(tiny.adapt(arch, ia3, base=base))
    for entry in bank.entries:
        found = named(bank, bank.gather(["__base__"])[0])[entry.key]
        if entry.parameter is None:
            assert (found == 1).all()
        else:
            assert torch.equal(found, state[f"{entry.path}.{entry.parameter}"])
    assert (bank.modules != []) == (arch == "bert")


@pytest.mark.parametrize("chosen", [None, IA3Config(target_modules=["v_proj"], feedforward_modules=[])])
def test_the_config_is_copied(model, chosen):
    given = chosen or model.peft_config["default"]
    before = given.to_dict()
    bank = AdapterBank(model, chosen)
    assert bank.config is not given and given.to_dict() == before
    assert len(bank.entries) == (tiny.LAYERS if chosen else 3 * tiny.LAYERS)


def test_the_active_adapters_config_is_taken():
    model = tiny.adapt("llama", ia3)
    model.add_adapter("other", IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    model.set_adapter("other")
    assert len(AdapterBank(model).entries) == tiny.LAYERS


def test_a_module_at_several_paths_has_one_slice():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(4, 4)
            self.key = self.first

    model = ia3.get_peft_model(Tied(), IA3Config(target_modules=["key"], feedforward_modules=[]))
    bank = AdapterBank(model)
    expected = get_peft_model_state_dict(model)
    assert [entry.key for entry in bank.entries] == list(expected) == ["base_model.model.first.ia3_l"]
    bank.add("one", expected)


def test_what_a_bank_cannot_be_made_of(model, tmp_path):
    with pytest.raises(InputError, match="No module matches"):
        AdapterBank(model, IA3Config(target_modules=["no_such"]))
    whole = tiny.adapt("llama", ia3, target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["mlp"])
    with pytest.raises(InputError, match=r"while an adapter trains 'model.layers.0.mlp' in full"):
        AdapterBank(whole, IA3Config(target_modules=["down_proj"], feedforward_modules=[]))
    with pytest.raises(InputError, match="dtype"):
        AdapterBank(model, dtype=torch.int8)
    empty = tiny.adapt("llama", ia3)
    empty.delete_adapter("default")
    with pytest.raises(InputError, match="Expected a config"):
        AdapterBank(empty)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    net = ia3.get_peft_model(net, IA3Config(target_modules=["0"], feedforward_modules=[]))
    with pytest.raises(InputError, match=r"int64 on cpu in '1.num_batches_tracked'"):
        AdapterBank(net, IA3Config(target_modules=["0"], feedforward_modules=[], modules_to_save=["1"]))


def test_a_deep_copy_is_the_same_bank(model):
    bank = AdapterBank(model)
    assert copy.deepcopy(bank) is bank


# Reading adapters.


@pytest.mark.parametrize("library", [ia3, peft], ids=["ours", "PEFT's"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_rows_are_the_saved_adapters(library, safe, arch, tmp_path, monkeypatch):
    saved = tiny.adapt(arch, library, seed=3)
    saved.save_pretrained(str(tmp_path / "one"), safe_serialization=safe)
    expected = {key: value.detach() for key, value in library.get_peft_model_state_dict(saved).items()}
    bank = AdapterBank(tiny.adapt(arch, ia3))
    if safe:
        refuse_general_path(monkeypatch)
    assert bank.load(tmp_path / "one") == "one"
    assert holds(bank, "one", expected)


def test_a_fused_projections_vector_is_taken_literally(tmp_path):
    model = tiny.adapt("gpt2", ia3, target_modules=None, feedforward_modules=None)
    model.save_pretrained(tmp_path / "one")
    bank = AdapterBank(model)
    bank.load(tmp_path / "one")
    assert holds(bank, "one", get_peft_model_state_dict(model))
    full = tensors(bank, 2.0)
    bank.add("full", full)
    assert holds(bank, "full", full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32 bank", "bf16 bank"])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_other_types_are_cast(model, dtype, saved, tmp_path, monkeypatch):
    bank = AdapterBank(model, dtype=dtype)
    expected = write(
        bank, tmp_path / "one", change=lambda made: made.update({key: v.to(saved) for key, v in made.items()})
    )
    if dtype == saved:
        refuse_general_path(monkeypatch)
    bank.load(tmp_path / "one")
    assert bank.gather(["one"]).dtype == dtype
    assert holds(bank, "one", expected)


def test_another_order_in_the_file(model, tmp_path):
    bank = AdapterBank(model)
    expected = write(bank, tmp_path / "one")
    header, data = {}, b""
    for key, value in sorted(expected.items(), reverse=True):
        start, data = len(data), data + value.numpy().tobytes()
        header[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    (tmp_path / "one" / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)
    bank.load(tmp_path / "one")
    assert holds(bank, "one", expected)


def test_headers_are_remembered_but_not_trusted(model, tmp_path):
    """A file with a header seen before and other data is read as a row; a header of other names is not."""
    bank = AdapterBank(model)
    for i in range(100):  # more different ones than are remembered
        made = tensors(bank, seed=i)
        AdapterFolder.write(tmp_path / "one", bank.config, made)
        safetensors.torch.save_file(made, tmp_path / "one" / WEIGHTS, metadata={"format": "pt", "run": str(i)})
        bank.load(tmp_path / "one")
        assert holds(bank, "one", made)
    write(bank, tmp_path / "two", change=lambda made: made.update(other=made.pop(bank.entries[0].key)))
    with pytest.raises(InputError, match="surplus: 'other'"):
        bank.load(tmp_path / "two")


def test_names(model, tmp_path):
    bank = AdapterBank(model)
    write(bank, tmp_path / "one" / "inner", 2.0)
    assert bank.load(tmp_path / "one" / "inner") == "inner"
    assert bank.load(tmp_path / "one", subfolder="inner", name="v1.2/x") == "v1.2/x"
    assert bank.names == ["inner", "v1.2/x"] and len(bank) == 2
    assert "inner" in bank and "__base__" in bank and "other" not in bank and 3 not in bank
    for name in ("", "__base__", "__metadata__", 3):
        with pytest.raises(InputError, match="Expected an adapter name"):
            bank.load(tmp_path / "one" / "inner", name)
        with pytest.raises(InputError, match="Expected an adapter name"):
            bank.add(name, tensors(bank))
    with pytest.raises(InputError, match="already exists"):
        bank.add("inner", tensors(bank))


def test_hub_ids(model, tmp_path, monkeypatch):
    bank = AdapterBank(model, budget=rows_of(AdapterBank(model), 1))
    expected = write(bank, tmp_path / "cache")
    asked = []

    def download(repo, filename, subfolder=None, **kwargs):
        asked.append((repo, filename, subfolder, kwargs))
        return str(tmp_path / "cache" / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("ia3.files.hub.hub_answers", lambda: True)
    assert bank.load("owner/name", revision="main") == "owner/name"
    assert asked == [("owner/name", file, None, {"revision": "main"}) for file in (WEIGHTS, CONFIG)]
    bank.add("other", tensors(bank))
    assert holds(bank, "owner/name", expected) and len(asked) == 2  # from the cache


BAD = {
    "a missing tensor": ({"change": lambda made: made.popitem()}, r"missing: 'base_model"),
    "a surplus tensor": ({"change": lambda made: made.update(x=torch.ones(1))}, "surplus: 'x'"),
    "another shape": (
        {"change": lambda made: made.update({min(made): made[min(made)].flatten()})},
        r"is \(48,\), expected \(1, 48\)",
    ),
    "NaN": ({"change": lambda made: made[max(made)].fill_(torch.nan)}, "holds NaN or infinite values in 'base_model"),
    "infinity": ({"change": lambda made: made[min(made)][0].fill_(-torch.inf)}, "holds NaN or infinite values"),
    "infinity in float32": (
        {"change": lambda made: made.update({max(made): made[max(made)].double() + 1e300})},
        "holds values in 'base_model.* that are infinite in torch.float32",
    ),
    "integers": (
        {"change": lambda made: made.update({max(made): made[max(made)].int()})},
        "holds torch.int32 in 'base_model.* where torch.float32 is expected",
    ),
    "8-bit floats": (
        {"change": lambda made: made.update({max(made): made[max(made)].to(torch.float8_e4m3fn)})},
        "holds torch.float8_e4m3fn in 'base_model",
    ),
    "another side": ({"feedforward_modules": []}, "rescales another side .* 'model.layers.0.mlp.down_proj'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_leaves_nothing(case, model, tmp_path):
    how, message = BAD[case]
    bank = AdapterBank(model)
    expected = write(bank, tmp_path / "good")
    bank.load(tmp_path / "good")
    write(bank, tmp_path / "bad", **how)
    for name in ("bad", "good"):  # a new name, or a refill
        with pytest.raises(InputError, match=message) as error:
            bank.load(tmp_path / "bad", name)
        assert repr(name) in one_line(error)
    assert bank.names == ["good"] and holds(bank, "good", expected)
    bank.register(tmp_path)
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            bank.gather(["good", "bad"])
    assert bank.statistics.resident == 1
    assert holds(bank, "good", expected)


def test_finite_values_whose_sum_is_not(model, tmp_path):
    bank = AdapterBank(model)
    write(bank, tmp_path / "one", 3e38)
    bank.load(tmp_path / "one")
    narrow = AdapterBank(model, dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"infinite in torch.bfloat16"):
        narrow.add("one", tensors(bank, 3.4e38))
    bank.add("two", tensors(bank, 3.4e38))
    bank.save_archive(tmp_path / "archive")
    with pytest.raises(InputError, match="'two' holds NaN or infinite values"):
        narrow.load_archive(tmp_path / "archive")
    assert narrow.names == []
    with pytest.raises(InputError, match=r"torch.int64 in"):
        bank.add("three", {key: value.long() for key, value in tensors(bank).items()})
    assert bank.names == ["one", "two"]


def test_an_archive_of_one_entry_more(model, tmp_path):
    """Also where it looks as what a message says of an entry that is missing."""
    bank = AdapterBank(model)
    bank.add("one", tensors(bank))
    bank.save_archive(tmp_path / "archive")
    data = (tmp_path / "archive").read_bytes()
    length = int.from_bytes(data[:8], "little")
    for more in (None, "none", ["x" * 5000, [1], True]):
        header = json.loads(data[8 : 8 + length])
        entries = json.loads(header["__metadata__"]["ia3_bank"])
        header["__metadata__"]["ia3_bank"] = json.dumps([*entries, more])
        text = json.dumps(header).encode()
        (tmp_path / "more").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(InputError, match=r"the first that differs is .*, expected none") as error:
            AdapterBank(model).register(tmp_path / "more")
        assert len(one_line(error)) <= 600


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (CONFIG, b'{"peft_type": "LORA"}', "LORA"),
        (CONFIG, b"{", "Expected JSON in .*adapter_config.json"),
        (CONFIG, b"[]", "another kind of JSON"),
        (CONFIG, None, "Can't find 'adapter_config.json' in"),
        (WEIGHTS, None, "Can't find 'adapter_model.safetensors' in"),
        (WEIGHTS, b"", "whole safetensors file in .*adapter_model.safetensors"),
        (WEIGHTS, b"\xff" * 100, "whole safetensors file in .*adapter_model.safetensors"),
    ],
)
def test_damaged_folders(file, content, message, model, tmp_path):
    bank = AdapterBank(model)
    write(bank, tmp_path / "one")
    bank.load(tmp_path / "one", "first")
    if content is None:
        (tmp_path / "one" / file).unlink()
    else:
        (tmp_path / "one" / file).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        bank.load(tmp_path / "one")
    assert "one" in one_line(error)
    assert bank.names == ["first"]


def test_files_cut_short(model, tmp_path):
    bank = AdapterBank(model)
    write(bank, tmp_path / "one")
    data = (tmp_path / "one" / WEIGHTS).read_bytes()
    for size in {*range(0, len(data), 97), len(data) - 1}:
        (tmp_path / "one" / WEIGHTS).write_bytes(data[:size])
        with pytest.raises(InputError, match="Expected a whole safetensors file"):
            bank.load(tmp_path / "one")
    assert bank.names == []


def test_a_regular_expression_for_the_sides(model, tmp_path):
    bank = AdapterBank(model)
    write(bank, tmp_path / "one", target_modules=r".*_proj", feedforward_modules=r".*\.down_proj")
    write(bank, tmp_path / "two", target_modules=r".*_proj", feedforward_modules=r".*\.[kd]\w*_proj")
    bank.load(tmp_path / "one")
    with pytest.raises(InputError, match="another side"):
        bank.load(tmp_path / "two")


# Gathering.


def test_gathering(model):
    bank = AdapterBank(model)
    made = [tensors(bank, seed=i) for i in range(40)]  # the array grows
    for i, one in enumerate(made):
        bank.add(f"a{i}", one)
    names = ["a3", "__base__", "a3", "a39", "a0"]
    found = bank.gather(names)
    assert found.shape == (5, bank.width) and found.dtype == torch.float32
    for row, name in zip(found, names, strict=True):
        if name != "__base__":
            assert tiny.same_bits(named(bank, row), dict(sorted(made[int(name[1:])].items())))
    found.zero_()
    assert holds(bank, "a3", made[3])
    assert bank.gather([]).shape == (0, bank.width)
    assert (bank.statistics.hits, bank.statistics.misses) == (4, 0)


def test_an_unknown_name(model):
    bank = AdapterBank(model)
    bank.add("tickets", tensors(bank))
    with pytest.raises(InputError, match=r"Unknown adapter 'tikets' \(row 2\); close to it: 'tickets'") as error:
        bank.gather(["tickets", "tikets"])
    assert error.value.row == 2
    one_line(error)
    for call in (bank.delete, bank.pin, bank.unpin, lambda name: bank.save_archive("x", [name])):
        for name in ("tikets", "__base__"):
            with pytest.raises(InputError, match=f"Unknown adapter '{name}'"):
                call(name)


@pytest.mark.parametrize("inner", [torch.inference_mode, torch.no_grad])
def test_loading_within_inference_mode(inner, model, tmp_path):
    with inner():
        bank = AdapterBank(model)
        for i in range(20):
            write(bank, tmp_path / f"{i}", float(i))
        bank.register(tmp_path)
        assert bank.gather([f"{i}" for i in range(20)])[:, 0].tolist() == list(range(20))
    bank.add("after", {key: torch.nn.Parameter(value) for key, value in tensors(bank, 5.0).items()})
    found = bank.gather(["after"])
    assert (found == 5).all() and not found.requires_grad


# Budgets, eviction, the spill file.


@pytest.mark.parametrize("budget", ["none", "", "-1MB", "1XB", 1.5e9, True, "1e9", [1]])
def test_budgets_that_are_none(budget, model):
    with pytest.raises(InputError, match="Expected a budget in bytes, or such as '512MB'"):
        AdapterBank(model, budget=budget)


@pytest.mark.parametrize(
    ("budget", "size"),
    [("2GiB", 2 << 30), ("1.5MB", 1_500_000), ("64 kib", 65536), (100_000, 100_000), ("20000B", 20000)],
)
def test_budgets(budget, size, model):
    bank = AdapterBank(model, budget=budget)
    assert bank.statistics.capacity == size // bank.statistics.row_bytes - 1


def test_a_budget_for_less_than_one_adapter(model):
    size = AdapterBank(model).statistics.row_bytes
    AdapterBank(model, budget=2 * size)
    with pytest.raises(InputError, match=f"at least {2 * size} bytes, found {2 * size - 1}: one adapter needs {size}"):
        AdapterBank(model, budget=2 * size - 1)
    with pytest.raises(InputError, match="Give the bank a smaller budget") as error:
        AdapterBank(model, budget="4000TB")
    one_line(error)


def test_spilled_adapters_come_back_bit_for_bit(model):
    bank = AdapterBank(model, budget=rows_of(AdapterBank(model), 2))
    made = {f"a{i}": tensors(bank, seed=i) for i in range(6)}
    for name, one in made.items():
        bank.add(name, one)
    assert (bank.statistics.resident, bank.statistics.spilled, bank.statistics.evictions) == (2, 4, 4)
    for _ in range(2):
        assert all(holds(bank, name, one) for name, one in made.items())
    assert bank.statistics.spilled == 6
    bank.delete("a0")
    assert bank.statistics.spilled == 5
    size = os.fstat(bank._spill._file.fileno()).st_size
    bank.add("new", made["a0"])
    assert all(holds(bank, name, made.get(name, made["a0"])) for name in bank.names)
    assert os.fstat(bank._spill._file.fileno()).st_size == size == 6 * bank.statistics.row_bytes
    assert bank.statistics.spilled == 6


def test_adapters_from_folders_are_not_spilled(model, tmp_path):
    bank = AdapterBank(model, budget=rows_of(AdapterBank(model), 1))
    made = {f"a{i}": write(bank, tmp_path / f"a{i}", seed=i) for i in range(3)}
    for name in made:
        bank.load(tmp_path / name)
    assert all(holds(bank, name, one) for name, one in made.items())
    assert bank.statistics.spilled == 0


@pytest.mark.parametrize("gone", [True, False], ids=["removed", "changed"])
def test_a_folder_that_no_longer_holds_what_was_loaded(gone, model, tmp_path):
    bank = AdapterBank(model, budget=rows_of(AdapterBank(model), 1))
    expected = write(bank, tmp_path / "one", seed=1)
    bank.load(tmp_path / "one")
    if gone:
        (tmp_path / "one" / WEIGHTS).unlink()
    else:
        write(bank, tmp_path / "one", seed=2)
    bank.add("other", tensors(bank))
    assert bank.statistics.spilled == 1
    assert holds(bank, "one", expected)
    bank.register(tmp_path)  # known from there
    assert holds(bank, "one", expected)


def test_more_at_once_than_fit(model):
    bank = AdapterBank(model, budget=rows_of(AdapterBank(model), 2))
    for i in range(4):
        bank.add(f"a{i}", tensors(bank, float(i)))
    with pytest.raises(InputError, match=r"no more than 2 adapters at once.*found 3 distinct ones beside 0") as error:
        bank.gather(["a0", "a1", "a2", "a0"])
    one_line(error)
    assert bank.gather(["a0", "__base__", "a1", "a0"])[:, 0].tolist() == [0, 1, 1, 0]
    bank.pin("a0")
    with pytest.raises(InputError, match="found 2 distinct ones beside 1 that are pinned"):
        bank.gather(["a2", "a3"])
    with pytest.raises(InputError, match="found 2 distinct ones beside 1"):
        bank.pin("a0", "a1", "a2")
    bank.pin("a1")
    for call in (lambda: bank.add("new", tensors(bank)), lambda: bank.gather(["a2"])):
        with pytest.raises(InputError, match="found 1 distinct ones beside 2"):
            call()
    bank.unpin("a0", "a1")
    assert bank.gather(["a2", "a3"])[:, 0].tolist() == [2, 3]


@pytest.mark.parametrize("capacity", [1, 2])
def test_a_refill_evicts_no_other_even_when_pinned(capacity, model, tmp_path):
    bank = AdapterBank(model, budget=rows_of(AdapterBank(model), capacity))
    for i in range(capacity):
        bank.add(f"a{i}", tensors(bank, float(i)))
        bank.pin(f"a{i}")
    write(bank, tmp_path / "new", 7.0)
    bank.load(tmp_path / "new", "a0")
    write(bank, tmp_path / "bad", torch.nan)
    with pytest.raises(InputError, match="NaN"):
        bank.load(tmp_path / "bad", "a0")
    assert bank.gather([f"a{i}" for i in range(capacity)])[:, 0].tolist() == [7, 1][:capacity]
    assert bank.statistics.pinned == capacity and bank.statistics.spilled == 0


def test_a_refilled_adapter_stays_pinned(model, tmp_path):
    bank = AdapterBank(model, budget=rows_of(AdapterBank(model), 2))
    write(bank, tmp_path / "one", 1.0)
    bank.load(tmp_path / "one")
    bank.pin("one")
    bank.load(tmp_path / "one")
    for i in range(3):
        bank.add(f"a{i}", tensors(bank, float(i)))
    misses = bank.statistics.misses
    assert (bank.gather(["one"]) == 1).all() and bank.statistics.misses == misses


def test_an_adapter_that_cannot_be_spilled_stays(model, monkeypatch):
    bank = AdapterBank(model, budget=rows_of(AdapterBank(model), 2))
    made = {f"a{i}": tensors(bank, seed=i) for i in range(2)}
    for name, one in made.items():
        bank.add(name, one)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("ia3.bank.homes.SpillFile.write", full)
        with pytest.raises(OSError, match="No space"):
            bank.add("two", tensors(bank))
    assert bank.names == list(made) and bank.statistics.evictions == 0
    bank.add("two", tensors(bank))
    assert list(bank._resident.rows) == ["__base__", "a1", "two"]  # the order is as it was
    assert all(holds(bank, name, one) for name, one in made.items())


@given(
    capacity=st.integers(1, 4),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("gather"), st.lists(st.sampled_from("abcdef"), min_size=1, max_size=3)),
            st.tuples(st.just("gather"), st.lists(st.sampled_from("abcdef"), min_size=1, max_size=1)),
            st.tuples(st.sampled_from(["add", "delete", "pin", "unpin"]), st.sampled_from("abcdef")),
        ),
        min_size=20,
        max_size=40,
    ),
)
@settings(max_examples=100)
def test_the_least_recently_used_goes_first(model, capacity, steps):
    """Against a reference in a dozen lines: who is resident after each step, and what each gather returns."""
    bank = AdapterBank(model, budget=rows_of(AdapterBank(model), capacity))
    values: dict[str, float] = {}
    recent: OrderedDict[str, None] = OrderedDict()  # resident, pinned ones too
    pinned: set[str] = set()
    counts = {"hits": 0, "misses": 0, "evictions": 0}

    def bring(names: list[str]) -> bool:
        if len(pinned.union(names)) > capacity:
            return False
        for name in names:
            if name not in recent:
                if len(recent) == capacity:
                    del recent[next(old for old in recent if old not in pinned and old not in names)]
                    counts["evictions"] += 1
                recent[name] = None
        for name in names:
            recent.move_to_end(name)
        return True

    def asked(names: list[str]) -> bool:
        missing = [name for name in names if name not in recent]
        fits = set(names) <= set(values) and bring(names)
        if fits:
            counts["misses"] += len(missing)
            counts["hits"] += len(names) - len(missing)
        return fits

    def take(step: str, what, number: int):
        return bank.add(what, tensors(bank, float(number))) if step == "add" else getattr(bank, step)(what)

    for number, (step, what) in enumerate([*(("add", name) for name in "abcdef"), *steps]):
        if step == "gather":
            names = list(dict.fromkeys(what))
            allowed = asked(names)
        elif step == "add":
            allowed = what not in values and bring([what])
            if allowed:
                values[what] = float(number)
        elif step == "pin":
            allowed = asked([what])
            if allowed:
                pinned.add(what)
        else:
            allowed = what in values
            if step == "unpin" and what in pinned:
                recent.move_to_end(what)
            pinned.discard(what)
            if step == "delete":
                values.pop(what, None)
                recent.pop(what, None)
        if allowed:
            found = take(step, what, number)
            if step == "gather":
                assert torch.equal(found, torch.tensor([values[name] for name in what])[:, None].expand_as(found))
        else:
            with pytest.raises(InputError):
                take(step, what, number)
        assert set(bank._resident.rows) - {"__base__"} == set(recent)
        assert set(bank.names) == set(values)
        statistics = bank.statistics
        assert {name: getattr(statistics, name) for name in counts} == counts
        assert (statistics.resident, statistics.pinned) == (len(recent), len(pinned))
    bank.close()


def test_a_spill_folder_has_one_bank(model, tmp_path):
    bank = AdapterBank(model, spill=tmp_path / "spill")
    with pytest.raises(InputError, match=r"in use by another bank") as error:
        AdapterBank(model, spill=tmp_path / "spill")
    one_line(error)
    code = f"""
import fcntl, sys
with open({str(tmp_path / "spill" / "ia3_bank.spill")!r}, "r+b") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("locked")
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "locked\n"
    bank.close()
    assert list((tmp_path / "spill").iterdir()) == []
    again = AdapterBank(model, spill=tmp_path / "spill", budget=rows_of(bank, 1))
    made = tensors(again)
    again.add("one", made)
    again.add("two", tensors(again, 2.0))
    assert holds(again, "one", made)
    del again
    AdapterBank(model)  # takes its place in the model
    assert list((tmp_path / "spill").iterdir()) == []


def test_what_an_earlier_process_left_is_overwritten(model, tmp_path):
    (tmp_path / "ia3_bank.spill").write_bytes(b"x" * 10**6)
    bank = AdapterBank(model, spill=tmp_path)
    assert (tmp_path / "ia3_bank.spill").stat().st_size == 0
    bank.close()


def test_a_closed_bank(model):
    bank = AdapterBank(model, budget=rows_of(AdapterBank(model), 1))
    for i in range(2):
        bank.add(f"a{i}", tensors(bank, float(i)))
    bank.close()
    bank.close()
    assert bank.gather(["a1", "__base__"])[:, 0].tolist() == [1, 1]
    for call in (lambda: bank.gather(["a0"]), lambda: bank.delete("a1"), lambda: bank.add("a", tensors(bank))):
        with pytest.raises(InputError, match="closed"):
            call()


def test_statistics_in_one_line(model):
    bank = AdapterBank(model, budget=rows_of(AdapterBank(model), 3))
    bank.add("one", tensors(bank))
    bank.pin("one")
    assert "1 of 1 adapters resident" in repr(bank) and "1 pinned" in repr(bank) and "\n" not in repr(bank)
    assert bank.statistics.resident_bytes == 2 * bank.statistics.row_bytes == 2 * 4 * bank.width


# Registered folders.


def test_registered_folders_are_loaded_at_first_use(model, tmp_path):
    bank = AdapterBank(model)
    made = {name: write(bank, tmp_path / name, seed=i) for i, name in enumerate(("a", "b", "team/c", "team/c/d"))}
    (tmp_path / "no adapter" / "deep").mkdir(parents=True)
    write(bank, tmp_path)  # the folder itself is none of its subfolders
    assert bank.register(tmp_path) == sorted(made) == bank.names
    assert bank.statistics.resident == 0
    assert bank.register(tmp_path) == sorted(made)
    assert all(holds(bank, name, one) for name, one in made.items())


def test_adapters_that_appear_later(model, tmp_path):
    bank = AdapterBank(model)
    assert bank.register(tmp_path) == []
    assert "team/late" not in bank
    made = write(bank, tmp_path / "team" / "late")
    assert "team/late" in bank and bank.names == []
    assert holds(bank, "team/late", made) and bank.names == ["team/late"]


def test_names_that_leave_the_folder_are_not_looked_up(model, tmp_path):
    bank = AdapterBank(model)
    write(bank, tmp_path / "outside")
    write(bank, tmp_path / "in" / "side")
    bank.register(tmp_path / "in")
    names = [
        "../outside",
        "side/../../outside",
        str(tmp_path / "outside"),
        "..",
        ".",
        "side/.",
        "./side",
        "side/",
        "//side",
    ]
    for name in [*names, "..\\outside", "side\\..\\..\\outside", "side\0"]:
        assert name not in bank
        with pytest.raises(InputError, match="Unknown adapter"):
            bank.gather([name])
    assert bank.names == ["side"]


def test_links_are_followed_but_not_in_circles(model, tmp_path):
    bank = AdapterBank(model)
    made = write(bank, tmp_path / "elsewhere")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "circle").symlink_to(tmp_path / "root")
    assert bank.register(tmp_path / "root") == ["link"]
    assert holds(bank, "link", made)


def test_one_name_from_two_places(model, tmp_path):
    bank = AdapterBank(model)
    for folder in ("x", "y"):
        write(bank, tmp_path / folder / "one")
    write(bank, tmp_path / "y" / "two")
    bank.register(tmp_path / "x")
    with pytest.raises(InputError, match="'one' of these adapters are known from another place") as error:
        bank.register(tmp_path / "y")
    one_line(error)
    assert bank.names == ["one"] and "two" not in bank
    bank.delete("one")
    assert bank.register(tmp_path / "y") == ["one", "two"]
    with pytest.raises(
        InputError, match=r"Cannot read .*missing: No such file or directory; expected an archive of adapters"
    ):
        bank.register(tmp_path / "missing")


def test_a_deleted_adapter_stays_deleted(model, tmp_path):
    bank = AdapterBank(model)
    made = write(bank, tmp_path / "one")
    bank.register(tmp_path)
    bank.delete("one")
    assert "one" not in bank
    with pytest.raises(InputError, match="Unknown adapter 'one'"):
        bank.gather(["one"])
    assert (tmp_path / "one" / WEIGHTS).exists()
    bank.register(tmp_path)
    assert holds(bank, "one", made)


# Archives.


@pytest.fixture
def archive(model, tmp_path):
    """The path of an archive of three adapters, and their tensors."""
    bank = AdapterBank(model)
    made = {f"team/{i}": tensors(bank, seed=i) for i in range(3)}
    for name, one in made.items():
        bank.add(name, one)
    bank.save_archive(tmp_path / "archive.safetensors")
    return tmp_path / "archive.safetensors", made


def test_archives_come_back(archive, model):
    path, made = archive
    bank = AdapterBank(model)
    assert bank.load_archive(path) == list(made) == bank.names
    assert bank.statistics.resident == 3
    assert all(holds(bank, name, one) for name, one in made.items())
    lazy = AdapterBank(model, budget=rows_of(bank, 1))
    assert lazy.register(path) == list(made) and lazy.statistics.resident == 0
    for _ in range(2):
        assert all(holds(lazy, name, one) for name, one in made.items())
    assert lazy.statistics.spilled == 0
    assert lazy.register(path) == list(made)
    narrow = AdapterBank(model, dtype=torch.bfloat16)
    narrow.load_archive(path)
    assert all(holds(narrow, name, one) for name, one in made.items())


def test_an_archive_is_plain_safetensors(archive, model):
    path, made = archive
    bank = AdapterBank(model)
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
        found = {name: opened.get_tensor(name) for name in opened.offset_keys()}
    assert list(found) == ["ends", "hashes", "order", "names", "rows"]
    texts = bytes(found["names"].tolist())
    assert [texts[end - 6 : end].decode() for end in found["ends"].tolist()] == list(made)
    for row, one in zip(found["rows"], made.values(), strict=True):
        assert tiny.same_bits(named(bank, row), dict(sorted(one.items())))
    assert metadata["format"] == "pt"
    assert json.loads(metadata["config"]) == bank.config.to_dict()
    assert json.loads(metadata["ia3_bank"]) == [
        [entry.key, list(entry.shape), entry.feedforward] for entry in bank.entries
    ]


def test_an_archive_of_an_earlier_version(model, tmp_path):
    """A tensor for each adapter, in any order, and no index."""
    bank = AdapterBank(model, budget=rows_of(AdapterBank(model), 1))
    made = {name: tensors(bank, seed=i) for i, name in enumerate(("z", "a/b", "é"))}
    rows = {name: torch.cat([one[key].flatten() for key in sorted(one)]) for name, one in made.items()}
    entries = [[entry.key, list(entry.shape), entry.feedforward] for entry in bank.entries]
    header = {"__metadata__": {"ia3_bank": json.dumps(entries), "config": bank.config.to_json()}}
    for i, name in enumerate(rows):
        start = i * 4 * bank.width
        header[name] = {"dtype": "F32", "shape": [bank.width], "data_offsets": [start, start + 4 * bank.width]}
    text = json.dumps(header).encode()
    data = b"".join(row.numpy().tobytes() for row in rows.values())
    (tmp_path / "old").write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert bank.register(tmp_path / "old") == sorted(made)
    assert all(holds(bank, name, one) for name, one in made.items())
    bank.save_archive(tmp_path / "new")
    assert AdapterBank(model).load_archive(tmp_path / "new") == sorted(made)
    (tmp_path / "old").write_bytes(len(text).to_bytes(8, "little") + text + data[:-1])
    with pytest.raises(InputError, match="cut short"):
        AdapterBank(model).register(tmp_path / "old")
    twice = text.replace(b'"z"', b'"\\u00e9"')
    (tmp_path / "old").write_bytes(len(twice).to_bytes(8, "little") + twice + data)
    with pytest.raises(InputError, match=r"not as AdapterBank.save_archive writes them"):
        AdapterBank(model).register(tmp_path / "old")


def test_an_archive_of_more_than_fits(model, tmp_path):
    bank = AdapterBank(model, budget=rows_of(AdapterBank(model), 2))
    made = {name: write(bank, tmp_path / "in" / name, seed=ord(name)) for name in "abcdef"}
    bank.register(tmp_path / "in")
    made["given"] = tensors(bank, 3.0)
    bank.add("given", made["given"])
    bank.gather(["a", "b"])
    before = bank.statistics
    bank.save_archive(tmp_path / "archive")
    assert bank.statistics == before
    other = AdapterBank(model, budget=rows_of(bank, 2))
    assert sorted(other.load_archive(tmp_path / "archive")) == sorted(made)
    assert (other.statistics.resident, other.statistics.evictions) == (2, 0)
    assert all(holds(other, name, one) for name, one in made.items())
    other.save_archive(tmp_path / "archive", ["c", "given"])  # over its own home
    assert all(holds(other, name, one) for name, one in made.items())
    assert AdapterBank(model).load_archive(tmp_path / "archive") == ["c", "given"]


def test_an_archive_cut_while_it_is_open(model, tmp_path):
    bank = AdapterBank(model)
    for i in range(60):  # more than a file object reads ahead
        bank.add(f"a{i}", tensors(bank, float(i)))
    bank.save_archive(tmp_path / "archive")
    other = AdapterBank(model)
    other.register(tmp_path / "archive")
    os.truncate(tmp_path / "archive", (tmp_path / "archive").stat().st_size - 1)
    assert (other.gather(["a58"]) == 58).all()
    with pytest.raises(InputError, match="archive has been cut short since"):
        other.gather(["a9"])  # the last in alphabetical order
    os.truncate(tmp_path / "archive", 100)  # into the index, which is mapped
    assert (other.gather(["a58"]) == 58).all()
    for call in (lambda: other.gather(["a57"]), lambda: "a57" in other, lambda: other.names):
        with pytest.raises(InputError, match="archive has been cut short since") as error:
            call()
        one_line(error)


def test_an_archive_of_heads(tmp_path):
    model = tiny.adapt("bert", ia3)
    bank = AdapterBank(model)
    bank.add("one", get_peft_model_state_dict(model))
    bank.save_archive(tmp_path / "archive")
    again = AdapterBank(model)
    again.load_archive(tmp_path / "archive")
    assert holds(again, "one", get_peft_model_state_dict(model))
    with safe_open(tmp_path / "archive", framework="pt") as opened:
        entries = json.loads(opened.metadata()["ia3_bank"])
    assert sum(side is None for _, _, side in entries) == 2


def test_an_interrupted_archive_leaves_the_former(archive, model, tmp_path):
    path, _ = archive
    before = path.read_bytes()
    bank = AdapterBank(model)
    bank.add("good", tensors(bank))
    write(bank, tmp_path / "in" / "bad", torch.inf)
    bank.register(tmp_path / "in")
    with pytest.raises(InputError, match="infinite"):
        bank.save_archive(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_archives_cut_short(archive, model, tmp_path):
    path, _ = archive
    data = path.read_bytes()
    bank = AdapterBank(model)
    for size in [*range(64), *range(64, len(data), 101), len(data) - 1]:
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(InputError, match=r"cut short|another kind") as error:
            bank.register(tmp_path / "cut")
        one_line(error)
    (tmp_path / "cut").write_bytes(data + b"\0")
    with pytest.raises(InputError, match="cut short or damaged"):
        bank.register(tmp_path / "cut")
    assert bank.names == [] and "x" not in bank


@given(data=st.data())
@settings(max_examples=100)
def test_damaged_headers(model, tmp_path_factory, data):
    """Whatever stands there: an archive of the bank's kind, or an InputError."""
    path = tmp_path_factory.mktemp("damaged") / "archive"
    bank = AdapterBank(model)
    bank.add("one", tensors(bank))
    bank.save_archive(path)
    bank.delete("one")
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.sampled_from(b'{}[]",:0 9\xffa\\'))
    path.write_bytes(content)
    try:
        bank.load_archive(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert bank.gather(bank.names).shape == (len(bank), bank.width)


def test_foreign_archives(archive, model, tmp_path):
    path, _ = archive
    others = {
        "of two sides": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=[]),
        "of fewer": IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    }
    for config in others.values():
        with pytest.raises(InputError, match=r"the first that differs is \['base_model.*down_proj.ia3_l'") as error:
            AdapterBank(model, config).register(path)
        one_line(error)
    bank = AdapterBank(model)
    write(bank, tmp_path / "one")
    with pytest.raises(InputError, match=r"Expected an archive that AdapterBank.save_archive wrote"):
        bank.register(tmp_path / "one" / WEIGHTS)
    with pytest.raises(InputError, match="whole safetensors file"):
        bank.register(tmp_path / "one" / CONFIG)
    with pytest.raises(InputError, match=r"Cannot read .*: Is a directory"):
        bank.load_archive(tmp_path)


def test_an_archive_with_a_name_that_is_taken_or_values_that_are_not_finite(archive, model, tmp_path):
    path, made = archive
    bank = AdapterBank(model)
    bank.add("team/1", tensors(bank))
    with pytest.raises(InputError, match="'team/1' of these adapters are known"):
        bank.load_archive(path)
    assert bank.names == ["team/1"]
    content = path.read_bytes()
    path.write_bytes(content[:-4] + torch.tensor([torch.nan]).numpy().tobytes())
    other = AdapterBank(model)
    other.register(path)
    assert holds(other, "team/0", made["team/0"])
    for _ in range(2):
        with pytest.raises(InputError, match="Adapter 'team/2' holds NaN"):
            other.gather(["team/2"])
    another = AdapterBank(model)
    with pytest.raises(InputError, match="Adapter 'team/2' holds NaN"):
        another.load_archive(path)
    assert another.names == [] and another.statistics.resident == 0
    other.delete("team/2")
    path.write_bytes(content[:-4])
    with pytest.raises(InputError, match="cut short"):
        other.load_archive(path)


# Threads.


def run(*workers, seconds: float) -> None:
    """Each worker over and over in a thread of its own, until the time is over or one fails."""
    stop, failures = threading.Event(), []

    def work(step) -> None:
        try:
            while not stop.is_set():
                step()
        except BaseException as error:
            failures.append(error)
            stop.set()

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    if failures:
        raise failures[0]


@pytest.mark.parametrize("capacity", [5, None])
def test_readers_beside_a_writer_see_whole_adapters(capacity, model, tmp_path):
    """Adapter n holds n, n + 100, n + 200, … in all columns, whichever was written last."""
    budget = None if capacity is None else rows_of(AdapterBank(model), capacity)
    bank = AdapterBank(model, budget=budget)
    for i in range(8):
        for round_ in range(2):
            write(bank, tmp_path / f"{round_}" / f"{i}", float(i + 100 * round_))
    bank.register(tmp_path / "0")
    counts = {"gathered": 0, "written": 0}

    def reader(seed: int):
        generator = torch.Generator().manual_seed(seed)

        def step() -> None:
            names = [str(i) for i in torch.randint(0, 9, (3,), generator=generator).tolist()]
            try:
                found = bank.gather(names)
            except InputError as error:
                assert "Unknown adapter '8'" in str(error), error
                return
            assert (found == found[:, :1]).all(), "torn"
            assert [str(int(value) % 100) for value in found[:, 0]] == names
            counts["gathered"] += 1

        return step

    def writer() -> None:
        i = counts["written"]
        bank.load(tmp_path / f"{i % 2}" / f"{i % 8}", f"{i % 8}")
        bank.add("8", tensors(bank, float(8 + 100 * (i % 7))))
        if capacity is not None:
            bank.pin("8")
            bank.unpin("8")
        bank.add(f"more{i}", tensors(bank, 9.0))
        bank.delete("8")
        if i >= 20:
            bank.delete(f"more{i - 20}")
        counts["written"] += 1

    run(reader(1), reader(2), reader(3), writer, seconds=1.0)
    assert counts["gathered"] > 20 and counts["written"] > 20


def test_a_gather_ends_with_the_values_it_began_with(model):
    bank = AdapterBank(model, budget=rows_of(AdapterBank(model), 1))
    bank.add("one", tensors(bank, 1.0))
    thread = threading.Thread(target=lambda: bank.add("two", tensors(bank, 2.0)))
    with bank._leased(["one"]) as (array, rows):
        bank.delete("one")
        assert "one" not in bank
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()  # there is no row for it yet
        assert (array[rows["one"]] == 1).all()
    thread.join(20)
    assert not thread.is_alive() and (bank.gather(["two"]) == 2).all()


def test_two_readers_load_a_missing_adapter_once(model, tmp_path, monkeypatch):
    bank = AdapterBank(model)
    write(bank, tmp_path / "one", 1.0)
    bank.register(tmp_path)
    reads, read = [], Layout.read_folder

    def slow(self, folder, row, name):
        reads.append(name)
        time.sleep(0.1)
        return read(self, folder, row, name)

    monkeypatch.setattr(Layout, "read_folder", slow)
    barrier, found = threading.Barrier(4), []

    def work() -> None:
        barrier.wait()
        found.append(bank.gather(["one"]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 4 and reads == ["one"]
    assert (bank.statistics.hits, bank.statistics.misses) == (3, 1)


def test_what_is_resident_is_gathered_while_another_loads(model, tmp_path, monkeypatch):
    bank = AdapterBank(model)
    write(bank, tmp_path / "slow", 1.0)
    bank.register(tmp_path)
    bank.add("fast", tensors(bank, 2.0))
    reading, go, read = threading.Event(), threading.Event(), Layout.read_folder

    def slow(self, *args):
        reading.set()
        assert go.wait(20)
        return read(self, *args)

    monkeypatch.setattr(Layout, "read_folder", slow)
    thread = threading.Thread(target=lambda: bank.gather(["slow"]))
    thread.start()
    assert reading.wait(20)
    assert (bank.gather(["fast"]) == 2).all() and "slow" in bank and "slow" in bank.names and repr(bank)
    go.set()
    thread.join(20)
    assert bank.statistics.resident == 2


def test_two_threads_add_one_name(model):
    bank = AdapterBank(model)
    barrier, errors = threading.Barrier(4), []

    def work(value: float) -> None:
        barrier.wait()
        try:
            bank.add("one", tensors(bank, value))
        except InputError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(errors) == 3 and all("already exists" in error for error in errors)
    assert bank.statistics.resident == 1
