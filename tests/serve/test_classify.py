"""Labels and probabilities over HTTP: those of `predict`, in mixed batches; and what a server says to bad requests."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from ia3 import IA3Model, Recipe, Scorer, Task, load_base, predict
from ia3.scoring.question import Question, row_length
from ia3.serve import limits
from ia3.serve.engine import ScoreJob
from ia3.serve.limits import Limits
from ia3.task.wording import Wording
from support import words

TEXTS = [row["text"] for row in words.rows(12)] + ["awful", "what a perfect cake , it was lovely and fresh today"]


def expected(made, name, rows, temperature=1.0, adapted=True, power=1.0):
    """What `predict` says, with this adapter alone in the model."""
    base, tokenizer = load_base(str(made / "model"))
    folder = made / "adapters" / name
    model = IA3Model.from_pretrained(base, str(folder)) if adapted else base
    recipe = Recipe().changed(length_normalization=power)
    return predict(model, tokenizer, Task.from_file(folder / "task.yaml"), rows, temperature=temperature, recipe=recipe)


def check(found, wanted):
    assert [item["label"] for item in found] == [item.label for item in wanted]
    for item, other in zip(found, wanted, strict=True):
        assert item["probabilities"] == pytest.approx(other.probabilities, abs=1e-5)
        assert list(item["probabilities"]) == list(other.probabilities)


@pytest.mark.parametrize(
    "name, options", [("tea", {"power": 0.5}), ("soup", {"temperature": 2.5}), ("cake", {})]
)  # fmt: skip
def test_each_adapter_answers_as_predict_does(running, made, name, options):
    response = running.classify(name, TEXTS)
    assert response.status_code == 200
    found = response.json()
    assert found["adapter"] == found["task"] == name
    check(found["predictions"], expected(made, name, [{"text": text} for text in TEXTS], **options))
    assert found["usage"]["prompt_tokens"] == sum(len(text.split()) + 4 for text in TEXTS)


def test_the_base_model_with_an_adapters_task(running, made):
    found = running.classify("soup", TEXTS, without_adapter=True).json()
    assert found["adapter"] is None and found["task"] == "soup"
    check(found["predictions"], expected(made, "soup", [{"text": text} for text in TEXTS], adapted=False))


def test_an_engine_scores_choices_in_the_order_in_which_they_were_listed(running):
    choices = [[5], [6, 7], [8]]
    asked = [ScoreJob(None, Question([3, 4], choices, order=order), 0.5) for order in (None, (2, 0, 1))]
    plain, listed = running.call(running.engine.score(asked))
    assert listed == pytest.approx([plain[1], plain[2], plain[0]], abs=1e-5) and len({*plain}) == 3


def test_rows_of_several_columns_and_abstention(running, made):
    rows = [{"first": "tea", "second": "soup"}, {"first": "a lovely cake", "second": "it", "surplus": 1.5}]
    response = running.http.post("/v1/classify", json={"adapter": "nested/pair", "rows": rows})
    check(response.json()["predictions"], expected(made, "nested/pair", rows))
    strict = running.http.post("/v1/classify", json={"adapter": "nested/pair", "rows": rows, "abstain_below": 1.0})
    assert [item["label"] for item in strict.json()["predictions"]] == [None, None]


def test_requests_of_different_adapters_share_a_batch(running, made):
    names = ["tea", "soup", "cake"] * 4
    rows = running.metric("ia3_batch_rows_sum"), running.metric("ia3_batch_rows_count")
    mixed = running.metric("ia3_batch_adapters_sum"), running.metric("ia3_batch_adapters_count")
    with ThreadPoolExecutor(12) as pool:
        with running.holding():
            asked = [pool.submit(running.classify, name, [text]) for name, text in zip(names, TEXTS, strict=False)]
            running.until(lambda: running.engine.waiting.questions == 12)
            assert running.metric("ia3_queue_length") == 12
        found = [each.result().json()["predictions"] for each in asked]
    options = {"tea": {"power": 0.5}, "soup": {"temperature": 2.5}, "cake": {}}
    for name, text, item in zip(names, TEXTS, found, strict=False):
        check(item, expected(made, name, [{"text": text}], **options[name]))
    assert running.metric("ia3_batch_rows_sum") - rows[0] == 12
    passes = running.metric("ia3_batch_rows_count") - rows[1]
    assert passes <= 3, "questions of similar length go through the model together"
    assert running.metric("ia3_batch_adapters_count") - mixed[1] == passes
    assert running.metric("ia3_batch_adapters_sum") - mixed[0] > passes, "with different adapters"
    assert running.metric("ia3_queue_length") == 0


def test_metrics_are_ours_alone(running):
    running.classify()
    lines = running.http.get("/metrics").text.splitlines()
    assert all(line.startswith(("ia3_", "# HELP ia3_", "# TYPE ia3_")) for line in lines)
    assert running.metric("ia3_adapters") == 4
    assert running.metric("ia3_adapters_resident") >= 1
    assert running.metric("ia3_adapter_hits_total") + running.metric("ia3_adapter_misses_total") >= 1
    assert running.metric("ia3_request_seconds_count") >= 1
    assert 'ia3_requests_total{method="POST",route="/v1/classify",status="200"}' in "\n".join(lines)


def test_what_there_is(running):
    assert running.http.get("/health").json() == {"status": "ok"}
    assert running.http.get("/ready").json() == {"status": "ready"}
    names = ["cake", "nested/pair", "soup", "tea"]
    models = running.http.get("/v1/models").json()
    assert models["object"] == "list" and [model["id"] for model in models["data"]] == ["model", *names]
    assert running.http.get("/v1/models/nested/pair").json()["id"] == "nested/pair"
    assert running.http.get("/v1/models/nothing").status_code == 404
    adapters = running.http.get("/v1/adapters").json()
    assert adapters == {"base": "model", "adapters": [{"name": name} for name in names]}
    assert running.http.get("/v1/adapters/nested/pair").json() == {
        "name": "nested/pair", "columns": ["first", "second"], "labels": ["0", "1", "2"], "description": None,
        "example": None, "calibrated": False,
    }  # fmt: skip
    assert running.http.get("/v1/adapters/soup").json()["calibrated"] is True


def test_the_documentation_needs_no_other_site(running):
    schema = running.http.get("/openapi.json").json()
    assert {"/v1/classify", "/v1/completions", "/v1/chat/completions", "/v1/adapters", "/v1/models"} <= set(
        schema["paths"]
    )
    body = schema["paths"]["/v1/classify"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "abstain_below" in schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]
    references = [part.split('"')[0] for part in json.dumps(schema).split('"$ref": "')[1:]]
    assert references and all(
        reference.rpartition("/")[2] in schema["components"]["schemas"] for reference in references
    )
    page = running.http.get("/docs").text
    assert "http://" not in page and "https://" not in page
    sources = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert sources and all(running.http.get(source).status_code == 200 for source in sources)


@pytest.mark.parametrize(
    "body, says",
    [
        ({}, "expected adapter or adapters, one of the two"),
        ({"adapter": "tea"}, "expected texts or rows"),
        ({"adapter": "tea", "texts": ["a"], "rows": [{"text": "a"}]}, "expected texts or rows"),
        ({"adapter": "tea", "texts": []}, "texts"),
        ({"adapter": "tea", "texts": "a"}, "texts"),
        ({"adapter": "tea", "texts": [1]}, "texts.0"),
        ({"adapter": "tea", "texts": ["a"], "surplus": 1}, "surplus"),
        ({"adapter": "tea", "texts": ["a"], "abstain_below": 2}, "abstain_below"),
        ({"adapter": "tea", "texts": [" "]}, "found it empty"),
        ({"adapter": "tea", "rows": [{"other": "a"}]}, "'text'"),
        ({"adapter": "tea", "rows": [{"text": {"a": 1}}]}, "rows"),
        ({"adapter": "nested/pair", "texts": ["a"]}, "the columns 'first', 'second', found a text alone"),
        ([], "body"),
        ("a", "body"),
    ],
)
def test_bodies_that_are_not_valid(running, body, says):
    response = running.http.post("/v1/classify", json=body)
    assert response.status_code == 422
    assert says in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"\x00" * 100, b'{"adapter": "tea", "texts": ["\\ud800"]}',
        b'{"adapter": "tea", "texts": ["a"], "abstain_below": NaN}',
        b'{"adapter": "tea", "texts": ["a"], "abstain_below": Infinity}',
        b'{"adapter": "tea", "rows": [{"text": NaN}]}', b'{"adapter": "tea", "rows": [{"text": 1e999}]}',
        b'{"adapter": "tea", "rows": [{"text": ' + b"9" * 5000 + b"}]}",
        b"[" * 100_000, b'{"a":' * 100_000, b'{"adapter": "tea", "texts": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)  # fmt: skip
def test_garbage(running, content):
    response = running.http.post("/v1/classify", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 422) if b"999" in content[-50:] else response.status_code == 422
    assert "Traceback" not in response.text and ".py" not in response.text
    assert running.classify().status_code == 200


def test_unknown_names_and_methods(running):
    response = running.classify("teaa")
    assert response.status_code == 404 and "close to it: 'tea'" in response.json()["error"]["message"]
    assert running.http.get("/nothing").status_code == 404
    assert running.http.get("/v1/classify").status_code == 405
    assert running.http.get("/v1/adapters/../../etc").status_code == 404
    assert running.classify("x" * 100_000).status_code == 404
    plain = running.http.post("/v1/classify", content=b"{}", headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    for number in range(3):
        assert running.http.request(f"M{number}", "/health").status_code == 405
    metrics = running.http.get("/metrics").text
    assert 'method="M' not in metrics and 'method="other",route="/health",status="405"} 3.0' in metrics


def test_no_other_site_reaches_a_server_without_a_token(running):
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        assert running.http.get("/v1/adapters", headers=headers).status_code == 403
    assert running.http.get("/v1/adapters", headers={"Origin": running.url}).status_code == 200
    assert running.http.get("/v1/adapters", headers={"Host": "[::1]:8000"}).status_code == 200
    assert running.http.get("/v1/adapters", headers={"Host": "["}).status_code == 400


def test_a_token_is_wanted(made, start):
    server = start(made, token="right-token")
    assert server.classify().status_code == 200
    with httpx.Client(base_url=server.url) as stranger:
        for path in ("/", "/health", "/ready", "/docs", "/openapi.json"):
            assert stranger.get(path).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right-token"},
                        {"Authorization": "Basic right-token"}, {"Authorization": "Bearer r\xe9".encode("latin-1")}):  # fmt: skip
            for path in ("/metrics", "/v1/models", "/v1/adapters", "/nothing"):
                response = stranger.get(path, headers=headers)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
            assert stranger.post("/v1/classify", content=b"garbage", headers=headers).status_code == 401
            assert stranger.delete("/v1/adapters/tea", headers=headers).status_code == 401


def test_limits(made, start):
    server = start(made, limits=Limits(body_bytes=4000, texts=3, text_tokens=12, queue=5, upload_bytes=10_000))
    assert server.classify(texts=["tea"] * 3).status_code == 200
    response = server.classify(texts=["tea"] * 4)
    assert response.status_code == 422 and "at most 3 texts, found 4" in response.json()["error"]["message"]
    response = server.classify(texts=["tea", "tea " * 20])
    assert response.status_code == 422 and "at most 12 tokens, found 24 (row 2)." in response.json()["error"]["message"]
    for size in (4100, 5_000_000):
        response = server.http.post("/v1/classify", content=b"x" * size, headers={"Content-Type": "application/json"})
        assert response.status_code == 413, size

    def chunks():
        for _ in range(100):
            yield b"x" * 1000

    response = server.http.post("/v1/classify", content=chunks(), headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    with ThreadPoolExecutor(2) as pool, server.holding():
        first = pool.submit(server.classify, texts=["tea"] * 3)
        server.until(lambda: server.server.queue.length == 3)
        response = server.classify(texts=["tea"] * 3)
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        second = pool.submit(server.classify, texts=["tea"] * 2)
        server.until(lambda: server.server.queue.length == 5)
        assert server.classify(texts=["tea"]).status_code == 429
    assert first.result().status_code == second.result().status_code == 200
    assert server.server.queue.length == 0


CLASSIFY = "POST /v1/classify HTTP/1.1\r\nHost: localhost\r\n"


def said_to(server, head: str, body: bytes = b"") -> tuple[int, str]:
    """Status and text of the response to bytes."""
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.settimeout(30)
        client.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
        data = b""
        while more := client.recv(65536):
            data += more
    return int(data.split()[1]), data.decode()


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Type: application/json", "Content-Type: multipart/form-data; boundary=x"),
        ("Content-Type: multipart/form-data; boundary=x", "content-type: application/json"),
        ("Content-Type: application/json",) * 2,
        ("Authorization: Bearer a", "Authorization: Bearer b"),
        ("Origin: http://localhost", "Origin: http://localhost"),
        ("Host: localhost",),
        ("Content-Length: 2", "Content-Length: 3"),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        ("Content-Length: 2", "Transfer-Encoding: gzip"),
        ("Content-Encoding: a", "Content-Encoding: b"),
    ],
)
def test_headers_that_decide_something_stand_once(running, headers):
    status, text = said_to(running, CLASSIFY + "".join(f"{header}\r\n" for header in headers), b"{}")
    assert status == 400
    message = json.loads(text.partition("\r\n\r\n")[2])["error"]["message"]
    assert headers[-1].split(":")[0].lower() in message.lower()


def test_no_header_lets_a_long_body_in(made, start):
    """What counts as an upload is where uploads go, with one content type."""
    server = start(made, limits=Limits(body_bytes=4000))
    body = json.dumps({"adapter": "tea", "texts": ["tea " * 2000]}).encode()
    length = f"Content-Length: {len(body)}\r\n"
    kinds = ("Content-Type: application/json\r\n", "Content-Type: multipart/form-data; boundary=x\r\n")
    for sent in (kinds[0], kinds[1], "".join(kinds), "".join(reversed(kinds))):
        status, _ = said_to(server, CLASSIFY + length + sent, body)
        assert status in (400, 413, 415), sent
    assert server.metric("ia3_batch_rows_count") == 0


def test_a_prompt_is_bounded_before_it_is_tokenized(made, start, monkeypatch):
    """By characters, whatever its tokens are: one of spaces has none."""
    server = start(made, limits=Limits(text_characters=1000))
    tokenized = count_tokenized(server, monkeypatch)
    responses = [
        server.classify(texts=["tea", " tea" * 300]),
        server.classify(texts=["tea", "tea" + " " * 1000 + "tea"]),
        server.http.post("/v1/completions", json={"model": "tea", "prompt": ["tea", "tea" + " " * 1000]}),
        server.http.post(
            "/v1/chat/completions", json={"model": "tea", "messages": [{"role": "user", "content": "tea " * 300}]}
        ),
    ]
    assert [response.status_code for response in responses] == [422, 422, 400, 400]
    for response in responses:
        error = response.json()["error"]
        assert error["code"] == "too_long" and "at most 1000 characters" in error["message"]
    assert "(row 2)" in responses[0].json()["error"]["message"]
    assert max(tokenized, default=0) < 1000
    assert server.classify(texts=["tea", "tea " * 200]).status_code == 200


def count_tokenized(server, monkeypatch) -> list[int]:
    """Characters of each text that the server's tokenizer is given from now on."""
    found = []
    kind = type(server.engine.tokenizer)
    call = kind.__call__

    def counting(self, text, *args, **kwargs):
        found.extend(map(len, [text] if isinstance(text, str) else text))
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", counting)
    return found


