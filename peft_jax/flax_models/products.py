"""Multiplies activations by kernels of any kind, as Flax's layers do."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from peft_jax.adapters import AdapterMethod
from peft_jax.core import AdaptedKernel, Kernel, linear
from peft_jax.flax_models.bound_kernel import BoundKernel, KernelUseError


def contract(
    x: Array, bound: BoundKernel, base: Array, axes: Sequence[int], batch: Sequence[int] = ()
) -> Array:
    """Contracts axes of activations with the inputs of a kernel, as `jax.lax.dot_general` does.

    Args:
      x: Activations.
      bound: Kernel.
      base: Its base, in the dtype of the product.
      axes: Axes of `x` that are contracted, in the order of the kernel's inputs.
      batch: Axes of `x` that belong to the kernel's batch axes, in their order.

    Returns:
      [*batch, *free, *outputs].
    """
    layout = bound.layout
    free = [axis for axis in range(x.ndim) if axis not in (*axes, *batch)]
    free_sizes = [x.shape[axis] for axis in free]
    rows = jnp.transpose(x, (*batch, *free, *axes))
    d_in = math.prod(layout.sizes(layout.inputs))
    if batch:
        rows = rows.reshape((-1, *free_sizes, d_in))
        y = jax.vmap(linear)(rows, bound.kernel(base))
    else:
        y = linear(rows.reshape((*free_sizes, d_in)), bound.kernel(base))
    return y.reshape((*layout.sizes(layout.batch), *free_sizes, *layout.sizes(layout.outputs)))


def convolve(conv: Any, x: Array, bound: BoundKernel, base: Array) -> Array:
    """Convolves with a kernel [*window, in, out], whose matrix is [prod(window) * in, out].

    A low-rank adapter is a convolution with A and a product with B, as in Hugging Face PEFT. Other
    methods, and dropout, map the windows of the input, which takes prod(window) times its memory.

    Args:
      conv: The layer, a Linen or an NNX `Conv`.
      x: Inputs [*batch, *space, in].
      bound: Kernel.
      base: Its base, in the dtype of the product.
    """
    kernel = bound.kernel(base)
    terms = None if _has_dropout(kernel) else low_rank_terms(kernel)
    if terms is not None:
        y = _convolve(conv, x, base)
        for a, b in terms:
            inner = _convolve(conv, x, a.reshape((*base.shape[:-1], -1)).astype(x.dtype))
            y = y + linear(inner, b)
        return y
    *window, d_in, _ = base.shape
    size = math.prod(window)
    # With one output for each input and position, a grouped convolution copies the windows.
    eye = jnp.eye(size, dtype=x.dtype).reshape((*window, 1, size))
    windows = _convolve(conv, x, jnp.tile(eye, d_in), groups=d_in)
    windows = windows.reshape((*windows.shape[:-1], d_in, size)).swapaxes(-1, -2)
    return linear(windows.reshape((*windows.shape[:-2], size * d_in)), kernel)


def _convolve(conv: Any, x: Array, kernel: Array, groups: int = 1) -> Array:
    """Returns the convolution of a layer with another kernel, without its bias."""
    layer = nn.Conv(
        features=kernel.shape[-1],
        kernel_size=kernel.shape[:-2],
        strides=conv.strides,
        padding=conv.padding,
        input_dilation=conv.input_dilation,
        kernel_dilation=conv.kernel_dilation,
        feature_group_count=groups,
        use_bias=False,
        dtype=x.dtype,
        precision=conv.precision,
    )
    y: Any = layer.apply({"params": {"kernel": kernel}}, x)
    return y


def look_up(ids: Int[Array, "..."], bound: BoundKernel, base: Array) -> Array:
    """Returns rows of an adapted table: the product of one-hot rows and the table.

    Args:
      ids: Numbers of rows.
      bound: Table [rows, features].
      base: Its base, in the dtype of the result.
    """
    y = jnp.take(base, ids, axis=0)
    for a, b in _table_terms(bound, base):
        y = y + linear(jnp.take(a, ids, axis=0).astype(y.dtype), b)
    return y


def attend(x: Array, bound: BoundKernel, base: Array) -> Array:
    """Returns products of activations with the rows of an adapted table.

    Args:
      x: Activations [..., features].
      bound: Table [rows, features].
      base: Its base, in the dtype of the product.
    """
    y = linear(x, base.T)
    for a, b in _table_terms(bound, base):
        y = y + linear(linear(x, b.T), a.T)
    return y


def low_rank_terms(kernel: Kernel) -> list[tuple[Array, Array]] | None:
    """Returns A and B of all adapters of a kernel; None if one is no low-rank product."""
    terms: list[tuple[Array, Array]] = []
    while isinstance(kernel, AdaptedKernel):
        if not isinstance(kernel.method, AdapterMethod):
            return None
        factors = kernel.method.low_rank_factors(kernel.arrays)
        if factors is None:
            return None
        terms.append(factors)
        kernel = kernel.base
    return terms


def _table_terms(bound: BoundKernel, base: Array) -> list[tuple[Array, Array]]:
    kernel = bound.kernel(base)
    terms = low_rank_terms(kernel)
    if terms is None:
        raise KernelUseError(
            f"{bound.name} is an embedding, which takes methods that add a low-rank product and do"
            " not start from the gradient, such as LoRA; leave it out with exclude_modules, or"
            " train it in full with modules_to_save"
        )
    return terms


def _has_dropout(kernel: Kernel) -> bool:
    if not isinstance(kernel, AdaptedKernel):
        return False
    return kernel.dropout_key is not None or _has_dropout(kernel.base)
