"""The unitary product's programs for `benchmarks.kernel_traffic`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.memory_traffic import Program, forward_and_backward
from kernels_pallas.unitary.api import unitary_product
from kernels_pallas.unitary.cases import MODELS_BY_WIDTH
from kernels_pallas.unitary.config import choose_config, resolve_precision

ROWS = 8192
"""Tokens of a microbatch on one device."""


def programs(
    *,
    widths: Sequence[int] = tuple(MODELS_BY_WIDTH),
    dtypes: Sequence[DTypeLike] = (jnp.bfloat16, jnp.float32),
    rows: int = ROWS,
) -> list[Program]:
    """Returns the forward and backward programs that fit the chip with the least VMEM.

    Args:
      widths: Numbers of real features d.
      dtypes: Dtypes of the activations.
      rows: Number of rows of activations.
    """
    made = []
    for d in widths:
        for dtype in dtypes:
            x = jax.ShapeDtypeStruct((rows, d), dtype)
            phases = jax.ShapeDtypeStruct((3, d // 2), jnp.float32)
            reflections = jax.ShapeDtypeStruct((2, 2, d // 2), jnp.float32)
            case = f"{MODELS_BY_WIDTH.get(d, 'any model')}, d {d}, {x.dtype.name}"
            made += [
                program
                for program in forward_and_backward(
                    "unitary_product", case, unitary_product, x, phases, reflections
                )
                if _fits_every_chip(x, backward=program.direction == "backwards")
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
