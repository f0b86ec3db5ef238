"""Ray on this machine, with two workers of one thread, started once for all tests that need it."""

import psutil
import pytest


@pytest.fixture(scope="session")
def started_ray():
    """Ray, which `connected` then uses."""
    from ia3.cluster.connection import connected

    with connected("local", 2) as workers:
        yield workers


@pytest.fixture
def kill():
    """Kills a process of Ray that runs a function or class; returns whether there was one."""

    def killed(title: str) -> bool:
        for child in psutil.Process().children(recursive=True):
            try:
                if " ".join(child.cmdline()).startswith(f"ray::{title}"):
                    child.kill()
                    return True
            except psutil.NoSuchProcess:
                continue
        return False

    return killed
