"""A server in a thread, on a tiny model, and adapters for it. `import serving` works in every file under `tests/`."""

import asyncio
import contextlib
import socket
import threading
import time

import httpx
import uvicorn

from ia3 import Task
from ia3.serve.app import create_app
from ia3.serve.gate import impatient
from ia3.serve.limits import Limits
from ia3.serve.local import LocalEngine
from ia3.serve.server import Server
from ia3.serve.store import Store
from support import tiny

TASK = {"template": "review : {{ text }} answer :", "choices": {"pos": "good", "neg": "not good"}}
CHAT = "{% for message in messages %}{{ message.content }} {% endfor %}answer :"


def save_adapter(folder, model, seed: int, **fields) -> None:
    """An adapter with random vectors and a task, as `ia3 train` leaves one."""
    tiny.randomize(model, seed)
    model.save_pretrained(folder)
    Task.create({"name": folder.name, **TASK, **fields}).save(folder / "task.yaml")


class _Attentive(uvicorn.Server):
    """Looks more often than ten times a second whether it has to stop."""

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            await asyncio.sleep(0.005)


class Running:
    """A server in a thread of this process.

    Attributes:
        url: where.
        server: the `Server`.
        http: a client.
    """

    def __init__(
        self, folder, limits=None, token=None, idle=30.0, wait=True, log_texts=False, mirror=None, **options
    ) -> None:
        store = Store(folder / "adapters" if mirror is None else mirror.folder, base="model", mirror=mirror)
        engine = LocalEngine(str(folder / "model"), store.kinds(str(folder / "model")), "model", **options)
        self.engine = engine
        self.server = Server(engine, store, limits or Limits(), token, None, log_texts)
        config = uvicorn.Config(
            create_app(self.server), http=impatient(idle), ws="none", log_config=None, access_log=False
        )
        self._uvicorn = _Attentive(config)
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        listening.listen(2048)
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(listening)))
        self._thread.start()
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=60)
        if wait:
            self.until(lambda: self.server.ready)

    async def _serve(self, listening) -> None:
        self.loop = asyncio.get_running_loop()
        await self._uvicorn.serve([listening])

    def until(self, condition, seconds: float = 60.0) -> None:
        """Wait for something that has to come."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.002)

    def call(self, work):
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    @contextlib.contextmanager
    def holding(self):
        """Within `with`, the model's thread does nothing."""
        begun, go = threading.Event(), threading.Event()

        def hold() -> None:
            begun.set()
            go.wait(60)

        held = asyncio.run_coroutine_threadsafe(self.engine.between_batches(hold), self.loop)
        try:
            assert begun.wait(60)
            yield
        finally:
            go.set()
            held.result(60)

    def metric(self, name: str) -> float:
        """A number of `/metrics`."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def classify(self, adapter="tea", texts=("the tea was lovely",), **fields) -> httpx.Response:
        body = {"adapter": adapter, "texts": list(texts), **fields}
        return self.http.post("/v1/classify", json={key: value for key, value in body.items() if value is not None})

    def close(self) -> None:
        self.http.close()
        self._uvicorn.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()
