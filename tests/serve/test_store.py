"""Adapters that come, change and go while a server runs; and what is not let in."""

import io
import json
import os
import pickle
import shutil
import socket
import threading
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from ia3 import IA3Config, get_peft_model, load_base
from ia3.adapter.stored import OWN_NAMES
from ia3.errors import InputError
from ia3.files import PENDING, UPLOADED, Mirror
from ia3.serve import store
from ia3.serve.limits import Limits
from ia3.serve.store import Store
from ia3.serve.uploads import check
from support import tiny
from support.serving import Running

WEIGHTS = "adapter_model.safetensors"

# Of an adapter in memory.
ROW = 4 * 2 * (16 + 16 + 48)


@pytest.fixture(scope="module")
def guarded(made, tmp_path_factory):
    """A folder and its server, for tests that try to change what is served, and fail."""
    place = tmp_path_factory.mktemp("guarded") / "served"
    shutil.copytree(made, place)
    (place / "adapters" / "link").symlink_to(place / "spare")
    (place / "adapters" / "linked").symlink_to(place / "adapters")
    (place / "adapters" / "outside").mkdir()
    shutil.copy(place / "spare" / "adapter_config.json", place / "adapters" / "outside")
    (place / "adapters" / "outside" / WEIGHTS).symlink_to(place / "spare" / WEIGHTS)
    pickled = place / "adapters" / "pickled"
    pickled.mkdir()
    shutil.copy(place / "spare" / "adapter_config.json", pickled)
    torch.save(load_file(place / "spare" / WEIGHTS), pickled / "adapter_model.bin")
    server = Running(place)
    upload(server, "there", files_of(place / "spare"))
    yield place, server
    server.close()


GUARDED = ["cake", "nested/pair", "soup", "tea", "there"]


def everything(place) -> list:
    return sorted(place.parent.rglob("*"))


def files_of(folder, **changes) -> dict[str, bytes]:
    found = {
        name: (folder / name).read_bytes() for name in (WEIGHTS, "adapter_config.json") if (folder / name).exists()
    }
    task = folder / "task.yaml"
    found["task.yaml"] = (
        task.read_bytes() if task.exists() else b"template: '{{ text }} ?'\nchoices: {a: good, b: bad}\n"
    )
    found |= changes
    return {name: content for name, content in found.items() if content is not None}


def upload(server, name, files):
    return server.http.post(
        "/v1/adapters", data={"name": name}, files=[("files", (file, data)) for file, data in files.items()]
    )


def listed(server):
    return [each["name"] for each in server.http.get("/v1/adapters").json()["adapters"]]


def probabilities(server, name, text="the tea was lovely"):
    response = server.classify(name, [text])
    assert response.status_code == 200, response.text
    return response.json()["predictions"][0]["probabilities"]


def test_upload_replace_and_delete(place, start):
    server = start(place)
    response = upload(server, "new", files_of(place / "adapters" / "soup"))
    assert response.status_code == 201
    assert response.json()["name"] == "new" and response.json()["labels"] == ["pos", "neg"]
    assert "new" in listed(server) and "new" in [model["id"] for model in server.http.get("/v1/models").json()["data"]]
    plain = server.classify("soup", without_adapter=True).json()["predictions"]
    soup = probabilities(server, "new")
    assert soup != plain
    response = upload(server, "new", files_of(place / "adapters" / "cake"))
    assert response.status_code == 200
    assert probabilities(server, "new") == pytest.approx(probabilities(server, "cake"))
    assert probabilities(server, "new") != pytest.approx(soup)
    assert sorted(os.listdir(place / "adapters")) == ["cake", "nested", "new", "soup", "tea"], (
        "nothing temporary is left"
    )
    again = start(place)
    assert probabilities(again, "new") == pytest.approx(probabilities(server, "cake"))
    assert server.http.delete("/v1/adapters/new").json() == {"name": "new", "deleted": True}
    assert server.classify("new").status_code == 404 and not (place / "adapters" / "new").exists()
    assert server.http.delete("/v1/adapters/new").status_code == 404


def test_what_was_not_uploaded_is_not_overwritten_or_deleted(place, start):
    server = start(place)
    before = probabilities(server, "tea")
    assert upload(server, "tea", files_of(place / "adapters" / "soup")).status_code == 409
    assert upload(server, "nested", files_of(place / "adapters" / "soup")).status_code == 409
    assert upload(server, "model", files_of(place / "adapters" / "soup")).status_code == 409
    assert probabilities(server, "tea") == before
    assert server.http.delete("/v1/adapters/nested/pair").status_code == 200
    assert "nested/pair" not in listed(server) and (place / "adapters" / "nested" / "pair" / WEIGHTS).exists()
    server.call(server.server.store.reload())
    assert "nested/pair" not in listed(server)
    assert server.http.post("/v1/adapters", json={"folder": "nested/pair"}).status_code == 201
    assert "nested/pair" in listed(server)


