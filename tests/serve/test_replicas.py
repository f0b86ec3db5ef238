"""Several `ia3 serve` behind a proxy that knows nothing but `/ready`: what one takes the others serve, and a restart of
each in turn loses no request."""

import asyncio
import contextlib
import itertools
import signal
import threading
import time

import httpx

from ia3.files import CONFIG_NAME, WEIGHTS_NAME
from support.launched import Process

# Seconds between looks of the servers at their adapters, and of the proxy at `/ready`; and until a port is closed.
REFRESH, LOOK, DRAIN = 0.5, 0.1, 1.0


class Proxy:
    """Passes each connection's requests on to the servers that were ready at the last look, in turn. It repeats nothing.

    Attributes:
        ports: of the servers; tests change it.
        ready: those that were ready at the last look.
        url: where.
    """

    def __init__(self, ports: list[int]) -> None:
        self.ports, self.ready = ports, []
        self._turns, self._up = itertools.count(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._up.wait(30)

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        listening = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        async with httpx.AsyncClient(timeout=30) as self._http:
            looking = asyncio.ensure_future(self._look())
            self._up.set()
            await self._end.wait()
            looking.cancel()
            listening.close()

    async def _look(self) -> None:
        while True:
            found = []
            for port in self.ports:
                with contextlib.suppress(httpx.HTTPError):
                    if (await self._http.get(f"http://127.0.0.1:{port}/ready")).status_code == 200:
                        found.append(port)
            self.ready = found
            await asyncio.sleep(LOOK)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request of a connection, on a connection to a server that may have served others before."""
        with contextlib.closing(writer):
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            headers = dict(line.lower().split(": ", 1) for line in lines if line)
            body = await reader.readexactly(int(headers["content-length"]))
            method, path, _ = first.split()
            url = f"http://127.0.0.1:{self.ready[next(self._turns) % len(self.ready)]}{path}"
            passed = {name: headers[name] for name in ("content-type", "content-length")}
            answer = await self._http.request(method, url, headers=passed, content=body)
            head = (
                f"HTTP/1.1 {answer.status_code} .\r\nContent-Length: {len(answer.content)}\r\nConnection: close\r\n\r\n"
            )
            writer.write(head.encode() + answer.content)
            await writer.drain()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(30)


class Clients:
    """Ask for labels again and again, each from a thread of its own, until they are told to end.

    Attributes:
        answers: the statuses.
        broken: what went wrong with the others.
    """

    def __init__(self, url: str, count: int) -> None:
        self.answers: list[int] = []
        self.broken: list[Exception] = []
        self._url, self._end = url, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        body = {"adapter": "tea", "texts": ["the tea was lovely"]}
        while not self._end.is_set():
            try:
                answer = httpx.post(f"{self._url}/v1/classify", json=body, timeout=30)
                self.answers.append(answer.status_code)
            except Exception as error:
                self.broken.append(error)
            time.sleep(0.01)

    def wait_for_more(self, count: int) -> None:
        """Until so many more requests have an answer."""
        wanted, end = len(self.answers) + count, time.monotonic() + 60
        while len(self.answers) < wanted and not self.broken:
            assert time.monotonic() < end, "no answers"
            time.sleep(0.01)

    def end(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(60)


def labels(server: Process, asks: list[dict]) -> list | None:
    """A server's own answers to all of these requests; None unless it answers them all."""
    answers = [server.http.post("/v1/classify", json=ask) for ask in asks]
    return None if {each.status_code for each in answers} != {200} else [each.json()["predictions"] for each in answers]


def test_two_servers_behind_a_proxy(place):
    """One of them reads the folder, the other copies it from its address."""
    folder = place / "adapters"
    with contextlib.ExitStack() as stack:

        def launch(where: object) -> Process:
            options = ("--adapters", where, "--refresh", REFRESH, "--drain", DRAIN)
            server = Process(place, *options, IA3_CACHE=str(place / "cache"))
            stack.callback(server.close)
            server.wait_until_ready()
            return server

        places = (folder, f"file://{folder}")
        servers = [launch(where) for where in places]
        proxy = Proxy([server.port for server in servers])
        stack.callback(proxy.close)
        servers[0].until(lambda: len(proxy.ready) == 2)

        # Two uploads through the proxy, each to another server; both serve them in the stated time.
        files = [
            ("files", (name, (folder / "cake" / name).read_bytes()))
            for name in (CONFIG_NAME, WEIGHTS_NAME, "task.yaml")
        ]
        names = ("one", "other")
        for name in names:
            assert httpx.post(f"{proxy.url}/v1/adapters", data={"name": name}, files=files).status_code == 201
        began = time.monotonic()
        asks = [{"adapter": name, "texts": ["the tea was lovely"]} for name in (*names, "cake")]
        for server in servers:
            found = server.until(lambda server=server: labels(server, asks))
            assert found[0] == found[1] == found[2]
        assert time.monotonic() - began < REFRESH + 10, "the time to look, and to copy on a busy machine"

        # Each is replaced in turn while clients ask.
        clients = Clients(proxy.url, 4)
        stack.callback(clients.end)
        for server, where in zip(servers, places, strict=True):
            server.until(lambda: len(proxy.ready) == 2)
            clients.wait_for_more(8)
            server.send(signal.SIGTERM)
            assert server.ended() == 0
            proxy.ports = [port for port in proxy.ports if port != server.port]
            new = launch(where)
            assert labels(new, asks), "uploads outlive who took them"
            proxy.ports = [*proxy.ports, new.port]
        clients.wait_for_more(8)
        clients.end()
        assert not clients.broken
        assert set(clients.answers) == {200}
