"""Multiplies by the gradients of kernels, in backward passes that never form them.

A tap on a kernel y = x W leaves y unchanged. In the backward pass it sees x and dy, with which the
gradient is G = xᵀ dy summed over tokens, and computes products with thin matrices P and Q:

    right = G P = xᵀ (dy P)        left = Qᵀ G = (x Q)ᵀ dy

They are the gradients of a low-rank term (x A) B with A = [0 | Q] and B = [Pᵀ; 0], which itself is
zero and need not be computed. So both come from one backward pass, with the memory of LoRA. No
array has the size of G, the base may be sharded or quantized, and microbatches accumulate.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from qwix import QArray

from peft_jax.core import AdaptedKernel, Kernel, Path, Tree, flatten, join_path, linear, unflatten

LossFn = Callable[[Tree, Any], Float[Array, ""]]
"""Loss of (parameters with bound kernels, one batch)."""

RIGHT = "right"
"""Side of the products G P [d_in, k]."""
LEFT = "left"
"""Side of the products Qᵀ G [l, d_out]."""

Sums = dict[str, dict[Path, jax.Array]]
"""Products by side and kernel path, stacked as the kernels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A kernel whose gradient is multiplied; static in compiled programs.

    Attributes:
      path: Path of the kernel.
      stack: Leading axes of the kernel; () without a stack of layers.
      d_in, d_out: Shape of one kernel.
      right: Number k of columns of P.
      left: Number l of columns of Q.
      sharding: Sharding of the kernel over a mesh; None on one device.
    """

    path: Path
    stack: tuple[int, ...]
    d_in: int
    d_out: int
    right: int
    left: int
    sharding: jax.NamedSharding | None

    def shape(self, side: str) -> tuple[int, ...]:
        """Returns the shape of the products of one side."""
        matrix = (self.d_in, self.right) if side == RIGHT else (self.left, self.d_out)
        return (*self.stack, *matrix)

    def keys(self, key: jax.Array, side: str) -> jax.Array:
        """Returns the random keys of one side's matrices, stacked as the kernel."""
        name = f"{join_path(self.path)} {side}"
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return jax.random.split(key, self.stack) if self.stack else key

    def sharding_of(self, axes: tuple[int | None, ...]) -> jax.NamedSharding | None:
        """Returns the sharding of an array [*stack, ...] that is sharded as the kernel.

        Args:
          axes: For each axis behind the stack, the axis of the kernel that it is, -2 for d_in and
            -1 for d_out, or None for another one.
        """
        if self.sharding is None:
            return None
        missing = len(self.stack) + 2 - len(self.sharding.spec)
        of_kernel = (*self.sharding.spec, *(None,) * missing)
        spec = (*of_kernel[:-2], *(None if axis is None else of_kernel[axis] for axis in axes))
        return jax.NamedSharding(self.sharding.mesh, jax.P(*spec))

    def side_sharding(self, side: str) -> jax.NamedSharding | None:
        """Returns the sharding of the products of one side."""
        return self.sharding_of((-2, None) if side == RIGHT else (None, -1))


def constrain(array: jax.Array, sharding: jax.NamedSharding | None) -> jax.Array:
    """Constrains an array to a sharding, if there is one."""
    return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)


def kernel_shape(kernel: Kernel) -> tuple[int, ...]:
    """Returns the shape [..., d_in, d_out] of a kernel of any kind."""
    return kernel_shape(kernel.base) if isinstance(kernel, AdaptedKernel) else tuple(kernel.shape)


def kernel_sharding(kernel: Kernel) -> jax.NamedSharding | None:
    """Returns the sharding of a kernel of any kind over a mesh; None on one device."""
    if isinstance(kernel, AdaptedKernel):
        return kernel_sharding(kernel.base)
    array = kernel.qvalue if isinstance(kernel, QArray) else kernel
    sharding = getattr(array, "sharding", None)
    there = isinstance(sharding, jax.NamedSharding) and sharding.mesh.size > 1
    return sharding if there else None


def random_matrix(key: jax.Array, size: int, width: int) -> Float[Array, "size width"]:
    """Returns a matrix to multiply a gradient by: Gaussian, or the identity if it is square.

    Its entries are rounded to bfloat16, so that they are the same in each dtype of activations. A
    reconstruction then uses the very matrix that the gradient was multiplied by.
    """
    if size == width:
        return jnp.eye(size)
    drawn = jax.random.normal(key, (size, width), jnp.float32)
    return drawn.astype(jnp.bfloat16).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("sites", "sides"))
