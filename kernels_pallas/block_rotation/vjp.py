"""The rotation's two operations, and its derivative made of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.block_rotation import config, xla
from kernels_pallas.checks import refuse_dtype
from kernels_pallas.chips import refuse_generation
from kernels_pallas.dispatch import Operation

Residuals = tuple[Any, Any]


def _tpu(name: str, *arrays: jax.Array, **settings: Any) -> tuple[jax.Array, ...]:
    from kernels_pallas.block_rotation import tpu

    return getattr(tpu, name)(*arrays, **settings)


def _gpu(name: str, *arrays: jax.Array, **settings: Any) -> tuple[jax.Array, ...]:
    from kernels_pallas.block_rotation import gpu

    return getattr(gpu, name)(*arrays, **settings)


def _refuse(platform: str, *shapes: jax.ShapeDtypeStruct, **settings: Any) -> str | None:
    """Why no kernel can turn arrays of these shapes."""
    del settings
    x, blocks = shapes[0], shapes[-1]
    try:
        if platform == "gpu":
            return _refuse_on_gpu(x, config.gpu_matrix_size(blocks.shape[-1]))
        config.choose_config(
            tokens=1,
            features=x.shape[-1],
            block_size=blocks.shape[-1],
            dtype=x.dtype,
            backward=len(shapes) == 3,
        )
    except ValueError as error:
        return str(error)
    return refuse_dtype(x.dtype)


def _refuse_on_gpu(x: jax.ShapeDtypeStruct, matrix: int) -> str | None:
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"a GPU's matrix instructions would round {x.dtype.name}"
    if x.shape[-1] % matrix:
        return f"{x.shape[-1]} features are not a whole number of matrices of {matrix}"
    return refuse_generation()


FORWARD = Operation(
    name="block_rotation",
    xla=xla.forward,
    tpu=functools.partial(_tpu, "forward"),
    gpu=functools.partial(_gpu, "forward"),
    refuse=_refuse,
    rowwise=(0,),
)
"""(x, blocks) to (y,)."""

BACKWARD = Operation(
    name="block_rotation_backward",
    xla=xla.backward,
    tpu=functools.partial(_tpu, "backward"),
    gpu=functools.partial(_gpu, "backward"),
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
    x: Any, blocks: Any, precision: Any, implementation: str
) -> tuple[jax.Array, Residuals]:
    return rotate(x, blocks, precision, implementation), (x, blocks)


def _backward(
    precision: Any, implementation: str, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, ...]:
    x, blocks = residuals
    return BACKWARD(x, g, blocks, precision=precision, implementation=implementation)


rotate.defvjp(_forward, _backward)
