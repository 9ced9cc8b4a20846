"""Decoder of GPT-NeoX and Pythia: LayerNorms, a fused map, and attention beside the MLP.

Sources: Black et al., 2022, arXiv 2204.06745; Biderman et al., 2023, arXiv 2304.01373.
"""

import dataclasses

from flax import nnx

from peft_jax.core.validation import check_choice
from peft_jax.models.cache import LayerCache
from peft_jax.models.decoder import Decoder, DecoderConfig, Hidden, Surroundings
from peft_jax.models.decoder_parts import MLP, Attention, Keys, Queries, linear_map
from peft_jax.models.layers import LayerNorm, Linear
from peft_jax.models.nonlinearities import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(DecoderConfig):
    """Architecture of a GPT-NeoX model; see `DecoderConfig` for the other attributes.

    Attributes:
      activation: A key of `ACTIVATIONS`.
      attention_bias: Whether the two maps of attention have biases.
      parallel_residual: Whether the MLP reads the block's input, and not attention's output.
    """

    activation: str = "gelu"
    attention_bias: bool = True
    parallel_residual: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("activation", self.activation, ACTIVATIONS)


class GPTNeoXAttention(Attention):
    """Multi-head attention; the output of the fused map has the layout [K, 3, H]."""

    output_name = "dense"

    def make_projections(self, config: DecoderConfig, *, bias: bool) -> None:
        """Makes the fused map."""
        width, axes = 3 * config.num_heads * config.head_dim, ("embed", "heads")
        self.query_key_value = linear_map(config, config.hidden_size, width, axes, bias=bias)

    def project(self, x: Hidden) -> tuple[Queries, Keys, Keys]:
        """Returns queries, keys and values, before the rotation."""
        (fused,) = Linear.each(x, self.query_key_value)
        fused = fused.reshape(*x.shape[:2], self.config.num_heads, 3, self.config.head_dim)
        query, key, value = (fused[..., i, :] for i in range(3))
        return query[:, :, :, None], key, value


class GPTNeoXBlock(nnx.Module):
    """One transformer block: attention and the MLP, each after a norm, both added to the input."""

    def __init__(self, config: GPTNeoXConfig):
        bias = config.attention_bias
        self.parallel = config.parallel_residual
        self.input_layernorm = GPTNeoX.make_norm(config)
        self.attention = GPTNeoXAttention(config, bias=bias, output_bias=bias)
        self.post_attention_layernorm = GPTNeoX.make_norm(config)
        activation = ACTIVATIONS[config.activation]
        self.mlp = MLP(config, ("dense_h_to_4h", "dense_4h_to_h"), activation=activation)

    def __call__(
        self, x: Hidden, around: Surroundings, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        """Returns the block's output, and the layer's updated cache if one is given."""
        attended, cache = self.attention(self.input_layernorm(x), around, cache)
        after = x + attended
        return after + self.mlp(self.post_attention_layernorm(x if self.parallel else after)), cache


class GPTNeoX(Decoder):
    """The decoder of GPT-NeoX and Pythia."""

    block = GPTNeoXBlock
    embedding_name = "embed_in"
    norm_name = "final_layer_norm"

    @staticmethod
    def make_norm(config: DecoderConfig) -> LayerNorm:
        """Returns the final norm."""
        return LayerNorm(config.hidden_size, epsilon=config.norm_epsilon)
