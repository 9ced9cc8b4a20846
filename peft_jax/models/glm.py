"""Decoder of GLM-4: Llama's with norms before and after attention and MLP, and one map for the MLP.

Half of each head's features are rotated, neighbors as a pair.

Source: GLM Team, 2024 (arXiv 2406.12793).
"""

from flax import nnx

from peft_jax.models.cache import LayerCache
from peft_jax.models.decoder import Hidden, Surroundings
from peft_jax.models.llama import Llama, LlamaAttention, LlamaConfig
from peft_jax.models.phi3 import Phi3MLP


class GlmAttention(LlamaAttention):
    """Attention that rotates neighboring features."""

    rotates_neighbors = True


class GlmBlock(nnx.Module):
    """One transformer block: attention, then the MLP, each between norms and added to its input."""

    def __init__(self, config: LlamaConfig):
        self.input_layernorm = Glm.make_norm(config)
        self.self_attn = GlmAttention(config)
        self.post_self_attn_layernorm = Glm.make_norm(config)
        self.post_attention_layernorm = Glm.make_norm(config)
        self.mlp = Phi3MLP(config)
        self.post_mlp_layernorm = Glm.make_norm(config)

    def __call__(
        self, x: Hidden, around: Surroundings, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        """Returns the block's output, and the layer's updated cache if one is given."""
        attended, cache = self.self_attn(self.input_layernorm(x), around, cache)
        x = x + self.post_self_attn_layernorm(attended)
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x))), cache


class Glm(Llama):
    """The decoder of GLM-4."""

    block = GlmBlock