def zero_sums(*, sites: tuple[Site, ...], sides: tuple[str, ...]) -> Sums:
    """Returns zeros to accumulate products in, sharded as the kernels."""
    return {
        side: {
            site.path: constrain(jnp.zeros(site.shape(side)), site.side_sharding(side))
            for site in sites
        }
        for side in sides
    }


@functools.partial(jax.jit, static_argnames=("loss_fn", "sites"), donate_argnames="total")
def add_products(
    total: Sums,
    given: Mapping[str, Mapping[Path, jax.Array]],
    key: jax.Array,
    params: Tree,
    batch: Any,
    *,
    loss_fn: LossFn,
    sites: tuple[Site, ...],
) -> Sums:
    """Adds the products with the gradients on one batch, in one backward pass.

    It is compiled once for a loss function and the shapes of parameters and batches.

    Args:
      total: Products so far, of the sides that are wanted; its buffers are donated.
      given: P [..., d_out, k] or Q [..., d_in, l] by side and path. A side that is not given is
        multiplied by `random_matrix` of `Site.keys`, which is drawn layer by layer.
      key: Random key.
      params: Parameters.
      batch: Batch.
      loss_fn: Loss, differentiable in the kernels.
      sites: Kernels.

    Returns:
      The new products.
    """

    def loss(sums: Sums) -> Float[Array, ""]:
        flat = flatten(params)
        for site in sites:
            matrices = {
                side: given[side][site.path] if side in given else site.keys(key, side)
                for side in sums
            }
            flat[site.path] = AdaptedKernel(
                base=flat[site.path],
                arrays={"sums": {side: sums[side][site.path] for side in sums}, "by": matrices},
                method=_Tap(widths=((RIGHT, site.right), (LEFT, site.left))),
            )
        return loss_fn(unflatten(flat), batch)

    found = jax.grad(loss)(jax.tree.map(jnp.zeros_like, total))
    return {
        side: {
            site.path: total[side][site.path]
            + constrain(found[side][site.path], site.side_sharding(side))
            for site in sites
        }
        for side in total
    }


@dataclasses.dataclass(frozen=True)
class _Tap:
    """Method of a kernel that computes what its base does, and multiplies by the gradient.

    Attributes:
      widths: Pairs of a side and its number of columns.
    """

    widths: tuple[tuple[str, int], ...]

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Any,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        del dropout_key
        return _tapped(self.widths, linear(x, base), x, arrays["sums"], arrays["by"])

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Any) -> Float[Array, "d_in d_out"]:
        del arrays
        return base


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(widths: Any, y: jax.Array, x: jax.Array, sums: Any, by: Any) -> jax.Array:
    """Returns `y`; the gradient of `sums` are the products with xᵀ dy."""
    del widths, x, sums, by
    return y


def _forward(widths: Any, y: jax.Array, x: jax.Array, sums: Any, by: Any) -> tuple[jax.Array, Any]:
    del widths, sums
    return y, (x, by)


def _backward(widths: Any, kept: Any, dy: jax.Array) -> tuple[Any, ...]:
    x, by = kept
    sizes = dict(widths)
    tokens = tuple(range(x.ndim - 1))
    found = {}
    if RIGHT in by:
        inner = _times(dy, _matrix(by[RIGHT], dy.shape[-1], sizes[RIGHT]))
        # As in `low_rank_product`: a CPU would otherwise transpose x, which is large.
        transposed = _contract(inner, x, tokens)
        found[RIGHT] = jax.lax.optimization_barrier(transposed).T
    if LEFT in by:
        inner = _times(x, _matrix(by[LEFT], x.shape[-1], sizes[LEFT]))
        found[LEFT] = _contract(inner, dy, tokens)
    return dy, None, found, None


_tapped.defvjp(_forward, _backward)


def _matrix(given: jax.Array, size: int, width: int) -> jax.Array:
    """Returns a given matrix, or the random matrix of a key."""
    if jnp.issubdtype(given.dtype, jax.dtypes.prng_key):
        return random_matrix(given, size, width)
    return given


def _times(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Returns x P in the dtype of `x`."""
    return jnp.matmul(x, matrix.astype(x.dtype))


def _contract(inner: jax.Array, x: jax.Array, tokens: tuple[int, ...]) -> jax.Array:
    """Returns innerᵀ x summed over tokens, in float32."""
    return jax.lax.dot_general(
        inner, x, ((tokens, tokens), ((), ())), preferred_element_type=jnp.float32
    )
