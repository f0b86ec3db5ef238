"""Batches whose adapters are in a bank: the rows of named adapters with the same vectors, whatever the bank does."""

import copy
import threading

import pytest
import torch
import torch._dynamo.testing

import ia3
from ia3 import AdapterBank, IA3Config, InputError, get_peft_model_state_dict
from support import tiny
from support.mixed import BASE, adapted, add, inputs


def banked(arch: str = "llama", **options):
    """A model with adapters `one`, `two`, `three`, and a bank with the same as `One`, `Two`, `Three`."""
    fields = options.pop("fields", {})
    model = adapted(arch, **fields)
    bank = AdapterBank(model, **options)
    for name in ("one", "two", "three"):
        bank.add(name.title(), get_peft_model_state_dict(model, adapter_name=name))
    return model, bank


def answers(model, arch: str, names) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(arch, len(names)), adapter_names=list(names)).logits


@pytest.mark.parametrize("arch", tiny.NAMES)
@pytest.mark.parametrize(
    "names",
    [
        ("One", "Two", BASE, "Three"),
        ("One", "One", "One", "One"),
        ("Two", "one", "One", BASE),
        ("three", "Three", "two", "Two"),
        (BASE, BASE, "Two", "Two"),
    ],
    ids=" ".join,
)
def test_rows_of_the_bank_are_those_of_named_adapters(arch, names):
    model, _ = banked(arch)
    expected = answers(model, arch, [name.lower() for name in names])
    assert tiny.relative_error(answers(model, arch, names), expected) < 1e-6


@pytest.mark.parametrize("arch", ["bert", "gpt2", "t5"])
def test_a_model_without_adapters_of_its_own(arch):
    model, _ = banked(arch)
    names = ["One", BASE, "Three", "Two"]
    expected = answers(model, arch, names)
    plain = tiny.adapt(arch, ia3)
    with plain.disable_adapter():
        base = plain(**inputs(arch, 4)).logits
    for name in ("three", "two", "one"):
        model.ia3_routing.switch(active=())
        model.delete_adapter(name)
    assert torch.equal(answers(model, arch, names), expected)
    assert model.ia3_layers, "the bank's layers stay"
    empty = ia3.IA3Model(tiny.build(arch), {})
    bank = AdapterBank(empty, model.adapter_bank.config)
    bank.add("One", dict(_tensors(model.adapter_bank, "One")))
    found = answers(empty, arch, ["One", BASE, "One", BASE])
    assert tiny.relative_error(found[0], expected[0]) < 1e-6
    assert tiny.relative_error(found[1], base[1]) < 1e-6
    with pytest.raises(InputError, match="Row 2: adapter 'Tow' does not exist"):
        answers(model, arch, ["One", "Two", "Tow", "Two"])


def _tensors(bank, name: str):
    row = bank.gather([name])[0]
    for entry in bank.entries:
        yield entry.key, row[entry.start : entry.start + entry.size].view(entry.shape)


def test_each_row_goes_through_its_adapters_head():
    model, bank = banked("bert")
    assert {entry.path for entry in bank.entries if entry.parameter} == {"classifier"}
    # Vectors of ones, and another head: what differs from the base is the head alone.
    tensors = dict(_tensors(bank, BASE))
    head = torch.nn.Linear(tiny.HIDDEN, tiny.LABELS).requires_grad_(False)
    bank.add(
        "head", tensors | {f"base_model.model.classifier.{key}": value for key, value in head.state_dict().items()}
    )
    found = answers(model, "bert", [BASE, "head", "One", "head"])
    pooled = []
    hook = model.ia3_trained_modules["classifier"].register_forward_pre_hook(lambda _, args: pooled.append(args[0]))
    answers(model, "bert", [BASE] * 4)
    hook.remove()
    for row in (1, 3):
        assert torch.allclose(found[row], head(pooled[0][row]), atol=1e-5)
    other = tiny.adapt("bert", ia3, base=tiny.build("bert", num_labels=2))
    with pytest.raises(InputError, match="classifier"):
        bank.add("other", get_peft_model_state_dict(other))