def test_adapters_of_an_address(place, start, monkeypatch):
    """New, changed and removed adapters at the address are served after the next look."""
    monkeypatch.setenv("IA3_CACHE", str(place / "cache"))
    mirror = Mirror(f"file://{place / 'adapters'}", OWN_NAMES)
    mirror.refresh()
    server = start(place, mirror=mirror)
    assert listed(server) == ["cake", "nested/pair", "soup", "tea"]
    tea, soup = probabilities(server, "tea"), probabilities(server, "soup")
    assert server.call(server.server.store.reload(if_changed=True)) is None
    (place / "adapters" / "tea" / "recipe.yaml").unlink()
    for file in (WEIGHTS, "calibration.json"):
        shutil.copy(place / "adapters" / "soup" / file, place / "adapters" / "tea" / file)
    shutil.copytree(place / "adapters" / "cake", place / "adapters" / "nested" / "new")
    shutil.rmtree(place / "adapters" / "soup")
    done = server.call(server.server.store.reload(if_changed=True))
    assert done == {"added": ["nested/new"], "changed": ["tea"], "removed": ["soup"], "failed": []}
    assert probabilities(server, "tea") == pytest.approx(soup) != pytest.approx(tea)
    assert probabilities(server, "nested/new") == pytest.approx(probabilities(server, "cake"))
    assert server.classify("soup").status_code == 404
    assert server.http.delete("/v1/adapters/cake").status_code == 200
    server.call(server.server.store.reload())
    assert listed(server) == ["nested/new", "nested/pair", "tea"]


def mirrored(place, start, monkeypatch, cache: str):
    """A server whose adapters are at an address, with a cache of its own."""
    monkeypatch.setenv("IA3_CACHE", str(place / cache))
    mirror = Mirror(f"file://{place / 'adapters'}", OWN_NAMES)
    mirror.refresh()
    return start(place, mirror=mirror)


@pytest.mark.parametrize("far", [True, False], ids=["address", "folder"])
def test_servers_that_share_their_adapters(place, start, monkeypatch, far):
    """What one takes, replaces and deletes, the other serves, or not, after its next look."""
    one, other = (mirrored(place, start, monkeypatch, name) if far else start(place) for name in ("one", "other"))
    look = lambda: other.call(other.server.store.reload(if_changed=True))  # noqa: E731
    assert look() is None
    cake, adapters = files_of(place / "adapters" / "cake"), place / "adapters"
    calibrated = {**cake, "calibration.json": (adapters / "soup" / "calibration.json").read_bytes()}
    assert upload(one, "new", calibrated).status_code == 201
    assert other.classify("new").status_code == 404
    assert look() == {"added": ["new"], "changed": [], "removed": [], "failed": []} and look() is None
    assert probabilities(other, "new") == pytest.approx(probabilities(one, "new"))
    assert probabilities(other, "new") != pytest.approx(probabilities(one, "cake"))
    shutil.copytree(adapters / "tea", adapters / "theirs")
    assert upload(one, "theirs", cake).status_code == 409, "nobody has uploaded it"
    assert upload(other, "new", cake).status_code == 200, "whoever took it before"
    assert not (adapters / "new" / "calibration.json").exists()
    one.call(one.server.store.reload(if_changed=True))
    assert probabilities(one, "new") == pytest.approx(probabilities(one, "cake"))
    assert probabilities(other, "new") == pytest.approx(probabilities(one, "cake"))
    fresh = start(place)
    assert one.http.delete("/v1/adapters/new").status_code == 200
    assert "new" not in listed(one)
    if not far:
        assert other.classify("new").status_code == 200, "it is in memory until the next look"
        response = fresh.classify("new")
        assert response.status_code == 404 and "no adapter 'new' any more" in response.text
    assert look()["removed"] == ["new"] and other.classify("new").status_code == 404
    again = mirrored(place, start, monkeypatch, "again") if far else start(place)
    assert listed(again) == ["cake", "nested/pair", "soup", "tea", "theirs"]


def test_what_others_put_at_an_address_is_served_after_an_upload_that_failed(place, start, monkeypatch):
    server = mirrored(place, start, monkeypatch, "cache")
    shutil.copytree(place / "adapters" / "cake", place / "adapters" / "theirs")
    assert upload(server, "tea", files_of(place / "spare")).status_code == 409, "it was not uploaded"
    assert server.call(server.server.store.reload(if_changed=True))["added"] == ["theirs"]


def test_an_upload_below_another_folder_is_deleted_there(place, start, monkeypatch):
    adapters = place / "adapters"
    shutil.copytree(adapters / "tea", adapters / "site" / "tea")
    (adapters / "site" / "tea" / UPLOADED).touch()
    server = mirrored(place, start, monkeypatch, "cache")
    assert server.http.delete("/v1/adapters/site/tea").status_code == 200
    assert "site/tea" not in listed(server) and "tea" in listed(server)
    assert (adapters / "tea" / WEIGHTS).exists() and not (adapters / "site" / "tea" / WEIGHTS).exists()


def test_an_address_that_takes_nothing(place, start, monkeypatch, caplog):
    server = mirrored(place, start, monkeypatch, "cache")
    files = files_of(place / "spare")

    def fail(*_, **__):
        raise PermissionError("403: not yours")

    with monkeypatch.context() as patched:
        patched.setattr("fsspec.implementations.local.LocalFileSystem.pipe_file", fail)
        response = upload(server, "new", files)
        assert response.status_code == 507 and "address that can be read and written to" in response.text
        assert str(place) not in response.text
    (reason,) = (record.fields["reason"] for record in caplog.records if record.message == "not stored")
    assert "403: not yours" in reason
    assert "new" not in listed(server)
    monkeypatch.setattr(Mirror, "put", lambda *_: False)
    response = upload(server, "new", files)
    assert response.status_code == 409 and "at the same time" in response.text


