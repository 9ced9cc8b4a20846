import logging
from collections.abc import Iterator

import pytest

from kernels_pallas import dispatch, tpu_compiler


@pytest.fixture
def said(caplog) -> Iterator[list[str]]:
    """What dispatch says while the test runs, also what it has said before."""
    dispatch._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "kernels_pallas"):
        yield caplog.messages
    dispatch._say_once.cache_clear()


@pytest.fixture(scope="session")
def tpu():
    """The real TPU compiler; the test is skipped where libtpu is not installed."""
    if not tpu_compiler.available():
        pytest.skip("libtpu is not installed")
    return tpu_compiler
