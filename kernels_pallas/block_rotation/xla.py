"""The rotation in XLA's operations: what runs on a CPU, and wherever no kernel does."""

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
    """(y,), y = x blockdiag(blocks)."""
    turned = jnp.matmul(by_block(x, blocks), blocks.astype(x.dtype), precision=precision)
    return (_by_row(turned, x),)


def backward(
    x: Float[Array, "*batch d"],
    g: Float[Array, "*batch d"],
    blocks: Float[Array, "n B B"],
    *,
    precision: jax.lax.Precision | None,
) -> tuple[Float[Array, "*batch d"], Float[Array, "n B B"]]:
    """(dx, dblocks) for the gradient g of y: g blockdiag(blocks)ᵀ, and the blocks of xᵀ g."""
    turned = by_block(g, blocks)
    transposed = jnp.swapaxes(blocks, -1, -2).astype(x.dtype)
    dx = jnp.matmul(turned, transposed, precision=precision)
    dblocks = jax.lax.dot_general(
        by_block(x, blocks),
        turned,
        (((1,), (1,)), ((0,), (0,))),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return _by_row(dx, x), dblocks.astype(blocks.dtype)


def by_block(x: jax.Array, blocks: jax.Array) -> Float[Array, "n rows B"]:
    """Activations [..., d] in the order of a product batched over blocks [n, B, B]."""
    # Blocks before tokens, as a batched product wants them: on a CPU twice as fast, forwards and
    # backwards, as a contraction that leaves the order to the compiler. The barrier keeps what `x`
    # is made of (a norm, an activation function) out of the reordering, where the compiler would
    # compute it element by element in an order that no vector unit likes.
    x = jax.lax.optimization_barrier(x)
    tokens = math.prod(x.shape[:-1])
    return jnp.swapaxes(x.reshape(tokens, *blocks.shape[:2]), 0, 1)


def _by_row(y: Float[Array, "n rows B"], like: jax.Array) -> jax.Array:
    return jnp.swapaxes(y, 0, 1).reshape(like.shape)
