"""A rotation and a kernel as one product, y = x blockdiag(blocks) W, where the kernel is turned.

(x R) W and x (R W) are the same. The first turns tokens, the second the kernel's columns; where
there are fewer columns, as there are in training on a CPU, the second is less work. And a kernel's
rows already lie block by block, while activations have to be put in another order for a batched
product and back, which takes a CPU longer than turning them does.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from kernels_pallas.block_rotation.xla import by_block
from kernels_pallas.chips import target_platform
from kernels_pallas.dispatch import resolve, say_once

COLUMNS_A_TOKEN = {"cpu": 1, "gpu": 2}
"""Up to so many columns of a kernel for each token it is faster to turn the kernel, by platform.

On a GPU two batched products of blocks move the kernel and no activation; on an H200, 8,192 tokens
and a kernel of 4,096 x 14,336, the product with its gradients takes 2.60 ms so and 2.74 ms with the
tokens turned by the kernel written for it (one trial by hand; docs/kernels.md has the table)."""


def turning_the_kernel_pays(
    x: Float[Array, "*batch d_in"], kernel: Float[Array, "d_in d_out"]
) -> bool:
    """Whether `turned_kernel_product` is the faster way to turn `x` and multiply it by a kernel.

    It is on one CPU where there are more tokens than columns, and on one GPU where there are more
    than half as many, if no implementation was asked for by name. A matter of speed alone: it is
    decided while a function is traced, for what `target_platform` says.
    """
    tokens = x.size // max(x.shape[-1], 1)
    mesh, platform = jax.sharding.get_abstract_mesh(), target_platform()
    if not mesh.empty and mesh.size > 1:
        return False
    share = COLUMNS_A_TOKEN.get(platform)
    pays = share is not None and resolve(None) == "auto" and kernel.shape[-1] < share * tokens
    if pays:
        say_once(
            f"block_rotation of {tokens} tokens before a kernel {list(kernel.shape)} on"
            f" {platform}: the kernel is turned in their place, because it has fewer than"
            f" {share} columns a token"
        )
    return pays


@jax.custom_vjp
def turned_kernel_product(
    x: Float[Array, "*batch d_in"],
    blocks: Float[Array, "n B B"],
    kernel: Float[Array, "d_in d_out"],
) -> Float[Array, "*batch d_out"]:
    """Rows turned and multiplied, x blockdiag(blocks) W, computed as x (blockdiag(blocks) W).

    The turned kernel is computed in float32 and rounded once.

    Args:
      x: activations [..., d_in] with d_in = n B.
      blocks: [n, B, B] float32, orthogonal: the gradient with respect to x R comes of that with
        respect to x as dx R, where another R would need its inverse.
      kernel: [d_in, d_out].

    Returns:
      [..., d_out] in the dtype of `x`.
    """
    return jnp.matmul(x, _turn(blocks, kernel).astype(x.dtype))


def _turn(blocks: Array, kernel: Array) -> Array:
    """blockdiag(blocks) W, [d_in, d_out] float32."""
    rows = kernel.reshape(*blocks.shape[:2], kernel.shape[-1]).astype(blocks.dtype)
    return jnp.matmul(blocks, rows).reshape(kernel.shape)


def _forward(x: Any, blocks: Any, kernel: Any) -> tuple[Array, tuple[Any, ...]]:
    arrays = x.value, blocks.value, kernel.value
    return turned_kernel_product(*arrays), (*arrays, kernel.perturbed or None)


def _backward(residuals: tuple[Any, ...], dy: Any) -> tuple[Any, ...]:
    x, blocks, kernel, kernel_is_trained = residuals
    if isinstance(dy, SymbolicZero):
        return None, None, None
    # Made again: kept, it would be as large as the kernel, in every layer.
    turned = _turn(blocks, kernel).astype(x.dtype)
    dx = jax.lax.dot_general(dy, turned, (((dy.ndim - 1,), (1,)), ((), ())))
    # With g the gradient of x R, dblocks = x' g and dx = g R', hence x' dx = dblocks R'.
    overlaps = jax.lax.dot_general(
        by_block(x, blocks),
        by_block(dx, blocks),
        (((1,), (1,)), ((0,), (0,))),
        preferred_element_type=jnp.float32,
    )
    dblocks = jnp.matmul(overlaps, blocks).astype(blocks.dtype)
    dkernel = None
    if kernel_is_trained:
        rows, columns = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
        dturned = jax.lax.dot_general(rows, columns, (((0,), (0,)), ((), ())))
        dkernel = _turn(jnp.swapaxes(blocks, -1, -2), dturned).astype(kernel.dtype)
    return dx, dblocks, dkernel


turned_kernel_product.defvjp(_forward, _backward, symbolic_zeros=True)
