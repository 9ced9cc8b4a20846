"""Learning-rate schedules: a warm-up, then constant, linear, cosine, or a plateau and a fall."""

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
    """How the learning rate goes from its peak to its end.

    Attributes:
      name: "constant"; "linear" and "cosine", which fall from the end of the warm-up to the last
        step; "wsd" (warm-up, stable, decay: Hu et al., 2024, arXiv 2404.06395), which keeps the
        peak and falls linearly over the last `decay_ratio` of all steps.
      warmup_steps: how many steps the rate rises, linearly, before it is at its peak.
      warmup_ratio: the same as a fraction of all steps, rounded up, but never all of them; instead
        of `warmup_steps`.
      final_fraction: where the rate ends, as a fraction of the peak; "constant" has no end.
      decay_ratio: of "wsd", the part of all steps over which it falls.

    Raises:
      ValueError: the name is not known, a number is outside its range, both ways of giving the
        warm-up are used, or warm-up and decay are ratios that add up to more than 1.
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
                f"warmup_steps is {self.warmup_steps} and warmup_ratio {self.warmup_ratio}; "
                "give one of them"
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
                f"warmup_ratio is {self.warmup_ratio} and decay_ratio {self.decay_ratio}; together"
                " they must be at most 1"
            )

    def warmup(self, total_steps: int) -> int:
        """How many steps of a run of `total_steps` come before the peak.

        A ratio leaves at least one step at the peak, so that it fits a run of any length.
        """
        return self.warmup_steps or min(math.ceil(self.warmup_ratio * total_steps), total_steps - 1)


def make_schedule(
    settings: ScheduleSettings, learning_rate: float, total_steps: int
) -> optax.Schedule:
    """The learning rate as a function of the step, counted from 0.

    With w steps of warm-up, step t < w takes (t + 1) / (w + 1) of the peak, so that no step is
    spent at a rate of zero, and step w takes the peak. The end would be reached at `total_steps`,
    one step after the last, for the same reason.

    Args:
      settings: its shape.
      learning_rate: the peak.
      total_steps: how many steps the run takes.

    Raises:
      ValueError: the warm-up, or warm-up and decay together, do not fit into the run.

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
            f"the warm-up takes {warmup} of {total_steps} steps; it must leave at least one: lower"
            " optimizer.schedule.warmup_steps, or give optimizer.schedule.warmup_ratio in its place"
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
            # Two ratios are both rounded up, which may make one step too many.
            decay = min(decay, remaining)
        if decay > remaining:
            raise ValueError(
                f"the warm-up takes {warmup} steps and the decay {decay}, of {total_steps}; "
                "shorten one of them"
            )
        plateau = remaining - decay
        main = optax.linear_schedule(learning_rate, final, decay, transition_begin=plateau)
    if warmup > 0:
        rise = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
        main = optax.join_schedules([rise, main], [warmup])
    # optax's schedules compute with the step in floating point but take it as an integer, which
    # strict promotion of dtypes refuses.
    return lambda step: jnp.asarray(main(jnp.asarray(step, jnp.float32)), jnp.float32)
