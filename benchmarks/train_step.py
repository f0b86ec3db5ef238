"""One T-Few training step of 8 examples in float32, on SmolLM2-135M unless told otherwise: ours, PEFT's, and the floor, in one process.

It runs on the GPU, where there is one (`--device`).

- PEFT: its IA3Model on the same modules; every (prompt + choice) a row of its own, padded to one batch, full logits,
  the same three losses. Beyond 128 rows, example by example: 8 examples of 77 choices at once did not
  fit into 24 GiB.
- floor: the frozen base model's forward and backward to its input embeddings, over the same packed tokens.

With `--family t5`, on a random T5 of t5-small's size; PEFT's side is as in the code of T-Few's authors: the encoder runs
once for each example and its states are repeated for each choice, a padded row of the decoder.
With `--score`, scoring prompts of about 500 tokens without gradients, in place of training; the floor is the prompts alone.
With `--task NAME`, prompts and choices of an embedded task, made of its example's words: `--task ade_corpus_v2` has RAFT's
long instruction in front of each row. The floor reads what all prompts share once, and the rest without it.

    python benchmarks/train_step.py [--family smollm2|t5] [--score] [--task NAME] [--repeats 3] [--choices 2,6,77] [--examples 8]
        [--model smollm2] [--device cuda|cpu] [--json]

Times are medians of interleaved repeats; memory is the most that a step adds to the resident set, on a GPU to what torch
has allocated there.
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
from dataclasses import replace

import peft
import psutil
import torch
import transformers
from jobs.peers import padded_log_probs
from timing import add_model_options, synchronize
from torch.nn import functional as F

from ia3 import IA3Config, IA3Model, Scorer, Task, load_base
from ia3.scoring.batch import Batch, groups, normalized_scores, prompts_of, to_device
from ia3.scoring.beginning import common_tokens
from ia3.scoring.decoder import Decoder
from ia3.scoring.encoder_decoder import decoder_positions
from ia3.scoring.question import Question
from ia3.training.losses import tfew_loss

T5 = {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "vocab_size": 32128, "decoder_start_token_id": 0}
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


def questions(decoder: Decoder, count: int, examples: int, score: bool) -> list[Question]:
    """Prompts: reviews of about 60 tokens; short customer queries when there are many choices; long ones to score."""
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
    length = 430 if score else 45 if count < 20 else 12
    prompts = [
        " ".join(chance.choices(words, k=length + chance.randrange(length // 3))) + "\nAnswer:" for _ in range(examples)
    ]
    choices = [f" {text}" for text in answers(count)]
    labels = [chance.randrange(count) for _ in range(examples)]
    return decoder.ask(prompts, decoder.prompt_tokens(prompts), [choices] * examples, labels)


def questions_of(name: str, scorer: Scorer, examples: int) -> list[Question]:
    """An embedded task's questions about rows of 10 to 35 words, drawn from those of its example."""
    chance, task = random.Random(0), Task.embedded(name)
    assert task.example is not None
    columns = [key for key in task.columns if key != task.label_column]
    words = " ".join(str(task.example[key]) for key in columns).split()
    rows = [
        {**task.example, **{key: " ".join(chance.choices(words, k=chance.randint(10, 35))) for key in columns}}
        for _ in range(examples)
    ]
    return scorer.questions(task.wordings(rows))


