"""Multiplies by frozen kernels of 8-bit integers, on the integer units of an accelerator.

x W with W = Q diag(s), where Q holds integers and s one scale per column. Every token of x is
rounded to integers with a step of its own, t = max|x| / 127, so that x ≈ t X. Then

    x W ≈ t (X Q) diag(s),

with X Q accumulated in 32-bit integers, without error. The units for 8-bit integers of TPU v5e,
v5p, v6e and 7x, and of NVIDIA GPUs, are about twice as fast as those for bfloat16.

The error is that of rounding x, at most t / 2 an entry. It depends on a token's largest entry:
features that are far larger than the others cost accuracy (Dettmers et al., 2022, arXiv
2208.07339). The backward pass treats rounding as the identity. It multiplies the gradient, in its
own dtype, by the dequantized kernel, so that gradients are not rounded.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8
from qwix import QArray

from peft_jax.core.quantized import dequantize

_LARGEST = 127.0


@jax.custom_vjp
def integer_product(x: Float[Array, "*batch d_in"], kernel: QArray) -> Float[Array, "*batch d_out"]:
    """Returns x W for a kernel in the format "w8a8", in the dtype of `x`.

    The kernel gets no gradient.
    """
    values, step = round_tokens(x)
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))
    sums = jax.lax.dot_general(values, kernel.qvalue, dimensions, preferred_element_type=jnp.int32)
    scale = kernel.scale[0].astype(jnp.float32)
    return (sums.astype(jnp.float32) * step * scale).astype(x.dtype)


def round_tokens(
    x: Float[Array, "*batch d_in"],
) -> tuple[Int8[Array, "*batch d_in"], Float32[Array, "*batch 1"]]:
    """Rounds every token to integers from -127 to 127 with a step of its own.

    Returns:
      Integers, and the steps. Their product differs from `x` by at most half a step.

    Example:
      >>> values, step = round_tokens(jnp.array([[0.5, -1.27, 0.0]]))
      >>> values.tolist(), round(float(step[0, 0]), 6)
      ([[50, -127, 0]], 0.01)
    """
    wide = x.astype(jnp.float32)
    step = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / _LARGEST
    # A token of zeros works with any step but zero, by which it would be divided.
    step = jnp.where(step == 0, 1.0, step)
    return jnp.round(wide / step).astype(jnp.int8), step


def _forward(x: Array, kernel: QArray) -> tuple[Array, QArray]:
    return integer_product(x, kernel), kernel


def _backward(kernel: QArray, dy: Array) -> tuple[Array, None]:
    dense = dequantize(kernel, dy.dtype)
    return jax.lax.dot_general(dy, dense, (((dy.ndim - 1,), (1,)), ((), ()))), None


integer_product.defvjp(_forward, _backward)
