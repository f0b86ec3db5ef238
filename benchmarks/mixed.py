"""A batch whose rows all have different adapters, and a bank of many: SmolLM2-135M in float32, in one process.

It runs on the GPU, where there is one (`--device`).

- scoring and generating: 64 rows with 64 adapters in one batch; the same batch on a merged model; PEFT switching its
  adapter 64 times, a row each. With `--adapterhub`, its BatchSplit on the same rows against its own model without
  adapters, in an environment of its own (`pip install adapters`, which needs transformers 4).
- bank: memory of many adapters (the resident set; on a GPU what torch has allocated there) against their vectors alone;
  a batch with few and with many resident; loading one from a cached file; uniform random access when only a part of the
  registered adapters fits.

    python benchmarks/mixed.py [--repeats 5] [--adapters 10000] [--parts batch,bank] [--adapterhub PYTHON]
        [--model smollm2] [--device cuda|cpu] [--json]

Times are medians of interleaved repeats. The bank's part writes 0.23 MB an adapter to a temporary folder.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import psutil
import torch
from timing import add_model_options, interleaved, synchronize
from torch import nn

from ia3 import AdapterBank, IA3Config, IA3Model, get_peft_model_state_dict, load_base

ROWS, TOKENS, NEW = 64, 64, 16
TARGETS = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


def against(seconds: dict[str, list[float]], peer: str) -> dict[str, dict[str, float]]:
    """Medians, and the median of each repeat's ratio to a peer's time in that repeat."""
    return {
        name: {
            "seconds": statistics.median(values),
            f"over_{peer}": statistics.median(a / b for a, b in zip(values, seconds[peer], strict=True)),
        }
        for name, values in seconds.items()
    }


def score(model: nn.Module, ids: torch.Tensor, **options) -> torch.Tensor:
    """The logits behind each row, as `score_choices` asks for them."""
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False, logits_to_keep=1, **options).logits[:, -1]


def generate(model: nn.Module, ids: torch.Tensor, **options) -> torch.Tensor:
    """A few new tokens a row, greedily."""
    mask = torch.ones_like(ids)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    return model.generate(input_ids=ids, attention_mask=mask, **settings, **options)


def random_adapter(entries: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Vectors around one."""
    generator = torch.Generator().manual_seed(seed)
    return {key: 1 + 0.1 * torch.randn(value.shape, generator=generator) for key, value in entries.items()}


def random_ids(model: nn.Module, tokens: int) -> torch.Tensor:
    """A row of tokens for each adapter, beside the model."""
    ids = torch.randint(1000, 20000, (ROWS, tokens), generator=torch.Generator().manual_seed(0))
    return ids.to(next(model.parameters()).device)


