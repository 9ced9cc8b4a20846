"""Applies linear maps through plain, quantized and adapted kernels.

Every linear map of a model goes through `linear(x, kernel)`. A kernel is an array, a quantized
array (`peft_jax.core.quantized`), or an `AdaptedKernel`. An `AdaptedKernel` is a pytree node of a
frozen base kernel, an adapter's arrays and the adapter method. Because the node is a pytree, it
slices under `jax.lax.scan`, shards under `jax.jit`, differentiates and checkpoints as any array
does. Nodes also nest: an adapter over an adapted or a quantized kernel needs no new code.
"""

import dataclasses
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int
from qwix import QArray

from peft_jax.core.integer_products import integer_product
from peft_jax.core.product_names import name_product
from peft_jax.core.quantized import (
    INTEGER_FORMATS,
    dequantize,
    format_of,
    quantized_product,
)

Kernel = Any
"""An array or a `QArray` [in, out], or an `AdaptedKernel` over one; stacked: [layers, in, out]."""


@runtime_checkable
class Method(Protocol):
    """Interface of the adapter method bound to an `AdaptedKernel`."""

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Any,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Returns the adapted linear map of the activations `x`."""

    def merge(self, base: Kernel, arrays: Any) -> Float[Array, "d_in d_out"]:
        """Returns one array equivalent to `project`, for one unstacked kernel."""


@runtime_checkable
class ShardedMethod(Method, Protocol):
    """Interface of a method whose `project` can run on each device's shard of the columns."""

    def local_axes(self, d_in: str, d_out: str) -> Any:
        """Returns the logical axes of the arrays, given those of the kernel.

        With them, `project` runs on each device's columns, with all rows of the kernel. None leaves
        partitioning to the compiler.
        """

    def prepared_axes(self, d_in: str, d_out: str) -> Any:
        """Returns the logical axes of the arrays; None if they are not known."""


@struct.dataclass
class AdaptedKernel:
    """A frozen kernel with an adapter bound to it; a pytree.

    Attributes:
      base: Base kernel, [in, out] or stacked [layers, in, out].
      arrays: Adapter arrays as `method` uses them; stacked if `base` is.
      dropout_key: Random key (stacked: [layers] keys) while training with dropout, else None.
      method: Adapter method; static.
    """

    base: Kernel
    arrays: Any
    dropout_key: jax.Array | None = None
    method: Method = struct.field(pytree_node=False, default=None)

    @property
    def T(self) -> "AdaptedKernel":  # noqa: N802 - named as that of arrays, which heads transpose
        """Kernel [embed, vocab] of a head that is tied to this embedding [vocab, embed]."""
        return AdaptedKernel(
            base=self.base.T, arrays=self.arrays, method=_TransposedMethod(self.method)
        )


@runtime_checkable
class TableMethod(Method, Protocol):
    """Interface of the method of an adapted embedding, whose kernel is a table [vocab, embed]."""

    def lookup(
        self, tokens: Int[Array, "*batch"], base: Kernel, arrays: Any
    ) -> Float[Array, "*batch embed"]:
        """Returns rows of the adapted table, in its base's dtype."""

    def transposed_project(
        self, x: Float[Array, "*batch embed"], base: Kernel, arrays: Any
    ) -> Float[Array, "*batch vocab"]:
        """Returns the product with the transposed table, given the base's transposed table."""


@dataclasses.dataclass(frozen=True)
class _TransposedMethod:
    """Method of a tied head, over an adapted embedding."""

    of_table: Any

    def project(
        self,
        x: Float[Array, "*batch embed"],
        base: Kernel,
        arrays: Any,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch vocab"]:
        del dropout_key
        return self.of_table.transposed_project(x, base, arrays)

    def merge(self, base: Float[Array, "embed vocab"], arrays: Any) -> Float[Array, "embed vocab"]:
        return self.of_table.merge(base.T, arrays).T


def take_rows(table: Kernel, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch embed"]:
    """Returns rows of an embedding's table [vocab, embed], in the table's dtype.

    Args:
      table: An array, or an `AdaptedKernel` over one.
      tokens: Numbers of rows.
    """
    if isinstance(table, AdaptedKernel):
        return cast(TableMethod, table.method).lookup(tokens, table.base, table.arrays)
    return jnp.take(table, tokens, axis=0)


def linear(x: Float[Array, "*batch d_in"], kernel: Kernel) -> Float[Array, "*batch d_out"]:
    """Applies a kernel of any kind to row vectors: y = x W.

    Args:
      x: Activations, [..., in].
      kernel: Kernel [in, out]. An array is cast to the dtype of `x`.

    Returns:
      Outputs [..., out] in the dtype of `x`.
    """
    if isinstance(kernel, AdaptedKernel):
        return kernel.method.project(x, kernel.base, kernel.arrays, dropout_key=kernel.dropout_key)
    if isinstance(kernel, QArray):
        if format_of(kernel) in INTEGER_FORMATS:
            return name_product(integer_product(x, kernel))
        return name_product(quantized_product(x, kernel))
    return name_product(_product(x, kernel.astype(x.dtype)))


@jax.custom_vjp
def _product(
    x: Float[Array, "*batch d_in"], kernel: Float[Array, "d_in d_out"]
) -> Float[Array, "*batch d_out"]:
    """Returns x W, with a gradient for W in the memory order of W.

    JAX's own rule computes (dyᵀ x)ᵀ, and a CPU spends longer on the transpose than on the product.
    """
    return jnp.matmul(x, kernel)


def _product_forward(x: Any, kernel: Any) -> tuple[Array, tuple[Any, Any]]:
    """Returns the product and its residuals; a frozen kernel needs no `x` for a gradient."""
    kept = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
    return _product(x.value, kernel.value), kept


def _product_backward(residuals: tuple[Any, Any], dy: Any) -> tuple[Any, Any]:
    x, kernel = residuals
    if isinstance(dy, SymbolicZero):
        return None, None
    dx = dkernel = None
    if kernel is not None:
        dx = jax.lax.dot_general(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ())))
    if x is not None:
        dkernel = gradient_of_kernel(x, dy)
    return dx, dkernel


def gradient_of_kernel(
    x: Float[Array, "*batch d_in"], dy: Float[Array, "*batch d_out"]
) -> Float[Array, "d_in d_out"]:
    """Returns xᵀ dy summed over tokens."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        # With one row axis, a CPU's product reads x without a transpose. Over several devices, rows
        # and tokens may be sharded along different mesh axes, and merging them would gather them.
        x, dy = (rows.reshape(-1, rows.shape[-1]) for rows in (x, dy))
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def dense(kernel: Array | QArray) -> Array:
    """Returns a kernel without an adapter as one array, in its own or its scales' dtype."""
    return dequantize(kernel) if isinstance(kernel, QArray) else kernel
