"""A tiny model with adapters of both kinds, in folders."""

import pytest

from support import panels


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a model, and below `adapters` two adapters that act from the start and one that does from the question on."""
    folder = tmp_path_factory.mktemp("harness")
    panels.save(folder)
    return folder
