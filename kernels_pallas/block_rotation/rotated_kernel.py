"""Multiplies by a rotation and a kernel, x blockdiag(blocks) W, by rotating the kernel.

(x R) W equals x (R W). The first form rotates tokens, the second rotates the kernel's columns. With
fewer columns than tokens, as in training on a CPU, the second is less work. A kernel's rows also
lie block by block already. Activations must be reordered for a batched product and back, which
takes a CPU longer than the rotation itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType
from jaxtyping import Array, Float

from kernels_pallas.block_rotation.matrices import from_matrices, to_matrices
from kernels_pallas.block_rotation.xla import by_block
from kernels_pallas.dispatch import log_once, resolve
from kernels_pallas.target_device import target_platform

COLUMNS_PER_TOKEN = {"cpu": 1, "gpu": 2, "tpu": 1}
"""Number of kernel columns per token below which rotating the kernel is faster, by platform.

On a GPU two batched products of blocks then move the kernel and no activations. On an H200 with
8,192 tokens and a kernel of 4,096 x 14,336, product and gradients take 2.60 ms this way. With the
tokens rotated by the Pallas kernel they take 2.74 ms (one trial by hand; docs/kernels.md has the
table). For a TPU it follows from the bytes that the compiled program moves; no TPU was timed."""

_LANES = 128
"""Size of the matrices that small blocks are multiplied in on a TPU."""


def prefer_rotated_kernel(
    x: Float[Array, "*batch d_in"], kernel: Float[Array, "d_in d_out"]
) -> bool:
    """Returns whether rotating the kernel is faster than rotating `x`, before their product.

    It is faster on one CPU or TPU with more tokens than columns, and on one GPU with more than half
    as many. Within `jax.shard_map`, the numbers are those of the device's shards. The answer is
    False if the caller requested an implementation. It is given while a function is traced, for the
    platform that `target_platform` returns, and affects speed alone.
    """
    tokens = x.size // max(x.shape[-1], 1)
    if is_partitioned():
        return False
    platform = target_platform()
    columns_per_token = COLUMNS_PER_TOKEN.get(platform)
    faster = (
        columns_per_token is not None
        and resolve(None) == "auto"
        and kernel.shape[-1] < columns_per_token * tokens
    )
    if faster:
        log_once(
            f"block_rotation of {tokens} tokens before a kernel {list(kernel.shape)} on {platform}:"
            f" rotates the kernel (fewer than {columns_per_token} columns per token)"
        )
    return faster


def is_partitioned() -> bool:
    """Returns whether the compiler may shard arrays: several devices outside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return False
    axes = zip(mesh.shape.values(), mesh.axis_types, strict=True)
    return any(size > 1 and kind is not AxisType.Manual for size, kind in axes)


@jax.custom_vjp
def rotated_kernel_product(
    x: Float[Array, "*batch d_in"],
    blocks: Float[Array, "n B B"],
    kernel: Float[Array, "d_in d_out"],
) -> Float[Array, "*batch d_out"]:
    """Returns x blockdiag(blocks) W, computed as x (blockdiag(blocks) W).

    The rotated kernel is computed in float32 and rounded once. A TPU rounds the blocks to bfloat16
    first, as in every product of float32 arrays at the default precision.

    Args:
      x: Activations [..., d_in] with d_in = n B.
      blocks: [n, B, B] float32, orthogonal. The backward pass relies on it: it computes the
        gradient of x R from that of x as dx R, which for any other R would need its inverse.
      kernel: [d_in, d_out].

    Returns:
      [..., d_out] in the dtype of `x`.
    """
    return jnp.matmul(x, rotate_kernel(blocks, kernel).astype(x.dtype))


@jax.named_scope("rotation")
def rotate_kernel(
    blocks: Float[Array, "n B B"], kernel: Float[Array, "d_in d_out"]
) -> Float[Array, "d_in d_out"]:
    """Returns blockdiag(blocks) W in float32."""
    if size := _matrix_size(blocks):
        blocks = to_matrices(blocks, size, kernel.shape[0], blocks.dtype)
    rows = kernel.reshape(*blocks.shape[:2], kernel.shape[-1]).astype(blocks.dtype)
    return jnp.matmul(blocks, rows).reshape(kernel.shape)


@jax.named_scope("rotation")
def block_overlaps(
    x: Float[Array, "*batch d_in"], dx: Float[Array, "*batch d_in"], blocks: Float[Array, "n B B"]
) -> Float[Array, "n B B"]:
    """Returns the blocks on the diagonal of xᵀ dx, summed over tokens, in float32.

    Args:
      x: Activations.
      dx: Their gradient.
      blocks: Blocks whose sizes the result has.
    """
    if not (size := _matrix_size(blocks)):
        return jax.lax.dot_general(
            by_block(x, blocks),
            by_block(dx, blocks),
            (((1,), (1,)), ((0,), (0,))),
            preferred_element_type=jnp.float32,
        )
    x, dx = (a.reshape(-1, a.shape[-1] // size, size) for a in (x, dx))
    matrices = jax.lax.dot_general(
        x, dx, (((0,), (0,)), ((1,), (1,))), preferred_element_type=jnp.float32
    )
    return from_matrices(matrices, blocks.shape)


def _matrix_size(blocks: Array) -> int:
    """Returns the size of the matrices that hold blocks on a TPU; 0 for products as elsewhere."""
    n, size, _ = blocks.shape
    if target_platform() != "tpu":
        return 0
    if size % _LANES == 0:
        return size
    return _LANES if _LANES % size == 0 and n * size % _LANES == 0 else 0


def _forward(x: Any, blocks: Any, kernel: Any) -> tuple[Array, tuple[Any, ...]]:
    arrays = x.value, blocks.value, kernel.value
    return rotated_kernel_product(*arrays), (*arrays, kernel.perturbed or None)


def _backward(residuals: tuple[Any, ...], dy: Any) -> tuple[Any, ...]:
    x, blocks, kernel, kernel_is_trainable = residuals
    if isinstance(dy, SymbolicZero):
        return None, None, None
    # Recomputed, because keeping it would cost the kernel's memory again in every layer.
    rotated = rotate_kernel(blocks, kernel).astype(x.dtype)
    dx = jax.lax.dot_general(dy, rotated, (((dy.ndim - 1,), (1,)), ((), ())))
    # With g the gradient of x R, dblocks = xᵀ g and dx = g Rᵀ, so xᵀ dx = dblocks Rᵀ.
    dblocks = jnp.matmul(block_overlaps(x, dx, blocks), blocks).astype(blocks.dtype)
    dkernel = None
    if kernel_is_trainable:
        rows, columns = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
        drotated = jax.lax.dot_general(rows, columns, (((0,), (0,)), ((), ())))
        dkernel = rotate_kernel(jnp.swapaxes(blocks, -1, -2), drotated).astype(kernel.dtype)
    return dx, dblocks, dkernel


rotated_kernel_product.defvjp(_forward, _backward, symbolic_zeros=True)
