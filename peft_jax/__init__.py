"""Parameter-efficient fine-tuning of large language models in JAX and Flax.

    import peft_jax as pj

- Models and checkpoints: `load_model`, `load_classifier`, `build_model`, `save_model`,
  `ExecutionSettings`.
- Methods, each over one kernel: `LoRA`, `DoRA`, `LoRAFA`, `AdaLoRA`, `LoRAGA`, `LoRAOne`,
  `EVA` (with `redistribute_ranks`), `PiSSA`, `OLoRA`, `LoftQ`, `LoHa`, `LoKr`, `GraLoRA`,
  `HiRA`, `MiSS`, `VeRA`, `RandLora`, `FourierFT`, `SHiRA`, `IA3`, `BOFT`, `OFT`, `HRA`, `Unitary`,
  `Hybrid`; `TrainableTokens`, `LNTuning`, `Full`; inputs in place of kernels: `PromptTuning`,
  `PTuning`, `PrefixTuning`; your own: `AdapterMethod`, `register_method`.
- Flax modules of your own: `adapt` makes a model of a Linen or an NNX module, whose code stays as
  it is.
- Adapters over a whole model: `AdapterSpec` makes and binds an `AdapterState`; `merge`,
  `load_adapter`, `save_adapter`, `export_merged`, `trainable_table`. Several over one model:
  `bind_adapters`, `stack_adapters`, `combine_adapters`. Any method as a LoRA:
  `approximate_by_lora`. Kernels before they were quantized: `original_kernels`.
- Data: `dataset` describes rows by `DataSettings`; `build_data` reads them; `Batch` holds one's
  own.
- Training in a work directory, with checkpoints and a report: `train`, which returns a
  `TrainingResult`; from settings: `RunConfig`, `run`. `export_adapter` writes the result for PEFT,
  transformers and vLLM.
- Training in memory: `Trainer`, with `Hooks`; `hybrid_mixing` with its `MixingSettings`, and
  `rank_allocation`, are optax transformations.
- Planning for devices that need not be there: `make_plan`, of a `RunConfig` and what
  `find_topology` returns.
- Generation: `generate`, `generate_text`, `GenerationSettings`.

Names are imported when they are first used: `import peft_jax` itself imports nothing of JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from peft_jax import moved
from peft_jax.version import __version__

if TYPE_CHECKING:
    from peft_jax.adapters import (
        BOFT,
        EVA,
        HRA,
        IA3,
        OFT,
        AdaLoRA,
        AdapterMethod,
        AdapterSpec,
        AdapterState,
        DoRA,
        FourierFT,
        Full,
        GraLoRA,
        HiRA,
        Hybrid,
        LNTuning,
        LoftQ,
        LoHa,
        LoKr,
        LoRA,
        LoRAFA,
        LoRAGA,
        LoRAOne,
        MiSS,
        OLoRA,
        PiSSA,
        PrefixTuning,
        PromptTuning,
        PTuning,
        RandLora,
        SHiRA,
        TrainableTokens,
        Unitary,
        VeRA,
        approximate_by_lora,
        bind_adapters,
        combine_adapters,
        merge,
        redistribute_ranks,
        register_method,
        stack_adapters,
        trainable_table,
    )
    from peft_jax.cost import find_topology
    from peft_jax.data import Batch, DataSettings, build_data, dataset
    from peft_jax.flax_models import adapt
    from peft_jax.generation import GenerationSettings, generate, generate_text
    from peft_jax.hub import (
        export_merged,
        load_adapter,
        load_classifier,
        load_model,
        original_kernels,
        save_adapter,
        save_model,
    )
    from peft_jax.models import ExecutionSettings, build_model
    from peft_jax.optim import MixingSettings, hybrid_mixing, rank_allocation
    from peft_jax.plan import make_plan
    from peft_jax.training import (
        Hooks,
        RunConfig,
        Trainer,
        TrainingResult,
        export_adapter,
        run,
        train,
    )

_HOMES = {
    "adapters": (
        "BOFT",
        "EVA",
        "HRA",
        "IA3",
        "OFT",
        "AdaLoRA",
        "AdapterMethod",
        "AdapterSpec",
        "AdapterState",
        "DoRA",
        "FourierFT",
        "Full",
        "GraLoRA",
        "HiRA",
        "Hybrid",
        "LNTuning",
        "LoHa",
        "LoKr",
        "LoRA",
        "LoRAFA",
        "LoRAGA",
        "LoRAOne",
        "LoftQ",
        "MiSS",
        "OLoRA",
        "PTuning",
        "PiSSA",
        "PrefixTuning",
        "PromptTuning",
        "RandLora",
        "SHiRA",
        "TrainableTokens",
        "Unitary",
        "VeRA",
        "approximate_by_lora",
        "bind_adapters",
        "combine_adapters",
        "merge",
        "redistribute_ranks",
        "register_method",
        "stack_adapters",
        "trainable_table",
    ),
    "cost": ("find_topology",),
    "data": ("Batch", "DataSettings", "build_data", "dataset"),
    "flax_models": ("adapt",),
    "generation": ("GenerationSettings", "generate", "generate_text"),
    "hub": (
        "export_merged",
        "load_adapter",
        "load_classifier",
        "load_model",
        "original_kernels",
        "save_adapter",
        "save_model",
    ),
    "models": ("ExecutionSettings", "build_model"),
    "optim": ("MixingSettings", "hybrid_mixing", "rank_allocation"),
    "plan": ("make_plan",),
    "training": (
        "Hooks",
        "RunConfig",
        "Trainer",
        "TrainingResult",
        "export_adapter",
        "run",
        "train",
    ),
}
"""By subpackage, the names that are offered here."""

_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BOFT",
    "EVA",
    "HRA",
    "IA3",
    "OFT",
    "AdaLoRA",
    "AdapterMethod",
    "AdapterSpec",
    "AdapterState",
    "Batch",
    "DataSettings",
    "DoRA",
    "ExecutionSettings",
    "FourierFT",
    "Full",
    "GenerationSettings",
    "GraLoRA",
    "HiRA",
    "Hooks",
    "Hybrid",
    "LNTuning",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LoRAGA",
    "LoRAOne",
    "LoftQ",
    "MiSS",
    "MixingSettings",
    "OLoRA",
    "PTuning",
    "PiSSA",
    "PrefixTuning",
    "PromptTuning",
    "RandLora",
    "RunConfig",
    "SHiRA",
    "TrainableTokens",
    "Trainer",
    "TrainingResult",
    "Unitary",
    "VeRA",
    "__version__",
    "adapt",
    "approximate_by_lora",
    "bind_adapters",
    "build_data",
    "build_model",
    "combine_adapters",
    "dataset",
    "export_adapter",
    "export_merged",
    "find_topology",
    "generate",
    "generate_text",
    "hybrid_mixing",
    "load_adapter",
    "load_classifier",
    "load_model",
    "make_plan",
    "merge",
    "original_kernels",
    "rank_allocation",
    "redistribute_ranks",
    "register_method",
    "run",
    "save_adapter",
    "save_model",
    "stack_adapters",
    "train",
    "trainable_table",
]


def __getattr__(name: str) -> Any:
    """Imports a name of the front door from its home."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


moved.install()
