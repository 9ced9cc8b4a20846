"""Decomposes a kernel into leading singular triplets, exactly or at random."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST

OVERSAMPLING = 8
"""Number of directions beyond the rank in a randomized decomposition."""


def leading_triplets(
    kernel: Float[Array, "d_in d_out"], rank: int, iterations: int
) -> tuple[Float[Array, "d_in rank"], Float[Array, " rank"], Float[Array, "rank d_out"]]:
    """Returns leading singular vectors and values of a kernel: U, S and Vᵀ.

    Args:
      kernel: Kernel in float32.
      rank: Number of triplets.
      iterations: Number of power iterations of a randomized decomposition; 0 for an exact one.
    """
    if iterations:
        u, s, vt = _randomized_svd(kernel, rank, iterations)
    else:
        u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def _randomized_svd(
    kernel: Float[Array, "d_in d_out"], rank: int, iterations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns leading singular vectors and values of a kernel.

    Subspace iteration with a fixed Gaussian start (Halko, Martinsson and Tropp, 2011, arXiv
    0909.4061, algorithm 4.4), so that the same kernel gives the same result.
    """
    k = min(rank + OVERSAMPLING, *kernel.shape)
    start = jax.random.normal(jax.random.key(0), (kernel.shape[1], k), kernel.dtype)
    q, _ = jnp.linalg.qr(jnp.matmul(kernel, start, precision=HIGHEST))
    for _ in range(iterations):
        q, _ = jnp.linalg.qr(jnp.matmul(kernel.T, q, precision=HIGHEST))
        q, _ = jnp.linalg.qr(jnp.matmul(kernel, q, precision=HIGHEST))
    small = jnp.matmul(q.T, kernel, precision=HIGHEST)
    u, s, vt = jnp.linalg.svd(small, full_matrices=False)
    return jnp.matmul(q, u, precision=HIGHEST), s, vt