def batch_part(load: Callable[[], nn.Module], repeats: int) -> dict:
    """One batch, 64 adapters."""
    ours = IA3Model(load(), IA3Config(**TARGETS)).eval()
    bank = AdapterBank(ours)
    theirs = peft.get_peft_model(load(), peft.IA3Config(**TARGETS)).eval()
    merged = copy.deepcopy(ours).merge_and_unload()
    entries = get_peft_model_state_dict(ours)
    names = [f"a{i}" for i in range(ROWS)]
    for i, name in enumerate(names):
        tensors = random_adapter(entries, i)
        bank.add(name, tensors)
        theirs.add_adapter(name, peft.IA3Config(**TARGETS))
        peft.set_peft_model_state_dict(theirs, tensors, name)
    ids = random_ids(ours, TOKENS)

    def switching(run: Callable) -> Callable[[], torch.Tensor]:
        def step() -> torch.Tensor:
            rows = []
            for row, name in enumerate(names):
                theirs.set_adapter(name)
                rows.append(run(theirs, ids[row : row + 1]))
            return torch.cat(rows)

        return step

    results = {}
    for kind, run in (("scoring", score), ("generating", generate)):
        steps = {
            "merged": lambda run=run: run(merged, ids),
            "ours": lambda run=run: run(ours, ids, adapter_names=names),
            "PEFT switching": switching(run),
        }
        found, expected = steps["ours"](), steps["PEFT switching"]()
        if kind == "scoring":
            difference = float((found - expected).abs().max())
            assert difference < 1e-2, difference
            results["difference from PEFT"] = difference
        quick = interleaved({name: steps[name] for name in ("merged", "ours")}, repeats)
        slow = interleaved({name: steps[name] for name in ("merged", "PEFT switching")}, max(1, repeats // 5))
        results[kind] = against(quick, "merged") | {"PEFT switching": against(slow, "merged")["PEFT switching"]}
    return results


def adapterhub_part(python: str, model: str, device: torch.device, repeats: int) -> dict:
    """AdapterHub's BatchSplit, in its own environment."""
    from ia3.adapter.pretrained import find_base

    script = Path(__file__).with_name("adapterhub_batchsplit.py")
    numbers = map(str, (ROWS, TOKENS, NEW, repeats))
    command = [python, str(script), find_base(model)[1], str(device), *numbers]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return {kind: against(seconds, "without adapters") for kind, seconds in found.items()}


def held(device: torch.device) -> int:
    """Bytes of memory that this process holds; on a GPU, those that torch has allocated there."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def write_adapters(ours: IA3Model, folder: Path, count: int) -> list[str]:
    """Many adapters on disk, each with numbers of its own; returns their names."""
    ours.save_pretrained(folder / "first")
    weights, config = (folder / "first" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    whole = weights.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    numbers = torch.empty((len(whole) - start) // 4)
    names = [f"a{i:05d}" for i in range(count)]
    for i, name in enumerate(names):
        (folder / "all" / name).mkdir(parents=True)
        numbers.fill_(1 + i / 1e6)
        (folder / "all" / name / weights.name).write_bytes(whole[:start] + numbers.numpy().tobytes())
        shutil.copy(config, folder / "all" / name)
    return names


def bank_part(load: Callable[[], nn.Module], repeats: int, count: int) -> dict:
    """Many adapters: memory, loading, batches, and access beyond what fits."""
    ours = IA3Model(load(), IA3Config(**TARGETS)).eval()
    ids = random_ids(ours, 16)
    score(ours, ids)
    results: dict = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = write_adapters(ours, folder, count)
        chance = random.Random(0)

        before = held(ids.device)
        bank = AdapterBank(
            ours, budget=(count + 1) * 4 * sum(v.numel() for v in get_peft_model_state_dict(ours).values())
        )
        for name in names[:10]:
            bank.load(folder / "all" / name, name)
        few = names[:10]

        def batch(among: list[str]) -> Callable[[], object]:
            return lambda: score(ours, ids, adapter_names=chance.choices(among, k=ROWS))

        with_few = interleaved({"10 resident": batch(few)}, repeats)
        took = []
        for name in names[10:]:
            started = time.perf_counter()
            bank.load(folder / "all" / name, name)
            synchronize()
            took.append(time.perf_counter() - started)
        row_bytes = 4 * bank.width
        results["bytes over vectors"] = (held(ids.device) - before) / (count * row_bytes)
        results["load ms"] = 1e3 * statistics.median(took)
        seconds = interleaved({"10 of them": batch(few), "all": batch(names)}, repeats)
        results["batch"] = against({**with_few, **seconds}, "10 resident")
        picks = [chance.choices(names, k=ROWS) for _ in range(50)]
        synchronize()
        started = time.perf_counter()
        for asked in picks:
            bank.gather(asked)
        synchronize()
        results["gather ms"] = 1e3 * (time.perf_counter() - started) / len(picks)

        results["share resident"] = {}
        for share in (1.0, 0.5, 0.25, 0.1):
            del bank
            gc.collect()
            bank = AdapterBank(ours, budget=(int(share * count) + 1) * row_bytes)
            bank.register(folder / "all")
            for start in range(0, count, ROWS):  # from here on, what fits is resident
                bank.gather(names[start : start + ROWS])
            gathered = interleaved({"gather": lambda bank=bank: bank.gather(chance.choices(names, k=ROWS))}, 20)
            scored = interleaved({"batch": batch(names)}, repeats)
            results["share resident"][share] = {
                "gather ms": 1e3 * statistics.median(gathered["gather"]),
                "rows a second": ROWS / statistics.median(scored["batch"]),
            }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--parts", default="batch,bank")
    parser.add_argument(
        "--adapterhub", metavar="PYTHON", help="interpreter of an environment with the package adapters"
    )
    add_model_options(parser)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.adapters < 10 * ROWS:
        parser.error(
            f"--adapters: expected {10 * ROWS} or more, of which a tenth fill a batch, found {options.adapters}"
        )

    def load() -> nn.Module:
        return load_base(options.model, dtype="stored")[0].to(options.device)

    parts = options.parts.split(",")
    results: dict = {}
    if "batch" in parts:
        results |= batch_part(load, options.repeats)
    if options.adapterhub:
        results["AdapterHub"] = adapterhub_part(options.adapterhub, options.model, options.device, options.repeats)
    if "bank" in parts:
        results["bank"] = bank_part(load, options.repeats, options.adapters)
    print(json.dumps(results, indent=2) if options.json else "\n".join(lines(results)))


def lines(results: dict, indent: str = "") -> list[str]:
    """The results as an indented list."""
    text = []
    for key, value in results.items():
        if isinstance(value, dict):
            text += [f"{indent}{key}:", *lines(value, indent + "  ")]
        else:
            text.append(f"{indent}{key}: {value:.4g}")
    return text


if __name__ == "__main__":
    main()
