"""Butterfly factors as a few stages of whole square matrices, which a TPU's matrix unit multiplies.

Features are cut into tiles of the matrices' size M. The low levels, whose pairs of halves lie
within a tile, are composed into one matrix a tile. At a higher level the halves of a tile are all
paired with those of one other tile, its partner, so that the level is two matrices a tile:

    y[t] = x[t] same[t] + x[partner(t)] cross[t],  partner(t) = t xor 2^level
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels_pallas.block_rotation.config import LANES, MAX_MATRIX
from kernels_pallas.butterfly.factors import compose_butterfly


@dataclasses.dataclass(frozen=True)
class Stages:
    """How factors fall into stages.

    Attributes:
      block_size: b.
      low: how many levels are composed.
      high: how many are stages of their own.
    """

    block_size: int
    low: int
    high: int

    @property
    def matrix(self) -> int:
        """M, the size of the matrices."""
        return self.block_size * 2 ** (self.low - 1)

    @property
    def features(self) -> int:
        """How many features are mixed with each other: M 2^high."""
        return self.matrix * 2**self.high

    @property
    def tiles(self) -> int:
        """Tiles of so many features."""
        return 2**self.high


MAX_COMPOSED = 256
"""Up to this size the product of all factors is one matrix, which is applied as any other block."""


def composes(factors: Any) -> bool:
    """Whether the product of factors [m, n, b, b] is better made one matrix."""
    m, _, b, _ = factors.shape
    return b * 2 ** (m - 1) <= MAX_COMPOSED


def split(block_size: int, levels: int) -> Stages:
    """The fewest low levels that make matrices of whole lanes.

    Args:
      block_size: b.
      levels: m.

    Raises:
      ValueError: no number of them does, or the matrices are too large to pay.

    Example:
      >>> split(8, 9)
      Stages(block_size=8, low=5, high=4)
      >>> split(8, 9).matrix, split(8, 9).features
      (128, 2048)
    """
    for low in range(1, levels + 1):
        stages = Stages(block_size, low, levels - low)
        if stages.matrix % LANES == 0:
            if stages.matrix > MAX_MATRIX:
                break
            return stages
    raise ValueError(
        f"{levels} factors with blocks of {block_size} cannot be made matrices of a multiple of"
        f" {LANES} lanes and at most {MAX_MATRIX}"
    )


def to_matrices(
    factors: Float[Array, "m n b b"], stages: Stages, dtype: DTypeLike
) -> tuple[Float[Array, "high tiles 2 M M"], Float[Array, "tiles M M"]]:
    """The matrices of all tiles: (same and cross of the high levels, lowest first; low).

    The low ones are composed in the dtype of the factors.
    """
    low = compose_butterfly(factors[: stages.low]).astype(dtype)
    factors = factors.astype(dtype)
    m = factors.shape[0]
    high = [_two_a_tile(factors[level], level, stages.matrix) for level in range(stages.low, m)]
    empty = jnp.zeros((0, low.shape[0], 2, *low.shape[1:]), factors.dtype)
    return (jnp.stack(high) if high else empty), low


def _two_a_tile(
    blocks: Float[Array, "n b b"], level: int, size: int
) -> Float[Array, "tiles 2 M M"]:
    """One high level's matrices: what a tile makes of itself, and what of its partner.

    Columns are put in place by products with zeros and ones, exactly; by reshapes a TPU would store
    the few columns of half a block padded to all its lanes.
    """
    n, b, _ = blocks.shape
    half, stride = b // 2, 2**level
    group = size // half
    pairs, tiles = n // stride, stride // group
    rows = blocks.reshape(n * b, b)
    block = jnp.arange(n * b) // b % group
    inside = block[:, None] == jnp.arange(size)[None] // half
    placed = []
    for side in (0, 1):
        repeat = jnp.tile(jnp.eye(b, dtype=blocks.dtype)[:, side * half : (side + 1) * half], group)
        whole = jnp.matmul(rows, repeat, precision=jax.lax.Precision.HIGHEST)
        whole = jnp.where(inside, whole, jnp.zeros_like(whole))
        # Rows are [pairs of runs, tiles of a run, blocks of a tile, their two sides, half].
        whole = whole.reshape(pairs, tiles, group, 2, half, size)
        placed.append(jnp.moveaxis(whole, 3, 1).reshape(pairs, 2, tiles, size, size))
    same = jnp.stack([placed[side][:, side] for side in (0, 1)], axis=1)
    cross = jnp.stack([placed[side][:, 1 - side] for side in (0, 1)], axis=1)
    return jnp.stack([same, cross], axis=-3).reshape(-1, 2, size, size)
