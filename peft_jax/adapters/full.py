"""Full fine-tuning: the kernel itself is trained; the baseline."""

import dataclasses
from typing import ClassVar

from peft_jax.adapters.method import TrainingMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(TrainingMethod):
    """Every selected leaf is trained itself, y = x W with W trained.

    Not an `AdapterMethod`: nothing stands beside the kernel. `AdapterSpec` puts the trained leaf in
    the frozen one's place, and drops the frozen one.
    """

    name: ClassVar[str] = "full"
    learning_rate: ClassVar[float] = 2e-5
    trains_base: ClassVar[bool] = True
