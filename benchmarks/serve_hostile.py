"""`ia3 serve` under texts and templates that are made to hurt it, from another process, over loopback.

- Uploads of templates that are deep, long or many: status and seconds of each.
- A template that repeats its column 250 times, and a text of 100,000 characters for it: status, seconds, and the most memory that
  the server has held.
- A client of short questions, alone and beside four whose texts are 1 MB of spaces, of words, or 64 long texts for the
  template above: its median and slowest answer, and what the four were told.

    python benchmarks/serve_hostile.py [--model tiny|smollm2] [--seconds 10] [--json]

Needs `pip install ia3[serve] psutil`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from serve import Client, Serving, classify, make, ours

FORM = "multipart/form-data; boundary=x"
REPEATED = "{{ text" + " ~ text" * 249 + " }}"
TEMPLATES = {
    "300 times not": "{{ " + "not " * 300 + "text }}",
    "250 filters": "{{ text" + "|trim" * 250 + " }}",
    "101 conditions": "{% if text %}" * 101 + "x" + "{% endif %}" * 101,
    "5,000 attributes": "{{ text" + ".a" * 5000 + " }}",
    "6,000 labels": "{{ text }}",
    "250 times its column": REPEATED,
}
HURTING = {
    "1 MB of spaces": {"adapter": "a00000", "texts": [" " * 1_000_000 + "x"]},
    "1 MB of words": {"adapter": "a00000", "texts": ["fruit " * 170_000]},
    "64 texts, 250 times each": {"adapter": "repeated", "texts": ["fruit " * 2500] * 64},
}


def form(folder: Path, name: str, template: str, labels: int = 2) -> bytes:
    """An upload's body."""
    task = json.dumps({"template": template, "choices": {f"label {i}": f"answer {i}" for i in range(labels)}}).encode()
    parts = [(b'name="name"', name.encode()), (b'name="files"; filename="task.yaml"', task)]
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        parts.append((f'name="files"; filename="{file}"'.encode(), (folder / "first" / file).read_bytes()))
    head = b"--x\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n"
    return b"".join(head % part for part in parts) + b"--x--\r\n"


async def timed(server: Serving, path: str, body: bytes, kind: str = "application/json") -> tuple[str, float]:
    """What the server said to a request (its status), and when, in seconds; None within five minutes is "nothing"."""
    started = time.perf_counter()
    try:
        said = str(await asyncio.wait_for(server.once("POST", path, body, kind), 300))
    except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
        said = "nothing"
    return said, round(time.perf_counter() - started, 3)


async def highest(server: Serving, work: Any) -> tuple[Any, float]:
    """What an awaitable gives, and the most memory (GB) of the server meanwhile."""
    most, task = server.resident, asyncio.ensure_future(work)
    while not task.done():
        await asyncio.sleep(0.01)
        most = max(most, server.resident)
    return task.result(), round(most / 1e9, 2)


async def honest(server: Serving, seconds: float) -> dict[str, float]:
    """A client of short questions, one after the other."""
    chance, client, taken = random.Random(0), Client(server.port), []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not taken:
        started = time.perf_counter()
        status, _ = await client.ask("POST", "/v1/classify", classify("a00001", chance))
        assert status in (200, 504), status
        taken.append(time.perf_counter() - started)
    client.close()
    return {"requests": len(taken), "median s": statistics.median(taken), "slowest s": max(taken)}


async def beside(server: Serving, seconds: float, body: dict) -> dict[str, Any]:
    """The honest client beside four that hurt."""
    told: Counter[str] = Counter()
    data = json.dumps(body).encode()

    async def hurt() -> None:
        while True:
            told[(await timed(server, "/v1/classify", data))[0]] += 1

    tasks = [asyncio.ensure_future(hurt()) for _ in range(4)]
    await asyncio.sleep(1)
    found, memory = await highest(server, honest(server, seconds))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {**found, "GB": memory, "told the four": dict(told)}


async def attack(folder: Path, server: Serving, seconds: float) -> AsyncIterator[tuple[str, Any]]:
    """What was measured, one after the other."""
    for name, template in TEMPLATES.items():
        body = form(
            folder, "repeated" if template == REPEATED else "hostile", template, 6000 if "labels" in name else 2
        )
        yield f"upload, {name}", await timed(server, "/v1/adapters", body, FORM)
    text = json.dumps({"adapter": "repeated", "texts": ["fruit " * 16_667]}).encode()
    yield "GB before", round(server.resident / 1e9, 2)
    found, memory = await highest(server, timed(server, "/v1/classify", text))
    yield "100,000 characters, 250 times", {"answer": found, "GB": memory}
    yield "alone", await honest(server, seconds)
    for name, body in HURTING.items():
        yield f"beside four, {name}", await beside(server, seconds, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="smollm2, tiny, or a folder")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make(folder, options.model, 2)
        server = ours(model, folder / "adapters")
        found = {}

        async def run() -> None:
            async for key, value in attack(folder, server, options.seconds):
                found[key] = value
                if not options.json:
                    print(f"{key}: {value}", flush=True)

        try:
            asyncio.run(run())
        finally:
            server.process.kill()
            server.process.wait()
    if options.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
