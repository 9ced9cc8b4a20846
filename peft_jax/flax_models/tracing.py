"""Calls functions abstractly, with arguments of which some are no arrays."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def abstract_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Returns the shapes of a function's results, without computing them.

    Args:
      function: Function.
      *args: Arguments. Arrays and shapes are traced, and all other leaves are passed as they are.
      **kwargs: Keyword arguments in the same form.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    traced = [isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) for x in leaves]

    def call(arrays: list[Any]) -> Any:
        given = iter(arrays)
        whole = [next(given) if is_array else x for x, is_array in zip(leaves, traced, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, whole)
        return function(*args, **kwargs)

    return jax.eval_shape(call, [x for x, is_array in zip(leaves, traced, strict=True) if is_array])
