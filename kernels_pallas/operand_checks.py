"""Checks of the arrays that callers pass to the kernels."""

import jax
import jax.numpy as jnp


def check_real(**arrays: jax.Array) -> None:
    """Raises TypeError unless every array has a real floating-point dtype."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{name} is {array.dtype.name} but must be real floating-point, such as float32 or"
                " bfloat16"
            )


def check_width(features: int, covered: int) -> None:
    """Raises ValueError unless the blocks cover the features of the activations exactly."""
    if features != covered:
        raise ValueError(f"x has {features} features but the blocks cover {covered}")
