"""Builds the butterfly's programs for `benchmarks.kernel_traffic`."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.butterfly.api import butterfly_rotation
from kernels_pallas.memory_traffic import Program, forward_and_backward
from kernels_pallas.shared_cases import MODEL_WIDTHS

TOKENS = 8192
"""Tokens of a microbatch on one device."""

BLOCK_SIZE, FACTORS = 32, 5
"""Five factors of blocks of 32 mix 512 features, which divides every model's hidden size."""


def programs(
    *,
    widths: Mapping[str, Sequence[int]] = MODEL_WIDTHS,
    dtypes: Sequence[DTypeLike] = (jnp.bfloat16, jnp.float32),
) -> list[Program]:
    """Returns forward and backward programs for every hidden size and dtype."""
    made = []
    for model, (d, *_) in widths.items():
        for dtype in dtypes:
            x = jax.ShapeDtypeStruct((TOKENS, d), dtype)
            shape = (FACTORS, d // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE)
            factors = jax.ShapeDtypeStruct(shape, jnp.float32)
            case = f"{model}, d {d}, {FACTORS} factors of {BLOCK_SIZE}, {x.dtype.name}"
            made += forward_and_backward("butterfly_rotation", case, butterfly_rotation, x, factors)
    return made
