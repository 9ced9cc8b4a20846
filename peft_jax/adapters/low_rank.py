"""The product with a low-rank matrix, and its gradient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peft_jax.core import linear


@jax.custom_vjp
def low_rank_product(
    x: Float[Array, "*batch d_in"],
    a: Float[Array, "d_in rank"],
    b: Float[Array, "rank d_out"],
) -> Float[Array, "*batch d_out"]:
    """(x A) B.

    The gradient is the usual one; it is written out for the order of its products. The gradient of
    A contracts x [tokens, d_in] with a thin matrix over the tokens, for which a CPU's compiler
    would transpose x; taking the transposed product instead turns the thin matrix around, which is
    five times as fast there and changes nothing elsewhere.

    Args:
      x: activations.
      a: A, cast to the dtype of `x`.
      b: B, likewise.

    Returns:
      In the dtype of `x`.
    """
    return linear(linear(x, a), b)


def _forward(x: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple]:
    inner = linear(x, a)
    return linear(inner, b), (x, inner, a, b)


def _backward(kept: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, inner, a, b = kept
    tokens = tuple(range(x.ndim - 1))
    d_inner = linear(dy, b.T)
    # Without the barrier the transposition is moved into the product again.
    da_t = jax.lax.optimization_barrier(jnp.tensordot(d_inner, x, axes=(tokens, tokens)))
    db = jnp.tensordot(inner, dy, axes=(tokens, tokens))
    return linear(d_inner, a.T), da_t.T.astype(a.dtype), db.astype(b.dtype)


low_rank_product.defvjp(_forward, _backward)
