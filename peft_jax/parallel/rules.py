"""Which axis of the mesh each logical axis of an array is cut along."""

import dataclasses
import logging
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from peft_jax.core import Tree, did_you_mean
from peft_jax.parallel.mesh import MESH_AXES

MeshAxes = str | tuple[str, ...] | None
"""One axis of the mesh, several (the first outermost), or none: not cut."""

_log = logging.getLogger(__name__)
_NAMED_IN_WARNING = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogicalAxisRules:
    """Logical axis → axes of the mesh; one field for each logical axis there is.

    Weights are cut along "fsdp" where they meet the residual stream (embed), and along "tensor"
    where they meet heads, the feed-forward's width or the vocabulary, so that a block's products
    need one sum over "tensor" after attention and one after the feed-forward. What is small (norms)
    is held whole.

    Attributes:
      batch: rows of the batch.
      layers: the stack of transformer blocks, which is scanned over.
      vocab: tokens of the vocabulary.
      embed: the residual stream.
      heads: all query heads' features together.
      kv_heads: all key-value heads' features together.
      mlp: the feed-forward's width.
      norm: a norm's scale and bias.

    Raises:
      ValueError: a rule names an axis that the mesh does not have, or one twice.
    """

    batch: MeshAxes = ("data", "fsdp")
    layers: MeshAxes = None
    vocab: MeshAxes = "tensor"
    embed: MeshAxes = "fsdp"
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    mlp: MeshAxes = "tensor"
    norm: MeshAxes = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            axes = as_tuple(getattr(self, field.name))
            for axis in axes:
                if axis not in MESH_AXES:
                    raise ValueError(
                        f"the rule for {field.name} names {axis!r}, which is no axis of the mesh"
                        f"{did_you_mean(axis, MESH_AXES)}"
                    )
            if len(set(axes)) < len(axes):
                raise ValueError(f"the rule for {field.name} names an axis twice: {axes}")

    def mesh_axes(self, logical: str | None) -> MeshAxes:
        """The axes of the mesh for one logical axis; None for an axis without a name.

        Raises:
          ValueError: there is no rule for it.
        """
        if logical is None:
            return None
        known = [field.name for field in dataclasses.fields(self)]
        if logical not in known:
            raise ValueError(
                f"there is no rule for the logical axis {logical!r}{did_you_mean(logical, known)}"
            )
        return getattr(self, logical)

    def partition_spec(self, logical: tuple[str | None, ...]) -> PartitionSpec:
        """What every axis of an array is cut along.

        Args:
          logical: the logical name of each of its axes.

        Raises:
          ValueError: two axes of the array would be cut along the same axis of the mesh.

        Example:
          >>> tuple(LogicalAxisRules().partition_spec(("layers", "embed", "mlp")))
          (None, 'fsdp', 'tensor')
        """
        spec = [self.mesh_axes(axis) for axis in logical]
        taken: dict[str, str | None] = {}
        for axis, mesh_axes in zip(logical, spec, strict=True):
            for mesh_axis in as_tuple(mesh_axes):
                if mesh_axis in taken:
                    raise ValueError(
                        f"of the axes {logical}, {taken[mesh_axis]!r} and {axis!r} would both be "
                        f"cut along {mesh_axis!r}; change the rule of one of them"
                    )
                taken[mesh_axis] = axis
        return PartitionSpec(*spec)


def sharding_tree(
    axes: Tree,
    mesh: Mesh | AbstractMesh,
    rules: LogicalAxisRules | None = None,
    shapes: Tree | None = None,
) -> Tree:
    """The sharding of every array of a tree.

    A size that the mesh does not divide (a vocabulary with an added token, the blocks of a small
    rotation) cannot be cut. Given `shapes`, such an axis is cut along as many of its mesh axes,
    from the first, as divide it, usually none: the array is then held whole along the rest, which
    costs memory and changes no result. One warning names those arrays. Everything else is cut as
    the rules say. Without `shapes` the rules hold as they are, and JAX refuses what does not fit.

    Args:
      axes: a tuple of logical names for each array.
      mesh: the devices, or the shape of what would be there.
      rules: logical axis → mesh axes.
      shapes: arrays, or anything with a shape, in the same tree.

    Returns:
      A `NamedSharding` for each array.

    Raises:
      ValueError: there is no rule for an axis, two axes of an array collide, or an array has not as
        many axes as names; the message names the array.

    Example:
      >>> from peft_jax.parallel.mesh import MeshSettings, make_mesh
      >>> mesh = make_mesh(MeshSettings(devices=1))
      >>> tuple(sharding_tree({"kernel": ("layers", "embed", "mlp")}, mesh)["kernel"].spec)
      (None, 'fsdp', 'tensor')
    """
    rules = LogicalAxisRules() if rules is None else rules
    whole: list[str] = []

    def sharding(key_path: Any, logical: tuple[str | None, ...], array: Any) -> NamedSharding:
        name = jax.tree_util.keystr(key_path, simple=True, separator=".")
        try:
            spec = rules.partition_spec(logical)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if array is None:
            return NamedSharding(mesh, spec)
        if len(array.shape) != len(logical):
            raise ValueError(f"{name} has the shape {array.shape} and the axes {logical}")
        fitted = [
            _dividing(size, mesh_axes, mesh)
            for size, mesh_axes in zip(array.shape, spec, strict=True)
        ]
        whole.extend(
            f"{name}: {axis} of {size}"
            for axis, size, wanted, got in zip(logical, array.shape, spec, fitted, strict=True)
            if wanted != got
        )
        return NamedSharding(mesh, PartitionSpec(*fitted))

    if shapes is None:
        shapes = jax.tree.map(lambda _: None, axes, is_leaf=_is_axes)
    shardings = jax.tree_util.tree_map_with_path(sharding, axes, shapes, is_leaf=_is_axes)
    if whole:
        unnamed = len(whole) - _NAMED_IN_WARNING
        _log.warning(
            "The mesh %s does not divide every axis; held whole, or cut along fewer axes: %s%s",
            dict(mesh.shape),
            "; ".join(whole[:_NAMED_IN_WARNING]),
            f"; and {unnamed} more" if unnamed > 0 else "",
        )
    return shardings


def batch_sharding(
    mesh: Mesh | AbstractMesh, rules: LogicalAxisRules | None = None
) -> NamedSharding:
    """The sharding of arrays whose leading axis is the rows of the batch, and of no other axis."""
    rules = LogicalAxisRules() if rules is None else rules
    return NamedSharding(mesh, rules.partition_spec(("batch",)))


def as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    """The axes as a tuple, whichever way they are given."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else axes


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def _dividing(size: int, axes: MeshAxes, mesh: Mesh | AbstractMesh) -> MeshAxes:
    """As many of the mesh axes, from the first, as together divide the size; all, if they do."""
    kept: list[str] = []
    parts = 1
    for axis in as_tuple(axes):
        parts *= mesh.shape[axis]
        if size % parts:
            break
        kept.append(axis)
    else:
        return axes
    return tuple(kept) if len(kept) > 1 else (kept[0] if kept else None)
