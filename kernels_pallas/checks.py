"""What the products take: refused here, by name, before anything is computed."""

import jax
import jax.numpy as jnp


def check_real(**arrays: jax.Array) -> None:
    """Raises TypeError unless the arrays are real floating-point numbers."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{name} must be real floating-point numbers, as float32 or bfloat16, but is"
                f" {array.dtype.name}"
            )


def check_width(given: int, blocks: int) -> None:
    """Raises ValueError unless blocks cover the features that are given."""
    if given != blocks:
        raise ValueError(f"the blocks cover {blocks} features, but the activations have {given}")


def refuse_dtype(dtype: jnp.dtype) -> str | None:
    """Why a TPU's kernels cannot take activations of a dtype; None if they can."""
    if dtype in (jnp.bfloat16, jnp.float32):
        return None
    return f"a TPU's kernels take bfloat16 and float32, and x is {dtype.name}"
