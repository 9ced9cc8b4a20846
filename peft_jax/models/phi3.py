"""Decoder of Phi-3 and Phi-4: Llama's, with fused maps for attention and for the MLP.

Source: Abdin et al., 2024 (arXiv 2404.14219, 2412.08905).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from peft_jax.core.scopes import part
from peft_jax.models.cache import LayerCache
from peft_jax.models.decoder import Decoder, DecoderConfig, Hidden, Surroundings
from peft_jax.models.decoder_parts import Attention, Keys, Queries, linear_map
from peft_jax.models.layers import Linear, RMSNorm, recomputed


class Phi3Attention(Attention):
    """Attention with one map, whose output is the queries, then the keys, then the values."""

    def make_projections(self, config: DecoderConfig, *, bias: bool) -> None:
        """Makes the fused map."""
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        axes = ("embed", "heads")
        self.qkv_proj = linear_map(config, config.hidden_size, width, axes, bias=bias)

    def project(self, x: Hidden) -> tuple[Queries, Keys, Keys]:
        """Returns queries, keys and values, before the rotation."""
        (fused,) = Linear.each(x, self.qkv_proj)
        queries = self.config.num_heads * self.config.head_dim
        keys = self.config.num_kv_heads * self.config.head_dim
        return self.split_heads(*jnp.split(fused, [queries, queries + keys], axis=-1))


class Phi3MLP(nnx.Module):
    """The gated MLP with one map, whose output is the gate, then what it multiplies."""

    def __init__(self, config: DecoderConfig):
        embed, mlp = config.hidden_size, config.intermediate_size
        self.gate_up_proj = linear_map(config, embed, 2 * mlp, ("embed", "mlp"))
        self.down_proj = linear_map(config, mlp, embed, ("mlp", "embed"))

    @part("mlp")
    def __call__(self, x: Hidden) -> Hidden:
        """Returns the MLP's output, [B, T, D]."""
        (fused,) = Linear.each(x, self.gate_up_proj)
        gated = recomputed(lambda gate, up: jax.nn.silu(gate) * up)
        return self.down_proj(gated(*jnp.split(fused, 2, axis=-1)))


class Phi3Block(nnx.Module):
    """One transformer block: attention, then the MLP, each after a norm and added to its input."""

    def __init__(self, config: DecoderConfig):
        self.input_layernorm = Phi3.make_norm(config)
        self.self_attn = Phi3Attention(config)
        self.post_attention_layernorm = Phi3.make_norm(config)
        self.mlp = Phi3MLP(config)

    def __call__(
        self, x: Hidden, around: Surroundings, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        """Returns the block's output, and the layer's updated cache if one is given."""
        attended, cache = self.self_attn(self.input_layernorm(x), around, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Phi3(Decoder):
    """The decoder of Phi-3 and Phi-4."""

    block = Phi3Block

    @staticmethod
    def make_norm(config: DecoderConfig) -> RMSNorm:
        """Returns the final norm."""
        return RMSNorm(config.hidden_size, epsilon=config.norm_epsilon)
