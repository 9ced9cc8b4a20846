"""SGG: scales the learning rates of groups of parameters with similar momentum."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from peft_jax.core import names_of
from peft_jax.optim.matrices import stack_axes

_EPS = 1e-8
_SMALLEST, _LARGEST = 0.1, 10.0
_ROUNDS = 10
_LEAST_ENTRIES = 64


class GroupingState(NamedTuple):
    """State of `gradient_grouping`.

    Attributes:
      count: Number of steps taken, int32 [].
      adam: State of Adam.
      groups: Group of each parameter, int8, shaped as the parameters.
      factors: Factor on the learning rate of each group, float32 [*stack, groups].
    """

    count: Any
    adam: Any
    groups: Any
    factors: Any


def gradient_grouping(
    b1: float, b2: float, eps: float, *, b3: float, clusters: int, every: int
) -> optax.GradientTransformation:
    """Returns Adam's direction, times a factor for the group of each parameter.

    Every `every` steps, the momentum m of each array, and of each layer of a stack, is divided into
    K clusters by K-means. Let D_c be the median of |m − mean(m)| over cluster c, and D the typical
    one of the model. The factors of the clusters become

        S_c ← β₃ S_c + (1 − β₃) clip(D / (D_c + 1e-8), 0.1, 10),

    and begin at 1. Clusters that deviate much are slowed, and calm ones sped up.

    The paper leaves open what is decided here as follows:

    - Clusters are numbered by their centers, so that a factor stays with a kind of parameter.
    - K-means begins at centers spread evenly over two standard deviations around the mean, and
      takes 10 rounds over all entries. The paper takes mini-batches and random centers.
    - D is the median of all D_c. An empty cluster keeps its factor.
    - Arrays of fewer than 64 entries per layer are not grouped.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Constant added to the denominator.
      b3: β₃.
      clusters: K.
      every: Number of steps between groupings.

    Source: Li et al., 2025, arXiv 2506.01049, algorithm 1 and eq. 5 to 7.

    Example:
      >>> params = {"a": jnp.zeros((16, 16))}
      >>> sgg = gradient_grouping(0.9, 0.999, 1e-8, b3=0.5, clusters=2, every=1)
      >>> gradient = {"a": jnp.where(jnp.arange(256) < 192, 1.0, 5.0).reshape(16, 16)}
      >>> with jax.numpy_dtype_promotion("standard"):
      ...     direction, state = sgg.update(gradient, sgg.init(params))
      >>> [round(x, 2) for x in state.factors["a"].tolist()]
      [1.5, 0.83]
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def init(params: Any) -> GroupingState:
        groups = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.int8), params)
        factors = jax.tree_util.tree_map_with_path(
            lambda path, p: jnp.ones((*p.shape[: _stack(path, p)], clusters), jnp.float32), params
        )
        return GroupingState(jnp.zeros([], jnp.int32), adam.init(params), groups, factors)

    def update(updates: Any, state: GroupingState, params: Any = None) -> tuple[Any, GroupingState]:
        del params
        directions, inner = adam.update(updates, state.adam)
        count = optax.safe_increment(state.count)

        def regroup() -> tuple[Any, Any]:
            return _regroup(inner.mu, state.groups, state.factors, b3)

        groups, factors = jax.lax.cond(
            count % every == 0, regroup, lambda: (state.groups, state.factors)
        )
        scaled = jax.tree.map(lambda d, g, s: d * _picked(s, g), directions, groups, factors)
        return scaled, GroupingState(count, inner, groups, factors)

    return optax.GradientTransformation(init, update)