def test_adapters_of_other_modules_beside_the_banks():
    model, _ = banked("llama")
    model.add_adapter("wide", IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=[]))
    tiny.randomize(model, 9, "wide")
    names = ["One", "wide", BASE, "two"]
    expected = answers(model, "llama", ["one", "wide", BASE, "two"])
    assert tiny.relative_error(answers(model, "llama", names), expected) < 1e-6


def test_half_precision_rows():
    model, _ = banked("llama", dtype=torch.bfloat16)
    names = ["One", "two", BASE, "Two"]
    expected = answers(model, "llama", [name.lower() for name in names])
    assert tiny.relative_error(answers(model, "llama", names), expected) < 0.05
    assert torch.equal(answers(model, "llama", [BASE] * 4), answers(adapted("llama"), "llama", [BASE] * 4))


def test_only_the_models_own_adapters_are_trained():
    model, _ = banked("llama")
    model.set_requires_grad(["one", "two"])
    batch = tiny.batch("llama", 4)
    model(**batch, adapter_names=["One", "one", BASE, "Three"]).loss.backward()
    touched = {name for name in ("one", "two", "three") for p in model.adapter_parameters(name) if p.grad is not None}
    assert touched == {"one"}


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_generation_gathers_once(arch, monkeypatch):
    model, bank = banked(arch)
    calls, gather = [], bank.gather
    monkeypatch.setattr(bank, "gather", lambda names: calls.append(names) or gather(names))
    batch = {key: value for key, value in inputs(arch, 4).items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}
    found = model.generate(**batch, adapter_names=["One", "Two", BASE, "Three"], **options)
    assert len(calls) == 1
    expected = model.generate(**batch, adapter_names=["one", "two", BASE, "three"], **options)
    assert torch.equal(found, expected)


def test_a_batch_goes_on_when_its_adapter_is_deleted():
    model, bank = banked("llama")
    expected = answers(model, "llama", ["One", "Two", BASE, "Three"])

    def delete(*_):
        for name in ("One", "Two", "Three"):
            if name in bank:
                bank.delete(name)
        bank.add("Other", get_peft_model_state_dict(model, adapter_name="two"))  # into a row that was given up

    hook = model.model.get_input_embeddings().register_forward_hook(delete)
    found = answers(model, "llama", ["One", "Two", BASE, "Three"])
    hook.remove()
    assert torch.equal(found, expected)
    with pytest.raises(InputError, match="Row 0: adapter 'One' does not exist"):
        answers(model, "llama", ["One", "Two", BASE, "Three"])


def test_adapters_that_do_not_fit_at_once_come_and_go():
    model = adapted("llama")
    tensors = [get_peft_model_state_dict(model, adapter_name=name) for name in ("one", "two", "three")]
    row_bytes = 4 * sum(value.numel() for value in tensors[0].values())
    bank = AdapterBank(model, budget=3 * row_bytes)  # of two adapters, and the base
    for name, each in zip(("One", "Two", "Three"), tensors, strict=True):
        bank.add(name, each)
    for names in (["One", "Two"], ["Three", "One"], ["Two", BASE], ["Three", "Two"]) * 2:
        expected = answers(model, "llama", [name.lower() for name in names])
        assert tiny.relative_error(answers(model, "llama", names), expected) < 1e-6
    assert model.adapter_bank.statistics.evictions > 0
    with pytest.raises(InputError, match="no more than 2 adapters at once"):
        answers(model, "llama", ["One", "Two", "Three"])
    assert model.ia3_routing.rows is None
    answers(model, "llama", ["One", "Two"])


