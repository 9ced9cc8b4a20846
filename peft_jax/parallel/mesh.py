"""Arranges devices as a mesh of six axes.

- slice: Shards batch rows; weights are replicated along it. It is the only axis that crosses the
  data-center network between TPU slices or pods. It carries only the all-reduce of the trainable
  arrays' gradients.
- data: Shards batch rows; weights are replicated along it.
- fsdp: Shards batch rows, and weights, which are gathered before they are used.
- expert: Shards batch rows, and the experts of a mixture, which stay where they are: tokens are
  gathered instead. Other weights are replicated along it.
- sequence: Shards the tokens of a row, for contexts too long for one device. Keys and values are
  gathered along it.
- tensor: Shards weights so that each device computes a part of every product.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

MESH_AXES = ("slice", "data", "fsdp", "expert", "sequence", "tensor")
"""Mesh axes from the outermost to "tensor", whose neighbors have the fastest links."""

_SUGGESTIONS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """Number of devices along each mesh axis; -1 takes all remaining devices.

    Attributes:
      slice: Number of TPU slices, each with its own network.
      data: Number of devices along "data", or -1.
      fsdp: Number of devices along "fsdp", or -1.
      expert: Number of devices along "expert", or -1; only for a mixture of experts.
      sequence: Number of devices along "sequence", or -1.
      tensor: Number of devices along "tensor", or -1.
      devices: Number of devices to use, from the first; 0 for all. Only for a single process.

    Raises:
      ValueError: A size is neither positive nor -1, or more than one is -1.
    """

    slice: int = 1
    data: int = -1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    devices: int = 0

    def __post_init__(self) -> None:
        for axis, size in self.sizes.items():
            if size < 1 and size != -1:
                raise ValueError(
                    f"{axis} must be at least 1, or -1 for all remaining devices, but is {size}"
                )
        left = [axis for axis, size in self.sizes.items() if size == -1]
        if len(left) > 1:
            raise ValueError(
                f"{' and '.join(left)} are -1, but only one axis can take the remaining devices"
            )
        if self.devices < 0:
            raise ValueError(f"devices must be at least 0, but is {self.devices}")

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by axis, as given."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    def shape(self, device_count: int) -> dict[str, int]:
        """Returns the sizes by axis on `device_count` devices, all of which are used.

        Raises:
          ValueError: The sizes do not fit the devices; the message names shapes that do.

        Example:
          >>> MeshSettings(fsdp=4).shape(8)
          {'slice': 1, 'data': 2, 'fsdp': 4, 'expert': 1, 'sequence': 1, 'tensor': 1}
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
    """Builds a mesh whose neighbors have fast links.

    Args:
      settings: Mesh sizes. Default: every device along "data".
      devices: Devices to use. Default: all devices, or the first `settings.devices`.

    Raises:
      ValueError: The sizes do not fit the devices, there are fewer devices than
        `settings.devices`, or a multi-process run would leave devices out.

    Example:
      >>> mesh = make_mesh(MeshSettings(devices=1))
      >>> dict(mesh.shape)
      {'slice': 1, 'data': 1, 'fsdp': 1, 'expert': 1, 'sequence': 1, 'tensor': 1}
    """
    settings = MeshSettings() if settings is None else settings
    devices = jax.devices() if devices is None else list(devices)
    if settings.devices > len(devices):
        raise ValueError(
            f"devices is {settings.devices}, but there are {len(devices)}; 0 uses all of them"
        )
    if settings.devices and settings.devices < len(devices):
        if jax.process_count() > 1:
            raise ValueError(
                f"devices is {settings.devices}, but each of {jax.process_count()} processes must"
                f" use its own of all {len(devices)}; set it to 0"
            )
        devices = devices[: settings.devices]
    shape = settings.shape(len(devices))
    # "Auto" lets the compiler propagate shardings from a program's arguments.
    return Mesh(_arrange(devices, shape), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def _arrange(devices: list[jax.Device], shape: dict[str, int]) -> np.ndarray:
    """Returns the devices as an array of the mesh's shape, with near devices adjacent.

    Raises:
      ValueError: The number of TPU slices does not divide the "slice" axis.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape["slice"] % slices:
        raise ValueError(
            f"slice is {shape['slice']}, but the devices form {slices} TPU slices; set it to"
            f" {slices}"
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
    """Returns the mesh shapes of `device_count` devices, nearest to the asked sizes first.

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
    """Yields all ordered factorizations of a number into `count` factors.

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
    """Returns the mesh axes of more than one device as text.

    Example:
      >>> describe_shape({"slice": 1, "data": 1, "fsdp": 4, "sequence": 1, "tensor": 2})
      'fsdp=4, tensor=2'
    """
    used = [f"{axis}={size}" for axis, size in sizes.items() if size != 1]
    return ", ".join(used) or "data=1"
