"""Finds the platform, memory and GPU generation of the device that a program is compiled for."""

import jax
import jax.numpy as jnp

MIB = 2**20

VMEM_BYTES = {"v4": 16 * MIB, "v5e": 128 * MIB, "v5p": 64 * MIB, "v6e": 128 * MIB}
"""Vector memory (VMEM) of one TPU core, from
`jax.experimental.pallas.tpu.get_tpu_info_for_chip`."""

SMALLEST_VMEM_BYTES = min(VMEM_BYTES.values())

RESERVED_BYTES = 2 * MIB
"""VMEM left to the compiler beside a kernel's own buffers."""

HOPPER = "9.0"
"""Compute capability of the GPUs whose matrix instructions the GPU kernels use."""


def target_vmem_bytes() -> int:
    """Returns the VMEM of the target TPU if JAX knows it, else that of the smallest TPU.

    JAX knows the TPU on a TPU host and under a mesh of TPUs (`jax.set_mesh`).
    """
    from jax.experimental.pallas import tpu as pltpu

    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return SMALLEST_VMEM_BYTES


def target_platform() -> str:
    """Returns the platform that a function is traced for: "cpu", "gpu" or "tpu".

    This is the platform of the current mesh (`jax.set_mesh`), else JAX's default. The program may
    still be lowered for another platform, so use it only to choose the faster of two equal forms.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def unsupported_tpu_dtype(dtype: jnp.dtype) -> str | None:
    """Returns why the TPU kernels do not support activations of `dtype`; None if they do."""
    if dtype in (jnp.bfloat16, jnp.float32):
        return None
    return f"x is {dtype.name}, and TPU kernels support bfloat16 and float32"


def unsupported_gpu() -> str | None:
    """Returns why this machine's GPUs cannot run the GPU kernels; None if they can or it has none.

    A program can be lowered for GPUs on a machine without one.
    """
    try:
        found = {device.compute_capability for device in jax.devices("cuda")}
    except RuntimeError:
        return None
    other = sorted(found - {HOPPER})
    if other:
        return f"this GPU has compute capability {other[0]}, and the kernel needs {HOPPER}"
    return None
