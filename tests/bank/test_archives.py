"""Archives with an index: names against a dict, what a bank reads of an archive, and what is damaged."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ia3
from ia3 import InputError
from ia3.bank import AdapterBank, archives
from ia3.bank.archives import Names, hash_of, write_archive
from ia3.folder import AdapterFolder
from support import tiny

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@pytest.fixture(scope="module")
def model():
    return tiny.adapt("llama", ia3)


def save(bank, path, values: dict[str, float]):
    """An archive of constant adapters."""
    names = sorted(values)
    rows = (torch.full((bank.width,), float(values[name])) for name in names)
    write_archive(path, bank._layout, bank.config, names, rows)
    return path


def again(path, change) -> None:
    """Write an archive again after `change(arrays)` of its index, as a writer with a bug would."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    arrays = {}
    for name in ("ends", "hashes", "order", "names"):
        start, end = header[name]["data_offsets"]
        kind = np.uint8 if name == "names" else np.int64
        arrays[name] = np.frombuffer(data[8 + length + start : 8 + length + end], kind).copy()
    start, _ = header["rows"]["data_offsets"]
    change(arrays)
    index = b"".join(array.tobytes() for array in arrays.values())
    header["__metadata__"]["ia3_index"] = hashlib.blake2b(index).hexdigest()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + index + data[8 + length + start :])


def one_line(error) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


@given(names=st.sets(TEXTS), others=st.lists(TEXTS), sought=st.lists(TEXTS))
@settings(max_examples=200)
def test_names_are_those_of_a_dict(names, others, sought):
    reference = {name: number for number, name in enumerate(sorted(names))}
    index = Names.of(sorted(names))
    index.require_index()
    for name in [*reference, *sought, "\ud800"]:
        assert index.number(name) == reference.get(name)
        assert (name in index) == (name in reference)
    assert list(index) == index[:] == list(reference) and index == list(reference) and len(index) == len(reference)
    assert index != [*reference, "more"] and 3 not in index
    assert [index[i] for i in range(-len(index), len(index))] == 2 * list(reference)
    assert sorted(index.shared(Names.of(sorted(set(others))))) == sorted(names & set(others))
    for name in sought:
        place = sum(each < name for each in names)
        assert index.near(name) == list(reference)[max(0, place - 100) : place + 100]


def test_names_whose_hashes_are_equal(monkeypatch):
    monkeypatch.setattr(archives, "hash_of", lambda name: hash_of(name[:1]))
    names = [f"{first}{number}" for first in "abc" for number in range(5)]
    index = Names.of(names)
    index.require_index()
    assert [index.number(name) for name in names] == list(range(15))
    assert index.number("a7") is None and index.number("d0") is None
    assert sorted(index.shared(Names.of(["a3", "a7", "c1"]))) == ["a3", "c1"]


@given(
    values=st.dictionaries(TEXTS.filter(lambda name: name and not name.startswith("__")), st.integers(-9, 9)),
    steps=st.lists(
        st.tuples(st.sampled_from(["gather", "delete", "add", "register"]), st.integers(0, 30)), max_size=10
    ),
)
@settings(max_examples=40)
def test_a_bank_of_an_archive_is_a_dict(model, tmp_path_factory, values, steps):
    """Gathering, deleting and adding beside an archive, with room for two, against a dict."""
    bank = AdapterBank(model, budget=3 * AdapterBank(model).statistics.row_bytes)
    path = save(bank, tmp_path_factory.mktemp("archive") / "archive", values)
    reference, added = {**values}, set()
    assert bank.register(path) == sorted(values) and bank.statistics.resident == 0
    names = [*values, "new"]
    for number, (step, which) in enumerate(steps):
        name = names[which % len(names)]
        if step == "register" and not added & values.keys():
            bank.register(path)  # the deleted ones are back
            reference |= values
        elif step == "register":
            with pytest.raises(InputError, match="known from another place"):
                bank.register(path)
        elif (step == "add") == (name in reference):
            with pytest.raises(InputError, match=r"Unknown adapter|already exists"):
                bank.add(name, {}) if step == "add" else getattr(bank, step)([name] if step == "gather" else name)
        elif step == "gather":
            assert (bank.gather([name]) == reference[name]).all()
        elif step == "delete":
            bank.delete(name)
            del reference[name]
            added.discard(name)
        else:
            bank.add(name, {entry.key: torch.full(entry.shape, float(number)) for entry in bank.entries})
            reference[name] = number
            added.add(name)
        assert len(bank) == bank.statistics.known == len(reference)
        assert sorted(bank) == sorted(bank.names) == sorted(reference)
        assert all((name in bank) == (name in reference) for name in names)
    if reference:
        bank.save_archive(path.parent / "copy")
        copied = AdapterBank(model)
        copied.register(path.parent / "copy")
        assert copied.gather(sorted(reference))[:, 0].tolist() == [reference[name] for name in sorted(reference)]
    bank.close()


def test_registering_and_gathering_read_no_other_names(model, tmp_path, monkeypatch):
    bank = AdapterBank(model, budget=3 * AdapterBank(model).statistics.row_bytes)
    path = save(bank, tmp_path / "archive", {f"tenant-{number}": number for number in range(3000)})
    read = []
    taken = Names.__getitem__
    monkeypatch.setattr(Names, "__getitem__", lambda self, index: read.append(index) or taken(self, index))
    bank.register(path)
    for number in range(0, 3000, 29):
        assert (bank.gather([f"tenant-{number}"]) == number).all()
    assert "tenant-7" in bank and "tenant-3000" not in bank and len(bank) == 3000
    assert not read and not bank._homes  # what was evicted takes no memory
    with pytest.raises(InputError, match=r"Unknown adapter 'tenant-129x'.*close to it: 'tenant-129'") as error:
        bank.gather(["tenant-129x"])
    one_line(error)
    assert len(read) < 250
    with pytest.raises(InputError, match=r"there are 'tenant-0', .* and 2995 more"):
        bank.gather(["?"])


