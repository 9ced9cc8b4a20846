"""Implements LoRA on an embedding: a low-rank product added to a table of tokens."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from peft_jax.adapters.lora import LoRA, LoRAForm
from peft_jax.adapters.method import Arrays, GradientFactors
from peft_jax.adapters.peft_form import PeftForm, Shapes
from peft_jax.core import Kernel, linear, take_rows
from peft_jax.core.scopes import part


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAEmbedding(LoRA):
    """LoRA on an embedding E [vocab, embed], whose rows become E + s A B.

    As in Hugging Face PEFT, A [vocab, r] is initialized with zeros and B [r, embed] with the
    standard normal distribution, and there is no dropout. A tied head has the same change.
    """

    by_layer: ClassVar[bool] = True
    maps_tokens: ClassVar[bool] = True

    def init(
        self, key: jax.Array, shape: tuple[int, int], gradient: GradientFactors | None = None
    ) -> tuple[Arrays, Arrays]:
        """Returns A zero and B standard normal; no constant arrays."""
        del gradient
        vocab, embed = shape
        b = jax.random.normal(key, (self.rank, embed), jnp.float32)
        return {"a": jnp.zeros((vocab, self.rank), jnp.float32), "b": b}, {}

    @part("low_rank")
    def lookup(
        self, tokens: Int[Array, "*batch"], base: Kernel, arrays: Arrays
    ) -> Float[Array, "*batch embed"]:
        """Returns rows of E + s A B."""
        rows = take_rows(base, tokens)
        a = jnp.take(arrays["a"], tokens, axis=0).astype(rows.dtype)
        return rows + linear(a, arrays["b"])

    def transposed_project(
        self, x: Float[Array, "*batch embed"], base: Kernel, arrays: Arrays
    ) -> Float[Array, "*batch vocab"]:
        """Returns x Eᵀ + s (x Bᵀ) Aᵀ, given Eᵀ."""
        return linear(x, base) + self.product(x, arrays["b"].T, arrays["a"].T)

    @classmethod
    def peft_forms(cls) -> tuple[type[PeftForm], ...]:
        """Returns the form of LoRA on an embedding."""
        return (LoRAEmbeddingForm,)


@dataclasses.dataclass(frozen=True)
class LoRAEmbeddingForm(LoRAForm):
    """`lora_embedding_A` is Aᵀ and `lora_embedding_B` is Bᵀ."""

    method: LoRAEmbedding
    names: ClassVar[tuple[str, ...]] = ("lora_embedding_A", "lora_embedding_B")
    of_embeddings = True

    def shapes(self, d_in: int, d_out: int) -> Shapes:
        """Returns [r, vocab] and [embed, r]."""
        return dict(zip(self.names, super().shapes(d_in, d_out).values(), strict=True))

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Transposes the factors."""
        return dict(zip(self.names, super().export(arrays).values(), strict=True))

    def restore(self, tensors: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        """Transposes the tensors."""
        return {"a": tensors["lora_embedding_A"].T, "b": tensors["lora_embedding_B"].T}, {}