def test_the_last_adapter_at_an_address(place, start, monkeypatch):
    server = mirrored(place, start, monkeypatch, "cache")
    assert upload(server, "new", files_of(place / "spare")).status_code == 201
    for name in ("tea", "soup", "cake", "nested"):
        shutil.rmtree(place / "adapters" / name)
    response = server.http.delete("/v1/adapters/new")
    assert response.status_code == 409 and "only adapter at the address" in response.text
    assert probabilities(server, "new")


def test_a_folder_below_the_root(place, start):
    server = start(place)
    shutil.copytree(place / "adapters" / "soup", place / "adapters" / "deep" / "er")
    assert server.classify("deep/er").status_code == 404
    assert server.http.post("/v1/adapters", json={"folder": "deep/er"}).status_code == 201
    assert server.http.post("/v1/adapters", json={"folder": "deep/er"}).status_code == 200
    assert server.http.post("/v1/adapters", json={"folder": "deep/er", "name": "short"}).status_code == 201
    assert probabilities(server, "short") == pytest.approx(probabilities(server, "soup"))
    assert server.http.delete("/v1/adapters/short").status_code == 200
    assert probabilities(server, "deep/er") == pytest.approx(probabilities(server, "soup"))
    shutil.copytree(place / "adapters" / "soup", place / "adapters" / "damaged")
    for name, says in (("adapter_config.json", "nested too deep"), ("calibration.json", "nested too deep")):
        before = (place / "adapters" / "damaged" / name).read_bytes()
        (place / "adapters" / "damaged" / name).write_text("[" * 100_000)
        response = server.http.post("/v1/adapters", json={"folder": "damaged"})
        assert response.status_code == 422 and says in response.json()["error"]["message"]
        (place / "adapters" / "damaged" / name).write_bytes(before)
    assert server.http.post("/v1/adapters", json={"folder": "damaged"}).status_code == 201


def test_names_that_are_taken(place, start):
    """By another folder, or by an adapter that is served by another name than its own."""
    server = start(place)
    before = probabilities(server, "tea")
    alias = {"folder": "soup", "name": "short"}
    for folder, name in (("soup", "tea"), ("tea", "nested/pair"), ("soup", "model")):
        response = server.http.post("/v1/adapters", json={"folder": folder, "name": name})
        assert response.status_code == 409 and repr(name) in response.json()["error"]["message"]
    assert server.http.delete("/v1/adapters/tea").status_code == 200
    assert server.http.post("/v1/adapters", json={"folder": "soup", "name": "tea"}).status_code == 409
    assert server.http.post("/v1/adapters", json={"folder": "tea"}).status_code == 201
    assert [server.http.post("/v1/adapters", json=alias).status_code for _ in range(2)] == [201, 200]
    assert server.http.post("/v1/adapters", json={**alias, "folder": "cake"}).status_code == 409
    assert upload(server, "short", files_of(place / "spare")).status_code == 409
    assert probabilities(server, "tea") == before
    assert probabilities(server, "short") == pytest.approx(probabilities(server, "soup"))
    # A folder that comes by that name waits; when the alias' own folder changes, so does the alias.
    shutil.copytree(place / "adapters" / "cake", place / "adapters" / "short")
    shutil.copy(place / "spare" / WEIGHTS, place / "adapters" / "soup" / WEIGHTS)
    done = server.call(server.server.store.reload())
    assert sorted(done["changed"]) == ["short", "soup"] and done["failed"] == ["short"]
    assert probabilities(server, "short") == pytest.approx(probabilities(server, "soup"))
    shutil.rmtree(place / "adapters" / "soup")
    assert sorted(server.call(server.server.store.reload())["removed"]) == ["short", "soup"]
    assert server.call(server.server.store.reload())["added"] == ["short"]
    assert probabilities(server, "short") == pytest.approx(probabilities(server, "cake"))


def test_an_upload_has_all_its_names(place, start):
    server = start(place)
    assert upload(server, "new", files_of(place / "adapters" / "soup")).status_code == 201
    assert server.http.post("/v1/adapters", json={"folder": "new", "name": "short"}).status_code == 201
    assert upload(server, "new", files_of(place / "adapters" / "cake")).status_code == 200
    for name in ("new", "short"):
        assert probabilities(server, name) == pytest.approx(probabilities(server, "cake"))
    assert server.http.delete("/v1/adapters/new").status_code == 200
    assert probabilities(server, "short") == pytest.approx(probabilities(server, "cake"))
    assert server.http.delete("/v1/adapters/short").status_code == 200
    assert not (place / "adapters" / "new").exists()
    server.until(lambda: len(server.engine.bank) == 4)


@pytest.mark.parametrize(
    "folder",
    [
        "..",
        "../spare",
        "/etc",
        "tea/../../spare",
        "./tea",
        "tea/",
        "",
        "tea\\x",
        "nothing",
        "link",
        "linked/tea",
        "outside",
        "tea/task.yaml",
        "pickled",
        "te\x00a",
    ],
)
def test_no_path_leads_out_of_the_root(guarded, folder):
    place, server = guarded
    response = server.http.post("/v1/adapters", json={"folder": folder})
    assert response.status_code in (404, 422) and str(place) not in response.text
    assert listed(server) == GUARDED


