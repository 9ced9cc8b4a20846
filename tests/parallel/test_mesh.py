"""Tests meshes, and the shapes suggested for a number of devices."""

import math

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

from peft_jax.parallel import MESH_AXES, MeshSettings, make_mesh


def test_all_devices_are_along_data_by_default():
    mesh = make_mesh()
    assert dict(mesh.shape) == dict.fromkeys(MESH_AXES, 1) | {"data": jax.device_count()}
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        (MeshSettings(fsdp=4), (1, 2, 4, 1, 1, 1)),
        (MeshSettings(data=1, fsdp=-1, tensor=2), (1, 1, 4, 1, 1, 2)),
        (MeshSettings(data=2, fsdp=2, tensor=2), (1, 2, 2, 1, 1, 2)),
        (MeshSettings(devices=4, tensor=2), (1, 2, 1, 1, 1, 2)),
        (MeshSettings(slice=2, sequence=2), (2, 2, 1, 1, 2, 1)),
        (MeshSettings(expert=4), (1, 2, 1, 4, 1, 1)),
    ],
)
def test_each_device_is_used_once(settings, shape):
    mesh = make_mesh(settings)
    assert mesh.devices.shape == shape
    assert mesh.axis_names == MESH_AXES
    used = {device.id for device in mesh.devices.flat}
    assert len(used) == math.prod(shape)


def test_only_the_given_devices_are_used():
    chosen = jax.devices()[2:6]
    assert set(make_mesh(MeshSettings(fsdp=2), chosen).devices.flat) == set(chosen)


def test_sizes_that_do_not_fit_are_rejected_with_sizes_that_do():
    with pytest.raises(ValueError, match=r"data=-1, fsdp=3 .*8 devices") as e:
        make_mesh(MeshSettings(fsdp=3))
    assert "data=2, fsdp=4;" in str(e.value)
    with pytest.raises(ValueError, match=r"data=1 .*8 devices"):
        make_mesh(MeshSettings(data=1))
    with pytest.raises(ValueError, match=r"devices .*9.* 8"):
        make_mesh(MeshSettings(devices=9))


@hypothesis.given(
    sizes=st.tuples(*[st.integers(1, 6)] * len(MESH_AXES)),
    left=st.sampled_from([None, *MESH_AXES]),
    count=st.integers(1, 128),
)
@hypothesis.settings(deadline=None)
def test_sizes_or_their_suggestions_fit(sizes, left, count):
    given_sizes = dict(zip(MESH_AXES, sizes, strict=True))
    if left is None:
        settings = MeshSettings(**given_sizes)
    else:
        settings = MeshSettings(**{**given_sizes, left: -1})
    fixed = math.prod(size for size in settings.sizes.values() if size != -1)
    fits = count == fixed if left is None else count % fixed == 0
    if fits:
        shape = settings.shape(count)
        assert math.prod(shape.values()) == count
        assert all(shape[axis] == size for axis, size in settings.sizes.items() if size != -1)
        return
    with pytest.raises(ValueError, match="these do: ") as rejected:
        settings.shape(count)
    for suggestion in str(rejected.value).split("these do: ")[1].split("; "):
        suggested = dict(pair.split("=") for pair in suggestion.split(", "))
        suggested = {axis: int(size) for axis, size in suggested.items()}
        assert MeshSettings(**suggested).shape(count) == dict.fromkeys(MESH_AXES, 1) | suggested


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fsdp": 0}, "fsdp .* 0"),
        ({"fsdp": -1}, "data and fsdp .*-1"),
        ({"devices": -2}, "devices .*-2"),
    ],
)
def test_invalid_settings_are_rejected(given, message):
    with pytest.raises(ValueError, match=message):
        MeshSettings(**given)
