"""For benchmarks/mixed.py, in an environment with the package `adapters`: BatchSplit, a different adapter for each row.

    python adapterhub_batchsplit.py MODEL DEVICE ROWS TOKENS NEW REPEATS

Prints one line of JSON: seconds of each repeat, scoring and generating, with BatchSplit and without adapters.
"""

import contextlib
import json
import sys
import time

import adapters
import torch
from adapters.composition import BatchSplit
from transformers import AutoModelForCausalLM


def main() -> None:
    folder, device, *numbers = sys.argv[1:]
    rows, tokens, new, repeats = map(int, numbers)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapters.init(model)
    names = [f"a{i}" for i in range(rows)]
    for name in names:
        model.add_adapter(name, config="ia3")
    model.eval().to(device)
    ids = torch.randint(1000, 20000, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    split = BatchSplit(*names, batch_sizes=[1] * rows)

    def score() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def generate() -> None:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    def synchronize() -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    results = {}
    for kind, run in (("scoring", score), ("generating", generate)):
        seconds = {"without adapters": [], "BatchSplit": []}
        for repeat in range(repeats + 1):
            for name, active in (("without adapters", None), ("BatchSplit", split)):
                model.set_active_adapters(active)
                synchronize()
                started = time.perf_counter()
                run()
                synchronize()
                if repeat:
                    seconds[name].append(time.perf_counter() - started)
        results[kind] = seconds
    print(json.dumps(results))


if __name__ == "__main__":
    with contextlib.redirect_stderr(None):
        main()
