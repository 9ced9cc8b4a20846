"""Computes the principal components of kernels' inputs, one layer's inputs at a time.

Each layer adds its own inputs to thin sums in the passes of `gradient_products`: Y = S P, with S
the second moments, the sum of the inputs, their number and the sum of their squares. Without the
mean, C ≈ Y (Pᵀ Y)⁺ Yᵀ is the Nyström approximation of n times the covariance (Halko, Martinsson and
Tropp, 2011, arXiv 0909.4061, section 5.4). P is random in the first pass, and an orthonormal basis
of the previous Y in each further one.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.adapters.factorize import HIGHEST, map_matrices, orthonormal
from peft_jax.adapters.gradient_products import (
    INPUTS,
    OF_INPUTS,
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
)
from peft_jax.adapters.method import InputFactors
from peft_jax.core import Path, Tree, flatten, join_path
from peft_jax.core.validation import check_positive_int

OVERSAMPLING = 8
"""Number of directions beyond twice the rank, for accuracy."""


def input_factors(
    loss_fn: LossFn,
    params: Tree,
    ranks: Mapping[Path, int],
    batches: Sequence[Any],
    key: jax.Array,
    *,
    passes: int = 1,
) -> dict[Path, InputFactors]:
    """Returns the leading principal components of kernels' inputs over batches.

    The pass is compiled once for a loss function (by equality and hash) and shapes. All arrays are
    sharded as the kernels.

    Args:
      loss_fn: Loss; hashable. Its function `counted`, if it has one, selects the inputs.
      params: Parameters, with kernels [..., d_in, d_out].
      ranks: Number of components, by kernel path.
      batches: Batches. Each pass reads all of them.
      key: Random key of the directions.
      passes: Number of passes over the batches. More of them improve the components if the
        variances fall slowly.

    Returns:
      `InputFactors` by path, float32, stacked as the kernels.

    Raises:
      ValueError: There are no batches, or inputs are not finite or do not vary.
    """
    if not batches:
        raise ValueError("batches is empty, but the components need at least one batch")
    check_positive_int("passes", passes)
    sites = input_sites(params, ranks)
    taken = tuple(ranks[site.path] for site in sites)

    def sums(given: Sums) -> Sums:
        return sum_products(
            loss_fn, params, batches, key, sites=sites, sides=OF_INPUTS, given=given
        )

    given: Sums = {}
    for _ in range(passes - 1):
        given = {INPUTS: _bases(sums(given), given, key, sites=sites)}
    factors, totals = _components(sums(given), given, key, sites=sites, ranks=taken)
    for site, value in zip(sites, np.asarray(totals).tolist(), strict=True):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(
                f"the inputs of {join_path(site.path)} must be finite and vary, but their variance"
                f" in a layer is {value:.3g} on the first batches; check that they have tokens with"
                " a loss"
            )
    return factors


def trace_inputs(
    loss_fn: LossFn, params: Tree, ranks: Mapping[Path, int], batch: Any
) -> jax.stages.Traced:
    """Traces the first pass of `input_factors`; lower and compile the result.

    Args:
      loss_fn: Loss; hashable.
      params: Parameters, arrays or shapes with shardings.
      ranks: Number of components, by kernel path.
      batch: One batch, arrays or shapes with shardings.
    """
    sites = input_sites(params, ranks)
    total = abstract_sums(sites=sites, sides=OF_INPUTS)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return add_products.trace(total, {}, key, params, batch, loss_fn=loss_fn, sites=sites)


def input_sites(params: Tree, ranks: Mapping[Path, int]) -> tuple[Site, ...]:
    """Returns the kernels of a sketch, with 2 k + 8 columns for k components."""
    flat = flatten(params)
    sites = []
    for path in sorted(ranks):
        *stack, d_in, d_out = kernel_shape(flat[path])
        sites.append(
            Site(
                path=path,
                stack=tuple(stack),
                d_in=d_in,
                d_out=d_out,
                right=min(2 * ranks[path] + OVERSAMPLING, d_in),
                left=0,
                sharding=kernel_sharding(flat[path]),
            )
        )
    return tuple(sites)


@functools.partial(jax.jit, static_argnames="sites")
def _bases(
    total: Sums, given: Sums, key: jax.Array, *, sites: tuple[Site, ...]
) -> dict[Path, jax.Array]:
    """Returns orthonormal bases of the range of C P."""
    found = map_matrices(
        lambda *arrays: orthonormal(_centered(*arrays)[0]),
        _arguments(total, given, key, sites),
        stacks=stacks_of(sites),
        mesh=mesh_of(sites),
    )
    return {site.path: constrain(found[site.path], site.sharding_of((-2, None))) for site in sites}


@functools.partial(jax.jit, static_argnames=("sites", "ranks"))
def _components(
    total: Sums, given: Sums, key: jax.Array, *, sites: tuple[Site, ...], ranks: tuple[int, ...]
) -> tuple[dict[Path, InputFactors], Float[Array, " kernels"]]:
    """Returns the components, and the least of each kernel's total variances."""
    found = map_matrices(
        _nystrom,
        _arguments(total, given, key, sites),
        stacks=stacks_of(sites),
        mesh=mesh_of(sites),
    )
    factors = {}
    for site, rank in zip(sites, ranks, strict=True):
        v, variance, whole = found[site.path]
        factors[site.path] = InputFactors(
            v=constrain(v[..., :rank], site.sharding_of((-2, None))),
            variance=constrain(variance[..., :rank], site.sharding_of((None,))),
            total=constrain(whole, site.sharding_of(())),
        )
    least = jnp.stack([jnp.min(factors[site.path].total) for site in sites])
    return factors, replicate(least, sites)


