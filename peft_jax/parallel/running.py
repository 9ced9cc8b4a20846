"""Running on a mesh: the compiler is told of it, and kernels of how activations lie on it."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from peft_jax.core.activations import ActivationAxes, activations_cut
from peft_jax.parallel.rules import LogicalAxisRules, as_tuple


@contextlib.contextmanager
def on_mesh(mesh: Mesh, rules: LogicalAxisRules | None = None) -> Iterator[None]:
    """What is traced within runs on the mesh, with activations cut as the rules say.

    Without it the same is computed, but kernels that the compiler cannot spread over devices (those
    of Pallas) give way to XLA's operations.

    Args:
      mesh: the devices.
      rules: logical axis → mesh axes.
    """
    with jax.set_mesh(mesh), activations_cut(activation_axes(rules or LogicalAxisRules())):
        yield


def activation_axes(rules: LogicalAxisRules) -> ActivationAxes:
    """How activations lie: rows first; features along what their axis's rule names beside.

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
