"""How many tokens the TPU's kernels hold on the chip at a time."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.butterfly.stages import Stages
from kernels_pallas.chips import MIB, RESERVED_BYTES

TOKEN_TILES = (512, 256, 128, 64, 32, 16)
"""Multiples of 16, the rows that 16-bit numbers come in. All features that mix are held at once, so
the tiles are wide, and a few hundred tokens make a megabyte of them."""


def vmem_bytes(stages: Stages, tokens: int, dtype: DTypeLike, *, backward: bool) -> int:
    """The vector memory of a step, in bytes.

    What comes and goes with every step is held twice; the matrices, which stay for many, once, and
    their gradients twice.

    Args:
      stages: of the factors.
      tokens: of a tile.
      dtype: of the activations.
      backward: the step back keeps the input of every stage, and the matrices' float32 gradients.
    """
    width = jnp.dtype(dtype).itemsize
    tile = tokens * stages.features * width
    numbers = (2 * stages.high + 1) * stages.features * stages.matrix
    coming = 2 * (3 if backward else 2) * tile
    matrices = numbers * (width + 2 * 4 if backward else width)
    kept = (stages.high + 3 if backward else 2) * tile
    return coming + matrices + kept + 3 * tokens * stages.matrix * 4


def choose_tokens(
    stages: Stages, tokens: int, dtype: DTypeLike, *, backward: bool, there: int
) -> int:
    """The largest tile of tokens that the chip has room for.

    Args:
      stages: of the factors.
      tokens: of the activations, in each of their rows.
      dtype: of the activations.
      backward: as for `vmem_bytes`.
      there: the chip's vector memory in bytes.

    Raises:
      ValueError: not even the smallest fits.
    """
    rows = -(-max(tokens, 1) // 16) * 16
    spare = there - RESERVED_BYTES
    for tile in TOKEN_TILES:
        size = min(tile, rows)
        if vmem_bytes(stages, size, dtype, backward=backward) <= spare:
            return size
    needed = vmem_bytes(stages, TOKEN_TILES[-1], dtype, backward=backward)
    raise ValueError(
        f"{stages.features} features that all mix, in {2 * stages.high + 1} sets of matrices of"
        f" {stages.matrix}, need {needed / MIB:.1f} MiB of the chip's vector memory in"
        f" {jnp.dtype(dtype).name}, which has {spare / MIB:.1f} MiB to spare; fewer factors need"
        " less"
    )
