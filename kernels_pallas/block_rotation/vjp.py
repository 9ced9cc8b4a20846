"""The rotation's two operations, and its derivative made of them."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from kernels_pallas.block_rotation import config, xla
from kernels_pallas.dispatch import Operation

Residuals = tuple[jax.Array, jax.Array]


def _tpu(name: str, *arrays: jax.Array, **settings: Any) -> tuple[jax.Array, ...]:
    from kernels_pallas.block_rotation import tpu

    return getattr(tpu, name)(*arrays, **settings)


def _refuse(platform: str, *shapes: jax.ShapeDtypeStruct, **settings: Any) -> str | None:
    """Why no kernel can turn arrays of these shapes."""
    del settings
    x, blocks = shapes[0], shapes[-1]
    try:
        config.choose_config(
            tokens=1,
            features=x.shape[-1],
            block_size=blocks.shape[-1],
            dtype=x.dtype,
            backward=len(shapes) == 3,
        )
    except ValueError as error:
        return str(error)
    return None


FORWARD = Operation(
    name="block_rotation",
    xla=xla.forward,
    tpu=functools.partial(_tpu, "forward"),
    refuse=_refuse,
    rowwise=(0,),
)
"""(x, blocks) to (y,)."""

BACKWARD = Operation(
    name="block_rotation_backward",
    xla=xla.backward,
    tpu=functools.partial(_tpu, "backward"),
    refuse=_refuse,
)
"""(x, g, blocks) to (dx, dblocks)."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rotate(
    x: Float[Array, "*batch d"],
    blocks: Float[Array, "n B B"],
    precision: jax.lax.Precision | None,
    implementation: str,
) -> Float[Array, "*batch d"]:
    """What `block_rotation` returns; all arguments by position."""
    return FORWARD(x, blocks, precision=precision, implementation=implementation)[0]


def _forward(
    x: jax.Array, blocks: jax.Array, precision: Any, implementation: str
) -> tuple[jax.Array, Residuals]:
    return rotate(x, blocks, precision, implementation), (x, blocks)


def _backward(
    precision: Any, implementation: str, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, ...]:
    x, blocks = residuals
    return BACKWARD(x, g, blocks, precision=precision, implementation=implementation)


rotate.defvjp(_forward, _backward)
