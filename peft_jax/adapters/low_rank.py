"""Multiplies by a low-rank matrix, with a gradient that is fast on CPUs."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from peft_jax.core import linear
from peft_jax.core.product_names import LOW_RANK_INPUT


@jax.custom_vjp
def low_rank_product(
    x: Float[Array, "*batch d_in"],
    a: Float[Array, "d_in rank"],
    b: Float[Array, "rank d_out"],
) -> Float[Array, "*batch d_out"]:
    """Returns (x A) B.

    The custom gradient only changes the order of products. The gradient of A contracts x [tokens,
    d_in] with a thin matrix over tokens, for which the CPU compiler would transpose x. Computing
    the transposed product transposes the thin matrix instead. This is five times as fast on a CPU
    and makes no difference elsewhere.

    Args:
      x: Activations [..., d_in].
      a: Matrix A [d_in, rank], cast to the dtype of `x`.
      b: Matrix B [rank, d_out], cast to the dtype of `x`.

    Returns:
      Product [..., d_out] in the dtype of `x`.
    """
    return linear(linear(x, a), b)


def _forward(x: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple]:
    inner = checkpoint_name(linear(x, a), LOW_RANK_INPUT)
    return linear(inner, b), (x, inner, a, b)


def _backward(kept: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, inner, a, b = kept
    tokens = tuple(range(x.ndim - 1))
    d_inner = linear(dy, b.T)
    # Without the barrier the compiler moves the transpose back into the product.
    da_t = jax.lax.optimization_barrier(jnp.tensordot(d_inner, x, axes=(tokens, tokens)))
    db = jnp.tensordot(inner, dy, axes=(tokens, tokens))
    return linear(d_inner, a.T), da_t.T.astype(a.dtype), db.astype(b.dtype)


low_rank_product.defvjp(_forward, _backward)
