"""Computes the leading singular triplets of kernel gradients with the memory of LoRA.

For y = x W + (x A) B, the gradients of A and B are products with G = ∂L/∂W:

    A = 0, B = Pᵀ:   ∂L/∂A = G P        A = Q, B = 0:   ∂L/∂B = Qᵀ G

So a randomized singular value decomposition (Halko, Martinsson and Tropp, 2011, arXiv 0909.4061,
algorithms 4.4 and 5.1) only needs the backward passes of LoRA. No array has the size of G, the base
may be sharded or quantized, and microbatches accumulate.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peft_jax.adapters.low_rank import low_rank_product
from peft_jax.adapters.method import Arrays, GradientFactors
from peft_jax.core import AdaptedKernel, Kernel, Path, Tree, flatten, linear, unflatten

LossFn = Callable[[Tree, Any], Float[Array, ""]]
"""Loss of (parameters with bound kernels, one batch)."""


@dataclasses.dataclass(frozen=True)
class _Probe:
    """Low-rank term added to a kernel, whose gradients are products with the kernel's gradient."""

    def project(
        self,
        x: Float[Array, "*batch d_in"],
        base: Kernel,
        arrays: Arrays,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "*batch d_out"]:
        del dropout_key
        return linear(x, base) + low_rank_product(x, arrays["a"], arrays["b"])

    def merge(self, base: Float[Array, "d_in d_out"], arrays: Arrays) -> Float[Array, "d_in d_out"]:
        return base + arrays["a"] @ arrays["b"]


def gradient_factors(
    loss_fn: LossFn,
    params: Tree,
    ranks: Mapping[Path, int],
    batches: Sequence[Any],
    key: jax.Array,
    *,
    oversampling: int = 8,
    power_iterations: int = 2,
) -> dict[Path, GradientFactors]:
    """Returns the leading singular triplets of kernel gradients, summed over batches.

    It costs 2 + 2 `power_iterations` backward passes over `batches` with a low-rank term of rank
    `ranks[path] + oversampling` on each kernel.

    Args:
      loss_fn: Loss, differentiable in the kernels.
      params: Parameters, with kernels [..., d_in, d_out].
      ranks: Number of triplets, by kernel path.
      batches: Batches that the gradient is summed over. Each pass reads all of them.
      key: Random key of the initial directions.
      oversampling: Number of additional directions, for accuracy.
      power_iterations: Number of multiplications by G Gᵀ, which improve the directions. 0 suffices
        for a steeply falling spectrum.

    Returns:
      `GradientFactors` by path, float32, stacked as the kernels.

    Raises:
      ValueError: There are no batches, or a gradient is zero or not finite.
    """
    if not batches:
        raise ValueError("batches is empty, but the gradient needs at least one batch")
    shapes = {path: kernel_shape(flatten(params)[path]) for path in ranks}
    widths = {path: min(ranks[path] + oversampling, *shape[-2:]) for path, shape in shapes.items()}
    passes = _Passes(loss_fn, params, batches)

    directions = {
        path: jax.random.normal(
            jax.random.fold_in(key, index), (*shape[:-2], shape[-1], widths[path]), jnp.float32
        )
        for index, (path, shape) in enumerate(shapes.items())
    }
    q = _orthonormal(passes.times_gradient(directions))
    for _ in range(power_iterations):
        q = _orthonormal(passes.times_gradient(_orthonormal(passes.times_transposed(q))))
    projected = passes.times_transposed(q)
    factors = _factors(q, projected, dict(ranks))
    for path, factor in factors.items():
        leading = jnp.min(factor.s[..., 0])
        if not bool(jnp.isfinite(leading) & (leading > 0)):
            raise ValueError(
                f"the gradient of {'.'.join(path)} must be finite and not zero, but its largest"
                f" singular value in a layer is {float(leading):.3g} on the first batches; check"
                " that they have tokens with a loss"
            )
    return factors


