"""Files of rows on Ray: a drill with a worker that is killed, and rows a second against the command without Ray.

    python -m benchmarks.ray_rows [--rows 1000000] [--files 20] [--compare 100000] [--json]

The model is a random Llama of two tiny layers, so that the machinery shows; each row names one of two adapters of two tasks.

- drill: `ia3 predict --ray local --workers 2` on all rows, in parquet files. When a third of the files is there, one of the workers is
  killed (SIGKILL). Then every row has to be in the output once, with an answer of its own adapter.
- compare: seconds for --compare rows and for a hundredth of them, with Ray's two workers of one thread each, and without Ray, two
  threads. The rate is that of the rows between the two, so that neither pays for its start. --compare 0 leaves it out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ia3 import IA3Config, IA3Model, Task

WORDS = [
    "the",
    "tea",
    "soup",
    "cake",
    "was",
    "lovely",
    "stale",
    "today",
    "review",
    ":",
    "answer",
    "good",
    "bad",
    "warm",
    "cold",
    "fine",
]
TASKS = {
    "taste": Task(name="taste", templates=["review : {{ text }} answer :"], choices={"good": "good", "bad": "bad"}),
    "heat": Task(name="heat", templates=["{{ text }} is"], choices={"warm": "warm", "cold": "cold", "fine": "fine"}),
}


def write_model(folder: Path) -> None:
    """A model that knows the words, and an adapter with random vectors for each task."""
    tokens = ["<pad>", "</s>", "<unk>", *WORDS]
    made = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokens), pad_token_id=0, eos_token_id=1, bos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name, task in TASKS.items():
        base = LlamaForCausalLM.from_pretrained(folder / "model")
        model = IA3Model(base, IA3Config(task_type="CAUSAL_LM", base_model_name_or_path=str(folder / "model")))
        with torch.no_grad():
            for parameter in model.adapter_parameters("default"):
                parameter.add_(torch.randn_like(parameter))
        model.save_pretrained(folder / "adapters" / name)
        task.save(folder / "adapters" / name / "task.yaml")


def write_rows(folder: Path, rows: int, files: int) -> None:
    """Short rows in parquet files."""
    folder.mkdir()
    names, generator = [*TASKS], torch.Generator().manual_seed(1)
    for number in range(files):
        ids = range(rows * number // files, rows * (number + 1) // files)
        chosen = torch.randint(len(WORDS), (len(ids), 6), generator=generator).tolist()
        table = {
            "id": [*ids],
            "adapter": [names[one % len(names)] for one in ids],
            "text": [" ".join(WORDS[word] for word in some) for some in chosen],
        }
        parquet.write_table(pyarrow.table(table), folder / f"{number:04}.parquet")


def predict(folder: Path, data: str, output: str, *arguments: str, threads: int | None = None) -> subprocess.Popen:
    """Start `ia3 predict`, whose threads are Ray's to decide where none are given."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "ia3", "predict", "adapters", "--adapter-column", "adapter", "--json"]
    command += ["--data", data, "--output", output, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen) -> str:
    """What a command printed; the benchmark ends if it failed."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(process.args)} failed")
    return out


def kill_a_worker(process: subprocess.Popen, done: Path, files: int, killed: list[int]) -> None:
    """Kill one of the workers that answer rows when so many files are done."""
    while process.poll() is None:
        if done.is_dir() and len(list(done.iterdir())) >= files:
            for child in psutil.Process(process.pid).children(recursive=True):
                if " ".join(child.cmdline()).startswith("ray::MapWorker"):
                    os.kill(child.pid, signal.SIGKILL)
                    killed.append(child.pid)
                    return
        time.sleep(0.05)


def drill(folder: Path, rows: int, files: int) -> dict[str, Any]:
    """Answer all rows while a worker is killed, and count them."""
    write_rows(folder / "rows", rows, files)
    started = time.perf_counter()
    process = predict(folder, "rows/*.parquet", "answered", "--ray", "local", "--workers", "2")
    killed: list[int] = []
    killer = threading.Thread(
        target=kill_a_worker, args=(process, folder / "answered" / ".job" / "done", max(1, files // 3), killed)
    )
    killer.start()
    said = json.loads(finished(process))
    seconds = time.perf_counter() - started
    killer.join()
    table = parquet.read_table(folder / "answered", columns=["id", "adapter", "prediction"])
    times = Counter(table.column("id").to_pylist())
    pairs = zip(table.column("adapter").to_pylist(), table.column("prediction").to_pylist(), strict=True)
    return {
        "rows": rows,
        "killed": len(killed),
        "lost": sum(number not in times for number in range(rows)),
        "twice": sum(count > 1 for count in times.values()),
        "without an answer of its adapter": sum(label not in (TASKS[name].labels or ()) for name, label in pairs),
        "errors": said["errors"],
        "seconds": seconds,
    }


def compare(folder: Path, rows: int) -> dict[str, Any]:
    """Rows a second with Ray and without."""
    seconds: dict[str, list[float]] = {"ray": [], "local": []}
    for count in (rows // 100, rows):
        name = f"compared-{count}"
        write_rows(folder / name, count, 1)
        for way, took in seconds.items():
            started = time.perf_counter()
            if way == "ray":
                finished(predict(folder, name, f"{name}-ray", "--ray", "local", "--workers", "2"))
            else:
                finished(predict(folder, f"{name}/0000.parquet", f"{name}.jsonl", threads=2))
            took.append(time.perf_counter() - started)
    rates = {way: (rows - rows // 100) / (took[1] - took[0]) for way, took in seconds.items()}
    return {"rows": rows, "seconds": seconds, "rows a second": rates, "ray / local": rates["ray"] / rates["local"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--compare", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        if options.rows:
            found["drill"] = drill(folder, options.rows, options.files)
        if options.compare:
            found["compare"] = compare(folder, options.compare)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for title, values in found.items():
        print(f"{title}: " + ", ".join(f"{key} {value}" for key, value in values.items()))


if __name__ == "__main__":
    main()
