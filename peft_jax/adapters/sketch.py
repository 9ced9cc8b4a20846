"""Computes the leading singular triplets of kernel gradients with the memory of LoRA.

Products of a gradient G = ∂L/∂W with thin matrices come from ordinary backward passes
(`gradient_products`). Two randomized methods need nothing else:

- One pass (Tropp, Yurtsever, Udell and Cevher, 2017, arXiv 1609.00048, algorithm 4). From Y = G Ω
  and Z = Ψᵀ G, with Q an orthonormal basis of Y, G ≈ Q (Ψᵀ Q)⁺ Z.
- Two passes and two more for each power iteration (Halko, Martinsson and Tropp, 2011,
  arXiv 0909.4061, algorithms 4.4 and 5.1). With Q a basis of (G Gᵀ)ᵖ G Ω, G ≈ Q (Qᵀ G).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.adapters.factorize import HIGHEST, map_matrices, orthonormal, triplets
from peft_jax.adapters.gradient_products import (
    LEFT,
    RIGHT,
    LossFn,
    Site,
    Sums,
    abstract_sums,
    add_products,
    constrain,
    kernel_shape,
    kernel_sharding,
    mesh_of,
    random_matrix,
    replicate,
    stacks_of,
    sum_products,
    without_experts,
)
from peft_jax.adapters.method import GradientFactors
from peft_jax.core import Path, Tree, flatten, is_experts, join_path
from peft_jax.core.validation import check_positive_int

OVERSAMPLING = 8
"""Number of directions beyond the rank, for accuracy."""


def check_passes(name: str, passes: int) -> None:
    """Raises ValueError if there is no method with this number of passes."""
    check_positive_int(name, passes)
    if passes > 1 and passes % 2:
        raise ValueError(
            f"{name} is {passes!r}, but must be 1, or an even number: 2, and 2 more for each power"
            " iteration"
        )


def gradient_factors(
    loss_fn: LossFn,
    params: Tree,
    ranks: Mapping[Path, int],
    batches: Sequence[Any],
    key: jax.Array,
    *,
    oversampling: int = OVERSAMPLING,
    passes: int = 1,
) -> dict[Path, GradientFactors]:
    """Returns the leading singular triplets of kernel gradients, summed over batches.

    The backward pass is compiled once for a loss function (by equality and hash) and shapes. All
    arrays are sharded as the kernels.

    Args:
      loss_fn: Loss, differentiable in the kernels; hashable.
      params: Parameters, with kernels [..., d_in, d_out].
      ranks: Number of triplets, by kernel path.
      batches: Batches that the gradient is summed over. Each pass reads all of them.
      key: Random key of the directions.
      oversampling: Number of additional directions, for accuracy.
      passes: Number of backward passes over the batches: 1, or 2 + 2 p for p power iterations,
        which improve the directions if the singular values fall slowly.

    Returns:
      `GradientFactors` by path, float32, stacked as the kernels. Those of experts are of the sum of
      their gradients, and have no axis of experts.

    Raises:
      ValueError: There are no batches, `passes` is odd and not 1, or a gradient is zero or not
        finite.
    """
    if not batches:
        raise ValueError("batches is empty, but the gradient needs at least one batch")
    check_passes("passes", passes)
    sites = sites_of(params, ranks, passes=passes, oversampling=oversampling)
    taken = tuple(ranks[site.path] for site in sites)

    def products(sides: tuple[str, ...], given: Sums) -> Sums:
        return sum_products(loss_fn, params, batches, key, sites=sites, sides=sides, given=given)

    if passes == 1:
        sums = products((RIGHT, LEFT), {})
        factors, leading = _reconstruct(sums[RIGHT], sums[LEFT], key, sites=sites, ranks=taken)
    else:
        basis = _bases(products((RIGHT,), {})[RIGHT], sites=sites, side=RIGHT)
        for _ in range(passes // 2 - 1):
            other = _bases(products((LEFT,), {LEFT: basis})[LEFT], sites=sites, side=LEFT)
            basis = _bases(products((RIGHT,), {RIGHT: other})[RIGHT], sites=sites, side=RIGHT)
        projected = products((LEFT,), {LEFT: basis})[LEFT]
        factors, leading = _project(basis, projected, sites=sites, ranks=taken)
    _check_finite(sites, np.asarray(leading))
    return factors


def sites_of(
    params: Tree,
    ranks: Mapping[Path, int],
    *,
    passes: int = 1,
    oversampling: int = OVERSAMPLING,
) -> tuple[Site, ...]:
    """Returns the kernels of a sketch with its widths.

    G Ω has the rank and the oversampling as its width k. Ψᵀ G has 2 k + 1, as Tropp et al. (2017,
    section 4.5) advise; a basis Q, of which nothing is reconstructed, has k too. The experts of a
    layer count as one kernel, see `Site.of_groups`.

    Args:
      params: Parameters, arrays or shapes.
      ranks: Number of triplets, by kernel path.
      passes: Number of backward passes.
      oversampling: Number of additional directions.
    """
    flat = flatten(params)
    sites = []
    for path in sorted(ranks):
        *stack, d_in, d_out = kernel_shape(flat[path])
        sharding, of_groups = kernel_sharding(flat[path]), is_experts(path)
        if of_groups:
            stack, sharding = stack[:-1], without_experts(sharding)
        right = min(ranks[path] + oversampling, d_in, d_out)
        sites.append(
            Site(
                path=path,
                stack=tuple(stack),
                d_in=d_in,
                d_out=d_out,
                right=right,
                left=min(2 * right + 1, d_in) if passes == 1 else right,
                sharding=sharding,
                of_groups=of_groups,
            )
        )
    return tuple(sites)


@functools.partial(jax.jit, static_argnames=("sites", "side"))
def _bases(
    products: Mapping[Path, jax.Array], *, sites: tuple[Site, ...], side: str
) -> dict[Path, jax.Array]:
    """Returns orthonormal bases of the range of G, from G P, or of Gᵀ, from Qᵀ G."""
    columns = {
        path: [x if side == RIGHT else jnp.swapaxes(x, -1, -2)] for path, x in products.items()
    }
    found = map_matrices(orthonormal, columns, stacks=stacks_of(sites), mesh=mesh_of(sites))
    axis = -2 if side == RIGHT else -1
    return {
        site.path: constrain(found[site.path], site.sharding_of((axis, None))) for site in sites
    }


@functools.partial(jax.jit, static_argnames=("sites", "ranks"))
def _project(
    basis: Mapping[Path, jax.Array],
    projected: Mapping[Path, jax.Array],
    *,
    sites: tuple[Site, ...],
    ranks: tuple[int, ...],
) -> tuple[dict[Path, GradientFactors], Float[Array, " kernels"]]:
    """Returns the triplets of Q (Qᵀ G), and the least of each kernel's largest singular values."""
    arrays = {path: [basis[path], projected[path]] for path in basis}
    found = map_matrices(triplets, arrays, stacks=stacks_of(sites), mesh=mesh_of(sites))
    return _leading(found, sites, ranks)


