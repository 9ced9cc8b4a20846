"""Prodigy: AdamW that estimates its learning rate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def prodigy(
    learning_rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float = 0.0,
    decay_mask: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns Adam's steps with an estimated learning rate, times a schedule.

    The learning rate is the schedule's times d, a lower bound on the distance from the start to a
    solution. d begins at 1e-6 and rises from step to step, estimated from the gradients' products
    with the way covered so far. So a schedule with a peak of 1 is the one to begin with.

    This adds three things to `optax.contrib.prodigy`. Weight decay, which each step multiplies by
    its learning rate too, leaves out the arrays that the mask excludes. The start is copied, so
    that a step can donate the parameters. And steps with gradients of zero before any other, which
    would make d undefined, change nothing.

    Args:
      learning_rate: Schedule by step, from 0.
      b1: Decay of the first moment.
      b2: Decay of the second moment; that of d is its square root.
      eps: Constant added to the denominator, times d.
      weight_decay: Decoupled weight decay.
      decay_mask: Returns which arrays of a tree decay. Default: all.

    Source: Mishchenko and Defazio, 2023, arXiv 2306.06101, algorithm 4.

    Example:
      >>> from peft_jax.optim import OptimizerSettings, ScheduleSettings, make_optimizer
      >>> settings = OptimizerSettings(name="prodigy", learning_rate=1.0, clip_norm=None,
      ...     schedule=ScheduleSettings(name="constant"))
      >>> optimizer = make_optimizer(settings, total_steps=8)
      >>> params = {"w": jnp.array([1.0])}
      >>> state, update = optimizer.init(params), jax.jit(optimizer.update)
      >>> for _ in range(8):
      ...     updates, state = update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(state.estim_lr) > 1.1e-6
      True
    """
    inner = optax.contrib.prodigy(learning_rate, betas=(b1, b2), eps=eps)

    def init(params: Any) -> Any:
        state = inner.init(params)
        return state._replace(params0=jax.tree.map(jnp.copy, state.params0))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        steps, after = inner.update(updates, state, params, **extra)
        if weight_decay:
            count = state.count + 1
            corrected = (1.0 - b2**count) ** 0.5 / (1.0 - b1**count)
            rate = state.estim_lr * learning_rate(state.count) * corrected * weight_decay
            decays = (
                jax.tree.map(lambda _: True, params) if decay_mask is None else decay_mask(params)
            )
            steps = jax.tree.map(lambda u, p, on: u - rate * p if on else u, steps, params, decays)
        known = optax.tree.sum(jax.tree.map(jnp.abs, after.grad_sum)) > 0
        steps = jax.tree.map(lambda u: jnp.where(known, u, 0.0), steps)
        kept = jax.tree.map(lambda new, old: jnp.where(known, new, old), after, state)
        return steps, kept

    return optax.GradientTransformationExtraArgs(init, update)
