"""Defines the settings of an optimizer."""

import dataclasses
from collections.abc import Mapping

from peft_jax.core import LOW_RANK, ROTATION
from peft_jax.core.validation import (
    check_choice,
    check_finite,
    check_fraction,
    check_positive,
)
from peft_jax.optim.clipping import GroupClipping
from peft_jax.optim.directions import CONSTANTS, DIRECTIONS, OPTIMIZERS, PRODIGY, SCHEDULE_FREE
from peft_jax.optim.schedules import ScheduleSettings

NO_DECAY = ("bias", "scale", "rotation", "r", "phases", "reflections", "low_rank")
"""Path components without weight decay by default; `OptimizerSettings.no_decay` says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Settings of the optimizer.

    Attributes:
      name: "adamw", "adam", "nadamw", "lion", "adafactor", "rmsprop", "sgd", "adamw_8bit", "muon",
        "scion", "sgg", "riemannian_adamw", "schedule_free_adamw" or "prodigy".
      learning_rate: Peak learning rate of the schedule.
      learning_rates: Peak learning rates of the trainable arrays under a path component, where they
        differ from `learning_rate`. A new head, `{"classifier": 2e-3}`, starts from random weights
        and needs a higher rate than an adapter of a pretrained kernel.
      rate_factors: Factors on the learning rates of the trainable arrays under a path component,
        whether from `learning_rate` or `learning_rates`. The factors of all components of a path
        multiply. `{"b": 16.0}` is LoRA+ (Hayou, Ghosh and Yu, 2024, arXiv 2402.12354), and
        `{"self_attn": 4.0}` trains the attention of a Llama faster than its MLP.
      weight_decay: Decoupled weight decay: each step subtracts learning rate × weight_decay × w
        from a weight w.
      b1: Decay of the first moment; momentum of sgd, and of matrices with muon; weight of the
        average in schedule_free_adamw. None for the optimizer's default.
      b2: Decay of the second moment. None for the optimizer's default.
      eps: Constant added to the denominator. None for the optimizer's default.
      clip_norm: Maximum gradient norm; None for no clipping. Each of a hybrid's branches is clipped
        by its own norm, and so is each component of `learning_rates`, but not of `rate_factors`;
        see `GroupClipping`.
      no_decay: Path components without weight decay, beside the method's own. Decay pulls towards
        zero, so it suits arrays for which zero is harmless: a weight matrix of full fine-tuning, or
        the A and B of plain LoRA. By default it excludes biases and norm scales, as is usual. It
        excludes a rotation's parameters, which are bounded by construction. It excludes BOFT's
        scale, whose neutral value is one. It excludes a hybrid's low-rank branch, because LoRA-GA
        computes AB − A₀B₀: at A = B = 0 it would subtract A₀B₀ from the pretrained kernel.
      schedule: Schedule of the learning rate over the run.
      b3: Decay of the factors of sgg, 0.99 by default.
      clusters: Number of groups per array in sgg, 3 by default.
      recluster_ratio: Fraction of all steps between groupings in sgg, 0.05 by default.
      damping: Constant added to the diagonals that riemannian_adamw inverts, 0.01 by default.

    Raises:
      ValueError: The name is not known, a number is outside its range, the optimizer does not have
        a given constant, or it does not support the schedule or a rate by component.
    """

    name: str = "adamw"
    learning_rate: float = 2e-4
    learning_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rate_factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    weight_decay: float = 0.0
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    clip_norm: float | None = 1.0
    no_decay: tuple[str, ...] = NO_DECAY
    schedule: ScheduleSettings = dataclasses.field(default_factory=ScheduleSettings)
    b3: float | None = None
    clusters: int | None = None
    recluster_ratio: float | None = None
    damping: float | None = None

    def __post_init__(self) -> None:
        check_choice("name", self.name, OPTIMIZERS)
        check_positive("learning_rate", self.learning_rate)
        for component, rate in self.learning_rates.items():
            check_positive(f"learning_rates[{component!r}]", rate)
        for component, factor in self.rate_factors.items():
            check_positive(f"rate_factors[{component!r}]", factor)
        if self.clip_norm is not None:
            check_positive("clip_norm", self.clip_norm)
        check_finite("weight_decay", self.weight_decay)
        direction = DIRECTIONS[self.name]
        if self.weight_decay and not direction.decays:
            raise ValueError(
                f"weight_decay is {self.weight_decay}, but {self.name} has none; use adamw, or set"
                " weight_decay to 0"
            )
        for constant in CONSTANTS:
            value = getattr(self, constant)
            if value is None:
                continue
            if constant not in direction.constants:
                taken = ", ".join(direction.constants) or "none of b1, b2 and eps"
                raise ValueError(
                    f"{constant} is {value}, but {self.name} does not have it; it takes {taken}"
                )
            _check_constant(constant, value)
        self._check_combination()

    def _check_combination(self) -> None:
        """Raises ValueError for settings that the optimizer does not support."""
        if self.name == SCHEDULE_FREE:
            if self.schedule.name != "constant":
                raise ValueError(
                    f"schedule.name is {self.schedule.name!r}, but {self.name} averages in place of"
                    " a falling learning rate; set optimizer.schedule.name to 'constant', with a"
                    " warm-up if needed"
                )
            if not self.constants["b1"]:
                raise ValueError(f"b1 is 0, but {self.name} needs an average; set it above 0")
        if self.name == PRODIGY:
            for setting in ("learning_rates", "rate_factors"):
                if given := getattr(self, setting):
                    raise ValueError(
                        f"{setting} is {dict(given)}, but {self.name} estimates one learning rate"
                        f" for all arrays; leave {setting} out, or use adamw"
                    )

    @property
    def clipping(self) -> GroupClipping | None:
        """Clipping of the gradients; None for none."""
        if self.clip_norm is None:
            return None
        return GroupClipping(self.clip_norm, (LOW_RANK, ROTATION, *self.learning_rates))

    @property
    def constants(self) -> dict[str, float]:
        """The optimizer's constants, such as b1, b2 and eps, each as given or by default."""
        return {
            name: usual if getattr(self, name) is None else getattr(self, name)
            for name, usual in DIRECTIONS[self.name].constants.items()
        }


def usual_learning_rate(name: str) -> float | None:
    """Returns the peak learning rate to begin with; None for that of the method.

    Args:
      name: Name of an optimizer, also an unknown one.

    Example:
      >>> usual_learning_rate("prodigy"), usual_learning_rate("adamw")
      (1.0, None)
    """
    return DIRECTIONS[name].learning_rate if name in DIRECTIONS else None


def _check_constant(name: str, value: float | int) -> None:
    """Raises ValueError if a constant is outside its range."""
    if name == "clusters":
        if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 127:
            raise ValueError(f"clusters must be an integer from 2 to 127, but is {value!r}")
    elif name == "recluster_ratio":
        check_positive(name, value)
        if value > 1.0:
            raise ValueError(f"recluster_ratio must be at most 1, but is {value!r}")
    elif name == "damping":
        check_positive(name, value)
    else:
        check_fraction(name, value)