@functools.partial(jax.jit, static_argnames=("sites", "ranks"))
def _reconstruct(
    right: Mapping[Path, jax.Array],
    left: Mapping[Path, jax.Array],
    key: jax.Array,
    *,
    sites: tuple[Site, ...],
    ranks: tuple[int, ...],
) -> tuple[dict[Path, GradientFactors], Float[Array, " kernels"]]:
    """Returns the triplets of Q (Ψᵀ Q)⁺ (Ψᵀ G), and the least of the largest singular values."""

    def of_one(
        right: Float[Array, "d_in k"], left: Float[Array, "l d_out"], key: jax.Array
    ) -> tuple[Array, Array, Array]:
        basis = orthonormal(right)
        drawn = random_matrix(key, basis.shape[0], left.shape[0])
        # Least squares: (Ψᵀ Q)⁺ = R⁻¹ Oᵀ for Ψᵀ Q = O R.
        q, r = jnp.linalg.qr(jnp.matmul(drawn.T, basis, precision=HIGHEST))
        rows = jax.scipy.linalg.solve_triangular(r, jnp.matmul(q.T, left, precision=HIGHEST))
        return triplets(basis, rows)

    arrays = {
        site.path: [right[site.path], left[site.path], site.keys(key, LEFT)] for site in sites
    }
    found = map_matrices(of_one, arrays, stacks=stacks_of(sites), mesh=mesh_of(sites))
    return _leading(found, sites, ranks)


def _leading(
    found: Mapping[Path, tuple[Array, Array, Array]],
    sites: tuple[Site, ...],
    ranks: tuple[int, ...],
) -> tuple[dict[Path, GradientFactors], Float[Array, " kernels"]]:
    """Returns the leading triplets, and the least of each kernel's largest singular values."""
    factors = {}
    for site, rank in zip(sites, ranks, strict=True):
        u, s, v = (x[..., :rank] for x in found[site.path])
        factors[site.path] = GradientFactors(
            u=constrain(u, site.sharding_of((-2, None))),
            s=constrain(s, site.sharding_of((None,))),
            v=constrain(v, site.sharding_of((-1, None))),
        )
    largest = jnp.stack([jnp.min(factors[site.path].s[..., 0]) for site in sites])
    return factors, replicate(largest, sites)


def _check_finite(sites: tuple[Site, ...], largest: np.ndarray) -> None:
    """Rejects gradients that are zero or not finite."""
    for site, value in zip(sites, largest.tolist(), strict=True):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(
                f"the gradient of {join_path(site.path)} must be finite and not zero, but its"
                f" largest singular value in a layer is {value:.3g} on the first batches; check"
                " that they have tokens with a loss"
            )


def trace_pass(
    loss_fn: LossFn, params: Tree, ranks: Mapping[Path, int], batch: Any, *, passes: int = 1
) -> jax.stages.Traced:
    """Traces the first backward pass of `gradient_factors`; lower and compile the result.

    Args:
      loss_fn: Loss, differentiable in the kernels; hashable.
      params: Parameters, arrays or shapes with shardings.
      ranks: Number of triplets, by kernel path.
      batch: One batch, arrays or shapes with shardings.
      passes: Number of backward passes over the batches.
    """
    sites = sites_of(params, ranks, passes=passes)
    sides = (RIGHT, LEFT) if passes == 1 else (RIGHT,)
    total = abstract_sums(sites=sites, sides=sides)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return add_products.trace(total, {}, key, params, batch, loss_fn=loss_fn, sites=sites)
