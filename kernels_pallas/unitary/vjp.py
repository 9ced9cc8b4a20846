"""The unitary product's two operations, and its derivative made of them."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from kernels_pallas.checks import refuse_dtype
from kernels_pallas.chips import target_vmem_bytes
from kernels_pallas.dispatch import Operation
from kernels_pallas.unitary import config, xla

Residuals = tuple[jax.Array, jax.Array, jax.Array]


def _tpu(name: str, *arrays: jax.Array, **settings: Any) -> tuple[jax.Array, ...]:
    from kernels_pallas.unitary import tpu

    return getattr(tpu, name)(*arrays, **settings)


def _refuse(
    platform: str,
    *shapes: jax.ShapeDtypeStruct,
    precision: jax.lax.Precision | None,
) -> str | None:
    """Why no kernel can turn arrays of these shapes."""
    del platform
    x = shapes[0]
    try:
        config.choose_config(
            n=x.shape[-1] // 2,
            rows=1,
            dtype=x.dtype,
            backward=len(shapes) == 4,
            precision=config.resolve_precision(precision, x.dtype),
            vmem_bytes=target_vmem_bytes(),
        )
    except ValueError as error:
        return str(error)
    return refuse_dtype(x.dtype)


FORWARD = Operation(
    name="unitary_product",
    xla=xla.forward,
    tpu=functools.partial(_tpu, "forward"),
    refuse=_refuse,
    rowwise=(0,),
)
"""(x, phases, reflections) to (y,)."""

BACKWARD = Operation(
    name="unitary_product_backward",
    xla=xla.backward,
    tpu=functools.partial(_tpu, "backward"),
    refuse=_refuse,
)
"""(x, g, phases, reflections) to (dx, dphases, dreflections)."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def turn(
    x: Float[Array, "*batch d"],
    phases: Float[Array, "3 n"],
    reflections: Float[Array, "2 2 n"],
    precision: jax.lax.Precision | None,
    implementation: str,
) -> Float[Array, "*batch d"]:
    """The product y = U x, as `unitary_product`; all arguments by position."""
    return FORWARD(x, phases, reflections, precision=precision, implementation=implementation)[0]


def _forward(
    x: jax.Array,
    phases: jax.Array,
    reflections: jax.Array,
    precision: Any,
    implementation: str,
) -> tuple[jax.Array, Residuals]:
    # Only what comes in is kept: the map is unitary, so what is between is computed again in the
    # one pass that the gradient takes anyway.
    return turn(x, phases, reflections, precision, implementation), (x, phases, reflections)


def _backward(
    precision: Any, implementation: str, residuals: Residuals, g: jax.Array
) -> tuple[jax.Array, ...]:
    x, phases, reflections = residuals
    return BACKWARD(x, g, phases, reflections, precision=precision, implementation=implementation)


turn.defvjp(_forward, _backward)
