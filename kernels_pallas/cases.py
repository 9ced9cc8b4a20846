"""What tests and benchmarks of all kernels share: models' widths, and how much rounding is allowed.

Widths are (hidden size, feed-forward size): inputs of a block's linear maps.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike

MODEL_WIDTHS = {
    "Llama 7B": (4096, 11008),
    "Llama 30B": (6656, 17920),
    "Llama 70B": (8192, 28672),
    "Llama 405B": (16384, 53248),
}


def tolerance(dtype: DTypeLike, length: int) -> float:
    """The error allowed in a result, as a share of the largest of the results.

    Args:
      dtype: what the result is rounded to.
      length: of the sums in it, which are made in float32.

    Example:
      >>> tolerance(jnp.bfloat16, 128) > 10 * tolerance(jnp.float32, 128)
      True
    """
    rounding = float(jnp.finfo(dtype).eps) / 2
    summing = 2 * float(jnp.finfo(jnp.float32).eps) * length**0.5
    return rounding + summing
