"""Model widths and rounding tolerance, shared by the tests and benchmarks of all kernels."""

import jax.numpy as jnp
from jax.typing import DTypeLike

MODEL_WIDTHS = {
    "Llama 7B": (4096, 11008),
    "Llama 30B": (6656, 17920),
    "Llama 70B": (8192, 28672),
    "Llama 405B": (16384, 53248),
}
"""Hidden size and feed-forward size, the input widths of a block's linear maps."""


def tolerance(dtype: DTypeLike, length: int) -> float:
    """Returns the largest error allowed in a result, relative to the largest entry.

    Args:
      dtype: Dtype that the result is rounded to.
      length: Number of terms in each sum; sums are computed in float32.

    Example:
      >>> tolerance(jnp.bfloat16, 128) > 10 * tolerance(jnp.float32, 128)
      True
    """
    rounding = float(jnp.finfo(dtype).eps) / 2
    summing = 2 * float(jnp.finfo(jnp.float32).eps) * length**0.5
    return rounding + summing
