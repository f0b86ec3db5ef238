"""Files that anybody may have made, with anything in them: each is read, or refused in one short line; nothing else.

Mutations of good files: other bytes, and other values where a format has fields.
"""

import contextlib
import io
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ia3
from ia3 import IA3Config, InputError, Task
from ia3.adapter.convert import convert
from ia3.bank import AdapterBank
from ia3.cli import main
from ia3.folder import AdapterFolder
from ia3.task.reading import read_rows
from ia3.training.recipe import Recipe
from support import tiny

# Of a message.
LONGEST = 1000

ROWS = [{"text": "good tea", "label": "pos"}, {"text": 'bad\ncake, "cold"', "label": "neg"}]
TASK = {
    "name": "mood",
    "template": "{{ text }}\nMood:",
    "choices": {"pos": "good", "neg": "bad"},
    "aliases": {"1": "pos"},
    "train": "rows.csv",
    "truncate": ["text"],
    "example": {"text": "good tea", "label": "pos"},
}
CALIBRATION = {
    "temperature": 2.0, "rows": 8, "log_loss": 0.5, "log_loss_before": 0.7, "calibration_error": 0.1,
    "calibration_error_before": 0.2,
}  # fmt: skip
METRICS = {"steps": 3, "train_examples": 2, "train_seconds": 1.5, "trained_at_once": 1, "train_rows": ["ab", "cd"]}
ADAPTERHUB = {
    "config": {
        "alpha": 1, "architecture": "lora", "attn_matrices": ["k", "v"], "composition_mode": "scale", "leave_out": [],
        "output_lora": False, "r": 1, "use_gating": False,
    },
    "model_class": "BertForSequenceClassification", "model_name": "bert", "model_type": "bert", "name": "task",
    "version": "adapters.1.3.0",
}  # fmt: skip

MANY = settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)

# What has broken readers, or what is done with what they read.
NASTY = (
    b"9" * 5000, b"0x" + b"f" * 5000, b"a" * 5000, b"1e999", b"-1e999", b"NaN", b"-1",
    b"null", b"true", b"[]", b"{}", b'""', b"\\ud800", b'"\\ud800"', b"\\uDFFF", b"\0", b"\\u0000", b"\xff\xfe",
    b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x1b[31m", b"\r", b"\x85", "\u2028".encode(), b"&a [*a, *a]", b"*a",
    b"!!python/name:os.system", b"!!binary x", b"!!set {a, b}", b"2024-13-45", b"{{", b"{% for a in b %}" * 30,
    b"{{ " + b"(" * 3000, b"..", b"/", b"'", b'"', b": ", b"- ", b"\t", b"|||", b"F8_E4M3", b"I64", b"BOOL", b"F64",
)  # fmt: skip

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from(
        [
            10**20,
            -(10**20),
            10**400,
            10**4200,
            1e308,
            5e-324,
            1.5,
            "a" * 5000,
            "",
            "\ud800",
            "a\0b",
            "(",
            "\x1b[0m",
            "{{",
            "..",
        ]
    )
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def damaged(draw, good: bytes, file: str = "") -> bytes:
    """A file with other bytes in some places."""
    # Deeper than Python calls itself. PyYAML takes seconds for thousands of levels, and two calls for one.
    levels = 600 if file.endswith(".yaml") else 5000
    nasty = (b"[" * levels, b'{"a":' * levels, *NASTY)
    data = good
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 0, 1, 2, 8, 1000])))
        new = draw(st.sampled_from(nasty) | st.binary(max_size=8) | st.just(data[start : start + 100]))
        data = data[:start] + new + data[end:]
    return data


@st.composite
def changed(draw, good: dict[str, Any]) -> dict[str, Any]:
    """Fields with other values in some places, or other names."""
    found = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 2))):
        where = found
        key = draw(st.sampled_from([*where, "more"]))
        while isinstance(where.get(key), dict) and where[key] and draw(st.booleans()):
            where = where[key]
            key = draw(st.sampled_from([*where, "more"]))
        where[key] = draw(values)
    return found


