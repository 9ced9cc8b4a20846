"""Marks the parts of a training step, so that profiles and plans can tell them apart."""

import functools
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
