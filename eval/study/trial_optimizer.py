"""Makes the learning rates of a run part of the optimizer's state, so that trials share a program.

A learning rate, a schedule's length or a factor that is a constant of the program would need a new
compilation for each value.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peft_jax.optim import (
    MixingSettings,
    OptimizerSettings,
    ScheduleSettings,
    component_products,
    component_values,
    learning_rate_schedule,
    make_optimizer,
)

_RATE_INSIDE = ("prodigy", "schedule_free_adamw")


def trial_optimizer(
    settings: OptimizerSettings, steps: int, *, mixing: MixingSettings | None = None
) -> optax.GradientTransformationExtraArgs:
    """Builds an optimizer like `make_optimizer`, with learning rates that `set_rates` changes.

    Args:
      settings: Settings of the optimizer. Of its learning rate, its schedule and its
        `rate_factors` only the components of the latter matter here.
      steps: Largest number of steps of a run.
      mixing: Mixing settings of a hybrid adapter's branches; None for no mixing.

    Raises:
      ValueError: The learning rate is not the last factor of the optimizer's updates.
    """
    if settings.name in _RATE_INSIDE:
        raise ValueError(
            f"optimizer.name is {settings.name!r}, whose learning rate is not its updates' last"
            " factor, so trials cannot share its program; choose another optimizer for a study"
        )
    constant = dataclasses.replace(
        settings, learning_rate=1.0, rate_factors={}, schedule=ScheduleSettings(name="constant")
    )
    # The learning rate is the last factor of its updates, so that 1 leaves it to the state.
    inner = make_optimizer(constant, steps, mixing=mixing)
    own = dict.fromkeys(settings.learning_rates, 1.0)

    def init(params: Any) -> Any:
        return {
            "count": jnp.zeros([], jnp.int32),
            "rate": jnp.zeros([], jnp.float32),
            "schedule": jnp.zeros(steps, jnp.float32),
            "factors": {name: jnp.ones([], jnp.float32) for name in settings.rate_factors},
            "inner": inner.init(params),
        }

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        directions, after = inner.update(updates, state["inner"], params, **extra)
        rates = component_values(directions, own, state["rate"])
        factors = component_products(directions, state["factors"])
        now = state["schedule"][state["count"]]
        scaled = jax.tree.map(
            lambda step, rate, factor: step * (now * rate * factor), directions, rates, factors
        )
        return scaled, {**state, "count": state["count"] + 1, "inner": after}

    return optax.GradientTransformationExtraArgs(init, update)


def set_rates(opt_state: Any, settings: OptimizerSettings, steps: int) -> Any:
    """Returns a state of `trial_optimizer` with the learning rates of a run.

    Args:
      opt_state: State before the first step.
      settings: Settings of the run, with the same components as those of the optimizer.
      steps: Number of steps of the run.
    """
    unit = dataclasses.replace(settings, learning_rate=1.0)
    shape = learning_rate_schedule(unit, steps)(jnp.arange(steps))
    schedule = np.zeros(opt_state["schedule"].shape, np.float32)
    schedule[:steps] = np.asarray(shape)
    return {
        **opt_state,
        "rate": jnp.asarray(settings.learning_rate, jnp.float32),
        "schedule": jnp.asarray(schedule),
        "factors": {
            name: jnp.asarray(settings.rate_factors[name], jnp.float32)
            for name in opt_state["factors"]
        },
    }
