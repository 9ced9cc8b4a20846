"""The leading singular triplets of every kernel's gradient, at the memory of LoRA.

For y = x W + (x A) B the gradients at the function's start hold products with G = ∂L/∂W:

    A = 0, B = Pᵀ:   ∂L/∂A = G P        A = Q, B = 0:   ∂L/∂B = Qᵀ G

so a randomized singular value decomposition (Halko, Martinsson and Tropp, 2011, arXiv 0909.4061,
algorithms 4.4 and 5.1) needs ordinary LoRA backward passes only: no array of G's size is ever
formed, the base may be sharded or quantized, and microbatches accumulate.
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
"""The loss of (parameters with kernels bound, one batch)."""


@dataclasses.dataclass(frozen=True)
class _Probe:
    """A low-rank term beside the kernel, through which its gradient is felt."""

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
    """The leading singular triplets of the kernels' gradients, summed over batches.

    Costs 2 + 2 `power_iterations` backward passes over `batches` with a low-rank term of
    `ranks[path] + oversampling` beside each kernel.

    Args:
      loss_fn: the loss; differentiable in the parameters' kernels.
      params: the parameters; kernels [..., d_in, d_out].
      ranks: how many triplets are wanted, by the kernel's path.
      batches: what the loss is summed over; every pass goes over all of them.
      key: of the first random directions.
      oversampling: how many more directions than wanted are followed, for accuracy.
      power_iterations: how often G Gᵀ sharpens them; 0 does for a steeply falling spectrum.

    Returns:
      `GradientFactors` by path, float32, stacked as the kernel is.

    Raises:
      ValueError: without batches, or when a gradient is zero or not finite.
    """
    if not batches:
        raise ValueError("the gradient's directions need at least one batch, but none was given")
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
                f"the gradient of {'.'.join(path)} on the first batches is {float(leading):.3g} at"
                " its largest in some layer; it must be finite and not zero: do the batches hold"
                " tokens to learn?"
            )
    return factors


class _Passes:
    """Products with the gradient, and with its transpose, one backward pass over the data each."""

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
        """G P [..., d_in, k] for P [..., d_out, k]."""
        flat = flatten(self._params)
        learned = {
            path: {"a": jnp.zeros((*kernel_shape(flat[path])[:-1], p.shape[-1]), jnp.float32)}
            for path, p in directions.items()
        }
        fixed = {path: {"b": jnp.swapaxes(p, -1, -2)} for path, p in directions.items()}
        return {path: arrays["a"] for path, arrays in self._run(learned, fixed).items()}

    def times_transposed(self, basis: dict[Path, jax.Array]) -> dict[Path, jax.Array]:
        """Gᵀ Q [..., d_out, k] for Q [..., d_in, k]."""
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
    """The shape [..., d_in, d_out] of a kernel, adapted ones included."""
    return kernel_shape(kernel.base) if isinstance(kernel, AdaptedKernel) else tuple(kernel.shape)


@jax.jit
def _orthonormal(columns: dict[Path, jax.Array]) -> dict[Path, jax.Array]:
    """Orthonormal bases of the columns' spans."""
    return {
        path: _one_by_one(lambda matrix: jnp.linalg.qr(matrix)[0], array)
        for path, array in columns.items()
    }


def _one_by_one(factorize: Callable[[jax.Array], Any], stack: Float[Array, "*stack m n"]) -> Any:
    """A factorization of each matrix of a stack, one after another.

    Batched factorizations of several arrays in one program can wait for each other forever where
    the CPU's thread pool is small (jaxlib 0.10, two cores: it happened in most runs).
    """
    matrices = stack.reshape(-1, *stack.shape[-2:])
    found = jax.lax.map(factorize, matrices)
    return jax.tree.map(lambda x: x.reshape(*stack.shape[:-2], *x.shape[1:]), found)


def _factors(
    q: dict[Path, jax.Array], projected: dict[Path, jax.Array], ranks: dict[Path, int]
) -> dict[Path, GradientFactors]:
    """The triplets of Q (Gᵀ Q)ᵀ, the gradient on the span of Q."""

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
