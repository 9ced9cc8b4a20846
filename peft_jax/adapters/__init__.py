"""Adapts frozen parameter trees with pure functions.

Methods over one kernel: `LoRA`, `DoRA`, `LoRAGA`, `BOFT`, `Unitary`, `Hybrid` and `Full`.
`AdapterSpec` initializes, binds and merges an `AdapterState` over a model:

    spec = AdapterSpec(method=LoRA(rank=8))
    state = spec.init(key, params)         # small arrays for the selected kernels
    bound = spec.bind(params, state)       # the same tree, with an AdaptedKernel at each of them
    merged = spec.merge(params, state)     # plain arrays again
"""

from peft_jax.adapters.boft import BOFT
from peft_jax.adapters.dora import DoRA
from peft_jax.adapters.full import Full
from peft_jax.adapters.hybrid import LOW_RANK, ROTATION, Hybrid
from peft_jax.adapters.lora import LoRA
from peft_jax.adapters.lora_ga import LoRAGA
from peft_jax.adapters.method import AdapterMethod, GradientFactors, TrainingMethod
from peft_jax.adapters.registry import (
    METHODS,
    make_method,
    method_settings,
    peft_forms,
    register_installed,
    register_method,
)
from peft_jax.adapters.sketch import gradient_factors
from peft_jax.adapters.spec import AdapterSpec, AdapterState, merge
from peft_jax.adapters.table import ParameterCount, count_parameters, trainable_table
from peft_jax.adapters.targets import ALL_LINEAR, Targets, TargetSettings
from peft_jax.adapters.unitary import Unitary

__all__ = [
    "ALL_LINEAR",
    "BOFT",
    "LOW_RANK",
    "METHODS",
    "ROTATION",
    "AdapterMethod",
    "AdapterSpec",
    "AdapterState",
    "DoRA",
    "Full",
    "GradientFactors",
    "Hybrid",
    "LoRA",
    "LoRAGA",
    "ParameterCount",
    "TargetSettings",
    "Targets",
    "TrainingMethod",
    "Unitary",
    "count_parameters",
    "gradient_factors",
    "make_method",
    "merge",
    "method_settings",
    "peft_forms",
    "register_method",
    "trainable_table",
]

# Comes last, because the methods of installed packages may import names from this module.
register_installed()
