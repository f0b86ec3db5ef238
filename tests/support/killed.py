"""Writers that are killed before each of their changes to the file system, in turn, and what is left: one JSON line each.

`main(folder)` needs a process of its own: `launched.together`.

What a killed process leaves is what is on the disk at that moment. So each writer runs once, and its folder is copied before
each change. In the middle a fork is killed indeed: it has to leave the same.
"""

import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ia3
from ia3 import AdapterBank, IA3Config, InputError, PeftModel, Recipe, Task
from ia3.adapter import convert
from ia3.evaluation.calibration import Calibration
from ia3.files import CONFIG_NAME, TEMPORARY, TORCH_WEIGHTS_NAME, WEIGHTS_NAME, new_folder
from ia3.folder import AdapterFolder
from ia3.serve.store import _exchange
from ia3.training.described import described
from support import tiny

QUALITY = dict.fromkeys(("log_loss", "log_loss_before", "calibration_error", "calibration_error_before"), 0.1)
FOREIGN = {"tokenizer.json": b"{}", "checkpoint-5/trainer_state.json": b"{}", "run.log": b"log", ".hidden": b"x"}


class Watch:
    """Calls a function before each change in a folder. There is one: Python keeps audit hooks for good."""

    def __init__(self) -> None:
        self._place, self._before = "", None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        before = self._before
        if before is None or not self._changes(event, arguments):
            return
        self._before = None
        before()
        self._before = before

    def _changes(self, event: str, arguments: tuple) -> bool:
        if event == "open":
            if not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return False
        elif event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"):
            return False
        return str(arguments[0]).startswith(self._place)

    def write(self, case: "Case", place: Path, before: Callable[[], Any]) -> None:
        """Let a writer write."""
        case.prepare(place)
        self._place, self._before = str(place), before
        case.write(place)
        self._before = None


def copies(watch: Watch, case: "Case", place: Path) -> list[Path]:
    """The folder before each of a writer's changes, and after the last."""
    made: list[Path] = []

    def copy() -> None:
        made.append(place.parent / str(len(made)))
        shutil.copytree(place, made[-1])

    watch.write(case, place, copy)
    copy()
    return made


def kill(watch: Watch, case: "Case", place: Path, nth: int) -> None:
    """Run a writer in a fork that is killed before its nth change."""
    counter = itertools.count()

    def change() -> None:
        if next(counter) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            raise RuntimeError("the writer was not killed")
        return
    try:
        watch.write(case, place, change)
    finally:
        os._exit(1)


@dataclass
class Case:
    """A writer.

    Attributes:
        before: makes what it finds.
        write: is killed, and then called again.
        state: what our readers find.
        plain: what programs find that do not know how we write; "none": nothing that they could use.
        prepare: what the writer does first, and is not killed at.
    """

    before: Callable[[Path], Any]
    write: Callable[[Path], Any]
    state: Callable[[Path], Any]
    plain: Callable[[Path], Any]
    prepare: Callable[[Path], Any] = lambda place: None

    def found(self, place: Path) -> tuple[Any, Any]:
        """What is there now."""
        return self.state(place), self.plain(place)


def base() -> Any:
    """A model to adapt."""
    return tiny.build("llama", **tiny.ONE_LAYER["llama"])


def adapted(seed: int, targets: list[str], feedforward: list[str], name: str, **beside: Any) -> Any:
    """A model whose adapter has been trained on a task of that name."""
    fields = {"target_modules": targets, "feedforward_modules": feedforward}
    model = tiny.adapt("llama", ia3, seed=seed, base=base(), **fields)
    task = Task.create({"name": name, "template": "{{ text }}", "choices": ["a", "b"]})
    found = described(task, Recipe.small(), [{"text": name, "label": "a"}], None)
    found._texts.update({key: value.to_json().encode() for key, value in beside.items()})
    model.adapter_folders["default"] = found
    return model


BOTH = ["k_proj", "v_proj", "down_proj"]
OLD = adapted(1, BOTH, ["down_proj"], "old", **{"calibration.json": Calibration(temperature=2.0, rows=3, **QUALITY)})
NEW = adapted(2, ["q_proj", "down_proj"], [], "new")
ALIKE = adapted(3, BOTH, ["down_proj"], "alike")


def old(place: Path) -> None:
    """An adapter, files of other people, and another adapter in a subfolder."""
    for name, data in FOREIGN.items():
        (place / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "out" / name).write_bytes(data)
    ALIKE.save_pretrained(place / "out" / "beside")
    OLD.save_pretrained(place / "out")


def adapter(place: Path) -> Any:
    """All of an adapter, as it loads, and other people's files."""
    folder = place / "out"
    if not (folder.exists() and AdapterFolder(folder).text(CONFIG_NAME)):
        return None
    loaded = PeftModel.from_pretrained(base(), AdapterFolder(folder))
    found = loaded.adapter_folders["default"]
    return [
        found.config.to_json(),
        {name: parameter.tolist() for name, parameter in tiny.adapter_parameters(loaded).items()},
        found.task and found.task.name,
        found.recipe.name,
        found.temperature,
        found.metrics,
        {name: (folder / name).is_file() and (folder / name).read_bytes().decode() for name in FOREIGN},
        (folder / "beside").exists() and AdapterFolder(folder / "beside").required_task().name,
    ]