def test_a_text_that_is_much_too_long_is_cut_unread(made, start, monkeypatch):
    """The beginning counts, as ever; the rest is not tokenized, and what is, is not again and again."""
    server = start(made)
    context = server.engine.context_length
    text = " ".join(["lovely tea and"] * 60_000)
    tokenized = count_tokenized(server, monkeypatch)
    response = server.classify("cake", [text])
    assert response.status_code == 200
    assert context - 3 <= response.json()["usage"]["prompt_tokens"] < context
    most = max(10_000, 16 * context)
    assert max(tokenized) <= most and sum(tokenized) < 20 * 6 * context
    check(response.json()["predictions"], expected(made, "cake", [{"text": text[:20_000]}]))


def spied_lengths(monkeypatch) -> list[int]:
    """Tokens of each question that is scored from now on, in the order in which they are."""
    found, score = [], Scorer.score

    def spied(self, questions, *args, **kwargs):
        found.extend(map(row_length, questions))
        return score(self, questions, *args, **kwargs)

    monkeypatch.setattr(Scorer, "score", spied)
    return found


def test_long_texts_wait_behind_short_ones(made, start, monkeypatch):
    server = start(made)
    lengths = spied_lengths(monkeypatch)
    long = "the tea was lovely " * 100
    with ThreadPoolExecutor(6) as pool:
        with server.holding():
            asked = []
            for number, text in enumerate([long, long, "tea", long, "soup", "cake"], 1):
                asked.append(pool.submit(server.classify, texts=[text]))
                server.until(lambda number=number: server.engine.waiting.questions == number)
        assert [each.result().status_code for each in asked] == [200] * 6
    assert lengths == sorted(lengths) and len(lengths) == 6


