"""What an adapter costs: forward and backward against the merged model and PEFT.

SmolLM2-135M in float32, in one process, on the GPU where there is one (`--device`), times as medians of interleaved repeats:

- forward: 8 rows of 64 tokens, and one token a row after 64 cached ones, without gradients. Peer: the merged model.
- forward + backward: 8 rows of 64 tokens. Floor: the frozen base model, backward to its input embeddings.

    python benchmarks/overhead.py [--repeats 15] [--model smollm2] [--device cuda|cpu] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import peft
import torch
from timing import add_model_options, interleaved
from torch import nn

from ia3 import IA3Config, IA3Model, load_base

ROWS, TOKENS = 8, 64
TARGETS = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


def medians(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each step."""
    return {name: statistics.median(values) for name, values in interleaved(steps, repeats).items()}


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    """The same random vectors in ours and PEFT's."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if ".ia3_l." in name:
            parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def forward(model: nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    """A whole batch."""

    @torch.no_grad()
    def step() -> object:
        return model(input_ids=ids, use_cache=False)

    return step


def decode(model: nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    """One more token a row; the cache is cut back afterwards."""
    with torch.no_grad():
        cache = model(input_ids=ids).past_key_values

    @torch.no_grad()
    def step() -> object:
        result = model(input_ids=ids[:, :1], past_key_values=cache)
        cache.crop(-1)
        return result

    return step


def train(model: nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    """Forward and backward to what is trainable; to the input embeddings where nothing is."""
    frozen = not any(parameter.requires_grad for parameter in model.parameters())

    def step() -> None:
        if frozen:
            inputs = {"inputs_embeds": model.get_input_embeddings()(ids).detach().requires_grad_()}
        else:
            inputs = {"input_ids": ids}
        model(**inputs, use_cache=False).logits.logsumexp(-1).mean().backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    add_model_options(parser)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    def load() -> nn.Module:
        return load_base(options.model, dtype="stored")[0].to(options.device)

    base = load().requires_grad_(False)
    ours = randomized(IA3Model(load(), IA3Config(**TARGETS)))
    theirs = randomized(peft.get_peft_model(load(), peft.IA3Config(**TARGETS)))
    merged = randomized(IA3Model(load(), IA3Config(**TARGETS))).merge_and_unload()
    ids = torch.randint(1000, 20000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)).to(options.device)

    results = {}
    plain = {"ours": ours, "PEFT": theirs, "merged": merged}
    for name, kind in (("forward", forward), ("one token", decode)):
        results[name] = medians({key: kind(model, ids) for key, model in plain.items()}, options.repeats)
    trained = {"ours": ours, "PEFT": theirs, "floor": base}
    steps = {key: train(model, ids) for key, model in trained.items()}
    results["forward + backward"] = medians(steps, options.repeats)

    if options.json:
        print(json.dumps(results, indent=2))
        return
    for name, peer in (("forward", "merged"), ("one token", "merged"), ("forward + backward", "floor")):
        times = results[name]
        print(
            f"{name:20} ours/{peer} {times['ours'] / times[peer]:.3f}   PEFT/{peer} {times['PEFT'] / times[peer]:.3f}"
            f"   (ours {1e3 * times['ours']:.1f} ms)"
        )


if __name__ == "__main__":
    main()
