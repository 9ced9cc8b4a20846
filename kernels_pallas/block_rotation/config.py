"""The sizes of what the TPU's kernels hold on the chip at a time, and why.

A step of a kernel holds a tile of the activations, [tokens, features], and the blocks that turn
those features, as square matrices of the matrix unit's size: small blocks stand in groups on the
diagonal of one, since the unit multiplies by a full matrix in the time it takes for a small one.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.chips import MIB, RESERVED_BYTES, SMALLEST_VMEM_BYTES

LANES = 128
"""The last axis of what a TPU's vector memory holds comes in pieces of so many."""

MAX_MATRIX = 640
"""The largest matrix that a group of blocks is made into. Larger ones would have the arithmetic,
2 · 640 / 4 operations a byte moved in bfloat16, take longer than moving the activations."""

MAX_FEATURES = 1024
"""Features of a tile at most: a row of it is 2 kB, enough to be moved at the memory's full rate,
and the matrices for so many features are few."""

TOKEN_TILES = (1024, 512, 256, 128, 64, 32, 16)
"""A bfloat16 tile of 512 x 1024 is 1 MiB; a step's fixed cost (about 0.3 µs) is then a few percent
of the time it takes to move it. All are multiples of 16, the rows that 16-bit numbers come in."""

BUDGET_BYTES = SMALLEST_VMEM_BYTES // 2
"""Half the vector memory of the smallest chip: the rest is left for what the compiler spills."""


GPU_TOKENS = 64
"""Rows of a tile on a GPU: what one warpgroup's matrix instruction takes, so that the float32
product of a tile and the gradient of a matrix fit its registers together."""

GPU_SHARED_BYTES = 227 * 1024
"""Shared memory of a block of threads on a Hopper; a KiB of it is left for barriers."""

GPU_MATRICES = (64, 128)
"""Sizes of matrices on a GPU: rows of 128 bytes at least, as shared memory is laid out for the
matrix instructions; a float32 gradient of 128 x 128 takes half of a warpgroup's registers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotationConfig:
    """The tile that one step works on.

    Attributes:
      tokens: rows of activations.
      features: columns; whole matrices.
      matrix: the size of the square matrices that groups of blocks are made into.

    Raises:
      ValueError: a size that the kernels cannot work with.
    """

    tokens: int
    features: int
    matrix: int

    def __post_init__(self) -> None:
        if self.tokens < 16 or self.tokens % 16:
            raise ValueError(f"tokens must be a multiple of 16, but is {self.tokens}")
        if self.matrix < LANES or self.matrix % LANES:
            raise ValueError(f"matrix must be a multiple of {LANES}, but is {self.matrix}")
        if self.features < self.matrix or self.features % self.matrix:
            raise ValueError(
                f"features must be a multiple of the matrix, {self.matrix}, but is {self.features}"
            )

    def vmem_bytes(self, dtype: DTypeLike, *, backward: bool) -> int:
        """The vector memory of a step, in bytes; what comes and goes is held twice.

        Args:
          dtype: of the activations.
          backward: the step back reads two tiles and writes one and float32 gradients of the
            matrices; the step forwards reads one and writes one.
        """
        width = jnp.dtype(dtype).itemsize
        tiles = (3 if backward else 2) * self.tokens * self.features * width
        matrices = self.features * self.matrix * (width + 4 if backward else width)
        # The float32 product of one matrix before it is rounded, and the operands it was made of.
        scratch = 3 * self.tokens * self.matrix * 4
        return 2 * (tiles + matrices) + scratch

    def check(self, dtype: DTypeLike, *, backward: bool, vmem_bytes: int) -> None:
        """Refuses a tile that does not fit the chip.

        Args:
          dtype: of the activations.
          backward: as for `vmem_bytes`.
          vmem_bytes: vector memory of the chip (`kernels_pallas.chips.VMEM_BYTES`).

        Raises:
          ValueError: with what it needs and what there is.
        """
        needed, there = self.vmem_bytes(dtype, backward=backward), vmem_bytes - RESERVED_BYTES
        if needed > there:
            raise ValueError(
                f"a tile of {self.tokens} tokens and {self.features} features in matrices of"
                f" {self.matrix} needs {needed / MIB:.1f} MiB of the chip's vector memory in"
                f" {jnp.dtype(dtype).name}, which has {there / MIB:.1f} MiB to spare; take fewer"
                " tokens or features"
            )


def matrix_size(block_size: int) -> int:
    """The size of the matrices that hold whole blocks and fill whole lanes.

    Example:
      >>> matrix_size(8), matrix_size(128), matrix_size(48), matrix_size(256)
      (128, 128, 384, 256)
    """
    return math.lcm(block_size, LANES)


def gpu_matrix_size(block_size: int) -> int:
    """The size of the matrices that hold whole blocks on a GPU.

    Raises:
      ValueError: there is none.

    Example:
      >>> gpu_matrix_size(16), gpu_matrix_size(128)
      (64, 128)
    """
    for size in GPU_MATRICES:
        if size % block_size == 0:
            return size
    raise ValueError(
        f"blocks of {block_size} do not fill matrices of {' or '.join(map(str, GPU_MATRICES))}"
    )


def gpu_concurrent_steps(matrix: int, *, backward: bool) -> int:
    """Into how many steps' tiles shared memory is parted: as many as fit, up to four.

    Four keep memory busy while one tile is multiplied.

    Args:
      matrix: the size of the matrices.
      backward: a step back moves three tiles and sums a float32 gradient of the matrix; a step
        forwards moves two.

    Example:
      >>> gpu_concurrent_steps(64, backward=True), gpu_concurrent_steps(128, backward=True)
      (4, 2)
    """
    tiles = (3 if backward else 2) * GPU_TOKENS * matrix * 2
    kept = matrix * matrix * (2 + 4 if backward else 2)
    return min(4, (GPU_SHARED_BYTES - kept - 1024) // tiles)


def choose_config(
    *, tokens: int, features: int, block_size: int, dtype: DTypeLike, backward: bool
) -> RotationConfig:
    """The largest tile within `BUDGET_BYTES`.

    Args:
      tokens: of the activations, in each of their rows.
      features: of the activations.
      block_size: of the blocks.
      dtype: of the activations.
      backward: as for `RotationConfig.vmem_bytes`.

    Raises:
      ValueError: the blocks are too large, or of a size whose common multiple with the lanes is.

    Example:
      >>> choose_config(
      ...     tokens=4096, features=11008, block_size=32, dtype=jnp.dtype("bfloat16"),
      ...     backward=False)
      RotationConfig(tokens=1024, features=256, matrix=128)
    """
    matrix = matrix_size(block_size)
    if matrix > MAX_MATRIX:
        raise ValueError(
            f"blocks of {block_size} would be multiplied as matrices of {matrix}, the least common"
            f" multiple with the {LANES} lanes of a TPU, and at most {MAX_MATRIX} pays"
        )
    width = _features(features, matrix)
    rows = -(-max(tokens, 1) // 16) * 16
    for tile in TOKEN_TILES:
        config = RotationConfig(tokens=min(tile, rows), features=width, matrix=matrix)
        if config.vmem_bytes(dtype, backward=backward) <= BUDGET_BYTES:
            return config
    raise AssertionError(f"no tile of {width} features in matrices of {matrix} fits")


def _features(features: int, matrix: int) -> int:
    """The widest tile that divides the features, or one matrix where none does."""
    widths = range(max(MAX_FEATURES // matrix, 1) * matrix, 0, -matrix)
    return next((width for width in widths if features % width == 0), matrix)
