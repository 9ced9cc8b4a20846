from collections.abc import Iterator

import pytest

from kernels_pallas import dispatch, tpu_compiler


@pytest.fixture(scope="session")
def tpu():
    """The module that compiles for TPUs; skips the test if libtpu is not installed."""
    if not tpu_compiler.available():
        pytest.skip("libtpu is not installed")
    return tpu_compiler


@pytest.fixture
def simulated_tpu() -> Iterator[None]:
    """Runs kernels on a simulated TPU and fails the test if memory accesses race.

    The simulated memory holds NaN until it is written.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    from jax.experimental.pallas import tpu as pltpu

    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="uninitialized"
    )
    with dispatch.use_implementation("interpret", interpreter=params):
        yield
    races = interpret_pallas_call.races
    assert races is not None, "no kernel ran on the simulated TPU"
    assert not races.races_found
    pltpu.reset_tpu_interpret_mode_state()
