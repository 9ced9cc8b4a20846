"""The Cayley transform's public functions, and its derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels_pallas.operand_checks import check_real

UNROLLED_BLOCK_SIZE = 32
"""Up to this size an unrolled elimination without pivoting inverts all blocks at once. For larger
blocks its sequence of rank-one updates costs more than products of halves."""


def skew_symmetric(
    entries: Float[Array, "*stack free"], block_size: int
) -> Float[Array, "*stack {block_size} {block_size}"]:
    """Returns skew-symmetric blocks with the given entries above their diagonals, row by row.

    Args:
      entries: [..., b (b-1) / 2].
      block_size: Block size b.

    Raises:
      TypeError: The entries are not real floating-point.
      ValueError: b is less than 2, or there are not b (b-1) / 2 entries.

    Example:
      >>> skew_symmetric(jnp.array([5.0]), 2)
      Array([[ 0.,  5.],
             [-5.,  0.]], dtype=float32)
    """
    check_real(entries=entries)
    free = block_size * (block_size - 1) // 2
    if block_size < 2 or entries.shape[-1:] != (free,):
        raise ValueError(
            f"entries have shape {list(entries.shape)}, but skew-symmetric blocks of size b ="
            f" {block_size} need b at least 2 and b (b-1) / 2 = {free} free entries"
        )
    rows, columns = np.triu_indices(block_size, k=1)
    index = np.zeros((block_size, block_size), np.int32)
    index[rows, columns] = index[columns, rows] = np.arange(rows.size)
    sign = np.zeros((block_size, block_size), np.float32)
    sign[rows, columns], sign[columns, rows] = 1.0, -1.0
    return jnp.take(entries, index, axis=-1) * jnp.asarray(sign, entries.dtype)


def skew_entries(blocks: Float[Array, "*stack b b"]) -> Float[Array, "*stack free"]:
    """Returns the entries above the diagonal of (R - Rᵀ) / 2; the inverse of `skew_symmetric`."""
    rows, columns = np.triu_indices(blocks.shape[-1], k=1)
    skew = (blocks - jnp.swapaxes(blocks, -1, -2)) / 2
    return skew[..., rows, columns]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def cayley(
    entries: Float[Array, "*stack free"], block_size: int
) -> Float[Array, "*stack {block_size} {block_size}"]:
    """Returns orthogonal blocks Q = (I - S)(I + S)⁻¹ with S skew-symmetric.

    Q is computed in float32 as 2 (I + S)⁻¹ - I, followed by one Newton step towards the nearest
    orthogonal matrix. The symmetric part of I + S is the identity, so elimination needs no pivots,
    but its rounding errors grow with the square of the entries. The Newton step squares the
    deviation from orthogonality.

    QᵀQ equals I to 1e-6 for entries up to 30 in blocks of up to 64, and up to 10 in blocks of up to
    256. There Q differs from its float64 value by up to 2e-5. An entry of 10 is nearly half a turn.
    Far larger entries lose all digits.

    The gradient needs Q alone: with N = (Q + I) / 2 = (I + S)⁻¹, dQ = -2 N dS N.

    Args:
      entries: Entries of S above its diagonal, row by row: [..., b (b-1) / 2], float32.
      block_size: Block size b.

    Returns:
      [..., b, b], float32. Zero entries give the identity exactly.

    Raises:
      TypeError, ValueError: As for `skew_symmetric`.
    """
    q = 2.0 * _inverse(_plus_identity(entries, block_size)) - _eye(block_size)
    # Newton's step for the nearest orthogonal matrix squares the deviation from orthogonality.
    return q + _product(q, _eye(block_size) - _product(jnp.swapaxes(q, -1, -2), q)) / 2.0


def _cayley_forward(entries: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array]:
    q = cayley(entries, block_size)
    return q, q


def _cayley_backward(block_size: int, q: jax.Array, dq: jax.Array) -> tuple[jax.Array]:
    inverse_t = jnp.swapaxes((q + _eye(block_size)) / 2.0, -1, -2)
    ds = -2.0 * _product(_product(inverse_t, dq), inverse_t)
    # An entry occurs in S twice, once with each sign; skew_entries halves that sum.
    return (2.0 * skew_entries(ds),)


cayley.defvjp(_cayley_forward, _cayley_backward)


_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _eye(size: int) -> jax.Array:
    return jnp.eye(size, dtype=jnp.float32)


def _plus_identity(entries: jax.Array, block_size: int) -> jax.Array:
    return skew_symmetric(entries.astype(jnp.float32), block_size) + _eye(block_size)


def _inverse(a: Float[Array, "*stack b b"]) -> Float[Array, "*stack b b"]:
    """Inverts matrices whose symmetric parts are positive definite, such as I + S.

    Large matrices are inverted by halves. With quarters A, B, C, D, this needs the inverses of A
    and of its Schur complement D - C A⁻¹ B, whose symmetric parts are positive definite again. All
    of it is products, unlike a library's elimination. The CPU's batched elimination can also
    deadlock when called for several arrays at once (jaxlib 0.10).
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
    # Gauss-Jordan elimination in place for all blocks at once. The stack's axes come last, so that
    # each update is one pass over long contiguous rows. They are not merged, because they may be
    # sharded over a mesh, and because a TPU would move the data.
    a = jnp.moveaxis(a, (-2, -1), (0, 1))
    for k in range(size):
        pivot = 1.0 / a[k, k]
        column = a[:, k].at[k].set(0.0)
        row = (a[k] * pivot[None]).at[k].set(pivot)
        a = a.at[:, k].set(0.0) - column[:, None] * row[None]
        a = a.at[k].set(row)
    return jnp.moveaxis(a, (0, 1), (-2, -1))
