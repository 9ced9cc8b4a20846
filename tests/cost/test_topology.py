"""Tests descriptions of absent devices by the TPU compiler."""

import importlib.util

import jax
import pytest

from peft_jax.cost import find_chip, find_topology
from peft_jax.parallel import MeshSettings, make_mesh

FORM = "form v5p:4x4x8"

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "devices", "chips", "chip"),
    [
        ("v5p:2x2x4", 16, 16, "TPU v5p"),
        ("v4:2x2x2", 8, 8, "TPU v4"),
        ("v5e:1x1", 1, 1, "TPU v5e"),
        ("tpu7x:2x2x1", 8, 4, "TPU 7x core"),
        ("v5e:2x2*2", 8, 8, "TPU v5e"),
    ],
)
def test_topology_has_the_named_devices(name, devices, chips, chip):
    topology = find_topology(name)
    assert (len(topology.devices), topology.chips, topology.chip.name) == (devices, chips, chip)
    assert topology.described


@needs_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x2", "v5p:2x2x2", "tpu7x:2x2x1", "v6e:2x4"])
def test_a_mesh_of_two_axes_is_made_of_described_devices(name):
    mesh = make_mesh(MeshSettings(fsdp=4, tensor=2), find_topology(name).devices)
    assert dict(mesh.shape) | {"fsdp": 4, "tensor": 2} == dict(mesh.shape)


@needs_libtpu
def test_only_the_slice_axis_crosses_slices():
    devices = find_topology("v5e:2x2*2").devices
    mesh = make_mesh(MeshSettings(slice=2, data=1, fsdp=2, tensor=2), devices)
    for index in range(2):
        assert {device.slice_index for device in mesh.devices[index].flat} == {index}
    with pytest.raises(ValueError, match=r"slice .*1.* 2 "):
        make_mesh(MeshSettings(fsdp=8), devices)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p:3x3x3", "known sizes of v5p: 2x2x1, 2x2x2"),
        ("v5q:2x2", "'v5q'.*'v5"),
    ],
)
def test_unknown_topologies_are_rejected_with_known_ones(name, message):
    with pytest.raises(ValueError, match=message):
        find_topology(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:0x0", "'v5e:0x0' .*no chips.* v5e: 1x1, 2x2"),
        ("v5p:4x0x4", "no chips"),
        ("v5e:2x2*0", "no chips"),
        ("v5p:4x4", "'v5p:4x4' .* 3 .* 2;.* v5p: 2x2x1"),
        ("v6e:2x2x2", "'v6e:2x2x2' .* 2 .* 3;"),
        ("v5e:4", "'v5e:4' .* 2 .* 1;"),
        ("v5e:32x32", "1,024 chips.* v5e .* 256;"),
        ("v5p:64x64x64", "262,144 chips"),
        ("v5e:16x16*999", "255,744 chips.* 131,072"),
        ("v5e:-1x2", FORM),
        ("v5e:٢x٢", FORM),
        (f"v5e:{'9' * 5000}x1", FORM),
        ("v5e:2x2*", FORM),
        ("", FORM),
        ("pod", rf"{FORM} .* v4: 2x2x1"),
    ],
    ids=lambda value: value[:20],
)
def test_sizes_that_no_tpu_has_are_rejected_before_the_compiler_runs(name, message):
    with pytest.raises(ValueError, match=message):
        find_topology(name)


def test_missing_compiler_is_reported_with_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install libtpu"):
        find_topology("v5p:2x2x1")


def test_topology_of_this_machine():
    topology = find_topology("cpu")
    assert list(topology.devices) == jax.devices()
    assert topology.chip is None
    assert not topology.described
    with pytest.raises(ValueError, match="no gpu"):
        find_topology("gpu")


def test_chip_is_found_by_device_kind():
    assert find_chip("TPU v5").name == "TPU v5p"
    assert find_chip("TPU v5 lite").name == "TPU v5e"
    assert find_chip("NVIDIA H100 80GB HBM3").name == "H100"
    assert find_chip("cpu") is None
