"""Builds optimizers, schedules and hybrid mixing as optax gradient transformations.

- [`averaging`][peft_jax.optim.averaging]: `schedule_free`, `evaluated_arrays`.
- [`clipping`][peft_jax.optim.clipping]: `GroupClipping`.
- [`components`][peft_jax.optim.components]: `component_values`, `component_products`.
- [`directions`][peft_jax.optim.directions]: `OPTIMIZERS`.
- [`eight_bit`][peft_jax.optim.eight_bit]: `scale_by_adam_8bit`.
- [`gradient_grouping`][peft_jax.optim.gradient_grouping]: `gradient_grouping`.
- [`mixing`][peft_jax.optim.mixing]: `hybrid_mixing`, `MixingSettings`, `mixing_weights`.
- [`muon`][peft_jax.optim.muon]: `scale_by_muon`.
- [`optimizers`][peft_jax.optim.optimizers]: `make_optimizer`, `decay_mask`.
- [`prodigy`][peft_jax.optim.prodigy]: `prodigy`.
- [`rank_allocation`][peft_jax.optim.rank_allocation]: `rank_allocation`.
- [`riemannian`][peft_jax.optim.riemannian]: `riemannian_preconditioning`.
- [`schedules`][peft_jax.optim.schedules]: `make_schedule`, `ScheduleSettings`.
- [`scion`][peft_jax.optim.scion]: `scale_by_scion`.
- [`settings`][peft_jax.optim.settings]: `OptimizerSettings`.
"""

from peft_jax.optim.averaging import evaluated_arrays, schedule_free
from peft_jax.optim.clipping import GroupClipping
from peft_jax.optim.components import component_products, component_values
from peft_jax.optim.directions import OPTIMIZERS
from peft_jax.optim.eight_bit import scale_by_adam_8bit
from peft_jax.optim.gradient_grouping import gradient_grouping
from peft_jax.optim.mixing import (
    MIXING_RATES,
    MixingSettings,
    MixingState,
    hybrid_mixing,
    mixing_weights,
)
from peft_jax.optim.muon import scale_by_muon
from peft_jax.optim.optimizers import decay_mask, learning_rate_schedule, make_optimizer
from peft_jax.optim.prodigy import prodigy
from peft_jax.optim.rank_allocation import RankAllocationState, rank_allocation
from peft_jax.optim.riemannian import riemannian_preconditioning
from peft_jax.optim.schedules import SCHEDULES, ScheduleSettings, make_schedule
from peft_jax.optim.scion import scale_by_scion
from peft_jax.optim.settings import NO_DECAY, OptimizerSettings, usual_learning_rate

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
    "evaluated_arrays",
    "gradient_grouping",
    "hybrid_mixing",
    "learning_rate_schedule",
    "make_optimizer",
    "make_schedule",
    "mixing_weights",
    "prodigy",
    "rank_allocation",
    "riemannian_preconditioning",
    "scale_by_adam_8bit",
    "scale_by_muon",
    "scale_by_scion",
    "schedule_free",
    "usual_learning_rate",
]
