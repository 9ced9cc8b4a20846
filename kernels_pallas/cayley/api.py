"""The Cayley transform's public functions, and its derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels_pallas.checks import check_real

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

    Raises:
      TypeError: when the entries are no real floating-point numbers.
      ValueError: when b is less than 2, or there are not b (b-1) / 2 entries.

    Example:
      >>> skew_symmetric(jnp.array([5.0]), 2)
      Array([[ 0.,  5.],
             [-5.,  0.]], dtype=float32)
    """
    check_real(entries=entries)
    free = block_size * (block_size - 1) // 2
    if block_size < 2 or entries.shape[-1:] != (free,):
        raise ValueError(
            f"skew-symmetric blocks of b = {block_size} have b (b-1) / 2 = {free} free entries,"
            f" with b at least 2, but the entries are {list(entries.shape)}"
        )
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

    Computed in float32 as 2 (I + S)⁻¹ - I, and one step towards the nearest orthogonal matrix from
    there. I + S has the identity as its symmetric part, so its elimination needs no pivots, at the
    price of rounding errors that grow as the square of the entries; the step squares those, as far
    as they are not orthogonal. So QᵀQ is I to 1e-6 for entries to 30 in blocks of up to 64, and to
    10 in blocks of up to 256, where Q is off by up to 2e-5 of what float64 gives; an entry of 10 is
    nearly half a turn. Far larger entries than these lose all digits. The gradient needs Q alone:
    with N = (Q + I) / 2 = (I + S)⁻¹, dQ = -2 N dS N.

    Args:
      entries: the entries of S above its diagonal, row by row: [..., b (b-1) / 2], float32.
      block_size: b.

    Returns:
      [..., b, b], float32; zeros give the identity exactly.

    Raises:
      TypeError, ValueError: as `skew_symmetric`.
    """
    q = 2.0 * _inverse(_plus_identity(entries, block_size)) - _eye(block_size)
    # One step of Newton's method for the nearest orthogonal matrix: it squares what is amiss.
    return q + _product(q, _eye(block_size) - _product(jnp.swapaxes(q, -1, -2), q)) / 2.0


def _cayley_forward(entries: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array]:
    q = cayley(entries, block_size)
    return q, q


def _cayley_backward(block_size: int, q: jax.Array, dq: jax.Array) -> tuple[jax.Array]:
    inverse_t = jnp.swapaxes((q + _eye(block_size)) / 2.0, -1, -2)
    ds = -2.0 * _product(_product(inverse_t, dq), inverse_t)
    # An entry stands in S twice, once with each sign; skew_entries halves that sum.
    return (2.0 * skew_entries(ds),)


cayley.defvjp(_cayley_forward, _cayley_backward)


_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


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
        upper, lower = a[..., :half, :], a[..., half:, :]
        first = _inverse(upper[..., :half])
        right = _product(first, upper[..., half:])
        left = _product(lower[..., :half], first)
        second = _inverse(lower[..., half:] - _product(lower[..., :half], right))
        corner = _product(right, second)
        rows = (
            jnp.concatenate([first + _product(corner, left), -corner], axis=-1),
            jnp.concatenate([-_product(second, left), second], axis=-1),
        )
        return jnp.concatenate(rows, axis=-2)
    # Gauss-Jordan in place, every block at once. The stack stands last, so that each of the few
    # updates is one pass over long contiguous rows; its axes are not merged, for they may be cut
    # over a mesh, and on a TPU would be moved for that.
    a = jnp.moveaxis(a, (-2, -1), (0, 1))
    for k in range(size):
        pivot = 1.0 / a[k, k]
        column = a[:, k].at[k].set(0.0)
        row = (a[k] * pivot[None]).at[k].set(pivot)
        a = a.at[:, k].set(0.0) - column[:, None] * row[None]
        a = a.at[k].set(row)
    return jnp.moveaxis(a, (0, 1), (-2, -1))
