"""Approximates an adapter of any method by LoRA, kernel by kernel."""

import dataclasses
import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.adapters.factorize import orthonormal, triplets
from peft_jax.adapters.gradient_products import kernel_shape
from peft_jax.adapters.lora import LoRA
from peft_jax.adapters.method import AdapterMethod
from peft_jax.adapters.shared_experts import SharedByExperts
from peft_jax.adapters.spec import AdapterSpec, AdapterState
from peft_jax.adapters.stacks import one_by_one, over_stack
from peft_jax.adapters.trainable_tokens import TokensBesideAdapters
from peft_jax.core import (
    AdaptedKernel,
    Kernel,
    Path,
    Tree,
    flatten,
    join_path,
    linear,
    unflatten,
)

_OVERSAMPLING = 10
"""Number of sketched directions beyond the rank."""

_POWER_ITERATIONS = 2

_PROBES = 32
"""Number of random vectors that estimate what the sketch leaves out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAApproximation:
    """LoRA adapter that approximates another adapter.

    Attributes:
      spec: Specification of the LoRA adapter. Every module has the same rank, and the scale is 1.
      state: Its arrays.
      errors: Relative error ‖ΔW - A B‖ / ‖ΔW‖ by module, in the Frobenius norm over all layers.
    """

    spec: AdapterSpec
    state: AdapterState
    errors: dict[str, float]


class _Factors(NamedTuple):
    """Factors of one kernel's difference, and squared norms.

    Attributes:
      a: Left factor [d_in, rank].
      b: Right factor [rank, d_out].
      error: Squared norm of the difference that the factors leave out.
      norm: Squared norm of the difference.
    """

    a: Float[Array, "*stack d_in rank"]
    b: Float[Array, "*stack rank d_out"]
    error: Float[Array, "*stack"]
    norm: Float[Array, "*stack"]


def approximate_by_lora(
    spec: AdapterSpec, params: Tree, state: AdapterState, *, rank: int, seed: int = 0
) -> LoRAApproximation:
    """Returns the LoRA adapter of a rank that is nearest to an adapter of any method.

    The difference ΔW between the merged and the base kernel is approximated by a randomized
    singular value decomposition. It uses products with ΔW and its transpose only, so that no array
    of the kernel's size is built. An adapter that is a low-rank product of at most `rank` is
    converted exactly. Modules trained in full are kept as they are.

    The singular values that the sketch does not contain are estimated with 32 random vectors. The
    errors are therefore estimates, typically within a few percent of themselves.

    Args:
      spec: Specification of the adapter.
      params: Parameters of the base model. The difference of a rotation depends on them.
      state: Arrays of the adapter.
      rank: Rank of every module. Above the smaller side of a kernel the factors end with zeros.
      seed: Seed of the sketches.

    Raises:
      ValueError: `rank` exceeds both sides of a kernel, or the adapter is fully fine-tuned.

    Source: Halko, Martinsson and Tropp, 2011, arXiv 0909.4061, algorithms 4.4 and 5.1.

    Example:
      >>> from peft_jax.adapters import BOFT
      >>> key = jax.random.key(0)
      >>> params = {"mlp": {"kernel": jax.random.normal(key, (8, 6))}}
      >>> spec = AdapterSpec(BOFT(block_size=4, n_butterfly_factors=1))
      >>> state = spec.init(key, params)
      >>> state.trainable["mlp"]["kernel"]["r"] += 0.1
      >>> found = approximate_by_lora(spec, params, state, rank=6)
      >>> found.errors["mlp"] < 1e-3
      True
    """
    spec.check_merges(params)
    if not isinstance(spec.method, AdapterMethod) or spec.method.maps_tokens:
        raise ValueError(
            f"the method {spec.method.name!r} trains whole leaves or rows, whose difference is"
            " not an adapter's; export the merged model"
        )
    lora = AdapterSpec(
        LoRA(rank=rank, alpha=float(rank)),
        target_modules=spec.target_modules,
        exclude_modules=spec.exclude_modules,
        layers_to_transform=spec.layers_to_transform,
        modules_to_save=spec.modules_to_save,
        trainable_token_indices=spec.trainable_token_indices,
        bias=spec.bias,
    )
    targets = lora.targets(params)
    key = jax.random.key(seed)
    trainable = {path: flatten(state.trainable)[path] for path in targets.trained}
    trainable = {path: leaf.astype(lora.dtype) for path, leaf in trainable.items()}
    errors = {}
    bound = flatten(spec.bind(params, state))
    own = flatten(state.trainable, is_leaf=lambda path, _: path in targets.adapted)
    for path, method in targets.adapted.items():
        if isinstance(method, TokensBesideAdapters):
            trainable[path] = jax.tree.map(lambda leaf: leaf.astype(lora.dtype), own[path])
            continue
        factors = _factorize(bound[path], path, rank, key)
        trainable[path] = {"a": factors.a, "b": factors.b}
        norm, error = (np.asarray(x, np.float64).sum() for x in (factors.norm, factors.error))
        errors[join_path(path[:-1])] = float((error / norm) ** 0.5) if norm else 0.0
    return LoRAApproximation(
        spec=lora, state=AdapterState(trainable=unflatten(trainable), constant={}), errors=errors
    )


def _factorize(kernel: AdaptedKernel, path: Path, rank: int, key: jax.Array) -> _Factors:
    """Factorizes the difference of one kernel, stacked or not."""
    key = jax.random.fold_in(key, zlib.crc32(join_path(path).encode()))
    *stack, d_in, d_out = kernel_shape(kernel)
    keys = jax.random.split(key, tuple(stack)) if stack else key
    with jax.default_matmul_precision("highest"):
        depth = len(stack) - isinstance(kernel.method, SharedByExperts)
        return _factorize_all(kernel, keys, (d_in, d_out), rank, depth)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _factorize_all(
    kernel: AdaptedKernel, keys: jax.Array, shape: tuple[int, int], rank: int, depth: int
) -> _Factors:
    def factorize(given: tuple[AdaptedKernel, jax.Array]) -> _Factors:
        one, key = given
        if not isinstance(one.method, SharedByExperts):
            return _factorize_one(one, key, shape, rank)
        arrays, method = one.arrays, one.method.of

        def of_expert(given: tuple[Kernel, jax.Array]) -> _Factors:
            base, key = given
            own = AdaptedKernel(base=base, arrays=arrays, method=method)
            return _factorize_one(own, key, shape, rank)

        return one_by_one(of_expert)((one.base, key))

    # One at a time, so that one kernel's sketch is all that is held beside the results.
    return over_stack(one_by_one, factorize, depth)((kernel, keys))


def _factorize_one(
    kernel: AdaptedKernel, key: jax.Array, shape: tuple[int, int], rank: int
) -> _Factors:
    method, arrays = kernel.method, kernel.arrays
    assert isinstance(method, AdapterMethod)
    known = method.low_rank_factors(arrays)
    if known is not None:
        a, b = (factor.astype(jnp.float32) for factor in known)
        if (less := rank - a.shape[1]) >= 0:
            norm = jnp.sum((a.T @ a) * (b @ b.T))
            a, b = jnp.pad(a, ((0, 0), (0, less))), jnp.pad(b, ((0, less), (0, 0)))
            return _Factors(a, b, jnp.zeros_like(norm), norm)

    def difference(x: Float[Array, "rows d_in"]) -> Float[Array, "rows d_out"]:
        if known is not None:
            return (x @ a) @ b
        return method.project(x, kernel.base, arrays) - linear(x, kernel.base)

    return _sketch(difference, key, shape, rank)


def _sketch(difference: Any, key: jax.Array, shape: tuple[int, int], rank: int) -> _Factors:
    """Factorizes a linear map of rows [d_in] to rows [d_out], given as a function."""
    d_in, d_out = shape
    size = min(rank + _OVERSAMPLING, d_in, d_out)
    # The map is linear, so its derivative anywhere is its transpose.
    transposed = jax.vjp(difference, jnp.zeros((size, d_in), jnp.float32))[1]
    sketch_key, probe_key = jax.random.split(key)
    rows = difference(jax.random.normal(sketch_key, (size, d_in), jnp.float32))
    basis = orthonormal(rows.T)
    for _ in range(_POWER_ITERATIONS):
        columns = orthonormal(transposed(basis.T)[0].T)
        basis = orthonormal(difference(columns.T).T)
    # The transposed difference is near `basis` times these rows [size, d_in].
    left, s, right = triplets(basis, transposed(basis.T)[0])
    probes = jax.random.normal(probe_key, (_PROBES, d_out), jnp.float32)
    probes = probes - (probes @ basis) @ basis.T
    back = jax.vjp(difference, jnp.zeros((_PROBES, d_in), jnp.float32))[1]
    outside = jnp.sum(back(probes)[0] ** 2) / _PROBES
    kept = min(rank, size)
    root = jnp.sqrt(s[:kept])
    a, b = right[:, :kept] * root, root[:, None] * left[:, :kept].T
    return _Factors(
        a=jnp.pad(a, ((0, 0), (0, rank - kept))),
        b=jnp.pad(b, ((0, rank - kept), (0, 0))),
        error=jnp.sum(s[kept:] ** 2) + outside,
        norm=jnp.sum(s**2) + outside,
    )
