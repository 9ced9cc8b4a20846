"""Implements full fine-tuning, the baseline: trains the kernel without an adapter."""

import dataclasses
from typing import ClassVar

from peft_jax.adapters.method import TrainingMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(TrainingMethod):
    """Full fine-tuning, y = x W with W trainable.

    It is not an `AdapterMethod`, because it adds nothing to the kernel. `AdapterSpec` replaces the
    frozen leaf by the trainable one.
    """

    name: ClassVar[str] = "full"
    learning_rate: ClassVar[float] = 2e-5
    trains_base: ClassVar[bool] = True
