"""Multiplies one input by several kernels, and sums the gradients before they are scattered.

In the residual stream, tokens are sharded along "tensor", and so are the columns of the kernels
that read it (queries, keys, values, gate, up). Their products need all tokens, and each device's
gradient of the input is one part of a sum over "tensor". An adapter that maps the input before the
kernel, such as a rotation, acts on whole rows of features. Left to the compiler, the gradient of
each such product is summed over the devices before it is mapped back: five all-reduces of full size
in the backward pass of a Llama block, where plain kernels need two reduce-scatters.

The map is linear, so that the parts can be mapped back first. `column_products` gives each device a
copy of the tokens, along an axis of its own, and multiplies on each device's shard. The gradients
of the copies are the parts of the sum. They are added for all products, then summed and scattered
once.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float
from qwix import QArray

from kernels_pallas.layout import use_layout
from peft_jax.core import (
    LINEAR_OUTPUT,
    AdaptedKernel,
    Kernel,
    ShardedMethod,
    format_of,
    linear,
    named_products,
    quantized_axes,
)
from peft_jax.core.quantized import INTEGER_FORMATS
from peft_jax.parallel.activation_sharding import LogicalAxes, activation_spec, active_mesh
from peft_jax.parallel.rules import as_tuple

_RESIDUAL = "embed"
_TOKENS = ("batch", "tokens", None)
_GATHERED = ("batch", "sequence", None)


@dataclasses.dataclass(frozen=True)
class _Shards:
    """Layout of a kernel over a mesh.

    Attributes:
      leaves: Arrays of the kernel.
      structure: Structure of the kernel, to put the arrays back.
      axes: Logical axes of each array.
      specs: Partition spec of each array.
      out: Partition spec of the product [batch, tokens, d_out].
      names: Logical names of the kernel's axes.
    """

    leaves: list[Array]
    structure: Any
    axes: list[LogicalAxes]
    specs: list[PartitionSpec]
    out: PartitionSpec
    names: tuple[str, str]

    def gathered_rows(self, shards: Sequence[Array]) -> Kernel:
        """Returns the kernel of a device's columns, whose rows are gathered."""

        def gather(shard: Array, axes: LogicalAxes, spec: PartitionSpec) -> Array:
            for dimension, (name, sharded) in enumerate(zip(axes, spec, strict=True)):
                if name == self.names[0] and sharded is not None:
                    shard = jax.lax.all_gather(shard, sharded, axis=dimension, tiled=True)
            return shard

        whole = [gather(*one) for one in zip(shards, self.axes, self.specs, strict=True)]
        return jax.tree.unflatten(self.structure, whole)


def column_products(
    x: Float[Array, "batch tokens embed"], kernels: Sequence[tuple[Kernel, tuple[str, str | None]]]
) -> list[Float[Array, "batch tokens d_out"] | None]:
    """Multiplies the residual stream by kernels, each device by its shards of the columns.

    Only the shard of `x` is kept for the backward pass, which gathers the tokens again.

    Args:
      x: Activations of the residual stream, sharded by tokens.
      kernels: Kernels [d_in, d_out], each with the logical names of its axes.

    Returns:
      For each kernel the product, sharded along its columns; or None, if the compiler should
      partition it: there is no mesh that shards tokens, the kernel neither maps its input nor holds
      8-bit integers to multiply, its arrays have no known axes, or the mesh does not divide its
      columns.
    """
    mesh = active_mesh()
    over = _gathered_axes(x, mesh)
    if mesh is None or not over:
        return [None] * len(kernels)
    shards = [_find_shards(x, kernel, axes, over, mesh) for kernel, axes in kernels]
    local = [one for one in shards if one is not None]
    if not local:
        return [None] * len(kernels)

    # Of what is gathered or computed, keeps only what the gradient of a scale of the columns needs.
    @functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(LINEAR_OUTPUT)
    )
    def multiply_all(x: Array, arrays: list[list[Array]]) -> list[Array]:
        copies = _gather_copies(x, over, mesh)
        return [
            _multiply(copies, one, leaves, over, mesh)
            for one, leaves in zip(local, arrays, strict=True)
        ]

    found = iter(multiply_all(x, [one.leaves for one in local]))
    return [None if one is None else next(found) for one in shards]