@pytest.mark.parametrize(
    "name",
    [
        *("..", ".", "", "/etc", "a/b", "../x", "a b", "-a", ".a", "a\x00", "é", "a" * 101, "a\n"),
        *("adapter_config.json", "adapter_model.safetensors", "task.yaml", "recipe.yaml", "calibration.json"),
    ],
)
def test_names_of_uploads(guarded, name):
    place, server = guarded
    before = everything(place)
    response = upload(server, name, files_of(place / "spare"))
    assert response.status_code == 422 and "name" in response.json()["error"]["message"]
    assert everything(place) == before


def changed(place, change) -> bytes:
    tensors = load_file(place / "spare" / WEIGHTS)
    change(tensors)
    return save(tensors, {"format": "pt"})


def zipped(name="adapter_model.bin") -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr(name, b"x" * 100)
    return data.getvalue()


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/ia3-evil",)


def first(tensors):
    return next(iter(tensors))


BAD_WEIGHTS = {
    "nan": lambda place: changed(place, lambda t: t[first(t)].view(-1)[3:4].fill_(float("nan"))),
    "infinite": lambda place: changed(place, lambda t: t[first(t)].view(-1)[:1].fill_(float("-inf"))),
    "infinite in float32": lambda place: changed(place, lambda t: t.update({first(t): t[first(t)].double() * 1e300})),
    "integers": lambda place: changed(place, lambda t: t.update({first(t): t[first(t)].int()})),
    "8-bit floats": lambda place: changed(place, lambda t: t.update({first(t): t[first(t)].to(torch.float8_e4m3fn)})),
    "another shape": lambda place: changed(place, lambda t: t.update({first(t): torch.ones(7)})),
    "one missing": lambda place: changed(place, lambda t: t.pop(first(t))),
    "one more": lambda place: changed(place, lambda t: t.update(more=torch.ones(3))),
    "none": lambda place: save({}),
    "cut short": lambda place: (place / "spare" / WEIGHTS).read_bytes()[:-8],
    "longer": lambda place: (place / "spare" / WEIGHTS).read_bytes() + b"\0" * 8,
    "empty": lambda place: b"",
    "pickle": lambda place: pickle.dumps(Evil()),
    "torch's": lambda place: _torch_saved(place),
    "zip": lambda place: zipped(),
    "header too long": lambda place: (2**62).to_bytes(8, "little") + b"{}",
    "deep header": lambda place: _deep_header(place),
    "text": lambda place: b"hello",
}


def _torch_saved(place) -> bytes:
    data = io.BytesIO()
    torch.save(load_file(place / "spare" / WEIGHTS), data)
    return data.getvalue()


def _deep_header(place) -> bytes:
    """As long as a row's file is, so that its header is read as one."""
    whole = (place / "spare" / WEIGHTS).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = b"[" * 200_000
    return len(header).to_bytes(8, "little") + header + whole[8 + length :]


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_vectors_that_are_not_let_in(guarded, kind):
    place, server = guarded
    before, files = probabilities(server, "there"), everything(place)
    for name in ("new", "there"):
        response = upload(server, name, files_of(place / "spare", **{WEIGHTS: BAD_WEIGHTS[kind](place)}))
        assert response.status_code == 422, response.text
        assert ".py" not in response.text
    assert listed(server) == GUARDED and everything(place) == files
    assert probabilities(server, "there") == before
    assert not os.path.exists("/tmp/ia3-evil")


