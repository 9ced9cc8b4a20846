"""Multiplies by the gradients of kernels, and by the moments of their inputs, without forming them.

A tap on a kernel y = x W leaves y unchanged. In the backward pass it sees x and dy, with which the
gradient is G = xᵀ dy summed over tokens, and computes products with thin matrices P and Q:

    right = G P = xᵀ (dy P)        left = Qᵀ G = (x Q)ᵀ dy

They are the gradients of a low-rank term (x A) B with A = [0 | Q] and B = [Pᵀ; 0], which itself is
zero and need not be computed. So both come from one backward pass, with the memory of LoRA. No
array has the size of G, the base may be sharded or quantized, and microbatches accumulate.

The same pass gives sums over the inputs that count, layer by layer:

    inputs = Σ x (xᵀ P)        mean = Σ x        count = (Σ 1, Σ ‖x‖²)
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from qwix import QArray

from peft_jax.adapters.factorize import AnyMesh
from peft_jax.core import (
    AdaptedKernel,
    Kernel,
    Path,
    Tree,
    flatten,
    join_path,
    kernel_of_groups,
    linear,
    unflatten,
)

LossFn = Callable[[Tree, Any], Float[Array, ""]]
"""Loss of (parameters with bound kernels, one batch). Of a loss with a function `counted`, which
returns a mask [rows, positions] of a batch, only the inputs at those positions count."""

RIGHT = "right"
"""Side of the products G P [d_in, k]."""
LEFT = "left"
"""Side of the products Qᵀ G [l, d_out]."""
INPUTS = "inputs"
"""Side of the sums Σ x (xᵀ P) [d_in, k]."""
MEAN = "mean"
"""Side of the sums Σ x [d_in]."""
COUNT = "count"
"""Side of the number of inputs and the sum of their squares [2]."""

OF_INPUTS = (INPUTS, MEAN, COUNT)

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
      of_groups: Whether the kernels of all experts of a layer count as one, whose gradient is the
        sum of theirs. `stack` and `sharding` then have no axis of experts.
    """

    path: Path
    stack: tuple[int, ...]
    d_in: int
    d_out: int
    right: int
    left: int
    sharding: jax.NamedSharding | None
    of_groups: bool = False

    def shape(self, side: str) -> tuple[int, ...]:
        """Returns the shape of the products of one side."""
        of_one = {
            RIGHT: (self.d_in, self.right),
            LEFT: (self.left, self.d_out),
            INPUTS: (self.d_in, self.right),
            MEAN: (self.d_in,),
            COUNT: (2,),
        }[side]
        return (*self.stack, *of_one)

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
        axes: dict[str, tuple[int | None, ...]] = {
            RIGHT: (-2, None),
            LEFT: (None, -1),
            INPUTS: (-2, None),
            MEAN: (-2,),
            COUNT: (None,),
        }
        return self.sharding_of(axes[side])


def without_experts(sharding: jax.NamedSharding | None) -> jax.NamedSharding | None:
    """Returns a sharding of [layers, experts, d_in, d_out] as one of [layers, d_in, d_out].

    Features are not sharded, because a device holds whole experts.
    """
    if sharding is None:
        return None
    return jax.NamedSharding(sharding.mesh, jax.P(*sharding.spec[:1]))


def stacks_of(sites: Sequence[Site]) -> dict[Path, tuple[int, ...]]:
    """Returns the leading axes of kernels by path."""
    return {site.path: site.stack for site in sites}


def mesh_of(sites: Sequence[Site]) -> AnyMesh | None:
    """Returns the mesh that the kernels are sharded over; None on one device."""
    shardings = [site.sharding for site in sites if site.sharding is not None]
    return shardings[0].mesh if shardings else None


def constrain(array: jax.Array, sharding: jax.NamedSharding | None) -> jax.Array:
    """Constrains an array to a sharding, if there is one."""
    return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)


def replicate(array: jax.Array, sites: Sequence[Site]) -> jax.Array:
    """Constrains an array to be whole on all devices, so that each process can read it."""
    mesh = mesh_of(sites)
    return constrain(array, None if mesh is None else jax.NamedSharding(mesh, jax.P()))


def kernel_shape(kernel: Kernel) -> tuple[int, ...]:
    """Returns the shape [..., d_in, d_out] of a kernel of any kind."""
    return kernel_shape(kernel.base) if isinstance(kernel, AdaptedKernel) else tuple(kernel.shape)


def has_stack(kernel: Kernel) -> bool:
    """Returns whether a kernel of any kind is a stack [layers, d_in, d_out]."""
    return len(kernel_shape(kernel)) > 2


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


def sum_products(
    loss_fn: LossFn,
    params: Tree,
    batches: Sequence[Any],
    key: jax.Array,
    *,
    sites: tuple[Site, ...],
    sides: tuple[str, ...],
    given: Mapping[str, Mapping[Path, jax.Array]],
) -> Sums:
    """Returns the products of several batches; see `add_products`."""
    total = zero_sums(sites=sites, sides=sides)
    for batch in batches:
        total = add_products(total, given, key, params, batch, loss_fn=loss_fn, sites=sites)
    return total


