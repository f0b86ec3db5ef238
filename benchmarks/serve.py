"""`ia3 serve` under load from another process, over loopback.

- Requests a second and latency when requests are for 1, 64, 1,024 and 10,000 adapters, chosen uniformly at random, all of
  them in memory; beside it a server of one PEFT model that switches adapters from request to request and keeps the 32
  last used.
- With `--soak N`: N requests among which are garbage, deep and oversized JSON, unknown adapters, NaN vectors, and streams
  whose clients are killed, beside a thousand connections that say nothing or half (opened anew when the server closes
  them) and clients that do not read their streams; memory at each tenth, and its growth after the first; SIGTERM while
  questions, a stream and an upload are under way.

    python benchmarks/serve.py [--model smollm2|tiny] [--counts 1,64,1024,10000] [--requests 256] [--clients 64]
        [--repeats 3] [--no-peft] [--soak 10000] [--json]

A request is one text of 24 words and two choices. Rounds of all counts take turns; ratios are medians over rounds. `tiny` is a
random model of 2 layers, which shows what serving itself costs. Needs `pip install ia3[serve] peft psutil`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import psutil

WORDS = [
    "the",
    "soup",
    "was",
    "lovely",
    "and",
    "the",
    "tea",
    "not",
    "so",
    "fresh",
    "but",
    "we",
    "would",
    "come",
    "again",
    "for",
    "cake",
    "bread",
    "fruit",
    "or",
    "a",
    "quiet",
    "table",
]
TASK = """template: "Review: {{ text }}\\nThe review is"
choices: {pos: good, neg: bad}
"""
KEPT = 32

# Of the soak: connections that say nothing or half, and clients that do not read, all the time.
SLOW, DEAF = 1000, 4
_FORM = "multipart/form-data; boundary=x"


def make(folder: Path, model: str, count: int) -> str:
    """Adapters of a model, each with vectors of its own; returns the model's name."""
    import numpy as np
    import torch

    from ia3 import IA3Config, get_peft_model, load_base

    if model == "tiny":
        import transformers

        name = str(folder / "model")
        _, tokenizer = load_base("smollm2", dtype="stored")
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes)
        transformers.LlamaForCausalLM(config).save_pretrained(name)
        tokenizer.save_pretrained(name)
    else:
        name = model
    targets = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    adapted = get_peft_model(load_base(name, dtype="stored")[0], IA3Config(task_type="CAUSAL_LM", **targets))
    adapted.save_pretrained(folder / "first")
    weights, config_file = folder / "first" / "adapter_model.safetensors", folder / "first" / "adapter_config.json"
    whole = weights.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    chance = np.random.default_rng(0)
    (folder / "task.yaml").write_text(TASK)
    for i in range(count):
        place = folder / "adapters" / f"a{i:05d}"
        place.mkdir(parents=True)
        numbers = 1 + 0.05 * chance.standard_normal((len(whole) - start) // 4, dtype=np.float32)
        (place / weights.name).write_bytes(whole[:start] + numbers.tobytes())
        shutil.copy(config_file, place)
        shutil.copy(folder / "task.yaml", place)
    del adapted, torch
    return name


class Serving:
    """A server in a process of its own."""

    def __init__(self, command: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen([*command, "--port", str(self.port)], stderr=subprocess.DEVNULL)
        self._known = psutil.Process(self.process.pid)
        while not self._ready():
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.2)

    def _ready(self) -> bool:
        try:
            return asyncio.run(self.once("GET", "/ready")) == 200
        except OSError:
            return False

    async def once(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> int:
        """The status of one request on a connection of its own."""
        client = Client(self.port)
        try:
            return (await client.ask(method, path, body, kind))[0]
        finally:
            client.close()

    @property
    def resident(self) -> int:
        """Bytes of memory that it holds."""
        return self._known.memory_info().rss

    @property
    def busy(self) -> float:
        """Seconds of processor time that it has taken."""
        taken = self._known.cpu_times()
        return taken.user + taken.system

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


def ours(model: str, adapters: Path, *options: str) -> Serving:
    run = [sys.executable, "-c", "from ia3.cli import main; main()"]
    return Serving([*run, "serve", "--model", model, "--adapters", str(adapters), *options])


class Client:
    """One connection that is kept: as little as HTTP needs, so that the client costs little."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> tuple[int, bytes]:
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(request(path, body, kind, method))
        found = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = int(found.partition("content-length: ")[2].partition("\r\n")[0] or 0)
        content = await self._reader.readexactly(length)
        if "connection: close" in found:
            self.close()
        return int(found.split()[1]), content

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def classify(name: str, chance: random.Random, words: int = 24) -> bytes:
    return json.dumps({"adapter": name, "texts": [" ".join(chance.choices(WORDS, k=words))]}).encode()


async def load(
    port: int, names: list[str], clients: int, chance: random.Random, words: int = 24
) -> tuple[float, list[float]]:
    """Requests for these adapters by so many clients, each one at a time: seconds in all, and of each."""
    bodies = [classify(name, chance, words) for name in names]
    taken = iter(bodies)
    seconds: list[float] = []

    async def work() -> None:
        client = Client(port)
        for body in taken:
            started = time.perf_counter()
            status, content = await client.ask("POST", "/v1/classify", body)
            seconds.append(time.perf_counter() - started)
            assert status == 200, content
        client.close()

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(clients)))
    return time.perf_counter() - started, seconds


def measure(servers: dict[str, tuple[Serving, list[str]]], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Each server's rates and latencies, rounds of all of them in turn, after one to warm up."""
    chance = random.Random(0)
    found: dict[str, list[tuple[float, float, list[float]]]] = {key: [] for key in servers}
    for repeat in range(options.repeats + 1):
        for key, (server, pool) in servers.items():
            requests = options.requests if key.startswith("ours") else max(32, options.requests // 4)
            before = server.busy
            total, seconds = asyncio.run(load(server.port, chance.choices(pool, k=requests), options.clients, chance))
            if repeat:
                found[key].append((requests / total, (server.busy - before) / requests, seconds))
    first = next(iter(found.values()))
    results = {}
    for key, rounds in found.items():
        seconds = sorted(second for _, _, each in rounds for second in each)
        results[key] = {
            "requests a second": statistics.median(rate for rate, _, _ in rounds),
            "over the first": statistics.median(a[0] / b[0] for a, b in zip(rounds, first, strict=True)),
            "p50 ms": 1e3 * seconds[len(seconds) // 2],
            "p95 ms": 1e3 * seconds[int(0.95 * len(seconds))],
            # Other programs on the machine change this less.
            "processor ms a request": 1e3 * statistics.median(busy for _, busy, _ in rounds),
            "its ratio to the first": statistics.median(a[1] / b[1] for a, b in zip(rounds, first, strict=True)),
        }
    return results


def rates(folder: Path, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """The first part."""
    counts = [int(count) for count in options.counts.split(",")]
    names = [f"a{i:05d}" for i in range(max(counts))]
    server = ours(model, folder / "adapters")
    peft = None
    try:
        before = server.resident
        asyncio.run(load(server.port, names, 128, random.Random(1), words=1))  # from here on all are resident
        added = server.resident - before
        servers = {f"ours, {count} adapters": (server, names[:count]) for count in counts}
        if options.peft:
            peft = Serving([sys.executable, __file__, "--peft-server", model, str(folder / "adapters")])
            for count in counts[:1] + counts[-1:]:
                servers[f"PEFT, {count} adapters"] = (peft, names[:count])
        return {**measure(servers, options), "MB for all adapters": added / 1e6}
    finally:
        server.stop()
        if peft is not None:
            peft.process.kill()


def peft_server(model: str, adapters: str, port: int) -> None:
    """One PEFT model behind FastAPI, which switches its adapter for each request and keeps the last used ones."""
    import threading

    import peft
    import torch
    import uvicorn
    from fastapi import FastAPI

    from ia3 import load_base

    base, tokenizer = load_base(model)
    tokenizer.padding_side = "right"
    adapted: Any = None
    kept: OrderedDict[str, None] = OrderedDict()
    lock = threading.Lock()
    app = FastAPI()
    choices = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in ("good", "bad")]

    def switch(name: str) -> None:
        nonlocal adapted
        if name not in kept:
            if adapted is None:
                adapted = peft.PeftModel.from_pretrained(base, f"{adapters}/{name}", adapter_name=name).eval()
            else:
                adapted.load_adapter(f"{adapters}/{name}", name)
            if len(kept) == KEPT:
                adapted.delete_adapter(kept.popitem(last=False)[0])
        kept[name] = None
        kept.move_to_end(name)
        adapted.set_adapter(name)

    @app.get("/ready")
    def ready() -> str:
        return "ready"

    @app.post("/v1/classify")
    def answer(body: dict) -> dict:
        ids = tokenizer(f"Review: {body['texts'][0]}\nThe review is")["input_ids"]
        rows = [ids + choice for choice in choices]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        with lock, torch.inference_mode():
            switch(body["adapter"])
            found = adapted(input_ids=tokens, attention_mask=mask).logits.log_softmax(-1)
        scores = [
            sum(float(found[i, len(ids) - 1 + t, token]) for t, token in enumerate(choice)) / len(choice)
            for i, choice in enumerate(choices)
        ]
        return {"scores": scores}

    uvicorn.run(app, port=port, log_level="error")


# The second part.


async def soak(folder: Path, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a server that is treated badly does."""
    names = sorted(path.name for path in (folder / "adapters").iterdir())
    server = await asyncio.to_thread(ours, model, folder / "adapters", "--deadline", "120")
    chance = random.Random(0)
    weights = (folder / "first" / "adapter_model.safetensors").read_bytes()
    start = 8 + int.from_bytes(weights[:8], "little")
    bad = weights[:start] + b"\xff\xff\xff\x7f" * ((len(weights) - start) // 4)  # NaN

    def form(vectors: bytes) -> bytes:
        config = (folder / "first" / "adapter_config.json").read_bytes()
        parts = (
            (b"name", b"", b"new"),
            (b"files", b'; filename="adapter_model.safetensors"', vectors),
            (b"files", b'; filename="adapter_config.json"', config),
        )
        head = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
        return b"".join(head % part for part in parts) + b"--x--\r\n"

    stream = {"model": names[0], "prompt": "the soup", "stream": True}
    text, long_text = (
        request("/v1/completions", json.dumps({**stream, "max_tokens": tokens}).encode()) for tokens in (100, 1000)
    )
    kinds = {
        "garbage": (b"\x00\xff{", 422),
        "deep JSON": (b"[" * 100_000, 422),
        "oversized": (b"x" * 3_000_000, 413),
        "unknown adapter": (classify("nobody", chance), 404),
    }
    seen: Counter[str] = Counter()
    memory: list[int] = []
    left = options.soak

    async def work(number: int) -> None:
        nonlocal left
        client = Client(server.port)
        its = random.Random(number)
        while left > 0:
            left -= 1
            if left % (options.soak // 10 or 1) == 0:
                memory.append(server.resident)
            kind = its.choices(["good", *kinds, "NaN upload", "killed stream"], [90, 2, 2, 1, 3, 1, 1])[0]
            if kind == "good":
                status, _ = await client.ask("POST", "/v1/classify", classify(its.choice(names), its))
                expected = 200
            elif kind == "NaN upload":
                status = await server.once("POST", "/v1/adapters", form(bad), _FORM)
                expected = 422
            elif kind == "killed stream":
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write(text)
                status = expected = int((await reader.readuntil(b"data: ")).split()[1])
                writer.transport.abort()  # type: ignore[attr-defined]
            else:
                body, expected = kinds[kind]
                status = await server.once("POST", "/v1/classify", body)
            seen[f"{kind}: {status}{'' if status == expected else ' UNEXPECTED'}"] += 1
        client.close()

    opened = 0

    async def slow(number: int) -> None:
        """A connection that says nothing or half a request; another one when the server has closed it."""
        nonlocal opened
        half = request("/v1/classify", b"{" * 99)[:-98]
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            opened += 1
            try:
                writer.write((b"", half[:25], half)[number % 3])
                with contextlib.suppress(ConnectionError):
                    await reader.read()
            finally:
                writer.transport.abort()  # type: ignore[attr-defined]

    async def deaf() -> None:
        """A stream that nobody reads; another one when there has been time enough for it."""
        loop = asyncio.get_running_loop()
        while True:
            with socket.socket() as client:
                client.setblocking(False)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                await loop.sock_connect(client, ("127.0.0.1", server.port))
                await loop.sock_sendall(client, long_text)
                await asyncio.sleep(20)

    beside = [asyncio.ensure_future(slow(i)) for i in range(SLOW)] + [
        asyncio.ensure_future(deaf()) for _ in range(DEAF)
    ]
    while opened < SLOW:
        await asyncio.sleep(0.05)
    started = time.perf_counter()
    await asyncio.gather(*(work(i) for i in range(options.clients)))
    seconds = time.perf_counter() - started
    memory.append(server.resident)
    failed = sum(each.done() for each in beside)
    there = len(psutil.Process(server.process.pid).net_connections("tcp"))

    # SIGTERM when these have begun: questions that are sent, a stream that has said something, half an upload.
    questions = [await send(server.port, classify(names[i % len(names)], chance)) for i in range(64)]
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(text)
    begun = await reader.readuntil(b"data: ")
    upload = request("/v1/adapters", form(weights), _FORM)
    its_reader, its_writer = await asyncio.open_connection("127.0.0.1", server.port)
    its_writer.write(upload[: len(upload) // 2])
    await its_writer.drain()
    await asyncio.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.5)
    its_writer.write(upload[len(upload) // 2 :])
    for each in beside:
        each.cancel()
    await asyncio.gather(*beside, return_exceptions=True)
    answers = [await each.read() for each, _ in questions]
    streamed = begun + await reader.read()
    uploaded = await its_reader.read()
    code = await asyncio.to_thread(server.process.wait, 120)
    tenths = [size / 1e6 for size in memory]
    return {
        "requests": dict(sorted(seen.items())),
        "seconds": seconds,
        "connections at the end": there,
        "slow connections opened": opened,
        "slow connections failed": failed,
        "MB resident, at each tenth": [round(size, 1) for size in tenths],
        "MB of growth after the first tenth": round(tenths[-1] - tenths[min(1, len(tenths) - 1)], 1),
        "SIGTERM, 64 questions": dict(Counter(each[:12].decode() or "nothing" for each in answers)),
        "SIGTERM, a stream": "to its end" if b"data: [DONE]" in streamed else "BROKEN",
        "SIGTERM, half an upload": uploaded[:12].decode() or "nothing",
        "exit code": code,
    }


def request(path: str, body: bytes, kind: str = "application/json", method: str = "POST") -> bytes:
    """A request, as it is sent."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def send(port: int, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A question on a connection of its own, which is closed when nobody holds its writer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request("/v1/classify", body))
    await writer.drain()
    return reader, writer


def allow_connections() -> None:
    """As many open files as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (65536 if hard == resource.RLIM_INFINITY else min(hard, 65536), hard))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, or a folder")
    parser.add_argument("--counts", default="1,64,1024,10000")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peft", dest="peft", action="store_false")
    parser.add_argument("--soak", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peft-server", nargs=2, metavar=("MODEL", "ADAPTERS"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peft_server:
        peft_server(*options.peft_server, options.port)
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    allow_connections()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        most = 64 if options.soak else max(int(count) for count in options.counts.split(","))
        model = make(folder, options.model, most)
        found = asyncio.run(soak(folder, model, options)) if options.soak else rates(folder, model, options)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for key, value in found.items():
        numbers = value.items() if isinstance(value, dict) else ()
        text = ", ".join(f"{name} {number:.4g}" for name, number in numbers)
        print(f"{key}: {text or value}")


if __name__ == "__main__":
    main()
