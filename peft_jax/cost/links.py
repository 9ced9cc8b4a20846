"""Estimates the time of collectives from the links that they take.

The chips of a TPU slice form a torus of two or three axes, or a grid where an axis is too short to
be closed. A collective among a group takes the links along every axis that the group spans. A
permute takes the links on the shortest way, which other pairs may take as well.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

_CLOSED = {"v4": 4, "v5p": 4, "tpu7x": 4, "v5e": 16, "v6e": 16}
"""Sizes of an axis that can be closed to a ring are multiples of this, by TPU kind.

Two-dimensional slices close each axis by itself; three-dimensional ones only all together.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """Links among devices, in the order in which a program numbers them.

    Attributes:
      coordinates: Coordinates of each device's chip, [devices, axes]; without axes, every device
        reaches every other one alike, as over NVLink.
      sizes: Number of chips along each axis.
      rings: Whether each axis is closed.
      per_chip: Number of devices that share a chip's links.
      devices_a_slice: Number of consecutive devices of one slice.
    """

    coordinates: Int[np.ndarray, "devices axes"]
    sizes: tuple[int, ...]
    rings: tuple[bool, ...]
    per_chip: int
    devices_a_slice: int

    def axis_rates(self, group: Sequence[int]) -> list[float]:
        """Returns the rates at which a group's devices receive along each axis that it spans.

        The unit is a chip's rate from both sides of one axis, for one of its devices. An axis that
        is not closed has half of it, since the devices at its ends receive from one side.
        """
        if not self.sizes:
            return [1.0]
        places = self.coordinates[np.asarray(group)]
        # The devices of a chip share its links, unless all take part and receive together.
        together = len(group) / len(np.unique(places, axis=0))
        shared = self.per_chip / together
        rates = []
        for axis, (size, ring) in enumerate(zip(self.sizes, self.rings, strict=True)):
            along = np.unique(places[:, axis])
            if len(along) == 1:
                continue
            stride = int(np.diff(along).min())
            closed = ring and len(along) * stride == size
            rates.append((1.0 if closed else 0.5) / stride / shared)
        # Devices of one chip exchange without links.
        return rates or [4.0]

    def spread(self, group: Sequence[int]) -> float:
        """Returns the time of exchanging one byte a device with all others, times an axis's rate.

        The longest axis decides: half of all bytes cross its middle.
        """
        if not self.sizes:
            return 1.0
        places = self.coordinates[np.asarray(group)]
        shared = self.per_chip * len(np.unique(places, axis=0)) / len(group)
        slowest = 0.0
        for axis, ring in enumerate(self.rings):
            along = np.unique(places[:, axis])
            if len(along) > 1:
                stride = int(np.diff(along).min())
                closed = ring and len(along) * stride == self.sizes[axis]
                slowest = max(slowest, len(along) / (4.0 if closed else 2.0) * stride)
        return max(slowest, 1.0) * shared

    def busiest_link(self, pairs: Sequence[tuple[int, int]]) -> float:
        """Returns how many pairs' data the busiest link carries in one direction."""
        if not self.sizes:
            return 1.0
        links = (link for source, target in pairs for link in self._way(source, target))
        return float(max(collections.Counter(links).values(), default=1))

    def lanes(self, pairs: Sequence[tuple[int, int]]) -> frozenset[str]:
        """Returns the axes and directions that a permute takes."""
        if not self.sizes:
            return frozenset({"links"})
        ways = (self._way(source, target) for source, target in pairs)
        return frozenset(
            f"{axis}{'+' if step > 0 else '-'}" for way in ways for _, axis, step in way
        )

    def group_lanes(self, group: Sequence[int]) -> frozenset[str]:
        """Returns the axes and directions that a collective in a group takes: both of each axis."""
        if not self.sizes:
            return frozenset({"links"})
        places = self.coordinates[np.asarray(group)]
        spanned = [axis for axis in range(len(self.sizes)) if np.ptp(places[:, axis])]
        return frozenset(f"{axis}{way}" for axis in spanned for way in "+-")

    def _way(self, source: int, target: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
        """Yields the links from one device to another, axis by axis."""
        at = [int(n) for n in self.coordinates[source]]
        for axis, size in enumerate(self.sizes):
            distance = int(self.coordinates[target][axis]) - at[axis]
            if self.rings[axis] and abs(distance) > size / 2:
                distance -= int(math.copysign(size, distance))
            step = 1 if distance > 0 else -1
            for _ in range(abs(distance)):
                yield tuple(at), axis, step
                at[axis] = (at[axis] + step) % size


def network_of(devices: Sequence[Any], kind: str, per_chip: int, slices: int) -> Network:
    """Returns the links among devices, in the order in which a program numbers them.

    Args:
      devices: Devices of a mesh, in order.
      kind: TPU kind, such as "v5p"; of another kind, all devices reach each other alike.
      per_chip: Number of devices of a chip.
      slices: Number of slices.
    """
    a_slice = len(devices) // slices
    if kind not in _CLOSED or not hasattr(devices[0], "coords"):
        return Network(np.zeros((len(devices), 0), int), (), (), 1, a_slice)
    coordinates = np.array([device.coords for device in devices])
    sizes = tuple(int(n) for n in coordinates.max(axis=0) + 1)
    closes = [size % _CLOSED[kind] == 0 for size in sizes]
    if _CLOSED[kind] == 4:
        closes = [all(closes)] * len(sizes)
    return Network(coordinates, sizes, tuple(closes), per_chip, a_slice)
