"""Adapts frozen parameter trees with pure functions.

Methods over one kernel: `LoRA`, `DoRA`, `LoRAFA`, `AdaLoRA`, `LoRAGA`, `LoRAOne`, `EVA`, `PiSSA`,
`OLoRA`, `LoftQ`, `LoHa`, `LoKr`, `GraLoRA`, `HiRA`, `MiSS`, `VeRA`, `RandLora`, `FourierFT`,
`SHiRA`, `IA3`, `BOFT`, `OFT`, `HRA`, `Unitary` and `Hybrid`.
`TrainableTokens` trains rows of an embedding. `LNTuning` and `Full` train the model's own leaves.
`PromptTuning`, `PTuning` and `PrefixTuning` train virtual tokens before every sequence.
`AdapterSpec` initializes, binds and merges an `AdapterState` over a model:

    spec = AdapterSpec(method=LoRA(rank=8))
    state = spec.init(key, params)         # small arrays for the selected kernels
    bound = spec.bind(params, state)       # the same tree, with an AdaptedKernel at each of them
    merged = spec.merge(params, state)     # plain arrays again

`bind_adapters` switches and stacks several adapters over one base. `stack_adapters` lets each row
of a batch use its own, and `combine_adapters` makes one of them. `approximate_by_lora` converts an
adapter of any method.
"""

from peft_jax.adapters.adalora import AdaLoRA
from peft_jax.adapters.boft import BOFT
from peft_jax.adapters.by_row import StackedAdapters, stack_adapters
from peft_jax.adapters.combine import COMBINATION_TYPES, combine_adapters
from peft_jax.adapters.dora import DoRA
from peft_jax.adapters.eva import EVA
from peft_jax.adapters.fourierft import FourierFT
from peft_jax.adapters.full import Full
from peft_jax.adapters.gralora import GraLoRA
from peft_jax.adapters.hira import HiRA
from peft_jax.adapters.hra import HRA
from peft_jax.adapters.hybrid import Hybrid
from peft_jax.adapters.ia3 import IA3
from peft_jax.adapters.input_sketch import input_factors
from peft_jax.adapters.ln_tuning import LNTuning
from peft_jax.adapters.loftq import LoftQ
from peft_jax.adapters.loha import LoHa
from peft_jax.adapters.lokr import LoKr
from peft_jax.adapters.lora import LoRA
from peft_jax.adapters.lora_approximation import LoRAApproximation, approximate_by_lora
from peft_jax.adapters.lora_fa import LoRAFA
from peft_jax.adapters.lora_ga import LoRAGA
from peft_jax.adapters.lora_one import LoRAOne
from peft_jax.adapters.lora_start import OLoRA, PiSSA
from peft_jax.adapters.method import AdapterMethod, GradientFactors, InputFactors, TrainingMethod
from peft_jax.adapters.miss import MiSS
from peft_jax.adapters.oft import OFT
from peft_jax.adapters.p_tuning import PTuning
from peft_jax.adapters.prefix_tuning import PrefixTuning
from peft_jax.adapters.prompt_tuning import PromptTuning
from peft_jax.adapters.randlora import RandLora
from peft_jax.adapters.redistribute import redistribute_ranks
from peft_jax.adapters.registry import (
    METHODS,
    make_method,
    method_settings,
    peft_forms,
    register_installed,
    register_method,
)
from peft_jax.adapters.several import bind_adapters
from peft_jax.adapters.shira import SHiRA
from peft_jax.adapters.sketch import gradient_factors
from peft_jax.adapters.spec import AdapterSpec, AdapterState, merge
from peft_jax.adapters.table import ParameterCount, count_parameters, trainable_table
from peft_jax.adapters.target_settings import ALL_LINEAR, Targets, TargetSettings
from peft_jax.adapters.trainable_tokens import TrainableTokens
from peft_jax.adapters.unitary import Unitary
from peft_jax.adapters.vera import VeRA
from peft_jax.adapters.virtual_method import VirtualMethod
from peft_jax.core import LOW_RANK, ROTATION

__all__ = [
    "ALL_LINEAR",
    "BOFT",
    "COMBINATION_TYPES",
    "EVA",
    "HRA",
    "IA3",
    "LOW_RANK",
    "METHODS",
    "OFT",
    "ROTATION",
    "AdaLoRA",
    "AdapterMethod",
    "AdapterSpec",
    "AdapterState",
    "DoRA",
    "FourierFT",
    "Full",
    "GraLoRA",
    "GradientFactors",
    "HiRA",
    "Hybrid",
    "InputFactors",
    "LNTuning",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAApproximation",
    "LoRAFA",
    "LoRAGA",
    "LoRAOne",
    "LoftQ",
    "MiSS",
    "OLoRA",
    "PTuning",
    "ParameterCount",
    "PiSSA",
    "PrefixTuning",
    "PromptTuning",
    "RandLora",
    "SHiRA",
    "StackedAdapters",
    "TargetSettings",
    "Targets",
    "TrainableTokens",
    "TrainingMethod",
    "Unitary",
    "VeRA",
    "VirtualMethod",
    "approximate_by_lora",
    "bind_adapters",
    "combine_adapters",
    "count_parameters",
    "gradient_factors",
    "input_factors",
    "make_method",
    "merge",
    "method_settings",
    "peft_forms",
    "redistribute_ranks",
    "register_method",
    "stack_adapters",
    "trainable_table",
]

# Comes last, because the methods of installed packages may import names from this module.
register_installed()