def test_a_refilled_adapter_is_no_longer_the_archives(model, tmp_path):
    bank = AdapterBank(model, budget=2 * AdapterBank(model).statistics.row_bytes)
    path = save(bank, tmp_path / "archive", {"a": 1.0, "b": 2.0})
    bank.register(path)
    AdapterFolder.write(
        tmp_path / "new", bank.config, {entry.key: torch.full(entry.shape, 7.0) for entry in bank.entries}
    )
    bank.load(tmp_path / "new", "a")
    for _ in range(2):
        assert (bank.gather(["b"]) == 2).all() and (bank.gather(["a"]) == 7).all()
    assert len(bank) == 2 and sorted(bank) == ["a", "b"] and bank.acts_from("b") == "start"
    with pytest.raises(InputError, match="'a' of these adapters are known from another place"):
        bank.register(path)
    with pytest.raises(InputError, match="'b' of these adapters are known from another place"):
        bank.link(tmp_path / "new", "b")
    bank.delete("a")
    assert "a" not in bank and bank.names == ["b"]
    bank.register(path)
    assert (bank.gather(["a"]) == 1).all()


def test_two_archives_with_one_name(model, tmp_path):
    bank = AdapterBank(model)
    bank.register(save(bank, tmp_path / "one", {"a": 1.0, "b": 1.0}))
    two = save(bank, tmp_path / "two", {"b": 2.0, "c": 2.0})
    with pytest.raises(InputError, match="'b' of these adapters are known from another place") as error:
        bank.register(two)
    one_line(error)
    assert bank.names == ["a", "b"]
    bank.delete("b")
    bank.register(two)
    assert bank.gather(["a", "b", "c"])[:, 0].tolist() == [1, 2, 2] and len(bank) == 3
    with pytest.raises(InputError, match="'b' of these"):
        bank.register(tmp_path / "one")


def test_an_archive_of_none(model, tmp_path):
    bank = AdapterBank(model)
    assert bank.register(save(bank, tmp_path / "none", {})) == [] and len(bank) == 0 and "a" not in bank
    with pytest.raises(InputError, match="there are none"):
        bank.gather(["a"])


def test_every_byte_of_an_index_counts(model, tmp_path):
    bank = AdapterBank(model)
    path = save(bank, tmp_path / "archive", {"a": 1.0, "bc": 2.0, "def": 3.0})
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for place in range(start, start + 3 * 24 + 8):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(InputError, match="its index of names is damaged; copy or download it again") as error:
            bank.register(path)
        one_line(error)
    assert not bank.names


INDEXES = {
    "two with one name": (lambda its: (its["names"].__setitem__(2, ord("a")), same(its)), "two adapters .* 'aa'"),
    "a name behind the end": (lambda its: its["ends"].__setitem__(-1, 99), "index of names is damaged"),
    "ends that go back": (lambda its: its["ends"].__setitem__(0, 5), "index of names is damaged"),
    "hashes in no order": (lambda its: its["hashes"].__setitem__(0, (1 << 63) - 1), "index of names is damaged"),
    "an adapter that there is not": (lambda its: its["order"].__setitem__(0, 3), "index of names is damaged"),
    "one adapter twice": (lambda its: its["order"].__setitem__(0, its["order"][1]), "index of names is damaged"),
    "a reserved name": (lambda its: reserved(its), "Expected an adapter name .* found '__base__'"),
}


def same(its) -> None:
    """The names "aa" and "ba" as "aa" twice."""
    its["hashes"][:] = hash_of("aa")
    its["order"][:] = [0, 1]


def reserved(its) -> None:
    its["names"][:8], its["ends"][:] = list(b"__base__"), [8, 8]
    its["hashes"][:], its["order"][:] = sorted([hash_of("__base__"), 1 << 62]), [0, 1]


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_another_writer_made(case, model, tmp_path):
    change, message = INDEXES[case]
    bank = AdapterBank(model)
    path = save(bank, tmp_path / "archive", {"aa": 1.0, "ba": 2.0})
    again(path, lambda its: None)
    assert AdapterBank(model).register(path) == ["aa", "ba"]
    again(path, change)
    with pytest.raises(InputError, match=message) as error:
        bank.register(path)
    one_line(error)
    assert not bank.names


def test_names_that_are_no_text(model, tmp_path):
    bank = AdapterBank(model)
    path = save(bank, tmp_path / "archive", {"aa": 1.0, "ba": 2.0})
    again(path, lambda its: its["names"].__setitem__(0, 0xFF))
    bank.register(path)
    assert (bank.gather(["ba"]) == 2).all()
    with pytest.raises(InputError, match=r"Expected names in UTF-8, found b'.xffa'"):
        list(bank)
    with pytest.raises(InputError, match="Expected names that can be written as UTF-8"):
        bank.add("\ud800", {entry.key: torch.ones(entry.shape) for entry in bank.entries})
        bank.save_archive(tmp_path / "new", ["\ud800"])
    assert not (tmp_path / "new").exists()


def test_a_written_archive_replaces_one_that_is_open(model, tmp_path):
    bank = AdapterBank(model)
    path = save(bank, tmp_path / "archive", {"a": 1.0})
    bank.register(path)
    save(bank, path, {"a": 2.0, "b": 2.0})
    assert (bank.gather(["a"]) == 1).all() and "b" not in bank
    assert os.listdir(tmp_path) == ["archive"]
