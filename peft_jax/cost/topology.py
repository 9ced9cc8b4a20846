"""Devices that a program can be compiled for, here or not.

`pip install libtpu` brings the real TPU compiler, which needs no TPU: it describes the devices of a
topology by name, and a program lowered for them compiles as it would there.
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
"""The devices of this machine, by platform."""

_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_ID": "0",
    # The compiler alone is used: several processes may.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
"""Without these libtpu looks for a TPU at length, and says on the terminal that there is none."""

_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "v4": _CUBES,
    "v5e": _SQUARES,
    "v5p": (*_CUBES, "8x16x16", "16x16x16"),
    "v6e": _SQUARES,
    "tpu7x": (*_CUBES, "8x16x16"),
}
"""Sizes by kind of TPU, in chips, from the smallest; what Google Cloud offers as one slice."""

_LARGEST = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}
"""The most chips of one slice by kind of TPU."""

_MOST_CHIPS = 2**17
"""The most chips of all slices together: more than any TPU run has had."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices to plan for.

    Attributes:
      name: as it was asked for.
      devices: in JAX's order.
      chip: what is known of each.
      slices: how many networks of their own they form.
      described: whether they are only described here, by the compiler.
    """

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None
    slices: int
    described: bool

    @property
    def chips(self) -> int:
        """How many chips the devices are on."""
        return len(self.devices) // (self.chip.per_chip if self.chip else 1)


def find_topology(name: str) -> Topology:
    """The devices that a name stands for.

    Args:
      name: a kind of TPU and its size in chips, "v5p:4x4x8"; with several slices, "v5e:16x16*2";
        or "cpu" or "gpu", the devices of this machine.

    Raises:
      ValueError: the name is not understood, no such topology exists, or libtpu is not installed;
        the message says what would work.
    """
    if name in HERE:
        return _here(name)
    match = re.fullmatch(r"(\w+):([0-9]{1,5}(?:x[0-9]{1,5})*)(?:\*([0-9]{1,5}))?", name)
    if match is None:
        raise ValueError(
            f"the topology {name!r} is not of the form v5p:4x4x8 (a kind of TPU and its size in "
            f"chips), v5e:16x16*2 (two slices), cpu or gpu (of this machine); {_known()}"
        )
    kind, sizes, slices = match[1], [int(size) for size in match[2].split("x")], int(match[3] or 1)
    if kind not in TOPOLOGIES:
        raise ValueError(f"there is no TPU {kind!r}{did_you_mean(kind, TOPOLOGIES)}")
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
    """Refuses sizes that no TPU has, some of which the compiler takes, and others end it."""
    known = f"known sizes of {kind}: {', '.join(TOPOLOGIES[kind])}"
    wanted = TOPOLOGIES[kind][0].count("x") + 1
    if len(sizes) != wanted:
        raise ValueError(
            f"the topology {name!r} has {len(sizes)} sizes, and a {kind} has {wanted}; {known}"
        )
    if min(*sizes, slices) < 1:
        raise ValueError(f"the topology {name!r} has no chips; {known}")
    chips = math.prod(sizes)
    if chips > _LARGEST[kind]:
        raise ValueError(
            f"the topology {name!r} has {chips:,} chips, and one slice of {kind} at most"
            f" {_LARGEST[kind]:,}; several slices are written {kind}:{TOPOLOGIES[kind][-1]}*2;"
            f" {known}"
        )
    if chips * slices > _MOST_CHIPS:
        raise ValueError(
            f"the topology {name!r} has {chips * slices:,} chips; plans end at {_MOST_CHIPS:,}"
        )


def search_no_tpu() -> None:
    """Keeps libtpu from looking for a TPU, where JAX is to begin without one."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)


def has_tpu() -> bool:
    """Whether this machine has the device files of a TPU."""
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
    """The devices of a TPU that is not there."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "planning for TPUs takes their compiler, which is not installed: pip install libtpu "
            "(Linux on x86_64 only; no TPU is needed)"
        )
    search_no_tpu()
    # Imported here: where it is missing, planning for this machine still works.
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            topology_name=f"{kind}:{size}", platform="tpu", num_slices=slices
        ).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the TPU compiler knows no topology {kind}:{size} ({reason}); known sizes of {kind}: "
            f"{', '.join(TOPOLOGIES[kind])}"
        ) from error


def _known() -> str:
    kinds = "; ".join(f"{kind}: {', '.join(sizes)}" for kind, sizes in TOPOLOGIES.items())
    return f"known sizes: {kinds}"
