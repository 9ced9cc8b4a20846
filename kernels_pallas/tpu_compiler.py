"""Compiles programs for TPUs on a machine without a TPU.

The package libtpu (the extra `tpu`) contains the TPU compiler. It compiles Pallas kernels exactly
as on a TPU, and rejects those that do not fit the chip or use unsupported operations. Nothing is
executed.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""Smallest topology of each generation that libtpu accepts."""

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no cloud metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is taken, so other processes may load libtpu too
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # unused, but libtpu requires it
    "TPU_WORKER_HOSTNAMES": "localhost",  # likewise
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def available() -> bool:
    """Returns whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


@functools.lru_cache
def devices(chip: str) -> list[jax.Device]:
    """Returns the devices of a small topology of a TPU generation, to compile for.

    Args:
      chip: One of `TOPOLOGIES`.

    Raises:
      ValueError: `chip` is not one of them.
      RuntimeError: libtpu is not installed.
    """
    if chip not in TOPOLOGIES:
        raise ValueError(f"chip is {chip!r} but must be one of {', '.join(TOPOLOGIES)}")
    if not available():
        raise RuntimeError("libtpu is not installed; pip install libtpu, or the extra 'tpu'")
    from jax.experimental import topologies

    with _environment(_ENVIRONMENT):
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    return topology.devices


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets those environment variables that are not set yet, and unsets them afterwards."""
    added = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def compile_for(
    chip: str, function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct
) -> jax.stages.Compiled:
    """Compiles `function` for one device of a TPU generation.

    Args:
      chip: One of `TOPOLOGIES`.
      function: Function of arrays of these shapes.
      shapes: Shapes without shardings.
    """
    place = jax.sharding.SingleDeviceSharding(devices(chip)[0])
    placed = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for s in shapes]
    return jax.jit(function).lower(*placed).compile()


def runs_pallas(compiled: jax.stages.Compiled) -> bool:
    """Returns whether a program compiled for a TPU contains a Pallas kernel."""
    return "tpu_custom_call" in (compiled.as_text() or "")
