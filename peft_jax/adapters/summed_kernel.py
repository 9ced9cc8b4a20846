"""Multiplies by a kernel and a low-rank matrix at once, x (W + A B).

Adding (x A) B to the outputs of x W reads and writes them once more, and adding a gradient to that
of the inputs does the same. Where inputs and outputs together have more numbers than the kernel,
adding A B to the kernel moves less memory. The sum is computed again for the gradients, because
keeping it would take the kernel's memory again in every layer.

This is for float32 on a CPU. An accelerator rounds the sum to 16 bits before it multiplies, and so
loses changes of the kernel that are small beside it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from kernels_pallas.block_rotation import block_overlaps, is_partitioned, rotate_kernel
from kernels_pallas.dispatch import resolve
from kernels_pallas.target_device import target_platform
from peft_jax.core import Kernel
from peft_jax.core.kernel import gradient_of_kernel
from peft_jax.core.scopes import part

SMALLEST_SCALE = 1e-6
"""Magnitude that a smaller scale of an output counts as, because its gradient is divided by it."""


def prefer_summed_kernel(x: Float[Array, "*batch d_in"], base: Kernel) -> bool:
    """Returns whether the products below are faster than adding low-rank terms to activations.

    They are on one CPU, in float32, if inputs and outputs together have more numbers than the
    kernel. The answer is False if the caller requested an implementation of the kernels. It is
    given while a function is traced, and affects speed alone.
    """
    if not isinstance(base, jax.Array) or x.dtype != jnp.float32 or is_partitioned():
        return False
    if resolve(None) != "auto":
        return False
    d_in, d_out = base.shape
    tokens = x.size // max(d_in, 1)
    return target_platform() == "cpu" and tokens * (d_in + d_out) > d_in * d_out


@jax.custom_vjp
def summed_kernel_product(
    x: Float[Array, "*batch d_in"],
    kernel: Float[Array, "d_in d_out"],
    a: Float[Array, "d_in rank"],
    b: Float[Array, "rank d_out"],
) -> Float[Array, "*batch d_out"]:
    """Returns x (W + A B) in the dtype of `x`."""
    return jnp.matmul(x, _sum(kernel.astype(x.dtype), a, b))


@jax.custom_vjp
def rotated_kernel_sum_product(
    x: Float[Array, "*batch d_in"],
    blocks: Float[Array, "n B B"],
    kernel: Float[Array, "d_in d_out"],
    scale: Float[Array, " d_out"],
    a: Float[Array, "d_in rank"],
    b: Float[Array, "rank d_out"],
) -> Float[Array, "*batch d_out"]:
    """Returns x (blockdiag(blocks) W diag(scale) + A B) in the dtype of `x`.

    The gradient of the scale follows from the output y, which its reader often keeps anyway: with g
    its gradient, scale_j dscale_j = Σ_t g_tj y_tj - Σ_k B_kj dB_kj.

    Args:
      x: Activations [..., d_in] with d_in = n B.
      blocks: [n, B, B], orthogonal; the gradients rely on it, as `rotated_kernel_product`'s do.
      kernel: W [d_in, d_out].
      scale: [d_out]. A magnitude below `SMALLEST_SCALE` counts as that.
      a: A [d_in, rank].
      b: B [rank, d_out].
    """
    return jnp.matmul(
        x, _rotated_sum(x, blocks, kernel, away_from_zero(scale, SMALLEST_SCALE), a, b)
    )


@part("low_rank")
def _sum(kernel: Array, a: Array, b: Array) -> Float[Array, "d_in d_out"]:
    return kernel + jnp.matmul(a.astype(kernel.dtype), b.astype(kernel.dtype))


def _rotated_sum(
    x: Array, blocks: Array, kernel: Array, scale: Array, a: Array, b: Array
) -> Float[Array, "d_in d_out"]:
    return _sum((rotate_kernel(blocks, kernel) * scale).astype(x.dtype), a, b)


def away_from_zero(scale: Float[Array, " d_out"], least: float) -> Float[Array, " d_out"]:
    """Returns the scale, with magnitudes of at least `least`."""
    bound = jnp.asarray(least, scale.dtype)
    return jnp.where(jnp.abs(scale) < bound, jnp.copysign(bound, scale), scale)


@part("low_rank")
def _factor_gradients(
    x: Array, dy: Array, a: Array, b: Array
) -> tuple[Float[Array, "d_in rank"], Float[Array, "rank d_out"]]:
    """Returns the gradients of A and B."""
    x, dy = (rows.reshape(-1, rows.shape[-1]) for rows in (x, dy))
    # A CPU transposes x unless the thin product is transposed; see `low_rank_product`.
    da_t = jax.lax.optimization_barrier(jnp.matmul(jnp.matmul(dy, b.T.astype(x.dtype)).T, x))
    db = jnp.matmul(jnp.matmul(x, a.astype(x.dtype)).T, dy)
    return da_t.T.astype(a.dtype), db.astype(b.dtype)


def _gradient_of_rows(dy: Array, kernel: Array) -> Float[Array, "*batch d_in"]:
    return jax.lax.dot_general(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ())))


def _forward(x: Any, kernel: Any, a: Any, b: Any) -> tuple[Array, tuple[Any, ...]]:
    arrays = x.value, kernel.value, a.value, b.value
    return summed_kernel_product(*arrays), (*arrays, x.perturbed or None, kernel.perturbed or None)


def _backward(kept: tuple[Any, ...], dy: Any) -> tuple[Any, ...]:
    x, kernel, a, b, x_varies, kernel_varies = kept
    if isinstance(dy, SymbolicZero):
        return None, None, None, None
    summed = _sum(kernel.astype(x.dtype), a, b)
    dx = _gradient_of_rows(dy, summed) if x_varies else None
    dkernel = gradient_of_kernel(x, dy).astype(kernel.dtype) if kernel_varies else None
    return dx, dkernel, *_factor_gradients(x, dy, a, b)


summed_kernel_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _rotated_forward(
    x: Any, blocks: Any, kernel: Any, scale: Any, a: Any, b: Any
) -> tuple[Array, tuple[Any, ...]]:
    arrays = x.value, blocks.value, kernel.value, scale.value, a.value, b.value
    y = rotated_kernel_sum_product(*arrays)
    return y, (*arrays, y, kernel.perturbed or None)


def _rotated_backward(kept: tuple[Any, ...], dy: Any) -> tuple[Any, ...]:
    x, blocks, kernel, scale, a, b, y, kernel_varies = kept
    if isinstance(dy, SymbolicZero):
        return (None,) * 6
    scale = away_from_zero(scale, SMALLEST_SCALE)
    dx = _gradient_of_rows(dy, _rotated_sum(x, blocks, kernel, scale, a, b))
    da, db = _factor_gradients(x, dy, a, b)
    # With M the rotation, A's share of dx is (dy Bᵀ) Aᵀ, and so xᵀ dx = dM Mᵀ + dA Aᵀ.
    n, size, _ = blocks.shape
    shares = jnp.einsum("nir,njr->nij", da.reshape(n, size, -1), a.reshape(n, size, -1))
    dblocks = jnp.matmul(block_overlaps(x, dx, blocks) - shares, blocks).astype(blocks.dtype)
    tokens = tuple(range(dy.ndim - 1))
    dscale = (jnp.sum(dy * y, axis=tokens) - jnp.sum(b * db, axis=0)) / scale
    dkernel = None
    if kernel_varies:
        drotated = gradient_of_kernel(x, dy) * scale
        dkernel = rotate_kernel(jnp.swapaxes(blocks, -1, -2), drotated).astype(kernel.dtype)
    return dx, dblocks, dkernel, dscale.astype(scale.dtype), da, db


rotated_kernel_sum_product.defvjp(_rotated_forward, _rotated_backward, symbolic_zeros=True)
