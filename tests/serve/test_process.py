"""`ia3 serve` as a process: its options, signals, connections; and the page in a browser."""

import json
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from ia3.cli import main
from support.launched import Process


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *map(str, arguments)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_options_that_are_refused(made, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("IA3_SERVE_TOKEN", raising=False)
    model = ("--model", made / "model")
    assert "a token with --host 0.0.0.0" in refused(capsys, *model, "--host", "0.0.0.0")
    assert "no 'nothing'" in refused(capsys, *model, "--adapters", "nothing")
    assert "whose subfolders" in refused(capsys, *model, "--adapters", made / "adapters" / "tea")
    assert "found no" in refused(capsys, *model, "--token-file", tmp_path / "nothing")
    for text in (b"", b" \n", b"a b", "é".encode(), b"\xe9"):
        (tmp_path / "token").write_bytes(text)
        assert "printable" in refused(capsys, *model, "--token-file", tmp_path / "token", "--host", "0.0.0.0")
    assert "--queue of at least --max-texts" in refused(capsys, *model, "--queue", 3)
    assert "Expected a --dtype of 'auto'" in refused(capsys, *model, "--dtype", "half")
    assert "model's folder" in refused(capsys, "--model", "./nothing")
    for option in ("--tensor-parallel-size", "--data-parallel-size"):
        assert "are for --engine vllm" in refused(capsys, *model, option, 2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "Cannot listen" in refused(
            capsys, *model, "--adapters", made / "adapters", "--port", taken.getsockname()[1]
        )


@pytest.fixture
def launch():
    processes: list[Process] = []

    def launch(*arguments, **environment) -> Process:
        processes.append(Process(*arguments, **environment))
        return processes[-1]

    yield launch
    for each in processes:
        each.close()


def test_an_address_is_followed(place, launch):
    address = f"file://{place / 'adapters'}"
    server = launch(place, "--adapters", address, "--refresh", 0.1, IA3_CACHE=str(place / "cache"))
    server.wait_until_ready()
    shutil.copytree(place / "adapters" / "soup", place / "adapters" / "new")
    line = server.until(lambda: next((line for line in server.log if line.get("event") == "reload"), None))
    assert (line["added"], line["changed"], line["removed"], line["failed"]) == (1, 0, 0, 0)
    assert server.http.post("/v1/classify", json={"adapter": "new", "texts": ["tea"]}).status_code == 200
    (place / "adapters").rename(place / "gone")  # all at once
    failed = server.until(lambda: next((line for line in server.log if line.get("event") == "reload failed"), None))
    assert "found none" in failed["reason"]
    assert server.http.post("/v1/classify", json={"adapter": "new", "texts": ["tea"]}).status_code == 200
    server.send(signal.SIGTERM)
    assert server.ended() == 0


def test_signals_and_slow_connections(place, launch):
    """Two hundred connections that say little; the folder read again; then SIGTERM while requests are under way."""
    server = launch(place, "--deadline", "60", "--max-adapters", "5")
    assert server.http.get("/health").status_code == 200
    server.wait_until_ready()
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
    for i, connection in enumerate(slow):
        connection.sendall((b"", head[:20], head)[i % 3])
    body = {"adapter": "tea", "texts": ["the tea was lovely"] * 40}
    for _ in range(3):
        assert server.http.post("/v1/classify", json=body).status_code == 200
    shutil.copytree(place / "adapters" / "soup", place / "adapters" / "new")
    server.send(signal.SIGHUP)
    server.until(lambda: any(line.get("event") == "reload" and line["added"] == 1 for line in server.log))
    assert server.http.post("/v1/classify", json={**body, "adapter": "new"}).status_code == 200

    shutil.copytree(place / "adapters" / "soup", place / "adapters" / "newer")
    server.send(signal.SIGHUP)
    failed = server.until(lambda: next((line for line in server.log if line.get("event") == "reload failed"), None))
    assert failed["level"] == "error" and "at most 5 adapters, found 6" in failed["reason"]
    assert server.http.get("/ready").status_code == 200

    for connection in slow[2::3]:  # their bodies do not come any more
        connection.close()
    stream = {"model": "tea", "prompt": "the tea", "max_tokens": 60, "seed": 1, "stream": True, "temperature": 2}
    waiting = [ask(server.port, "/v1/completions", stream) for _ in range(4)]
    waiting += [ask(server.port, "/v1/classify", body) for _ in range(16)]
    waiting += [ask(server.port, "/v1/classify", {**body, "texts": ["tea"]}) for _ in range(150)]
    server.send(signal.SIGTERM)
    with ThreadPoolExecutor(170) as pool:
        answers = list(pool.map(answer, waiting))
    assert [text[:15] for text in answers] == ["HTTP/1.1 200 OK"] * 170
    assert all("data: [DONE]" in text for text in answers[:4])
    assert all('"predictions"' in text for text in answers[4:])
    assert server.ended() == 0
    ours = [line for line in server.log if line["logger"].startswith(("ia3", "uvicorn"))]
    assert [line for line in ours if line["level"] in ("warning", "error")] == [failed]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.http.base_url}/health")
    for connection in slow:
        connection.close()


def test_a_model_whose_thread_ends_ends_the_process(made, launch):
    broken = """
from ia3.serve import local
local.nsmallest = lambda count, waiting, key: list(map(lambda one: 1 / 0, waiting))
"""
    server = launch(made, program=broken)
    server.wait_until_ready()
    response = server.http.post("/v1/classify", json={"adapter": "tea", "texts": ["tea"]})
    assert response.status_code == 500
    assert server.ended() == 2 and server.said == "ia3: The engine has ended by an error: division by zero\n"
    (line,) = [line for line in server.log if line["event"] == "the engine has failed"]
    assert line["error"] == "ZeroDivisionError" and "<lambda>" in line["frames"][-1]


def ask(port: int, path: str, body: dict) -> socket.socket:
    """Send a request, and do not wait for its answer."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port), 60)
    connection.sendall(head.encode() + data)
    return connection


def answer(connection: socket.socket) -> str:
    """All that comes until the server closes the connection."""
    with connection:
        data = b""
        while more := connection.recv(65536):
            data += more
    return data.decode()


def test_a_token_from_the_environment(made, launch):
    server = launch(made, "--host", "0.0.0.0", IA3_SERVE_TOKEN="right-token")
    server.wait_until_ready()
    address = f"http://127.0.0.1:{server.port}/v1/models"
    assert server.http.get(address).status_code == 401
    assert server.http.get(address, headers={"Authorization": "Bearer right-token"}).status_code == 200
    server.send(signal.SIGINT)
    assert server.ended() == 130


def test_a_model_that_cannot_be_loaded(made, tmp_path, launch):
    shutil.copytree(made / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"damaged")
    (tmp_path / "adapters").mkdir()
    server = launch(tmp_path)
    assert server.ended() == 2
    assert server.said.startswith("ia3: Cannot load") and not any("Traceback" in text for text in server.others)


def test_a_connection_that_says_nothing_is_closed(made, start):
    server = start(made, idle=0.2)
    for beginning in (b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(beginning)
            client.settimeout(30)
            data = b""
            while more := client.recv(1000):
                data += more
            assert (b"200 OK" in data) is beginning.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("token", [None, "right-token"])
def test_the_page(made, start, browser, token):
    server = start(made, token=token)
    page = browser.new_page()
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(server.url)
    if token:
        page.get_by_role("alert").filter(has_text="Bearer").wait_for()
        page.fill("#token", token)
        page.press("#token", "Tab")
    page.get_by_text("4 adapters of model").wait_for()
    page.fill("#adapter", "tea")
    page.press("#adapter", "Tab")
    page.fill("#column-text", "the tea was lovely")
    page.click("#go")
    page.locator("#sides").wait_for()
    page.locator("#with .row").first.wait_for()
    for place, adapted in (("#with", True), ("#without", False)):
        response = server.classify("tea", without_adapter=not adapted).json()["predictions"][0]
        shown = page.locator(f"{place} .row").all_inner_texts()
        best = sorted(response["probabilities"].items(), key=lambda item: -item[1])
        assert [text.split() for text in shown] == [[label, f"{100 * p:.1f}", "%"] for label, p in best]
    page.fill("#adapter", "nested/pair")
    page.press("#adapter", "Tab")
    page.fill("#column-first", "tea")
    page.fill("#column-second", "<img src=x onerror=alert(1)>")
    page.click("#go")
    page.locator("#with .row").nth(2).wait_for()
    page.fill("#adapter", "nothing")
    page.press("#adapter", "Tab")
    page.get_by_role("alert").filter(has_text="There is no adapter 'nothing'").wait_for()
    assert all(url.startswith((server.url, "data:")) for url in asked) and not errors
    page.goto(f"{server.url}/docs")
    page.get_by_text("/v1/classify").first.wait_for()
    assert all(url.startswith((server.url, "data:")) for url in asked) and not errors
    page.close()
