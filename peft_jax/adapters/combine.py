"""Combines several adapters over one base into one LoRA adapter."""

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peft_jax.adapters.factorize import HIGHEST, triplets
from peft_jax.adapters.gradient_products import has_stack, kernel_shape
from peft_jax.adapters.lora import LoRA
from peft_jax.adapters.method import AdapterMethod
from peft_jax.adapters.several import Adapters, find_adapters, reject_experts
from peft_jax.adapters.spec import AdapterSpec, AdapterState
from peft_jax.adapters.target_settings import Targets
from peft_jax.adapters.task_arithmetic import (
    SignMethod,
    disjoint_mean,
    keep_largest,
    keep_random,
    weighted_sum,
)
from peft_jax.adapters.trainable_tokens import TrainableTokens
from peft_jax.core import Kernel, Path, Tree, dense, flatten, join_path, unflatten
from peft_jax.core.validation import check_choice, check_positive_int

FACTOR_TYPES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Combination types that merge A with A and B with B."""

SVD_TYPES = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
"""Combination types that merge whole differences, and truncate the result to a rank."""

COMBINATION_TYPES = ("cat", *FACTOR_TYPES, *SVD_TYPES)
"""All combination types, under their names in Hugging Face PEFT."""

_WITHOUT_DENSITY = ("cat", "linear", "svd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rule:
    """How differences are merged.

    Attributes:
      combination_type: One of `COMBINATION_TYPES`.
      rank: Rank of the result.
      density: Share of entries that pruning keeps; 1 without pruning.
      sign_method: Election of signs in the types with "ties".
    """

    combination_type: str
    rank: int
    density: float
    sign_method: SignMethod

    def merge(
        self, tasks: Sequence[Array], weights: Float[Array, " tasks"], key: jax.Array
    ) -> Array:
        """Merges one array of each adapter, by the type without its "_svd"."""
        stacked = jnp.stack(tasks)
        kind = self.combination_type.removesuffix("_svd")
        if kind.startswith("dare"):
            stacked = keep_random(stacked, self.density, key)
        else:
            stacked = keep_largest(stacked, self.density)
        if kind.endswith("ties"):
            return disjoint_mean(stacked, weights, self.sign_method)
        return weighted_sum(stacked, weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Member:
    """An adapter to combine, with its weight and its targets."""

    name: str
    weight: float
    spec: AdapterSpec
    state: AdapterState
    targets: Targets
    bound: dict[Path, Any]


def combine_adapters(
    params: Tree,
    adapters: Adapters,
    weights: Mapping[str, float],
    combination_type: str = "svd",
    *,
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: SignMethod = "total",
    seed: int = 0,
) -> tuple[AdapterSpec, AdapterState]:
    """Combines adapters into one LoRA adapter, as PEFT's `add_weighted_adapter` does.

    Combination types:

    - "cat": concatenates the factors; exact, with the sum of the ranks.
    - "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune": merge the factors A with A
      and B with B, each weighted by the square root of weight times scale. They are cheap, but the
      product has mixed terms. All ranks must be equal.
    - "svd" and the same names with "_svd": merge the differences of whole kernels and truncate them
      to `svd_rank`. They take adapters of every method.

    A single adapter is always combined linearly, as in PEFT. A negative weight subtracts an
    adapter; in the types that merge factors its sign is on A alone.

    Args:
      params: Parameters of the base.
      adapters: Adapters by name.
      weights: Weights by name of the adapters to combine.
      combination_type: Combination type.
      svd_rank: Rank of the result for the types that truncate. Default: the largest rank of the
        adapters.
      density: Share of entries that pruning keeps, for the types that prune.
      majority_sign_method: Election of signs in the types with "ties".
      seed: Seed of the types with "dare", whose masks are not those of torch.

    Returns:
      Specification and arrays of a LoRA adapter whose scale is 1. Modules that only some of the
      adapters have are merged from those.

    Raises:
      ValueError: The adapters do not go together, or a setting is invalid; the message names them.

    Example:
      >>> params = {"mlp": {"kernel": jnp.zeros((4, 3))}}
      >>> spec = AdapterSpec(LoRA(rank=1, alpha=1.0))
      >>> one, two = (spec.init(jax.random.key(seed), params) for seed in (0, 1))
      >>> adapters = {"one": (spec, one), "two": (spec, two)}
      >>> spec, state = combine_adapters(params, adapters, {"one": 1.0, "two": -0.5}, "cat")
      >>> jax.tree.map(jnp.shape, state.trainable)
      {'mlp': {'kernel': {'a': (4, 2), 'b': (2, 3)}}}
    """
    check_choice("combination_type", combination_type, COMBINATION_TYPES)
    check_choice("majority_sign_method", majority_sign_method, get_args(SignMethod))
    members = _members(params, adapters, weights)
    if len(members) == 1:
        combination_type, density = "linear", None
    _check_density(combination_type, density)
    rule = _Rule(
        combination_type=combination_type,
        rank=_result_rank(combination_type, members, svd_rank),
        density=1.0 if density is None else density,
        sign_method=majority_sign_method,
    )
    flat = flatten(params)
    paths = [path for path in flat if any(path in m.targets.adapted for m in members)]
    trainable = {}
    for path in paths:
        own = [member for member in members if path in member.targets.adapted]
        kernels = [member.bound[path] for member in own]
        _check_ranks(rule.combination_type, path, own)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(join_path(path).encode()))
        a, b = _combine(
            flat[path] if combination_type in SVD_TYPES else None,
            tuple(kernel.arrays for kernel in kernels),
            jnp.array([member.weight for member in own], jnp.float32),
            jax.random.split(key, kernel_shape(flat[path])[0]) if has_stack(flat[path]) else key,
            tuple(kernel.method for kernel in kernels),
            rule,
            has_stack(flat[path]),
        )
        trainable[path] = {"a": a, "b": b}
    spec = AdapterSpec(LoRA(rank=rule.rank, alpha=float(rule.rank)), **_selection(members, paths))
    return spec, AdapterState(trainable=unflatten(trainable), constant={})


def _members(params: Tree, adapters: Adapters, weights: Mapping[str, float]) -> list[_Member]:
    """Returns the adapters to combine.

    Raises:
      ValueError: There is none, one is not known or does not fit the base, or one trains modules in
        full.
    """
    if not weights:
        raise ValueError("weights is empty; give the weight of at least one adapter")
    found = []
    for name, (spec, state) in find_adapters(params, adapters, tuple(weights)).items():
        if spec.method.trains_base:
            raise ValueError(f"adapter {name!r} is fully fine-tuned and cannot be combined")
        if not spec.method.merges:
            raise ValueError(f"adapter {name!r} has virtual tokens, which cannot be combined")
        targets = spec.targets(params)
        if any(isinstance(method, TrainableTokens) for method in targets.adapted.values()):
            raise ValueError(
                f"adapter {name!r} replaces rows of the embedding, which cannot be combined; merge"
                " it"
            )
        if targets.trained:
            saved = ", ".join(sorted({join_path(path[:-1]) for path in targets.trained}))
            raise ValueError(
                f"adapter {name!r} trains {saved} in full, and only adapted modules can be"
                " combined; combine adapters without modules_to_save and bias"
            )
        reject_experts(name, targets.adapted, "factors of experts cannot be combined")
        found.append(
            _Member(
                name=name,
                weight=float(weights[name]),
                spec=spec,
                state=state,
                targets=targets,
                bound=flatten(spec.bind(params, state)),
            )
        )
    return found


def _check_density(combination_type: str, density: float | None) -> None:
    if combination_type in _WITHOUT_DENSITY:
        if density is not None:
            raise ValueError(
                f"density is {density}, but combination type {combination_type!r} prunes nothing;"
                " omit it"
            )
    elif density is None or not 0 < density <= 1:
        raise ValueError(
            f"density is {density}, but combination type {combination_type!r} needs a number above"
            " 0 and up to 1"
        )


def _ranks(member: _Member) -> dict[Path, int] | None:
    """Returns the ranks of an adapter's factors by kernel; None if it has no factors."""
    ranks = {}
    for path, method in member.targets.adapted.items():
        arrays = member.bound[path].arrays
        if has_stack(member.bound[path]):
            arrays = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), arrays)
        factors = jax.eval_shape(method.low_rank_factors, arrays)
        if factors is None:
            return None
        ranks[path] = factors[0].shape[-1]
    return ranks