def read_or_refused(read: Callable[[], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read()
        except InputError as error:
            message = str(error)
            assert message.isprintable() and len(message) <= LONGEST


@pytest.fixture(scope="module")
def base():
    return tiny.build("llama")


@pytest.fixture(scope="module")
def good(base, tmp_path_factory) -> dict[str, bytes]:
    """A good file of each kind, by its name."""
    folder = tmp_path_factory.mktemp("good")
    adapted = tiny.adapt("llama", ia3, base=base)
    adapted.save_pretrained(folder)
    torch.save(safetensors.torch.load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    adapted.unload()
    bank = new_bank()
    bank.load(folder, "one")
    bank.save_archive(folder / "archive")
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    torch.save({"encoder.layer.0.k.multi_lora_b": torch.ones(4, 1)}, folder / "finish.pt")
    texts = {
        "task.yaml": yaml.safe_dump(TASK),
        "recipe.yaml": yaml.safe_dump(Recipe.small().model_dump()),
        "calibration.json": json.dumps(CALIBRATION),
        "metrics.json": json.dumps(METRICS),
        "rows.csv": 'text,label\n"good tea",pos\n"bad\ncake",neg\n',
        "rows.tsv": "text\tlabel\ngood tea\tpos\n",
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    }
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} | {
        name: text.encode() for name, text in texts.items()
    }


@contextlib.contextmanager
def folder_of(files: dict[str, bytes]):
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            Path(name, file).write_bytes(content)
        yield Path(name)


# How each kind of file is read, and used as far as reading goes.


def use_adapter(folder: Path, base: Any) -> None:
    ia3.PeftModel.from_pretrained(base, folder).unload()


def new_bank() -> AdapterBank:
    targets, feedforward = tiny.TARGETS["llama"]
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward)
    return AdapterBank(ia3.IA3Model(tiny.build("llama"), {}), config)


def use_bank(folder: Path, base: Any) -> None:
    with contextlib.closing(new_bank()) as bank:
        bank.load(folder, "one")


def use_archive(folder: Path, base: Any) -> None:
    with contextlib.closing(new_bank()) as bank:
        bank.load_archive(folder / "archive")
        bank.gather(bank.names)


def use_task(folder: Path, base: Any) -> None:
    task = Task.from_file(folder / "task.yaml")
    task.prompt({"text": "tea", "label": "pos"}, 1)
    task.label({"text": "tea", "label": "pos"}, 1)
    task.save(folder / "again.yaml")
    assert Task.from_file(folder / "again.yaml") == task


def use_recipe(folder: Path, base: Any) -> None:
    Recipe.load(folder / "recipe.yaml").save(folder / "again.yaml")
    Recipe.load(folder / "again.yaml")


def use_calibration(folder: Path, base: Any) -> None:
    found = AdapterFolder(folder).calibration
    assert found is not None and found.temperature > 0


def use_metrics(folder: Path, base: Any) -> None:
    found = AdapterFolder(folder).metrics
    float(found.get("train_seconds") or 0)
    AdapterFolder(folder).seen()


def use_rows(name: str) -> Callable[[Path, Any], None]:
    def use(folder: Path, base: Any) -> None:
        rows = read_rows(folder / name)
        str(Task.infer(rows).prompt(rows[0], 1)).encode()

    return use


def use_tfew(folder: Path, base: Any) -> None:
    convert(folder / "finish.pt", folder / "out")


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
KINDS: dict[str, tuple[Callable[[Path, Any], None], str, tuple[str, ...]]] = {
    "config": (use_adapter, "adapter_config.json", ADAPTER),
    "tensors": (use_adapter, "adapter_model.safetensors", ADAPTER),
    "torch's": (use_adapter, "adapter_model.bin", ("adapter_config.json", "adapter_model.bin")),
    "config in a bank": (use_bank, "adapter_config.json", ADAPTER),
    "tensors in a bank": (use_bank, "adapter_model.safetensors", ADAPTER),
    "archive": (use_archive, "archive", ("archive",)),
    "task": (use_task, "task.yaml", ("task.yaml", "rows.csv")),
    "recipe": (use_recipe, "recipe.yaml", ("recipe.yaml",)),
    "calibration": (use_calibration, "calibration.json", ("calibration.json",)),
    "metrics": (use_metrics, "metrics.json", ("metrics.json", "task.yaml")),
    "CSV": (use_rows("rows.csv"), "rows.csv", ("rows.csv",)),
    "TSV": (use_rows("rows.tsv"), "rows.tsv", ("rows.tsv",)),
    "JSONL": (use_rows("rows.jsonl"), "rows.jsonl", ("rows.jsonl",)),
    "T-Few's": (use_tfew, "finish.pt", ("finish.pt",)),
}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@MANY
def test_other_bytes(kind, base, good, data):
    use, file, files = KINDS[kind]
    content = data.draw(damaged(good[file], file))
    with folder_of({name: good[name] for name in files} | {file: content}) as folder:
        read_or_refused(lambda: use(folder, base))


FIELDS: dict[str, dict[str, Any]] = {
    "config": {
        **IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]).to_dict(),
        "auto_mapping": {"base_model_class": "A", "parent_library": "transformers"},
    },
    "task": TASK,
    "recipe": Recipe.small().model_dump(),
    "calibration": CALIBRATION,
    "metrics": METRICS,
    "JSONL": ROWS[0],
}
FIELDS["config in a bank"] = FIELDS["config"]