CONFIG = {"peft_type": "IA3", "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nchoices: *b\n"


@pytest.mark.parametrize(
    "files",
    [
        {"adapter_config.json": None},
        {WEIGHTS: None},
        {"adapter_model.bin": b"x"},
        {"../escape.yaml": b"x"},
        {"script.py": b"x"},
        {"adapter_config.json": b"not json"},
        {"adapter_config.json": b"[" * 100_000},
        {"adapter_config.json": b'{"peft_type": "LORA"}'},
        {"adapter_config.json": b"{}"},
        {"adapter_config.json": b"\xff"},
        {"adapter_config.json": json.dumps({**CONFIG, "feedforward_modules": "(a+)+$"}).encode()},
        {"adapter_config.json": json.dumps({**CONFIG, "feedforward_modules": ["v_proj"]}).encode()},
        {"adapter_config.json": json.dumps({**CONFIG, "target_modules": 3}).encode()},
        {"adapter_config.json": json.dumps({**CONFIG, "fan_in_fan_out": []}).encode()},
        {"adapter_config.json": b'{"peft_type": "IA3", "revision": ' + b"9" * 5000 + b"}"},
        {"adapter_config.json": json.dumps({**CONFIG, "revision": "\ud800"}).encode()},
        {"adapter_config.json": b'"' + b"x" * (1 << 20) + b'"'},
        {"task.yaml": b"- a\n"},
        {"task.yaml": b"template: '{{ text }}'\n"},
        {"task.yaml": b"template: '{{ text'\nchoices: [a, b]\n"},
        {"task.yaml": b"template: '{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}'\nchoices: [a, b]\n"},
        {"task.yaml": b"template: '{{ \"x\" * 10 ** 10 }} {{ text }}'\nchoices: [a, b]\n"},
        {"task.yaml": b"template: '{{ text.format() }}'\nchoices: [a, b]\n"},
        {"task.yaml": b"template: '{{ text|center(10000000000) }}'\nchoices: [a, b]\n"},
        {"task.yaml": b"template: '{{ text|replace(\"a\", \"aaaaaaaaaa\") }}'\nchoices: [a, b]\n"},
        {"task.yaml": b"template: '{{ 1|round(3000000, \"ceil\") }} {{ text }}'\nchoices: [a, b]\n"},
        {"task.yaml": "template: '{{ text|replace(\"S\", \"ß\")|upper }}'\nchoices: [a, b]\n".encode()},
        {"task.yaml": b"template: '" + b"{{ text }}" * 300 + b"'\nchoices: [a, b]\n"},
        {"task.yaml": b"template: '{{ text }}'\nchoices: {" + b", ".join(b"a%d: '{{ text|trim }}'" % i for i in range(200)) + b"}\n"},
        {"task.yaml": b"template: '{{ text|indent(9999999999) }}'\nchoices: [a, b]\n"},
        {"task.yaml": b"template: '{{ \"%9999999999d\"|format(1) }} {{ text }}'\nchoices: [a, b]\n"},
        {"task.yaml": b"template: '{{ \"%9999999999d\" % 1 }} {{ text }}'\nchoices: [a, b]\n"},
        {"task.yaml": b"template: '{{ range(9999999999)|list }} {{ text }}'\nchoices: [a, b]\n"},
        {"task.yaml": b"template: '{{ text }}'\nchoices: {a: '{{ 9 ** 99999999 }}', b: b}\n"},
        {"task.yaml": b"template: '{{ " + b"(" * 50_000 + b"text }}'\nchoices: [a, b]\n"},
        {"task.yaml": b"template: '{{ text }}'\nchoices: " + b"[" * 100_000 + b"\n"},
        {"task.yaml": LAUGHS.encode()},
        {"task.yaml": b"!!python/object/apply:os.system [touch /tmp/ia3-evil]\n"},
        {"task.yaml": b"template: '{{ " + b"not " * 300 + b"text }}'\nchoices: [a, b]\n"},
        {"task.yaml": b"template: '{{ text" + b"|trim" * 250 + b" }}'\nchoices: [a, b]\n"},
        {"task.yaml": b"template: '{{ text" + b".a" * 5000 + b" }}'\nchoices: [a, b]\n"},
        {"task.yaml": b"template: '" + b"{% if text %}" * 101 + b"x" + b"{% endif %}" * 101 + b"'\nchoices: [a, b]\n"},
        {"task.yaml": b"template: '{{ text }}'\nchoices:\n" + b"".join(b"  l%d: a%d\n" % (i, i) for i in range(20_000))},
        {"recipe.yaml": b"length_normalization: .nan\n"},
        {"recipe.yaml": b"surplus: 1\n"},
        {"calibration.json": b'{"temperature": 0}'},
        {"calibration.json": b"{" * 100_000},
    ],
    ids=range(47),
)  # fmt: skip
def test_files_that_are_not_let_in(guarded, files):
    place, server = guarded
    before = everything(place)
    response = upload(server, "new", files_of(place / "spare", **files))
    assert response.status_code == 422, response.text
    assert "Traceback" not in response.text and str(place) not in response.text
    assert listed(server) == GUARDED and everything(place) == before
    assert not os.path.exists("/tmp/ia3-evil")


def test_templates_of_uploads_may_do_what_is_harmless(place):
    template = (
        "{% if text and not title is none %}{{ title|trim|replace('_', ' ') }}: {% endif %}{{ text[:100]|lower ~ '?' }}"
    )
    folder = place / "new"
    folder.mkdir()
    for name, data in files_of(place / "spare", **{"task.yaml": None}).items():
        (folder / name).write_bytes(data)
    (folder / "task.yaml").write_text(json.dumps({"template": template, "choices": {"a": "good", "b": "{{ title }}"}}))
    check(folder)


def test_an_uploaded_template_repeats_no_more_than_fits(place, start):
    """However often it names its column: nothing longer is made, and what fits of it is asked."""
    server = start(place)
    template = "{{ text" + " ~ text" * 249 + " }}"
    task = json.dumps({"template": template, "choices": {"a": "good", "b": "bad"}}).encode()
    assert upload(server, "new", files_of(place / "spare", **{"task.yaml": task})).status_code == 201
    response = server.classify("new", ["tea " * 25_000])
    assert response.status_code == 422 and "longer than 10000000 characters" in response.json()["error"]["message"]
    assert server.classify("new", ["tea "]).status_code == 200


def test_forms_that_are_none(place, start):
    server = start(place)
    files = files_of(place / "spare")
    good = [("files", (name, data)) for name, data in files.items()]
    for response in (
        server.http.post("/v1/adapters", files=good),
        server.http.post("/v1/adapters", data={"name": "a", "surplus": "b"}, files=good),
        server.http.post("/v1/adapters", data={"name": "a"}, files=[*good, good[0]]),
        server.http.post(
            "/v1/adapters", content=b"garbage", headers={"Content-Type": "multipart/form-data; boundary=x"}
        ),
        server.http.post("/v1/adapters", content=b"garbage", headers={"Content-Type": "multipart/form-data"}),
        server.http.post("/v1/adapters", json={"surplus": 1}),
        server.http.post("/v1/adapters", json={"folder": 1}),
    ):
        assert response.status_code == 422, response.text
    assert listed(server) == ["cake", "nested/pair", "soup", "tea"]


def test_limits_of_uploads(place, start):
    server = start(place, limits=Limits(upload_bytes=20_000))
    large = files_of(place / "spare", **{"task.yaml": b"#" * 200_000})
    assert upload(server, "new", large).status_code == 413
    server.server.store.max_adapters = 5
    assert upload(server, "new", files_of(place / "spare")).status_code == 201
    response = upload(server, "another", files_of(place / "spare"))
    assert response.status_code == 409 and "at most 5 adapters" in response.json()["error"]["message"]
    assert upload(server, "new", files_of(place / "spare")).status_code == 200
    assert listed(server) == ["cake", "nested/pair", "new", "soup", "tea"]


def test_reading_the_folder_again(place, start):
    server = start(place)
    before = {name: probabilities(server, name) for name in ("tea", "soup", "cake")}
    adapters = place / "adapters"
    shutil.copytree(adapters / "soup", adapters / "new")
    shutil.copy(place / "spare" / WEIGHTS, adapters / "tea" / WEIGHTS)
    shutil.rmtree(adapters / "cake")
    (adapters / "soup" / "calibration.json").unlink()
    weights = adapters / "nested" / "pair" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-8])
    done = server.call(server.server.store.reload())
    assert done == {"added": ["new"], "changed": ["soup", "tea"], "removed": ["cake"], "failed": ["nested/pair"]}
    assert listed(server) == ["nested/pair", "new", "soup", "tea"]
    assert server.classify("cake").status_code == 404
    assert probabilities(server, "tea") != pytest.approx(before["tea"])
    assert probabilities(server, "soup") != pytest.approx(before["soup"]), "its temperature has changed"
    assert probabilities(server, "new") == pytest.approx(before["soup"])
    nothing = {"added": [], "changed": [], "removed": [], "failed": ["nested/pair"]}
    assert server.call(server.server.store.reload()) == nothing