def plain_adapter(place: Path) -> Any:
    """What PEFT would read."""
    folder = place / "out"
    if not (folder / CONFIG_NAME).exists():
        return "none"
    weights = [name for name in (WEIGHTS_NAME, TORCH_WEIGHTS_NAME) if (folder / name).exists()]
    return [(folder / CONFIG_NAME).read_text(), {name: (folder / name).read_bytes().hex() for name in weights}]


def archive(place: Path, seed: int) -> None:
    """Save a bank."""
    bank = AdapterBank(ia3.get_peft_model(base(), IA3Config()))
    generator = torch.Generator().manual_seed(seed)
    bank.add("a", {entry.key: torch.randn(entry.shape, generator=generator) for entry in bank.entries})
    bank.save_archive(place / "out")


def archived(place: Path) -> Any:
    """The file."""
    return (place / "out").read_bytes().hex()


def tfew(place: Path) -> None:
    """A file of T-Few's authors."""
    names = [f"decoder.block.0.layer.0.SelfAttention.{name}.multi_lora_b" for name in "kv"]
    torch.save(dict.fromkeys(names, torch.ones(4, 1)), place / "a.pt")


def converted(place: Path) -> Any:
    """Its adapter."""
    folder = place / "out"
    if not (folder.exists() and AdapterFolder(folder).text(CONFIG_NAME)):
        return None
    found, tensors, _ = AdapterFolder.whole(folder)
    return [found.config.to_json(), sorted(tensors)]


def come(place: Path) -> None:
    """An adapter's files come to a server."""
    NEW.save_pretrained(place / ".upload-1")


def upload(place: Path) -> None:
    """What a server does with them."""
    _exchange(str(place / ".upload-1"), str(place / "out"))


def merge(place: Path) -> None:
    """As `ia3 merge` writes a model."""
    with new_folder(place / "out") as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")


def merged(place: Path) -> Any:
    """The model."""
    return sorted(path.name for path in (place / "out").rglob("*")) if (place / "out").exists() else None


def nothing(place: Path) -> None:
    """No folder yet."""


def calibrate(place: Path) -> None:
    """As `ia3 evaluate --calibrate` does."""
    AdapterFolder(place / "out").calibrate(Calibration(temperature=3.0, rows=3, **QUALITY))


def save(model: Any, safe: bool = True) -> Callable[[Path], None]:
    """A writer of a model's adapter."""
    return lambda place: model.save_pretrained(place / "out", safe)


CASES = {
    "another config": Case(old, save(NEW), adapter, plain_adapter),
    "the same config": Case(old, save(ALIKE), adapter, plain_adapter),
    "another format": Case(old, save(NEW, False), adapter, plain_adapter),
    "no adapter yet": Case(nothing, save(NEW), adapter, plain_adapter),
    "calibrate": Case(old, calibrate, adapter, plain_adapter),
    "convert": Case(tfew, lambda place: convert.convert(place / "a.pt", place / "out"), converted, plain_adapter),
    "archive": Case(lambda place: archive(place, 1), lambda place: archive(place, 2), archived, archived),
    "upload": Case(old, upload, adapter, plain_adapter, come),
    "merge": Case(nothing, merge, merged, merged),
}


def named(left: Any, before: Any, after: Any) -> str:
    """What is left, in a word."""
    return "old" if left == before else "new" if left == after else "none" if left == "none" else "mixed"


def main(root: Path) -> None:
    """Kill, look, write again, look."""
    os.fsync = lambda handle: None  # type: ignore[assignment]  # no power fails here
    watch = Watch()
    for name, case in CASES.items():
        begun, place = root / name / "begun", root / name / "place"
        begun.mkdir(parents=True)
        case.before(begun)
        before = case.found(begun)
        shutil.copytree(begun, place)
        made = copies(watch, case, place)
        for nth, copy in enumerate(made):
            killed = nth < len(made) - 1
            alike = None
            if nth == len(made) // 2:
                shutil.rmtree(place)
                shutil.copytree(begun, place)
                kill(watch, case, place, nth)
                alike = case.found(place)
            shutil.rmtree(place)
            copy.rename(place)
            left = after = case.found(place)
            refused = ""
            if killed:
                try:
                    case.prepare(place)
                    case.write(place)
                except (InputError, OSError) as error:
                    refused = str(error)
                after = case.found(place)
            print(
                json.dumps(
                    {
                        "case": name,
                        "killed": killed,
                        "alike": alike and alike == left,
                        "state": named(left[0], before[0], after[0]),
                        "plain": named(left[1], before[1], after[1]),
                        "differs": before[0] != after[0],
                        "refused": refused,
                        "leftovers": [str(path.relative_to(place)) for path in place.rglob(f"{TEMPORARY}*")],
                    }
                ),
                flush=True,
            )
