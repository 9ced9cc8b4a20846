"""Implements LoRA-FA: LoRA with a frozen first factor."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float

from peft_jax.adapters.lora import LoRA, LoRAForm
from peft_jax.adapters.method import Arrays, Axes, GradientFactors
from peft_jax.adapters.peft_form import PeftForm
from peft_jax.core import linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    """Low-rank adaptation with a frozen A, y = x W + s (x A) B.

    For the gradient of B, x A [tokens, r] is all that a layer keeps of its input. Trainable array:
    `b` [r, d_out], initially zero. Constant array: `a` [d_in, r], as LoRA initializes it.

    Source: Zhang et al., 2023, arXiv 2308.03303, with the gradient of B as it is.
    """

    name: ClassVar[str] = "lora_fa"

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns a zero B, and a constant A uniform within ±1/√d_in."""
        arrays, _ = super().init(key, shape, gradient)
        return {"b": arrays["b"]}, {"a": arrays["a"]}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns axes that shard A as the kernel's input and B as its output."""
        return {"b": (None, d_out)}, {"a": (d_in, None)}

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns A and s B."""
        return super().prepare({**trainable, **constant}, {}, dropout_key=dropout_key)

    def product(
        self,
        x: Float[Array, "*batch d_in"],
        a: Float[Array, "d_in rank"],
        b: Float[Array, "rank d_out"],
    ) -> Float[Array, "*batch d_out"]:
        """Returns (x A) B; its backward pass keeps x A."""
        return linear(linear(x, a), b)

    def peft_form(self) -> PeftForm | None:
        """Returns LoRA's form; none for a subclass, which may compute something else."""
        return LoRAFAForm(self) if type(self) is LoRAFA else None


@dataclasses.dataclass(frozen=True)
class LoRAFAForm(LoRAForm):
    """LoRA's tensors. PEFT's own files do not say which factor was frozen, and load as LoRA."""

    method: LoRAFA

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """Transposes the tensors."""
        arrays, _ = super().restore(tensors)
        return {"b": arrays["b"]}, {"a": arrays["a"]}
