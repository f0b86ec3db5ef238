"""An adapter's folder: whole or not at all, whoever writes, reads or is killed; and what a model knows to belong there."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

import ia3
from ia3 import IA3Config, InputError, PeftModel, Recipe, Task
from ia3.adapter.checkpoint import save_adapter
from ia3.adapter.config import adapter_folders
from ia3.adapter.stored import CARD_MARK, OWN_NAMES
from ia3.evaluation.calibration import Calibration
from ia3.files import PENDING, TEMPORARY, atomic, hub, is_unused, new_folder, replacing, replacing_adapter
from ia3.folder import AdapterFolder
from ia3.training.described import described
from support import tiny, words

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TASK = Task.create(
    {"name": "reviews", "template": "review : {{ text }} answer :", "choices": {"pos": "good", "neg": "not good"}}
)
CALIBRATION = Calibration(
    temperature=2.0, rows=8, log_loss=0.5, log_loss_before=0.7, calibration_error=0.1, calibration_error_before=0.2
)
RECIPE = Recipe.small().changed(steps=3)
CASES = [
    "another config",
    "the same config",
    "another format",
    "no adapter yet",
    "calibrate",
    "convert",
    "archive",
    "upload",
    "merge",
]


def adapted(seed: int = 1, targets=("k_proj", "v_proj", "down_proj"), task: str | None = None, base=None):
    """A tiny model with an adapter, of a task of that name."""
    model = tiny.adapt(
        "llama", ia3, seed=seed, base=base, target_modules=list(targets), feedforward_modules=["down_proj"]
    )
    if task is not None:
        its = TASK.model_copy(update={"name": task})
        model.adapter_folders["default"] = described(its, RECIPE, words.rows(4, seed=seed), None)
    return model


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def temporaries(folder) -> list[Path]:
    return list(folder.rglob(f"{TEMPORARY}*"))


def one_line(error) -> str:
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 500
    return message


# Killed writers.


@pytest.fixture(scope="module")
def killed_ones(tmp_path_factory):
    """What `killed.py` says of each case."""
    place = tmp_path_factory.mktemp("killed")
    from support import killed, launched

    said = launched.together(tmp_path_factory.mktemp("said"), killed.main, place)
    found = [json.loads(line) for line in said.splitlines()]
    return {name: [one for one in found if one["case"] == name] for name in CASES}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
class TestKilled:
    @pytest.mark.parametrize("case", CASES)
    def test_old_or_new_and_the_next_write_cleans_up(self, case, killed_ones):
        found = killed_ones[case]
        *died, last = found
        assert len(died) >= 5 and all(one["killed"] for one in died) and not last["killed"]
        assert all(one["differs"] for one in found)
        assert [one["alike"] for one in found if one["alike"] is not None] == [True]
        states = [one["state"] for one in found]
        assert states == sorted(states, reverse=True) and {*states} == {"old", "new"}  # from old to new in one step
        assert not any(one["leftovers"] for one in found)

    @pytest.mark.parametrize("case", CASES)
    def test_programs_that_do_not_know_how_we_write_never_find_a_mixture(self, case, killed_ones):
        assert {one["plain"] for one in killed_ones[case]} <= {"old", "new", "none"}
        if case not in ("another config", "another format", "upload"):
            assert {one["plain"] for one in killed_ones[case]} <= {"old", "new"}

    @pytest.mark.parametrize("case", CASES)
    def test_a_killed_command_can_be_repeated(self, case, killed_ones):
        refused = [one for one in killed_ones[case] if one["refused"]]
        # When all was done, and the process was yet to end.
        assert len(refused) <= 1 and all((one["state"], one["plain"]) == ("new", "new") for one in refused)


def half_done(folder, monkeypatch, steps: int = 1) -> None:
    """Let the next save end when so many files are in their places."""
    replace, done = os.replace, []

    def stop(source, target):
        done.append(target)
        if len(done) > steps:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            adapted(2, ["q_proj", "down_proj"], "new").save_pretrained(folder)
    assert (folder / PENDING).is_dir()


def test_whoever_reads_a_folder_finds_what_is_on_its_way_to_its_place(tmp_path, monkeypatch):
    adapted(1, task="old").save_pretrained(tmp_path / "root" / "one")
    folder = tmp_path / "root" / "one"
    for steps in range(5):
        half_done(folder, monkeypatch, steps)
        assert AdapterFolder(folder).required_task().name == "new"
        assert IA3Config.from_pretrained(folder).target_modules == {"q_proj", "down_proj"}
        assert adapter_folders(str(tmp_path / "root")) == {"one": str(folder)}
        model = PeftModel.from_pretrained(tiny.build("llama"), folder)
        bank = ia3.AdapterBank(model)
        assert bank.register(tmp_path / "root") == ["one"]
        bank.load(folder, "loaded")
        batch = tiny.batch("llama")
        own, *others = (model(**batch, adapter_names=[name] * 3).logits for name in ("default", "one", "loaded"))
        assert all(torch.equal(own, other) for other in others)
        adapted(1, task="old").save_pretrained(folder)
        assert AdapterFolder(folder).required_task().name == "old" and not temporaries(folder)


def test_what_peft_saved_after_a_killed_writer_counts(tmp_path, monkeypatch):
    adapted(1, task="old").save_pretrained(tmp_path)
    half_done(tmp_path, monkeypatch)
    import peft

    theirs = tiny.adapt("llama", peft, seed=5)
    theirs.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny.build("llama"), tmp_path)
    assert tiny.relative_error(tiny.logits(loaded, "llama"), tiny.logits(theirs, "llama")) < 1e-6
    adapted(1, task="old").save_pretrained(tmp_path)
    assert not temporaries(tmp_path)


# Readers and writers at once.


def test_readers_never_find_a_mixture(tmp_path):
    models = [adapted(1, task="a"), adapted(2, ["q_proj", "down_proj"], "b")]
    expected = {}
    for model in models:
        model.save_pretrained(tmp_path)
        folder, tensors, _ = AdapterFolder.whole(tmp_path)
        expected[folder.required_task().name] = (folder.config.to_json(), safetensors.torch.save(tensors))
    stop, failures = threading.Event(), []

    def write():
        while not stop.is_set():
            for model in models:
                model.save_pretrained(tmp_path)

    def read():
        try:
            for _ in range(60):
                folder, tensors, header = AdapterFolder.whole(tmp_path)
                folder.check_base(header)
                name = folder.required_task().name
                assert (folder.config.to_json(), safetensors.torch.save(tensors)) == expected[name]
                assert folder.metrics["task"] == name
        except BaseException as error:
            failures.append(error)

    writer, readers = threading.Thread(target=write), [threading.Thread(target=read) for _ in range(2)]
    for thread in (writer, *readers):
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    writer.join()
    assert not failures
    assert not temporaries(tmp_path)


def test_writers_at_once_leave_the_adapter_of_one(tmp_path):
    models = [adapted(1, task="1"), adapted(2, ["q_proj", "down_proj"], "2")]

    def write(model):
        for _ in range(8):
            model.save_pretrained(tmp_path)

    threads = [threading.Thread(target=write, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model = models[int(AdapterFolder(tmp_path).required_task().name) - 1]
    loaded = PeftModel.from_pretrained(tiny.build("llama"), tmp_path)
    assert torch.equal(tiny.logits(loaded, "llama"), tiny.logits(model, "llama"))
    assert not temporaries(tmp_path)


def test_vectors_of_another_save_than_the_rest_are_refused(tmp_path):
    adapted(1, task="a").save_pretrained(tmp_path)
    folder = AdapterFolder(tmp_path)
    assert folder.required_task().name == "a"
    adapted(2, task="b").save_pretrained(tmp_path)
    for use in (folder.vectors, lambda: folder.calibrate(CALIBRATION)):
        with pytest.raises(InputError, match="was replaced while it was being used; run this again"):
            use()
    assert not (tmp_path / "calibration.json").exists()


def test_a_folder_that_another_process_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_PATIENCE", 0.05)
    adapted(1).save_pretrained(tmp_path)
    before = contents(tmp_path)
    handle = os.open(tmp_path, os.O_RDONLY)
    assert atomic._lock(handle)
    with pytest.raises(InputError, match="another process holds its lock") as error:
        adapted(2).save_pretrained(tmp_path)
    one_line(error)
    assert contents(tmp_path) == before
    os.close(handle)
    adapted(2).save_pretrained(tmp_path)


def test_what_a_writer_is_at_is_left_to_it(tmp_path):
    with replacing(tmp_path / "file") as first, new_folder(tmp_path / "folder") as folder:
        with replacing(tmp_path / "file") as second:
            second.write_text("second")
        with replacing_adapter(tmp_path / "adapter", OWN_NAMES) as staged:
            adapted(1).save_pretrained(tmp_path / "adapter")
            assert staged.is_dir()
            (staged / CONFIG).write_text("{}")
        assert first.exists() and folder.exists()
        first.write_text("first")
    assert (tmp_path / "file").read_text() == "first" and (tmp_path / "folder").is_dir()
    assert (tmp_path / "adapter" / CONFIG).read_text() == "{}" and not temporaries(tmp_path)


def test_without_locks_only_what_is_old_is_taken_for_abandoned(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_lock", lambda handle: None)
    for name, age in (("old", 2 * atomic._ABANDONED), ("recent", 0)):
        path = tmp_path / f"{TEMPORARY}save.{name}"
        path.mkdir()
        os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    adapted(1).save_pretrained(tmp_path)
    assert [path.name for path in temporaries(tmp_path)] == [f"{TEMPORARY}save.recent"]


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    adapted(1, task="a").save_pretrained(tmp_path)
    model = adapted(2, ["q_proj", "down_proj"], "b")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build("llama"), tmp_path)
    assert torch.equal(tiny.logits(loaded, "llama"), tiny.logits(model, "llama"))
    assert AdapterFolder(tmp_path).required_task().name == "b" and not temporaries(tmp_path)


# Where it can be, and what else is there.


@pytest.mark.parametrize("where", ["link", "current"])
def test_a_folder_that_cannot_be_renamed(where, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    adapted(1, task="a").save_pretrained(folder)
    if where == "link":
        (tmp_path / "link").symlink_to(folder)
    else:
        monkeypatch.chdir(folder)
    adapted(2, task="b").save_pretrained(tmp_path / "link" if where == "link" else ".")
    assert AdapterFolder(folder).required_task().name == "b"
    assert (tmp_path / "link").is_symlink() == (where == "link")


def test_other_files_stay(tmp_path):
    mine = {
        "tokenizer.json": b"{}",
        "checkpoint-5/adapter_config.json": b"{}",
        "runs/events": b"log",
        "README.md": b"my own words",
        "report.html": b"<!doctype html><p>mine",
        "metrics.json": b'{"accuracy": 1}',
        "task.yaml": b"template: '{{ text }}'\nchoices: [a, b]\n",
    }
    for name, data in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    model = adapted(1)
    model.add_adapter("other", IA3Config())
    model.save_pretrained(tmp_path)
    assert {name: contents(tmp_path)[name] for name in mine} == mine
    # That task is the adapter's now, and goes with it.
    adapted(2).save_pretrained(tmp_path)
    left = contents(tmp_path)
    assert (
        "task.yaml" not in left
        and left["README.md"] == b"my own words"
        and left["report.html"] == mine["report.html"]
        and left["metrics.json"] == mine["metrics.json"]
    )
    assert f"other/{WEIGHTS}" in left


def test_nothing_of_an_earlier_adapter_stays(tmp_path):
    adapted(1, task="a").save_pretrained(tmp_path)
    AdapterFolder(tmp_path).calibrate(CALIBRATION)
    (tmp_path / "report.html").write_text(CARD_MARK)
    assert {"task.yaml", "recipe.yaml", "metrics.json", "calibration.json"} <= contents(tmp_path).keys()
    adapted(2).save_pretrained(tmp_path)
    assert contents(tmp_path).keys() == {CONFIG, WEIGHTS, "README.md"}


def test_a_card_of_ours_goes_with_its_adapter(tmp_path):
    one, two = tiny.build("llama"), tiny.build("llama")
    one.name_or_path, two.name_or_path = "owner/one", "owner/two"
    adapted(1, base=one).save_pretrained(tmp_path)
    adapted(2, base=two).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "owner/two" in card and "owner/one" not in card


def test_a_folder_by_the_name_of_a_file(tmp_path):
    adapted(1).save_pretrained(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "task.yaml").mkdir()
    with pytest.raises(InputError, match=r"found a folder") as error:
        adapted(2, task="b").save_pretrained(tmp_path)
    assert "task.yaml" in one_line(error)
    assert contents(tmp_path) == before


def test_remains_of_killed_writers_are_nothing(tmp_path):
    assert is_unused(tmp_path) and is_unused(tmp_path / "new")
    (tmp_path / f"{TEMPORARY}save.x").mkdir()
    assert is_unused(tmp_path)
    (tmp_path / "file").write_text("")
    assert not is_unused(tmp_path) and not is_unused(tmp_path / "file")


# A config and vectors that do not belong together.


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_one_of_two_files_of_another_save_is_refused(name, tmp_path):
    adapted(1).save_pretrained(tmp_path / "one")
    adapted(2, ["k_proj", "up_proj", "down_proj"]).save_pretrained(tmp_path / "two")
    shutil.copy(tmp_path / "two" / name, tmp_path / "one")
    with pytest.raises(InputError) as error:
        PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "one")
    assert "up_proj" in one_line(error)


def test_another_base_model_in_the_config_is_said(tmp_path, recwarn):
    base = tiny.build("llama")
    base.name_or_path = "/some/where/one"
    adapted(1, base=base).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for name, expected in (("/else/where/one", 0), ("/some/where/two", 1)):
        (tmp_path / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": name}))
        recwarn.clear()
        PeftModel.from_pretrained(tiny.build("llama"), tmp_path)
        said = [str(warning.message) for warning in recwarn if "vectors were saved for" in str(warning.message)]
        assert len(said) == expected


def test_the_same_adapter_is_the_same_bytes(tmp_path):
    model = tiny.adapt("gpt2", ia3, target_modules=None, feedforward_modules=None)  # with all entries in the header
    found = set()
    for number in range(8):
        model.save_pretrained(tmp_path / str(number))
        found.add((tmp_path / str(number) / WEIGHTS).read_bytes())
    assert len(found) == 1


# What a model knows to belong beside an adapter.


class TestLoadedAndSaved:
    @pytest.fixture
    def saved(self, tmp_path):
        adapted(1, task="a").save_pretrained(tmp_path / "saved")
        AdapterFolder(tmp_path / "saved").calibrate(CALIBRATION)
        (tmp_path / "saved" / "tokenizer.json").write_text("{}")
        return tmp_path / "saved"

    def test_all_of_it_comes_along(self, saved, tmp_path):
        model = PeftModel.from_pretrained(tiny.build("llama"), saved)
        model.save_pretrained(tmp_path / "again")
        before = contents(saved)
        del before["tokenizer.json"]
        assert contents(tmp_path / "again") == before

    def test_beside_another_and_into_its_subfolder(self, saved, tmp_path):
        model = adapted(2)
        model.load_adapter(saved, "other")
        model.save_pretrained(tmp_path / "both")
        assert AdapterFolder(tmp_path / "both").task is None
        other = AdapterFolder(tmp_path / "both", "other")
        assert other.required_task().name == "a" and other.temperature == 2.0

    def test_what_was_measured_is_not_said_of_other_vectors(self, saved, tmp_path):
        model = PeftModel.from_pretrained(tiny.build("llama"), saved, is_trainable=True)
        seen = AdapterFolder(saved).metrics["train_rows"]
        with torch.no_grad():
            next(iter(model.adapter_parameters("default"))).mul_(1.5)
        model.save_pretrained(tmp_path / "again")
        again = AdapterFolder(tmp_path / "again")
        assert again.calibration is None and again.metrics == {"train_rows": seen}
        assert again.required_task().name == "a"

    def test_vectors_that_are_read_in_another_type_are_the_same(self, saved, tmp_path):
        tensors = safetensors.torch.load_file(saved / WEIGHTS)
        safetensors.torch.save_file({key: value.bfloat16() for key, value in tensors.items()}, saved / WEIGHTS)
        PeftModel.from_pretrained(tiny.build("llama"), saved).save_pretrained(tmp_path / "again")
        assert AdapterFolder(tmp_path / "again").temperature == 2.0

    def test_refilled_from_another_folder(self, saved, tmp_path):
        model = adapted(2, task="b")
        model.load_adapter(saved, "default")
        model.save_pretrained(tmp_path / "again")
        assert AdapterFolder(tmp_path / "again").required_task().name == "a"

    def test_from_the_hub_when_it_is_saved(self, saved, tmp_path, monkeypatch):
        from types import SimpleNamespace

        import huggingface_hub
        from huggingface_hub.errors import RemoteEntryNotFoundError

        def download(repo_id, filename, **kwargs):
            asked.append(filename)
            if not (saved / filename).is_file():
                raise RemoteEntryNotFoundError("no", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]
            return str(saved / filename)

        asked: list[str] = []
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setattr(hub, "hub_answers", lambda: True)
        model = PeftModel.from_pretrained(tiny.build("llama"), "owner/name")
        assert asked == [CONFIG, WEIGHTS]
        for name in ("one", "two"):
            model.save_pretrained(tmp_path / name)
            assert AdapterFolder(tmp_path / name).required_task().name == "a"
            assert AdapterFolder(tmp_path / name).temperature == 2.0
        assert len(asked) == len(set(asked))

    def test_a_hub_that_does_not_answer_then(self, saved, tmp_path, monkeypatch):
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, **kwargs: str(saved / name))
        monkeypatch.setattr(hub, "hub_answers", lambda: True)
        model = PeftModel.from_pretrained(tiny.build("llama"), "owner/name")

        def fail(*args, **kwargs):
            raise TimeoutError

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
        described(TASK, RECIPE, words.rows(4), model.adapter_folders["default"])
        with pytest.warns(UserWarning, match="Saved without task, recipe and calibration: .*TimeoutError"):
            model.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / WEIGHTS).exists()

    def test_a_damaged_task_does_not_keep_vectors_from_loading_and_saving(self, saved, tmp_path):
        (saved / "task.yaml").write_bytes(b"\xff: [")
        (saved / "metrics.json").write_text("[")
        PeftModel.from_pretrained(tiny.build("llama"), saved).save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "task.yaml").read_bytes() == b"\xff: ["
        with pytest.raises(InputError, match="UTF-8"):
            _ = AdapterFolder(tmp_path / "again").task


def test_the_module_needs_no_torch():
    code = "import sys, ia3.folder; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_list_of_files_that_join(tmp_path):
    """`save_adapter` with files of one's own, made of the size of the vectors' file."""
    save_adapter(
        adapted(1), tmp_path, beside=lambda size: {"metrics.json": json.dumps({"adapter_bytes": size}).encode()}
    )
    assert AdapterFolder(tmp_path).metrics["adapter_bytes"] == (tmp_path / WEIGHTS).stat().st_size
