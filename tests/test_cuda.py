"""On a GPU: what the processor computes, to rounding. `benchmarks/gpu.sh` runs these."""

import copy
import random
import shutil
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import ia3
from ia3 import AdapterBank, IA3Config, InputError, Prefix, Scorer, get_peft_model_state_dict
from ia3.scoring.question import Question
from support import asked, tiny, words
from support.mixed import ADAPTERS, BASE, adapted, inputs
from support.training import trainer

CUDA = "cuda"

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Both devices round sums of float32, in another order; a tiny model's outputs then differ by about 1e-6. TensorFloat-32, which
# torch leaves off, would make it 1e-3.
ROUNDING = 1e-4


def put(value):
    """A model, or a batch, on the GPU."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(CUDA)
    return {key: one.to(CUDA) for key, one in value.items()}


def vectors(model, adapter: str = "default") -> torch.Tensor:
    """An adapter's numbers in one row, on the processor."""
    return torch.cat([one.detach().flatten().cpu() for one in tiny.adapter_parameters(model, adapter).values()])


# One adapter, and one for each row.


def test_outputs_and_gradients(arch):
    model, batch = tiny.adapt(arch, ia3), tiny.batch(arch)
    there = put(model)
    expected, found = model(**batch), there(**put(batch))
    assert found.logits.device.type == CUDA
    assert tiny.relative_error(found.logits.cpu(), expected.logits) < ROUNDING
    with model.disable_adapter():
        assert tiny.relative_error(model(**batch).logits, expected.logits) > 100 * ROUNDING
    for one in (expected, found):
        one.logits.square().sum().backward()
    grads = tiny.adapter_parameters(there)
    for key, parameter in tiny.adapter_parameters(model).items():
        assert tiny.relative_error(grads[key].grad.cpu(), parameter.grad) < 10 * ROUNDING, key


def test_bfloat16(arch):
    model, batch = tiny.adapt(arch, ia3), tiny.batch(arch)
    expected = model(**batch).logits
    found = put(model).to(torch.bfloat16)(**put(batch)).logits
    assert found.dtype == torch.bfloat16
    assert tiny.relative_error(found.float().cpu(), expected) < 0.1  # numbers of three digits, through a few layers


def test_merging_there(arch):
    model, batch = put(tiny.adapt(arch, ia3)), put(tiny.batch(arch))
    before = tiny.state(model)
    with torch.no_grad():
        expected = model(**batch).logits
        model.merge_adapter()
        assert tiny.relative_error(model(**batch).logits, expected) < ROUNDING
        model.unmerge_adapter()
    assert tiny.same_bits(tiny.state(model), before)


def test_an_adapter_for_each_row(arch):
    model, names = adapted(arch), ["one", BASE, "two", "three"]
    batch = inputs(arch)
    with torch.no_grad():
        expected = model(**batch, adapter_names=names).logits
        found = put(model)(**put(batch), adapter_names=names).logits
    assert tiny.relative_error(found.cpu(), expected) < ROUNDING


def test_generating_with_an_adapter_for_each_row():
    model, names = adapted("llama"), ["one", BASE, "two", "three"]
    batch, options = inputs("llama"), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**batch, adapter_names=names, **options)
    assert torch.equal(put(model).generate(**put(batch), adapter_names=names, **options).cpu(), expected)


# The bank.


