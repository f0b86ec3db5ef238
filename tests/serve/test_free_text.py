"""An adapter whose task's answer is text: completions are what `ia3 predict` generates; it has no labels."""

import pytest

import ia3
from ia3 import IA3Model, load_base
from ia3.evaluation.generation import generate
from ia3.task.free_text import FreeText
from support import serving, tiny, words

TASK = {"template": "review : {{ text }} answer :", "answer": "{{ said }}", "metric": "no_such_module.run"}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    words.save_model(folder / "model")
    model = tiny.adapt("llama", ia3, base=load_base(str(folder / "model"))[0])
    model.save_pretrained(folder / "adapters" / "said")
    FreeText.create(TASK).save(folder / "adapters" / "said" / "task.yaml")
    server = serving.Running(folder)
    yield server, folder
    server.close()


def test_completions_are_what_predict_generates(running):
    server, folder = running
    base, tokenizer = load_base(str(folder / "model"))
    model, task = IA3Model.from_pretrained(base, folder / "adapters" / "said"), FreeText.create(TASK)
    [expected] = generate(model, tokenizer, task, ["the tea was lovely"], max_new_tokens=5)
    body = {"model": "said", "prompt": task.wording("the tea was lovely").prompt, "max_tokens": 5, "temperature": 0}
    found = server.http.post("/v1/completions", json=body).json()["choices"][0]
    assert found["text"].strip() == expected.text
    assert found["finish_reason"] == ("stop" if expected.finished else "length")


def test_it_has_no_labels(running):
    server, _ = running
    assert server.http.get("/v1/adapters/said").json()["labels"] is None
    answer = server.http.post("/v1/classify", json={"adapter": "said", "texts": ["tea"]})
    assert answer.status_code == 422
    assert "Adapter 'said' has no labels" in answer.json()["error"]["message"]
