"""Files beside an adapter, here or on the hub."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from ia3 import InputError
from ia3.files import _reach_hub, hub_answers, locate, locate_beside
from ia3.folder import CALIBRATION_NAME, AdapterFolder
from ia3.tfew.calibration import Calibration

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
