"""Decoder of the Gemma family: Gemma 1, 2 and 3.

Norms scale by 1 + w, embeddings are multiplied by √D, and the gate of the MLP is the tanh form of
GELU. Gemma 2 and 3 have a second norm after attention and after the MLP. Gemma 2 caps scores and
logits; Gemma 3 has norms on queries and keys instead, and rotates local and global layers apart.

Sources: Gemma Team, 2024 and 2025 (arXiv 2403.08295, 2408.00118, 2503.19786).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from peft_jax.models.cache import LayerCache
from peft_jax.models.decoder import Decoder, DecoderConfig, Hidden, Surroundings
from peft_jax.models.decoder_parts import Attention, GatedMLP, Keys, Queries
from peft_jax.models.layers import RMSNorm

gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(DecoderConfig):
    """Architecture of a model of the Gemma family; see `DecoderConfig` for the other attributes.

    Attributes:
      attention_bias: Whether the four maps of attention have biases.
      qk_norm: Whether each head's queries and keys pass an RMS norm before the rotation.
    """

    attention_bias: bool = False
    qk_norm: bool = False


def gemma_norm(features: int, config: DecoderConfig) -> RMSNorm:
    """Returns an RMS norm that scales by 1 + w."""
    return RMSNorm(features, epsilon=config.norm_epsilon, offset=1.0)


class GemmaAttention(Attention):
    """Attention whose queries and keys may pass a norm, each head its own."""

    config: GemmaConfig

    def __init__(self, config: GemmaConfig):
        super().__init__(config, bias=config.attention_bias, output_bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = gemma_norm(config.head_dim, config)
            self.k_norm = gemma_norm(config.head_dim, config)

    def project(self, x: Hidden) -> tuple[Queries, Keys, Keys]:
        """Returns queries, keys and values, before the rotation."""
        query, key, value = super().project(x)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value


class Gemma1Block(nnx.Module):
    """Gemma 1's block: attention, then the MLP, each after a norm and added to its input."""

    def __init__(self, config: GemmaConfig):
        self.input_layernorm = gemma_norm(config.hidden_size, config)
        self.self_attn = GemmaAttention(config)
        self.post_attention_layernorm = gemma_norm(config.hidden_size, config)
        self.mlp = GatedMLP(config, activation=gelu_tanh)

    def __call__(
        self, x: Hidden, around: Surroundings, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        """Returns the block's output, and the layer's updated cache if one is given."""
        attended, cache = self.self_attn(self.input_layernorm(x), around, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class GemmaBlock(nnx.Module):
    """The block of Gemma 2 and 3, with norms before and after attention and MLP."""

    def __init__(self, config: GemmaConfig):
        self.input_layernorm = gemma_norm(config.hidden_size, config)
        self.self_attn = GemmaAttention(config)
        self.post_attention_layernorm = gemma_norm(config.hidden_size, config)
        self.pre_feedforward_layernorm = gemma_norm(config.hidden_size, config)
        self.mlp = GatedMLP(config, activation=gelu_tanh)
        self.post_feedforward_layernorm = gemma_norm(config.hidden_size, config)

    def __call__(
        self, x: Hidden, around: Surroundings, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        """Returns the block's output, and the layer's updated cache if one is given."""
        attended, cache = self.self_attn(self.input_layernorm(x), around, cache)
        x = x + self.post_attention_layernorm(attended)
        update = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(update), cache


class Gemma(Decoder):
    """The decoder of Gemma 2 and 3."""

    block = GemmaBlock

    @staticmethod
    def make_norm(config: DecoderConfig) -> RMSNorm:
        """Returns the final norm."""
        return gemma_norm(config.hidden_size, config)

    def embed(self, tokens: Int[Array, "batch tokens"]) -> Hidden:
        """Returns the scaled embeddings, in the compute dtype, which √D is rounded to first."""
        embedded = super().embed(tokens)
        root = jnp.asarray(self.config.hidden_size**0.5, embedded.dtype)
        return embedded * root


class Gemma1(Gemma):
    """The decoder of Gemma 1."""

    block: type[Any] = Gemma1Block
