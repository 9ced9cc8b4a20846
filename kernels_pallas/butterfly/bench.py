"""The butterfly's programs for `benchmarks.kernel_traffic`."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.butterfly.api import butterfly_rotation
from kernels_pallas.cases import MODEL_WIDTHS
from kernels_pallas.traffic import Program

TOKENS = 8192
"""Of a microbatch on one device."""

BLOCK_SIZE, FACTORS = 32, 5
"""Blocks of 32 in five factors mix 512 features, which divides all of the models' hidden sizes."""


def programs(
    *,
    widths: Mapping[str, Sequence[int]] = MODEL_WIDTHS,
    dtypes: Sequence[DTypeLike] = (jnp.bfloat16, jnp.float32),
) -> list[Program]:
    """Forwards and backwards at every hidden size and dtype."""
    made = []
    for model, (d, *_) in widths.items():
        for dtype in dtypes:
            x = jax.ShapeDtypeStruct((TOKENS, d), dtype)
            factors = jax.ShapeDtypeStruct(
                (FACTORS, d // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE), jnp.float32
            )
            case = f"{model}, d {d}, {FACTORS} factors of {BLOCK_SIZE}, {x.dtype.name}"
            made += [
                Program(
                    kernel="butterfly_rotation",
                    case=case,
                    direction=direction,
                    function=function,
                    shapes=shapes,
                )
                for direction, function, shapes in (
                    ("forwards", _forwards, (x, factors)),
                    ("backwards", _backwards, (x, x, factors)),
                )
            ]
    return made


def _forwards(x: jax.Array, factors: jax.Array, implementation: str) -> jax.Array:
    return butterfly_rotation(x, factors, implementation=implementation)


def _backwards(
    x: jax.Array, g: jax.Array, factors: jax.Array, implementation: str
) -> tuple[jax.Array, jax.Array]:
    _, transpose = jax.vjp(
        lambda *arrays: butterfly_rotation(*arrays, implementation=implementation), x, factors
    )
    return transpose(g)
