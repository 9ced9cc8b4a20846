"""Tests the links that collectives take, counted by hand."""

import dataclasses

import numpy as np
import pytest

from peft_jax.cost import network_of


@dataclasses.dataclass(frozen=True)
class Device:
    coords: tuple[int, ...]


def network(kind: str, sizes: tuple[int, ...], per_chip: int = 1):
    """Returns the links of a slice whose devices are in the order of their coordinates."""
    devices = [Device(place) for place in np.ndindex(*sizes) for _ in range(per_chip)]
    return network_of(devices, kind, per_chip, 1)


def along(sizes: tuple[int, ...], *axes: int) -> list[int]:
    """Returns the devices at 0 of every other axis."""
    numbers = np.arange(np.prod(sizes)).reshape(sizes)
    return list(
        map(int, numbers[tuple(slice(None) if a in axes else 0 for a in range(len(sizes)))].flat)
    )


def test_axis_of_the_mesh_over_two_axes_of_the_torus_has_the_links_of_both():
    sizes = (4, 4, 8)
    torus = network("v5p", sizes)
    assert torus.rings == (True, True, True)
    assert torus.axis_rates(along(sizes, 2)) == [1]
    assert torus.axis_rates(along(sizes, 0, 1)) == [1, 1]
    assert torus.axis_rates(along(sizes, 0, 1, 2)) == [1, 1, 1]


def test_open_axes_receive_from_one_side():
    assert network("v5e", (4, 4)).rings == (False, False)
    assert network("v6e", (16, 16)).rings == (True, True)
    assert network("v6e", (8, 16)).rings == (False, True)
    # Three-dimensional slices close their axes only together.
    assert network("v5p", (2, 4, 4)).rings == (False, False, False)
    assert network("v5e", (4, 4)).axis_rates(along((4, 4), 0)) == [0.5]


def test_groups_that_share_an_axis_share_its_links():
    ring = network("v6e", (16, 16))
    assert ring.axis_rates([0, 2, 4, 6, 8, 10, 12, 14]) == [0.5]  # every second: two groups
    assert ring.axis_rates([0, 1, 2, 3]) == [0.5]  # a part of the ring is open


def test_devices_of_one_chip_share_its_links():
    pair = network("v4", (4, 4, 4), per_chip=2)
    whole = along((4, 4, 4, 2), 0, 3)
    assert pair.axis_rates(whole) == [1]
    assert pair.axis_rates(along((4, 4, 4, 2), 0)) == [0.5]


def test_permutes_take_the_shortest_way():
    ring = network("v6e", (16, 16))
    forward = [(i, (i + 1) % 16) for i in range(16)]
    assert ring.busiest_link(forward) == 1
    assert ring.lanes(forward) == {"1+"}
    assert ring.lanes([(j, i) for i, j in forward]) == {"1-"}
    assert ring.busiest_link([(i, (i + 3) % 16) for i in range(16)]) == 3
    line = network("v5e", (1, 4))
    # Closing the circle takes the line's whole length, against the others' direction.
    assert line.lanes([(0, 1), (1, 2), (2, 3), (3, 0)]) == {"1+", "1-"}


def test_all_to_all_crosses_the_middle_of_the_longest_axis():
    torus = network("v5p", (4, 4, 8))
    assert torus.spread(along((4, 4, 8), 2)) == 2
    assert torus.spread(along((4, 4, 8), 0)) == 1


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_devices_without_coordinates_reach_each_other_alike(kind):
    plain = network_of([object()] * 8, kind, 1, 2)
    assert plain.axis_rates([0, 1, 2, 3]) == [1]
    assert plain.busiest_link([(0, 1)]) == 1
    assert plain.devices_a_slice == 4
