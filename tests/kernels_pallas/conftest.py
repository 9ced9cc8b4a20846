from collections.abc import Iterator

import pytest

from kernels_pallas import dispatch, tpu_compiler


@pytest.fixture(scope="session")
def tpu():
    """The real TPU compiler; the test is skipped where libtpu is not installed."""
    if not tpu_compiler.available():
        pytest.skip("libtpu is not installed")
    return tpu_compiler


@pytest.fixture
def simulated_tpu() -> Iterator[None]:
    """Kernels called with "interpret" run on a simulated TPU.

    Its memory is full of NaN until it is written, and accesses that race fail the test.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    from jax.experimental.pallas import tpu as pltpu

    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="uninitialized"
    )
    with dispatch.using("interpret", interpreter=params):
        yield
    races = interpret_pallas_call.races
    assert races is not None, "nothing was run on the simulated TPU"
    assert not races.races_found
    pltpu.reset_tpu_interpret_mode_state()
