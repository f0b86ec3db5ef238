"""Which cluster an address means, how many workers it has, and what is said of one that is not there."""

import http.server
import socket
import threading
import time

import pytest

from ia3 import InputError
from ia3.cluster import connection
from ia3.cluster.connection import Workers, _workers, connected


def node(cores, gpus=0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": float(cores), "GPU": float(gpus), "memory": 1.0}}


@pytest.mark.parametrize(
    "nodes, wanted, workers",
    [
        ([node(2)], None, Workers(2, 1)),
        ([node(8)], 2, Workers(2, 4)),
        ([node(8)], 3, Workers(3, 2)),
        ([node(3), node(3)], 3, Workers(3, 1)),  # of 2 cores, one machine has room for one alone
        ([node(4), node(16, alive=False)], None, Workers(4, 1)),
        ([node(16, 2), node(16, 2)], None, Workers(4, 1, 1)),
        ([node(16, 2)], 1, Workers(1, 1, 1)),
    ],
)
def test_the_workers_of_a_cluster(nodes, wanted, workers):
    assert _workers(nodes, wanted) == workers


@pytest.mark.parametrize("nodes, what", [([node(2)], "2 cores, found 3"), ([node(64, 2)], "2 GPUs, found 3")])
def test_more_workers_than_a_cluster_has_room_for(nodes, what):
    with pytest.raises(InputError, match=rf"at most as many workers as the cluster's {what}; see workers"):
        _workers(nodes, 3)


@pytest.fixture
def no_ray(monkeypatch):
    """Ends a test that starts or calls Ray."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was called"))


def test_an_address_that_does_not_answer(no_ray, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = time.monotonic()
    for where in (address, "auto"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with (
            pytest.raises(InputError, match=r"Expected a Ray cluster at '.*', found none that answers; see ray"),
            connected(where),
        ):
            pass
    assert time.monotonic() - started < 30


def test_a_server_that_is_not_rays(no_ray):
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(InputError, match="found none that answers"), connected(f"127.0.0.1:{server.server_port}"):
            pass
        server.shutdown()


def test_a_server_that_says_nothing(no_ray, monkeypatch):
    monkeypatch.setattr(connection, "_PATIENCE", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(InputError, match="found none that answers"),
        connected(f"127.0.0.1:{server.getsockname()[1]}"),
    ):
        pass


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "nowhere", "host:", ":6379"])
def test_what_is_no_address(no_ray, address):
    with (
        pytest.raises(InputError, match="Expected 'local', 'auto' or a cluster's HOST:PORT, found"),
        connected(address),
    ):
        pass


def test_a_launchers_processes_cannot_use_it(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="Expected one process with Ray"), connected():
        pass
