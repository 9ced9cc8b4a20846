"""Builds learning-rate schedules: a warm-up, then constant, linear, cosine or WSD."""

import dataclasses
import math

import jax.numpy as jnp
import optax

from peft_jax.core.validation import (
    check_choice,
    check_fraction,
    check_positive,
    check_positive_int,
)

SCHEDULES = ("constant", "linear", "cosine", "wsd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Settings of the learning-rate schedule.

    Attributes:
      name: "constant"; "linear" or "cosine", which decay from the end of the warm-up to the last
        step; or "wsd" (warm-up, stable, decay: Hu et al., 2024, arXiv 2404.06395), which keeps the
        peak and decays linearly over the last `decay_ratio` of all steps.
      warmup_steps: Number of steps over which the learning rate rises linearly to its peak.
      warmup_ratio: Warm-up as a fraction of all steps, rounded up but never all of them. Give it
        instead of `warmup_steps`.
      final_fraction: Final learning rate as a fraction of the peak. "constant" ignores it.
      decay_ratio: Fraction of all steps over which "wsd" decays.

    Raises:
      ValueError: The name is not known, a number is outside its range, both `warmup_steps` and
        `warmup_ratio` are given, or the ratios of warm-up and decay add up to more than 1.
    """

    name: str = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    final_fraction: float = 0.0
    decay_ratio: float = 0.1

    def __post_init__(self) -> None:
        check_choice("name", self.name, SCHEDULES)
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, but is {self.warmup_steps!r}")
        check_fraction("warmup_ratio", self.warmup_ratio)
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} and warmup_ratio is {self.warmup_ratio}, but"
                " only one of them can be given"
            )
        if not 0.0 <= self.final_fraction <= 1.0:
            raise ValueError(
                f"final_fraction must be between 0 and 1, but is {self.final_fraction!r}"
            )
        if not 0.0 < self.decay_ratio <= 1.0:
            raise ValueError(
                f"decay_ratio must be above 0 and at most 1, but is {self.decay_ratio!r}"
            )

        if self.name == "wsd" and self.warmup_ratio + self.decay_ratio > 1.0:
            raise ValueError(
                f"warmup_ratio is {self.warmup_ratio} and decay_ratio is {self.decay_ratio}, but"
                " their sum must be at most 1"
            )

    def warmup(self, total_steps: int) -> int:
        """Returns the number of warm-up steps of a run of `total_steps`.

        A ratio leaves at least one step after the warm-up, so that it fits a run of any length.
        """
        return self.warmup_steps or min(math.ceil(self.warmup_ratio * total_steps), total_steps - 1)


def make_schedule(
    settings: ScheduleSettings, learning_rate: float, total_steps: int
) -> optax.Schedule:
    """Returns the learning rate as a function of the step, counted from 0.

    With w warm-up steps, step t < w uses (t + 1) / (w + 1) of the peak, and step w the peak. So no
    step has a learning rate of zero. For the same reason the final value belongs to step
    `total_steps`, one after the last.

    Args:
      settings: Settings of the schedule.
      learning_rate: Peak learning rate.
      total_steps: Number of steps of the run.

    Raises:
      ValueError: The warm-up, or warm-up and decay together, do not fit in the run.

    Example:
      >>> settings = ScheduleSettings(name="linear", warmup_steps=1, final_fraction=0.5)
      >>> schedule = make_schedule(settings, learning_rate=0.8, total_steps=5)
      >>> [round(float(schedule(step)), 3) for step in range(6)]
      [0.4, 0.8, 0.7, 0.6, 0.5, 0.4]
    """
    check_positive("learning_rate", learning_rate)
    check_positive_int("total_steps", total_steps)
    warmup = settings.warmup(total_steps)
    remaining = total_steps - warmup
    if remaining < 1:
        raise ValueError(
            f"optimizer.schedule.warmup_steps is {warmup}, but must be below the {total_steps}"
            " steps of the run; lower it, or give optimizer.schedule.warmup_ratio instead"
        )
    final = settings.final_fraction * learning_rate
    if settings.name == "constant":
        main = optax.constant_schedule(learning_rate)
    elif settings.name == "linear":
        main = optax.linear_schedule(learning_rate, final, remaining)
    elif settings.name == "cosine":
        main = optax.cosine_decay_schedule(learning_rate, remaining, alpha=settings.final_fraction)
    else:
        decay = math.ceil(settings.decay_ratio * total_steps)
        if not settings.warmup_steps:
            # Both ratios are rounded up, which may give one step too many.
            decay = min(decay, remaining)
        if decay > remaining:
            raise ValueError(
                f"{warmup} warm-up steps and {decay} decay steps do not fit in {total_steps} steps;"
                " lower optimizer.schedule.warmup_steps or optimizer.schedule.decay_ratio"
            )
        plateau = remaining - decay
        main = optax.linear_schedule(learning_rate, final, decay, transition_begin=plateau)
    if warmup > 0:
        rise = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
        main = optax.join_schedules([rise, main], [warmup])
    # optax's schedules mix an integer step with floats, which JAX rejects under strict promotion.
    return lambda step: jnp.asarray(main(jnp.asarray(step, jnp.float32)), jnp.float32)