# What others have changed on disk can be read no more, unless it is in memory.
@pytest.mark.parametrize(
    "how, resident", [("upload", True), ("upload", False), ("delete", True), ("delete", False), ("reload", True)]
)
def test_what_was_accepted_ends_with_the_old_vectors(place, start, how, resident):
    server = start(place, memory=3 * ROW)
    upload(server, "new", files_of(place / "adapters" / "soup"))
    old = probabilities(server, "new", "a tasty soup")
    if resident:
        probabilities(server, "new")
    else:
        _evict(server)
    results: list = []
    asking = threading.Thread(target=lambda: results.append(probabilities(server, "new", "a tasty soup")))
    with server.holding():
        asking.start()
        server.until(lambda: server.engine.waiting.questions == 1)
        changing = threading.Thread(target=_change, args=(server, place, how))
        changing.start()
        # The change waits for the model's thread, in front of the question.
        server.until(lambda: server.engine.waiting.orders >= 1)
    asking.join(60)
    changing.join(60)
    assert results == [pytest.approx(old)]
    if how == "delete":
        assert server.classify("new").status_code == 404
    else:
        assert probabilities(server, "new", "a tasty soup") != pytest.approx(results[0])
    server.until(lambda: len(server.engine.bank) == 4 + (how != "delete"))


def _evict(server) -> None:
    """Ask two others, as many as memory has room for."""
    evictions = server.engine.bank.statistics.evictions
    for name in ("tea", "cake"):
        probabilities(server, name)
    assert server.engine.bank.statistics.evictions > evictions


def _change(server, place, how) -> None:
    if how == "upload":
        assert upload(server, "new", files_of(place / "adapters" / "cake")).status_code == 200
    elif how == "delete":
        assert server.http.delete("/v1/adapters/new").status_code == 200
    else:
        shutil.copy(place / "adapters" / "cake" / WEIGHTS, place / "adapters" / "new" / WEIGHTS)
        server.call(server.server.store.reload())


def test_a_request_that_comes_while_folders_are_exchanged(place, start, monkeypatch):
    """It was nobody's when the change began, and not in memory."""
    server = start(place, memory=3 * ROW)
    upload(server, "new", files_of(place / "adapters" / "soup"))
    old = probabilities(server, "new", "a tasty soup")
    _evict(server)
    key, results = server.server.store.get("new").key, []
    asking = threading.Thread(target=lambda: results.append(probabilities(server, "new", "a tasty soup")))

    take_over = store.take_over

    def slowly(*args):
        asking.start()
        server.until(lambda: server.engine.waiting.questions)
        take_over(*args)

    monkeypatch.setattr(store, "take_over", slowly)
    _change(server, place, "upload")
    asking.join(60)
    assert results == [pytest.approx(old)] and server.server.store.get("new").key != key
    assert probabilities(server, "new", "a tasty soup") == pytest.approx(probabilities(server, "cake", "a tasty soup"))


