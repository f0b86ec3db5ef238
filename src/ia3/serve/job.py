"""Long work for a project, as a process of its own, which `Background` starts.

So other requests are answered as fast as before, the work can be ended at any time, and its memory is free again behind it. The
job is a line of JSON on standard input, which stays open: the process ends when whoever started it does. Standard output has a
line of JSON for each step, and at last `{"result": …}` or `{"problem": "one line"}`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import threading
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ia3.errors import InputError, reason
from ia3.evaluation.progress import Progress, Stage
from ia3.files import replacing

# Requests go first where there are more threads than processors.
_NICENESS = 5

# Seconds between two lines about a stage.
_APART = 0.2

# So many rows of a label are trained on at most, drawn at random: more take long, and teach little.
_MOST_OF_A_LABEL = 64

Tell = Callable[[dict[str, Any]], None]


class Told(Progress):
    """Progress as lines of JSON.

    Args:
        tell: writes a line.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        self._tell({"stage": text, "done": 0, "total": 0, "note": ""})
        yield

    def stage(self, title: str, total: int, done: int = 0) -> Stage:
        return _Line(self._tell, title, total, done)


class _Line(Stage):
    def __init__(self, tell: Tell, title: str, total: int, done: int) -> None:
        self._tell, self._title, self._total, self._done, self._note = tell, title, total, done, ""
        self._told = 0.0
        self._show(True)

    def advance(self, count: int) -> None:
        self.reach(self._done + count)

    def reach(self, done: int) -> None:
        self._done = done
        self._show(done >= self._total)

    def note(self, text: str) -> None:
        self._note = text
        self._show(False)

    def end(self) -> None:
        self._total = self._done
        self._show(True)

    def _show(self, now: bool) -> None:
        if now or time.monotonic() - self._told > _APART:
            self._told = time.monotonic()
            self._tell({"stage": self._title, "done": self._done, "total": self._total, "note": self._note})


def read(texts: Sequence[str], model: str, dtype: str, output: str, progress: Progress) -> dict[str, Any]:
    """Write the embeddings of texts to a .npy file."""
    import numpy as np

    from ia3.evaluation.suggesting import embeddings_of

    found = embeddings_of(texts, model, dtype=dtype, progress=progress)
    with replacing(output) as temporary:
        np.save(temporary, found.astype(np.float32))
    return {}


def train(
    name: str,
    rows: Sequence[dict[str, Any]],
    column: str,
    label_column: str,
    model: str,
    dtype: str,
    output: str,
    progress: Progress,
) -> dict[str, Any]:
    """Train an adapter as `ia3 train` does, and zip its folder.

    Args:
        name: of its task.
        rows: with a text and a label.
        column, label_column: where they are.
        model, dtype: as of `Experiment`.
        output: a folder, which gets `adapter` and `adapter.zip`.
        progress: told of the steps.

    Returns:
        How good it is: the fields of `Measured`.
    """
    from ia3.evaluation.experiment import Experiment
    from ia3.task.task import Task

    taken: Counter[str] = Counter()
    examples = []
    for row in random.Random(0).sample(rows, len(rows)):
        taken[row[label_column]] += 1
        if taken[row[label_column]] <= _MOST_OF_A_LABEL:
            examples.append(row)
    folder = Path(output, "adapter")
    task = Task.infer(examples, label_column, column, name=name)
    experiment = Experiment(task, examples, folder=folder, model=model, dtype=dtype, examples_per_label=0)
    results = experiment.run(progress).results
    with zipfile.ZipFile(Path(output, "adapter.zip"), "w", zipfile.ZIP_DEFLATED) as zipped:
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                zipped.write(path, f"{name}/{path.name}")
    most = Counter(row[label_column] for row in examples).most_common(1)[0][1]
    accuracy = results.get("cross_validation", {}).get("accuracy")
    counted = {"labelled": len(rows), "examples": len(examples)}
    return {**counted, "accuracy": accuracy, "majority": most / len(examples)}


def main() -> None:
    """Do the job on standard input."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not for whoever reads the lines

    def tell(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError, AttributeError):
        os.nice(_NICENESS)
    kind = job.pop("kind")
    try:
        tell({"result": {"read": read, "train": train}[kind](**job, progress=Told(tell))})
    except InputError as error:
        tell({"problem": str(error)})
    except Exception as error:
        frames = [f"{each.filename}:{each.lineno}" for each in traceback.extract_tb(error.__traceback__)[-12:]]
        tell({"problem": f"It ended by an error: {reason(error)}", "error": type(error).__name__, "frames": frames})


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
