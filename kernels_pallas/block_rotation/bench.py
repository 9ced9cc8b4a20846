"""The rotation's programs for `benchmarks.kernel_traffic`."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.block_rotation.api import block_rotation
from kernels_pallas.cases import MODEL_WIDTHS
from kernels_pallas.traffic import Program

TOKENS = 8192
"""Of a microbatch on one device."""

BLOCK_SIZES = (16, 128)
"""What the default settings of BOFT compose to (blocks of 8, two factors), and a large block."""


def programs(
    *,
    widths: Mapping[str, Sequence[int]] = MODEL_WIDTHS,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    dtypes: Sequence[DTypeLike] = (jnp.bfloat16, jnp.float32),
) -> list[Program]:
    """Forwards and backwards at every width, block size and dtype."""
    made = []
    for model, features in widths.items():
        for d in features:
            for size in block_sizes:
                for dtype in dtypes:
                    x = jax.ShapeDtypeStruct((TOKENS, d), dtype)
                    blocks = jax.ShapeDtypeStruct((d // size, size, size), jnp.float32)
                    case = f"{model}, d {d}, blocks of {size}, {x.dtype.name}"
                    made += [
                        Program(
                            kernel="block_rotation",
                            case=case,
                            direction=direction,
                            function=function,
                            shapes=shapes,
                        )
                        for direction, function, shapes in (
                            ("forwards", _forwards, (x, blocks)),
                            ("backwards", _backwards, (x, x, blocks)),
                        )
                    ]
    return made


def _forwards(x: jax.Array, blocks: jax.Array, implementation: str) -> jax.Array:
    return block_rotation(x, blocks, implementation=implementation)


def _backwards(
    x: jax.Array, g: jax.Array, blocks: jax.Array, implementation: str
) -> tuple[jax.Array, jax.Array]:
    _, transpose = jax.vjp(
        lambda *arrays: block_rotation(*arrays, implementation=implementation), x, blocks
    )
    return transpose(g)