def test_a_text_ends_with_the_vectors_that_it_began_with(place, start):
    server = start(place)
    server.engine.decoder.ends = set()
    upload(server, "new", files_of(place / "adapters" / "soup"))
    body = {"model": "new", "prompt": "the tea was", "max_tokens": 30, "temperature": 0}
    old = server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    step, count = server.engine.decoder.step, []
    begun, go = threading.Event(), threading.Event()

    def stepping():
        count.append(1)
        if len(count) == 5:
            begun.set()
            go.wait(60)
        step()

    server.engine.decoder.step = stepping
    results: list = []
    asking = threading.Thread(
        target=lambda: results.append(server.http.post("/v1/completions", json=body).json()["choices"][0]["text"])
    )
    asking.start()
    assert begun.wait(60)
    changing = threading.Thread(target=_change, args=(server, place, "upload"))
    changing.start()
    server.until(lambda: server.engine.waiting.orders)
    go.set()
    asking.join(60)
    changing.join(60)
    assert results == [old]
    assert server.http.post("/v1/completions", json=body).json()["choices"][0]["text"] != old


def test_reload_under_load(place, start):
    """Every answer is one of the two contents', and none is an error."""
    server = start(place)
    contents = [files_of(place / "adapters" / name) for name in ("soup", "cake")]
    upload(server, "new", contents[0])
    allowed = [probabilities(server, name) for name in ("cake",)]
    allowed.append(probabilities(server, "new"))
    stop, failures, answers = threading.Event(), [], []

    def ask() -> None:
        while not stop.is_set():
            response = server.classify("new")
            if response.status_code != 200:
                failures.append(response.text)
                return
            answers.append(response.json()["predictions"][0]["probabilities"])

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for thread in askers:
        thread.start()
    for i in range(12):
        assert upload(server, "new", contents[(i + 1) % 2]).status_code == 200
        server.call(server.server.store.reload())
    stop.set()
    for thread in askers:
        thread.join(60)
    assert not failures and answers
    for found in answers:
        assert any(found == pytest.approx(one, abs=1e-5) for one in allowed)
    server.until(lambda: len(server.engine.bank) == 5)


def test_what_a_killed_process_has_left(place, start):
    """In the middle of a replacement, of an upload, of a deletion."""
    adapters = place / "adapters"
    shutil.copytree(adapters / "tea", adapters / "replaced")
    shutil.copytree(adapters / "soup", adapters / "replaced" / PENDING)
    (adapters / "replaced" / "adapter_config.json").unlink()
    for name in (".upload-x1", ".deleted-x2"):
        shutil.copytree(adapters / "cake", adapters / name)
    other = Store(adapters)
    assert sorted(os.listdir(adapters)) == ["cake", "nested", "replaced", "soup", "tea"]
    server = start(place)
    assert probabilities(server, "replaced") == pytest.approx(probabilities(server, "soup"))
    # What belongs to a server that runs is left alone.
    (adapters / ".upload-x3").mkdir()
    start(place)
    assert (adapters / ".upload-x3").exists() and len(other) == 0
    del other  # the others share the lock
    Store(adapters)
    assert (adapters / ".upload-x3").exists()


def test_a_root_that_takes_no_files(place, start):
    shutil.rmtree(place / "adapters")
    (place / "adapters").write_text("no folder")
    server = start(place)
    response = upload(server, "new", files_of(place / "spare"))
    assert response.status_code == 507 and str(place) not in response.text
    assert "Expected an adapters' folder that can be written to" in response.json()["error"]["message"]


def test_uploads_at_a_time(place, start):
    server = start(place, limits=Limits(uploads=1, deadline=1))
    head = "POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(head.encode() + b"Content-Length: 100\r\n\r\n--x\r\n")
        server.until(lambda: server.server.uploads.length == 1)
        response = upload(server, "new", files_of(place / "spare"))
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        assert "1 uploads" in response.json()["error"]["message"]
        server.until(lambda: server.server.uploads.length == 0, 20)
    assert upload(server, "new", files_of(place / "spare")).status_code == 201


def test_folders_by_the_names_of_files(place, caplog):
    """The log names them: as adapters they would hide files, or be hidden."""
    for name in ("adapter_config.json", "tea/task.json/recipe.yaml"):
        shutil.copytree(place / "spare", place / "adapters" / name)
    found = Store(place / "adapters")
    assert sorted(found.found) == ["cake", "nested/pair", "soup", "tea"]
    assert "'adapter_config.json', 'tea/task.json/recipe.yaml'" in caplog.text


def test_the_root(place):
    with pytest.raises(InputError, match="whose subfolders are the adapters"):
        Store(place / "adapters" / "tea")
    with pytest.raises(InputError, match="at most 2 adapters, found 4"):
        Store(place / "adapters", max_adapters=2)
    assert Store(place / "nothing").kinds("model") == []


