"""Which axis of the mesh each logical axis of an array is cut along."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from peft_jax.core import Tree, did_you_mean
from peft_jax.parallel.mesh import MESH_AXES, describe_shape, shapes_near

MeshAxes = str | tuple[str, ...] | None
"""One axis of the mesh, several (the first outermost), or none: not cut."""

_log = logging.getLogger(__name__)
_NAMED_IN_WARNING = 5
_SUGGESTIONS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogicalAxisRules:
    """Logical axis → axes of the mesh; one field for each logical axis there is.

    Weights are cut along "fsdp" where they meet the residual stream (embed), and along "tensor"
    where they meet heads, the feed-forward's width or the vocabulary, so that a block's products
    need one sum over "tensor" after attention and one after the feed-forward. What is small (norms)
    is held whole.

    Activations are cut along the rows of the batch and, within attention, along "sequence" and
    heads. Between the blocks the tokens are cut along "tensor" too: there each is on its own
    (norms, sums, the rotations of the adapters), and of what the backward pass keeps each device
    holds its part (Korthikanti et al., 2022, arXiv 2205.05198, section 4.2.2).

    Attributes:
      batch: rows of the batch.
      sequence: a row's tokens, in attention.
      tokens: a row's tokens, in the residual stream.
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

    batch: MeshAxes = ("slice", "data", "fsdp")
    sequence: MeshAxes = "sequence"
    tokens: MeshAxes = ("sequence", "tensor")
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
            dividing(size, mesh_axes, mesh)
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


def shard_further(
    sharding: NamedSharding, shape: tuple[int, ...], axes: tuple[str, ...]
) -> NamedSharding:
    """A sharding that is cut along further axes of the mesh, where they come out even.

    An axis of an array that is cut already is cut on, before another one is begun with: each
    device's part then lies within the part that it has by the sharding as it was.

    Args:
      sharding: of the array.
      shape: the array's.
      axes: of the mesh; those that the array is cut along already are passed over.

    Example:
      >>> from jax.sharding import AbstractMesh
      >>> mesh = AbstractMesh((1, 1, 4, 1, 2), MESH_AXES)
      >>> sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
      >>> tuple(shard_further(sharding, (3, 8), MESH_AXES).spec)
      (None, ('fsdp', 'tensor'))
    """
    mesh = sharding.mesh
    spec = [as_tuple(entry) for entry in sharding.spec]
    spec += [()] * (len(shape) - len(spec))
    for axis in axes:
        if mesh.shape[axis] == 1 or any(axis in entry for entry in spec):
            continue
        for at in sorted(range(len(shape)), key=lambda at: not spec[at]):
            further = (*spec[at], axis)
            if shape[at] % math.prod(mesh.shape[name] for name in further) == 0:
                spec[at] = further
                break
    return NamedSharding(
        mesh,
        PartitionSpec(*(entry if len(entry) > 1 else (entry or (None,))[0] for entry in spec)),
    )


def check_divides(
    sizes: Mapping[str, int], mesh: Mesh | AbstractMesh, rules: LogicalAxisRules | None = None
) -> None:
    """Refuses a mesh that does not cut these axes into equal parts.

    Held whole, they would cost what the mesh is there for.

    Args:
      sizes: of logical axes: heads, features, tokens.
      mesh: the mesh.
      rules: logical axis → mesh axes.

    Raises:
      ValueError: an axis does not come out even; the message names the nearest meshes of as many
        devices on which all do.

    Example:
      >>> from jax.sharding import AbstractMesh
      >>> check_divides({"heads": 12}, AbstractMesh((1, 1, 1, 1, 8), MESH_AXES))
      Traceback (most recent call last):
      ValueError: tensor=8 does not cut heads of 12 into equal parts; of 8 devices these shapes
      do: sequence=2, tensor=4; fsdp=2, tensor=4; data=2, tensor=4; slice=2, tensor=4
    """
    rules = LogicalAxisRules() if rules is None else rules

    def uneven(shape: Mapping[str, int]) -> list[str]:
        return [
            logical
            for logical, size in sizes.items()
            if size % math.prod(shape[axis] for axis in as_tuple(rules.mesh_axes(logical)))
        ]

    shape = dict(mesh.shape)
    wrong = uneven(shape)
    if not wrong:
        return
    cut = {axis: shape[axis] for name in wrong for axis in as_tuple(rules.mesh_axes(name))}
    fitting = [other for other in shapes_near(shape, mesh.size) if not uneven(other)]
    names = "; ".join(describe_shape(other) for other in fitting[:_SUGGESTIONS])
    raise ValueError(
        f"{describe_shape(cut)} does not cut "
        f"{' and '.join(f'{name} of {sizes[name]}' for name in wrong)} into equal parts; of "
        f"{mesh.size} devices {f'these shapes do: {names}' if names else 'no shape does'}"
    )


def batch_sharding(
    mesh: Mesh | AbstractMesh, rules: LogicalAxisRules | None = None
) -> NamedSharding:
    """The sharding of arrays whose leading axis is the rows of the batch, and of no other axis."""
    rules = LogicalAxisRules() if rules is None else rules
    return NamedSharding(mesh, rules.partition_spec(("batch",)))


def as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    """The mesh's axes of a rule, however many."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else axes


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def dividing(size: int, axes: MeshAxes, mesh: Mesh | AbstractMesh) -> MeshAxes:
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