def _gathered_axes(x: Array, mesh: AbstractMesh | None) -> tuple[str, ...]:
    """Returns the mesh axes that shard the tokens of the residual stream but not of attention."""
    if mesh is None or x.ndim != 3:
        return ()
    sharded, kept = (activation_spec(x.shape, axes, mesh)[1] for axes in (_TOKENS, _GATHERED))
    between = (axis for axis in as_tuple(sharded) if axis not in as_tuple(kept))
    return tuple(axis for axis in between if mesh.shape[axis] > 1)


def _gather_copies(
    x: Array, over: tuple[str, ...], mesh: AbstractMesh
) -> Float[Array, "devices batch tokens embed"]:
    """Returns a copy of the tokens for each device that shared them."""
    return jax.shard_map(
        lambda part: jax.lax.all_gather(part, over, axis=1, tiled=True)[None],
        mesh=mesh,
        in_specs=activation_spec(x.shape, _TOKENS, mesh),
        out_specs=PartitionSpec(over, *activation_spec(x.shape, _GATHERED, mesh)),
        check_vma=False,
    )(x)


def _multiply(
    copies: Array, shards: _Shards, leaves: list[Array], over: tuple[str, ...], mesh: AbstractMesh
) -> Array:
    """Multiplies each device's copy by its columns of a kernel."""

    def multiply(copy: Array, *own: Array) -> Array:
        with use_layout(None), named_products(shards.names):
            return linear(copy[0], shards.gathered_rows(own))

    spec = PartitionSpec(over, *activation_spec(copies.shape[1:], _GATHERED, mesh))
    return jax.shard_map(
        multiply,
        mesh=mesh,
        in_specs=(spec, *shards.specs),
        out_specs=shards.out,
        check_vma=False,
    )(copies, *leaves)


def _find_shards(
    x: Array,
    kernel: Kernel,
    axes: tuple[str, str | None],
    over: tuple[str, ...],
    mesh: AbstractMesh,
) -> _Shards | None:
    """Returns how a kernel lies over a mesh; None if the compiler should partition its product."""
    rows, columns = axes
    if rows != _RESIDUAL or columns is None:
        return None
    names = _local_axes(kernel, (rows, columns))
    if names is None:
        return None
    leaves, structure = jax.tree.flatten(kernel)
    logical = jax.tree.leaves(names, is_leaf=lambda node: isinstance(node, tuple))
    shape = (*x.shape[:2], _base(kernel).shape[-1])
    out = activation_spec(shape, ("batch", "sequence", columns), mesh)
    if not {*over} <= {*as_tuple(out[2])}:
        return None
    specs = [activation_spec(one.shape, n, mesh) for one, n in zip(leaves, logical, strict=True)]
    return _Shards(leaves, structure, logical, specs, out, (rows, columns))


def _local_axes(kernel: Kernel, axes: tuple[str, str]) -> Any:
    """Returns a kernel of logical axes in place of arrays; None if it cannot run on shards."""
    integers = _multiplies_integers(kernel)
    if isinstance(kernel, QArray) and integers:
        return quantized_axes(axes, format_of(kernel))
    if not isinstance(kernel, AdaptedKernel) or kernel.dropout_key is not None:
        return None  # One random key would drop the same entries on every device.
    method = kernel.method
    if not isinstance(method, ShardedMethod):
        return None
    # The compiler would exchange sums of 32-bit integers.
    arrays = method.prepared_axes(*axes) if integers else method.local_axes(*axes)
    if arrays is None:
        return None
    base: Any = axes
    if isinstance(kernel.base, QArray):
        base = quantized_axes(axes, format_of(kernel.base))
    elif isinstance(kernel.base, AdaptedKernel):
        base = _local_axes(kernel.base, axes)
    return None if base is None else dataclasses.replace(kernel, base=base, arrays=arrays)


def _multiplies_integers(kernel: Kernel) -> bool:
    base = _base(kernel)
    return isinstance(base, QArray) and format_of(base) in INTEGER_FORMATS


def _base(kernel: Kernel) -> Any:
    while isinstance(kernel, AdaptedKernel):
        kernel = kernel.base
    return kernel
