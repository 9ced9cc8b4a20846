"""Implements LoHa: the elementwise product of two low-rank products, added to the kernel."""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from peft_jax.adapters.lora import LoRA
from peft_jax.adapters.method import Arrays, Axes, GradientFactors
from peft_jax.adapters.peft_fields import RenamingForm
from peft_jax.adapters.peft_form import PeftForm, PeftSettings, Shapes, plain_number, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHa(LoRA):
    """Low-rank Hadamard product, y = x W + s x ((A₁ B₁) ⊙ (A₂ B₂)).

    The product has a rank of up to r², and is (A₁ • A₂)(B₁ • B₂) with the products of all pairs of
    columns of A₁ and A₂ [d_in, r²] and of rows of B₁ and B₂ [r², d_out]. So a token costs as much
    as with LoRA of rank r², and no array of the kernel's size is formed. Trainable arrays: `a1`,
    `a2` [d_in, r], `b1`, `b2` [r, d_out], uniform within ±1/√d_in and ±1/√r; `a2` starts at zero.

    Attributes:
      rank: Rank r of each factor.
      alpha, rank_stabilized, dropout: As in `LoRA`.

    Source: Nam, Ye and Oh, 2021, arXiv 2108.06098 (FedPara), proposition 1, as an adapter. Hugging
    Face PEFT drops outputs or whole modules while training; here inputs are dropped, as in LoRA.
    """

    name: ClassVar[str] = "loha"

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns random factors, one of which is zero."""
        del gradient
        d_in, d_out = shape
        keys = jax.random.split(key, 3)
        of_a, of_b = 1.0 / math.sqrt(d_in), 1.0 / math.sqrt(self.rank)
        return {
            "a1": jax.random.uniform(keys[0], (d_in, self.rank), jnp.float32, -of_a, of_a),
            "b1": jax.random.uniform(keys[1], (self.rank, d_out), jnp.float32, -of_b, of_b),
            "a2": jnp.zeros((d_in, self.rank), jnp.float32),
            "b2": jax.random.uniform(keys[2], (self.rank, d_out), jnp.float32, -of_b, of_b),
        }, {}

    def axes(self, d_in: str | None, d_out: str | None) -> tuple[Axes, Axes]:
        """Returns axes that shard each A as the kernel's input and each B as its output."""
        a, b = (d_in, None), (None, d_out)
        return {"a1": a, "b1": b, "a2": a, "b2": b}, {}

    def prepare(
        self, trainable: Arrays, constant: Arrays, *, dropout_key: jax.Array | None = None
    ) -> Arrays:
        """Returns A₁ • A₂ [d_in, r²] and s B₁ • B₂ [r², d_out]."""
        del constant, dropout_key
        a = trainable["a1"][:, :, None] * trainable["a2"][:, None, :]
        b = trainable["b1"][:, None, :] * trainable["b2"][None, :, :]
        pairs = self.rank**2
        return {"a": a.reshape(-1, pairs), "b": self.scale * b.reshape(pairs, -1)}

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of LoHa."""
        return (LoHaForm,)


@dataclasses.dataclass(frozen=True)
class LoHaForm(RenamingForm):
    """`hada_w1_a` is B₁ᵀ and `hada_w1_b` is A₁ᵀ, and so for the second factor."""

    method: LoHa
    peft_type = "LOHA"
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    arrays = ("b1", "a1", "b2", "a2")
    transposed = True
    exact = True
    understood = PeftSettings(
        read={
            "alpha": float,
            "alpha_pattern": Mapping[str, float],
            "r": int,
            "rank_pattern": Mapping[str, int],
        },
        # Dropout of other kinds than here, for training only, and settings of convolutions.
        irrelevant=frozenset(
            {"init_weights", "module_dropout", "rank_dropout", "use_effective_conv2d"}
        ),
        compared=("alpha", "alpha_pattern", "r", "rank_pattern"),
    )
    patterns = MappingProxyType({"r": "rank_pattern", "alpha": "alpha_pattern"})

    @classmethod
    def read(cls, config: Mapping[str, Any], modules: Mapping[str, Shapes]) -> LoHa:
        """Returns LoHa with the rank and alpha of the configuration."""
        del modules
        return LoHa(rank=setting(config, "r", 8), alpha=float(setting(config, "alpha", 8)))

    def settings(self) -> dict[str, Any]:
        """Returns the rank, and the alpha that gives the method's scale."""
        return {
            "alpha": plain_number(scaling_alpha(self.method)),
            "init_weights": True,
            "r": self.method.rank,
        }

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [d_out, r] and [r, d_in], twice."""
        r = self.method.rank
        return {
            "hada_w1_a": (d_out, r),
            "hada_w1_b": (r, d_in),
            "hada_w2_a": (d_out, r),
            "hada_w2_b": (r, d_in),
        }


def scaling_alpha(method: LoRA) -> float:
    """Returns the alpha with which alpha / rank is the method's scale.

    Example:
      >>> scaling_alpha(LoHa(rank=4, alpha=8.0, rank_stabilized=True))
      16.0
    """
    return method.alpha * math.sqrt(method.rank) if method.rank_stabilized else method.alpha
