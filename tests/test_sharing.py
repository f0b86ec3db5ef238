"""Adapters go to the hub and come back, with all that their folders hold; their cards are true."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import numpy as np
import pytest
from huggingface_hub import ModelCard

from ia3 import AdapterFolder, Experiment, FewShotClassifier, IA3Config, InputError, Recipe, get_peft_model, load_base
from ia3.adapter.stored import OWN_NAMES
from ia3.cli import main
from ia3.files import HubMirror
from ia3.files.hub import _reach_hub
from ia3.serve.store import Store
from ia3.task.kinds import load_task
from support import hub as local_hub
from support import tiny, words
from support.paths import ROOT


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, and an adapter trained on it."""
    folder = tmp_path_factory.mktemp("sharing")
    words.save_model(folder / "model")
    words.write_csv(folder / "train.csv", words.rows(60))
    arguments = ["train", "--model", folder / "model", "--data", folder / "train.csv", "--steps", "4"]
    arguments += ["--template", words.TEMPLATE, "--choices", "pos=good,neg=not good", "--output", folder / "reviews"]
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert not ended.value.code
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that this process uses."""
    with local_hub.running(monkeypatch, tmp_path / "cache") as found:
        yield found


@pytest.fixture
def ia3(capsys, monkeypatch):
    """Runs the command line in this process: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def other(place, tmp_path):
    """A copy of the adapter's folder, to change."""
    return Path(shutil.copytree(place / "reviews", tmp_path / "other"))


def pushed(folder, name="owner/reviews", **options):
    return AdapterFolder(folder).push_to_hub(name, **options)


