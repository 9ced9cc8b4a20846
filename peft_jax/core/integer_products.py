"""Multiplies by frozen kernels of 8-bit integers, on the integer units of an accelerator.

x W with W = Q diag(s), where Q holds integers and s one scale per column. Every token of x is
rounded to integers with a step of its own, t = max|x| / 127, so that x ≈ t X. Then

    x W ≈ t (X Q) diag(s),

with X Q accumulated in 32-bit integers, without error. The units for 8-bit integers of TPU v5e,
v5p, v6e and 7x, and of NVIDIA GPUs, are about twice as fast as those for bfloat16.

The error is that of rounding x, at most t / 2 an entry. It depends on a token's largest entry:
features that are far larger than the others cost accuracy (Dettmers et al., 2022, arXiv
2208.07339). The backward pass treats rounding as the identity. In the format "w8a8" it multiplies
the gradient, in its own dtype, by the dequantized kernel, so that gradients are not rounded. In the
format "w8a8g8" it multiplies integers too: a column's scale first goes into the gradient,

    dy Wᵀ = (dy diag(s)) Qᵀ ≈ u (Y Qᵀ),

where dy diag(s) ≈ u Y is rounded as x is, token by token. No kernel is dequantized.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8
from qwix import QArray

from peft_jax.core.quantized import dequantize, format_of

Partition = Callable[[Array, QArray], Array | None]
"""Multiplies on each device's shards; returns None where the compiler should partition."""

_LARGEST = 127.0
_partition = contextvars.ContextVar[Partition | None]("peft_jax_integer_partition", default=None)


@contextlib.contextmanager
def partition_integers(partition: Partition) -> Iterator[None]:
    """Sets how products are partitioned over a mesh, while they are traced inside."""
    token = _partition.set(partition)
    try:
        yield
    finally:
        _partition.reset(token)


def integer_product(x: Float[Array, "*batch d_in"], kernel: QArray) -> Float[Array, "*batch d_out"]:
    """Returns x W for a kernel in the format "w8a8" or "w8a8g8", in the dtype of `x`.

    The kernel gets no gradient. Over a mesh, tokens may be rounded part by part; see
    `partition_integers`.
    """
    partition = _partition.get()
    found = None if partition is None else partition(x, kernel)
    return local_integer_product(x, kernel) if found is None else found


@jax.custom_vjp
def local_integer_product(
    x: Float[Array, "*batch d_in"], kernel: QArray
) -> Float[Array, "*batch d_out"]:
    """Returns x W with one step for all features of a token."""
    values, step = round_tokens(x)
    sums = _sums(values, kernel.qvalue, axis=0)
    return (sums * step * kernel.scale[0].astype(jnp.float32)).astype(x.dtype)


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


def _sums(
    values: Int8[Array, "*batch _"], kernel: Int8[Array, "d_in d_out"], *, axis: int
) -> Float32[Array, "*batch _"]:
    """Returns exact sums of products of integers over an axis of the kernel."""
    dimensions = (((values.ndim - 1,), (axis,)), ((), ()))
    sums = jax.lax.dot_general(values, kernel, dimensions, preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32)


def _forward(x: Array, kernel: QArray) -> tuple[Array, QArray]:
    return local_integer_product(x, kernel), kernel


def _backward(kernel: QArray, dy: Array) -> tuple[Array, None]:
    if format_of(kernel) == "w8a8g8":
        values, step = round_tokens(dy.astype(jnp.float32) * kernel.scale[0].astype(jnp.float32))
        return (_sums(values, kernel.qvalue, axis=1) * step).astype(dy.dtype), None
    dense = dequantize(kernel, dy.dtype)
    return jax.lax.dot_general(dy, dense, (((dy.ndim - 1,), (1,)), ((), ()))), None


local_integer_product.defvjp(_forward, _backward)
