"""OpenAI's routes, by OpenAI's own client."""

import json
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from ia3 import IA3Model, load_base
from ia3.serve.engine import Piece
from ia3.serve.limits import Limits


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def greedy(made):
    """What a model with one adapter says greedily: text, number of tokens, why it ended."""

    def greedy(name, prompt, length):
        base, tokenizer = load_base(str(made / "model"))
        model = base if name is None else IA3Model.from_pretrained(base, str(made / "adapters" / name))
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        mask = torch.ones_like(ids)
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=length, do_sample=False)
        whole, before = (tokenizer.decode(its, skip_special_tokens=True) for its in (found[0], ids[0]))
        assert whole.startswith(before)
        found = found[0, ids.shape[1] :].tolist()
        finish = "stop" if found[-1] == tokenizer.eos_token_id else "length"
        return whole[len(before) :], len(found), finish

    return greedy


def test_models(client):
    assert [model.id for model in client.models.list()] == ["model", "cake", "nested/pair", "soup", "tea"]
    assert client.models.retrieve("tea").id == "tea"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("coffee")


@pytest.mark.parametrize("name", ["tea", "soup", None])
def test_completions(client, greedy, name):
    text, tokens, finish = greedy(name, "the tea was", 9)
    found = client.completions.create(model=name or "model", prompt="the tea was", max_tokens=9, temperature=0)
    assert found.object == "text_completion" and found.model == (name or "model") and found.id.startswith("cmpl-")
    assert [(choice.index, choice.text, choice.finish_reason) for choice in found.choices] == [(0, text, finish)]
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (
        3,
        tokens,
        tokens + 3,
    )


def test_several_prompts_and_tokens(client, greedy):
    prompts = ["the tea", "soup was it", "a"]
    found = client.completions.create(model="cake", prompt=prompts, max_tokens=6, temperature=0)
    assert [choice.text for choice in found.choices] == [greedy("cake", prompt, 6)[0] for prompt in prompts]
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    ids = [load_base_ids(prompt) for prompt in prompts]
    again = client.completions.create(model="cake", prompt=ids, max_tokens=6, temperature=0)
    assert [choice.text for choice in again.choices] == [choice.text for choice in found.choices]
    one = client.completions.create(model="cake", prompt=ids[1], max_tokens=6, temperature=0)
    assert one.choices[0].text == found.choices[1].text


def load_base_ids(text):
    from support import words

    return [words.VOCABULARY.index(word) for word in text.split()]


