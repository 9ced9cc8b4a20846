"""Decoder of Command R7B and Command A: attention and MLP side by side, after one layer norm.

Layers with a sliding window are rotated, neighboring features as a pair. Others have no positions.

Source: Cohere, 2025 (arXiv 2504.00698).
"""

from flax import nnx

from peft_jax.models.cache import LayerCache
from peft_jax.models.decoder import Decoder, DecoderConfig, Hidden, Surroundings
from peft_jax.models.decoder_parts import GatedMLP
from peft_jax.models.glm import GlmAttention
from peft_jax.models.layers import LayerNorm
from peft_jax.models.llama import LlamaConfig


class Cohere2Block(nnx.Module):
    """One transformer block: attention and the MLP of one norm's output, added to the input."""

    def __init__(self, config: LlamaConfig):
        self.input_layernorm = Cohere2.make_norm(config)
        self.self_attn = GlmAttention(config)
        self.mlp = GatedMLP(config)

    def __call__(
        self, x: Hidden, around: Surroundings, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        """Returns the block's output, and the layer's updated cache if one is given."""
        normed = self.input_layernorm(x)
        attended, cache = self.self_attn(normed, around, cache)
        return x + attended + self.mlp(normed), cache


class Cohere2(Decoder):
    """The decoder of Command R7B and Command A."""

    config: LlamaConfig
    block = Cohere2Block

    @staticmethod
    def make_norm(config: DecoderConfig) -> LayerNorm:
        """Returns the final norm."""
        return LayerNorm(config.hidden_size, epsilon=config.norm_epsilon, bias=False)
