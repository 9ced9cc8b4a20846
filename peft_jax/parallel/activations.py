"""Sharding of activations, where a model names their axes.

Shardings travel through a program from its arguments, but at a product of a row-sharded activation
and a weight that is cut along the same axis of the mesh the compiler has a choice, and the wrong
one gathers the batch. So the models name the axes of activations at the few places that decide.

`on_mesh` sets the mesh and the rules. Without a mesh, or with one of a single device, nothing is
done.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array

from peft_jax.core.activation_axes import ActivationAxes, sharded_activations
from peft_jax.parallel.mesh import MESH_AXES
from peft_jax.parallel.rules import LogicalAxisRules, as_tuple, dividing

LogicalAxes = tuple[str | None, ...]

_rules = contextvars.ContextVar[LogicalAxisRules | None]("peft_jax_axis_rules", default=None)


@contextlib.contextmanager
def on_mesh(mesh: Mesh, rules: LogicalAxisRules | None = None) -> Iterator[None]:
    """Traces what is within for the mesh, with activations sharded by the rules.

    Without it the same is computed, but kernels that the compiler cannot partition (those of
    Pallas) give way to XLA's operations.

    Args:
      mesh: The devices.
      rules: Logical axis → mesh axes.
    """
    rules = rules or LogicalAxisRules()
    token = _rules.set(rules)
    try:
        with jax.set_mesh(mesh), sharded_activations(activation_axes(rules)):
            yield
    finally:
        _rules.reset(token)


def activation_axes(rules: LogicalAxisRules) -> ActivationAxes:
    """Returns the mesh axes of rows, and of features where their rule names others.

    Example:
      >>> axes = activation_axes(LogicalAxisRules())
      >>> axes.rows, axes.features["embed"], axes.features["mlp"]
      (('slice', 'data', 'fsdp'), (), ('tensor',))
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


def _active_rules() -> LogicalAxisRules:
    return _rules.get() or LogicalAxisRules()


def active_mesh() -> AbstractMesh | None:
    """The mesh that activations are cut over, if there is one of several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set(MESH_AXES) <= set(mesh.axis_names):
        return None
    return mesh


def activation_spec(shape: tuple[int, ...], axes: LogicalAxes, mesh: AbstractMesh) -> PartitionSpec:
    """What each axis of an activation is cut along; an axis that does not come out even is not.

    Args:
      shape: of the activation.
      axes: the logical name of each of its axes.
      mesh: the mesh.
    """
    spec = _active_rules().partition_spec(axes)
    return PartitionSpec(
        *(dividing(size, names, mesh) for size, names in zip(shape, spec, strict=True))
    )


def constrain(x: Array, axes: LogicalAxes) -> Array:
    """`x` as it is, cut over the mesh by the logical names of its axes."""
    mesh = active_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, axes, mesh))


def constrain_features(x: Array, features: str) -> Array:
    """Activations [batch, tokens, features], cut over the mesh; of other ranks as they are.

    Args:
      x: the activations.
      features: the logical name of the last axis, as a weight that it meets has it. "embed" is the
        residual stream, whose features are whole on each device and whose tokens are cut.
    """
    if x.ndim != 3:
        return x
    if features == "embed":
        return constrain(x, ("batch", "tokens", None))
    return constrain(x, ("batch", "sequence", features))


def over_shards(
    function: Callable[..., Array], arguments: tuple[Any, ...], axes: tuple[LogicalAxes, ...]
) -> Array:
    """`function` of each device's part of the arguments; the result is cut as the first of them.

    Args:
      function: of the arguments' parts. It may gather along axes of the mesh by name.
      arguments: arrays; None passes through.
      axes: the logical names of each argument's axes.
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
        # The loops inside start from constants, which are the same everywhere until they are not.
        check_vma=False,
    )(*arguments)


def spans(size: int, logical: str) -> tuple[str, ...]:
    """The mesh's axes that an axis of this size and name is cut along; none without a mesh."""
    mesh = active_mesh()
    if mesh is None:
        return ()
    axes = as_tuple(dividing(size, _active_rules().mesh_axes(logical), mesh))
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)
