"""The product's two operations, and its derivative made of them."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from kernels_pallas.block_rotation import config as block_rotation
from kernels_pallas.butterfly import config, stages, xla
from kernels_pallas.checks import refuse_dtype
from kernels_pallas.chips import target_vmem_bytes
from kernels_pallas.dispatch import Operation

Residuals = tuple[Any, Any]


def _tpu(name: str, *arrays: jax.Array, **settings: Any) -> tuple[jax.Array, ...]:
    from kernels_pallas.butterfly import tpu

    return getattr(tpu, name)(*arrays, **settings)


def _refuse(platform: str, *shapes: jax.ShapeDtypeStruct, **settings: Any) -> str | None:
    """Why no kernel can take arrays of these shapes."""
    del settings
    x, factors = shapes[0], shapes[-1]
    if platform != "tpu":
        return f"there is no kernel of it for {platform}"
    backward = len(shapes) == 3
    m, _, block_size, _ = factors.shape
    try:
        if stages.composes(factors):
            block_rotation.choose_config(
                tokens=1,
                features=x.shape[-1],
                block_size=block_size * 2 ** (m - 1),
                dtype=x.dtype,
                backward=backward,
            )
        else:
            found = stages.split(block_size, m)
            config.choose_tokens(found, 16, x.dtype, backward=backward, there=target_vmem_bytes())
    except ValueError as error:
        return str(error)
    return refuse_dtype(x.dtype)


FORWARD = Operation(
    name="butterfly_rotation",
    xla=xla.forward,
    tpu=functools.partial(_tpu, "forward"),
    refuse=_refuse,
    rowwise=(0,),
)
"""(x, factors) to (y,)."""

BACKWARD = Operation(
    name="butterfly_rotation_backward",
    xla=xla.backward,
    tpu=functools.partial(_tpu, "backward"),
    refuse=_refuse,
)
"""(x, g, factors) to (dx, dfactors)."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rotate(
    x: Float[Array, "*batch d"],
    factors: Float[Array, "m n b b"],
    precision: jax.lax.Precision | None,
    implementation: str,
) -> Float[Array, "*batch d"]:
    """What `butterfly_rotation` returns; all arguments by position."""
    return FORWARD(x, factors, precision=precision, implementation=implementation)[0]


def _forward(
    x: Any, factors: Any, precision: Any, implementation: str
) -> tuple[jax.Array, Residuals]:
    return rotate(x, factors, precision, implementation), (x, factors)


def _backward(
    precision: Any, implementation: str, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, ...]:
    x, factors = residuals
    return BACKWARD(x, g, factors, precision=precision, implementation=implementation)


rotate.defvjp(_forward, _backward)
