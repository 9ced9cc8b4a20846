"""Builds the block rotation's programs for `benchmarks.kernel_traffic`."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.block_rotation.api import block_rotation
from kernels_pallas.memory_traffic import Program, forward_and_backward
from kernels_pallas.shared_cases import MODEL_WIDTHS

TOKENS = 8192
"""Tokens of a microbatch on one device."""

BLOCK_SIZES = (16, 128)
"""Block sizes: that of BOFT's default settings (blocks of 8, two factors), and a large one."""


def programs(
    *,
    widths: Mapping[str, Sequence[int]] = MODEL_WIDTHS,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    dtypes: Sequence[DTypeLike] = (jnp.bfloat16, jnp.float32),
) -> list[Program]:
    """Returns forward and backward programs for every width, block size and dtype."""
    made = []
    for model, features in widths.items():
        for d in features:
            for size in block_sizes:
                for dtype in dtypes:
                    x = jax.ShapeDtypeStruct((TOKENS, d), dtype)
                    blocks = jax.ShapeDtypeStruct((d // size, size, size), jnp.float32)
                    case = f"{model}, d {d}, blocks of {size}, {x.dtype.name}"
                    made += forward_and_backward("block_rotation", case, block_rotation, x, blocks)
    return made
