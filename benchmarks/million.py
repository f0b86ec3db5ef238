"""A bank of a million adapters in one archive: registering it, gathering any of them, and memory.

The model is a Llama of two tiny layers, so that the vectors' own bytes hide nothing. Printed as JSON:

- write s: `write_archive` of random vectors, names included;
- archive MB, index MB: the file, and its part before the rows;
- register s: `AdapterBank.register`;
- gather ms: `AdapterBank.gather` of one uniformly random adapter that is not resident, median and 99th percentile;
- copy ms: reading as many bytes at a random place of the same file into a row, and the row into a new tensor;
- unknown s: the error for a name that does not exist, with similar names;
- resident MB: the process' resident set (memory of its own, and with mapped pages of files) before registering, after
  it, and after all gathers. The bank has room for 1,000 adapters.

    python benchmarks/million.py [--adapters 1000000] [--gathers 20000]

A million adapters of SmolLM2-135M, of 57,600 numbers each, would take 230 GB; of 160 numbers they take 0.7 GB.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ia3 import AdapterBank, IA3Config, IA3Model, InputError
from ia3.bank.archives import write_archive
from ia3.bank.layout import memory

_RESIDENT = 1000


def held() -> dict[str, float]:
    """Megabytes of the resident set."""
    found = psutil.Process().memory_info()
    return {"own": (found.rss - found.shared) / 1e6, "with mapped files": found.rss / 1e6}


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": 1e3 * statistics.median(seconds), "p99": 1e3 * statistics.quantiles(seconds, n=100)[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1_000_000)
    parser.add_argument("--gathers", type=int, default=20_000)
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=60, num_hidden_layers=2, **sizes))
    model = IA3Model(base, {})
    kind = IA3Config(task_type="CAUSAL_LM")
    row_bytes = AdapterBank(model, kind).statistics.row_bytes
    bank = AdapterBank(model, kind, budget=(_RESIDENT + 1) * row_bytes)

    def write(path: Path) -> None:
        names = [f"tenant-{number:07d}" for number in range(options.adapters)]
        write_archive(path, bank._layout, bank.config, names, rows())

    def rows() -> Iterator[torch.Tensor]:
        many = torch.randn(1024, bank.width)
        for number in range(options.adapters):
            many[number % 1024, 0] = number  # shows which adapter it is
            yield many[number % 1024]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "archive.safetensors")
        results: dict = {"write s": timed(lambda: write(path))}
        size = path.stat().st_size
        results["archive MB"] = size / 1e6
        results["index MB"] = (size - options.adapters * row_bytes) / 1e6
        before = held()
        results["register s"] = timed(lambda: bank.register(path))
        after = held()
        chance, took, copied = random.Random(0), [], []
        row = torch.empty(bank.width)
        with open(path, "rb") as file:
            for _ in range(options.gathers):
                number = chance.randrange(options.adapters)
                started = time.perf_counter()
                found = bank.gather([f"tenant-{number:07d}"])
                took.append(time.perf_counter() - started)
                assert found[0, 0] == number
                place = size - (chance.randrange(options.adapters) + 1) * row_bytes
                started = time.perf_counter()
                file.seek(place)
                file.readinto(memory(row))
                row.clone()
                copied.append(time.perf_counter() - started)
        results["gather ms"], results["copy ms"] = spread(took), spread(copied)

        def ask() -> None:
            try:
                bank.gather(["tenant-x"])
            except InputError as error:
                results["error"] = str(error)

        results["unknown s"] = timed(ask)
        results["resident MB"] = {"before": before, "registered": after, "gathered": held()}
        results["statistics"] = repr(bank)
        bank.close()
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
