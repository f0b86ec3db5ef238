"""Files beside an adapter, here or on the hub."""

from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from ia3 import InputError
from ia3.adapter.stored import CALIBRATION_NAME
from ia3.evaluation.calibration import Calibration
from ia3.files import hub_answers, locate, locate_beside, parse_json, read_fields, read_json, reading
from ia3.files.hub import _reach_hub
from ia3.folder import AdapterFolder

CALIBRATION = Calibration(
    temperature=2.0, rows=8, log_loss=0.5, log_loss_before=0.7, calibration_error=0.1, calibration_error_before=0.2
)


def answer(monkeypatch, result, cached=None):
    def download(repo_id, filename, **kwargs):
        if isinstance(result, Exception):
            raise result
        return str(result / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: cached)


def test_what_a_folder_has(tmp_path):
    assert AdapterFolder(tmp_path).calibration is None
    AdapterFolder(tmp_path).calibrate(CALIBRATION)
    assert AdapterFolder(tmp_path).calibration == CALIBRATION


def test_what_the_hub_has(tmp_path, monkeypatch):
    AdapterFolder(tmp_path).calibrate(CALIBRATION)
    answer(monkeypatch, tmp_path)
    assert locate_beside("owner/name", CALIBRATION_NAME) == str(tmp_path / CALIBRATION_NAME)
    assert AdapterFolder("owner/name").calibration == CALIBRATION


def test_what_the_hub_has_not(monkeypatch):
    response = SimpleNamespace(headers={}, request=None)
    answer(monkeypatch, RemoteEntryNotFoundError("no such file", response=response))  # type: ignore[arg-type]
    assert locate_beside("owner/name", CALIBRATION_NAME) is None


def test_what_the_hub_once_said_it_has_not(monkeypatch):
    answer(monkeypatch, LocalEntryNotFoundError("offline"), cached=object())
    assert locate_beside("owner/name", CALIBRATION_NAME) is None


@pytest.mark.parametrize("failure", [LocalEntryNotFoundError("offline"), TimeoutError("slow"), OSError("no route")])
def test_a_hub_that_does_not_say_is_an_error(failure, monkeypatch):
    answer(monkeypatch, failure)
    with pytest.raises(InputError, match=CALIBRATION_NAME) as error:
        locate_beside("owner/name", CALIBRATION_NAME)
    assert "\n" not in str(error.value)


@pytest.fixture(autouse=True)
def nothing_remembered():
    _reach_hub.cache_clear()
    yield
    _reach_hub.cache_clear()


class TestWithoutANetwork:
    @pytest.fixture(autouse=True)
    def requests(self, monkeypatch):
        def head(url, timeout):
            asked.append((url, timeout))
            raise ConnectionError("no such host")

        asked = []
        monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=head))
        return asked

    def test_the_hub_is_asked_once(self, requests):
        assert not hub_answers()
        [(url, timeout)] = requests
        assert url.startswith("https://") and timeout <= 30

    def test_that_it_was_not_reached_is_not_remembered(self, requests, monkeypatch):
        assert not hub_answers() and not hub_answers() and len(requests) == 2
        monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=lambda *args, **kw: "200"))
        assert hub_answers()

    def test_what_is_in_the_cache_is_found(self, tmp_path, monkeypatch):
        def download(repo_id, filename, local_files_only, **kwargs):
            assert local_files_only
            return str(tmp_path / filename)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        assert locate("owner/name", "x.json") == str(tmp_path / "x.json")

    def test_what_is_not_there_is_one_line(self, requests):
        with pytest.raises(InputError, match=r"Can't find 'x.json' at 'owner/name': .* the hub cannot be reached\.$"):
            locate("owner/name", "x.json")
        assert len(requests) == 1


def test_a_hub_that_answers_whatever_it_says(monkeypatch):
    asked = []
    head = SimpleNamespace(head=lambda *args, **kw: asked.append(args) or "503")
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: head)
    assert hub_answers() and hub_answers() and len(asked) == 1  # not for each file


@pytest.mark.parametrize(
    "failure",
    [
        RecursionError("deep"), OverflowError("large"), MemoryError(), KeyError("a"), TypeError("kind"), ValueError("a\nb"),
        PermissionError(13, "Permission denied"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), StopIteration(),
    ],
    ids=lambda failure: type(failure).__name__,
)  # fmt: skip
def test_whatever_a_reader_raises_is_bad_input(failure):
    with (
        pytest.raises(InputError, match=r"in tea\.txt: |read tea\.txt: ") as error,
        reading("tea.txt", "tea", "brew it"),
    ):
        raise failure
    assert error.value.__cause__ is failure and "\n" not in str(error.value)


def test_a_readers_own_message_and_an_interruption_pass():
    with pytest.raises(InputError, match=r"^mine$"), reading("tea.txt", "tea"):
        raise InputError("mine")
    with pytest.raises(KeyboardInterrupt), reading("tea.txt", "tea"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 5000, "nested too deep"),
        ("[" * 60 + "]" * 60, "more than 50 levels"),
        ('{"a": ' * 60 + "1" + "}" * 60, "more than 50 levels"),
        ("9" * 5000, "digits"),
        ('{"a": [' + "9" * 400 + "]}", "int too large"),
        ('{"a": ["\\ud800"]}', "surrogates not allowed"),
        ('{"\\uDFff": 1}', "surrogates not allowed"),
        (b"\xff", "UTF-8"),
        ("{", "Expecting"),
    ],
)
def test_json_that_cannot_be_used(text, message):
    with pytest.raises(InputError, match=message) as error:
        parse_json(text, "x.json")
    assert "x.json" in str(error.value) and "\n" not in str(error.value)


def test_json_that_can():
    emoji, wide = '{"a": "\\ud83d\\ude00"}', str([[]] * 1000)
    assert parse_json(emoji, "x") == {"a": "\U0001f600"} and parse_json(wide, "x") == [[]] * 1000


def test_json_files_hold_fields(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(InputError, match="found list; brew it"):
        read_json(tmp_path / "x.json", "brew it")
    with pytest.raises(InputError, match="Cannot read"):
        read_json(tmp_path)


LAUGHS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(9))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: " + "[" * 5000, "nested too deep"),
        ("a: " + "[" * 60 + "]" * 60, "more than 50 levels"),
        ("a: &a [*a]", "more than 50 levels"),
        ("a: &a {b: *a, c: *a}", "more than 50 levels"),
        (LAUGHS, "aliases followed"),
        ('a: "\\ud800"', "surrogates not allowed"),
        ("a: " + "1" * 5000, "digits"),
        ("a: [", "Expected YAML in .*, but found '<stream end>'"),
    ],
    ids=range(8),
)
def test_yaml_that_cannot_be_used(text, message, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_fields(tmp_path / "x.yaml", yaml.SafeLoader, "a")
    assert "\n" not in str(error.value)


def test_yaml_with_aliases(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &a [x, y]\nb: *a\n")
    assert read_fields(tmp_path / "x.yaml", yaml.SafeLoader, "a") == {"a": ["x", "y"], "b": ["x", "y"]}


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "/" + "x" * 5000])
def test_names_that_no_file_can_have(name):
    for find in (locate, locate_beside):
        with pytest.raises(InputError, match="Can't find") as error:
            find(name, CALIBRATION_NAME)
        assert len(str(error.value)) <= 600
