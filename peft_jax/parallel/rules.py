"""Maps the logical axes of arrays to the mesh axes that shard them."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from peft_jax.core import Tree, did_you_mean, join_path, names_of
from peft_jax.parallel.mesh import MESH_AXES, describe_shape, shapes_near

MeshAxes = str | tuple[str, ...] | None
"""One mesh axis, several (outermost first), or None: not sharded."""

_log = logging.getLogger(__name__)
_NAMED_IN_WARNING = 5
_SUGGESTIONS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogicalAxisRules:
    """Mesh axes by logical axis, one field per logical axis.

    Weights are sharded along "fsdp" on their residual-stream axis (embed). They are sharded along
    "tensor" on their heads, feed-forward or vocabulary axis. So a block needs one all-reduce over
    "tensor" after attention and one after the feed-forward. Norms are small and replicated.

    The experts of a mixture are sharded along "expert" and "tensor". Batch rows are sharded along
    "expert" too, so that it costs no arithmetic elsewhere, and other weights are replicated.

    Activations are sharded along batch rows and, in attention, along "sequence" and heads. In the
    residual stream, tokens are also sharded along "tensor", because norms, sums and the adapters'
    rotations act on each token alone. Each device saves only its shard for the backward pass
    (Korthikanti et al., 2022, arXiv 2205.05198, section 4.2.2).

    Attributes:
      batch: Batch rows.
      sequence: Tokens of a row, in attention.
      tokens: Tokens of a row, in the residual stream.
      layers: Stack of transformer blocks, which is scanned over.
      vocab: Vocabulary.
      embed: Features of the residual stream.
      heads: Features of all query heads.
      kv_heads: Features of all key-value heads.
      mlp: Hidden features of the feed-forward.
      experts: Experts of a mixture; see `peft_jax.parallel.expert_shards`.
      norm: Scale and bias of a norm.

    Raises:
      ValueError: A rule names an unknown mesh axis, or one axis twice.
    """

    batch: MeshAxes = ("slice", "data", "fsdp", "expert")
    sequence: MeshAxes = "sequence"
    tokens: MeshAxes = ("sequence", "tensor")
    layers: MeshAxes = None
    vocab: MeshAxes = "tensor"
    embed: MeshAxes = "fsdp"
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    mlp: MeshAxes = "tensor"
    experts: MeshAxes = ("expert", "tensor")
    norm: MeshAxes = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            axes = as_tuple(getattr(self, field.name))
            for axis in axes:
                if axis not in MESH_AXES:
                    raise ValueError(
                        f"the rule for {field.name} names {axis!r}, which is not a mesh axis"
                        f"{did_you_mean(axis, MESH_AXES)}"
                    )
            if len(set(axes)) < len(axes):
                raise ValueError(
                    f"the rule for {field.name} is {axes}, but may name each mesh axis only once"
                )

    def mesh_axes(self, logical: str | None) -> MeshAxes:
        """Returns the mesh axes of a logical axis; None for an axis without a name.

        Raises:
          ValueError: There is no rule for the axis.
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
        """Returns the partition spec of an array.

        Args:
          logical: Logical axis names of the array.

        Raises:
          ValueError: The same mesh axis would shard two axes of the array.

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
                        f"the mesh axis {mesh_axis!r} would shard both {taken[mesh_axis]!r} and"
                        f" {axis!r} of the axes {logical}; change the rule of one of them"
                    )
                taken[mesh_axis] = axis
        return PartitionSpec(*spec)


def sharding_tree(
    axes: Tree,
    mesh: Mesh | AbstractMesh,
    rules: LogicalAxisRules | None = None,
    shapes: Tree | None = None,
) -> Tree:
    """Returns the sharding of every array of a tree.

    The mesh may not divide an axis, such as a vocabulary with an added token. Given `shapes`, such
    an axis is sharded along as many of its mesh axes, from the first, as divide it. This is usually
    none: the array is replicated along the others, which costs memory and changes no result. One
    warning names those arrays. Without `shapes` the rules apply unchanged, and JAX rejects what
    does not divide.

    Args:
      axes: Tree of tuples of logical axis names, one tuple per array.
      mesh: Mesh of devices, or an abstract mesh.
      rules: Mesh axes by logical axis.
      shapes: Tree of arrays, or of anything with a shape, with the structure of `axes`.

    Returns:
      Tree of one `NamedSharding` per array.

    Raises:
      ValueError: There is no rule for an axis, the same mesh axis would shard two axes of an array,
        or an array's rank differs from its number of names. The message names the array.

    Example:
      >>> from peft_jax.parallel.mesh import MeshSettings, make_mesh
      >>> mesh = make_mesh(MeshSettings(devices=1))
      >>> tuple(sharding_tree({"kernel": ("layers", "embed", "mlp")}, mesh)["kernel"].spec)
      (None, 'fsdp', 'tensor')
    """
    rules = LogicalAxisRules() if rules is None else rules
    whole: list[str] = []

    def sharding(key_path: Any, logical: tuple[str | None, ...], array: Any) -> NamedSharding:
        name = join_path(names_of(key_path))
        try:
            spec = rules.partition_spec(logical)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if array is None:
            return NamedSharding(mesh, spec)
        if len(array.shape) != len(logical):
            raise ValueError(
                f"{name} has the shape {array.shape}, which does not fit the axes {logical}"
            )
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
            "The mesh %s does not divide these axes, so they are at least partly replicated: %s%s",
            dict(mesh.shape),
            "; ".join(whole[:_NAMED_IN_WARNING]),
            f"; and {unnamed} more" if unnamed > 0 else "",
        )
    return shardings


def shard_further(
    sharding: NamedSharding, shape: tuple[int, ...], axes: tuple[str, ...]
) -> NamedSharding:
    """Shards an array along further mesh axes where they divide its shape.

    An array axis that is already sharded is sharded further before another one is. So each device's
    new shard lies within its old shard.

    Args:
      sharding: Current sharding of the array.
      shape: Shape of the array.
      axes: Mesh axes to add; those that shard the array already are skipped.

    Example:
      >>> from jax.sharding import AbstractMesh
      >>> mesh = AbstractMesh((1, 1, 4, 1, 1, 2), MESH_AXES)
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
    """Rejects a mesh that does not divide these axes.

    Replicating them would cost the memory that the mesh should save.

    Args:
      sizes: Sizes of logical axes: heads, features, tokens.
      mesh: Mesh to check.
      rules: Mesh axes by logical axis.

    Raises:
      ValueError: The mesh does not divide an axis, or has an "expert" axis for a model without
        experts. The message names the nearest meshes of as many devices that divide all axes.

    Example:
      >>> from jax.sharding import AbstractMesh
      >>> check_divides({"heads": 12}, AbstractMesh((1, 1, 1, 1, 1, 8), MESH_AXES))
      Traceback (most recent call last):
      ValueError: tensor=8 does not divide heads (12); on 8 devices these meshes do:
      sequence=2, tensor=4; fsdp=2, tensor=4; data=2, tensor=4; slice=2, tensor=4
    """
    rules = LogicalAxisRules() if rules is None else rules

    def uneven(shape: Mapping[str, int]) -> list[str]:
        return [
            logical
            for logical, size in sizes.items()
            if size % math.prod(shape[axis] for axis in as_tuple(rules.mesh_axes(logical)))
        ]

    def idle(shape: Mapping[str, int]) -> bool:
        return shape["expert"] > 1 and "experts" not in sizes

    shape = dict(mesh.shape)
    wrong = uneven(shape)
    if not wrong and not idle(shape):
        return
    if wrong:
        used = {axis: shape[axis] for name in wrong for axis in as_tuple(rules.mesh_axes(name))}
        fault = (
            f"{describe_shape(used)} does not divide"
            f" {' and '.join(f'{name} ({sizes[name]})' for name in wrong)}"
        )
    else:
        fault = f"expert={shape['expert']} shards experts, but the model has none"
    near = shapes_near(shape, mesh.size)
    fitting = [other for other in near if not uneven(other) and not idle(other)]
    names = "; ".join(describe_shape(other) for other in fitting[:_SUGGESTIONS])
    raise ValueError(
        f"{fault}; on {mesh.size} devices"
        f" {f'these meshes do: {names}' if names else 'no mesh does'}"
    )


def batch_sharding(
    mesh: Mesh | AbstractMesh, rules: LogicalAxisRules | None = None
) -> NamedSharding:
    """Returns the sharding of arrays [rows, ...] along their leading axis alone."""
    rules = LogicalAxisRules() if rules is None else rules
    return NamedSharding(mesh, rules.partition_spec(("batch",)))


def as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    """Returns the mesh axes of a rule as a tuple."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else axes


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def dividing(size: int, axes: MeshAxes, mesh: Mesh | AbstractMesh) -> MeshAxes:
    """Returns as many of the mesh axes, from the first, as together divide `size`."""
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
