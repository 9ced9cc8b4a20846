"""Decoder of the Llama family: Llama 1 to 3, Vicuna, Mistral, Qwen2, Qwen3, SmolLM3 and Granite.

All members share one module. Their differences (biases, norms on queries and keys, windows, rotary
scaling, multipliers) are fields of `LlamaConfig`.

Sources: Touvron et al., 2023 (arXiv 2302.13971, 2307.09288); Grattafiori et al., 2024 (arXiv
2407.21783); Jiang et al., 2023 (arXiv 2310.06825); Yang et al., 2024 and 2025 (arXiv 2407.10671,
2505.09388). Granite's multipliers are those of Yang et al., 2022 (arXiv 2203.03466); SmolLM3 leaves
out rotations as Yang et al., 2025 (arXiv 2501.18795).
"""

import dataclasses
from typing import Any

from flax import nnx
from jaxtyping import Array, Int

from peft_jax.models.cache import LayerCache
from peft_jax.models.decoder import Decoder, DecoderConfig, Hidden, Surroundings, scaled
from peft_jax.models.decoder_parts import Attention, GatedMLP, Keys, Queries
from peft_jax.models.layers import RMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Architecture of a model of the Llama family; see `DecoderConfig` for the other attributes.

    Attributes:
      qkv_bias: Whether queries, keys and values have biases.
      output_bias: Whether attention's output map has a bias.
      mlp_bias: Whether the three maps of the MLP have biases.
      qk_norm: Whether each head's queries and keys pass an RMS norm before the rotation.
      embedding_scale: Multiplier of embeddings.
      residual_scale: Multiplier of what attention and MLP add to the residual stream.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0


class LlamaAttention(Attention):
    """Attention whose queries and keys may pass a norm, each head its own."""

    config: LlamaConfig

    def __init__(self, config: LlamaConfig):
        super().__init__(config, bias=config.qkv_bias, output_bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, epsilon=config.norm_epsilon)
            self.k_norm = RMSNorm(config.head_dim, epsilon=config.norm_epsilon)

    def project(self, x: Hidden) -> tuple[Queries, Keys, Keys]:
        """Returns queries, keys and values, before the rotation."""
        query, key, value = super().project(x)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value


class LlamaBlock(nnx.Module):
    """One transformer block: attention, then the MLP, each after a norm and added to its input."""

    attention: type[Any] = LlamaAttention
    mlp_name = "mlp"

    def __init__(self, config: LlamaConfig):
        self.residual_scale = config.residual_scale
        self.input_layernorm = Llama.make_norm(config)
        self.self_attn = self.attention(config)
        self.post_attention_layernorm = Llama.make_norm(config)
        setattr(self, self.mlp_name, self.make_mlp(config))

    @staticmethod
    def make_mlp(config: LlamaConfig) -> nnx.Module:
        """Returns the MLP."""
        return GatedMLP(config, bias=config.mlp_bias)

    def __call__(
        self, x: Hidden, around: Surroundings, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        """Returns the block's output, and the layer's updated cache if one is given."""
        attended, cache = self.self_attn(self.input_layernorm(x), around, cache)
        x = x + self._rescaled(attended)
        update = getattr(self, self.mlp_name)(self.post_attention_layernorm(x))
        return x + self._rescaled(update), cache

    def _rescaled(self, update: Hidden) -> Hidden:
        return update if self.residual_scale == 1.0 else scaled(update, self.residual_scale)


class Llama(Decoder):
    """The decoder of the Llama family."""

    config: LlamaConfig
    block: type[Any] = LlamaBlock

    @staticmethod
    def make_norm(config: DecoderConfig) -> RMSNorm:
        """Returns the final norm."""
        return RMSNorm(config.hidden_size, epsilon=config.norm_epsilon)

    def block_input(self, embedded: Hidden, positions: Int[Array, "batch tokens"]) -> Hidden:
        """Returns the scaled embeddings."""
        del positions
        scale = self.config.embedding_scale
        return embedded if scale == 1.0 else scaled(embedded, scale)
