"""Packs small blocks onto the diagonals of matrices as large as a matrix unit multiplies."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_EXACT = jax.lax.Precision.HIGHEST


def to_matrices(
    blocks: Float[Array, "n B B"], size: int, features: int, dtype: Any
) -> Float[Array, "matrices {size} {size}"]:
    """Returns matrices with groups of blocks on their diagonals, and zeros after the last block.

    A product with a matrix of ones repeats the blocks along the columns, exactly. Reshapes would
    make a TPU store blocks whose few columns are padded to all 128 lanes.

    Args:
      blocks: [n, B, B].
      size: Size of the matrices, a multiple of B.
      features: Number of features that the matrices cover, at least n B and a multiple of `size`.
      dtype: Dtype of the matrices.
    """
    n, block_size, _ = blocks.shape
    padded = jnp.pad(blocks.astype(dtype), ((0, features // block_size - n), (0, 0), (0, 0)))
    if size == block_size:
        return padded
    repeated = jnp.matmul(
        padded.reshape(-1, block_size), _repeat(block_size, size, dtype), precision=_EXACT
    ).reshape(-1, size, size)
    return jnp.where(_on_diagonal(block_size, size), repeated, jnp.zeros_like(repeated))


def from_matrices(
    matrices: Float[Array, "matrices M M"], shape: tuple[int, ...]
) -> Float[Array, "n B B"]:
    """Returns the blocks [n, B, B] on the matrices' diagonals; the transpose of `to_matrices`."""
    n, block_size, _ = shape
    size = matrices.shape[-1]
    if size == block_size:
        return matrices[:n]
    inside = jnp.where(_on_diagonal(block_size, size), matrices, jnp.zeros_like(matrices))
    summed = jnp.matmul(
        inside.reshape(-1, size), _repeat(block_size, size, matrices.dtype).T, precision=_EXACT
    )
    return summed.reshape(-1, block_size, block_size)[:n]


def _repeat(block_size: int, size: int, dtype: Any) -> Float[Array, "{block_size} {size}"]:
    """Returns copies of the identity side by side."""
    return jnp.tile(jnp.eye(block_size, dtype=dtype), (1, size // block_size))


def _on_diagonal(block_size: int, size: int) -> Bool[Array, "{size} {size}"]:
    """Returns where a matrix has its blocks."""
    block = jnp.arange(size) // block_size
    return block[:, None] == block[None]
