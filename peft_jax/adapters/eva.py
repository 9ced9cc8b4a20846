"""Implements EVA: LoRA initialized with the principal components of each kernel's inputs."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from peft_jax.adapters.lora import LoRA, LoRAForm
from peft_jax.adapters.method import Arrays, GradientFactors, InputFactors
from peft_jax.adapters.peft_form import PeftForm


@dataclasses.dataclass(frozen=True, kw_only=True)
class EVA(LoRA):
    """Low-rank adaptation by explained variance, y = x W + s (x A) B.

    A is initialized with the first r principal components of the kernel's inputs on the first
    batches, and B with zeros. `redistribute_ranks` gives larger ranks where they explain more.
    Trainable arrays: `a`, `b`.

    Source: Paischer et al., 2024, arXiv 2410.07170, section 3.
    """

    name: ClassVar[str] = "eva"
    by_layer: ClassVar[bool] = True

    @property
    def input_rank(self) -> int:
        """Number of principal components of the inputs that `init` needs: r."""
        return self.rank

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError if the inputs have fewer than r components."""
        if self.rank > shape[0]:
            self.reject_rank(module, shape, most=shape[0])

    def init(
        self,
        key: jax.Array,
        shape: tuple[int, int],
        gradient: GradientFactors | None = None,
        *,
        inputs: InputFactors | None = None,
    ) -> tuple[Arrays, Arrays]:
        """Returns the components as A, and B zero; no constant arrays.

        Raises:
          ValueError: `inputs` is None.
        """
        del key, gradient
        if inputs is None:
            raise ValueError(f"inputs must be given, because {self.name} is initialized from them")
        return {"a": inputs.v, "b": jnp.zeros((self.rank, shape[1]), jnp.float32)}, {}

    def peft_form(self) -> PeftForm | None:
        """Returns LoRA's form; none for a subclass, which may compute something else."""
        return LoRAForm(self) if type(self) is EVA else None

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns no form, because PEFT's adapters load as `lora`."""
        return ()
