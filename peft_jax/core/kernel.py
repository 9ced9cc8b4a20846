"""A kernel is whatever knows how to multiply.

Every linear map of a model goes through `linear(x, kernel)`. A kernel is an array, a quantized
array (`peft_jax.core.quantized`), or an `AdaptedKernel`: a pytree node of a frozen base kernel, an
adapter's arrays and the method that knows what to do with them. Because the node is a pytree it
slices under `jax.lax.scan`, shards under `jax.jit`, differentiates and checkpoints as any array
does, and it nests: an adapter over an adapted or a quantized kernel needs no new code.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float
from qwix import QArray

from peft_jax.core.quantized import dequantize, quantized_product

LINEAR_OUTPUT = "linear output"
"""What a linear map's output is called where a rematerialization policy asks for it."""

Kernel = Any
"""An array or a `QArray`, [in, out] (or stacked [layers, in, out]), or an `AdaptedKernel` over one.
"""


@runtime_checkable
class Method(Protocol):
    """What an `AdaptedKernel` asks of the adapter method bound to it."""

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Any,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """The adapted linear map of the activations `x`."""

    def merge(self, base: Kernel, arrays: Any) -> Float[Array, "d_in d_out"]:
        """The one array that computes what `project` computes, for one (unstacked) kernel."""


@struct.dataclass
class AdaptedKernel:
    """A frozen kernel with an adapter bound to it; a pytree.

    Attributes:
      base: the kernel underneath, [in, out] or stacked [layers, in, out].
      arrays: the adapter's arrays as its method multiplies by them; stacked as `base` is.
      dropout_key: a random key (stacked: [layers] keys) while training with dropout, else None.
      method: the adapter method; static.
    """

    base: Kernel
    arrays: Any
    dropout_key: jax.Array | None = None
    method: Method = struct.field(pytree_node=False, default=None)


def linear(x: Float[Array, "*batch d_in"], kernel: Kernel) -> Float[Array, "*batch d_out"]:
    """A linear map of row vectors, y = x W, through whatever kind of kernel.

    Args:
      x: activations, [..., in].
      kernel: an array [in, out], cast to the dtype of `x`, a quantized one, or an `AdaptedKernel`.

    Returns:
      [..., out] in the dtype of `x`.
    """
    if isinstance(kernel, AdaptedKernel):
        return kernel.method.project(x, kernel.base, kernel.arrays, dropout_key=kernel.dropout_key)
    if isinstance(kernel, QArray):
        return quantized_product(x, kernel)
    return checkpoint_name(_product(x, kernel.astype(x.dtype)), LINEAR_OUTPUT)


@jax.custom_vjp
def _product(
    x: Float[Array, "*batch d_in"], kernel: Float[Array, "d_in d_out"]
) -> Float[Array, "*batch d_out"]:
    """The product x W, whose gradient with respect to W comes out as W lies.

    JAX's own rule makes it as (dyᵀ x)ᵀ, and a CPU spends longer on turning that over than on the
    product.
    """
    return jnp.matmul(x, kernel)


def _product_forward(x: Any, kernel: Any) -> tuple[Array, tuple[Any, Any]]:
    """The product, and what its gradients are made of; of a frozen kernel there is none."""
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
        dkernel = _gradient_of_kernel(x, dy)
    return dx, dkernel


def _gradient_of_kernel(
    x: Float[Array, "*batch d_in"], dy: Float[Array, "*batch d_out"]
) -> Float[Array, "d_in d_out"]:
    """The sum over tokens of xᵀ dy."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        # With one axis of rows a CPU's product reads x as it lies. Over several devices rows and
        # tokens may be cut along different axes of the mesh, and to merge them is to gather them.
        x, dy = (rows.reshape(-1, rows.shape[-1]) for rows in (x, dy))
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def dense(kernel: Array | QArray) -> Array:
    """A kernel without an adapter as one array, in the dtype it is held or scaled in."""
    return dequantize(kernel) if isinstance(kernel, QArray) else kernel
