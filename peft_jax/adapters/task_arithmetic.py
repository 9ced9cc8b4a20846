"""Merges arrays of several tasks: weighted sums, after pruning and an election of signs.

The arrays of the tasks are given as one, [tasks, ...]. Pruning keeps a share, the density, of each
task's entries.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SignMethod = Literal["total", "frequency"]
"""The sign of an entry is that of the sum over tasks, or the sign that most tasks have."""


def weighted_sum(
    tasks: Float[Array, "tasks ..."], weights: Float[Array, " tasks"]
) -> Float[Array, "..."]:
    """Returns the weighted sum (task arithmetic).

    Source: Ilharco et al., 2022, arXiv 2212.04089.
    """
    return jnp.tensordot(weights, tasks, axes=1, precision=jax.lax.Precision.HIGHEST)


def disjoint_mean(
    tasks: Float[Array, "tasks ..."],
    weights: Float[Array, " tasks"],
    sign_method: SignMethod = "total",
) -> Float[Array, "..."]:
    """Returns the weighted mean of each entry over the tasks that have its elected sign.

    A sum of exactly zero elects the positive sign, as in Hugging Face PEFT.

    Source: Yadav et al., 2023, arXiv 2306.01708 (TIES), steps 2 and 3.

    Example:
      >>> tasks = jnp.array([[1.0, -3.0], [3.0, 1.0]])
      >>> disjoint_mean(tasks, jnp.ones(2))
      Array([ 2., -3.], dtype=float32)
    """
    votes = tasks if sign_method == "total" else jnp.sign(tasks)
    elected = jnp.where(jnp.sum(votes, axis=0) >= 0, 1.0, -1.0)
    agrees = (jnp.sign(tasks) == elected).astype(tasks.dtype)
    count = jnp.maximum(jnp.sum(agrees, axis=0), 1.0)
    return weighted_sum(tasks * agrees, weights) / count


def keep_largest(tasks: Float[Array, "tasks ..."], density: float) -> Float[Array, "tasks ..."]:
    """Sets all but the largest entries of each task to zero, by absolute value.

    Args:
      tasks: Arrays of the tasks.
      density: Share of entries to keep, rounded down to a whole number of them.

    Example:
      >>> keep_largest(jnp.array([[1.0, -4.0, 2.0, 3.0]]), 0.5)
      Array([[ 0., -4.,  0.,  3.]], dtype=float32)
    """
    if density >= 1:
        return tasks
    rows = tasks.reshape(len(tasks), -1)
    count = math.floor(density * rows.shape[1])
    _, chosen = jax.lax.top_k(jnp.abs(rows), count)
    kept = jnp.zeros_like(rows).at[jnp.arange(len(rows))[:, None], chosen].set(1.0)
    return (rows * kept).reshape(tasks.shape)


def keep_random(
    tasks: Float[Array, "tasks ..."], density: float, key: jax.Array
) -> Float[Array, "tasks ..."]:
    """Sets random entries to zero, and divides the others by the density (DARE).

    Args:
      tasks: Arrays of the tasks.
      density: Probability that an entry is kept.
      key: Random key.

    Source: Yu et al., 2023, arXiv 2311.03099.
    """
    if density >= 1:
        return tasks
    return tasks * kept_at_random(tasks, density, key) / density


def kept_at_random(
    tasks: Float[Array, "tasks ..."], density: float, key: jax.Array
) -> Float[Array, "tasks ..."]:
    """Returns 1 at the entries to keep and 0 at the others."""
    return jax.random.bernoulli(key, density, tasks.shape).astype(tasks.dtype)
