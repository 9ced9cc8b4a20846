"""Shards activations by the logical axis names that models give.

The compiler propagates shardings from a program's arguments. A product of a row-sharded activation
and a weight sharded along the same mesh axis leaves the compiler a choice, and the wrong one
gathers the batch. So the models name the axes of activations at the few places that decide.

`on_mesh` sets the mesh and the rules. Without a mesh, or on a mesh of one device, nothing is
constrained.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array

from peft_jax.core.activation_axes import ActivationAxes, sharded_activations
from peft_jax.parallel.mesh import MESH_AXES
from peft_jax.parallel.rules import LogicalAxisRules, as_tuple, dividing

LogicalAxes = tuple[str | None, ...]

_rules = contextvars.ContextVar[LogicalAxisRules | None]("peft_jax_axis_rules", default=None)


@contextlib.contextmanager
def on_mesh(mesh: Mesh, rules: LogicalAxisRules | None = None) -> Iterator[None]:
    """Traces programs inside the context for a mesh, with activations sharded by the rules.

    Without it results are the same, but XLA operations replace the Pallas kernels, which the
    compiler cannot partition.

    Args:
      mesh: Mesh of devices.
      rules: Mesh axes by logical axis; None for those of the enclosing context, or the defaults.
    """
    rules = rules or active_rules()
    token = _rules.set(rules)
    try:
        with jax.set_mesh(mesh), sharded_activations(activation_axes(rules)):
            yield
    finally:
        _rules.reset(token)


def activation_axes(rules: LogicalAxisRules) -> ActivationAxes:
    """Returns the mesh axes that shard rows, and those that shard only features.

    Example:
      >>> axes = activation_axes(LogicalAxisRules())
      >>> axes.rows, axes.features["embed"], axes.features["mlp"]
      (('slice', 'data', 'fsdp', 'expert'), (), ('tensor',))
    """
    rows = as_tuple(rules.mesh_axes("batch"))
    names = [field.name for field in dataclasses.fields(rules) if field.name != "batch"]
    return ActivationAxes(
        rows=rows,
        features={
            name: tuple(axis for axis in as_tuple(rules.mesh_axes(name)) if axis not in rows)
            for name in names
        },
    )


def active_rules() -> LogicalAxisRules:
    """Returns the rules of the enclosing `on_mesh`; the defaults outside of one."""
    return _rules.get() or LogicalAxisRules()


def active_mesh() -> AbstractMesh | None:
    """Returns the mesh that shards activations; None without several devices, or on a shard."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set(MESH_AXES) <= set(mesh.axis_names):
        return None
    if any(kind is AxisType.Manual for kind in mesh.axis_types):
        return None  # Within `jax.shard_map`, arrays are one device's own.
    return mesh


def activation_spec(shape: tuple[int, ...], axes: LogicalAxes, mesh: AbstractMesh) -> PartitionSpec:
    """Returns the partition spec of an activation; an axis that does not divide is not sharded.

    Args:
      shape: Shape of the activation.
      axes: Logical axis names of the activation.
      mesh: Mesh to shard over.
    """
    spec = active_rules().partition_spec(axes)
    return PartitionSpec(
        *(dividing(size, names, mesh) for size, names in zip(shape, spec, strict=True))
    )


def constrain(x: Array, axes: LogicalAxes) -> Array:
    """Returns `x` with a sharding constraint from the logical names of its axes."""
    mesh = active_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, axes, mesh))


def constrain_features(x: Array, features: str | None) -> Array:
    """Constrains the sharding of activations [batch, tokens, features].

    Args:
      x: Activations; arrays of other ranks are returned unchanged.
      features: Logical name of the last axis. "embed" is the residual stream, whose features are
        replicated and whose tokens are sharded, as are features without a name.
    """
    if x.ndim != 3:
        return x
    if features in ("embed", None):
        return constrain(x, ("batch", "tokens", None))
    return constrain(x, ("batch", "sequence", features))


def over_shards(
    function: Callable[..., Array], arguments: tuple[Any, ...], axes: tuple[LogicalAxes, ...]
) -> Array:
    """Applies `function` to each device's shards; the result is sharded as the first argument.

    Args:
      function: Function of the arguments' shards. It may use collectives over mesh axes.
      arguments: Arrays; None passes through.
      axes: Logical axis names of each argument.
    """
    mesh = active_mesh()
    if mesh is None:
        return function(*arguments)
    specs = tuple(
        PartitionSpec() if x is None else activation_spec(x.shape, names, mesh)
        for x, names in zip(arguments, axes, strict=True)
    )
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=specs,
        out_specs=specs[0],
        # Loops inside start from replicated constants that later vary by device, which it rejects.
        check_vma=False,
    )(*arguments)


def spans(size: int, logical: str) -> tuple[str, ...]:
    """Returns the mesh axes that shard an axis of this size and name; empty without a mesh."""
    mesh = active_mesh()
    if mesh is None:
        return ()
    axes = as_tuple(dividing(size, active_rules().mesh_axes(logical), mesh))
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)
