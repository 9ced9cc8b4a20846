"""The Cayley transform's public functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels_pallas.butterfly.api import butterfly_rotation

UNROLLED_BLOCK_SIZE = 32
"""Up to this size blocks are inverted all at once by an unrolled elimination, which has no pivots
to look for; above it the sequence of rank-one updates costs more than products of halves."""


def skew_symmetric(
    entries: Float[Array, "*stack free"], block_size: int
) -> Float[Array, "*stack {block_size} {block_size}"]:
    """The skew-symmetric blocks with the given entries above their diagonals, row by row.

    Args:
      entries: [..., b (b-1) / 2].
      block_size: b.

    Example:
      >>> skew_symmetric(jnp.array([5.0]), 2)
      Array([[ 0.,  5.],
             [-5.,  0.]], dtype=float32)
    """
    rows, columns = np.triu_indices(block_size, k=1)
    index = np.zeros((block_size, block_size), np.int32)
    index[rows, columns] = index[columns, rows] = np.arange(rows.size)
    sign = np.zeros((block_size, block_size), np.float32)
    sign[rows, columns], sign[columns, rows] = 1.0, -1.0
    return jnp.take(entries, index, axis=-1) * jnp.asarray(sign, entries.dtype)


def skew_entries(blocks: Float[Array, "*stack b b"]) -> Float[Array, "*stack free"]:
    """The entries above the diagonal of (R - Rᵀ) / 2, row by row: `skew_symmetric`'s inverse."""
    rows, columns = np.triu_indices(blocks.shape[-1], k=1)
    skew = (blocks - jnp.swapaxes(blocks, -1, -2)) / 2
    return skew[..., rows, columns]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def cayley(
    entries: Float[Array, "*stack free"], block_size: int
) -> Float[Array, "*stack {block_size} {block_size}"]:
    """Orthogonal blocks Q = (I - S)(I + S)⁻¹ with S skew-symmetric.

    Computed in float32 as 2 (I + S)⁻¹ - I. I + S has the identity as its symmetric part, so its
    elimination needs no pivots, at the price of rounding errors that grow as the square of the
    entries: QᵀQ is I to 1e-6 for entries to about 1, to 1e-5 for entries of 10, where most of a
    block is turned by nearly half a turn. The gradient needs Q alone: with N = (Q + I) / 2 =
    (I + S)⁻¹, dQ = -2 N dS N.

    Args:
      entries: the entries of S above its diagonal, row by row: [..., b (b-1) / 2], float32.
      block_size: b.

    Returns:
      [..., b, b], float32; zeros give the identity exactly.
    """
    return 2.0 * _inverse(_plus_identity(entries, block_size)) - _eye(block_size)


def _cayley_forward(entries: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array]:
    q = cayley(entries, block_size)
    return q, q


def _cayley_backward(block_size: int, q: jax.Array, dq: jax.Array) -> tuple[jax.Array]:
    inverse_t = jnp.swapaxes((q + _eye(block_size)) / 2.0, -1, -2)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    ds = -2.0 * product(product(inverse_t, dq), inverse_t)
    # An entry stands in S twice, once with each sign; skew_entries halves that sum.
    return (2.0 * skew_entries(ds),)


cayley.defvjp(_cayley_forward, _cayley_backward)


def compose_butterfly(factors: Float[Array, "m n b b"]) -> Float[Array, "blocks B B"]:
    """The dense blocks of the product F_{m-1} ... F_0 of butterfly factors.

    The product is block-diagonal with blocks of B = b 2^(m-1); they are the images of the unit
    vectors, B at a time since blocks do not mix.

    Args:
      factors: [m, n, b, b].

    Returns:
      [n b / B, B, B].
    """
    m, n, b, _ = factors.shape
    if m == 1:
        return factors[0]
    size = b * 2 ** (m - 1)
    blocks = n * b // size
    unit = jnp.broadcast_to(jnp.eye(size, dtype=factors.dtype)[:, None], (size, blocks, size))
    # Once a step over few rows, for all layers at once: nothing that a kernel would make faster.
    images = butterfly_rotation(
        unit.reshape(size, n * b),
        factors,
        precision=jax.lax.Precision.HIGHEST,
        implementation="xla",
    )
    return jnp.swapaxes(images.reshape(size, blocks, size), 0, 1)


def _eye(size: int) -> jax.Array:
    return jnp.eye(size, dtype=jnp.float32)


def _plus_identity(entries: jax.Array, block_size: int) -> jax.Array:
    return skew_symmetric(entries.astype(jnp.float32), block_size) + _eye(block_size)


def _inverse(a: Float[Array, "*stack b b"]) -> Float[Array, "*stack b b"]:
    """The inverses of matrices whose symmetric parts are positive definite, as I + S has.

    Large ones by halves: with A, B, C, D the quarters, by the inverses of A and of A's Schur
    complement D - C A⁻¹ B, whose symmetric parts are positive definite again. It is all products,
    which a library's elimination is not; and the CPU's batched elimination, called for several
    arrays at once, can wait for itself forever (jaxlib 0.10).
    """
    size = a.shape[-1]
    if size > UNROLLED_BLOCK_SIZE:
        half = size // 2
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        upper, lower = a[..., :half, :], a[..., half:, :]
        first = _inverse(upper[..., :half])
        right = product(first, upper[..., half:])
        left = product(lower[..., :half], first)
        second = _inverse(lower[..., half:] - product(lower[..., :half], right))
        corner = product(right, second)
        rows = (
            jnp.concatenate([first + product(corner, left), -corner], axis=-1),
            jnp.concatenate([-product(second, left), second], axis=-1),
        )
        return jnp.concatenate(rows, axis=-2)
    # Gauss-Jordan in place, every block at once. The blocks stand in the last axis, so that each
    # of the few updates is one pass over long contiguous rows.
    stack = a.shape[:-2]
    a = jnp.moveaxis(a.reshape(-1, size, size), 0, -1)
    for k in range(size):
        pivot = 1.0 / a[k, k]
        column = a[:, k].at[k].set(0.0)
        row = (a[k] * pivot[None]).at[k].set(pivot)
        a = a.at[:, k].set(0.0) - column[:, None] * row[None]
        a = a.at[k].set(row)
    return jnp.moveaxis(a, -1, 0).reshape(*stack, size, size)