def abstract_sums(*, sites: tuple[Site, ...], sides: tuple[str, ...]) -> dict[str, dict[Path, Any]]:
    """Returns the shapes and shardings of `zero_sums`."""
    return {
        side: {
            site.path: jax.ShapeDtypeStruct(
                site.shape(side), jnp.float32, sharding=site.side_sharding(side)
            )
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
    """Adds the products of one batch, in one backward pass.

    It is compiled once for a loss function and the shapes of parameters and batches.

    Args:
      total: Products so far, of the sides that are wanted; its buffers are donated.
      given: P [..., d_out, k], Q [..., d_in, l], or P [..., d_in, k] of the inputs, by side and
        path. A side that is not given is multiplied by `random_matrix` of `Site.keys`, which is
        drawn layer by layer.
      key: Random key.
      params: Parameters.
      batch: Batch.
      loss_fn: Loss, differentiable in the kernels.
      sites: Kernels.

    Returns:
      The new products.
    """
    counted = loss_fn.counted(batch) if hasattr(loss_fn, "counted") and COUNT in total else None

    def loss(sums: Sums) -> Float[Array, ""]:
        flat = flatten(params)
        for site in sites:
            by = {
                side: given[side][site.path] if side in given else site.keys(key, side)
                for side in (RIGHT, LEFT, INPUTS)
                if side in sums
            }
            if counted is not None:
                by[COUNT] = jnp.broadcast_to(counted, (*site.stack, *counted.shape))
            flat[site.path] = AdaptedKernel(
                base=flat[site.path],
                arrays={"sums": {side: sums[side][site.path] for side in sums}, "by": by},
                method=_GroupsTap(site) if site.of_groups else _Tap(site),
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
    """Method of a kernel that computes what its base does, and multiplies by the gradient."""

    site: Site

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Any,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        del dropout_key
        counted = arrays["by"].get(COUNT)
        if counted is not None and counted.shape != x.shape[:-1]:
            raise ValueError(
                f"the inputs of {join_path(self.site.path[:-1])} are {list(x.shape[:-1])} in a"
                f" batch of {list(counted.shape)} positions, so that padding cannot be left out;"
                " exclude the module"
            )
        return _tapped(self.site, linear(x, base), x, arrays["sums"], arrays["by"])

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Any) -> Float[Array, "d_in d_out"]:
        del arrays
        return base


@dataclasses.dataclass(frozen=True)
class _GroupsTap(_Tap):
    """Tap of the kernels of all experts, whose gradients are added up."""

    spans_groups: ClassVar[bool] = True

    def project_groups(
        self,
        x: Float[Array, "rows d_in"],
        base: Kernel,
        arrays: Any,
        sizes: Int[Array, " groups"],
    ) -> Float[Array, "rows d_out"]:
        return self.project(x, kernel_of_groups(base, sizes), arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(site: Site, y: jax.Array, x: jax.Array, sums: Any, by: Any) -> jax.Array:
    """Returns `y`; the gradient of `sums` are the products."""
    del site, x, sums, by
    return y


def _forward(site: Site, y: jax.Array, x: jax.Array, sums: Any, by: Any) -> tuple[jax.Array, Any]:
    del site
    return y, (x, by, dict.fromkeys(sums))


def _backward(site: Site, kept: Any, dy: jax.Array) -> tuple[Any, ...]:
    x, by, sides = kept
    tokens = tuple(range(x.ndim - 1))
    found = {}
    if RIGHT in sides:
        inner = _times(dy, _matrix(by[RIGHT], dy.shape[-1], site.right))
        found[RIGHT] = _transposed(inner, x, tokens)
    if LEFT in sides:
        inner = _times(x, _matrix(by[LEFT], x.shape[-1], site.left))
        found[LEFT] = _contract(inner, dy, tokens)
    if COUNT in sides:
        counted = by.get(COUNT, jnp.ones(x.shape[:-1], jnp.bool))
        x = jnp.where(counted[..., None], x, jnp.zeros_like(x))
        inner = _times(x, _matrix(by[INPUTS], x.shape[-1], site.right))
        found[INPUTS] = _transposed(inner, x, tokens)
        found[MEAN] = jnp.sum(x, tokens, jnp.float32)
        energy = jnp.sum(jnp.square(x.astype(jnp.float32)))
        found[COUNT] = jnp.stack([jnp.sum(counted, dtype=jnp.float32), energy])
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


def _transposed(inner: jax.Array, x: jax.Array, tokens: tuple[int, ...]) -> jax.Array:
    """Returns xᵀ inner summed over tokens, in float32."""
    # As in `low_rank_product`: a CPU would otherwise transpose x, which is large.
    return jax.lax.optimization_barrier(_contract(inner, x, tokens)).T