def _result_rank(combination_type: str, members: Sequence[_Member], svd_rank: int | None) -> int:
    """Returns the rank of the combined adapter."""
    by_name = {member.name: _ranks(member) for member in members}
    if combination_type in SVD_TYPES and svd_rank is not None:
        check_positive_int("svd_rank", svd_rank)
        return svd_rank
    if svd_rank is not None:
        raise ValueError(
            f"svd_rank is {svd_rank}, but combination type {combination_type!r} truncates nothing;"
            f" omit it, or use one of {', '.join(SVD_TYPES)}"
        )
    largest = {}
    for member in members:
        ranks = by_name[member.name]
        if ranks is None:
            advice = (
                "give svd_rank"
                if combination_type in SVD_TYPES
                else "use combination type 'svd' with svd_rank"
            )
            raise ValueError(
                f"adapter {member.name!r} has the method {member.spec.method.name!r}, which has no"
                f" rank; {advice}"
            )
        largest[member.name] = max(ranks.values())
    if combination_type == "cat":
        return sum(largest.values())
    if combination_type in FACTOR_TYPES and len(set(largest.values())) > 1:
        listed = ", ".join(f"{name!r} has {rank}" for name, rank in largest.items())
        raise ValueError(
            f"combination type {combination_type!r} needs adapters of one rank, but {listed}; use"
            " 'cat' or 'svd'"
        )
    return max(largest.values())