def test_a_long_text_does_not_wait_for_ever(made, start, monkeypatch):
    monkeypatch.setattr(limits, "_LONGEST_WAIT", 0.05)
    server = start(made)
    lengths = spied_lengths(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        with server.holding():
            first = pool.submit(server.classify, texts=["the tea was lovely " * 100])
            server.until(lambda: server.engine.waiting.questions == 1)
            time.sleep(0.06)
            second = pool.submit(server.classify)
            server.until(lambda: server.engine.waiting.questions == 2)
        assert first.result().status_code == second.result().status_code == 200
    assert lengths == sorted(lengths, reverse=True)


def test_rendering_and_tokenizing_end_with_the_request(made, start, monkeypatch):
    """At its deadline, and when its client leaves: no further row is looked at."""
    server = start(made, limits=Limits(deadline=0.5))
    begun, go, rows = threading.Event(), threading.Event(), []
    prompt = Wording.prompt.func

    def slow(self):
        rows.append(self.row)
        begun.set()
        go.wait(60)
        return prompt(self)

    monkeypatch.setattr(Wording, "prompt", property(slow))
    response = server.classify(texts=["tea"] * 50)
    assert response.status_code == 504 and len(rows) == 1
    go.set()
    server.until(lambda: server.classify("soup").status_code == 200)
    assert len([row for row in rows if row["text"] == "tea"]) == 1
    go.clear()
    begun.clear()
    body = json.dumps({"adapter": "tea", "texts": ["soup"] * 50}).encode()
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(f"{CLASSIFY}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert begun.wait(60)
    client.close()
    server.until(lambda: server.server.queue.length == 0)
    go.set()
    assert server.classify("cake").status_code == 200
    assert len([row for row in rows if row["text"] == "soup"]) == 1


def test_short_texts_are_tokenized_between_the_rows_of_long_ones(made, start, monkeypatch):
    server = start(made)
    begun, go, order = threading.Event(), threading.Event(), []
    prompt = Wording.prompt.func

    def slow(self):
        begun.set()
        go.wait(60)
        order.append(len(self.row["text"]))
        return prompt(self)

    monkeypatch.setattr(Wording, "prompt", property(slow))
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(server.classify, texts=["tea " * 10_000] * 3)
        assert begun.wait(60)
        short = pool.submit(server.classify, texts=["tea"])
        server.until(lambda: server.server.worker.waiting == 1)
        go.set()
        assert long.result().status_code == short.result().status_code == 200
    assert order == [40_000, 3, 40_000, 40_000]


def test_messages_repeat_little_of_what_they_were_given(running):
    for body in (
        {"adapter": "tea", "rows": [{"x" * 100_000: "a", "y" * 100_000: "b"}]},
        {"adapter": "tea", "texts": ["a"], "z" * 50_000: 1},
    ):
        response = running.http.post("/v1/classify", json=body)
        assert response.status_code == 422 and len(response.text) < 2000


def test_a_deadline_passes(made, start):
    server = start(made, limits=Limits(deadline=0.3))
    with server.holding():
        response = server.classify()
    assert response.status_code == 504 and "0.3 seconds" in response.json()["error"]["message"]
    rows = server.metric("ia3_batch_rows_sum")
    server.until(lambda: server.classify().status_code == 200)
    assert server.metric("ia3_batch_rows_sum") == rows + 1, "the late question was dropped"


def test_a_slow_body_is_given_up(made, start):
    server = start(made, limits=Limits(deadline=0.3))
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        head = "POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        client.sendall(head.encode() + b"{")
        client.settimeout(30)
        assert client.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_client_that_leaves_costs_nothing(made, start):
    server = start(made)
    with server.holding():
        client = socket.create_connection(("127.0.0.1", server.port))
        body = json.dumps({"adapter": "tea", "texts": ["tea"] * 50}).encode()
        head = f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        server.until(lambda: server.engine.waiting.questions == 50)
        client.close()
        server.until(lambda: server.server.queue.length == 0)
    assert server.classify().status_code == 200
    assert server.metric("ia3_batch_rows_sum") == 1
    assert 'status="499"' in server.http.get("/metrics").text


def test_health_while_the_model_is_loaded(made, start, monkeypatch):
    go = threading.Event()
    load = load_base

    def slowly(*args):
        go.wait(60)
        return load(*args)

    monkeypatch.setattr("ia3.adapter.pretrained.load_base", slowly)
    server = start(made, wait=False)
    try:
        server.until(lambda: _answers(server))
        assert server.http.get("/ready").status_code == 503
        for method, path in (("GET", "/v1/models"), ("GET", "/v1/adapters"), ("GET", "/v1/adapters/tea"),
                             ("POST", "/v1/classify"), ("POST", "/v1/completions"), ("POST", "/v1/adapters"),
                             ("DELETE", "/v1/adapters/tea")):  # fmt: skip
            response = server.http.request(method, path)
            assert response.status_code == 503 and response.headers["retry-after"]
    finally:
        go.set()
    server.until(lambda: server.http.get("/ready").status_code == 200)
    assert server.classify().status_code == 200


def _answers(server) -> bool:
    try:
        return server.http.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def _cut_short(folder) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def _deep(folder) -> None:
    (folder / "adapter_config.json").write_text("[" * 100_000)


def _no_file(folder) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").mkdir()


@pytest.mark.parametrize("damage", [_cut_short, _deep, _no_file])
def test_an_adapter_that_is_broken_is_no_other_ones_trouble(place, start, damage):
    """Its files change for the worse behind the server's back, before they were ever read."""
    server = start(place)
    damage(place / "adapters" / "cake")
    with ThreadPoolExecutor(3) as pool:
        with server.holding():
            asked = {name: pool.submit(server.classify, name) for name in ("tea", "cake", "soup")}
            server.until(lambda: server.engine.waiting.questions == 3)
        found = {name: each.result() for name, each in asked.items()}
    assert {name: each.status_code for name, each in found.items()} == {"tea": 200, "soup": 200, "cake": 500}
    assert "cannot be used" in found["cake"].json()["error"]["message"] and str(place) not in found["cake"].text
    body = {"model": "cake", "prompt": "a", "max_tokens": 1}
    assert server.http.post("/v1/completions", json=body).status_code == 500
    assert server.http.post("/v1/completions", json={**body, "model": "tea"}).status_code == 200


def test_a_thread_that_ends_fails_everything_at_once(made, start, monkeypatch):
    server = start(made)
    failures: list = []
    server.server.on_failure = failures.append
    server.engine.decoder.ends = set()
    body = {"model": "tea", "prompt": "the tea", "max_tokens": 1000}

    def broken():
        raise RuntimeError("secret text")

    with ThreadPoolExecutor(2) as pool:
        text = pool.submit(server.http.post, "/v1/completions", json=body)
        server.until(lambda: server.engine.running == 1)
        monkeypatch.setattr(server.engine.decoder, "step", broken)
        asked = pool.submit(server.classify)
        assert text.result().status_code == asked.result().status_code == 500
    for response in (server.classify(), server.http.post("/v1/completions", json=body)):
        assert response.status_code == 500 and "secret" not in response.text
    assert [str(error) for error in failures] == ["secret text"]
    assert server.http.get("/ready").status_code == 503 and server.http.get("/health").status_code == 200
    assert server.server.queue.length == 0


def test_a_power_that_is_more_than_a_float_can_be(place, start):
    (place / "adapters" / "cake" / "recipe.yaml").write_text("length_normalization: 5000\n")
    server = start(place)
    rows = [{"text": text} for text in TEXTS]
    check(server.classify("cake", TEXTS).json()["predictions"], expected(place, "cake", rows, power=5000.0))
    assert server.metric("ia3_batch_rows_sum") == len(TEXTS), "none was asked twice"


def test_more_adapters_than_memory_has_room_for(place, start):
    row = 4 * 2 * (16 + 16 + 48)
    server = start(place, memory=3 * row)  # of two, and the base
    assert server.engine.batch == 2
    wanted = {name: server.classify(name).json() for name in ("tea", "soup", "cake")}
    with ThreadPoolExecutor(12) as pool:
        names = ["tea", "soup", "cake"] * 4
        found = list(pool.map(server.classify, names))
    for name, response in zip(names, found, strict=True):
        one = response.json()["predictions"][0]["probabilities"]
        assert one == pytest.approx(wanted[name]["predictions"][0]["probabilities"], abs=1e-5)
    assert server.metric("ia3_adapter_evictions_total") > 0
    assert server.metric("ia3_adapters_resident") <= 2


def test_logs_hold_no_texts(made, start, caplog):
    caplog.set_level("DEBUG")
    secret = "lovely and nobody knows"
    for log_texts in (False, True):
        caplog.clear()
        server = start(made, log_texts=log_texts)
        server.classify(texts=[secret])
        server.http.post("/v1/completions", json={"model": "tea", "prompt": secret, "max_tokens": 2})
        server.http.post("/v1/classify", content=secret.encode(), headers={"Content-Type": "application/json"})
        server.until(lambda: sum(record.getMessage() == "request" for record in caplog.records) >= 3)
        logged = [json.dumps(getattr(record, "fields", {})) + record.getMessage() for record in caplog.records]
        assert any(secret in line for line in logged) is log_texts
        assert any('"route": "/v1/classify"' in line and '"status": 200' in line for line in logged)


def test_an_unexpected_error_tells_a_client_nothing(made, start, monkeypatch, caplog):
    server = start(made)

    def broken(*args):
        raise RuntimeError("secret text")

    monkeypatch.setattr(server.engine, "questions", broken)
    response = server.classify()
    assert response.status_code == 500
    assert "secret" not in response.text and "RuntimeError" not in response.text
    assert response.headers["x-request-id"] in response.json()["error"]["message"]
    server.until(lambda: any("RuntimeError" in str(getattr(record, "fields", "")) for record in caplog.records))
    assert not any("secret text" in str(record.__dict__) for record in caplog.records)
