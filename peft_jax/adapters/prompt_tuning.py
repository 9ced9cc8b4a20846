"""Implements prompt tuning: embeddings of virtual tokens before every sequence are trained."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax.adapters.peft_form import PeftSettings
from peft_jax.adapters.virtual_form import TENSOR, VirtualForm
from peft_jax.adapters.virtual_method import Dimensions, VirtualMethod
from peft_jax.core import Path, Tree, VirtualTokens, flatten, take_rows
from peft_jax.core.validation import check_choice

STARTS = ("vocabulary", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuning(VirtualMethod):
    """Prompt tuning: every sequence begins with n virtual tokens, whose embeddings are trained.

    Trainable array: `embeddings` [n, embed].

    Attributes:
      num_virtual_tokens: Number n of virtual tokens.
      start: Start of the embeddings: "vocabulary" takes those of random tokens of the vocabulary,
        and "random" standard normal values, which is Hugging Face PEFT's default and far from any
        token's embedding.
      start_tokens: Tokens whose embeddings are the start instead, such as those of a text that
        describes the task. They are repeated, or cut off, to be n.

    Source: Lester, Al-Rfou and Constant, 2021, arXiv 2104.08691, section 2.
    """

    name: ClassVar[str] = "prompt_tuning"
    learning_rate: ClassVar[float] = 3e-2
    no_decay: ClassVar[tuple[str, ...]] = ("embeddings",)

    start: str = "vocabulary"
    start_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("start", self.start, STARTS)
        tokens = tuple(self.start_tokens)
        object.__setattr__(self, "start_tokens", tokens)
        if wrong := [i for i in tokens if isinstance(i, bool) or not isinstance(i, int) or i < 0]:
            raise ValueError(f"start_tokens has {wrong[0]!r}; it must be token numbers from 0")

    def reads(self, params: Tree) -> tuple[Path, ...]:
        """Returns the path of the embedding, unless the start is random."""
        if self.start == "random" and not self.start_tokens:
            return ()
        return (Dimensions.of(params).embedding,)

    def init(self, key: jax.Array, params: Tree) -> dict[str, Array]:
        """Returns embeddings of tokens, or random ones.

        Raises:
          ValueError: The parameters are not those of a decoder, or a token is beyond the embedding.
        """
        sizes, count = Dimensions.of(params), self.num_virtual_tokens
        table = flatten(params)[sizes.embedding]
        vocabulary = table.shape[-2]
        if self.start_tokens:
            if (last := max(self.start_tokens)) >= vocabulary:
                raise ValueError(
                    f"start_tokens has {last}, but the model's tokens are 0 to {vocabulary - 1}"
                )
            tokens = jnp.asarray(np.resize(np.array(self.start_tokens, np.int32), count))
        elif self.start == "random":
            shape = (count, sizes.embed)
            return {"embeddings": jax.random.normal(key, shape, jnp.float32)}
        else:
            tokens = jax.random.randint(key, (count,), 0, vocabulary, jnp.int32)
        return {"embeddings": take_rows(table, tokens).astype(jnp.float32)}

    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """Returns axes that shard embeddings as the model's."""
        return {"embeddings": (None, "embed")}

    def virtual_tokens(self, arrays: Mapping[str, Array]) -> VirtualTokens:
        """Returns the embeddings."""
        return VirtualTokens(embeddings=arrays["embeddings"])

    @classmethod
    def peft_forms(cls) -> tuple[type[VirtualForm], ...]:
        """Returns the forms of prompt tuning, and of P-tuning after training."""
        return (PromptTuningForm, PTuningForm)


@dataclasses.dataclass(frozen=True)
class PromptTuningForm(VirtualForm):
    """`prompt_embeddings` [n, embed] holds the embeddings."""

    method: PromptTuning
    peft_type = "PROMPT_TUNING"
    exact = True
    understood = PeftSettings(
        read=VirtualForm.understood.read,
        irrelevant=frozenset(
            {
                *VirtualForm.understood.irrelevant,
                *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs"),
                "tokenizer_name_or_path",
            }
        ),
        fixed=VirtualForm.understood.fixed,
        compared=VirtualForm.understood.compared,
    )

    @classmethod
    def read_virtual(cls, config: Mapping[str, Any], count: int) -> PromptTuning:
        """Returns prompt tuning with a number of virtual tokens."""
        del config
        return PromptTuning(num_virtual_tokens=count)

    def settings(self) -> dict[str, Any]:
        """Returns that the start does not matter."""
        return {**super().settings(), "prompt_tuning_init": "RANDOM"}

    def export(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Renames the embeddings."""
        return {TENSOR: arrays["embeddings"]}

    def restore_virtual(self, tensor: np.ndarray, sizes: Dimensions) -> dict[str, np.ndarray]:
        """Renames the tensor."""
        del sizes
        return {"embeddings": tensor}

    def virtual_shape(self, sizes: Dimensions) -> tuple[int, int]:
        """Returns [n, embed]."""
        return (self.method.num_virtual_tokens, sizes.embed)

    def token_dim(self, sizes: Dimensions) -> int:
        """Returns the number of features of an embedding."""
        return sizes.embed


@dataclasses.dataclass(frozen=True)
class PTuningForm(PromptTuningForm):
    """P-tuning's file, which holds what its encoder has computed: embeddings."""

    peft_type = "P_TUNING"
    understood = PeftSettings(
        read=VirtualForm.understood.read,
        irrelevant=frozenset(
            {
                *VirtualForm.understood.irrelevant,
                *("encoder_dropout", "encoder_hidden_size", "encoder_num_layers"),
                "encoder_reparameterization_type",
            }
        ),
        fixed=VirtualForm.understood.fixed,
    )
