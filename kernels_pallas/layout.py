"""Declares how activations are sharded, so that each device runs a kernel on its own shard.

The compiler partitions XLA's operations by itself, but not a Pallas kernel. Under `jax.set_mesh`,
`call_per_shard` therefore wraps a kernel in `jax.shard_map`, which needs to know how the
activations are sharded. The code that runs the model declares this with `use_layout`. A wrong
layout never changes results, only speed: the activations are resharded first.
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
    """How activations [rows, ..., features] are sharded over a mesh.

    Attributes:
      rows: Mesh axes that shard the first axis, outermost first.
      features: Mesh axes that shard the last axis, outermost first.
    """

    rows: tuple[str, ...] = ()
    features: tuple[str, ...] = ()


_layout = contextvars.ContextVar[Layout | None]("kernels_pallas_layout", default=None)


@contextlib.contextmanager
def use_layout(layout: Layout | None) -> Iterator[None]:
    """Declares the layout of the activations of the kernels called within; None if unknown.

    The layout is read while a function is traced, as for
    `kernels_pallas.dispatch.use_implementation`.
    """
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def call_per_shard(
    function: Callable[..., jax.Array],
    x: jax.Array,
    *parameters: jax.Array,
    blocks: int,
    feature_axes: tuple[int | None, ...],
    implementation: str,
) -> jax.Array:
    """Calls `function(x, *parameters)` on each device's shard if the layout of `x` is known.

    It calls the function directly if the layout is unknown, on one device, within `jax.shard_map`,
    or if the mesh does not divide the arrays.

    Args:
      function: Maps rows of activations and parameters to rows of the same shape. Rows must not
        depend on each other.
      x: Activations [rows, ..., features].
      parameters: Parameters of the function.
      blocks: Number of independent blocks of features; 1 if the function mixes all features. In
        that case sharded features are gathered, and their devices shard the tokens instead.
      feature_axes: For each parameter, the axis that runs along the blocks, or None.
      implementation: Implementation that the function requests. Pallas's interpreter does not
        track which values vary over the mesh, so `jax.shard_map` does not check that for it.
    """
    mesh, layout = jax.sharding.get_abstract_mesh(), _layout.get()
    function = _with_equal_variance(function)
    if layout is None or mesh.empty or mesh.size == 1 or x.ndim < 2:
        return function(x, *parameters)
    if any(kind is not AxisType.Auto for kind in mesh.axis_types):
        return function(x, *parameters)
    rows = tuple(axis for axis in layout.rows if axis in mesh.shape)
    features = tuple(axis for axis in layout.features if axis in mesh.shape)
    if x.shape[0] % _size(mesh, rows) or (blocks > 1 and blocks % _size(mesh, features)):
        return function(x, *parameters)
    middle: tuple[Any, ...] = (None,) * (x.ndim - 2)
    if features and blocks == 1:
        if x.ndim > 2 and x.shape[1] % _size(mesh, features) == 0:
            middle = (features, *middle[1:])
        elif x.shape[0] % _size(mesh, (*rows, *features)) == 0:
            rows = (*rows, *features)
        features = ()
    activations = PartitionSpec(rows or None, *middle, features or None)
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


def _with_equal_variance(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Wraps `function` so that, within `jax.shard_map`, its arrays all vary over the same axes."""
    return lambda *arrays: function(*_equally_varying(arrays))


def _equally_varying(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    # JAX casts the operands of its own products. A function with a custom derivative needs the cast
    # before it, because the cast's transpose sums the gradients of arrays that did not vary.
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    union = frozenset[str]().union(*varying)
    return tuple(
        jax.lax.pcast(array, tuple(sorted(union - own)), to="varying") if union - own else array
        for array, own in zip(arrays, varying, strict=True)
    )
