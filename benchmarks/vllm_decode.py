"""Decode throughput of SmolLM2-135M in vLLM: a batch of (IA)³ adapters against the base engine and against LoRA.

Each engine lives in a process of its own. Beside the base engine one other at a time is there; the two run in turn, one
batch each, and are compared within each turn.

- base: vLLM without adapters, and without this package's plugin, as are the LoRA engines
- (IA)³ only: adapters in turn over the requests, in an engine started with `ia3_only`
- (IA)³: the same in an engine that takes LoRA adapters too, none of which is in the batch
- LoRA: rank 8 on the same modules
- LoRA idle: an engine that takes LoRA adapters, requests without one

    python benchmarks/vllm_decode.py [--requests 16] [--tokens 32] [--adapters 4] [--repeats 15] [--dtype float32] [--json]

needs the environment of docs/vllm.md. Ratios are medians over turns of base / engine, by CPU time (which other work on
the machine disturbs less) and by wall time; the interquartile range says what they are worth.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TARGETS = ["k_proj", "v_proj", "down_proj"]
ENGINES = ("(IA)³ only", "(IA)³", "LoRA", "LoRA idle")

Seconds = tuple[float, float]
"""Of CPU, and by the clock."""


def write_adapters(folder: Path, count: int) -> str:
    """Random adapters of both kinds, as PEFT writes them; returns the base model's folder."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from ia3.adapter.pretrained import find_base

    base = find_base("smollm2")[1]
    torch.manual_seed(0)
    ia3 = peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], init_ia3_weights=False)
    lora = peft.LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False)
    for kind, config in (("ia3", ia3), ("lora", lora)):
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        for number in range(count):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "ia3_l" in name:
                        parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
                    elif "lora_" in name:
                        parameter.copy_(0.01 * torch.randn_like(parameter))
            model.save_pretrained(folder / kind / str(number))
    return base


def engine(name: str, base: str, folder: Path, options: argparse.Namespace, pipe: Any) -> None:
    """One engine: a batch each time that it is asked, and the seconds (CPU, wall) that it took."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_PLUGINS="ia3" if name.startswith("(IA)³") else "",
    )
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    torch.set_num_threads(1)
    settings: dict[str, Any] = {}
    if name != "base":
        settings = {"enable_lora": True, "max_loras": options.adapters, "lora_target_modules": TARGETS}
        settings["max_lora_rank"] = 1 if name == "(IA)³ only" else 8
        settings["additional_config"] = {"ia3_only": True} if name == "(IA)³ only" else {}
    llm = LLM(
        base,
        dtype=options.dtype,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=options.requests,
        enable_prefix_caching=False,
        **settings,
    )
    kind = {"(IA)³ only": "ia3", "(IA)³": "ia3", "LoRA": "lora"}.get(name)
    requests = [
        LoRARequest(f"{kind}-{number}", number + 1, str(folder / kind / str(number))) if kind else None
        for number in (index % options.adapters for index in range(options.requests))
    ]
    prompts = [{"prompt_token_ids": [100 + index + offset for offset in range(8)]} for index in range(options.requests)]
    sampling = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True, detokenize=False)
    pipe.send("ready")
    while pipe.recv():
        started = time.process_time(), time.perf_counter()
        found = llm.generate(prompts, sampling, lora_request=requests if kind else None, use_tqdm=False)
        ended = time.process_time(), time.perf_counter()
        assert sum(len(each.outputs[0].token_ids) for each in found) == options.requests * options.tokens
        pipe.send((ended[0] - started[0], ended[1] - started[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    others = [name for name in options.engines.split(",") if name != "base"]
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[tuple[Seconds, Seconds]]] = {name: [] for name in others}
    with tempfile.TemporaryDirectory() as temporary:
        base = write_adapters(Path(temporary), options.adapters)

        @contextmanager
        def running(name: str) -> Iterator[Callable[[], Seconds]]:
            ours, theirs = context.Pipe()
            process = context.Process(target=engine, args=(name, base, Path(temporary), options, theirs))
            process.start()
            assert ours.recv() == "ready"

            def step() -> Seconds:
                ours.send(True)
                return ours.recv()

            yield step
            ours.send(False)
            process.join()

        with running("base") as plain:
            for name in others:
                with running(name) as step:
                    for repeat in range(options.repeats + 1):
                        pair = (plain(), step()) if repeat % 2 else (step(), plain())[::-1]
                        if repeat:
                            seconds[name].append(pair)
    tokens = options.requests * options.tokens
    results = {}
    for name, pairs in seconds.items():
        results[name] = {"tokens a second": tokens / statistics.median(ours[1] for _, ours in pairs)}
        for number, clock in enumerate(("CPU", "wall")):
            ratios = [base[number] / ours[number] for base, ours in pairs]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            results[name] |= {f"of base, {clock}": middle, f"{clock} quartiles": [low, high]}
    results["load average"] = list(os.getloadavg())  # type: ignore[assignment]
    if options.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
        return
    for name in others:
        cpu, wall = (results[name][f"of base, {clock}"] for clock in ("CPU", "wall"))
        low, high = results[name]["CPU quartiles"]
        speed = results[name]["tokens a second"]
        print(f"{name:12s} {speed:7.1f} tokens/s   of base: CPU {cpu:.3f} ({low:.3f} to {high:.3f}), wall {wall:.3f}")
    print("load average", *(f"{each:.1f}" for each in os.getloadavg()))


if __name__ == "__main__":
    main()
