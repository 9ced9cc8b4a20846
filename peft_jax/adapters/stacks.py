"""Maps functions of one kernel over stacked kernels: of layers, and of experts in each."""

import functools
from collections.abc import Callable
from typing import Any

import jax

Function = Callable[..., Any]


def over_stack(over: Callable[[Function], Function], function: Function, depth: int) -> Function:
    """Returns a function of arrays with `depth` leading axes, mapped over each axis by `over`.

    Args:
      over: `jax.vmap`, or `one_by_one`.
      function: Function of arrays without leading axes.
      depth: Number of leading axes.

    Example:
      >>> import jax.numpy as jnp
      >>> over_stack(jax.vmap, jnp.trace, 2)(jnp.ones((4, 3, 2, 2))).shape
      (4, 3)
    """
    for _ in range(depth):
        function = over(function)
    return function


def one_by_one(function: Function) -> Function:
    """Returns the function of stacked arrays, computed one after the other to save memory."""
    return functools.partial(jax.lax.map, function)
