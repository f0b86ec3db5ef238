"""Tasks whose answers are texts, on NLU++: the recipe `generate` by cross-validation, and what it gives beside examples in context.

    python -m benchmarks.texts recipe --data DIR [--tasks banking,hotels,intents] [--folds 2] [--steps 60] [--rates 0.003,0.01]
    python -m benchmarks.texts table --data DIR [--tasks …] [--seeds 0,1,2] [--test-rows 40] [--shots 8]

DIR holds NLU++ (Casanueva et al. 2022, CC BY 4.0): `banking/fold0.json` to `fold4.json`, the same for `hotels`. Tasks:

- banking, hotels: the fields (slots) of the texts that have some.
- intents: the intents of hotels' texts in words, with commas between them: an answer in free words.

Rows are those of folds 0 to 3, in an order that the seed draws; fold 4 holds the test rows. `recipe` takes the first 64 rows of
seed 0 and learns from all but a part of them. It prints the likelihood loss of that part's answers (mean over answers and parts)
for each of the settings, and chooses nothing by test rows. `table` is `ia3 compare` with 64 examples.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

from transformers import set_seed

from ia3 import FreeText, Recipe
from ia3.adapter.pretrained import EMBEDDED_MODEL, load_base
from ia3.evaluation.comparison_text import TextComparison
from ia3.evaluation.running import with_adapters
from ia3.task.fields import Fields
from ia3.training.members import Member
from ia3.training.trainer import TFewTrainer

EXAMPLES = 64
MODULES = ["all-linear", "paper"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["recipe", "table"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default="banking,hotels,intents")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--steps", default="60")
    parser.add_argument("--rates", default="0.003,0.01,0.03")
    parser.add_argument("--modules", default=",".join(MODULES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--test-rows", type=int, default=40)
    parser.add_argument("--shots", type=int, default=8)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    print({"recipe": recipe, "table": table}[given.what](given))


def read(name: str, data: Path, seed: int) -> tuple[FreeText, list[Any], list[Any]]:
    """A task, its rows to learn from, in the seed's order, and its test rows."""
    folder = data / ("banking" if name == "banking" else "hotels")
    parts = [json.loads((folder / f"fold{part}.json").read_text(encoding="utf-8")) for part in range(5)]
    if name == "intents":
        parts = [[_with_intents(row) for row in part if row.get("intents")] for part in parts]
        task = FreeText.create({"name": name, "template": "{{ text }}\nIntents:", "answer": "{{ words }}"})
    else:
        fields = sorted({field for part in parts for row in part for field in row.get("slots", {})})
        parts = [[_with_fields(row, fields) for row in part if row.get("slots")] for part in parts]
        task = Fields.create({"name": name, "template": "{{ text }}\nDetails:", "fields": fields})
    rows = list(itertools.chain(*parts[:4]))
    return task, random.Random(seed).sample(rows, len(rows)), parts[4]


def _with_fields(row: Any, fields: list[str]) -> dict[str, Any]:
    return {"text": row["text"], **{field: row["slots"].get(field, {}).get("text") for field in fields}}


def _with_intents(row: Any) -> dict[str, str]:
    return {"text": row["text"], "words": ", ".join(intent.replace("_", " ") for intent in row["intents"])}


def recipe(given: argparse.Namespace) -> str:
    """The held-out loss of each of the settings on each task, as lines of a table."""
    settings = list(itertools.product(given.modules.split(","), given.rates.split(","), given.steps.split(",")))
    names = given.tasks.split(",")
    found: dict[tuple[str, ...], dict[str, float]] = {one: {} for one in settings}
    for name, one in itertools.product(names, settings):
        task, rows, _ = read(name, given.data, seed=0)
        modules, rate, steps = one
        fields = Recipe.generate().model_dump() | {"learning_rate": float(rate), "steps": int(steps)}
        chosen = Recipe.create(fields | {"target_modules": None if modules == "paper" else modules})
        started = time.perf_counter()
        losses = [held_out(task, rows[:EXAMPLES], chosen, part, given.folds) for part in range(given.folds)]
        found[one][name] = statistics.mean(losses)
        parts = ", ".join(f"{loss:.3f}" for loss in losses)
        print(f"{name}, {', '.join(one)}: {parts} ({time.perf_counter() - started:.0f} s)", flush=True)
    lines = [f"| {' | '.join(one)} | " + " | ".join(f"{its[name]:.3f}" for name in names) for one, its in found.items()]
    return "\n".join(lines)


def held_out(task: FreeText, rows: list[Any], recipe: Recipe, part: int, parts: int) -> float:
    """The likelihood loss of one part of the rows, with an adapter that learned from the others."""
    base, tokenizer = load_base(EMBEDDED_MODEL)
    set_seed(part)
    model = with_adapters(base, {"default": "start"}, recipe)
    member = Member(task, [row for index, row in enumerate(rows) if index % parts != part], eval_rows=rows[part::parts])
    with tempfile.TemporaryDirectory() as folder:
        arguments = recipe.training_arguments(folder, seed=part, disable_tqdm=True)
        trainer = TFewTrainer(model, arguments, tokenizer, member, recipe)
        trainer.silence()
        trainer.train()
        return trainer.evaluate()["eval_loss"]


def table(given: argparse.Namespace) -> str:
    """The headline metric of the untrained model, of examples in context and of a trained adapter, as lines of a table."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, seed in itertools.product(given.tasks.split(","), map(int, given.seeds.split(","))):
        task, rows, test = read(name, given.data, seed)
        base, tokenizer = load_base(EMBEDDED_MODEL)
        test = random.Random(0).sample(test, min(given.test_rows, len(test)))
        comparison = TextComparison(base, tokenizer, task, rows[:EXAMPLES], test, Recipe.generate(), seed)
        for row in comparison.run(comparison.shots([given.shots])):
            found[name, row["method"]].append(row[task.metric])
            print(
                f"{name} seed {seed}, {row['method']}: {row[task.metric]:.3f}, {row['seconds']:.2f} s a row", flush=True
            )
    return "\n".join(
        f"| {name} | {method} | {statistics.mean(scores):.1%} | {statistics.pstdev(scores):.1%} |"
        for (name, method), scores in found.items()
    )


if __name__ == "__main__":
    main()
