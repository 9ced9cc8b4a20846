"""The real TPU compiler on a machine without a TPU, and what a compiled program moves.

With the package libtpu installed (the extra `tpu`), a program can be compiled for a TPU that is not
there. Pallas kernels go through the same compiler as on a TPU, which refuses what does not fit the
chip or is not understood; nothing is run.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""The smallest topology of each generation that can be asked for."""

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no cloud machine to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is taken, so others may do the same
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # not used, but missed
    "TPU_WORKER_HOSTNAMES": "localhost",  # likewise
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a compiled program holds in the chip's main memory, in bytes.

    Attributes:
      arguments: read, at least once.
      results: written.
      temporaries: written and read again.
    """

    arguments: int
    results: int
    temporaries: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.results + self.temporaries


def available() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


@functools.lru_cache
def devices(chip: str) -> list[jax.Device]:
    """The devices of a small topology of a generation, to compile for.

    Args:
      chip: one of `TOPOLOGIES`.

    Raises:
      ValueError: it is none of them.
      RuntimeError: libtpu is not installed.
    """
    if chip not in TOPOLOGIES:
        raise ValueError(f"chip is {chip!r}; it must be one of {', '.join(TOPOLOGIES)}")
    if not available():
        raise RuntimeError("libtpu is not installed; pip install libtpu, or the extra 'tpu'")
    from jax.experimental import topologies

    with _environment(_ENVIRONMENT):
        found = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    return found.devices


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables that are not set otherwise, for as long as libtpu is being loaded."""
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
    """`function` compiled for one device of a generation.

    Args:
      chip: one of `TOPOLOGIES`.
      function: of arrays of these shapes.
      shapes: without shardings.
    """
    place = jax.sharding.SingleDeviceSharding(devices(chip)[0])
    placed = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for s in shapes]
    return jax.jit(function).lower(*placed).compile()


def traffic(compiled: jax.stages.Compiled) -> Traffic:
    """What a compiled program holds in main memory."""
    found: Any = compiled.memory_analysis()
    return Traffic(
        arguments=int(found.argument_size_in_bytes),
        results=int(found.output_size_in_bytes - found.alias_size_in_bytes),
        temporaries=int(found.temp_size_in_bytes),
    )


def runs_pallas(compiled: jax.stages.Compiled) -> bool:
    """Whether a program compiled for a TPU has a Pallas kernel in it."""
    return "tpu_custom_call" in (compiled.as_text() or "")
