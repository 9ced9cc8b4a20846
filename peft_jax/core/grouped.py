"""Multiplies each row by the kernel of its group: the linear maps of a mixture of experts.

Rows are sorted by group, and group g has `sizes[g]` of them. No row is dropped, and groups are not
padded to a common size, so that the arithmetic is that of the rows. Accelerators compute JAX's
ragged product. On a CPU it compiles to products of all rows with all kernels, so a CPU multiplies
blocks of rows in a loop instead.

Axes: M rows, E groups.
"""

import dataclasses
import functools
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int
from qwix import QArray

from peft_jax.core.kernel import AdaptedKernel, Kernel
from peft_jax.core.product_names import name_product
from peft_jax.core.quantized import dequantize

_BLOCKS = (8, 128)
"""Smallest and largest number of rows that a CPU multiplies at once."""


@runtime_checkable
class GroupedMethod(Protocol):
    """Interface of an adapter method that can be bound to the kernels of groups."""

    spans_groups: bool
    """True if all groups share the arrays, which then have no axis of groups."""

    def project_groups(
        self,
        x: Float[Array, "rows d_in"],
        base: Kernel,
        arrays: Any,
        sizes: Int[Array, " groups"],
    ) -> Float[Array, "rows d_out"]:
        """Returns the adapted linear maps.

        `base` has a leading axis of groups, and so have `arrays` unless the method spans groups.
        """


def grouped_linear(
    x: Float[Array, "rows d_in"], kernel: Kernel, sizes: Int[Array, " groups"]
) -> Float[Array, "rows d_out"]:
    """Applies the kernel of each row's group: y_i = x_i W_g.

    Args:
      x: Rows [M, in], sorted by group.
      kernel: Kernels [E, in, out]: an array, a quantized array or an `AdaptedKernel`. An array is
        cast to the dtype of `x`.
      sizes: Number of rows of each group, [E].

    Returns:
      Rows [M, out] in the dtype of `x`. Rows beyond the last group are not defined.

    Example:
      >>> kernels = jnp.stack([jnp.eye(2), 10 * jnp.eye(2)])
      >>> grouped_linear(jnp.ones((3, 2)), kernels, jnp.array([1, 2])).tolist()
      [[1.0, 1.0], [10.0, 10.0], [10.0, 10.0]]
    """
    if isinstance(kernel, AdaptedKernel):
        method = cast(GroupedMethod, kernel.method)
        return method.project_groups(x, kernel.base, kernel.arrays, sizes)
    if isinstance(kernel, QArray):
        return name_product(_quantized_product(x, kernel, sizes))
    return name_product(_product(x, kernel.astype(x.dtype), sizes))


@dataclasses.dataclass(frozen=True)
class _ByGroup:
    """Method of a kernel whose product is that of groups; its arrays are the groups' sizes."""

    def project(
        self,
        x: Float[Array, "rows d_in"],
        base: Kernel,
        arrays: Int[Array, " groups"],
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "rows d_out"]:
        del dropout_key
        is_row = jnp.arange(x.shape[0]) < jnp.sum(arrays)

        def defined(rows: Array) -> Array:
            """Sets rows beyond the last group to zero, whose products and gradients are not."""
            return jnp.where(is_row[:, None], rows, jnp.zeros_like(rows))

        return defined(grouped_linear(defined(x), base, arrays))

    def merge(self, base: Kernel, arrays: Any) -> Float[Array, "d_in d_out"]:
        raise ValueError(
            "the kernels of several groups are not one kernel, so that a method that reads its base"
            " cannot be shared by them; its check_shared_experts should say so"
        )


def kernel_of_groups(kernels: Kernel, sizes: Int[Array, " groups"]) -> AdaptedKernel:
    """Returns a kernel by which `linear` multiplies each row by the kernel of its group.

    So a method whose `project` multiplies by its base with `linear` alone adapts the kernels of all
    groups by the same arrays.

    Args:
      kernels: Kernels [E, in, out].
      sizes: Number of rows of each group, [E]. Products of rows beyond the last group are zero.

    Example:
      >>> from peft_jax.core import linear
      >>> kernels = jnp.stack([jnp.eye(2), 10 * jnp.eye(2)])
      >>> linear(jnp.ones((4, 2)), kernel_of_groups(kernels, jnp.array([1, 2]))).tolist()
      [[1.0, 1.0], [10.0, 10.0], [10.0, 10.0], [0.0, 0.0]]
    """
    return AdaptedKernel(base=kernels, arrays=sizes, method=_ByGroup())


@functools.partial(jax.checkpoint, prevent_cse=True)
def _quantized_product(x: Array, kernel: QArray, sizes: Array) -> Array:
    """Returns the product with quantized kernels, which the backward pass dequantizes again."""
    return _product(x, dequantize(kernel, x.dtype), sizes)


@jax.custom_vjp
def _product(x: Array, kernel: Array, sizes: Array) -> Array:
    return _rows_by_kernels(x, kernel, sizes)


def _product_forward(x: Any, kernel: Any, sizes: Any) -> tuple[Array, tuple[Any, Any, Array]]:
    """Returns the product and its residuals; frozen kernels need no `x` for a gradient."""
    kept = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
    return _product(x.value, kernel.value, sizes.value), (*kept, sizes.value)


