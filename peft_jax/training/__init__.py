"""From a configuration to a fine-tuned adapter, and everything a run leaves behind.

- [`config`][peft_jax.training.config]: `RunConfig`, every setting of a run.
- [`fine_tuning`][peft_jax.training.fine_tuning]: `train`, a run from Python.
- [`loop`][peft_jax.training.loop]: `run`, which does what a configuration says.
- [`prepare`][peft_jax.training.prepare]: everything a run needs, checked before it begins.
- [`trainer`][peft_jax.training.trainer]: `Trainer`, training in memory from Python.
- [`program`][peft_jax.training.program]: `StepProgram`, what a step computes with, as shapes.
- [`step`][peft_jax.training.step]: `TrainStep`, one optimizer step.
- [`checkpoints`][peft_jax.training.checkpoints]: to go on from.
- [`report`][peft_jax.training.report]: the page and the pictures that a run leaves.
"""

from peft_jax.runtime.errors import (
    BadDataError,
    InterruptedRunError,
    NonFiniteError,
    RefusedError,
)
from peft_jax.training.config import RunConfig, default_config, from_config_dict
from peft_jax.training.fine_tuning import TrainingResult, train
from peft_jax.training.loop import run
from peft_jax.training.state import TrainState
from peft_jax.training.step import LossFn, TrainStep
from peft_jax.training.trainer import Hooks, Trainer

__all__ = [
    "BadDataError",
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
    "from_config_dict",
    "run",
    "train",
]
