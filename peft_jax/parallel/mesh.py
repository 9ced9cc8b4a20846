"""The devices as a mesh of three axes: parts of the batch, parts of weights, parts of products.

- data: rows of the batch; weights are repeated along it.
- fsdp: rows of the batch as well, and weights cut up along it, gathered when they are needed.
- tensor: weights cut up along it so that each device does a part of every product.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

MESH_AXES = ("data", "fsdp", "tensor")
"""The mesh's axes, from the outermost: neighbours along "tensor" are nearest to each other."""

_SUGGESTIONS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """How many devices there are along each axis of the mesh.

    Attributes:
      data: along "data"; -1 for as many as are left over by the others.
      fsdp: along "fsdp"; or -1.
      tensor: along "tensor"; or -1.
      devices: use only the first so many devices; 0 for all. In a program of one process.

    Raises:
      ValueError: a size is neither positive nor -1, or more than one is -1.
    """

    data: int = -1
    fsdp: int = 1
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
          {'data': 2, 'fsdp': 4, 'tensor': 1}
          >>> MeshSettings(fsdp=3).shape(8)
          Traceback (most recent call last):
          ValueError: data=-1, fsdp=3, tensor=1 does not fit 8 devices; these do: data=2, ...
        """
        fixed = math.prod(size for size in self.sizes.values() if size != -1)
        shape = {
            axis: device_count // fixed if size == -1 else size for axis, size in self.sizes.items()
        }
        if math.prod(shape.values()) != device_count:
            nearest = "; ".join(_describe(shape) for shape in self._nearest_shapes(device_count))
            raise ValueError(
                f"{_describe(self.sizes)} does not fit {device_count} devices; these do: {nearest}"
            )
        return shape

    def _nearest_shapes(self, device_count: int) -> list[dict[str, int]]:
        """Shapes that use so many devices, those that change what was asked for least first."""
        divisors = [n for n in range(1, device_count + 1) if device_count % n == 0]
        shapes = [
            dict(zip(MESH_AXES, sizes, strict=True))
            for sizes in itertools.product(divisors, repeat=len(MESH_AXES))
            if math.prod(sizes) == device_count
        ]

        def distance(shape: dict[str, int]) -> float:
            asked = {axis: size for axis, size in self.sizes.items() if size != -1}
            return sum(abs(math.log(shape[axis] / size)) for axis, size in asked.items())

        return sorted(shapes, key=distance)[:_SUGGESTIONS]


def make_mesh(
    settings: MeshSettings | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of all devices, laid out so that neighbours on it are near each other.

    Args:
      settings: the sizes; every device along "data" by default.
      devices: which devices; all there are, or the first `settings.devices`, by default.

    Raises:
      ValueError: the sizes do not come out even, or there are fewer devices than asked for, or some
        are to be left out in a program of several processes.

    Example:
      >>> mesh = make_mesh(MeshSettings(devices=1))
      >>> dict(mesh.shape)
      {'data': 1, 'fsdp': 1, 'tensor': 1}
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
    return jax.make_mesh(
        tuple(shape.values()),
        tuple(shape),
        axis_types=(AxisType.Auto,) * len(shape),
        devices=devices,
    )


def _describe(sizes: dict[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())