def _product_backward(residuals: tuple[Any, Any, Array], dy: Any) -> tuple[Any, Any, None]:
    x, kernel, sizes = residuals
    if isinstance(dy, SymbolicZero):
        return None, None, None
    dx = None if kernel is None else _rows_by_kernels(dy, kernel, sizes, transposed=True)
    return dx, None if x is None else _gradient_of_kernels(x, dy, sizes), None


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def _rows_by_kernels(x: Array, kernel: Array, sizes: Array, *, transposed: bool = False) -> Array:
    """Returns x_i W_g, or x_i W_gᵀ."""
    return jax.lax.platform_dependent(
        x,
        kernel,
        sizes,
        cpu=functools.partial(multiply_in_blocks, transposed=transposed),
        default=functools.partial(multiply_ragged, transposed=transposed),
    )


def multiply_ragged(x: Array, kernel: Array, sizes: Array, *, transposed: bool) -> Array:
    """Returns x_i W_g or x_i W_gᵀ as one ragged product."""
    summed = 2 if transposed else 1
    return jax.lax.ragged_dot_general(x, kernel, sizes, _dimensions((1,), (summed,), groups=(0,)))


def multiply_in_blocks(x: Array, kernel: Array, sizes: Array, *, transposed: bool) -> Array:
    """Returns x_i W_g or x_i W_gᵀ, block by block."""
    summed, kept = (1, 0) if transposed else (0, 1)
    block = _block_size(x, sizes)
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def multiply(y: Array, first: Array, group: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(padded, first, block)
        own = jax.lax.dynamic_index_in_dim(kernel, group, keepdims=False)
        product = jax.lax.dot_general(rows, own, (((1,), (summed,)), ((), ())))
        # Rows after the group's last are overwritten by the groups that they belong to.
        return jax.lax.dynamic_update_slice_in_dim(y, product, first, axis=0)

    y = jnp.zeros((x.shape[0] + block, kernel.shape[1 + kept]), x.dtype)
    return _over_blocks(multiply, y, sizes, block)[: x.shape[0]]


def _gradient_of_kernels(x: Array, dy: Array, sizes: Array) -> Float[Array, "groups d_in d_out"]:
    """Returns xᵀ dy summed over the rows of each group."""
    return jax.lax.platform_dependent(x, dy, sizes, cpu=sum_in_blocks, default=sum_ragged)


def sum_ragged(x: Array, dy: Array, sizes: Array) -> Float[Array, "groups d_in d_out"]:
    """Returns each group's xᵀ dy as one ragged product."""
    return jax.lax.ragged_dot_general(x, dy, sizes, _dimensions((0,), (0,), groups=()))


def sum_in_blocks(x: Array, dy: Array, sizes: Array) -> Float[Array, "groups d_in d_out"]:
    """Returns each group's xᵀ dy, block by block."""
    block = _block_size(x, sizes)
    ends = jnp.cumsum(sizes)
    x, dy = (jnp.pad(rows, ((0, block), (0, 0))) for rows in (x, dy))

    def add(total: Array, first: Array, group: Array) -> Array:
        own, of_own = (jax.lax.dynamic_slice_in_dim(rows, first, block) for rows in (x, dy))
        inside = first + jnp.arange(block, dtype=first.dtype) < ends[group]
        own = jnp.where(inside[:, None], own, jnp.zeros_like(own))
        update = jax.lax.dot_general(
            own, of_own, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        so_far = jax.lax.dynamic_index_in_dim(total, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, so_far + update, group, axis=0)

    start = jnp.zeros((sizes.shape[0], x.shape[1], dy.shape[1]), jnp.float32)
    return _over_blocks(add, start, sizes, block).astype(x.dtype)


def _dimensions(
    left: tuple[int, ...], right: tuple[int, ...], *, groups: tuple[int, ...]
) -> jax.lax.RaggedDotDimensionNumbers:
    """Returns which axes are summed, with the rows as the ragged axis."""
    return jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=((left, right), ((), ())),
        lhs_ragged_dimensions=(0,),
        rhs_group_dimensions=groups,
    )


def _block_size(x: Array, sizes: Array) -> int:
    """Returns a power of two near the mean number of rows of a group, within `_BLOCKS`."""
    least, most = _BLOCKS
    mean = max(1, x.shape[0] // sizes.shape[0])
    return min(max(1 << (mean - 1).bit_length(), least), most)


def _over_blocks(step: Any, start: Array, sizes: Array, block: int) -> Array:
    """Runs `step` on every block of rows of every group, in order.

    Args:
      step: Maps the result so far, a block's first row and its group to the next result.
      start: Result before the first block.
      sizes: Number of rows of each group.
      block: Number of rows of a block.
    """
    blocks = -(-sizes // block)
    last, first_row = jnp.cumsum(blocks), jnp.cumsum(sizes) - sizes

    def run(index: Array, carry: Array) -> Array:
        group = jnp.searchsorted(last, index, side="right")
        within = index - (last[group] - blocks[group])
        return step(carry, first_row[group] + within * block, group)

    return jax.lax.fori_loop(0, last[-1], run, start)
