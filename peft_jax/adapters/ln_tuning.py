"""Implements LN-tuning: the norms' scales and biases are trained, and nothing else."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from peft_jax.adapters.method import TrainingMethod
from peft_jax.adapters.peft_form import PeftForm, PeftSettings, Shapes
from peft_jax.core import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class LNTuning(TrainingMethod):
    """Trains the scales, and the biases if there are any, of norms.

    It is not an `AdapterMethod`, because it adds nothing to a kernel. `target_modules` selects
    norms; "all-linear" stands for all of them.

    Source: Zhao et al., 2023, arXiv 2312.11420.
    """

    name: ClassVar[str] = "ln_tuning"
    learning_rate: ClassVar[float] = 1e-3
    no_decay: ClassVar[tuple[str, ...]] = ("scale",)

    def trains_module(self, leaves: Sequence[Path]) -> bool:
        """Returns whether a module is a norm: whether it has a scale."""
        return any(path[-1] == "scale" for path in leaves)

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of LN-tuning."""
        return (LNTuningForm,)


@dataclasses.dataclass(frozen=True)
class LNTuningForm(PeftForm):
    """Copies of norms, which PEFT trains in place of the base's."""

    method: LNTuning
    peft_type = "LN_TUNING"
    names = ()
    exact = True
    copies = "ln_tuning_layers"
    understood = PeftSettings()

    @classmethod
    def read(cls, config: Mapping[str, Any], modules: Mapping[str, Shapes]) -> LNTuning:
        """Returns LN-tuning, which has no settings."""
        del config, modules
        return LNTuning()

    def settings(self) -> dict[str, Any]:
        """Returns no settings."""
        return {}

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns no shapes: kernels have no tensors."""
        del d_in, d_out
        return {}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns no tensors: kernels have none."""
        del arrays
        return {}
