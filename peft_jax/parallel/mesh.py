"""The devices as a mesh of five axes: parts of the batch, of weights, of rows, of products.

- slice: rows of the batch; weights are repeated along it. The one axis that goes over the data
  center's network, from one slice (or pod) to the next, and all it carries is the sum of the
  trained arrays' gradients.
- data: rows of the batch; weights are repeated along it.
- fsdp: rows of the batch as well, and weights cut up along it, gathered when they are needed.
- sequence: tokens of a row, for contexts that are too long for one device; keys and values are
  gathered along it.
- tensor: weights cut up along it so that each device does a part of every product.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

MESH_AXES = ("slice", "data", "fsdp", "sequence", "tensor")
"""The mesh's axes, from the outermost: neighbors along "tensor" are nearest to each other."""

_SUGGESTIONS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """How many devices there are along each axis of the mesh.

    Attributes:
      slice: along "slice": how many slices of a TPU there are, each a network of its own.
      data: along "data"; -1 for as many as are left over by the others.
      fsdp: along "fsdp"; or -1.
      sequence: along "sequence"; or -1.
      tensor: along "tensor"; or -1.
      devices: use only the first so many devices; 0 for all. In a program of one process.

    Raises:
      ValueError: a size is neither positive nor -1, or more than one is -1.
    """

    slice: int = 1
    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    devices: int = 0

    def __post_init__(self) -> None:
        for axis, size in self.sizes.items():
            if size < 1 and size != -1:
                raise ValueError(
                    f"{axis} must be at least 1, or -1 for what is left, but is {size}"
                )
        left = [axis for axis, size in self.sizes.items() if size == -1]
        if len(left) > 1:
            raise ValueError(
                f"{' and '.join(left)} are all -1; only one axis can take what is left"
            )
        if self.devices < 0:
            raise ValueError(f"devices must be at least 0, but is {self.devices}")

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by axis, as given."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    def shape(self, device_count: int) -> dict[str, int]:
        """The sizes by axis on so many devices, all of which are used.

        Raises:
          ValueError: they do not come out even; the message names shapes that do.

        Example:
          >>> MeshSettings(fsdp=4).shape(8)
          {'slice': 1, 'data': 2, 'fsdp': 4, 'sequence': 1, 'tensor': 1}
          >>> MeshSettings(fsdp=3).shape(8)
          Traceback (most recent call last):
          ValueError: data=-1, fsdp=3 does not fit 8 devices; these do: data=2, fsdp=4; ...
        """
        fixed = math.prod(size for size in self.sizes.values() if size != -1)
        shape = {
            axis: device_count // fixed if size == -1 else size for axis, size in self.sizes.items()
        }
        if math.prod(shape.values()) != device_count:
            asked = {axis: size for axis, size in self.sizes.items() if size != -1}
            near = shapes_near(asked, device_count)[:_SUGGESTIONS]
            raise ValueError(
                f"{describe_shape(self.sizes)} does not fit {device_count} devices; these do: "
                f"{'; '.join(map(describe_shape, near))}"
            )
        return shape


def make_mesh(
    settings: MeshSettings | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of all devices, laid out so that neighbors on it are near each other.

    Args:
      settings: the sizes; every device along "data" by default.
      devices: which devices; all there are, or the first `settings.devices`, by default.

    Raises:
      ValueError: the sizes do not come out even, or there are fewer devices than asked for, or some
        are to be left out in a program of several processes.

    Example:
      >>> mesh = make_mesh(MeshSettings(devices=1))
      >>> dict(mesh.shape)
      {'slice': 1, 'data': 1, 'fsdp': 1, 'sequence': 1, 'tensor': 1}
    """
    settings = MeshSettings() if settings is None else settings
    devices = jax.devices() if devices is None else list(devices)
    if settings.devices > len(devices):
        raise ValueError(f"devices is {settings.devices}, and there are {len(devices)}")
    if settings.devices and settings.devices < len(devices):
        if jax.process_count() > 1:
            raise ValueError(
                f"devices is {settings.devices}, but {jax.process_count()} processes have "
                f"{len(devices)}, and each must use its own; leave it at 0"
            )
        devices = devices[: settings.devices]
    shape = settings.shape(len(devices))
    # "Auto": the compiler carries shardings through a program from those of its arguments.
    return Mesh(_arrange(devices, shape), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def _arrange(devices: list[jax.Device], shape: dict[str, int]) -> np.ndarray:
    """The devices as an array of the mesh's shape, near ones side by side.

    Raises:
      ValueError: the devices form several slices, and "slice" does not say so.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape["slice"] % slices:
        raise ValueError(
            f"the devices form {slices} slices, and slice is {shape['slice']}; set it to {slices}"
        )
    sizes = tuple(shape.values())
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    between = (slices, *(1 for _ in sizes[1:]))
    within = (shape["slice"] // slices, *sizes[1:])
    return mesh_utils.create_hybrid_device_mesh(
        within, between, devices, allow_split_physical_axes=True
    )


def shapes_near(asked: Mapping[str, int], device_count: int) -> list[dict[str, int]]:
    """The shapes that use so many devices, those first that change least of what was asked for.

    Example:
      >>> describe_shape(shapes_near({"tensor": 3}, 4)[0])
      'tensor=4'
    """
    shapes = [
        dict(zip(MESH_AXES, sizes, strict=True))
        for sizes in factorizations(device_count, len(MESH_AXES))
    ]

    def distance(shape: dict[str, int]) -> float:
        return sum(abs(math.log(shape[axis] / size)) for axis, size in asked.items())

    return sorted(shapes, key=distance)


def factorizations(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ordered ways of writing a number as a product of `count` factors.

    Example:
      >>> list(factorizations(4, 2))
      [(1, 4), (2, 2), (4, 1)]
    """
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in factorizations(number // first, count - 1):
                yield (first, *rest)


def describe_shape(sizes: Mapping[str, int]) -> str:
    """The axes of a mesh that are cut, in words.

    Example:
      >>> describe_shape({"slice": 1, "data": 1, "fsdp": 4, "sequence": 1, "tensor": 2})
      'fsdp=4, tensor=2'
    """
    cut = [f"{axis}={size}" for axis, size in sizes.items() if size != 1]
    return ", ".join(cut) or "data=1"
