"""Builds optimizers, schedules and hybrid mixing as optax gradient transformations.

- [`clipping`][peft_jax.optim.clipping]: `GroupClipping`.
- [`components`][peft_jax.optim.components]: `component_values`, `component_products`.
- [`mixing`][peft_jax.optim.mixing]: `hybrid_mixing`, `MixingSettings`, `mixing_weights`.
- [`optimizers`][peft_jax.optim.optimizers]: `make_optimizer`, `OptimizerSettings`, `decay_mask`.
- [`rank_allocation`][peft_jax.optim.rank_allocation]: `rank_allocation`.
- [`schedules`][peft_jax.optim.schedules]: `make_schedule`, `ScheduleSettings`.
"""

from peft_jax.optim.clipping import GroupClipping
from peft_jax.optim.components import component_products, component_values
from peft_jax.optim.mixing import (
    MIXING_RATES,
    MixingSettings,
    MixingState,
    hybrid_mixing,
    mixing_weights,
)
from peft_jax.optim.optimizers import (
    NO_DECAY,
    OPTIMIZERS,
    OptimizerSettings,
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
)
from peft_jax.optim.rank_allocation import RankAllocationState, rank_allocation
from peft_jax.optim.schedules import SCHEDULES, ScheduleSettings, make_schedule

__all__ = [
    "MIXING_RATES",
    "NO_DECAY",
    "OPTIMIZERS",
    "SCHEDULES",
    "GroupClipping",
    "MixingSettings",
    "MixingState",
    "OptimizerSettings",
    "RankAllocationState",
    "ScheduleSettings",
    "component_products",
    "component_values",
    "decay_mask",
    "hybrid_mixing",
    "learning_rate_schedule",
    "make_optimizer",
    "make_schedule",
    "mixing_weights",
    "rank_allocation",
]
