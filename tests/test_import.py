"""`import ia3` is light, and the config needs no torch."""

import subprocess
import sys

import pytest

import ia3


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "safetensors", "huggingface_hub")
LOADED = f"import sys; print([name for name in {HEAVY!r} if name in sys.modules])"


@pytest.mark.parametrize(
    "code",
    [
        "import ia3",
        "import ia3; dir(ia3); ia3.__version__",
        "import ia3; ia3.IA3Config(target_modules=['k'], task_type=ia3.TaskType.CAUSAL_LM).to_dict()",
        "import ia3; assert issubclass(ia3.InputError, ValueError)",
    ],
)
def test_light_names_load_no_heavy_library(code):
    assert run(f"{code}; {LOADED}") == "[]"


def test_config_round_trip_works_without_torch(tmp_path):
    """Not only unloaded: not there."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY!r}))  # importing any of them raises ImportError
from ia3 import IA3Config
IA3Config(target_modules=["v", "k", "wo"], feedforward_modules=["wo"]).save_pretrained({str(tmp_path)!r})
print(sorted(IA3Config.from_pretrained({str(tmp_path)!r}).target_modules))
"""
    assert run(code) == "['k', 'v', 'wo']"


@pytest.mark.parametrize("name", ia3.__all__)
def test_every_public_name_loads_and_is_listed(name):
    assert getattr(ia3, name) is not None
    assert name in dir(ia3)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        ia3.no_such_name  # noqa: B018


def test_peft_names_that_mean_the_same():
    assert ia3.PeftConfig is ia3.IA3Config


def test_tasks_are_read_without_torch(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,x\nb,y\n")
    code = f"""
from ia3 import Recipe, Task, few_shot, read_rows
rows = read_rows({str(tmp_path / "rows.csv")!r})
assert len(few_shot(rows, Task.infer(rows), 1)) == 2 and Recipe.small() and Task.load("rte")
import sys
print([name for name in ("torch", "transformers", "datasets", "huggingface_hub") if name in sys.modules])
"""
    assert run(code) == "[]"


def test_answering_loads_no_trainer():
    """Which takes as long to import as all the rest, for it imports peft where that is installed."""
    pytest.importorskip("fastapi")
    code = """
import sys
from ia3 import AdapterBank, IA3Model, load_base
from ia3 import Calibration, Prefix, predict, predict_in_context, score_choices
import ia3.serve.app, ia3.serve.local
print([name for name in ("transformers.trainer", "peft") if name in sys.modules])
"""
    assert run(code) == "[]"