@pytest.mark.parametrize("kind", FIELDS)
@given(data=st.data())
@MANY
def test_other_values(kind, base, good, data):
    """JSON is YAML, too."""
    use, file, files = KINDS[kind]
    content = json.dumps(data.draw(changed(FIELDS[kind]))).encode()
    with folder_of({name: good[name] for name in files} | {file: content}) as folder:
        read_or_refused(lambda: use(folder, base))


@given(data=st.data())
@MANY
def test_other_values_in_adapterhubs_config(data):
    tensors = io.BytesIO()
    torch.save({"bert.layer.0.key.loras.task.lora_B": torch.ones(4, 1)}, tensors)
    files = {
        "adapter_config.json": json.dumps(data.draw(changed(ADAPTERHUB))).encode(),
        "pytorch_adapter.bin": tensors.getvalue(),
    }
    with folder_of(files) as folder:
        read_or_refused(lambda: convert(folder, folder / "out"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where `datasets` keeps what it has read."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


@given(data=st.data())
@settings(MANY, max_examples=15)
def test_other_bytes_in_parquet(good, cache, data):
    with folder_of({"rows.parquet": data.draw(damaged(good["rows.parquet"]))}) as folder:
        read_or_refused(lambda: use_rows("rows.parquet")(folder, None))


# The command line.

COMMANDS = {
    "inspect": ("inspect {}", ADAPTER),
    "inspect --json": ("inspect {} --json", ADAPTER),
    "tasks show": ("tasks show {}/task.yaml", ("task.yaml", "rows.csv")),
    "tasks show --data": ("tasks show {}/task.yaml --data {}/rows.csv", ("task.yaml", "rows.csv")),
    "convert": ("convert {}/finish.pt --output {}/out", ("finish.pt",)),
}


@pytest.mark.parametrize("command", COMMANDS)
@given(data=st.data())
@settings(MANY, max_examples=12)
def test_the_command_line_says_it_in_one_line(command, good, data):
    line, files = COMMANDS[command]
    file = data.draw(st.sampled_from(files))
    content = data.draw(damaged(good[file], file))
    out, err = io.StringIO(), io.StringIO()
    with (
        folder_of({name: good[name] for name in files} | {file: content}) as folder,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        warnings.simplefilter("ignore")
        main([part.replace("{}", str(folder)) for part in line.split()])
    said = err.getvalue()
    assert ended.value.code in (0, None) or (ended.value.code == 2 and said.count("\n") == 1 and len(said) <= LONGEST)
    (out.getvalue() + said).encode()
