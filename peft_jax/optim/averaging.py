"""Schedule-free averaging: an average of the iterates in place of a falling learning rate."""

from typing import Any

import jax
import optax

from peft_jax.core import Tree


def schedule_free(
    inner: optax.GradientTransformation, learning_rate: optax.Schedule, b1: float
) -> optax.GradientTransformationExtraArgs:
    """Trains at interpolated points y of an average x and of iterates z, which `inner` steps.

        z ← z + Δ(y),   x ← (1 − c) x + c z,   y ← (1 − b1) z + b1 x,

    where Δ(y) is the step of `inner` for the gradient at y, and c = γ² / Σ γ² for the largest
    learning rate γ so far. The parameters of the optimizer are y. Those to evaluate are x; see
    `evaluated_arrays`.

    Args:
      inner: Optimizer without a first moment, including its learning rate.
      learning_rate: The schedule of `inner` by step, from 0.
      b1: Weight of the average in y, above 0.

    Source: Defazio et al., 2024, arXiv 2405.15682, algorithm 1, in `optax.contrib.schedule_free`.
    """
    # optax counts from 1 here, and the steps of a schedule from 0.
    return optax.contrib.schedule_free(inner, lambda count: learning_rate(count - 1), b1=b1)


def evaluated_arrays(opt_state: Any, trainable: Tree) -> Tree:
    """Returns the arrays to evaluate and export, sharded and typed as `trainable`.

    They are `trainable` itself, except that schedule-free training evaluates an average, which
    `opt_state` holds part of.

    Args:
      opt_state: State of any optimizer.
      trainable: Trainable arrays after the same step.

    Raises:
      ValueError: The state has several schedule-free averages.

    Example:
      >>> import jax.numpy as jnp
      >>> from peft_jax.optim import OptimizerSettings, ScheduleSettings, make_optimizer
      >>> settings = OptimizerSettings(name="schedule_free_adamw", learning_rate=1.0, b1=0.5,
      ...     schedule=ScheduleSettings(name="constant"))
      >>> optimizer = make_optimizer(settings, total_steps=2)
      >>> params = {"w": jnp.array([1.0])}
      >>> state = optimizer.init(params)
      >>> for _ in range(2):
      ...     updates, state = optimizer.update({"w": jnp.ones(1)}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> average = evaluated_arrays(state, params)
      >>> round(float(params["w"][0]), 3), round(float(average["w"][0]), 3)
      (-0.75, -0.5)
    """
    is_average = lambda node: isinstance(node, optax.contrib.ScheduleFreeState)  # noqa: E731
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(node)]
    if not found:
        return trainable
    if len(found) > 1:
        raise ValueError("the optimizer state has two schedule-free averages; use one")
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    return jax.jit(_average, out_shardings=shardings)(found[0].b1, trainable, found[0].z)


def _average(b1: Any, trainable: Tree, z: Tree) -> Tree:
    """Returns x = (y − (1 − b1) z) / b1 in the dtypes of `trainable`."""

    def one(y: jax.Array, z: jax.Array) -> jax.Array:
        wide = y.astype(z.dtype)
        return ((wide - (1.0 - b1.astype(z.dtype)) * z) / b1.astype(z.dtype)).astype(y.dtype)

    return jax.tree.map(one, trainable, z)
