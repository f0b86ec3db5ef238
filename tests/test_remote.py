"""Adapters and archives at addresses of fsspec: copied, brought up to date, served, registered, asked."""

import os
import shutil
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.registry import known_implementations

import ia3
from ia3 import InputError
from ia3.adapter.stored import OWN_NAMES
from ia3.bank import AdapterBank
from ia3.cli import main
from ia3.files import CONFIG_NAME, UPLOADED, WEIGHTS_NAME, Mirror, fetch, is_address
from ia3.folder import AdapterFolder
from support import tiny

ADDRESS = "memory://bucket/adapters"


@pytest.fixture(autouse=True)
def bucket(tmp_path, monkeypatch):
    """An empty store in memory, and a cache of its own."""
    monkeypatch.setenv("IA3_CACHE", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


def put(bucket, name: str, text: str = "one", *files: str) -> None:
    for file in (CONFIG_NAME, WEIGHTS_NAME, *files):
        bucket.pipe(f"{ADDRESS}/{name}/{file}", f"{text} {file}".encode())


def found(folder) -> dict[str, dict[str, str]]:
    """Name → file → text of the copied adapters; the stamp's is left out."""
    every = {}
    for where, _, files in os.walk(folder):
        its = {file: Path(where, file).read_text() for file in files if file != ".copied"}
        if its:
            every[os.path.relpath(where, folder)] = its
    return every


def expected(text: str, *files: str) -> dict[str, str]:
    return {file: f"{text} {file}" for file in (CONFIG_NAME, WEIGHTS_NAME, *files)}


def test_addresses():
    assert all(is_address(one) for one in ("s3://a/b", "hf://a/b", "memory://", "file:///a", "simplecache::s3://a"))
    assert not any(is_address(one) for one in ("a/b", "/a//b", "c:/a", "owner/name", None, 3, "://a", "C://a"))


def test_a_mirror_follows_its_address(bucket):
    put(bucket, "tea", "one", "task.yaml")
    put(bucket, "team/a/b")
    put(bucket, "../outside")
    put(bucket, ".ia3-saved")
    bucket.pipe(f"{ADDRESS}/half/{CONFIG_NAME}", b"{}")
    bucket.pipe(f"{ADDRESS}/tea/other.txt", b"x")
    mirror = Mirror(ADDRESS, OWN_NAMES)
    assert mirror.refresh() and not mirror.refresh()
    assert found(mirror.folder) == {"tea": expected("one", "task.yaml"), "team/a/b": expected("one")}
    inodes = {name: os.stat(mirror.folder / name / CONFIG_NAME).st_ino for name in ("tea", "team/a/b")}
    put(bucket, "tea", "two")
    bucket.rm(f"{ADDRESS}/tea/task.yaml")
    put(bucket, "team", "three")
    assert mirror.refresh()
    assert found(mirror.folder) == {"tea": expected("two"), "team/a/b": expected("one"), "team": expected("three")}
    assert os.stat(mirror.folder / "team/a/b" / CONFIG_NAME).st_ino == inodes["team/a/b"]  # not copied again
    inodes["tea"] = os.stat(mirror.folder / "tea" / CONFIG_NAME).st_ino
    again = Mirror(ADDRESS + "/", OWN_NAMES)
    assert again.folder == mirror.folder and again.refresh() and not again.refresh()
    assert inodes == {name: os.stat(mirror.folder / name / CONFIG_NAME).st_ino for name in inodes}
    put(bucket, "team", "four")
    assert again.refresh() and mirror.refresh()  # a change for both, whoever copies it
    bucket.rm(f"{ADDRESS}/team/a", recursive=True)
    bucket.rm(f"{ADDRESS}/tea", recursive=True)
    assert mirror.refresh() and found(mirror.folder) == {"team": expected("four")}
    assert os.listdir(mirror.folder) == ["team"] and not (mirror.folder / "team" / "a").exists()


def test_what_cannot_be_read_leaves_what_was_copied(bucket, monkeypatch):
    mirror = Mirror(ADDRESS, OWN_NAMES)
    with pytest.raises(InputError, match=rf"Expected adapters at '{ADDRESS}', each with .* found none\.$"):
        mirror.refresh()
    for name in "abc":
        put(bucket, name)
    mirror.refresh()
    before = found(mirror.folder)
    put(bucket, "a", "two")

    def fail(*_, **__):
        raise PermissionError("403: not yours")

    for method in ("get", "find"):
        with monkeypatch.context() as patched:
            patched.setattr(type(bucket), method, fail)
            with pytest.raises(InputError, match=r"Cannot copy from .*: PermissionError: 403: not yours\.$"):
                mirror.refresh()
        assert found(mirror.folder) == before and not [n for n in os.listdir(mirror.folder) if n.startswith(".")]
    assert mirror.refresh() and found(mirror.folder)["a"] == expected("two")


def test_a_change_is_reported_although_a_later_copy_fails(bucket, monkeypatch):
    put(bucket, "a")
    mirror = Mirror(ADDRESS, OWN_NAMES)
    mirror.refresh()
    put(bucket, "a", "two")
    bucket.pipe(f"{ADDRESS}/b/{CONFIG_NAME}", b"x")
    put(bucket, "b")
    monkeypatch.setattr("ia3.files.remote._TOGETHER", 1)
    get = type(bucket).get

    def failing(self, sources, targets, **options):
        if "/b/" in sources[0]:
            raise FileNotFoundError("gone")
        return get(self, sources, targets, **options)

    with monkeypatch.context() as patched:
        patched.setattr(type(bucket), "get", failing)
        with pytest.raises(InputError, match="gone"):
            mirror.refresh()
    assert found(mirror.folder) == {"a": expected("two")}
    bucket.rm(f"{ADDRESS}/b", recursive=True)
    assert mirror.refresh() and not mirror.refresh()


def source(folder: Path, text: str, *files: str) -> Path:
    folder.mkdir()
    for name, content in expected(text, *files).items():
        (folder / name).write_text(content)
    return folder


def test_an_adapter_that_is_put_there(bucket, tmp_path, monkeypatch):
    put(bucket, "b")
    mirror = Mirror(ADDRESS, OWN_NAMES)
    assert mirror.put("a", source(tmp_path / "one", "one", "task.yaml", "notes.txt")) and mirror.refresh()
    first = found(mirror.folder)
    assert first["a"].pop(UPLOADED) and first == {"a": expected("one", "task.yaml"), "b": expected("one")}
    (mirror.folder / "a" / "task.yaml").unlink()  # the copy does not matter
    assert mirror.put("a", source(tmp_path / "two", "two", "recipe.yaml")) and mirror.refresh()
    second = found(mirror.folder)
    assert second["a"].pop(UPLOADED) and second == {"a": expected("two", "recipe.yaml"), "b": expected("one")}
    assert not mirror.is_last("a")
    mirror.delete("a")
    assert mirror.refresh() and found(mirror.folder) == {"b": expected("one")}
    assert mirror.is_last("b") and not bucket.exists(f"{ADDRESS}/a/{UPLOADED}")


@pytest.mark.parametrize("new", [True, False])
def test_an_adapter_is_the_old_one_until_all_of_the_new_one_is_there(bucket, tmp_path, monkeypatch, new):
    """Someone looks after each step of a writer, who is killed before each step once."""
    put(bucket, "b")
    writer, reader = Mirror(ADDRESS, OWN_NAMES), Mirror(ADDRESS, OWN_NAMES)
    old = {} if new else {"a": expected("one", "task.yaml")}
    if not new:
        writer.put("a", source(tmp_path / "one", "one", "task.yaml"))
    reader.refresh()
    two, steps = source(tmp_path / "two", "two", "recipe.yaml"), []

    def looking(method: str):
        step = getattr(type(bucket), method)

        def call(self, *args, **options):
            step(self, *args, **options)
            reader.refresh()
            its = found(reader.folder)
            its.pop("b")
            its.get("a", {}).pop(UPLOADED, None)
            steps.append((its, list(reader.unfinished)))

        return call

    with monkeypatch.context() as patched:
        for method in ("pipe_file", "rm_file"):
            patched.setattr(type(bucket), method, looking(method))
        assert writer.put("a", two)
    *before, last = steps
    assert len(steps) == (4 if new else 5)
    assert last == ({"a": expected("two", "recipe.yaml")}, [])
    assert [its for its, _ in before] == [old] * len(before)
    assert [names for _, names in before] == [["a"]] * len(before)


def test_two_who_put_an_adapter_there_at_the_same_time(bucket, tmp_path, monkeypatch):
    put(bucket, "b")
    one, other = Mirror(ADDRESS, OWN_NAMES), Mirror(ADDRESS, OWN_NAMES)
    sources = [source(tmp_path / name, name) for name in ("one", "other")]
    write = type(bucket).pipe_file

    def between(self, path, data, **options):
        write(self, path, data, **options)
        if path.endswith(WEIGHTS_NAME) and data.startswith(b"one"):
            assert other.put("a", sources[1])

    with monkeypatch.context() as patched:
        patched.setattr(type(bucket), "pipe_file", between)
        assert not one.put("a", sources[0])
    assert one.refresh() and one.unfinished == ["a"] and list(found(one.folder)) == ["b"]
    bucket.pipe(f"{ADDRESS}/a/{UPLOADED}", b'{"half')
    one.refresh()
    assert one.unfinished == ["a"]
    assert one.put("a", sources[0]) and one.refresh() and not one.unfinished and "a" in found(one.folder)


def test_addresses_that_cannot_be_opened(monkeypatch):
    with pytest.raises(
        InputError, match=r"such as s3://bucket/adapters, found 'nope://a': Protocol not known: nope\.$"
    ):
        Mirror("nope://a", OWN_NAMES)
    missing = {"class": "no_such_package.Files", "err": "Install no_such to access it"}
    monkeypatch.setitem(known_implementations, "lacking", missing)
    with pytest.raises(InputError, match=r"opens lacking:// addresses, found none; install no_such to access it\.$"):
        fetch("lacking://a/b", OWN_NAMES)


def test_a_bank_of_addresses(bucket, tmp_path):
    model = tiny.adapt("llama", ia3)
    bank = AdapterBank(model)

    def adapter(value: float) -> dict[str, torch.Tensor]:
        return {entry.key: torch.full(entry.shape, value) for entry in bank.entries}

    for number, name in enumerate(("a", "team/b")):
        AdapterFolder.write(tmp_path / "in" / name, bank.config, adapter(float(number)))
    bucket.put(str(tmp_path / "in"), ADDRESS, recursive=True)
    assert bank.register(ADDRESS) == ["a", "team/b"]
    assert bank.gather(["a", "team/b"])[:, 0].tolist() == [0, 1]
    AdapterFolder.write(tmp_path / "in" / "c", bank.config, adapter(2.0))
    bucket.put(str(tmp_path / "in" / "c"), f"{ADDRESS}/c", recursive=True)
    assert bank.register(ADDRESS) == ["a", "c", "team/b"] and (bank.gather(["c"]) == 2).all()

    bank.save_archive(tmp_path / "archive")
    bucket.put_file(str(tmp_path / "archive"), "memory://bucket/archive.safetensors")
    other = AdapterBank(model)
    assert other.register("memory://bucket/archive.safetensors") == ["a", "c", "team/b"]
    assert other.register("memory://bucket/archive.safetensors") == ["a", "c", "team/b"]
    bank.save_archive(tmp_path / "archive", ["c"])
    bucket.put_file(str(tmp_path / "archive"), "memory://bucket/archive.safetensors")
    assert AdapterBank(model).load_archive("memory://bucket/archive.safetensors") == ["c"]
    assert (other.gather(["team/b"]) == 1).all()  # of the copy that it has opened
    copies = os.path.dirname(fetch("memory://bucket/archive.safetensors", ()))
    assert len(os.listdir(copies)) == 1


def test_the_command_line(bucket, tmp_path, capsys):
    model = tiny.adapt("llama", ia3)
    model.save_pretrained(tmp_path / "tickets")
    bucket.put(str(tmp_path / "tickets"), f"{ADDRESS}/tickets", recursive=True)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", f"{ADDRESS}/tickets"])
    assert not ended.value.code and "k_proj" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "tickets")
    for arguments in (["inspect", f"{ADDRESS}/none"], ["serve", "--adapters", f"{ADDRESS}/none"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert "found none" in error and error.count("\n") == 1