def for_t5(asked: list[Question]) -> list[Question]:
    """The same with tokens that a T5 has, and closed."""

    def closed(tokens: list[int]) -> list[int]:
        return [*(token % 32000 + 100 for token in tokens), 1]

    return [Question(closed(q.prompt), [closed(choice) for choice in q.choices], q.label) for q in asked]


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model computes."""
    return next(model.parameters()).device


def our_step(scorer: Scorer, asked: list[Question]) -> None:
    """A training step as `TFewTrainer` makes it, without the optimizer, which costs nothing."""
    for group, part in scorer.training_batches(asked):
        part = to_device(part, device_of(scorer.model))
        loss = tfew_loss(scorer.log_probs(part), part["mask"], part["label"]).total
        (loss * len(group) / len(asked)).backward()


def our_scores(scorer: Scorer, asked: list[Question]) -> None:
    """Scores as `score_choices` computes them."""
    with torch.inference_mode():
        for _, part in scorer.batches(asked):
            part = to_device(part, device_of(scorer.model))
            normalized_scores(scorer.log_probs(part), part["mask"])


def peft_scores(model: torch.nn.Module, asked: list[Question]) -> None:
    """The same scores from padded rows and full logits, example by example."""
    with torch.inference_mode():
        for question in asked:
            peft_loss(model, [question])


def peft_step(model: torch.nn.Module, asked: list[Question]) -> None:
    """The same loss from padded rows and full logits, in as few passes as hold at most 128 rows each."""
    size = max(1, 128 // len(asked[0].choices))
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        (peft_loss(model, part) * (len(part) / len(asked))).backward()


def peft_loss(model: torch.nn.Module, asked: list[Question]) -> torch.Tensor:
    """T-Few's loss of one padded batch."""
    if model.config.is_encoder_decoder:
        return peft_t5_loss(model, asked)
    found, answered = padded_log_probs(model, [(q.prompt, q.choices, q.label or 0) for q in asked])
    return tfew_loss(found, answered, torch.tensor([q.label for q in asked], device=found.device)).total


def peft_t5_loss(model: torch.nn.Module, asked: list[Question]) -> torch.Tensor:
    """T-Few's loss with a decoder row for each choice, before which the encoder's states are repeated."""
    device = device_of(model)
    prompts = to_device(prompts_of(asked, 0), device)
    count, longest = len(asked[0].choices), max(len(choice) for q in asked for choice in q.choices)
    rows = [choice + [-100] * (longest - len(choice)) for q in asked for choice in q.choices]
    targets = torch.tensor(rows, device=device)
    inputs = F.pad(targets[:, :-1].clamp(min=0), (1, 0))
    known = model.get_encoder()(**prompts).last_hidden_state.repeat_interleave(count, 0)
    logits = model(
        encoder_outputs=(known,),
        attention_mask=prompts["attention_mask"].repeat_interleave(count, 0),
        decoder_input_ids=inputs,
        decoder_attention_mask=(targets != -100).long(),
    ).logits
    found = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    shape = (len(asked), count, longest)
    labels = torch.tensor([q.label for q in asked], device=device)
    return tfew_loss(found.view(shape), (targets != -100).view(shape), labels).total


def shared_tokens(asked: list[Question]) -> int:
    """How many tokens all prompts begin with, where there are enough to speak of."""
    size = common_tokens([question.prompt for question in asked])
    return size if size >= 8 else 0


def floor_parts(scorer: Scorer, asked: list[Question]) -> list[Batch]:
    """The fewest tokens: what prompts share by itself, and rows without it."""
    before = shared_tokens(asked)
    rows = [replace(question, prompt=question.prompt[before:]) for question in asked]
    alone = [[Question(asked[0].prompt[:before], [[0]], 0)]] if before else []
    parts = [scorer.collate(some) for some in alone + [[rows[i] for i in group] for group in groups(rows)]]
    return [to_device(part, device_of(scorer.model)) for part in parts]


def floor_step(scorer: Scorer, asked: list[Question]) -> None:
    """Forward and backward to the input embeddings, with no adapter, no loss, no gradient of a weight."""
    model = scorer.model
    for part in floor_parts(scorer, asked):
        embeddings = model.get_input_embeddings()(part["input_ids"]).detach().requires_grad_()
        if "decoder_input_ids" in part:
            inputs = {key: part[key] for key in ("attention_mask", "decoder_input_ids", "decoder_attention_mask")}
            with decoder_positions(model, part["decoder_position_ids"]):
                model(inputs_embeds=embeddings, use_cache=False, **inputs).logits.sum().backward()
            continue
        inputs = {"attention_mask": part["attention_mask"], "position_ids": part["position_ids"]}
        model(
            inputs_embeds=embeddings, logits_to_keep=torch.arange(-int(part["keep"]), 0), use_cache=False, **inputs
        ).logits.sum().backward()


def floor_scores(scorer: Scorer, asked: list[Question]) -> None:
    """The prompts' forward pass alone, one by one, without padding and with the last position's logits."""
    with torch.inference_mode():
        before = shared_tokens(asked)
        for prompt in [asked[0].prompt[:before]] * bool(before) + [question.prompt[before:] for question in asked]:
            ids = torch.tensor([prompt], device=device_of(scorer.model))
            scorer.model(input_ids=ids, logits_to_keep=1, use_cache=False)


