"""Implements AdaLoRA: a low-rank product in the form of a singular value decomposition."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapters.lora import LORA_SETTINGS, LoRA
from peft_jax.adapters.method import Arrays, Axes, GradientFactors
from peft_jax.adapters.peft_form import (
    NEUTRAL,
    PeftForm,
    PeftSettings,
    Shapes,
    plain_number,
    setting,
)

START = 0.02
"""Standard deviation of the initial singular vectors."""

EPSILON = 1e-5
"""Hugging Face PEFT's addition to the rank in the scale."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRA(LoRA):
    """Adaptive budget for low-rank adaptation, y = x W + s ((x A) ⊙ e) B with s ≈ alpha / rank.

    Singular values e that are zero drop a direction. `peft_jax.optim.rank_allocation` chooses them
    while training, over all kernels. Without it every direction stays. Trainable arrays: `a`
    [d_in, r] and `b` [r, d_out], initially normal, and `e` [r], initially zero.

    Attributes:
      rank: Initial rank r of every kernel.
      alpha: Numerator of s; the denominator is rank + 1e-5, as in Hugging Face PEFT.
      dropout: Probability that an input of A is dropped while training.

    Source: Zhang et al., 2023, arXiv 2303.10512, eq. 3, without the penalty that keeps the
    singular vectors orthogonal.
    """

    name: ClassVar[str] = "adalora"
    learning_rate: ClassVar[float] = 5e-4

    rank: int = 12
    alpha: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_stabilized:
            raise ValueError(f"rank_stabilized must be False for {self.name}, which has its scale")

    @property
    def scale(self) -> float:
        """Factor s on the product."""
        return self.alpha / (self.rank + EPSILON)

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns random singular vectors and zero singular values."""
        del gradient
        d_in, d_out = shape
        a_key, b_key = jax.random.split(key)
        return {
            "a": START * jax.random.normal(a_key, (d_in, self.rank), jnp.float32),
            "b": START * jax.random.normal(b_key, (self.rank, d_out), jnp.float32),
            "e": jnp.zeros((self.rank,), jnp.float32),
        }, {}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns axes that shard A as the kernel's input and B as its output."""
        return {"a": (d_in, None), "b": (None, d_out), "e": (None,)}, {}

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns A and s e B."""
        del constant, dropout_key
        return {
            "a": trainable["a"],
            "b": self.scale * trainable["e"][:, None] * trainable["b"],
        }

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of AdaLoRA."""
        return (AdaLoRAForm,)


@dataclasses.dataclass(frozen=True)
class AdaLoRAForm(PeftForm):
    """`lora_A` is Aᵀ, `lora_B` is Bᵀ and `lora_E` [r, 1] is e.

    PEFT leaves out the directions that were dropped, in each layer its own number of them. They are
    read as zeros. The scale is that of the initial rank in both.
    """

    method: AdaLoRA
    peft_type = "ADALORA"
    only_bias = "lora_only"
    names = ("lora_A", "lora_B", "lora_E")
    exact = True
    understood = PeftSettings(
        read={"init_r": int, "lora_alpha": float, "lora_dropout": float},
        # Which directions are left is read from the tensors' shapes; the others are for training.
        irrelevant=LORA_SETTINGS.irrelevant
        | {
            *("beta1", "beta2", "deltaT", "orth_reg_weight", "r", "rank_pattern"),
            *("target_r", "tfinal", "tinit", "total_step"),
        },
        fixed={
            **LORA_SETTINGS.fixed,
            "alpha_pattern": NEUTRAL,
            "init_lora_weights": (True, False),
            "use_rslora": NEUTRAL,
        },
        compared=("init_r", "lora_alpha"),
    )

    @classmethod
    def read(cls, config: Mapping[str, Any], modules: Mapping[str, Shapes]) -> AdaLoRA:
        """Returns AdaLoRA with the initial rank, alpha and dropout of the configuration."""
        del modules
        return AdaLoRA(
            rank=setting(config, "init_r", 12),
            alpha=float(setting(config, "lora_alpha", 8)),
            dropout=float(setting(config, "lora_dropout", 0.0)),
        )

    def settings(self) -> dict[str, Any]:
        """Returns the rank and alpha, and a schedule that PEFT accepts and does not use."""
        return {
            "init_lora_weights": True,
            "init_r": self.method.rank,
            "lora_alpha": plain_number(self.method.alpha),
            "lora_dropout": self.method.dropout,
            "target_r": self.method.rank,
            "tfinal": 0,
            "tinit": 0,
            "total_step": 1,
        }

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [r, d_in], [d_out, r] and [r, 1]."""
        return _shapes(self.method.rank, d_in, d_out)

    def accepted_shapes(self, d_in: int, d_out: int, found: Shapes) -> Shapes:
        """Returns the shapes of as many directions as a module has."""
        rank = min(next(iter(found.get("lora_E", ())), self.method.rank), self.method.rank)
        return _shapes(rank, d_in, d_out)

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Transposes the factors."""
        return {
            "lora_A": arrays["a"].T,
            "lora_B": arrays["b"].T,
            "lora_E": arrays["e"][:, None],
        }

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """Transposes the tensors, and pads them with directions of zero."""
        missing = self.method.rank - tensors["lora_E"].shape[0]
        return {
            "a": np.pad(tensors["lora_A"].T, ((0, 0), (0, missing))),
            "b": np.pad(tensors["lora_B"].T, ((0, missing), (0, 0))),
            "e": np.pad(tensors["lora_E"][:, 0], (0, missing)),
        }, {}


def _shapes(rank: int, d_in: int, d_out: int) -> Shapes:
    return {"lora_A": (rank, d_in), "lora_B": (d_out, rank), "lora_E": (rank, 1)}
