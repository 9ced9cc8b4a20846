"""Drops the least important directions of AdaLoRA adapters while they are trained."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from peft_jax.core import Path, Tree, flatten, unflatten
from peft_jax.core.validation import check_count, check_positive_int

VALUES = "e"
"""Name of the array of singular values."""
_VECTORS = {"a": -2, "b": -1}
"""Names of the arrays of singular vectors, and the axis that is averaged."""


class RankAllocationState(NamedTuple):
    """State of `rank_allocation`.

    Attributes:
      step: Number of steps taken.
      sensitivity: Moving average of |w g| for every entry w with gradient g.
      uncertainty: Moving average of the deviation from it.
      inner: State of the inner transformation.
    """

    step: jax.Array
    sensitivity: Any
    uncertainty: Any
    inner: Any


def rank_allocation(
    inner: optax.GradientTransformation,
    *,
    total_steps: int,
    target_rank: int = 8,
    initial_steps: int = 0,
    final_steps: int = 0,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformation:
    """Allocates the ranks of AdaLoRA's kernels by importance, around any transformation.

    A direction is one column of A, one singular value and one row of B. Its importance is the
    product of the averaged sensitivity |w g| and of its averaged uncertainty, for the singular
    value, plus the means over the entries of both vectors. From step `initial_steps` on, the budget
    falls with the cube of the time that is left, from the initial ranks to `target_rank` per kernel
    and layer. The least important directions of all kernels together get singular values of zero.
    They may come back while the budget falls.

    Args:
      inner: Transformation of all arrays. Its result is the update of a step.
      total_steps: Number of steps of the run.
      target_rank: Average rank of a kernel in the end.
      initial_steps: Number of first steps without a smaller budget.
      final_steps: Number of last steps with the final directions.
      every: Number of steps between two allocations.
      beta1: Decay of the sensitivity's average.
      beta2: Decay of the uncertainty's average.

    Returns:
      A transformation for trees in which each adapted kernel has arrays `a`, `b` and `e`; other
      leaves take the inner update.

    Raises:
      ValueError: A setting is invalid, or the schedule leaves no steps for the allocation.

    Source: Zhang et al., 2023, arXiv 2303.10512, eq. 8 to 13, as in Hugging Face PEFT, which counts
    the first step as 0 and uses the values after the step.

    Example:
      >>> params = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 3)), "e": jnp.array([1.0, 0.1])}
      >>> optimizer = rank_allocation(optax.sgd(0.0), total_steps=2, target_rank=1)
      >>> state = optimizer.init(params)
      >>> for _ in range(2):
      ...     updates, state = optimizer.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["e"]
      Array([1., 0.], dtype=float32)
    """
    check_positive_int("total_steps", total_steps)
    check_positive_int("target_rank", target_rank)
    check_positive_int("every", every)
    check_count("initial_steps", initial_steps)
    check_count("final_steps", final_steps)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 < beta < 1:
            raise ValueError(f"{name} must be above 0 and below 1, but is {beta!r}")
    falling = total_steps - final_steps - initial_steps
    if falling <= 0:
        raise ValueError(
            f"initial_steps ({initial_steps}) and final_steps ({final_steps}) must leave steps of"
            f" total_steps ({total_steps}) for the allocation"
        )

    def init(params: Tree) -> RankAllocationState:
        zeros = jax.tree.map(jnp.zeros_like, _directions(params))
        return RankAllocationState(jnp.zeros((), jnp.int32), zeros, zeros, inner.init(params))

    def update(
        gradients: Tree, state: RankAllocationState, params: Tree | None = None
    ) -> tuple[Tree, RankAllocationState]:
        if params is None:
            raise ValueError("params must be given to the update of rank_allocation")
        updates, inner_state = inner.update(gradients, state.inner, params)
        after = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
        counted = state.step < total_steps - final_steps

        def average(old: jax.Array, new: jax.Array, beta: float) -> jax.Array:
            return jnp.where(counted, beta * old + (1.0 - beta) * new, old)

        now = jax.tree.map(lambda p, g: jnp.abs(p * g), _directions(after), _directions(gradients))
        sensitivity = jax.tree.map(lambda s, n: average(s, n, beta1), state.sensitivity, now)
        deviation = jax.tree.map(lambda n, s: jnp.abs(n - s), now, sensitivity)
        uncertainty = jax.tree.map(lambda u, d: average(u, d, beta2), state.uncertainty, deviation)

        scores = _scores(jax.tree.map(jnp.multiply, sensitivity, uncertainty))
        directions = sum(score.size for score in scores.values())
        target = target_rank * sum(score.size // score.shape[-1] for score in scores.values())
        left = jnp.clip(1.0 - (state.step - initial_steps) / falling, 0.0, 1.0)
        budget = jnp.floor((directions - target) * left**3 + target).astype(jnp.int32)
        ordered = jnp.sort(jnp.concatenate([score.ravel() for score in scores.values()]))
        dropped = jnp.clip(directions - budget, 0, directions)
        threshold = ordered[jnp.maximum(dropped - 1, 0)]
        due = (state.step % every == 0) | (state.step >= total_steps - final_steps)
        allocate = (state.step > initial_steps) & due & (dropped > 0)

        flat, here = flatten(updates), flatten(params)
        for path, score in scores.items():
            values = (*path, VALUES)
            zeroed = allocate & (score <= threshold)
            flat[values] = jnp.where(zeroed, -here[values], flat[values])
        state = RankAllocationState(state.step + 1, sensitivity, uncertainty, inner_state)
        return unflatten(flat), state

    return optax.GradientTransformation(init, update)


def _directions(tree: Tree) -> Tree:
    """Returns the arrays of singular values and vectors, in float32."""
    flat = flatten(tree)
    kept = {path[:-1] for path in flat if path[-1] == VALUES}
    names = (VALUES, *_VECTORS)
    return unflatten(
        {
            path: leaf.astype(jnp.float32)
            for path, leaf in flat.items()
            if path[-1] in names and path[:-1] in kept
        }
    )


def _scores(products: Tree) -> dict[Path, jax.Array]:
    """Returns the importance [..., r] of the directions of every kernel, by its path."""
    flat = flatten(products)
    scores = {}
    for path, values in flat.items():
        if path[-1] == VALUES:
            vectors = [
                jnp.mean(flat[(*path[:-1], name)], axis=axis) for name, axis in _VECTORS.items()
            ]
            scores[path[:-1]] = values + sum(vectors)
    return scores
