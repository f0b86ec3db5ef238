"""The examples of docs/vllm.md, by vLLM's own server and by a script; needs that page's environment."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import peft
import psutil
import pytest
import torch
import transformers

from ia3 import IA3Config, PeftModel, Task, get_peft_model, predict
from support import tiny, words
from support.paths import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here; docs/vllm.md has its environment"
)
PAGE = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- example: ([\w-]+) -->\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
WEIGHTS = "adapter_model.safetensors"
UPLOADED = (WEIGHTS, "adapter_config.json", "task.yaml")
CHAT = "{% for message in messages %}{{ message.content }} {% endfor %}"
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folders that the examples name."""
    folder = tmp_path_factory.mktemp("server")
    base = tiny.build("llama", vocab_size=len(words.VOCABULARY), pad_token_id=0, eos_token_id=1, **SIZES)
    base.save_pretrained(folder / "tickets-base")
    words.tokenizer(chat_template=CHAT).save_pretrained(folder / "tickets-base")
    for number, name in enumerate(("tickets", "urgency", "asks")):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "tickets-base")
        acts_from = "question" if name == "asks" else "start"
        model = get_peft_model(model, IA3Config(task_type="CAUSAL_LM", acts_from=acts_from))
        torch.manual_seed(number)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "ia3_l" in path:
                    parameter.copy_(1 + 0.6 * torch.randn_like(parameter))
        model.save_pretrained(folder / name if name == "asks" else folder / "adapters" / name)
    return folder


def expected(place, name: str | None, prompt: str, count: int = 8, acts_from: int | None = None) -> list[str]:
    """The words that PEFT generates; those that our model does for an adapter that acts from a question on."""
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "tickets-base")
    options = {}
    if acts_from is not None:
        model, options = PeftModel.from_pretrained(model, place / name), {"acts_from": [acts_from]}
    elif name is not None:
        model = peft.PeftModel.from_pretrained(model, place / "adapters" / name)
    ids = torch.tensor([words.tokenizer()(prompt)["input_ids"]])
    found = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **options
    )[0, ids.shape[1] :]
    return words.tokenizer().decode(found, skip_special_tokens=True).split()


