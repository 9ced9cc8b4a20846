"""Decoder of OLMo 2 and 3: norms after attention and MLP, and over all queries and all keys.

Source: OLMo Team, 2024, arXiv 2501.00656.
"""

import dataclasses

from flax import nnx

from peft_jax.models.cache import LayerCache
from peft_jax.models.decoder import Decoder, DecoderConfig, Hidden, Surroundings
from peft_jax.models.decoder_parts import Attention, GatedMLP, Keys, Queries
from peft_jax.models.layers import Linear, RMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class OlmoConfig(DecoderConfig):
    """Architecture of an OLMo model; see `DecoderConfig` for the other attributes.

    Attributes:
      attention_bias: Whether the four maps of attention have biases.
    """

    attention_bias: bool = False


class OlmoAttention(Attention):
    """Attention with one norm over the queries of all heads, and one over their keys."""

    def __init__(self, config: OlmoConfig):
        super().__init__(config, bias=config.attention_bias, output_bias=config.attention_bias)
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.q_norm = RMSNorm(heads * config.head_dim, epsilon=config.norm_epsilon)
        self.k_norm = RMSNorm(kv_heads * config.head_dim, epsilon=config.norm_epsilon)

    def project(self, x: Hidden) -> tuple[Queries, Keys, Keys]:
        """Returns queries, keys and values, before the rotation."""
        query, key, value = Linear.each(x, self.q_proj, self.k_proj, self.v_proj)
        return self.split_heads(self.q_norm(query), self.k_norm(key), value)


class OlmoBlock(nnx.Module):
    """One transformer block: attention, then the MLP, each before a norm and added to its input."""

    def __init__(self, config: OlmoConfig):
        self.self_attn = OlmoAttention(config)
        self.post_attention_layernorm = Olmo.make_norm(config)
        self.mlp = GatedMLP(config)
        self.post_feedforward_layernorm = Olmo.make_norm(config)

    def __call__(
        self, x: Hidden, around: Surroundings, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        """Returns the block's output, and the layer's updated cache if one is given."""
        attended, cache = self.self_attn(x, around, cache)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(x)), cache


class Olmo(Decoder):
    """The decoder of OLMo 2 and 3."""

    block = OlmoBlock

    @staticmethod
    def make_norm(config: DecoderConfig) -> RMSNorm:
        """Returns the final norm."""
        return RMSNorm(config.hidden_size, epsilon=config.norm_epsilon)
