"""Devices that are not there, described by the TPU compiler."""

import importlib.util
import re

import jax
import pytest

from peft_jax.cost import find_chip, find_topology
from peft_jax.parallel import MeshSettings, make_mesh

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "devices", "chips", "chip"),
    [
        ("v5p:2x2x4", 16, 16, "TPU v5p"),
        ("v5e:1x1", 1, 1, "TPU v5e"),
        ("tpu7x:2x2x1", 8, 4, "TPU 7x core"),
        ("v5e:2x2*2", 8, 8, "TPU v5e"),
    ],
)
def test_topologies_by_name(name, devices, chips, chip):
    topology = find_topology(name)
    assert (len(topology.devices), topology.chips, topology.chip.name) == (devices, chips, chip)
    assert topology.described


@needs_libtpu
def test_slices_lie_along_their_axis():
    """Whoever meets along any other axis of the mesh is in the same slice."""
    devices = find_topology("v5e:2x2*2").devices
    mesh = make_mesh(MeshSettings(slice=2, data=1, fsdp=2, tensor=2), devices)
    for index in range(2):
        assert {device.slice_index for device in mesh.devices[index].flat} == {index}
    with pytest.raises(ValueError, match="the devices form 2 slices, and slice is 1"):
        make_mesh(MeshSettings(fsdp=8), devices)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p:3x3x3", "known sizes of v5p: 2x2x1, 2x2x2"),
        ("v5q:2x2", "there is no TPU 'v5q'; did you mean"),
    ],
)
def test_unknown_topologies_are_refused_with_known_ones(name, message):
    with pytest.raises(ValueError, match=message):
        find_topology(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:0x0", "'v5e:0x0' has no chips; known sizes of v5e: 1x1, 2x2"),
        ("v5p:4x0x4", "has no chips"),
        ("v5e:2x2*0", "has no chips"),
        ("v5p:4x4", "has 2 sizes, and a v5p has 3; known sizes of v5p"),
        ("v6e:2x2x2", "has 3 sizes, and a v6e has 2"),
        ("v5e:4", "has 1 sizes, and a v5e has 2"),
        ("v5e:32x32", "has 1,024 chips, and one slice of v5e at most 256; several slices are"),
        ("v5p:64x64x64", "has 262,144 chips"),
        ("v5e:16x16*999", "has 255,744 chips; plans end at 131,072"),
        ("v5e:-1x2", "is not of the form"),
        ("v5e:٢x٢", "is not of the form"),
        (f"v5e:{'9' * 5000}x1", "is not of the form"),
        ("v5e:2x2*", "is not of the form"),
        ("", "is not of the form"),
    ],
    ids=lambda value: value[:20],
)
def test_sizes_that_no_tpu_has_are_refused_before_the_compiler_sees_them(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_topology(name)


def test_what_is_no_topology_is_refused_with_the_form():
    with pytest.raises(ValueError, match=r"not of the form v5p:4x4x8 .*known sizes: v4: 2x2x1"):
        find_topology("pod")


def test_without_the_compiler_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install libtpu"):
        find_topology("v5p:2x2x1")


def test_the_devices_of_this_machine():
    topology = find_topology("cpu")
    assert list(topology.devices) == jax.devices()
    assert topology.chip is None
    assert not topology.described
    with pytest.raises(ValueError, match="JAX finds no gpu on this machine"):
        find_topology("gpu")


def test_chips_by_what_jax_calls_them():
    assert find_chip("TPU v5").name == "TPU v5p"
    assert find_chip("TPU v5 lite").name == "TPU v5e"
    assert find_chip("NVIDIA H100 80GB HBM3").name == "H100"
    assert find_chip("cpu") is None