def test_rows_of_a_bank_that_is_there():
    model = adapted("llama")
    there = put(model)
    bank = AdapterBank(there)
    for name in ADAPTERS:
        bank.add(name.title(), get_peft_model_state_dict(model, adapter_name=name))
    names, batch = ["One", BASE, "two", "Three"], inputs("llama")
    assert bank.gather(names[:2]).device.type == CUDA
    with torch.no_grad():
        expected = model(**batch, adapter_names=[name if name == BASE else name.lower() for name in names]).logits
        assert tiny.relative_error(there(**put(batch), adapter_names=names).logits.cpu(), expected) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_gather_what_others_evict(dtype, tmp_path):
    """Rows go through one buffer in the processor's memory, and what is evicted comes back from a file."""
    model = put(tiny.adapt("llama", ia3))
    width = AdapterBank(model).width
    bank = AdapterBank(model, dtype=dtype, budget=4 * width * dtype.itemsize)  # three adapters, and the base
    values = {f"a{number}": 1 + number / 8 for number in range(8)}
    for number, (name, value) in enumerate(values.items()):
        tensors = {entry.key: torch.full(entry.shape, value) for entry in bank.entries}
        if number % 2:
            bank.add(name, tensors)
        else:
            ia3.AdapterFolder.write(tmp_path / name, bank.config, tensors)
    bank.register(tmp_path)

    def gather(seed: int) -> list[str]:
        chance, wrong = random.Random(seed), []
        for name in chance.choices([*values], k=60):
            found = bank.gather([name, BASE, name])
            expected = torch.tensor([values[name], 1.0, values[name]], dtype=dtype, device=CUDA)
            if not torch.equal(found, expected[:, None].expand(-1, width)):
                wrong.append(name)
        return wrong

    with ThreadPoolExecutor(3) as threads:
        assert [*threads.map(gather, range(3))] == [[], [], []]
    known = bank.statistics
    assert known.capacity == 3 and known.evictions > 20 and known.spilled
    with pytest.raises(InputError, match="no more than 3"):
        bank.gather([*values])


# Scoring.

FAMILIES = {"llama": (words.tokenizer, "position_ids"), "t5": (words.closing, "decoder_position_ids")}


def sized(arch: str, **sizes) -> nn.Module:
    """A tiny model that knows the words, with a random adapter."""
    return tiny.adapt(arch, ia3, base=tiny.build(arch, vocab_size=len(words.VOCABULARY), **sizes))


@pytest.mark.parametrize("arch", FAMILIES)
def test_packed_scores(arch):
    tokenizer, mark = FAMILIES[arch]
    prompts = [f"review : {row['text']} answer :" for row in words.rows(6)]
    choices = [[" good", " not good", " not bad", " it was a fine cake"]] * 6
    model = sized(arch)
    here, there = (Scorer(one, tokenizer()) for one in (model, put(model)))
    expected, found = (torch.stack(one.score(one.encode(prompts, choices))) for one in (here, there))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert mark in there.collate(there.encode(prompts, choices)), "plain rows, which were not asked for"


def test_what_prompts_share_is_read_once():
    long = "review : " + "the tea was a fine cake and it is good today " * 8
    prompts = [f"{long} {row['text']} answer :" for row in words.rows(12)]
    choices = [[" good", " not good", " bad"]] * 12
    model = sized("llama", max_position_embeddings=512)
    here, there = (Scorer(one, words.tokenizer()) for one in (model, put(model)))
    assert any("past_key_values" in batch for _, batch in there.batches(there.encode(prompts, choices)))
    expected, found = (torch.stack(one.score(one.encode(prompts, choices))) for one in (here, there))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    prefix = Prefix(there.model, words.tokenizer(), long)
    short = [prompt.removeprefix(long) for prompt in prompts]
    whole = [long + prefix.separator + prompt for prompt in short]
    found = torch.stack(there.score(there.encode(short, choices, prefix=prefix), prefix=prefix))
    expected = torch.stack(here.score(here.encode(whole, choices)))
    assert prefix.is_cached
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", asked.CAUSAL)
def test_scores_with_an_adapter_for_each_prompt(arch):
    model = adapted(arch)
    questions = [Question([5, 6, 7 + number], [[8], [9, 10], [9, 11, 12]]) for number in range(4)]
    names = ["one", BASE, "two", "one"]
    expected, found = (
        torch.stack(asked.scorer(one).score(questions, adapter_names=names)) for one in (model, put(model))
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# Training.


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_training_gives_the_vectors_that_the_processor_gives(attention, tmp_path):
    """To a thousandth of how far they have come. Float64 in the processor's products changes them by 3e-6 of that, bfloat16
    by 0.015."""
    results = []
    for use_cpu in (True, False):
        run = trainer(tmp_path, steps=5, args={"use_cpu": use_cpu})
        run.model.config._attn_implementation = attention
        run.train()
        assert run.args.device.type == ("cpu" if use_cpu else CUDA)
        assert {one.device.type for one in run.model.parameters()} == {run.args.device.type}
        results.append(vectors(run.model))
    expected, found = results
    moved = (expected - 1).norm()
    assert moved > 1e-3
    assert (found - expected).norm() < 1e-3 * moved


def test_a_classifier_learns_and_answers_there(tmp_path):
    words.save_model(tmp_path / "model")
    rows = words.rows(32)
    texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
    recipe = ia3.Recipe(steps=80, learning_rate=0.1)
    options = {"recipe": recipe, "template": words.TEMPLATE, "choices": words.CHOICES}
    classifier = ia3.FewShotClassifier(str(tmp_path / "model"), **options).fit(texts, labels)
    assert {one.device.type for one in classifier._base.model.parameters()} == {CUDA}
    assert classifier.score(texts, labels) > 0.85


# From there to here, and back.


def test_saved_there_and_loaded_here(tmp_path):
    model = adapted("llama")
    there = put(model)
    there.save_pretrained(tmp_path, selected_adapters=["one", "two"])
    here = ia3.PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "one", adapter_name="one")
    here.load_adapter(tmp_path / "two", adapter_name="two")
    for name in ("one", "two"):
        assert torch.equal(vectors(here, name), vectors(model, name))
    back = ia3.PeftModel.from_pretrained(tiny.build("llama").to(CUDA), tmp_path / "one")
    assert {one.device.type for one in back.parameters()} == {CUDA}
    assert torch.equal(vectors(back), vectors(model, "one"))


