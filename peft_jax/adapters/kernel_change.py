"""Multiplies by a kernel and by a change of its size, of which only some columns are formed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from qwix import QArray

from peft_jax.core import AdaptedKernel, Kernel, dense, format_of, linear
from peft_jax.core.quantized import INTEGER_FORMATS
from peft_jax.core.scopes import part

PIECES = 8
"""Number of pieces of a change, unless they would have few columns."""
MIN_COLUMNS = 256
"""Smallest number of columns of a piece, with which products still fill a device."""

Change = Callable[
    [Float[Array, "d_in columns"] | None, Int[Array, ""], int], Float[Array, "d_in columns"]
]
"""A function of (columns of W, index of the first, their number) to the same columns of Δ."""


def changed_product(
    x: Float[Array, "*batch d_in"],
    base: Kernel,
    change: Change,
    *,
    inputs: Float[Array, "*batch d_in"],
    of_kernel: bool,
) -> Float[Array, "*batch d_out"]:
    """Returns x W + x' Δ, where Δ has the size of W and depends on it or not.

    Δ is formed in up to `PIECES` pieces of columns, and again in the backward pass. So no array of
    the kernel's size is held. A change that depends on the kernel is as sharded as the kernel, so
    that over several devices it is formed at once.

    In float32, x (W + Δ) is one product. 16 bits would round W + Δ to W where Δ is small, and a
    base in an integer format rounds inputs, so that both are multiplied apart there.

    Args:
      x: Inputs of W.
      base: Kernel W.
      change: Function that forms columns of Δ, in float32. It is given columns of W in float32, or
        None if the change does not depend on them and they are not at hand.
      inputs: Inputs x' of Δ, which are `x` unless some are dropped.
      of_kernel: Whether the change depends on the kernel.
    """
    d_out = _columns(base)
    on_mesh = jax.sharding.get_abstract_mesh().size > 1
    at_once = on_mesh and of_kernel
    together = (
        inputs is x and x.dtype == jnp.float32 and _is_linear(base) and (of_kernel or not on_mesh)
    )
    kernel = _without_adapters(base) if of_kernel or together else None
    width = d_out if at_once else min(d_out, max(MIN_COLUMNS, -(-d_out // PIECES)))

    def product(first: Int[Array, ""]) -> Float[Array, "*batch columns"]:
        own = None if kernel is None else _slice(kernel, first, width)
        difference = change(own, first, width)
        return linear(inputs, own + difference if together and own is not None else difference)

    y = _join(product if together else part("low_rank")(product), d_out, width)
    return y if together else linear(x, base) + y


def _join(
    product: Callable[[Int[Array, ""]], Float[Array, "*batch columns"]], d_out: int, width: int
) -> Float[Array, "*batch d_out"]:
    """Returns the outputs of all pieces, one at a time.

    The last piece begins early, so that all have one width. Its first outputs are left out.
    """
    count = -(-d_out // width)
    if count == 1:
        return jax.checkpoint(product)(jnp.zeros((), jnp.int32))
    firsts = jnp.minimum(jnp.arange(count, dtype=jnp.int32) * width, d_out - width)
    pieces = jax.lax.map(jax.checkpoint(product, prevent_cse=False), firsts)
    whole = jnp.moveaxis(pieces[:-1], 0, -2)
    whole = whole.reshape(*whole.shape[:-2], -1)
    return jnp.concatenate([whole, pieces[-1, ..., count * width - d_out :]], axis=-1)


def _slice(
    kernel: Array | QArray, first: Int[Array, ""], width: int
) -> Float[Array, "d_in columns"]:
    """Returns columns of a kernel in float32."""
    columns = jax.tree.map(
        lambda part: jax.lax.dynamic_slice_in_dim(part, first, width, axis=-1), kernel
    )
    return dense(columns).astype(jnp.float32)


def _is_linear(base: Kernel) -> bool:
    """Returns whether `linear` multiplies by the entries of a base as they are."""
    if isinstance(base, QArray):
        return format_of(base) not in INTEGER_FORMATS
    return not isinstance(base, AdaptedKernel)


def _without_adapters(base: Kernel) -> Any:
    """Returns an array or a quantized array: a base whose adapters are merged."""
    if not isinstance(base, AdaptedKernel):
        return base
    return base.method.merge(dense(_without_adapters(base.base)), base.arrays)


def _columns(base: Kernel) -> int:
    """Returns the number of columns of a base."""
    while isinstance(base, AdaptedKernel):
        base = base.base
    return base.shape[-1]
