"""Implements LoRA-One: LoRA that begins one step along the full gradient."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from peft_jax.adapters.lora import LoRA, LoRAForm
from peft_jax.adapters.method import Arrays, GradientFactors
from peft_jax.adapters.peft_form import PeftForm
from peft_jax.core.validation import check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAOne(LoRA):
    """Low-rank adaptation from one step of the full gradient, y = x W + s (x A) B.

    With the singular value decomposition G = U S Vᵀ of the kernel's gradient on the first batches,
    A = -U[:, :r] √(S / S₁) / √gamma and B = √(S / S₁) V[:, :r]ᵀ / √gamma. So s A B is the best
    approximation of the step -G with rank r, of spectral norm s / gamma, and training begins
    after it. Trainable arrays: `a`, `b`.

    Attributes:
      gamma: Divisor of the first step.

    Source: Zhang, Liu and Chen, 2025, arXiv 2502.01235, algorithm 1 without its preconditioners,
    with the scales of its authors' code.
    """

    name: ClassVar[str] = "lora_one"
    by_layer: ClassVar[bool] = True
    steps_at_start: ClassVar[bool] = True

    rank_stabilized: bool = True
    gamma: float = 128.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("gamma", self.gamma)

    @property
    def gradient_rank(self) -> int:
        """Number of singular directions of the gradient that `init` needs: r."""
        return self.rank

    def check_kernel(self, module: str, shape: tuple[int, int]) -> None:
        """Raises ValueError if the gradient has fewer than r singular directions."""
        if self.rank > min(shape):
            self.reject_rank(module, shape, most=min(shape))

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns A and B from the gradient's singular triplets; no constant arrays.

        Raises:
          ValueError: `gradient` is None.
        """
        del key, shape
        if gradient is None:
            raise ValueError(f"gradient must be given, because {self.name} is initialized from it")
        roots = jnp.sqrt(gradient.s / gradient.s[0]) / math.sqrt(self.gamma)
        return {"a": -gradient.u * roots, "b": roots[:, None] * gradient.v.T}, {}

    def peft_form(self) -> PeftForm | None:
        """Returns LoRA's form; none for a subclass, which may compute something else."""
        return LoRAForm(self) if type(self) is LoRAOne else None

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns no form, because PEFT's adapters load as `lora`."""
        return ()