def test_an_adapter_goes_there_and_back(place, hub, ia3, tmp_path, monkeypatch):
    code, out, err = ia3("push", place / "reviews", "owner/reviews", "--json")
    assert code == 0, err
    repository = hub.repositories["owner/reviews"]
    assert json.loads(out)["url"] == f"{hub.url}/owner/reviews/commit/{repository.branches['main']}"
    sent = {path.name: path.read_bytes() for path in (place / "reviews").iterdir()}
    del sent["report.html"]  # with texts of rows
    assert sent.keys() == repository.files.keys()
    assert [name for name in sent if sent[name] != repository.files[name]] == ["README.md"]
    here, there = (ia3("predict", where, "tea not good", "--json") for where in (place / "reviews", "owner/reviews"))
    assert here[0] == there[0] == 0, there[2]
    assert here[1] == there[1]
    # Another process on another machine, with nothing but the hub.
    done = subprocess.run(
        [sys.executable, "-m", "ia3", "predict", "owner/reviews@main", "tea not good", "--json"],
        env={**os.environ, **local_hub.environment(hub, tmp_path / "elsewhere")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == here[1]
    assert list((tmp_path / "elsewhere" / "hub").glob("models--owner--reviews/snapshots/*/adapter_model.safetensors"))


def test_a_revision_is_a_branch_and_stays_what_it_is(place, other, hub, ia3):
    assert ia3("push", place / "reviews", "owner/reviews", "--revision", "v1", "--message", "First")[0] == 0
    repository = hub.repositories["owner/reviews"]
    assert set(repository.branches) == {"main", "v1"} and not repository.files and repository.messages[-1] == "First"
    task = AdapterFolder(other).required_task().changed(name="renamed")
    task.save(other / "task.yaml")
    pushed(other)
    names = [
        AdapterFolder(f"owner/reviews{at}").required_task().name for at in ("@v1", "", f"@{repository.branches['v1']}")
    ]
    assert names == [AdapterFolder(place / "reviews").required_task().name, "renamed", names[0]]
    with pytest.raises(InputError, match="one revision of 'owner/reviews', found 'v1' in its name and 'main'"):
        IA3Config.from_pretrained("owner/reviews@v1", revision="main")


def test_an_adapter_replaces_the_earlier_one_and_no_other_files(place, other, hub):
    pushed(place / "reviews")
    repository = hub.repositories["owner/reviews"]
    repository.commit("main", {**repository.files, "notes.txt": b"mine"}, "Notes")
    for name in ("opinions.json", "head.safetensors", "calibration.json"):
        (other / name).unlink()
    (other / "checkpoints").mkdir()
    (other / "checkpoints" / "model.bin").write_bytes(b"large")
    pushed(other)
    sent = {path.name for path in other.iterdir() if path.is_file()} - {"report.html"}
    assert set(repository.files) == sent | {"notes.txt"}
    assert AdapterFolder("owner/reviews").calibration is None


def test_a_pull_request(place, hub, ia3):
    pushed(place / "reviews")
    code, out, _ = ia3("push", place / "reviews", "owner/reviews", "--create-pr", "--json")
    assert code == 0 and json.loads(out)["url"] == f"{hub.url}/owner/reviews/discussions/1"
    assert hub.repositories["owner/reviews"].messages[-1] == "Upload (IA)³ adapter"
    assert AdapterFolder("owner/reviews@refs/pr/1").task is not None


def test_a_private_repository_is_for_those_who_log_in(place, hub, ia3, monkeypatch):
    assert ia3("push", place / "reviews", "owner/secret", "--private")[0] == 0
    assert hub.repositories["owner/secret"].private
    assert ia3("inspect", "owner/secret")[0] == 0
    pushed(place / "reviews", "owner/open")
    code, out, err = ia3("push", place / "reviews", "owner/open", "--private")
    assert (code, out, err.count("\n")) == (2, "", 1) and "'owner/open' is public" in err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "-of-somebody-else")
    code, out, err = ia3("predict", "owner/secret", "tea")
    assert (code, out, err.count("\n")) == (2, "", 1) and "it is private: if it is yours, log in" in err
    code, out, err = ia3("push", place / "reviews", "owner/secret")
    assert (code, out, err.count("\n")) == (2, "", 1) and "hf auth login" in err


@pytest.mark.parametrize(
    "name, said",
    [
        ("owner/nmae", "the hub has no such repository"),
        ("owner/reviews@v9", "no such revision"),
        ("owner/empty", "has no such file"),
        ("not a name", "no such folder here"),
    ],
)
def test_what_the_hub_has_not_is_one_line(place, hub, ia3, name, said):
    pushed(place / "reviews")
    hub.repositories["owner/empty"] = local_hub.Repository()
    code, out, err = ia3("predict", name, "tea")
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err and name in err


def test_without_a_network_there_is_the_cache(place, hub, ia3, monkeypatch):
    pushed(place / "reviews")
    code, out, _ = ia3("predict", "owner/reviews", "tea not good", "--json")
    hub.close()
    _reach_hub.cache_clear()
    assert code == 0 and ia3("predict", "owner/reviews", "tea not good", "--json")[:2] == (0, out)
    for arguments in (["predict", "owner/other", "tea"], ["push", place / "reviews", "owner/reviews"]):
        code, out, err = ia3(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and "the hub cannot be reached" in err


def test_what_is_no_adapter_makes_no_repository(place, hub, ia3):
    code, out, err = ia3("push", place / "model", "owner/model")
    assert (code, out, err.count("\n")) == (2, "", 1) and "adapter_config.json" in err
    assert not hub.repositories


def test_a_classifier_goes_there_and_back(place, hub):
    rows = words.rows(16)
    texts, labels = [row["text"] for row in rows], [row["label"] == "pos" for row in rows]
    answers = {True: "good", False: "not good"}
    classifier = FewShotClassifier(str(place / "model"), words.TEMPLATE, answers, recipe=Recipe(steps=2))
    url = classifier.fit(texts, labels).push_to_hub("owner/tea", license="mit")
    again = FewShotClassifier.load("owner/tea")
    assert url.startswith(f"{hub.url}/owner/tea/commit/") and again.classes_.tolist() == [False, True]
    np.testing.assert_array_equal(again.predict_proba(texts[:4]), classifier.predict_proba(texts[:4]))
    card = ModelCard(hub.repositories["owner/tea"].files["README.md"].decode())
    assert card.data.license == "mit" and "| true | 8 |" in card.text and 'load("owner/tea")' in card.text


def test_a_server_follows_the_hub(place, other, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("IA3_CACHE", str(tmp_path / "ours"))
    pushed(place / "reviews")
    pushed(place / "reviews", "owner/tone", revision="v1")
    mirror = HubMirror("owner/reviews,owner/tone@v1", OWN_NAMES)
    assert mirror.refresh()
    store = Store(mirror.folder, mirror=mirror)
    assert set(store.found) == {"owner/reviews", "owner/tone"}
    folder = Path(store.found["owner/reviews"][0])
    assert {path.name for path in folder.iterdir() if path.name in OWN_NAMES} == {
        *hub.repositories["owner/reviews"].files
    } - {"README.md"}
    assert not mirror.refresh()
    AdapterFolder(other).required_task().changed(name="renamed").save(other / "task.yaml")
    pushed(other)
    assert mirror.refresh() and AdapterFolder(folder).required_task().name == "renamed"
    with pytest.raises(InputError, match=r"'owner/none'.* no such repository"):
        HubMirror("owner/none", OWN_NAMES).refresh()


def test_the_server_s_command_asks_the_hub(hub, ia3):
    code, out, err = ia3("serve", "--adapters", "owner/none,owner/reviews@v1")
    assert (code, out, err.count("\n")) == (2, "", 1) and "'owner/none'" in err and "no such repository" in err
    assert ia3("serve", "--adapters", "nowhere")[2].startswith("ia3: Expected a folder of adapters")


class TestABaseModel:
    @pytest.fixture
    def base(self, place, hub):
        """A base model on the hub, whose newest version is another one."""
        repository = hub.repositories["owner/base"] = local_hub.Repository()
        files = {path.name: path.read_bytes() for path in (place / "model").iterdir()}
        repository.branches["v1"] = repository.branches["main"]
        repository.commit("v1", {**files, "model.onnx": b"not for us"}, "v1")
        repository.commit("main", {"config.json": b"{}"}, "v2")
        return "owner/base@v1"

    def test_of_a_revision_is_recorded_as_peft_records_it(self, base, place, hub, tmp_path):
        model, _ = load_base(base)
        assert model.name_or_path == base and not any("onnx" in asked for asked in hub.asked if "resolve" in asked)
        expected, _ = load_base(str(place / "model"))
        assert tiny.same_bits(model.state_dict(), expected.state_dict())
        get_peft_model(model, IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
        saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert (saved["base_model_name_or_path"], saved["revision"]) == ("owner/base", "v1")
        assert AdapterFolder(tmp_path / "adapter").config.base == base
        card = ModelCard.load(tmp_path / "adapter" / "README.md")
        assert card.data.base_model == "owner/base" and "base_model:adapter:owner/base" in card.data.tags

    def test_of_a_revision_is_used_by_commands(self, base, place, ia3, tmp_path):
        options = [
            "--data",
            place / "train.csv",
            "--steps",
            "2",
            "--template",
            words.TEMPLATE,
            "--output",
            tmp_path / "out",
        ]
        assert ia3("train", "--model", base, *options)[0] == 0
        code, out, err = ia3("predict", tmp_path / "out", "tea not good", "--json")
        assert code == 0, err
        assert json.loads(out)[0]["label"] in ("pos", "neg")
        code, _, err = ia3("train", "--model", "owner/base@v9", *options)
        assert code == 2 and "no such revision" in err and err.count("\n") == 1

    def test_in_a_gguf_file(self, hub, tmp_path, monkeypatch):
        pytest.importorskip("gguf")
        from support import gguf_files

        monkeypatch.setenv("IA3_CACHE", str(tmp_path / "ours"))
        gguf_files.write(tmp_path / "tiny.gguf")
        repository = hub.repositories["owner/gguf"] = local_hub.Repository()
        repository.commit("main", {"tiny-Q8_0.gguf": (tmp_path / "tiny.gguf").read_bytes()}, "one")
        for name in ("owner/gguf/tiny-Q8_0.gguf", "owner/gguf/tiny-Q8_0.gguf@main"):
            assert load_base(name)[0].name_or_path == name
        with pytest.raises(InputError, match=r"Can't find 'none\.gguf' at 'owner/gguf'"):
            load_base("owner/gguf/none.gguf")


class TestACard:
    def test_has_what_the_hub_reads(self, place, hub, ia3, other):
        config = json.loads((other / "adapter_config.json").read_text())
        (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "owner/base"}))
        assert ia3("push", other, "owner/reviews", "--license", "apache-2.0", "--language", "en")[0] == 0
        card = ModelCard(hub.repositories["owner/reviews"].files["README.md"].decode())
        data, metrics = card.data, AdapterFolder(other).metrics
        assert (data.license, data.language, data.base_model, data.pipeline_tag) == (
            "apache-2.0",
            "en",
            "owner/base",
            "text-classification",
        )
        assert {"ia3", "t-few", "base_model:adapter:owner/base"} <= set(data.tags)
        found = {one.metric_name: (one.metric_type, one.metric_value) for one in data.eval_results}
        trained = metrics["trained"]
        expected = {"accuracy": ("accuracy", trained["accuracy"]), "macro-F1": ("f1", round(trained["macro_f1"], 4))}
        assert found == expected
        assert f"{metrics['test_rows']} test rows" in data.eval_results[0].dataset_name
        assert "license" not in ModelCard.load(place / "reviews" / "README.md").data.to_dict()

    def test_says_what_was_trained_on_and_shows_no_row(self, place):
        text = (place / "reviews" / "README.md").read_text()
        assert (
            "| pos | 16 |" in text and "| neg | 16 |" in text and words.TEMPLATE in text and "- `neg`: not good" in text
        )
        assert not any(row["text"] in text for row in words.rows(60)) and str(place) not in text
        assert "## Intended use and limits" in text and "PEFT does not load" in text

    def test_of_a_user_stays(self, other, hub, ia3):
        (other / "README.md").write_text("my own words")
        pushed(other)
        assert hub.repositories["owner/reviews"].files["README.md"] == b"my own words"
        code, _, err = ia3("push", other, "owner/again", "--license", "mit")
        assert (
            code == 2 and "a card of your own" in err and err.count("\n") == 1 and "owner/again" not in hub.repositories
        )

    @pytest.mark.parametrize("where", ["here", "hub"])
    def test_has_examples_that_run(self, where, place, other, hub, monkeypatch, capsys, tmp_path):
        if where == "hub":
            pushed(other)
            text = hub.repositories["owner/reviews"].files["README.md"].decode()
            monkeypatch.chdir(tmp_path)
            shutil.rmtree(other)
        else:
            text = (other / "README.md").read_text()
            monkeypatch.chdir(other)
        runs(text, capsys)

    @pytest.mark.parametrize("kind", ["columns", "row answers", "text", "label sets"])
    def test_has_examples_that_run_for_every_kind_of_task(self, kind, place, tmp_path, monkeypatch, capsys):
        tasks: dict[str, Any] = {
            "columns": {"template": "{{ title }} : {{ text }} answer :", "choices": ["pos", "neg"]},
            "row answers": {"template": "{{ text }}", "choices": "{{ endings }}"},
            "text": {"template": "review : {{ text }} answer :", "answer": "{{ label }}"},
            "label sets": {"template": words.TEMPLATE, "choices": ["pos", "neg"], "multi_label": "true"},
        }
        rows: list[dict[str, Any]] = [{**row, "title": "tea"} for row in words.rows(16)]
        if kind == "row answers":
            rows = [
                {"text": row["text"], "endings": ["good", "bad"], "label": str(i % 2)} for i, row in enumerate(rows)
            ]
        if kind == "label sets":
            rows = [{**row, "label": [row["label"]]} for row in rows]
        task = load_kind(tasks[kind], tmp_path)
        out = tmp_path / "out"
        recipe = Recipe(steps=1, opinions="head" if kind == "label sets" else "vectors")
        Experiment(task, rows, folder=out, model=str(place / "model"), recipe=recipe, test_rows=4).run()
        monkeypatch.chdir(out)
        runs((out / "README.md").read_text(), capsys)


class TestThePage:
    @pytest.fixture
    def here(self, place, other, hub, tmp_path, monkeypatch):
        """A working directory with what docs/sharing.md names."""
        shutil.copytree(other, tmp_path / "work" / "adapters" / "tickets")
        monkeypatch.chdir(tmp_path / "work")
        monkeypatch.setenv("IA3_CACHE", str(tmp_path / "ours"))
        words.write_csv(Path("checked.csv"), words.rows(8, seed=1))
        rows = [{"message": row["text"], "queue": row["label"]} for row in words.rows(40)]
        words.write_csv(Path("tickets.csv"), rows)
        return tmp_path / "work"

    def test_commands(self, here, hub, ia3):
        for line in example("sharing").splitlines():
            program, *arguments = shlex.split(line)
            code, _, err = ia3(*arguments)
            assert program == "ia3" and code == 0, err
        repository = hub.repositories["owner/tickets"]
        assert repository.private and set(repository.branches) == {"main", "v1"}

    def test_python(self, here, hub, capsys):
        exec(compile(example("sharing-python"), "sharing-python", "exec"), {})
        assert re.search(r"/owner/tickets/commit/\w{40}\n\['(pos|neg)'\]\n$", capsys.readouterr().out)

    def test_serving(self, here, place, hub, ia3, monkeypatch):
        pushed("adapters/tickets", "owner/tickets")
        pushed("adapters/tickets", "owner/tone", revision="v1")
        served = []
        monkeypatch.setattr("ia3.serve.run.run", lambda server, *_: served.append(server))
        program, *arguments = shlex.split(example("sharing-serve"))
        code, _, err = ia3(*arguments, "--model", place / "model")
        assert program == "ia3" and code == 0, err
        [server] = served
        assert set(server.store.found) == {"owner/tickets", "owner/tone"} and server._refresh == 60

    def test_base_models(self, here, place, hub, ia3):
        pytest.importorskip("gguf")
        from support import gguf_files

        (here / "models").mkdir()
        gguf_files.write(here / "models" / "tiny-Q8_0.gguf")
        repository = hub.repositories["owner/base"] = local_hub.Repository()
        repository.commit("v1", {path.name: path.read_bytes() for path in (place / "model").iterdir()}, "v1")
        for line in example("sharing-base").splitlines():
            program, *arguments = shlex.split(line)
            code, _, err = ia3(*arguments, "--steps", "2")
            assert program == "ia3" and code == 0, err
            code, _, err = ia3("predict", arguments[-1], "the tea was fresh")
            assert code == 0, err


def example(name: str) -> str:
    """A block of docs/sharing.md."""
    page = (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8")
    [block] = re.findall(rf"<!-- example: {name} -->\n```\w+\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return block


def load_kind(values, folder):
    """The task that a file with these fields describes."""
    (folder / "task.yaml").write_text(json.dumps(values))
    return load_task(str(folder / "task.yaml"))


def runs(card: str, capsys) -> None:
    """Run the examples of a card in the current folder: its commands, and its Python."""
    [commands] = re.findall(r"```sh\n(.*?)\n```", card, re.DOTALL)
    for command in commands.splitlines():
        program, *arguments = shlex.split(command)
        if program == "echo":
            text, to, file = arguments
            assert to == ">"
            Path(file).write_text(text)
        else:
            assert program == "ia3"
            with pytest.raises(SystemExit) as ended:
                main(arguments)
            out, err = capsys.readouterr()
            assert not ended.value.code, err
            assert "%" in out or "some text" in out
    [python] = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    exec(compile(python, "card", "exec"), {})
    assert capsys.readouterr().out.strip()
