"""Marks the parts of a training step, so that profiles and plans can tell them apart."""

import contextlib
import functools
import re
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

import jax

Part = Literal[
    "embedding", "norm", "attention", "scores", "mlp", "rotation", "low_rank", "loss", "optimizer"
]
"""Parts of a step: "attention" is its linear maps, "scores" what lies between them."""

P = ParamSpec("P")
R = TypeVar("R")


def part(name: Part) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Returns a decorator that marks a function's operations as a part of the step.

    The innermost mark counts. Marks change names only, not what is computed.

    Example:
      >>> import jax.numpy as jnp
      >>> @part("mlp")
      ... def double(x):
      ...     return x * 2
      >>> "mlp" in jax.jit(double).lower(jnp.ones(3)).as_text(debug_info=True)
      True
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def marked(*args: P.args, **kwargs: P.kwargs) -> R:
            with jax.named_scope(name):
                return function(*args, **kwargs)

        return marked

    return decorate


_MEAN_SHARE = re.compile(r"one_of_(\d+)_rows")


def mean_share(parts: int) -> contextlib.AbstractContextManager[None]:
    """Marks ragged products in which a device computes `1 / parts` of the rows, on average.

    The actual number depends on the data, so the program has memory for all rows.

    Args:
      parts: Number of parts that the rows are divided into; 1 marks nothing.
    """
    return jax.named_scope(f"one_of_{parts}_rows") if parts > 1 else contextlib.nullcontext()


def find_mean_share(op_name: str) -> float:
    """Returns the mean share of rows in the name of a traced operation; 1 without a mark.

    Example:
      >>> find_mean_share("jit(step)/transpose(jvp(one_of_8_rows))/ragged_dot_general")
      0.125
    """
    found = _MEAN_SHARE.search(op_name)
    return 1.0 / int(found[1]) if found else 1.0