def test_streams_say_the_same(client, greedy):
    prompts = ["the tea", "soup was it"]
    stream = client.completions.create(
        model="cake", prompt=prompts, max_tokens=6, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    texts, finishes, usage = {0: "", 1: ""}, {}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                finishes[choice.index] = choice.finish_reason
    wanted = [greedy("cake", prompt, 6) for prompt in prompts]
    assert [texts[0], texts[1]] == [text for text, _, _ in wanted]
    assert [finishes[0], finishes[1]] == [finish for _, _, finish in wanted]
    assert usage.completion_tokens == sum(tokens for _, tokens, _ in wanted) and usage.prompt_tokens == 5


def test_chat(client, greedy):
    messages = [
        {"role": "system", "content": "was it good ?"},
        {"role": "user", "content": [{"type": "text", "text": "the tea"}]},
    ]
    text, tokens, finish = greedy("soup", "was it good ? the tea answer :", 8)
    found = client.chat.completions.create(model="soup", messages=messages, max_completion_tokens=8, temperature=0)
    assert found.object == "chat.completion" and found.choices[0].message.role == "assistant"
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (text, finish)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (8, tokens)
    chunks = list(
        client.chat.completions.create(model="soup", messages=messages, max_tokens=8, temperature=0, stream=True)
    )
    assert chunks[0].object == "chat.completion.chunk" and chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [finish]


def test_a_conversation_that_goes_on(client):
    """Answers are sent back as they came, with fields for what is not supported."""
    messages: list = [{"role": "user", "content": "the tea"}]
    for length in (2, 4):
        answer = client.chat.completions.create(model="soup", messages=messages, max_tokens=3, temperature=0)
        messages += [answer.choices[0].message, {"role": "user", "content": "was it good ?"}]
        assert answer.usage.prompt_tokens >= length
    assert len(messages) == 5


def test_stop_and_seed(client, greedy):
    text, _, _ = greedy("tea", "the", 12)
    stop = text.split()[2]
    found = client.completions.create(model="tea", prompt="the", max_tokens=12, temperature=0, stop=[stop, "nothing"])
    assert (found.choices[0].text, found.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    sampled = {
        client.completions.create(model="tea", prompt="the", max_tokens=5, seed=7).choices[0].text for _ in range(3)
    }
    assert len(sampled) == 1


def test_requests_of_different_adapters_are_decoded_together(running, client):
    count, rows = running.metric("ia3_batch_rows_count"), running.metric("ia3_batch_rows_sum")
    tokens = running.metric("ia3_generated_tokens_total")

    def ask(name):
        return client.completions.create(
            model=name, prompt="the tea was", max_tokens=40, temperature=0
        ).usage.completion_tokens

    with ThreadPoolExecutor(8) as pool:
        with running.holding():
            asked = [pool.submit(ask, name) for name in ["tea", "soup", "cake", "model"] * 2]
            running.until(lambda: running.engine.waiting.texts == 8)
        made = sum(each.result() for each in asked)
    assert running.metric("ia3_generated_tokens_total") - tokens == made
    assert running.metric("ia3_batch_rows_sum") - rows == made
    assert running.metric("ia3_batch_rows_count") - count <= 40, "a pass gives a token to each"


def test_a_long_text_does_not_hold_up_classification(running, client):
    with client.completions.create(model="tea", prompt="the tea", max_tokens=1000, temperature=1, seed=1, stream=True,
                                   extra_body={"stop": None}) as stream:  # fmt: skip
        next(iter(stream))
        if running.engine.running:  # it may have ended by itself
            assert running.classify("soup").status_code == 200


@pytest.mark.parametrize(
    "route, body, says",
    [
        ("completions", {"prompt": "a"}, "model: Field required"),
        ("completions", {"model": "tea"}, "prompt: Field required"),
        ("completions", {"model": "tea", "prompt": ""}, "at least one token"),
        ("completions", {"model": "tea", "prompt": []}, "prompt"),
        ("completions", {"model": "tea", "prompt": [10**6]}, "token ids below"),
        ("completions", {"model": "tea", "prompt": "a", "n": 2}, "n is not supported"),
        ("completions", {"model": "tea", "prompt": "a", "best_of": 2}, "best_of is not supported"),
        ("completions", {"model": "tea", "prompt": "a", "logprobs": 3}, "logprobs is not supported"),
        ("completions", {"model": "tea", "prompt": "a", "logprobs": 0}, "logprobs is not supported"),
        ("completions", {"model": "tea", "prompt": "a", "n": True}, "n is not supported"),
        ("chat/completions", {"model": "tea", "messages": [{"role": "user", "content": None}]}, "content: Field required"),
        ("chat/completions", {"model": "tea", "messages": [{"role": "assistant", "content": "a", "refusal": "no"}]},
         "refusal"),
        ("completions", {"model": "tea", "prompt": "a", "echo": True}, "echo is not supported"),
        ("completions", {"model": "tea", "prompt": "a", "temperature": 3}, "temperature"),
        ("completions", {"model": "tea", "prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("completions", {"model": "tea", "prompt": "a", "max_tokens": 10**6}, "max_tokens of at most 1024"),
        ("completions", {"model": "tea", "prompt": "a " * 2045, "max_tokens": 8}, "maximum context length is 2048"),
        ("completions", {"model": "tea", "prompt": "a", "stop": ["a"] * 5}, "stop"),
        ("completions", {"model": "tea", "prompt": "a", "surplus": 1}, "surplus"),
        ("completions", {"model": "tea", "prompt": ["a"] * 65}, "at most 64 prompts"),
        ("chat/completions", {"model": "tea", "messages": []}, "messages"),
        ("chat/completions", {"model": "tea", "messages": [{"role": "tool", "content": "a"}]}, "role"),
        ("chat/completions", {"model": "tea", "messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools is not"),
        ("chat/completions", {"model": "tea", "messages": [{"role": "user", "content": "a"}], "response_format":
                              {"type": "json_object"}}, "response_format is not"),
    ],
)  # fmt: skip
def test_what_is_not_valid_or_not_supported(running, route, body, says):
    response = running.http.post(f"/v1/{route}", json=body)
    error = response.json()["error"]
    assert response.status_code == 400 and says in error["message"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


def test_errors_as_the_client_knows_them(client):
    with pytest.raises(openai.NotFoundError, match="close to it: 'tea'"):
        client.completions.create(model="teaa", prompt="a")
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        client.completions.create(model="tea", prompt="a", n=3)
    for content in (b"[" * 100_000, b'{"model": "tea", "prompt": "a", "temperature": NaN}'):
        with pytest.raises(openai.BadRequestError):
            client.post(
                "/completions",
                content=content,
                cast_to=object,
                options={"headers": {"content-type": "application/json"}},
            )


def test_neutral_settings_are_taken(client):
    client.completions.create(
        model="tea", prompt="a", max_tokens=1, n=1, best_of=1, echo=False, presence_penalty=0, frequency_penalty=0.0,
        logit_bias={}, user="me", suffix=None,
    )  # fmt: skip
    client.chat.completions.create(
        model="tea", messages=[{"role": "user", "content": "a"}], max_tokens=1, logprobs=False, tools=[], store=False,
        response_format={"type": "text"}, metadata={"a": "b"},
    )  # fmt: skip


@pytest.mark.parametrize(
    "given, same",
    [
        ({"temperature": 1e-50}, {"temperature": 0}),
        ({"temperature": 5e-324, "top_p": 0.5}, {"temperature": 0}),
        ({"temperature": 9e-6}, {"temperature": 0}),
        ({"temperature": -0.0}, {"temperature": 0}),
        ({"temperature": 2, "top_p": 0}, {"temperature": 0}),
        ({"temperature": 2, "top_p": 1e-300}, {"temperature": 0}),
        ({"temperature": 1e-4}, {"temperature": 0}),
        ({"seed": -(2**63)}, {"seed": 0}),
        ({"stop": ["", "x" * 1000]}, {"stop": None}),
    ],
)
def test_sampling_at_the_edges(running, given, same):
    body = {"model": "tea", "prompt": "the tea was", "max_tokens": 9, "seed": 1}
    found = [running.http.post("/v1/completions", json={**body, **fields}) for fields in (given, same)]
    assert [response.status_code for response in found] == [200, 200], found[0].text
    assert found[0].json()["choices"] == found[1].json()["choices"]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1e-9}, {"temperature": 2.1}, {"temperature": "1e999"}, {"top_p": 1.01}, {"top_p": -1e-300},
        {"seed": 2**63}, {"seed": 0.5}, {"stop": "x" * 1001}, {"stop": ["a"] * 5}, {"max_tokens": 10**30},
    ],
)  # fmt: skip
def test_sampling_beyond_them(running, fields):
    body = {"model": "tea", "prompt": "the tea was", **fields}
    assert running.http.post("/v1/completions", json=body).status_code == 400


def test_a_token_as_api_key(made, start):
    server = start(made, token="right-token")
    right = openai.OpenAI(base_url=f"{server.url}/v1", api_key="right-token", max_retries=0)
    assert right.completions.create(model="tea", prompt="a", max_tokens=1).choices
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_a_full_queue_and_a_deadline(made, start):
    server = start(made, limits=Limits(queue=1, texts=1, deadline=0.3))
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with ThreadPoolExecutor(1) as pool, server.holding():
        waiting = pool.submit(client.completions.create, model="tea", prompt="a")
        server.until(lambda: server.server.queue.length == 1)
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model="tea", prompt="a")
        assert full.value.response.headers["retry-after"]
        with pytest.raises(openai.InternalServerError, match=r"0\.3 seconds") as late:
            waiting.result()
        assert late.value.status_code == 504
    assert server.server.queue.length == 0


def endless(server):
    """The model says no end, and says each token only when it may."""
    allowed = threading.Semaphore(0)
    server.engine.decoder.ends = set()
    step = server.engine.decoder.step

    def slowly():
        while not allowed.acquire(timeout=0.02):
            if all(text.cancelled for text in server.engine.decoder.texts):
                break
        step()

    server.engine.decoder.step = slowly
    return allowed


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_text(made, start, stream):
    server = start(made)
    allowed = endless(server)
    body = json.dumps({"model": "tea", "prompt": "the tea", "max_tokens": 1000, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head.encode() + body)
        server.until(lambda: server.engine.running == 1)
        allowed.release()
        if stream:
            assert b"200 OK" in client.recv(10_000)
    server.until(lambda: server.engine.running == 0 and server.server.queue.length == 0)
    assert server.server.store.get("tea").users == 0
    assert server.metric("ia3_generated_tokens_total") < 10
    assert server.classify().status_code == 200


def test_a_deadline_in_the_middle_of_a_stream(made, start):
    server = start(made, limits=Limits(deadline=0.5))
    endless(server)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match=r"0\.5 seconds"):
        list(client.completions.create(model="tea", prompt="the tea", max_tokens=1000, stream=True))
    server.until(lambda: server.engine.running == 0 and server.server.queue.length == 0)


def test_a_model_that_continues_nothing(made, start, monkeypatch):
    server = start(made)
    server.engine.generates = False
    response = server.http.post("/v1/completions", json={"model": "tea", "prompt": "a"})
    assert response.status_code == 400 and "use /v1/classify" in response.json()["error"]["message"]


def stream(server, **fields) -> socket.socket:
    """A connection that has asked for a stream, and reads nothing."""
    body = json.dumps({"model": "tea", "prompt": "the tea", "max_tokens": 1000, "stream": True, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    client = socket.create_connection(("127.0.0.1", server.port), 60)
    client.sendall(head.encode() + body)
    return client


def test_a_client_that_does_not_read_is_cut_off(made, start, monkeypatch):
    # Within the deadline, what waits for the client has to fill all buffers, on a busy machine too.
    server = start(made, limits=Limits(deadline=2, queue=1, texts=1))

    async def generate(job):
        for count in range(1, 101):
            yield Piece("the tea " * 200_000, count, None)

    monkeypatch.setattr(server.engine, "generate", generate)
    monkeypatch.setattr("ia3.serve.gate._TAKING_SECONDS", 0.1)
    with stream(server) as client:
        server.until(lambda: server.server.queue.length == 1)
        server.until(lambda: server.server.queue.length == 0, 20)
        assert server.server.store.get("tea").users == 0
        last = b""
        while more := client.recv(1 << 20):
            last = (last + more)[-1000:]
        assert b"the tea" in last and b"[DONE]" not in last and not last.endswith(b"0\r\n\r\n")


def answer(client: socket.socket) -> str:
    """All that comes until the stream's end."""
    data = b""
    while more := client.recv(65536):
        data += more
        if b"data: [DONE]" in data or b'data: {"error"' in data:
            break
    client.close()
    return data.decode()


def test_an_error_in_a_stream_is_in_the_log(made, start, monkeypatch, caplog):
    server = start(made)

    async def generate(job):
        yield Piece("the", 1)
        raise RuntimeError("secret text")

    monkeypatch.setattr(server.engine, "generate", generate)
    said = answer(stream(server))
    assert "see the server's log for" in said and "secret" not in said
    server.until(lambda: any("frames" in getattr(record, "fields", {}) for record in caplog.records))
    (fields,) = [record.fields for record in caplog.records if "frames" in getattr(record, "fields", {})]
    assert fields["id"] in said and fields["error"] == "RuntimeError" and "generate" in fields["frames"][-1]


ROW = 4 * 2 * (16 + 16 + 48)


def test_a_change_of_one_adapter_ends_no_other_ones_text(place, start):
    """Two texts under way in memory for two adapters, when a third one that is in use is deleted."""
    server = start(place, memory=3 * ROW)
    files = {
        name: (place / "spare" / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")
    }
    files["task.yaml"] = (place / "adapters" / "soup" / "task.yaml").read_bytes()
    uploaded = server.http.post("/v1/adapters", data={"name": "new"}, files=[("files", each) for each in files.items()])
    assert uploaded.status_code == 201
    wanted = server.classify("new").json()["predictions"]
    allowed = endless(server)
    with server.holding():
        streams = [stream(server, model=name, max_tokens=40) for name in ("soup", "cake")]
        server.until(lambda: server.engine.waiting.texts == 2)
    server.until(lambda: server.engine.running == 2)
    with ThreadPoolExecutor(2) as pool:
        third = pool.submit(server.classify, "new")
        server.until(lambda: server.engine.waiting.questions)
        deleted = pool.submit(server.http.delete, "/v1/adapters/new")
        server.until(lambda: server.engine.waiting.orders)
        allowed.release(1000)
        assert third.result().json()["predictions"] == [
            {**each, "probabilities": pytest.approx(each["probabilities"], abs=1e-5)} for each in wanted
        ]
        assert deleted.result().status_code == 200
    assert all("data: [DONE]" in answer(client) for client in streams)


def test_an_adapter_that_is_gone_ends_its_own_texts_only(place, start, caplog):
    caplog.set_level("INFO")
    server = start(place, memory=2 * ROW)
    server.engine.batch = 3
    allowed = endless(server)
    with server.holding():
        gone, stays = stream(server, model="cake", max_tokens=30), stream(server, model="model", max_tokens=30)
        server.until(lambda: server.engine.waiting.texts == 2)
    server.until(lambda: server.engine.running == 2)
    with ThreadPoolExecutor(1) as pool:
        another = pool.submit(server.classify, "tea")  # memory has room for one
        server.until(lambda: server.engine.waiting.questions)
        allowed.release()
        assert another.result().status_code == 200
    shutil.rmtree(place / "adapters" / "cake")
    allowed.release(1000)
    said = answer(gone)
    assert "This adapter cannot be used" in said and str(place) not in said
    assert "data: [DONE]" in answer(stays)
    server.until(lambda: any("reason" in getattr(record, "fields", {}) for record in caplog.records))
    assert server.classify("tea").status_code == 200


def test_long_and_short_prompts_keep_to_the_budgets(made, start, greedy):
    """Of tokens in a pass, padding included, and of keys and values that are kept."""
    server = start(made, batch_tokens=64, cache_tokens=1200, batch=16)
    server.engine.decoder.ends = set()
    begin, step, prefills, most = server.engine.decoder.begin, server.engine.decoder.step, [], []

    def beginning(texts):
        if texts:
            prefills.append((len(texts), max(len(text.job.prompt) for text in texts)))
        begin(texts)
        most.append(server.engine.decoder.held)

    def stepping():
        step()
        most.append(server.engine.decoder.held)

    server.engine.decoder.begin, server.engine.decoder.step = beginning, stepping
    prompts = ["the tea was " * 20, *["soup"] * 15, "the tea was " * 130, *["cake was it"] * 10]
    body = {"model": "cake", "max_tokens": 20, "temperature": 0}
    with ThreadPoolExecutor(len(prompts)) as pool:
        with server.holding():
            asked = [
                pool.submit(server.http.post, "/v1/completions", json={**body, "prompt": each}) for each in prompts
            ]
            server.until(lambda: server.engine.waiting.texts == len(prompts))
        texts = [each.result().json()["choices"][0]["text"] for each in asked]
    for prompt, text in zip(prompts, texts, strict=True):
        assert text.startswith(greedy("cake", prompt, 20)[0])
    assert 64 < max(most) <= 1200
    assert all(rows * width <= 64 or rows == 1 for rows, width in prefills)
    assert sum(rows for rows, _ in prefills) == len(prompts) and max(rows for rows, _ in prefills) > 4
