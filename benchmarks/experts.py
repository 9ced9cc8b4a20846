"""Defines the grouped products of a mixture of experts that a GPU's benchmark times."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.grouped import multiply_ragged, sum_ragged

DENSE = "one dense product of as many operations"
"""Name of the product that the others are compared with."""

TOLERANCE = 0.01
"""Largest error of a result, relative to its largest value: bfloat16 keeps eight bits."""

Product = tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]


def grouped_products(groups: int, rows: int, d_in: int, d_out: int) -> dict[str, Product]:
    """Returns, by name, functions and their arguments in bfloat16.

    Args:
      groups: Number of kernels.
      rows: Number of rows of all groups, whose sizes are random and unequal.
      d_in: Number of input features.
      d_out: Number of output features.
    """
    x, kernels, dy, sizes = _arrays(groups, rows, d_in, d_out)
    return {
        DENSE: (lambda x, kernels: x @ kernels[0], (x, kernels)),
        "forwards": (_forwards, (x, kernels, sizes)),
        "gradient of the rows": (_to_rows, (dy, kernels, sizes)),
        "gradient of the kernels": (sum_ragged, (x, dy, sizes)),
    }


def check_grouped_products(groups: int, rows: int, d_in: int, d_out: int) -> None:
    """Compares the results with products of one group after another, in float32 by NumPy.

    Raises:
      RuntimeError: A result differs.
    """
    x, kernels, dy, sizes = _arrays(groups, rows, d_in, d_out)
    ends = np.cumsum(np.asarray(sizes))
    parts = [slice(end - size, end) for end, size in zip(ends, np.asarray(sizes), strict=True)]
    xs, ws, dys = (np.asarray(array, np.float32) for array in (x, kernels, dy))
    wanted = {
        "forwards": np.concatenate([xs[p] @ w for p, w in zip(parts, ws, strict=True)]),
        "gradient of the rows": np.concatenate(
            [dys[p] @ w.T for p, w in zip(parts, ws, strict=True)]
        ),
        "gradient of the kernels": np.stack([xs[p].T @ dys[p] for p in parts]),
    }
    for name, (function, arrays) in grouped_products(groups, rows, d_in, d_out).items():
        if name in wanted:
            found = np.asarray(jax.jit(function)(*arrays), np.float32)
            error = np.abs(found - wanted[name]).max() / np.abs(wanted[name]).max()
            if not error <= TOLERANCE:
                raise RuntimeError(
                    f"{name} of {rows} rows and {groups} kernels of {d_in} x {d_out} is off by"
                    f" {error:.1e} of its largest value"
                )


def _forwards(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    return multiply_ragged(x, kernels, sizes, transposed=False)


def _to_rows(dy: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    return multiply_ragged(dy, kernels, sizes, transposed=True)


def _arrays(groups: int, rows: int, d_in: int, d_out: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    x, kernels, dy = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((rows, d_in), (groups, d_in, d_out), (rows, d_out))
    )
    sizes = rng.multinomial(rows, rng.dirichlet(np.ones(groups)))
    return x, kernels, dy, jnp.asarray(sizes, jnp.int32)
