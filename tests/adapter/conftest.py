"""Shared by the tests of adapters."""

from collections.abc import Iterator

import pytest
import transformers


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """transformers logs errors only: of hundreds of architectures many have something to say."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)