def test_another_bank_takes_the_place_of_the_first():
    model, bank = banked("llama")
    for name in ("two", "three"):
        model.delete_adapter(name)
    other = AdapterBank(model, IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    assert model.adapter_bank is other
    with pytest.raises(InputError, match="does not exist"):
        answers(model, "llama", ["One"])
    model.ia3_routing.switch(active=())
    model.delete_adapter("one")
    assert {path.rpartition(".")[2] for path in model.ia3_layers} == {"q_proj"}
    assert bank.gather(["One"]).shape == (1, bank.width), "the first is still whole"


def test_taking_adapters_out_takes_the_bank_off():
    expected = tiny.build("llama")(**inputs("llama")).logits
    model, _ = banked("llama")
    plain = model.unload()
    assert model.adapter_bank is None and not any(
        isinstance(module, ia3.adapter.layer.IA3Layer) for module in plain.modules()
    )
    assert torch.equal(plain(**inputs("llama")).logits, expected)


def test_merged_adapters_are_refused():
    model, _ = banked("llama")
    model.merge_adapter()
    with pytest.raises(InputError, match=r"merged into the weights \('one'\)"):
        answers(model, "llama", ["One", "Two"])


def test_a_bank_does_not_change_what_else_the_model_does():
    model, _ = banked("llama")
    alone = adapted("llama")
    for each in (model, alone):
        each.set_adapter("two")
    assert torch.equal(tiny.logits(model, "llama"), tiny.logits(alone, "llama"))
    assert list(get_peft_model_state_dict(model, adapter_name="two")) == list(
        get_peft_model_state_dict(alone, adapter_name="two")
    )
    copied = copy.deepcopy(model)
    assert copied.adapter_bank is model.adapter_bank
    assert torch.equal(answers(copied, "llama", ["One", "two"]), answers(model, "llama", ["One", "two"]))


def test_batches_while_adapters_come_and_go(tmp_path):
    """Each row of every batch is one whole adapter's, while another thread loads, refills and deletes."""
    model = adapted("llama")
    for name in ("one", "two", "three"):
        model.save_pretrained(tmp_path / name, selected_adapters=[name])
    folders = {name: tmp_path / name / name for name in ("one", "two", "three")}
    row_bytes = 4 * sum(value.numel() for value in get_peft_model_state_dict(model, adapter_name="one").values())
    bank = AdapterBank(model, budget=4 * row_bytes)
    for i in range(9):
        bank.load(folders[("one", "two", "three")[i % 3]], f"t{i}")
    references = {name: answers(model, "llama", [name] * 2) for name in folders}
    stop, failures = threading.Event(), []

    def write() -> None:
        i = 0
        while not stop.is_set():
            bank.load(folders[("one", "two", "three")[i % 3]], f"t{i % 9}")  # the same values again
            i += 1

    def read(offset: int) -> None:
        for i in range(25):
            numbers = [(offset + i) % 9, (offset + 2 * i) % 9]
            found = answers(model, "llama", [f"t{number}" for number in numbers])
            for row, number in enumerate(numbers):
                expected = references[("one", "two", "three")[number % 3]][row]
                if not torch.allclose(found[row], expected, atol=1e-5):
                    failures.append((i, numbers))

    writer = threading.Thread(target=write)
    readers = [threading.Thread(target=read, args=(offset,)) for offset in range(2)]
    writer.start()
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join(60)
    stop.set()
    writer.join(60)
    assert not failures and not writer.is_alive() and not any(thread.is_alive() for thread in readers)


def test_compiled_code_is_the_same_for_every_mix():
    torch._dynamo.reset()
    model, _ = banked("llama")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    batch = {**inputs("llama"), "use_cache": False}
    for names in (
        ["One", "Two", BASE, "Three"],
        ["Two"] * 4,
        [BASE, "one", "Two", "two"],
        ["one", "two", "one", "two"],
    ):
        with torch.no_grad():
            found = compiled(**batch, adapter_names=names).logits
        assert tiny.relative_error(found, answers(model, "llama", names)) < 1e-6
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_an_unfilled_name_is_known_from_everywhere(tmp_path):
    model, bank = banked("llama")
    add(model, "llama", "four", 4)
    model.save_pretrained(tmp_path, selected_adapters=["four"])
    assert bank.register(tmp_path) == ["four"]
    bank.delete("Three")
    with pytest.raises(InputError, match=r"Row 1: adapter 'thre' does not exist; close to it: 'three'"):
        answers(model, "llama", ["One", "thre"])
    model.delete_adapter("four")
    expected = bank.gather(["four"])
    assert answers(model, "llama", ["four", BASE]).shape[0] == 2 and expected.shape == (1, bank.width)
