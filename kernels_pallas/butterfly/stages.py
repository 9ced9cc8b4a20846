"""Butterfly factors as a few stages of matrices of the size that a TPU's matrix unit multiplies.

Features are split into tiles of the matrices' size M. The low levels pair half-blocks within a
tile, so they are composed into one matrix per tile. A high level pairs the half-blocks of a tile
with those of one other tile, its partner, so it has two matrices per tile:

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
    """How factors are split into stages.

    Attributes:
      block_size: Block size b.
      low: Number of levels that are composed.
      high: Number of levels that are stages of their own.
    """

    block_size: int
    low: int
    high: int

    @property
    def matrix(self) -> int:
        """The size M of the matrices."""
        return self.block_size * 2 ** (self.low - 1)

    @property
    def features(self) -> int:
        """The number of features that mix with each other: M 2^high."""
        return self.matrix * 2**self.high

    @property
    def tiles(self) -> int:
        """The number of tiles of the features that mix with each other."""
        return 2**self.high


MAX_COMPOSED = 256
"""Up to this block size the factors are composed and applied as a block rotation."""


def composes(factors: Any) -> bool:
    """Returns whether composing factors [m, n, b, b] into dense blocks is faster."""
    m, _, b, _ = factors.shape
    return b * 2 ** (m - 1) <= MAX_COMPOSED


def split(block_size: int, levels: int) -> Stages:
    """Splits levels into stages, with the fewest low levels whose matrices fill whole lanes.

    Args:
      block_size: Block size b.
      levels: Number of factors m.

    Raises:
      ValueError: No number of low levels fills whole lanes, or the matrices exceed `MAX_MATRIX`.

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
        f"{levels} factors with blocks of {block_size} do not compose to matrices whose size is a"
        f" multiple of {LANES} and at most {MAX_MATRIX}"
    )


def to_matrices(
    factors: Float[Array, "m n b b"], stages: Stages, dtype: DTypeLike
) -> tuple[Float[Array, "high tiles 2 M M"], Float[Array, "tiles M M"]]:
    """Returns the matrices of all tiles: (same and cross of the high levels, lowest first; low).

    The low levels are composed in the dtype of the factors.
    """
    low = compose_butterfly(factors[: stages.low]).astype(dtype)
    factors = factors.astype(dtype)
    m = factors.shape[0]
    high = [_same_and_cross(factors[level], level, stages.matrix) for level in range(stages.low, m)]
    empty = jnp.zeros((0, low.shape[0], 2, *low.shape[1:]), factors.dtype)
    return (jnp.stack(high) if high else empty), low


def _same_and_cross(
    blocks: Float[Array, "n b b"], level: int, size: int
) -> Float[Array, "tiles 2 M M"]:
    """Returns one high level's matrices: those for a tile itself and those for its partner.

    Products with zeros and ones put the columns in place, exactly. Reshapes would make a TPU store
    half-blocks whose few columns are padded to all 128 lanes.
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
