"""A bank of a million adapters in one archive: registering it, gathering any of them, and memory.

The model is a Llama of two tiny layers, so that the vectors' own bytes hide nothing. Printed as JSON:

- write s: `write_archive` of random vectors, names included;
- archive MB, index MB: the file, and its part before the rows;
- register s: `AdapterBank.register`;
- gather ms: `AdapterBank.gather` of one uniformly random adapter, of which 1,000 are resident, median and 99th percentile;
  the same in the thread's own time, which other programs do not lengthen;
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
from collections.abc import Callable, Iterator
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


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def spread(work: Callable[[int], object], numbers: list[int]) -> dict[str, float]:
    """Milliseconds of `work` for each number."""
    walls, own = [], []
    for number in numbers:
        wall, thread = time.perf_counter(), time.thread_time()
        work(number)
        walls.append(1e3 * (time.perf_counter() - wall))
        own.append(1e3 * (time.thread_time() - thread))
    return {
        f"{name} {kind}": each
        for kind, values in (("wall", walls), ("thread", own))
        for name, each in (("median", statistics.median(values)), ("p99", statistics.quantiles(values, n=100)[-1]))
    }


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
        chance = random.Random(0)
        numbers = [chance.randrange(options.adapters) for _ in range(options.gathers)]
        row = torch.empty(bank.width)

        def gather(number: int) -> None:
            assert bank.gather([f"tenant-{number:07d}"])[0, 0] == number

        results["gather ms"] = spread(gather, numbers)
        with open(path, "rb") as file:

            def copy(number: int) -> None:
                file.seek(size - (number + 1) * row_bytes)
                file.readinto(memory(row))
                row.clone()

            results["copy ms"] = spread(copy, numbers)

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
