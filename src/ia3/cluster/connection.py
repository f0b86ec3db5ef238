"""Connect to Ray: to a running cluster, or to one of this machine alone, which lasts as long as the connection."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ia3.errors import InputError, brief, needs, reason
from ia3.processes import count

LOCAL, AUTO = "local", "auto"

# Ray reads these when it is imported, also in the processes that it starts: it reports its use to its makers otherwise, and writes
# about its own workings on standard error.
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_DATA_LOG_LEVEL": "ERROR"}

# Seconds to wait for an address. Ray itself waits for minutes.
_PATIENCE = 5.0

# What a client of HTTP/2, which Ray's server speaks, begins with, and its empty settings. A server answers with its own settings,
# a frame of type 4.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS = 4


@dataclass(frozen=True)
class Workers:
    """The workers of a cluster, each with one model.

    Attributes:
        count: their number.
        cpus: the processor's cores of each, which are also its threads.
        gpus: the GPUs of each.
    """

    count: int
    cpus: int
    gpus: int = 0

    @property
    def resources(self) -> dict[str, Any]:
        """What Ray reserves for each."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


@contextmanager
def connected(address: str = AUTO, workers: int | None = None) -> Iterator[Workers]:
    """Connect to Ray in a `with` block. A connection that the process has already is used, and stays.

    Args:
        address: "local" starts Ray on this machine; "auto" takes the running cluster that this machine is a node of (also the one
            that RAY_ADDRESS names), and starts Ray here if there is none; otherwise a cluster's host:port.
        workers: how many to have; None: one for each GPU, or for each core if there are no GPUs.

    Raises:
        InputError: Ray is not installed, nothing answers at the address, or the cluster has too few cores.
    """
    if count() > 1:
        raise InputError(f"Expected one process with Ray, found WORLD_SIZE={count()}; unset it.")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise needs("Working on a cluster", "ray", "ray") from error
    if ray.is_initialized():
        yield _workers(ray.nodes(), workers)
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    found = _found(address)
    try:
        with _silent():
            if found is None:
                cores = max(os.cpu_count() or 1, workers or 1)
                ray.init("local", num_cpus=cores, include_dashboard=False, **quiet)
            else:
                ray.init(found, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"Cannot connect to Ray at {brief(found or LOCAL)}: {reason(error)}", argument="ray"
        ) from error
    try:
        yield _workers(ray.nodes(), workers)
    finally:
        ray.shutdown()


@contextmanager
def _silent() -> Iterator[None]:
    """In a `with` block, nothing is written on standard error, where Ray's own code announces its log level."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _found(address: str) -> str | None:
    """The host:port of a cluster that answers; None: start one here."""
    if address == LOCAL:
        return None
    where = address
    if address == AUTO:
        # The address in RAY_ADDRESS, or in the file that `ray start` leaves.
        from ray._private.services import canonicalize_bootstrap_address

        where = canonicalize_bootstrap_address(AUTO)
        named = "RAY_ADDRESS" in os.environ
        if where is None or (not named and not _answers(where)):  # the file of a cluster that is gone
            return None
    host, _, port = where.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise InputError(
            f"Expected 'local', 'auto' or a cluster's HOST:PORT, found {brief(where)}; a ray:// address wants a job on the cluster "
            "instead (ray job submit)",
            argument="ray",
        )
    if not _answers(where):
        raise InputError(f"Expected a Ray cluster at {brief(where)}, found none that answers", argument="ray")
    return where


def _answers(address: str) -> bool:
    """Whether a server that may be Ray's answers at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _PATIENCE) as opened:
            if os.environ.get("RAY_USE_TLS") == "1":
                return True
            opened.sendall(_PREFACE)
            answer = opened.recv(9)
            return len(answer) == 9 and answer[3] == _SETTINGS
    except (OSError, OverflowError):
        return False


def _workers(nodes: list[dict[str, Any]], wanted: int | None) -> Workers:
    """The workers that the nodes of a cluster have room for."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in alive)
    cores = [int(node.get("CPU", 0)) for node in alive]
    most = gpus or sum(cores)
    if not most or (wanted or 0) > most:
        what = "GPUs" if gpus else "cores"
        raise InputError(
            f"Expected at most as many workers as the cluster's {most} {what}, found {wanted}", argument="workers"
        )
    number = wanted or most
    if gpus:
        return Workers(number, 1, 1)
    each = next(size for size in range(max(cores), 0, -1) if sum(its // size for its in cores) >= number)
    return Workers(number, each)