def _arguments(
    total: Sums, given: Sums, key: jax.Array, sites: tuple[Site, ...]
) -> dict[Path, list[jax.Array]]:
    """Returns the sums of each kernel, and the matrix P of their pass or its key."""
    return {
        site.path: [
            *(total[side][site.path] for side in OF_INPUTS),
            given[INPUTS][site.path] if given else site.keys(key, INPUTS),
        ]
        for site in sites
    }


def _centered(
    products: Float[Array, "d_in k"],
    mean: Float[Array, " d_in"],
    count: Float[Array, "2"],
    given: jax.Array,
) -> tuple[Float[Array, "d_in k"], Float[Array, "d_in k"]]:
    """Returns C P and P, from sums over n inputs that include their mean."""
    random = jnp.issubdtype(given.dtype, jax.dtypes.prng_key)
    p = random_matrix(given, *products.shape) if random else given
    of_mean = jnp.matmul(mean, p, precision=HIGHEST) / count[0]
    return products - mean[:, None] * of_mean, p


def _nystrom(
    products: Float[Array, "d_in k"],
    mean: Float[Array, " d_in"],
    count: Float[Array, "2"],
    given: jax.Array,
) -> tuple[Float[Array, "d_in k"], Float[Array, " k"], Float[Array, ""]]:
    """Returns the components, the variances along them, and the total variance."""
    y, p = _centered(products, mean, count, given)
    # An orthonormal P, so that small values below are rounding and nothing else.
    q, r = jnp.linalg.qr(p)
    y = jax.scipy.linalg.solve_triangular(r, y.T, trans="T").T
    inner = jnp.matmul(q.T, y, precision=HIGHEST)
    values, vectors = jnp.linalg.eigh((inner + inner.T) / 2)
    rounding = values[-1] * values.size * jnp.finfo(values.dtype).eps
    roots = jnp.where(values > rounding, jax.lax.rsqrt(jnp.maximum(values, rounding)), 0.0)
    half = jnp.matmul(y, vectors * roots, precision=HIGHEST)
    v, s, _ = jnp.linalg.svd(half, full_matrices=False)
    degrees = jnp.maximum(count[0] - 1, 1)
    whole = count[1] - jnp.sum(jnp.square(mean)) / count[0]
    return v, jnp.square(s) / degrees, whole / degrees
