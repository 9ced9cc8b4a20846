"""Tile sizes of the butterfly's TPU kernels."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.butterfly.stages import Stages
from kernels_pallas.target_device import MIB, RESERVED_BYTES

TOKEN_TILES = (512, 256, 128, 64, 32, 16)
"""Numbers of tokens in a tile: multiples of 16, the rows in which VMEM holds 16-bit numbers. A tile
holds all features that mix, so a few hundred tokens make a megabyte."""


def vmem_bytes(stages: Stages, tokens: int, dtype: DTypeLike, *, backward: bool) -> int:
    """Returns the VMEM of a step, in bytes.

    Tiles that change with every step are double-buffered. Matrices stay for many steps and are held
    once, their gradients twice.

    Args:
      stages: Stages of the factors.
      tokens: Number of tokens in a tile.
      dtype: Dtype of the activations.
      backward: Whether it is a backward step, which keeps the input of every stage and the float32
        gradients of the matrices.
    """
    width = jnp.dtype(dtype).itemsize
    tile = tokens * stages.features * width
    numbers = (2 * stages.high + 1) * stages.features * stages.matrix
    coming = 2 * (3 if backward else 2) * tile
    matrices = numbers * (width + 2 * 4 if backward else width)
    kept = (stages.high + 3 if backward else 2) * tile
    return coming + matrices + kept + 3 * tokens * stages.matrix * 4


def choose_tokens(
    stages: Stages, tokens: int, dtype: DTypeLike, *, backward: bool, vmem: int
) -> int:
    """Returns the largest number of tokens in a tile that fits the chip.

    Args:
      stages: Stages of the factors.
      tokens: Number of tokens in each row of the activations.
      dtype: Dtype of the activations.
      backward: As for `vmem_bytes`.
      vmem: VMEM of the chip, in bytes.

    Raises:
      ValueError: Not even the smallest tile fits.
    """
    rows = -(-max(tokens, 1) // 16) * 16
    spare = vmem - RESERVED_BYTES
    for tile in TOKEN_TILES:
        size = min(tile, rows)
        if vmem_bytes(stages, size, dtype, backward=backward) <= spare:
            return size
    needed = vmem_bytes(stages, TOKEN_TILES[-1], dtype, backward=backward)
    raise ValueError(
        f"{stages.features} features that mix, in {2 * stages.high + 1} sets of"
        f" {jnp.dtype(dtype).name} matrices of {stages.matrix}, need {needed / MIB:.1f} MiB of"
        f" vector memory, and the chip has {spare / MIB:.1f} MiB to spare. Use fewer factors"
    )
