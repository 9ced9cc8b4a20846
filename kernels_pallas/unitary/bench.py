"""The unitary product's programs for `benchmarks.kernel_traffic`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.traffic import Program
from kernels_pallas.unitary.api import unitary_product
from kernels_pallas.unitary.cases import MODEL_WIDTHS
from kernels_pallas.unitary.config import choose_config, resolve_precision

ROWS = 8192
"""Tokens of a microbatch on one device."""


def programs(
    *,
    widths: Sequence[int] = tuple(MODEL_WIDTHS),
    dtypes: Sequence[DTypeLike] = (jnp.bfloat16, jnp.float32),
    rows: int = ROWS,
) -> list[Program]:
    """Forwards and backwards at every width and dtype, where the chip with the least memory can.

    Args:
      widths: real features d.
      dtypes: of the activations.
      rows: of activations.
    """
    made = []
    for d in widths:
        for dtype in dtypes:
            x = jax.ShapeDtypeStruct((rows, d), dtype)
            parameters = (
                jax.ShapeDtypeStruct((3, d // 2), jnp.float32),
                jax.ShapeDtypeStruct((2, 2, d // 2), jnp.float32),
            )
            made += [
                Program(
                    kernel="unitary_product",
                    case=f"{MODEL_WIDTHS.get(d, 'any model')}, d {d}, {x.dtype.name}",
                    direction=direction,
                    function=function,
                    shapes=shapes,
                )
                for direction, function, shapes in (
                    ("forwards", _forwards, (x, *parameters)),
                    ("backwards", _backwards, (x, x, *parameters)),
                )
                if _fits_every_chip(x, backward=direction == "backwards")
            ]
    return made


def _fits_every_chip(x: jax.ShapeDtypeStruct, *, backward: bool) -> bool:
    try:
        choose_config(
            n=x.shape[1] // 2,
            rows=x.shape[0],
            dtype=x.dtype,
            backward=backward,
            precision=resolve_precision(None, x.dtype),
        )
    except ValueError:
        return False
    return True


def _forwards(
    x: jax.Array, phases: jax.Array, reflections: jax.Array, implementation: str
) -> jax.Array:
    return unitary_product(x, phases, reflections, implementation=implementation)


def _backwards(
    x: jax.Array, g: jax.Array, phases: jax.Array, reflections: jax.Array, implementation: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    _, transpose = jax.vjp(
        lambda *arrays: unitary_product(*arrays, implementation=implementation),
        x,
        phases,
        reflections,
    )
    return transpose(g)
