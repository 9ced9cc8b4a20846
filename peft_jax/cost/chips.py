"""Lists accelerators' peak rates and memory, for estimates.

Sources: Google Cloud's pages on TPU system architecture, "How to Scale Your Model" (Austin et al.,
2025, chapter 2) for the links and the vector units, and NVIDIA's data sheets (bfloat16, dense
matrices). The usable memory of a TPU is the limit that its compiler (libtpu 0.0.52) reports for a
program that needs more.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Peak rates of one JAX device: a chip, or one core of a chip with two separate cores.

    Attributes:
      name: Display name.
      flops: Peak rate of bfloat16 matrix products, in FLOP/s.
      memory: Usable bytes of memory; None if only the device itself can tell.
      memory_bandwidth: Memory bandwidth, in bytes/s.
      link_bandwidth: Rate at which a device receives data in a collective among neighbors, in
        bytes/s: over NVLink, or from both sides along one axis of a TPU's torus.
      network_bandwidth: Bandwidth per device between TPU slices or GPU hosts, in bytes/s.
      host_bandwidth: Bandwidth per device to its host's memory, in bytes/s.
      elementwise: Peak rate of elementwise operations in float32, in operations/s.
      tile: Number of rows and columns of a matrix unit.
      narrow: Rate of products of 8-bit integers, as a multiple of `flops`.
      per_chip: Number of devices on one chip.
    """

    name: str
    flops: float
    memory: int | None
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    elementwise: float
    tile: int
    narrow: float
    per_chip: int = 1


def _tpu(
    name: str,
    flops: float,
    gib: float,
    memory: float,
    link: float,
    *,
    clock: float,
    cores: int = 1,
    tile: int = 128,
    narrow: float = 1.0,
    per_chip: int = 1,
) -> Chip:
    """Returns a TPU; `cores` is the number of vector units of one device, of 8 x 128 x 4 lanes."""
    return Chip(
        name=name,
        flops=flops,
        memory=int(gib * GIB),
        memory_bandwidth=memory,
        link_bandwidth=2 * link,
        network_bandwidth=6.25e9 / per_chip,
        host_bandwidth=16e9 / per_chip,
        elementwise=8 * 128 * 4 * cores * clock,
        tile=tile,
        narrow=narrow,
        per_chip=per_chip,
    )


def _gpu(name: str, flops: float, memory: float, link: float, elementwise: float) -> Chip:
    return Chip(
        name=name,
        flops=flops,
        memory=None,
        memory_bandwidth=memory,
        link_bandwidth=link,
        network_bandwidth=50e9,
        host_bandwidth=25e9,
        elementwise=elementwise,
        tile=16,
        narrow=2.0,
    )


CHIPS: dict[str, Chip] = {
    "TPU v2": _tpu("TPU v2 core", 23e12, 7.48, 350e9, 62e9, clock=0.7e9, per_chip=2),
    "TPU v3": _tpu("TPU v3 core", 61e12, 15.48, 450e9, 82e9, clock=0.94e9, per_chip=2),
    "TPU v4": _tpu("TPU v4", 275e12, 30.75, 1228e9, 45e9, clock=1.05e9, cores=2),
    "TPU v5 lite": _tpu("TPU v5e", 197e12, 15.75, 819e9, 45e9, clock=1.5e9, narrow=2.0),
    "TPU v5": _tpu("TPU v5p", 459e12, 95.73, 2765e9, 90e9, clock=1.75e9, cores=2, narrow=2.0),
    "TPU v6 lite": _tpu("TPU v6e", 918e12, 31.24, 1640e9, 90e9, clock=1.75e9, tile=256, narrow=2.0),
    "TPU7x": _tpu(
        "TPU 7x core", 1153e12, 94.74, 3690e9, 100e9, clock=2.2e9, tile=256, narrow=2.0, per_chip=2
    ),
    "Tesla T4": _gpu("T4", 65e12, 320e9, 16e9, 8.1e12),
    "NVIDIA L4": _gpu("L4", 121e12, 300e9, 32e9, 30e12),
    "NVIDIA L40S": _gpu("L40S", 362e12, 864e9, 32e9, 92e12),
    "NVIDIA A100": _gpu("A100", 312e12, 2039e9, 300e9, 19.5e12),
    "NVIDIA H100": _gpu("H100", 989e12, 3350e9, 450e9, 67e12),
    "NVIDIA H200": _gpu("H200", 989e12, 4800e9, 450e9, 67e12),
    "NVIDIA B200": _gpu("B200", 2250e12, 8000e9, 900e9, 75e12),
}
"""Chips by the prefix of `jax.Device.device_kind`."""


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip of a device kind; None if it is unknown, as a CPU is.

    Example:
      >>> find_chip("TPU v5 lite").name, find_chip("NVIDIA H100 80GB HBM3").name, find_chip("cpu")
      ('TPU v5e', 'H100', None)
    """
    matching = [kind for kind in CHIPS if device_kind.startswith(kind)]
    return CHIPS[max(matching, key=len)] if matching else None