def _regroup(mu: Any, groups: Any, factors: Any, b3: float) -> tuple[Any, Any]:
    """Returns the groups of all parameters by their momentum, and the groups' factors."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(mu)]
    tree = jax.tree.structure(mu)
    old, before = jax.tree.leaves(groups), jax.tree.leaves(factors)
    new: list[Array] = []
    spreads: list[Array | None] = []
    for path, m, group, factor in zip(paths, jax.tree.leaves(mu), old, before, strict=True):
        rows = m.reshape(*m.shape[: _stack(path, m)], -1)
        if rows.shape[-1] < _LEAST_ENTRIES:
            new.append(group)
            spreads.append(None)
            continue
        found = _k_means(rows, factor.shape[-1])
        new.append(found.reshape(m.shape).astype(jnp.int8))
        deviation = jnp.abs(rows - jnp.mean(rows, axis=-1, keepdims=True))
        spreads.append(_medians(deviation, found, factor.shape[-1]))
    known = [spread.ravel() for spread in spreads if spread is not None]
    if not known:
        return groups, factors
    typical = jnp.nanmedian(jnp.concatenate(known))

    def moved(factor: Array, spread: Array | None) -> Array:
        if spread is None:
            return factor
        wanted = jnp.clip(typical / (spread + _EPS), _SMALLEST, _LARGEST)
        return jnp.where(jnp.isnan(spread), factor, b3 * factor + (1.0 - b3) * wanted)

    after = [moved(*pair) for pair in zip(before, spreads, strict=True)]
    return jax.tree.unflatten(tree, new), jax.tree.unflatten(tree, after)


def _k_means(rows: Float[Array, "*stack n"], clusters: int) -> Int[Array, "*stack n"]:
    """Returns the cluster of each entry of each row, numbered by increasing centers."""
    mean = jnp.mean(rows, axis=-1, keepdims=True)
    spread = jnp.std(rows, axis=-1, keepdims=True)
    centers = mean + jnp.linspace(-2.0, 2.0, clusters, dtype=rows.dtype) * spread

    def nearest(centers: Array) -> Array:
        middles = (centers[..., 1:] + centers[..., :-1]) / 2
        found = jnp.zeros(rows.shape, jnp.int32)
        for at in range(clusters - 1):
            found += (rows > middles[..., at, None]).astype(jnp.int32)
        return found

    def move(_: Any, centers: Array) -> Array:
        found = nearest(centers)
        means = []
        for cluster in range(clusters):
            own = found == cluster
            count = jnp.sum(own, axis=-1)
            total = jnp.sum(jnp.where(own, rows, 0.0), axis=-1)
            kept = centers[..., cluster]
            means.append(jnp.where(count > 0, total / jnp.maximum(count, 1), kept))
        return jnp.stack(means, axis=-1)

    return nearest(jax.lax.fori_loop(0, _ROUNDS, move, centers))


def _medians(
    values: Float[Array, "*stack n"], groups: Int[Array, "*stack n"], clusters: int
) -> Float[Array, "*stack clusters"]:
    """Returns the median of nonnegative values by group; NaN for an empty group.

    The entries are counted, and not sorted, so that sharded arrays stay sharded.
    """
    found = []
    for cluster in range(clusters):
        own = groups == cluster
        count = jnp.sum(own, axis=-1)
        low = _ranked(values, own, jnp.maximum(count - 1, 0) // 2)
        high = _ranked(values, own, count // 2)
        found.append(jnp.where(count > 0, (low + high) / 2, jnp.nan))
    return jnp.stack(found, axis=-1)


def _ranked(
    values: Float[Array, "*stack n"], own: Bool[Array, "*stack n"], rank: Int[Array, "*stack"]
) -> Float[Array, "*stack"]:
    """Returns the value of a rank, from 0, among a row's own nonnegative values.

    Nonnegative floats are ordered as their bits, of which a binary search finds one at a time.
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)

    def search(step: Array, prefix: Array) -> Array:
        candidate = prefix | jnp.left_shift(jnp.int32(1), 30 - step)
        below = jnp.sum(own & (bits < candidate[..., None]), axis=-1)
        return jnp.where(below <= rank, candidate, prefix)

    found = jax.lax.fori_loop(0, 31, search, jnp.zeros(rank.shape, jnp.int32))
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def _picked(factors: Float[Array, "*stack k"], groups: Any) -> Float[Array, "..."]:
    """Returns the factor of each parameter's group."""
    stack = factors.ndim - 1
    picked = jnp.ones(groups.shape, factors.dtype)
    for cluster in range(factors.shape[-1]):
        factor = factors[..., cluster].reshape(*factors.shape[:-1], *[1] * (groups.ndim - stack))
        picked = jnp.where(groups == cluster, factor, picked)
    return picked


def _stack(path: Any, leaf: Any) -> int:
    """Returns the number of leading axes over layers and experts."""
    return min(stack_axes(names_of(path)), leaf.ndim)