# What others add.


def has_compiler() -> bool:
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return any(map(shutil.which, ("gcc", "cc", "clang"))) and headers.is_file()


@pytest.mark.skipif(not has_compiler(), reason="needs a C compiler and Python's headers")
def test_compiled():
    pytest.importorskip("triton", reason="needs triton")
    torch._dynamo.reset()
    model = put(adapted("llama")).requires_grad_(False)
    run, batch = torch.compile(model, fullgraph=True), put(inputs("llama"))
    for name in ("one", "two"):
        model.set_adapter(name, inference_mode=True)
        expected = model(**batch, use_cache=False).logits
        assert tiny.relative_error(run(**batch, use_cache=False).logits, expected) < ROUNDING
    names = ["one", BASE, "two", "three"]
    expected = model(**batch, use_cache=False, adapter_names=names).logits
    assert tiny.relative_error(run(**batch, use_cache=False, adapter_names=names).logits, expected) < ROUNDING
    torch._dynamo.reset()


@pytest.mark.parametrize("bits", [8, 4])
def test_layers_that_bitsandbytes_quantized(bits):
    layers = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes").nn
    torch.manual_seed(0)
    plain = nn.Linear(128, 96)
    if bits == 8:
        quantized = layers.Linear8bitLt(128, 96, has_fp16_weights=False)
    else:
        quantized = layers.Linear4bit(128, 96, quant_type="nf4", compute_dtype=torch.float32)
    quantized.load_state_dict(plain.state_dict())
    base = nn.Sequential(quantized).to(CUDA)
    x = torch.randn(5, 128, device=CUDA).half()
    with torch.no_grad():
        expected = base(x)
    model = ia3.IA3Model(base, IA3Config(target_modules=["0"], feedforward_modules=[]))
    tiny.randomize(model)
    found = model(x)
    expected = expected.float() * vectors(model).to(CUDA)
    assert tiny.relative_error(found.float(), expected) < 0.01
    found.float().square().sum().backward()
    [vector] = model.adapter_parameters("default")
    assert vector.grad.device.type == CUDA and vector.grad.abs().max() > 0
    merged = model.merge_and_unload()(x).detach()
    assert tiny.relative_error(merged.float(), expected) < (0.05 if bits == 8 else 0.3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_batch_spread_over_all_gpus():
    model, batch = put(adapted("llama")), put(inputs("llama"))
    with torch.no_grad():
        expected = model(**batch).logits
        found = nn.DataParallel(model)(**batch).logits
    assert tiny.relative_error(found, expected) < ROUNDING
