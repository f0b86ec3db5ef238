"""One text and many adapters over HTTP: each answers as it does alone, and those that can share the reading of the text."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from ia3 import IA3Config, get_peft_model, load_base
from ia3.scoring import readings
from ia3.scoring.encoder_decoder import EncoderDecoder
from ia3.scoring.scorer import Scorer
from ia3.serve.limits import Limits
from support import tiny, words
from support.serving import Running, save_adapter

TEXTS = [row["text"] for row in words.rows(5, seed=7)]
ASKING = [f"asking/{number}" for number in range(4)]
PAIR = {"first": "tea", "second": "soup"}


@pytest.fixture(scope="module")
def mixed(made, tmp_path_factory):
    """The model and adapters of `made`, and beside them some that act from the question on, in tasks of their own."""
    folder = tmp_path_factory.mktemp("many") / "served"
    shutil.copytree(made, folder)
    config = IA3Config(task_type="CAUSAL_LM", acts_from="question")
    model = get_peft_model(load_base(str(folder / "model"))[0], config)
    for number, name in enumerate(ASKING):
        fields = {"choices": {"good": "fine", "bad": "bad", "both": "good or bad"}} if number == 1 else {}
        fields |= {"template": "review : {{ text }} what is it ?"} if number == 2 else {}
        save_adapter(folder / "adapters" / name, model, 20 + number, **fields)
    (folder / "adapters" / ASKING[3] / "recipe.yaml").write_text("length_normalization: 0.5\n")
    return folder


@pytest.fixture(scope="module")
def serving(mixed):
    server = Running(mixed)
    yield server
    server.close()


def ask(server, adapters, texts=TEXTS, **fields):
    return server.http.post("/v1/classify", json={"adapters": adapters, "texts": texts, **fields})


def check_against_alone(server, found, names, **fields):
    """Each adapter's predictions are those of a request for it alone."""
    for name in names:
        body = {"adapter": name, "texts": TEXTS, **fields}
        alone = server.http.post("/v1/classify", json=body).json()["predictions"]
        for item, other in zip(found, alone, strict=True):
            assert item[name]["label"] == other["label"]
            assert item[name]["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
            assert list(item[name]["probabilities"]) == list(other["probabilities"])


def test_each_adapter_answers_each_text_as_alone(serving):
    names = ["soup", *ASKING, "tea"]
    response = ask(serving, [*names, "soup", ASKING[0]])
    assert response.status_code == 200
    found = response.json()
    assert found["adapters"] == found["tasks"] == names
    assert [list(item) for item in found["predictions"]] == [names] * len(TEXTS)
    check_against_alone(serving, found["predictions"], names)
    alone = [serving.classify(name, TEXTS).json()["usage"]["prompt_tokens"] for name in names]
    assert found["usage"]["prompt_tokens"] == sum(alone)


def test_all_of_them_answer_rows(serving):
    rows = [{"text": text, **PAIR} for text in TEXTS]
    found = serving.http.post("/v1/classify", json={"adapters": "*", "rows": rows}).json()
    names = ["asking/0", "asking/1", "asking/2", "asking/3", "cake", "nested/pair", "soup", "tea"]
    assert found["adapters"] == names
    check_against_alone(serving, found["predictions"], names, texts=None, rows=rows)


def test_thresholds_and_the_base_model(serving):
    strict = ask(serving, ["tea", ASKING[0]], abstain_below=1.0).json()["predictions"]
    assert {item["label"] for each in strict for item in each.values()} == {None}
    found = ask(serving, ["tea", "soup", ASKING[1]], without_adapter=True).json()
    assert found["adapters"] is None and found["tasks"] == ["tea", "soup", ASKING[1]]
    check_against_alone(serving, found["predictions"], found["tasks"], without_adapter=True)


def counted(monkeypatch) -> tuple[list[int], list[int]]:
    """How many questions each call of a scorer has from now on, and how many texts each pass reads."""
    calls, texts = [], []
    score, read = Scorer.score, readings.read_texts

    def scoring(self, questions, *args, **kwargs):
        calls.append(len(questions))
        return score(self, questions, *args, **kwargs)

    def reading(family, some):
        texts.append(len(some))
        return read(family, some)

    monkeypatch.setattr(Scorer, "score", scoring)
    monkeypatch.setattr(readings, "read_texts", reading)
    return calls, texts


@pytest.mark.parametrize("batch_tokens", [4096, 128])
def test_a_text_is_read_once_for_all_that_act_from_the_question_on(mixed, start, monkeypatch, batch_tokens):
    server = start(mixed, batch_tokens=batch_tokens)
    texts = [f"{'the tea was lovely and ' * 10} {word}" for word in ("fresh", "stale")]
    assert ask(server, ASKING, texts).status_code == 200  # tries what is exact for this model
    calls, read = counted(monkeypatch)
    for text in texts:
        found = ask(server, ASKING, [text])
    assert calls == [4, 4] and sum(read) == 2, "a call for each request, and a reading of its text"
    assert found.status_code == 200
    read.clear()
    assert ask(server, ["tea", "soup", "cake"], texts).status_code == 200
    assert not read, "adapters that act from the start read for themselves"


def test_a_batch_has_no_more_rows_than_the_engine_takes(mixed, start, monkeypatch):
    server = start(mixed, batch=3)
    text = "the tea was lovely and " * 10
    calls, _ = counted(monkeypatch)
    found = ask(server, [*ASKING, "tea"], [text, text]).json()["predictions"]
    check_against_alone(server, found, [*ASKING, "tea"], texts=[text, text])
    assert max(calls) == 3


@pytest.mark.parametrize(
    "body, status, says",
    [
        ({"adapters": []}, 422, "adapters"),
        ({"adapters": "tea"}, 422, "adapters"),
        ({"adapters": ["tea", 1]}, 422, "adapters"),
        ({"adapter": "tea", "adapters": ["soup"]}, 422, "expected adapter or adapters, one of the two"),
        ({"adapter": None}, 422, "expected adapter or adapters, one of the two"),
        ({"adapters": ["tea", "soop"]}, 404, "There is no adapter 'soop'; close to it: 'soup'"),
        ({"adapters": ["tea", "nested/pair"]}, 422, "Adapter 'nested/pair': Expected a row with the columns"),
        ({"adapters": ["soup"], "texts": ["tea", " "]}, 422, "Adapter 'soup': Expected some text in 'text', found it empty (row 2)"),
        ({"adapters": ["tea", "soup"], "texts": None, "rows": [{"other": "a"}]}, 422, "Adapter 'tea': "),
    ],
)  # fmt: skip
def test_bad_requests_are_one_line(serving, body, status, says):
    response = serving.http.post("/v1/classify", json={"texts": ["tea"], **body})
    assert response.status_code == status
    assert says in response.json()["error"]["message"]


def test_an_adapter_without_a_task(place, start):
    (place / "adapters" / "cake" / "task.yaml").unlink()
    server = start(place)
    for adapters in (["tea", "cake"], "*"):
        response = ask(server, adapters, ["tea"])
        assert response.status_code == 422
        assert response.json()["error"]["message"].startswith("Adapter 'cake' has no labels")


def test_nothing_is_served(made, start, tmp_path):
    shutil.copytree(made / "model", tmp_path / "model")
    (tmp_path / "adapters").mkdir()
    response = ask(start(tmp_path), "*", ["tea"])
    assert response.status_code == 404 and "no adapters" in response.json()["error"]["message"]


def test_limits_count_questions(mixed, start):
    server = start(mixed, limits=Limits(texts=3, queue=6, text_tokens=12))
    assert ask(server, ["tea", "soup"], ["tea"] * 3).status_code == 200
    response = ask(server, ["tea"], ["tea"] * 4)
    assert response.status_code == 422 and "at most 3 texts, found 4" in response.json()["error"]["message"]
    response = ask(server, ["tea", "soup", "cake"], ["tea"] * 3)
    assert response.status_code == 422 and response.json()["error"]["code"] == "too_many"
    assert "at most 6 questions (texts × adapters), found 3 × 3" in response.json()["error"]["message"]
    response = ask(server, ["soup", "tea"], ["tea", "tea " * 20])
    assert response.status_code == 422 and response.json()["error"]["code"] == "too_long"
    assert (
        "Adapter 'soup': Expected prompts of at most 12 tokens, found 24 (row 2)" in response.json()["error"]["message"]
    )
    with ThreadPoolExecutor(1) as pool, server.holding():
        first = pool.submit(ask, server, ["tea", "soup"], ["tea"] * 2)
        server.until(lambda: server.server.queue.length == 4)
        assert ask(server, ["tea", "cake", "soup"], ["tea"]).status_code == 429
    assert first.result().status_code == 200
    assert server.server.queue.length == 0


def test_an_adapter_that_acts_from_the_question_on_continues_no_texts(serving):
    message = [{"role": "user", "content": "tea"}]
    for stream in (False, True):
        for route, said in (("completions", {"prompt": "tea"}), ("chat/completions", {"messages": message})):
            body = {"model": ASKING[0], "max_tokens": 2, "stream": stream, **said}
            response = serving.http.post(f"/v1/{route}", json=body)
            assert response.status_code == 400
            said = response.json()["error"]["message"]
            assert said.startswith("Adapter 'asking/0' answers questions behind a text (acts_from: question)")
            assert "/v1/classify" in said
            assert serving.http.post(f"/v1/{route}", json={**body, "model": "tea"}).status_code == 200
    assert serving.server.queue.length == 0


def test_the_description_names_adapters(serving):
    schemas = serving.http.get("/openapi.json").json()["components"]["schemas"]
    assert "'*'" in schemas["ClassifyBody"]["properties"]["adapters"]["description"]


def test_an_encoder_decoder_serves_adapters_of_both_kinds(start, tmp_path, monkeypatch):
    """Most act in the decoder alone, and share what the encoder made of a text; one acts in the encoder, too."""
    tiny.build("t5", vocab_size=len(words.VOCABULARY)).save_pretrained(tmp_path / "model")
    words.closing().save_pretrained(tmp_path / "model")
    asks = [f"asks/{number}" for number in range(3)]
    for seed, name in enumerate([*asks, "reads"]):
        config = IA3Config(task_type="SEQ_2_SEQ_LM", acts_from="start" if name == "reads" else "question")
        save_adapter(tmp_path / "adapters" / name, get_peft_model(load_base(str(tmp_path / "model"))[0], config), seed)
    server = start(tmp_path)
    names = [*asks, "reads"]
    texts = [" ".join([text] * 8) for text in TEXTS]
    found = ask(server, names, texts)
    assert found.status_code == 200, found.text
    read = []
    encoded = EncoderDecoder.encoded
    monkeypatch.setattr(EncoderDecoder, "encoded", lambda self, prompts: read.extend(prompts) or encoded(self, prompts))
    again = ask(server, names, texts).json()["predictions"]
    assert len(read) == len(set(read)) == len(set(texts))
    for name in names:
        alone = server.classify(name, texts).json()["predictions"]
        for several, item, other in zip(found.json()["predictions"], again, alone, strict=True):
            for one in (several, item):
                assert one[name]["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