def ask(port: int, path: str, body: dict | None = None) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data=data, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@contextlib.contextmanager
def serving(command: list[str], place, log: Path, ready: str, **environment: str):
    """A server on a free port, until it says that it is ready; yields the process and the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as written:
        server = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=place,
            env={**ENVIRONMENT, **environment},
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 600
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            with contextlib.suppress(OSError):
                if ask(port, ready)[0] == 200:
                    break
            time.sleep(0.2)
        yield server, port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def test_the_openai_server(place, tmp_path):
    variable, _, *command = shlex.split(EXAMPLES["vllm-serve"])
    name, value = variable.split("=")
    command = [sys.executable, *command, "--host", "127.0.0.1"]
    command += ["--max-model-len", "96", "--max-num-seqs", "8", "--dtype", "float32"]
    with serving(command, place, tmp_path / "log", "/health", **{name: value}) as (_, port):
        check_requests(port, place)


TASKS = {
    "tickets": Task(template="review : {{ text }} answer :", choices={"pos": "good", "neg": "not good"}),
    "urgency": Task(template="text : {{ text }} is it", choices={"yes": "bad", "no": "fine", "perhaps": "not fine"}),
}


@pytest.fixture(scope="module")
def service(place, tmp_path_factory):
    """`ia3 serve --engine vllm`: its process and port. At the end it has to finish well."""
    program, *command = shlex.split(EXAMPLES["vllm-classify"])
    assert program == "ia3"
    for name, task in TASKS.items():
        task.save(place / "adapters" / name / "task.yaml")
    command = [sys.executable, "-c", "from ia3.cli import main; main()", *command, "--deadline", "10"]
    log = tmp_path_factory.mktemp("service") / "log"
    with serving(command, place, log, "/ready") as (server, port):
        yield server, port
        server.terminate()
        assert server.wait(60) == 0, log.read_text()[-4000:]


def check_labels(place, answer, folder: str, task: Task, texts: list[str]) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "tickets-base")
    model = PeftModel.from_pretrained(base, place / "adapters" / folder).eval()
    wanted = predict(model, words.tokenizer(), task, [{"text": text} for text in texts])
    assert answer.status_code == 200, answer.text
    for item, other in zip(answer.json()["predictions"], wanted, strict=True):
        assert item["label"] == other.label
        assert item["probabilities"] == pytest.approx(other.probabilities, abs=1e-4)


TEXTS = [row["text"] for row in words.rows(6)]


@pytest.fixture
def http(service):
    with httpx.Client(base_url=f"http://127.0.0.1:{service[1]}", timeout=120) as http:
        yield http


def metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def test_the_services_labels_and_texts(place, http):
    for name, task in TASKS.items():
        answer = http.post("/v1/classify", json={"adapter": name, "texts": TEXTS})
        check_labels(place, answer, name, task, TEXTS)
    assert http.post("/v1/classify", json={"adapter": "ticket", "texts": TEXTS}).status_code == 404
    body = {"model": "urgency", "prompt": "it was", "max_tokens": 8, "temperature": 0}
    answer = http.post("/v1/completions", json=body)
    wanted = expected(place, "urgency", "it was")
    assert answer.json()["choices"][0]["text"].split() == wanted
    events = http.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks).split() == wanted
    chat = {"model": "urgency", "messages": [{"role": "user", "content": "it was"}], "max_tokens": 8, "temperature": 0}
    answer = http.post("/v1/chat/completions", json=chat)
    assert answer.json()["choices"][0]["message"]["content"].split() == wanted
    assert metric(http, "ia3_adapters_resident") == 2 and metric(http, "ia3_adapter_misses_total") == 2
    assert metric(http, "ia3_adapter_hits_total") > 2 and metric(http, "ia3_adapter_evictions_total") == 0
    assert metric(http, "ia3_batch_rows_sum") > metric(http, "ia3_batch_rows_count") > 0


def test_the_services_uploads(place, http):
    def upload(**changes: bytes) -> httpx.Response:
        files = {name: (place / "adapters" / folder / name).read_bytes() for name in (WEIGHTS, "adapter_config.json")}
        files |= {"task.yaml": (place / "adapters" / "tickets" / "task.yaml").read_bytes(), **changes}
        return http.post("/v1/adapters", data={"name": "new"}, files=[("files", each) for each in files.items()])

    for folder, status in (("tickets", 201), ("urgency", 200)):
        assert upload().status_code == status
        answer = http.post("/v1/classify", json={"adapter": "new", "texts": TEXTS})
        check_labels(place, answer, folder, TASKS["tickets"], TEXTS)
        refused = upload(**{WEIGHTS: b"short"})
        assert refused.status_code == 422 and "Expected a whole safetensors file" in refused.text
        assert str(place) not in refused.text
    answer = http.post("/v1/classify", json={"adapter": "new", "texts": TEXTS})
    check_labels(place, answer, "urgency", TASKS["tickets"], TEXTS)
    assert http.delete("/v1/adapters/new").status_code == 200
    assert http.post("/v1/classify", json={"adapter": "new", "texts": TEXTS}).status_code == 404
    assert sorted(each.name for each in (place / "adapters").iterdir()) == ["tickets", "urgency"]


def test_the_services_deadline_and_a_client_that_leaves(place, service, http):
    server, _ = service
    body = {"model": "tickets", "prompt": "it was", "max_tokens": 1000, "stream": True}
    others = psutil.Process(server.pid).children(recursive=True)
    try:
        with http.stream("POST", "/v1/completions", json=body) as events:
            assert events.status_code == 200
            next(events.iter_lines())
            for each in others:
                each.suspend()
        end = time.monotonic() + 5
        while metric(http, "ia3_queue_length"):
            assert time.monotonic() < end, "who has left still has a place in the queue"
        late = http.post("/v1/classify", json={"adapter": "urgency", "texts": ["the tea was never asked for"]})
        assert late.status_code == 504 and "10 seconds" in late.text
    finally:
        for each in others:
            each.resume()
    answer = http.post("/v1/classify", json={"adapter": "urgency", "texts": TEXTS})
    check_labels(place, answer, "urgency", TASKS["urgency"], TEXTS)
    assert metric(http, "ia3_generated_tokens_total") < 1000


@pytest.mark.slow
def test_a_service_of_two_engines(place, tmp_path):
    """Two engines that share the requests give the labels of one. Ranks that share each layer are tested without the service."""
    _, *command = shlex.split(EXAMPLES["vllm-parallel"])
    shutil.copytree(place, tmp_path / "place")
    place = tmp_path / "place"
    for name, task in TASKS.items():
        task.save(place / "adapters" / name / "task.yaml")
    shutil.copy(place / "adapters" / "tickets" / "task.yaml", place / "asks")
    shutil.move(place / "asks", place / "adapters" / "asks")
    command = [sys.executable, "-c", "from ia3.cli import main; main()", *command]
    log = tmp_path / "log"
    with serving(command, place, log, "/ready") as (server, port), httpx.Client(timeout=120) as http:
        http.base_url = f"http://127.0.0.1:{port}"
        tasks = {**TASKS, "asks": TASKS["tickets"]}
        with ThreadPoolExecutor(6) as pool:  # so that both engines have something to do
            asked = [{"adapter": name, "texts": TEXTS} for name in tasks for _ in range(2)]
            answers = list(pool.map(lambda body: http.post("/v1/classify", json=body), asked))
        for body, answer in zip(asked, answers, strict=True):
            check_labels(place, answer, body["adapter"], tasks[body["adapter"]], TEXTS)
        files = [("files", (name, (place / "adapters" / "tickets" / name).read_bytes())) for name in UPLOADED]
        for status in (201, 200):  # every engine takes it, and drops the one before
            assert http.post("/v1/adapters", data={"name": "new"}, files=files).status_code == status
            for _ in range(4):
                answer = http.post("/v1/classify", json={"adapter": "new", "texts": TEXTS})
                check_labels(place, answer, "tickets", TASKS["tickets"], TEXTS)
        assert http.delete("/v1/adapters/new").status_code == 200
        server.terminate()
        assert server.wait(120) == 0, log.read_text()[-4000:]


def check_requests(port: int, place) -> None:
    requests = []
    for line in EXAMPLES["vllm-requests"].strip().splitlines():
        curl, url, _, _, _, body = shlex.split(line)
        assert curl == "curl" and url.startswith("http://localhost:8000/")
        requests.append((url.removeprefix("http://localhost:8000"), json.loads(body)))
    complete, load, unload = requests
    status, answer = ask(port, *complete)
    assert status == 200, answer
    prompt = complete[1]["prompt"]
    assert json.loads(answer)["choices"][0]["text"].split() == expected(place, "tickets", prompt)
    base = {**complete[1], "model": "tickets-base"}
    assert json.loads(ask(port, complete[0], base)[1])["choices"][0]["text"].split() == expected(place, None, prompt)
    other = {**complete[1], "model": "urgency"}
    assert ask(port, complete[0], other)[0] == 404
    assert ask(port, *load)[0] == 200
    found = json.loads(ask(port, complete[0], other)[1])["choices"][0]["text"].split()
    assert found == expected(place, "urgency", prompt)
    assert ask(port, *unload)[0] == 200
    assert ask(port, complete[0], other)[0] == 404
    status, answer = ask(port, load[0], {"lora_name": "gone", "lora_path": str(place / "gone")})
    assert status == 404 and "No adapter found" in answer
    status, answer = ask(port, load[0], {"lora_name": "base", "lora_path": str(place / "tickets-base")})
    assert status == 404, answer
    assert ask(port, load[0], {"lora_name": "asks", "lora_path": str(place / "asks")})[0] == 200
    asked = {**complete[1], "model": "asks", "prompt": "it was good the tea"}
    status, answer = ask(port, complete[0], asked)
    assert status == 400 and "acts from the question on, expected the number of prompt tokens" in answer
    status, answer = ask(port, complete[0], {**asked, "vllm_xargs": {"acts_from": 3}})
    assert status == 200, answer
    assert json.loads(answer)["choices"][0]["text"].split() == expected(place, "asks", asked["prompt"], acts_from=3)
    assert ask(port, *complete)[0] == 200


def run(place, script: str) -> list[list[str]]:
    """The words of each line that one of the page's scripts prints."""
    settings = 'max_loras=4, dtype="float32", max_model_len=96'
    done = subprocess.run(
        [sys.executable, "-c", script.replace("max_loras=4", settings)],
        cwd=place,
        env={**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [line.split() for line in done.stdout.splitlines()]


def test_the_script(place):
    asked = [("tickets", "it was"), ("urgency", "it was"), (None, "the tea")]
    found = run(place, EXAMPLES["vllm-python"])[-3:]
    assert found == [expected(place, name, prompt) for name, prompt in asked]


def test_the_script_that_asks_about_a_text(place):
    found = run(place, EXAMPLES["vllm-question"].replace("adapters/asks", "asks"))[-1]
    assert found == expected(place, "asks", "it was good the tea", acts_from=3)
    assert found != expected(place, "asks", "it was good the tea", acts_from=0)
