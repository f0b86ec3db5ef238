"""One T-Few training step of 8 examples on SmolLM2-135M in float32: ours, PEFT's, and the floor, in one process.

- PEFT: its IA3Model on the same modules; every (prompt + choice) a row of its own, padded to one batch, full logits,
  the same three losses. Beyond 128 rows, example by example: 8 examples of 77 choices at once did not
  fit into 24 GiB.
- floor: the frozen base model's forward and backward to its input embeddings, over the same packed tokens.

    python benchmarks/train_step.py [--repeats 3] [--choices 2,6,77] [--json]

Times are medians of interleaved repeats; memory is the most that a step adds to the resident set.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import random
import statistics
import threading
import time
from collections.abc import Callable

import peft
import psutil
import torch
from torch.nn import functional as F

from ia3 import IA3Config, IA3Model, load_base
from ia3.tfew.choices import Question, batches, collate, encode, plain_rows, token_log_probs
from ia3.tfew.losses import tfew_loss

EXAMPLES = 8
PLAIN = {2: ["great", "not great"], 6: ["joy", "anger", "sadness", "fear", "surprise", "no emotion"]}
VERBS = ["cancel", "activate", "change", "lost or stolen", "order a new", "question about my", "problem with a"]
THINGS = [
    "card", "transfer", "direct debit", "exchange rate", "cash withdrawal", "top up", "refund", "PIN", "account", "fee",
    "virtual card",
]  # fmt: skip


def answers(count: int) -> list[str]:
    """Answer choices of usual length: words for a few, phrases, as of bank customers' intents, for many."""
    phrases = [f"{verb} {thing}" for verb, thing in itertools.product(VERBS, THINGS)]
    return PLAIN.get(count, phrases[:count])


