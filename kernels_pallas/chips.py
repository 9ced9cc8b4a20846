"""What kernels must know of the chips: memory on a TPU's, and which GPUs have kernels at all."""

import jax

MIB = 2**20

VMEM_BYTES = {"v4": 16 * MIB, "v5e": 128 * MIB, "v5p": 64 * MIB, "v6e": 128 * MIB}
"""Vector memory of one core (`jax.experimental.pallas.tpu.get_tpu_info_for_chip`)."""

SMALLEST_VMEM_BYTES = min(VMEM_BYTES.values())

RESERVED_BYTES = 2 * MIB
"""Left to the compiler for what it keeps beside a kernel's own buffers."""


def target_vmem_bytes() -> int:
    """Vector memory of the TPU that is being lowered for: its own where JAX knows, else the least.

    JAX knows the chip on a machine with TPUs, and where a mesh of them is set (`jax.set_mesh`).
    """
    from jax.experimental.pallas import tpu as pltpu

    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return SMALLEST_VMEM_BYTES


def target_platform() -> str:
    """Returns what a function is traced for: "cpu", "gpu" or "tpu".

    It is the platform of the mesh that is set, or else JAX's default. A choice by it is one of
    speed alone: a program may still be lowered for another platform.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


HOPPER = "9.0"
"""The compute capability of the GPUs whose matrix instructions the GPU kernels use."""


def refuse_generation() -> str | None:
    """Why the GPUs of this machine cannot run the GPU kernels; None if they can, or are none."""
    try:
        found = {device.compute_capability for device in jax.devices("cuda")}
    except RuntimeError:
        return None
    other = sorted(found - {HOPPER})
    if other:
        return f"it is for GPUs of compute capability {HOPPER}, and this machine has {other[0]}"
    return None