def _check_ranks(combination_type: str, path: Path, members: Sequence[_Member]) -> None:
    """Rejects different ranks of one module, which `rank_pattern` sets."""
    if combination_type not in FACTOR_TYPES:
        return
    found = {member.name: (_ranks(member) or {})[path] for member in members}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name!r} has {rank}" for name, rank in found.items())
        raise ValueError(
            f"combination type {combination_type!r} needs one rank for {join_path(path[:-1])}, but"
            f" {listed}; use 'cat' or 'svd'"
        )


def _selection(members: Sequence[_Member], paths: Sequence[Path]) -> dict[str, Any]:
    """Returns the settings that select the modules of all adapters."""
    names = ("target_modules", "exclude_modules", "layers_to_transform")
    settings = [tuple(getattr(member.spec, name) for name in names) for member in members]
    if all(one == settings[0] for one in settings):
        return dict(zip(names, settings[0], strict=True))
    modules: list[str] = []
    for path in paths:
        module = join_path(path[:-1])
        own = [member.targets for member in members if path in member.targets.adapted]
        if any(path not in targets.by_layer for targets in own):
            modules.append(module)
            continue
        modules += [
            module.replace(".", f".{layer}.", 1)
            for layer, methods in enumerate(zip(*(t.by_layer[path] for t in own), strict=True))
            if any(method is not None for method in methods)
        ]
    return {"target_modules": tuple(modules)}


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _combine(
    base: Kernel | None,
    arrays: tuple[Any, ...],
    weights: Float[Array, " tasks"],
    keys: jax.Array,
    methods: tuple[AdapterMethod, ...],
    rule: _Rule,
    stacked: bool,
) -> tuple[Array, Array]:
    """Combines the adapters of one kernel, one layer at a time."""

    def one(given: tuple[Kernel | None, tuple[Any, ...], jax.Array]) -> tuple[Array, Array]:
        kernel, own, key = given
        a, b = _combine_one(kernel, own, weights, key, methods, rule)
        missing = rule.rank - a.shape[1]
        return jnp.pad(a, ((0, 0), (0, missing))), jnp.pad(b, ((0, missing), (0, 0)))

    given = (base, arrays, keys)
    return jax.lax.map(one, given) if stacked else one(given)


def _combine_one(
    base: Kernel | None,
    arrays: tuple[Any, ...],
    weights: Float[Array, " tasks"],
    key: jax.Array,
    methods: tuple[AdapterMethod, ...],
    rule: _Rule,
) -> tuple[Float[Array, "d_in rank"], Float[Array, "rank d_out"]]:
    factors = [method.low_rank_factors(own) for method, own in zip(methods, arrays, strict=True)]
    known = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in filter(None, factors)]
    keys = jax.random.split(key)
    if rule.combination_type == "cat":
        return _concatenate(known, weights)
    if rule.combination_type in FACTOR_TYPES:
        # B holds the scale, which PEFT divides between both factors together with the weight.
        scales = [method.scale if isinstance(method, LoRA) else 1.0 for method in methods]
        scaled = weights * jnp.array(scales, jnp.float32)
        root = jnp.sqrt(jnp.abs(scaled))
        signed = jnp.where(scaled >= 0, root, -root)
        a = rule.merge([a for a, _ in known], signed, keys[0])
        raw = [b / scale for (_, b), scale in zip(known, scales, strict=True)]
        return a, rule.merge(raw, root, keys[1])
    if rule.combination_type == "svd" and len(known) == len(methods):
        a, b = _concatenate(known, weights)
        basis, triangle = jnp.linalg.qr(a)
        u, s, v = triplets(basis, jnp.matmul(triangle, b, precision=HIGHEST))
    else:
        assert base is not None
        kernel = dense(base).astype(jnp.float32)
        differences = [
            method.merge(kernel, own) - kernel
            if pair is None
            else jnp.matmul(*(x.astype(jnp.float32) for x in pair), precision=HIGHEST)
            for method, own, pair in zip(methods, arrays, factors, strict=True)
        ]
        u, s, vt = jnp.linalg.svd(rule.merge(differences, weights, keys[0]), full_matrices=False)
        v = vt.T
    rank = min(rule.rank, s.shape[0])
    return u[:, :rank] * s[:rank], v[:, :rank].T


def _concatenate(
    factors: Sequence[tuple[Array, Array]], weights: Float[Array, " tasks"]
) -> tuple[Array, Array]:
    """Returns [w₁ A₁, w₂ A₂, …] and [B₁; B₂; …]."""
    a = jnp.concatenate([a * weight for (a, _), weight in zip(factors, weights, strict=True)], 1)
    return a, jnp.concatenate([b for _, b in factors], 0)
