"""Chooses the compiler options with which collectives run behind other work.

The compilers for TPU v5p and v6e leave gathers and scatters synchronous: a device waits until they
are done. With these options the chip's SparseCore sends them, and products run meanwhile. The
results take memory for longer. Other TPUs need no options, and GPUs and CPUs have none.
"""

import functools
import logging
import re
import warnings
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

_log = logging.getLogger(__name__)

SPARSE_CORE = MappingProxyType(
    {
        # What the SparseCore sends.
        "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
        # Along several axes of the torus at once; without these most gathers stay synchronous.
        "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
        "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
        "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true",
        # The TensorCore's own fusions would take the collectives first.
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "false",
        "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "false",
        # How both cores share arrays, and how far ahead the scheduler starts.
        "xla_tpu_use_tc_device_shape_on_sc": "true",
        "xla_sc_enable_instruction_fusion": "false",
        "xla_sc_disable_megacore_partitioning": "true",
        "xla_max_concurrent_async_all_gathers": "4",
        "xla_tpu_enable_concurrent_sparse_core_offloading": "true",
        "xla_tpu_sparse_core_all_gather_latency_multiplier": "2",
    }
)
"""Options that let the SparseCore send. They were found by reading the programs of libtpu 0.0.42
and 0.0.52."""

_KINDS = ("TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e")
"""Device kinds whose collectives need `SPARSE_CORE`."""

_UNKNOWN = re.compile(r"No such compile option: '?(\w+)")


def async_collective_options(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """Returns compiler options for a program over a mesh, whose devices need not be present.

    Options that the installed compiler does not know are left out, and a warning names them.

    Args:
      mesh: Mesh of the program.

    Returns:
      Values by option; empty if the devices need none.
    """
    if mesh.size == 1 or mesh.devices.flat[0].device_kind not in _KINDS:
        return {}
    options = known_options(mesh, SPARSE_CORE)
    if missing := sorted(set(SPARSE_CORE) - set(options)):
        _warn_once(
            f"the compiler for {mesh.devices.flat[0].device_kind} does not know the options"
            f" {', '.join(missing)}, so that collectives may not run behind other work; another"
            " version of libtpu may know them"
        )
    return options


def known_options(mesh: jax.sharding.Mesh, options: Mapping[str, str]) -> dict[str, str]:
    """Returns the options that the compiler for a mesh knows, by compiling an empty program."""
    sharding = jax.NamedSharding(mesh, jax.P())
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding)
    left = dict(options)
    while left:
        try:
            with warnings.catch_warnings():
                # JAX's cache of compiled programs cannot load one for an absent device.
                warnings.filterwarnings("ignore", message="Error reading persistent compilation")
                jax.jit(lambda x: x, compiler_options=left).lower(number).compile()
        except jax.errors.JaxRuntimeError as error:
            unknown = _UNKNOWN.search(str(error))
            if unknown is None or left.pop(unknown[1], None) is None:
                raise
        else:
            break
    return left


@functools.lru_cache
def _warn_once(message: str) -> None:
    _log.warning(message)
