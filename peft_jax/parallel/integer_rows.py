"""Multiplies 8-bit integers where a device holds some of a kernel's rows.

The kernels that end attention and the MLP are sharded along their rows, so that each device's
product is one part of a sum over "tensor". Left to the compiler, sums of 32-bit integers would be
exchanged, twice the bytes of bfloat16, and a token's step would be the largest over all devices.
Here each device rounds its own features with a step of their own, and multiplies the sums by it
before they are added up. That is also more accurate, because a step covers fewer features.
"""

import functools

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float
from qwix import QArray

from peft_jax.core.integer_products import local_integer_product
from peft_jax.parallel.activation_sharding import activation_spec, active_mesh
from peft_jax.parallel.rules import as_tuple

_RESIDUAL = "embed"
"""Features of the residual stream, which are never sharded."""


def integer_row_product(
    x: Float[Array, "*batch d_in"], kernel: QArray, axes: tuple[str, str | None]
) -> Float[Array, "*batch d_out"] | None:
    """Multiplies by a kernel of integers, each device by its rows.

    Args:
      x: Activations, whose features are sharded as the kernel's rows.
      kernel: Kernel [d_in, d_out] in a format of integers.
      axes: Logical names of the kernel's axes.

    Returns:
      The product, with tokens sharded as in the residual stream if the mesh divides them; None if
      no device holds only some of the rows.
    """
    mesh = active_mesh()
    if mesh is None or x.ndim != 3 or axes[0] == _RESIDUAL:
        return None
    inputs = activation_spec(x.shape, ("batch", "sequence", axes[0]), mesh)
    values = activation_spec(kernel.shape, axes, mesh)
    over = tuple(axis for axis in as_tuple(inputs[2]) if mesh.shape[axis] > 1)
    if not over or inputs[2] != values[0]:
        return None
    scales = activation_spec(kernel.scale.shape, (None, axes[1]), mesh)
    out = activation_spec((*x.shape[:2], kernel.shape[1]), ("batch", "tokens", None), mesh)
    scatters = as_tuple(out[1]) == (*as_tuple(inputs[1]), *as_tuple(inputs[2]))
    if not scatters:
        out = PartitionSpec(*inputs[:2], None)

    # Keeps no gathered kernel.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def multiply(x: Array, shard: Array, scale: Array) -> Array:
        if values[1] is not None:
            shard, scale = (
                jax.lax.all_gather(one, values[1], axis=1, tiled=True) for one in (shard, scale)
            )
        y = local_integer_product(x, kernel.replace(qvalue=shard, scale=scale))
        if scatters:
            return jax.lax.psum_scatter(y, inputs[2], scatter_dimension=1, tiled=True)
        return jax.lax.psum(y, inputs[2])

    return jax.shard_map(
        multiply,
        mesh=mesh,
        in_specs=(inputs, values, scales),
        out_specs=out,
        check_vma=False,
    )(x, kernel.qvalue, kernel.scale)
