"""Rotates blocks in XLA operations, for CPUs and wherever no kernel can run."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def forward(
    x: Float[Array, "*batch d"],
    blocks: Float[Array, "n B B"],
    *,
    precision: jax.lax.Precision | None,
) -> tuple[Float[Array, "*batch d"]]:
    """Returns (y,) with y = x blockdiag(blocks)."""
    y = jnp.matmul(by_block(x, blocks), blocks.astype(x.dtype), precision=precision)
    return (_by_row(y, x),)


def backward(
    x: Float[Array, "*batch d"],
    g: Float[Array, "*batch d"],
    blocks: Float[Array, "n B B"],
    *,
    precision: jax.lax.Precision | None,
) -> tuple[Float[Array, "*batch d"], Float[Array, "n B B"]]:
    """Returns (dx, dblocks) for the gradient g of y: g blockdiag(blocks)ᵀ and blocks of xᵀ g."""
    g = by_block(g, blocks)
    transposed = jnp.swapaxes(blocks, -1, -2).astype(x.dtype)
    dx = jnp.matmul(g, transposed, precision=precision)
    dblocks = jax.lax.dot_general(
        by_block(x, blocks),
        g,
        (((1,), (1,)), ((0,), (0,))),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return _by_row(dx, x), dblocks.astype(blocks.dtype)


def by_block(x: jax.Array, blocks: jax.Array) -> Float[Array, "n rows B"]:
    """Reorders activations [..., d] for a product batched over blocks [n, B, B]."""
    # Batched products read blocks before tokens. On a CPU this explicit reordering is twice as fast
    # in both directions as a contraction that leaves the order to the compiler. The barrier keeps
    # the compiler from fusing the producer of `x` (a norm, an activation function) into the
    # reordering, where it would run element by element without vector instructions.
    x = jax.lax.optimization_barrier(x)
    tokens = math.prod(x.shape[:-1])
    return jnp.swapaxes(x.reshape(tokens, *blocks.shape[:2]), 0, 1)


def _by_row(y: Float[Array, "n rows B"], like: jax.Array) -> jax.Array:
    return jnp.swapaxes(y, 0, 1).reshape(like.shape)