def _another_config(place, folder) -> None:
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _other_modules(place, folder) -> None:
    base, _ = load_base(str(place / "model"))
    other = get_peft_model(base, IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    tiny.randomize(other)
    other.save_pretrained(folder)


def _another_base(place, folder) -> None:
    tensors = {key: torch.ones(*(2 * n if n > 1 else n for n in t.shape)) for key, t in _tensors(folder).items()}
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((folder / "adapter_config.json").read_text())
    changed = {**config, "base_model_name_or_path": "/home/somebody/wide"}
    (folder / "adapter_config.json").write_text(json.dumps(changed))


def _tensors(folder):
    return load_file(folder / WEIGHTS)


def _cut_short(place, folder) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


def _deep_config(place, folder) -> None:
    (folder / "adapter_config.json").write_text("[" * 100_000)


UNUSABLE = {
    _another_config: "found peft_type 'LORA'",
    _other_modules: "than the adapters here at",
    _another_base: "it was made for 'wide'; has other shapes than this model",
    _cut_short: "Expected a whole safetensors file",
    _deep_config: "nested too deep",
}


@pytest.fixture(params=UNUSABLE)
def unusable(request, place):
    """Makes a folder of an adapter that cannot be served, and gives the reason."""

    def make(name):
        shutil.copytree(place / "adapters" / "tea", place / "adapters" / name)
        request.param(place, place / "adapters" / name)
        return UNUSABLE[request.param]

    return make


def refused(server, name) -> str:
    """The reason that clients are given wherever they ask for an adapter."""
    body = {"model": name, "prompt": "a"}
    responses = [
        server.classify(name),
        server.classify(name, without_adapter=True),
        server.http.post("/v1/completions", json=body),
        server.http.post("/v1/chat/completions", json={"model": name, "messages": [{"role": "user", "content": "a"}]}),
        server.http.get(f"/v1/models/{name}"),
        server.http.get(f"/v1/adapters/{name}"),
    ]
    assert [response.status_code for response in responses] == [422, 422, 400, 400, 422, 422]
    errors = [response.json()["error"] for response in responses]
    assert {error["code"] for error in errors} == {"adapter_unusable"}
    assert len({error["message"] for error in errors}) == 1
    return errors[0]["message"]


def test_what_cannot_be_served_is_named_and_not_listed(place, start, unusable, caplog):
    """At the start, and among what appears later; the most frequent kind is served."""
    reason = unusable("a-first")
    server = start(place)
    assert listed(server) == ["cake", "nested/pair", "soup", "tea"] and server.classify("tea").status_code == 200
    assert server.metric("ia3_adapters") == 4
    said = refused(server, "a-first")
    assert said.startswith("Adapter 'a-first' cannot be served with 'model': ") and reason in said
    assert str(place) not in said and "bank" not in said and "@" not in said
    unusable("later")
    done = server.call(server.server.store.reload())
    assert done == {"added": [], "changed": [], "removed": [], "failed": ["a-first", "later"]}
    assert reason in refused(server, "later") and listed(server) == ["cake", "nested/pair", "soup", "tea"]
    logged = [record.fields["adapter"] for record in caplog.records if record.getMessage() == "not served"]
    assert logged == ["a-first", "a-first", "later"]
    assert server.http.post("/v1/adapters", json={"folder": "later"}).status_code == 422
    for name in ("later", "a-first"):
        shutil.rmtree(place / "adapters" / name)
    shutil.copytree(place / "adapters" / "soup", place / "adapters" / "later")
    assert server.call(server.server.store.reload())["added"] == ["later"]
    assert server.classify("later").status_code == 200 and server.classify("a-first").status_code == 404


def test_the_log_names_some_of_many_that_cannot_be_served(place, start, caplog, monkeypatch):
    monkeypatch.setattr(store, "_MOST_LOGGED", 2)
    for number in range(5):
        shutil.copytree(place / "adapters" / "tea", place / "adapters" / f"lora-{number}")
        _another_config(place, place / "adapters" / f"lora-{number}")
    server = start(place)
    fields = [record.fields for record in caplog.records if record.getMessage() == "not served"]
    assert [each.get("adapter") for each in fields] == ["lora-0", "lora-1", None] and fields[2] == {"more": 3}
    assert "LORA" in refused(server, "lora-4")


def test_an_upload_that_can_be_served_no_more(place, start):
    """It can be replaced, and deleted."""
    server = start(place)
    for name in ("new", "old"):
        assert upload(server, name, files_of(place / "spare")).status_code == 201
        _another_config(place, place / "adapters" / name)
    again = start(place)
    assert "LORA" in refused(again, "new")
    assert upload(again, "new", files_of(place / "spare")).status_code == 201, "there was none to be replaced"
    assert again.classify("new").status_code == 200 and "new" in listed(again)
    assert again.http.delete("/v1/adapters/old").status_code == 200
    assert again.classify("old").status_code == 404 and not (place / "adapters" / "old").exists()
    unusable = place / "adapters" / "lora"
    shutil.copytree(place / "adapters" / "tea", unusable)
    _another_config(place, unusable)
    again.call(again.server.store.reload())
    assert again.http.delete("/v1/adapters/lora").status_code == 200
    assert again.classify("lora").status_code == 404 and unusable.exists(), "it was not uploaded"


def test_a_server_without_adapters(place, start):
    shutil.rmtree(place / "adapters")
    server = start(place)
    assert listed(server) == []
    assert server.http.post("/v1/completions", json={"model": "model", "prompt": "a"}).status_code == 200
    assert upload(server, "new", files_of(place / "spare")).status_code == 201
    assert sum(probabilities(server, "new").values()) == pytest.approx(1)