def questions(tokenizer, count: int) -> list[Question]:
    """Eight prompts: reviews of about 60 tokens; short customer queries when there are many choices."""
    chance = random.Random(0)
    words = [
        "the",
        "tea",
        "came",
        "late",
        "and",
        "I",
        "would",
        "not",
        "buy",
        "it",
        "again",
        "because",
        "my",
        "old",
        "one",
        "was",
        "so",
        "much",
        "better",
        "than",
        "this",
    ]
    length = 45 if count < 20 else 12
    prompts = [
        " ".join(chance.choices(words, k=length + chance.randrange(length // 3))) + "\nAnswer:" for _ in range(EXAMPLES)
    ]
    choices = [f" {text}" for text in answers(count)]
    return encode(tokenizer, prompts, [choices] * EXAMPLES, [chance.randrange(count) for _ in range(EXAMPLES)])


def our_step(model: IA3Model, asked: list[Question]) -> None:
    """A training step as `TFewTrainer` makes it, without the optimizer, which costs nothing."""
    losses = []
    for group in batches(asked):
        part = collate(model, [asked[i] for i in group])
        losses.append(tfew_loss(token_log_probs(model, part), part["mask"], part["label"]).total * len(group))
    (torch.stack(losses).sum() / len(asked)).backward()


def peft_step(model: torch.nn.Module, asked: list[Question]) -> None:
    """The same loss from padded rows and full logits, in as few passes as hold at most 128 rows each."""
    size = max(1, 128 // len(asked[0].choices))
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        (peft_loss(model, part) * (len(part) / len(asked))).backward()


def peft_loss(model: torch.nn.Module, asked: list[Question]) -> torch.Tensor:
    """T-Few's loss of one padded batch."""
    rows = plain_rows([Question(q.prompt, [[*choice, 0] for choice in q.choices], q.label) for q in asked])
    ids, mask = rows["input_ids"], rows["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits
    targets = torch.full_like(ids, -100)
    lengths = [(len(q.prompt), len(choice)) for q in asked for choice in q.choices]
    for row, (start, size) in enumerate(lengths):
        targets[row, start : start + size] = ids[row, start : start + size]
    found = -F.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="none", ignore_index=-100
    )
    count = len(asked[0].choices)
    shape = (len(asked), count, ids.shape[1] - 1)
    answered = (targets[:, 1:] != -100).view(shape)
    return tfew_loss(found.view(shape), answered, torch.tensor([q.label for q in asked])).total


def floor_step(model: torch.nn.Module, asked: list[Question]) -> None:
    """Forward and backward to the input embeddings, with no adapter, no loss, no gradient of a weight."""
    for group in batches(asked):
        part = collate(model, [asked[i] for i in group])
        embeddings = model.get_input_embeddings()(part["input_ids"]).detach().requires_grad_()
        inputs = {"attention_mask": part["attention_mask"], "position_ids": part["position_ids"]}
        model(
            inputs_embeds=embeddings, logits_to_keep=int(part["keep"]), use_cache=False, **inputs
        ).logits.sum().backward()


def measured(step: Callable[[], None]) -> tuple[float, float]:
    """Seconds of a step, and how many bytes it adds to the resident set at its peak."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    process, running = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not running.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    running.set()
    watcher.join()
    return seconds, peak - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--choices", default="2,6,77")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    frozen, tokenizer = load_base()
    frozen.requires_grad_(False)
    ours = IA3Model(load_base()[0], IA3Config())
    targets = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    theirs = peft.get_peft_model(load_base()[0], peft.IA3Config(**targets))
    results = []
    for count in map(int, options.choices.split(",")):
        asked = questions(tokenizer, count)
        steps = {
            "ours": lambda asked=asked: our_step(ours, asked),
            "PEFT": lambda asked=asked: peft_step(theirs, asked),
            "floor": lambda asked=asked: floor_step(frozen, asked),
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        memory: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():  # the self-check, and each one's first pages of memory
            step()
        for _ in range(options.repeats):
            for name, step in steps.items():
                took, added = measured(step)
                seconds[name].append(took)
                memory[name].append(added)
        time_of = {name: statistics.median(values) for name, values in seconds.items()}
        memory_of = {name: max(values) for name, values in memory.items()}
        gradients = [p.grad for model in (ours, theirs) for p in model.parameters() if p.grad is not None]
        half = len(gradients) // 2
        # Gradients have added up over a different number of steps: compare directions.
        a, b = (torch.cat([g.flatten() for g in part]) for part in (gradients[:half], gradients[half:]))
        ours.zero_grad()
        theirs.zero_grad()
        results.append(
            {
                "choices": count,
                "seconds": time_of,
                "peak_mb": {name: value / 1e6 for name, value in memory_of.items()},
                "peft_over_ours_time": time_of["PEFT"] / time_of["ours"],
                "peft_over_ours_memory": memory_of["PEFT"] / memory_of["ours"],
                "ours_over_floor_time": time_of["ours"] / time_of["floor"],
                "spread": {name: (min(values), max(values)) for name, values in seconds.items()},
                "gradient_cosine": float(F.cosine_similarity(a, b, dim=0)),
            }
        )
        if not options.json:
            print_row(results[-1], first=len(results) == 1)
    if options.json:
        print(json.dumps(results, indent=2))


def print_row(row: dict, first: bool) -> None:
    """One line of the table, after its head."""
    if first:
        print(
            "choices |  ours s (MB) |  PEFT s (MB) | floor s | PEFT/ours time | memory | ours/floor | gradients' cosine"
        )
    seconds, memory = row["seconds"], row["peak_mb"]
    print(
        f"{row['choices']:7d} | {seconds['ours']:5.2f} ({memory['ours']:5.0f}) | {seconds['PEFT']:5.1f} ({memory['PEFT']:5.0f}) "
        f"| {seconds['floor']:7.2f} | {row['peft_over_ours_time']:14.1f} | {row['peft_over_ours_memory']:6.1f} "
        f"| {row['ours_over_floor_time']:10.2f} | {row['gradient_cosine']:.6f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