class _Passes:
    """Multiplies by the gradient or its transpose, with one backward pass over the batches."""

    def __init__(self, loss_fn: LossFn, params: Tree, batches: Sequence[Any]) -> None:
        self._params = params
        self._batches = batches

        def loss(learned: dict[Path, Arrays], fixed: dict[Path, Arrays], params: Tree, batch: Any):
            flat = flatten(params)
            for path, arrays in learned.items():
                both = arrays | fixed[path]
                flat[path] = AdaptedKernel(base=flat[path], arrays=both, method=_Probe())
            return loss_fn(unflatten(flat), batch)

        def accumulate(total, learned, fixed, params, batch):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(learned, fixed, params, batch))

        self._accumulate = jax.jit(accumulate, donate_argnums=0)

    def times_gradient(self, directions: dict[Path, jax.Array]) -> dict[Path, jax.Array]:
        """Returns G P [..., d_in, k] for P [..., d_out, k]."""
        flat = flatten(self._params)
        learned = {
            path: {"a": jnp.zeros((*kernel_shape(flat[path])[:-1], p.shape[-1]), jnp.float32)}
            for path, p in directions.items()
        }
        fixed = {path: {"b": jnp.swapaxes(p, -1, -2)} for path, p in directions.items()}
        return {path: arrays["a"] for path, arrays in self._run(learned, fixed).items()}

    def times_transposed(self, basis: dict[Path, jax.Array]) -> dict[Path, jax.Array]:
        """Returns Gᵀ Q [..., d_out, k] for Q [..., d_in, k]."""
        flat = flatten(self._params)
        learned = {}
        for path, q in basis.items():
            *stack, _, d_out = kernel_shape(flat[path])
            learned[path] = {"b": jnp.zeros((*stack, q.shape[-1], d_out), jnp.float32)}
        fixed = {path: {"a": q} for path, q in basis.items()}
        found = self._run(learned, fixed)
        return {path: jnp.swapaxes(arrays["b"], -1, -2) for path, arrays in found.items()}

    def _run(
        self, learned: dict[Path, Arrays], fixed: dict[Path, Arrays]
    ) -> dict[Path, dict[str, jax.Array]]:
        total = jax.tree.map(jnp.zeros_like, learned)
        for batch in self._batches:
            total = self._accumulate(total, learned, fixed, self._params, batch)
        return total


def kernel_shape(kernel: Kernel) -> tuple[int, ...]:
    """Returns the shape [..., d_in, d_out] of a kernel of any kind."""
    return kernel_shape(kernel.base) if isinstance(kernel, AdaptedKernel) else tuple(kernel.shape)


@jax.jit
def _orthonormal(columns: dict[Path, jax.Array]) -> dict[Path, jax.Array]:
    """Returns orthonormal bases of the columns' spans."""
    return {
        path: _one_by_one(lambda matrix: jnp.linalg.qr(matrix)[0], array)
        for path, array in columns.items()
    }


def _one_by_one(factorize: Callable[[jax.Array], Any], stack: Float[Array, "*stack m n"]) -> Any:
    """Factorizes the matrices of a stack one after another.

    Batched factorizations of several arrays in one program can deadlock if the CPU's thread pool is
    small. With jaxlib 0.10 on two cores, most runs did.
    """
    matrices = stack.reshape(-1, *stack.shape[-2:])
    found = jax.lax.map(factorize, matrices)
    return jax.tree.map(lambda x: x.reshape(*stack.shape[:-2], *x.shape[1:]), found)


def _factors(
    q: dict[Path, jax.Array], projected: dict[Path, jax.Array], ranks: dict[Path, int]
) -> dict[Path, GradientFactors]:
    """Returns the triplets of Q (Gᵀ Q)ᵀ, the gradient projected on the span of Q."""

    @jax.jit
    def factorize(
        q: dict[Path, jax.Array], projected: dict[Path, jax.Array]
    ) -> dict[Path, GradientFactors]:
        found = {}
        for path, gt_q in projected.items():
            k = ranks[path]
            v, s, inner = _one_by_one(
                lambda matrix: tuple(jnp.linalg.svd(matrix, full_matrices=False)), gt_q
            )
            u = jnp.matmul(
                q[path], jnp.swapaxes(inner, -1, -2), precision=jax.lax.Precision.HIGHEST
            )
            found[path] = GradientFactors(u[..., :k], s[..., :k], v[..., :k])
        return found

    return factorize(q, projected)
