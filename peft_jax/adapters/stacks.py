"""Maps functions of one kernel over stacked kernels: of layers, and of experts in each."""

import functools
from collections.abc import Callable, Sequence
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


def without_groups(method: Any, axes: Sequence[Any]) -> tuple[Any, ...]:
    """Returns what is given for the axes [..., groups, d_in, d_out] without that of groups.

    It is left out only if the method's arrays span groups. See `AdapterMethod.spans_groups`.

    Args:
      method: Method of an adapted kernel.
      axes: Something for each axis of the kernel, such as its size or its name.
    """
    return (*axes[:-3], *axes[-2:]) if method.spans_groups else tuple(axes)


def one_by_one(function: Function) -> Function:
    """Returns the function of stacked arrays, computed one after the other to save memory."""
    return functools.partial(jax.lax.map, function)
