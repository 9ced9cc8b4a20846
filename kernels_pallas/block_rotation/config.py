"""Tile sizes of the block rotation's kernels, and the reasons for them.

A step of a kernel holds a tile [tokens, features] of the activations and the blocks that rotate
those features. Small blocks are packed in groups onto the diagonals of matrices of the matrix
unit's size, because the unit takes as long for a small matrix as for a full one.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.target_device import MIB, RESERVED_BYTES, SMALLEST_VMEM_BYTES

LANES = 128
"""Length of the pieces in which a TPU's vector memory (VMEM) holds the last axis of an array."""

MAX_MATRIX = 640
"""Largest matrix that a group of blocks is packed into. At 640 there are 2 · 640 / 4 operations per
byte moved in bfloat16; with larger matrices arithmetic takes longer than moving the activations."""

MAX_FEATURES = 1024
"""Largest number of features in a tile. Its rows of 2 kB move at the memory's full rate, and the
matrices for this many features are few."""

TOKEN_TILES = (1024, 512, 256, 128, 64, 32, 16)
"""Numbers of tokens in a tile. A bfloat16 tile of 512 x 1024 is 1 MiB, and a step's fixed cost
(about 0.3 µs) is a few percent of the time to move it. All are multiples of 16, the rows in which
VMEM holds 16-bit numbers."""

BUDGET_BYTES = SMALLEST_VMEM_BYTES // 2
"""Half the VMEM of the smallest chip. The rest is left for what the compiler spills."""


GPU_TOKENS = 64
"""Tokens in a tile on a GPU: the rows of one warpgroup's matrix instruction. The float32 product of
a tile and the gradient of a matrix then fit the warpgroup's registers together."""

GPU_SHARED_BYTES = 227 * 1024
"""Shared memory of a thread block on Hopper, of which a KiB is left for barriers."""

GPU_MATRICES = (64, 128)
"""Sizes of matrices on a GPU. Matrix instructions need rows of at least 128 bytes in shared memory,
and a float32 gradient of 128 x 128 takes half of a warpgroup's registers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotationConfig:
    """Tile that one step works on.

    Attributes:
      tokens: Number of rows of activations.
      features: Number of columns, a multiple of `matrix`.
      matrix: Size of the square matrices that groups of blocks are packed into.

    Raises:
      ValueError: The kernels do not support a size.
    """

    tokens: int
    features: int
    matrix: int

    def __post_init__(self) -> None:
        if self.tokens < 16 or self.tokens % 16:
            raise ValueError(f"tokens is {self.tokens} but must be a multiple of 16")
        if self.matrix < LANES or self.matrix % LANES:
            raise ValueError(f"matrix is {self.matrix} but must be a multiple of {LANES}")
        if self.features < self.matrix or self.features % self.matrix:
            raise ValueError(
                f"features is {self.features} but must be a multiple of matrix={self.matrix}"
            )

    def vmem_bytes(self, dtype: DTypeLike, *, backward: bool) -> int:
        """Returns the VMEM of a step, in bytes; operands and results are double-buffered.

        Args:
          dtype: Dtype of the activations.
          backward: Whether it is a backward step, which reads two tiles and writes one tile and the
            float32 gradients of the matrices. A forward step reads one tile and writes one.
        """
        width = jnp.dtype(dtype).itemsize
        tiles = (3 if backward else 2) * self.tokens * self.features * width
        matrices = self.features * self.matrix * (width + 4 if backward else width)
        # The float32 product of one matrix before rounding, and its operands.
        scratch = 3 * self.tokens * self.matrix * 4
        return 2 * (tiles + matrices) + scratch

    def check(self, dtype: DTypeLike, *, backward: bool, vmem_bytes: int) -> None:
        """Raises ValueError if the tile does not fit the chip.

        Args:
          dtype: Dtype of the activations.
          backward: As for `vmem_bytes`.
          vmem_bytes: VMEM of the chip (`kernels_pallas.target_device.VMEM_BYTES`).
        """
        needed, spare = self.vmem_bytes(dtype, backward=backward), vmem_bytes - RESERVED_BYTES
        if needed > spare:
            raise ValueError(
                f"a {jnp.dtype(dtype).name} tile of {self.tokens} tokens and {self.features}"
                f" features in matrices of {self.matrix} needs {needed / MIB:.1f} MiB of vector"
                f" memory, and the chip has {spare / MIB:.1f} MiB to spare. Use fewer tokens or"
                " features"
            )


def matrix_size(block_size: int) -> int:
    """Returns the smallest size of matrices that hold whole blocks and fill whole lanes.

    Example:
      >>> matrix_size(8), matrix_size(128), matrix_size(48), matrix_size(256)
      (128, 128, 384, 256)
    """
    return math.lcm(block_size, LANES)


def gpu_matrix_size(block_size: int) -> int:
    """Returns the smallest size of matrices that hold whole blocks on a GPU.

    Raises:
      ValueError: No size in `GPU_MATRICES` is a multiple of the block size.

    Example:
      >>> gpu_matrix_size(16), gpu_matrix_size(128)
      (64, 128)
    """
    for size in GPU_MATRICES:
        if size % block_size == 0:
            return size
    raise ValueError(
        f"blocks of {block_size} do not divide matrices of {' or '.join(map(str, GPU_MATRICES))}"
    )


def gpu_concurrent_steps(matrix: int, *, backward: bool) -> int:
    """Returns the number of steps whose tiles share the shared memory: as many as fit, at most 4.

    Four keep the memory busy while one tile is multiplied.

    Args:
      matrix: Size of the matrices.
      backward: Whether it is a backward step, which moves three tiles and sums a float32 gradient
        of the matrix. A forward step moves two tiles.

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
    """Returns the largest tile within `BUDGET_BYTES`.

    Args:
      tokens: Number of tokens in each row of the activations.
      features: Number of features of the activations.
      block_size: Size of the blocks.
      dtype: Dtype of the activations.
      backward: As for `RotationConfig.vmem_bytes`.

    Raises:
      ValueError: The least common multiple of block size and lanes exceeds `MAX_MATRIX`.

    Example:
      >>> choose_config(
      ...     tokens=4096, features=11008, block_size=32, dtype=jnp.dtype("bfloat16"),
      ...     backward=False)
      RotationConfig(tokens=1024, features=256, matrix=128)
    """
    matrix = matrix_size(block_size)
    if matrix > MAX_MATRIX:
        raise ValueError(
            f"blocks of {block_size} need matrices of {matrix}, the least common multiple with"
            f" the {LANES} lanes of a TPU, but at most {MAX_MATRIX} is worthwhile"
        )
    width = _features(features, matrix)
    rows = -(-max(tokens, 1) // 16) * 16
    for tile in TOKEN_TILES:
        config = RotationConfig(tokens=min(tile, rows), features=width, matrix=matrix)
        if config.vmem_bytes(dtype, backward=backward) <= BUDGET_BYTES:
            return config
    raise AssertionError(f"no tile of {width} features in matrices of {matrix} fits")


def _features(features: int, matrix: int) -> int:
    """Returns the widest tile that divides the features, or one matrix if none does."""
    widths = range(max(MAX_FEATURES // matrix, 1) * matrix, 0, -matrix)
    return next((width for width in widths if features % width == 0), matrix)
