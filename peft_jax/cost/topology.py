"""Finds devices that a program can be compiled for, whether present or not.

`pip install libtpu` installs the real TPU compiler, which needs no TPU. It describes the devices of
a topology by name, and programs compile for them exactly as on a TPU.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax

from peft_jax.core import did_you_mean
from peft_jax.cost.chips import Chip, find_chip

HERE = ("cpu", "gpu")
"""Names of this machine's devices, by platform."""

_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_ID": "0",
    # Several processes may use libtpu at once, because only its compiler is used.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
"""Keeps libtpu from a long search for a TPU, and from logging that it found none."""

_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "v4": _CUBES,
    "v5e": _SQUARES,
    "v5p": (*_CUBES, "8x16x16", "16x16x16"),
    "v6e": _SQUARES,
    "tpu7x": (*_CUBES, "8x16x16"),
}
"""Slice sizes that Google Cloud offers, in chips, smallest first, by TPU kind."""

_LARGEST = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}
"""Maximum number of chips of one slice, by TPU kind."""

_OPTIONS = {"v4": {"chip_config_name": "megacore"}}
"""Options of a TPU kind's description. With these, the two cores of a v4 chip are one device, as on
a real one."""

_MOST_CHIPS = 2**17
"""Maximum number of chips of all slices, above that of any TPU run so far."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices to plan for.

    Attributes:
      name: Name as given.
      devices: Devices in JAX's order.
      chip: Peak rates of each device, if known.
      slices: Number of TPU slices, each with its own network.
      described: Whether the devices are absent and only described by the compiler.
    """

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None
    slices: int
    described: bool

    @property
    def chips(self) -> int:
        """Number of chips."""
        return len(self.devices) // (self.chip.per_chip if self.chip else 1)


def find_topology(name: str) -> Topology:
    """Returns the devices of a topology.

    Args:
      name: TPU kind and size in chips, "v5p:4x4x8"; several slices, "v5e:16x16*2"; or "cpu" or
        "gpu" for the devices of this machine.

    Raises:
      ValueError: The name has another form, there is no such topology, or libtpu is not installed.
        The message says what would work.
    """
    if name in HERE:
        return _here(name)
    match = re.fullmatch(r"(\w+):([0-9]{1,5}(?:x[0-9]{1,5})*)(?:\*([0-9]{1,5}))?", name)
    if match is None:
        raise ValueError(
            f"the topology {name!r} must be of the form v5p:4x4x8 (TPU kind and size in chips), "
            f"v5e:16x16*2 (two slices), cpu or gpu (of this machine); {_known()}"
        )
    kind, sizes, slices = match[1], [int(size) for size in match[2].split("x")], int(match[3] or 1)
    if kind not in TOPOLOGIES:
        raise ValueError(
            f"the topology {name!r} has the unknown TPU kind {kind!r}"
            f"{did_you_mean(kind, TOPOLOGIES)}"
        )
    _check_size(name, kind, sizes, slices)
    devices = _describe(kind, "x".join(map(str, sizes)), slices)
    return Topology(
        name=name,
        devices=tuple(devices),
        chip=find_chip(devices[0].device_kind),
        slices=slices,
        described=True,
    )


def _check_size(name: str, kind: str, sizes: Sequence[int], slices: int) -> None:
    """Rejects sizes that no TPU has, because the compiler accepts some and crashes on others."""
    known = f"known sizes of {kind}: {', '.join(TOPOLOGIES[kind])}"
    wanted = TOPOLOGIES[kind][0].count("x") + 1
    if len(sizes) != wanted:
        raise ValueError(
            f"the topology {name!r} must have {wanted} sizes, but has {len(sizes)}; {known}"
        )
    if min(*sizes, slices) < 1:
        raise ValueError(f"the topology {name!r} has no chips; {known}")
    chips = math.prod(sizes)
    if chips > _LARGEST[kind]:
        raise ValueError(
            f"the topology {name!r} has {chips:,} chips, but one slice of {kind} has at most"
            f" {_LARGEST[kind]:,}; write several slices as {kind}:{TOPOLOGIES[kind][-1]}*2; {known}"
        )
    if chips * slices > _MOST_CHIPS:
        raise ValueError(
            f"the topology {name!r} has {chips * slices:,} chips; the limit is {_MOST_CHIPS:,}"
        )


def skip_tpu_discovery() -> None:
    """Keeps libtpu from searching for a TPU."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)


def has_tpu() -> bool:
    """Returns whether this machine has the device files of a TPU."""
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _here(platform: str) -> Topology:
    try:
        devices = tuple(jax.devices(platform))
    except RuntimeError as error:
        raise ValueError(
            f"JAX finds no {platform} on this machine: {str(error).splitlines()[0]}"
        ) from error
    return Topology(
        name=platform,
        devices=devices,
        chip=find_chip(devices[0].device_kind),
        slices=1,
        described=False,
    )


def _describe(kind: str, size: str, slices: int) -> Sequence[jax.Device]:
    """Returns the devices of an absent TPU."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "planning for TPUs needs the TPU compiler, which is not installed: pip install libtpu "
            "(Linux on x86_64 only; no TPU is needed)"
        )
    skip_tpu_discovery()
    # Imported late, so that planning for this machine works without it.
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            topology_name=f"{kind}:{size}",
            platform="tpu",
            num_slices=slices,
            **_OPTIONS.get(kind, {}),
        ).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the TPU compiler does not know the topology {kind}:{size} ({reason}); known sizes of "
            f"{kind}: {', '.join(TOPOLOGIES[kind])}"
        ) from error


def _known() -> str:
    kinds = "; ".join(f"{kind}: {', '.join(sizes)}" for kind, sizes in TOPOLOGIES.items())
    return f"known sizes: {kinds}"
