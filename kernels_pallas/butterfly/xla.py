"""The product in XLA's operations: one factor after another, each a pass over the activations."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.block_rotation import xla as block_rotation


def forward(
    x: Float[Array, "*batch d"],
    factors: Float[Array, "m n b b"],
    *,
    precision: jax.lax.Precision | None,
) -> tuple[Float[Array, "*batch d"]]:
    """(y,), y = x F_{m-1} ... F_0."""
    m, n, block_size, _ = factors.shape
    if m == 1:
        return block_rotation.forward(x, factors[0], precision=precision)
    for level in reversed(range(m)):
        stride = 2**level
        halves = x.reshape(*x.shape[:-1], n // stride, 2, stride, block_size // 2)
        paired = jnp.swapaxes(halves, -3, -2)
        (rotated,) = block_rotation.forward(
            paired.reshape(x.shape), factors[level], precision=precision
        )
        x = jnp.swapaxes(rotated.reshape(paired.shape), -3, -2).reshape(x.shape)
    return (x,)


def backward(
    x: Float[Array, "*batch d"],
    g: Float[Array, "*batch d"],
    factors: Float[Array, "m n b b"],
    *,
    precision: jax.lax.Precision | None,
) -> tuple[Float[Array, "*batch d"], Float[Array, "m n b b"]]:
    """(dx, dfactors) for the gradient g of y."""
    _, transpose = jax.vjp(lambda *a: forward(*a, precision=precision), x, factors)
    return transpose((g,))
