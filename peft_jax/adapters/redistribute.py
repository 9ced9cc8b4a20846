"""Redistributes the ranks of an EVA adapter by the variance that its directions explain."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np

from peft_jax.adapters.eva import EVA
from peft_jax.adapters.gradient_products import LossFn, kernel_shape
from peft_jax.adapters.input_sketch import input_factors
from peft_jax.adapters.names import layer_name
from peft_jax.adapters.spec import AdapterSpec
from peft_jax.core import Path, Tree, flatten, join_path


def redistribute_ranks(
    spec: AdapterSpec,
    key: jax.Array,
    params: Tree,
    *,
    loss_fn: LossFn,
    batches: Sequence[Any],
    rho: float = 2.0,
    passes: int = 1,
) -> AdapterSpec:
    """Returns the specification of an EVA adapter with ranks that differ by layer.

    The sum of the ranks stays the same. Each module of each layer offers the first round(rho r)
    principal components of its inputs, and those that explain the largest shares of their inputs'
    variance are taken. Modules of which none is taken are not adapted. The scale s stays the same.

    Args:
      spec: Specification of an `EVA` adapter.
      key: Random key.
      params: The model's parameters.
      loss_fn: Loss of (parameters, batch), as for `AdapterSpec.init`.
      batches: Batches.
      rho: Largest rank, as a multiple of r; 1 changes nothing.
      passes: Number of passes over the batches; see `input_factors`.

    Returns:
      A specification for `AdapterSpec.init` on the same batches, with `rank_pattern` and
      `alpha_pattern` by layer.

    Raises:
      ValueError: The method is not EVA, or rho is below 1.

    Source: Paischer et al., 2024, arXiv 2410.07170, section 3.2.
    """
    if not isinstance(spec.method, EVA):
        raise ValueError(f"the method must be eva, whose ranks follow inputs, not {spec.method!r}")
    if not (math.isfinite(rho) and rho >= 1):
        raise ValueError(f"rho is {rho!r}, but must be a number of at least 1")
    flat = flatten(params)
    targets = spec.targets(params)
    widths = {
        path: min(round(rho * method.input_rank), kernel_shape(flat[path])[-2])
        for path, method in targets.adapted.items()
    }
    factors = input_factors(loss_fn, params, widths, batches, key, passes=passes)
    offers: list[tuple[float, Path, int]] = []
    methods: dict[tuple[Path, int], EVA] = {}
    for path in targets.adapted:
        variance = np.atleast_2d(np.asarray(factors[path].variance))
        total = np.atleast_1d(np.asarray(factors[path].total))
        for layer, method in enumerate(targets.layers(path, len(total))):
            if isinstance(method, EVA):
                methods[path, layer] = method
                shares = variance[layer, : round(rho * method.rank)] / total[layer]
                offers += [(float(share), path, layer) for share in shares]
    budget = sum(method.rank for method in methods.values())
    taken = sorted(offers, key=lambda offer: -offer[0])[:budget]
    ranks = dict.fromkeys(methods, 0)
    for _, path, layer in taken:
        ranks[path, layer] += 1
    some = {path for path, layers in targets.by_layer.items() if None in layers}
    return _with_ranks(spec, spec.method, methods, ranks, some)


def _with_ranks(
    spec: AdapterSpec,
    common: EVA,
    methods: dict[tuple[Path, int], EVA],
    ranks: dict[tuple[Path, int], int],
    some: Collection[Path],
) -> AdapterSpec:
    """Returns the specification with other ranks and the same scales, by path and layer."""
    rank_pattern, alpha_pattern = {}, {}
    dropped = {path for (path, _), rank in ranks.items() if not rank}
    names: dict[str, None] = {}
    for (path, layer), rank in ranks.items():
        if not rank:
            continue
        module = join_path(path[:-1])
        name = layer_name(module, layer)
        whole = path not in dropped and path not in some
        names[module if whole else name] = None
        old = methods[path, layer]
        alpha = old.scale * (math.sqrt(rank) if old.rank_stabilized else rank)
        if rank != common.rank:
            rank_pattern[name] = rank
        if not math.isclose(alpha, common.alpha):
            alpha_pattern[name] = alpha
    return dataclasses.replace(
        spec,
        target_modules=tuple(names),
        exclude_modules=(),
        layers_to_transform=(),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )
