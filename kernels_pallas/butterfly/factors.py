"""Butterfly factors: which can be multiplied, and their product as dense blocks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.butterfly import xla
from kernels_pallas.operand_checks import check_real


def check_factors(factors: jax.Array) -> None:
    """Raises ValueError unless butterfly factors can be multiplied."""
    shape = list(factors.shape)
    if factors.ndim != 4 or shape[2] != shape[3] or shape[0] == 0:
        raise ValueError(f"factors have shape {shape} but must be [m, n, b, b] with m at least 1")
    m, n, block_size, _ = shape
    if m > 1 and (block_size % 2 or n % 2 ** (m - 1)):
        raise ValueError(
            f"factors have shape {shape}, but {m} factors need an even b and an n that is a"
            f" multiple of {2 ** (m - 1)}"
        )


def compose_butterfly(factors: Float[Array, "m n b b"]) -> Float[Array, "blocks B B"]:
    """Returns the dense blocks of the product F_{m-1} ... F_0 of butterfly factors.

    The product is block-diagonal with blocks of B = b 2^(m-1). Each row of a block is the image of
    a unit vector. Blocks do not mix, so one vector holds a unit vector for every block.

    Args:
      factors: [m, n, b, b].

    Returns:
      [n b / B, B, B].

    Raises:
      TypeError, ValueError: As for `kernels_pallas.butterfly.butterfly_rotation`.
    """
    check_real(factors=factors)
    check_factors(factors)
    m, n, b, _ = factors.shape
    if m == 1:
        return factors[0]
    size = b * 2 ** (m - 1)
    blocks = n * b // size
    unit = jnp.broadcast_to(jnp.eye(size, dtype=factors.dtype)[:, None], (size, blocks, size))
    # This runs once a step on few rows, for all layers at once, so a kernel would gain nothing.
    (images,) = xla.forward(unit.reshape(size, n * b), factors, precision=jax.lax.Precision.HIGHEST)
    return jnp.swapaxes(images.reshape(size, blocks, size), 0, 1)
