"""Fine-tunes adapters, from a configuration or in memory.

- [`config`][peft_jax.training.config]: `RunConfig`, every setting of a run.
- [`fine_tuning`][peft_jax.training.fine_tuning]: `train`, a run from Python.
- [`loop`][peft_jax.training.loop]: `run`, which trains from a configuration.
- [`prepare`][peft_jax.training.prepare]: everything a run needs, checked before it begins.
- [`adapter_formats`][peft_jax.training.adapter_formats]: `export_adapter`, for other tools.
- [`trainer`][peft_jax.training.trainer]: `Trainer`, training in memory from Python.
- [`program`][peft_jax.training.program]: `StepProgram`, the program of a step, as shapes.
- [`step`][peft_jax.training.step]: `TrainStep`, one optimizer step.
- [`checkpoints`][peft_jax.training.checkpoints]: checkpoints to resume from.
- [`report`][peft_jax.training.report]: metrics, summary, plots and report of a run.
"""

from peft_jax.runtime.errors import (
    BadDataError,
    InterruptedRunError,
    NonFiniteError,
    RefusedError,
)
from peft_jax.training.adapter_formats import Exported, export_adapter
from peft_jax.training.config import RunConfig, default_config, from_config_dict
from peft_jax.training.fine_tuning import TrainingResult, train
from peft_jax.training.loop import run
from peft_jax.training.state import TrainState
from peft_jax.training.step import LossFn, TrainStep
from peft_jax.training.trainer import Hooks, Trainer

__all__ = [
    "BadDataError",
    "Exported",
    "Hooks",
    "InterruptedRunError",
    "LossFn",
    "NonFiniteError",
    "RefusedError",
    "RunConfig",
    "TrainState",
    "TrainStep",
    "Trainer",
    "TrainingResult",
    "default_config",
    "export_adapter",
    "from_config_dict",
    "run",
    "train",
]