def bases(family: str, name: str, device: torch.device) -> Callable[[], torch.nn.Module]:
    """What makes the base model, the same each time."""

    def t5() -> torch.nn.Module:
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).eval().to(device)

    return t5 if family == "t5" else lambda: load_base(name, dtype="stored")[0].to(device)


def measured(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds of a step, and how many bytes it adds at its peak: to the resident set, or to what torch has on a GPU."""
    return measured_on_gpu(step) if device.type == "cuda" else measured_on_processor(step)


def measured_on_gpu(step: Callable[[], None]) -> tuple[float, float]:
    """As `measured`."""
    gc.collect()
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - started, torch.cuda.max_memory_allocated() - before


def measured_on_processor(step: Callable[[], None]) -> tuple[float, float]:
    """As `measured`."""
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
    parser.add_argument("--family", choices=["smollm2", "t5"], default="smollm2")
    parser.add_argument("--score", action="store_true")
    parser.add_argument("--task")
    parser.add_argument("--examples", type=int, default=8)
    add_model_options(parser)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    if options.family == "t5" and (options.score or options.task):
        parser.error("--score and --task measure SmolLM2")
    t5 = options.family == "t5"
    base, tokenizer = bases(options.family, options.model, options.device), load_base(options.model, dtype="stored")[1]
    frozen = Scorer(base().requires_grad_(False), tokenizer)
    ours = IA3Model(base(), IA3Config())
    scorer = Scorer(ours, tokenizer)
    feedforward = "wo" if t5 else "down_proj"
    targets = {"target_modules": [*(("k", "v") if t5 else ("k_proj", "v_proj")), feedforward]}
    theirs = peft.get_peft_model(base(), peft.IA3Config(feedforward_modules=[feedforward], **targets))
    our, their, bare = (our_scores, peft_scores, floor_scores) if options.score else (our_step, peft_step, floor_step)
    results = []
    for count in [0] if options.task else map(int, options.choices.split(",")):
        if options.task:
            asked = questions_of(options.task, frozen, options.examples)
        else:
            asked = questions(Decoder(frozen.model, tokenizer), count, options.examples, options.score)
            asked = for_t5(asked) if t5 else asked
        steps = {
            "ours": lambda asked=asked: our(scorer, asked),
            "PEFT": lambda asked=asked: their(theirs, asked),
            "floor": lambda asked=asked: bare(frozen, asked),
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        memory: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():  # the self-check, and each one's first pages of memory
            step()
        for _ in range(options.repeats):
            for name, step in steps.items():
                took, added = measured(step, options.device)
                seconds[name].append(took)
                memory[name].append(added)
        time_of = {name: statistics.median(values) for name, values in seconds.items()}
        memory_of = {name: max(values) for name, values in memory.items()}
        gradients = [p.grad for model in (ours, theirs) for p in model.parameters() if p.grad is not None]
        half = len(gradients) // 2
        # Gradients have added up over a different number of steps: compare directions.
        a, b = (
            torch.cat([g.flatten() for g in part]) if part else torch.ones(1)
            for part in (gradients[:half], gradients[half:])
        )
        ours.zero_grad()
        theirs.zero_grad()
        results.append(
            {
                "choices": len(asked[0].choices),
                "seconds": time_of,
                "peak_mb": {name: value / 1e6 for name, value in memory_of.items()},
                "peft_over_ours_time": time_of["PEFT"] / time_of["ours"],
                "peft_over_ours_memory": memory_of["PEFT"] / memory_of["ours"],
                "ours_over_floor_time": time_of["ours"] / time_of["floor"],
                "spread": {name: (min(values), max(values)) for name, values in seconds.items()},
                "gradient_cosine": None if options.score else float(F.cosine_similarity(a, b, dim=0)),
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
        f"| {row['ours_over_floor_time']:10.2f} | {'' if row['gradient_cosine'] is None else format(row['gradient_cosine'], '.6f')}",
        flush=True,
    )


if __name__ == "__main__":
    main()
