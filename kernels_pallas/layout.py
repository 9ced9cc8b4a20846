"""How activations lie on a mesh of devices, so that each device runs a kernel on its own part.

The compiler cuts up XLA's operations over devices by itself, but not a Pallas kernel. Under
`jax.set_mesh`, `spread` therefore puts a kernel into a `jax.shard_map`, for which somebody has to
say how the activations lie: whoever runs the model does, by `laid_out`. What it says decides how
fast a kernel is, never what it computes: activations that lie otherwise are moved first.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Layout:
    """How activations [rows, ..., features] lie on a mesh.

    Attributes:
      rows: the axes of the mesh that the first axis is cut along; the first outermost.
      features: those that the last axis is cut along.
    """

    rows: tuple[str, ...] = ()
    features: tuple[str, ...] = ()


_layout = contextvars.ContextVar[Layout | None]("kernels_pallas_layout", default=None)


@contextlib.contextmanager
def laid_out(layout: Layout | None) -> Iterator[None]:
    """Activations of the kernels called within lie like this; None: nobody knows.

    It is read while a function is traced, as `kernels_pallas.dispatch.using` is.
    """
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def spread(
    function: Callable[..., jax.Array],
    x: jax.Array,
    *parameters: jax.Array,
    blocks: int,
    feature_axes: tuple[int | None, ...],
    implementation: str,
) -> jax.Array:
    """`function(x, *parameters)`, on each device's part where the layout of `x` is known.

    Otherwise, on one device, within a `jax.shard_map`, or where the mesh does not divide the
    arrays, it is the plain call.

    Args:
      function: rows of activations, and parameters, to rows of activations of the same shape; the
        rows do not depend on one another.
      x: [rows, ..., features].
      parameters: what the rows are multiplied by.
      blocks: into how many independent blocks of features the function falls apart; 1 if it mixes
        all of them. Then features that are cut are brought together, and the devices that shared
        them share the tokens instead.
      feature_axes: for each parameter, its axis that goes along the blocks, or None.
      implementation: which one the function asks for, since Pallas's interpreter does not keep
        track of what differs over the mesh.
    """
    mesh, layout = jax.sharding.get_abstract_mesh(), _layout.get()
    function = _on_alike(function)
    if layout is None or mesh.empty or mesh.size == 1 or x.ndim < 2:
        return function(x, *parameters)
    if any(kind is not AxisType.Auto for kind in mesh.axis_types):
        return function(x, *parameters)
    rows = tuple(axis for axis in layout.rows if axis in mesh.shape)
    features = tuple(axis for axis in layout.features if axis in mesh.shape)
    if x.shape[0] % _size(mesh, rows) or (blocks > 1 and blocks % _size(mesh, features)):
        return function(x, *parameters)
    whole: tuple[Any, ...] = (None,) * (x.ndim - 2)
    if features and blocks == 1:
        if x.ndim > 2 and x.shape[1] % _size(mesh, features) == 0:
            whole = (features, *whole[1:])
        elif x.shape[0] % _size(mesh, (*rows, *features)) == 0:
            rows = (*rows, *features)
        features = ()
    activations = PartitionSpec(rows or None, *whole, features or None)
    specs = [
        PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, features or None)
        for axis in feature_axes
    ]
    return jax.shard_map(
        function,
        in_specs=(activations, *specs),
        out_specs=activations,
        check_vma=implementation != "interpret",
    )(x, *parameters)


def _size(mesh: Any, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _on_alike(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The function of arrays that, within a `jax.shard_map`, all differ over the same axes."""
    return lambda *arrays: function(*_alike(arrays))


def _alike(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    # JAX does this where it multiplies arrays itself; a function with a derivative of its own must
    # have it done before, since the gradients of what did not differ are summed there.
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    everywhere = frozenset[str]().union(*varying)
    return tuple(
        jax.lax.pcast(array, tuple(sorted(everywhere - own)), to="varying")
        if everywhere - own
        else array
        for array, own in zip(arrays, varying, strict=True)
    )
