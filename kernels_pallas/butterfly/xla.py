"""Computes the butterfly product in XLA operations, one pass over the activations a factor."""

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
    """Returns (y,) with y = x F_{m-1} ... F_0."""
    for level in reversed(range(factors.shape[0])):
        x = _rotate(_paired(x, factors, level), factors, level, precision)
    return (x,)


def backward(
    x: Float[Array, "*batch d"],
    g: Float[Array, "*batch d"],
    factors: Float[Array, "m n b b"],
    *,
    precision: jax.lax.Precision | None,
) -> tuple[Float[Array, "*batch d"], Float[Array, "m n b b"]]:
    """Returns (dx, dfactors) for the gradient g of y; recomputes the factors' inputs."""
    m = factors.shape[0]
    inputs = []
    for level in reversed(range(m)):
        inputs.append(_paired(x, factors, level))
        x = _rotate(inputs[-1], factors, level, precision)
    gradients = []
    for level in range(m):
        dpaired, dblocks = block_rotation.backward(
            inputs.pop(), _paired(g, factors, level), factors[level], precision=precision
        )
        gradients.append(dblocks)
        g = _unpaired(dpaired, factors, level)
    return g, jnp.stack(gradients)


def _rotate(
    paired: Float[Array, "*batch d"],
    factors: Float[Array, "m n b b"],
    level: int,
    precision: jax.lax.Precision | None,
) -> Float[Array, "*batch d"]:
    (rotated,) = block_rotation.forward(paired, factors[level], precision=precision)
    return _unpaired(rotated, factors, level)


def _paired(
    x: Float[Array, "*batch d"], factors: Float[Array, "m n b b"], level: int
) -> Float[Array, "*batch d"]:
    """Moves the half-blocks that a level pairs next to each other."""
    return _transposed(x, factors, (2, 2**level))


def _unpaired(
    x: Float[Array, "*batch d"], factors: Float[Array, "m n b b"], level: int
) -> Float[Array, "*batch d"]:
    """Undoes `_paired`."""
    return _transposed(x, factors, (2**level, 2))


def _transposed(
    x: Float[Array, "*batch d"], factors: Float[Array, "m n b b"], runs: tuple[int, int]
) -> Float[Array, "*batch d"]:
    """Transposes half-blocks that lie as rows by columns within each group."""
    m, n, block_size, _ = factors.shape
    if m == 1:
        return x
    groups = 2 * n // (runs[0] * runs[1])
    halves = x.reshape(*x.shape[:-1], groups, *runs, block_size // 2)
    return jnp.swapaxes(halves, -3, -2).reshape(x.shape)
