"""Decoder of GPT-2: learned positions, LayerNorms, and a fused map.

Axes: B batch, T tokens, D embed, K heads, H head dimension.

Source: Radford et al., 2019, "Language models are unsupervised multitask learners".
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from peft_jax.core.validation import check_choice
from peft_jax.models.cache import LayerCache
from peft_jax.models.decoder import Decoder, DecoderConfig, Hidden, Surroundings
from peft_jax.models.decoder_parts import MLP, Attention, Keys, Queries, linear_map
from peft_jax.models.execution import ExecutionSettings
from peft_jax.models.layers import LayerNorm, Linear, parameter
from peft_jax.models.nonlinearities import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(DecoderConfig):
    """Architecture of a GPT-2 model; see `DecoderConfig` for the other attributes.

    Attributes:
      activation: A key of `ACTIVATIONS`.
    """

    activation: str = "gelu_new"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("activation", self.activation, ACTIVATIONS)

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens per row, limited by the learned positions."""
        return self.max_positions


class Positions(nnx.Module):
    """A table [positions, embed] of position embeddings."""

    def __init__(self, config: DecoderConfig):
        shape, stddev = (config.max_positions, config.hidden_size), config.initializer_range
        self.table = parameter(shape, ("vocab", "embed"), stddev=stddev)

    def __call__(
        self, positions: Int[Array, "batch tokens"], dtype: jnp.dtype
    ) -> Float[Array, "batch tokens embed"]:
        """Returns the embeddings of positions in `dtype`; NaN for those beyond the table."""
        return jnp.take(self.table.get_value(), positions, axis=0).astype(dtype)


class GPT2Attention(Attention):
    """Multi-head attention; the output of the fused map has the layout [3, K, H]."""

    output_name = "c_proj"

    def make_projections(self, config: DecoderConfig, *, bias: bool) -> None:
        """Makes the fused map."""
        width, axes = 3 * config.num_heads * config.head_dim, ("embed", "heads")
        self.c_attn = linear_map(config, config.hidden_size, width, axes, bias=bias)

    def project(self, x: Hidden) -> tuple[Queries, Keys, Keys]:
        """Returns queries, keys and values."""
        (fused,) = Linear.each(x, self.c_attn)
        return self.split_heads(*jnp.split(fused, 3, axis=-1))


class GPT2Block(nnx.Module):
    """One transformer block: attention, then the MLP, each after a norm and added to its input."""

    def __init__(self, config: GPT2Config):
        self.ln_1 = GPT2.make_norm(config)
        self.attn = GPT2Attention(config, bias=True, output_bias=True)
        self.ln_2 = GPT2.make_norm(config)
        self.mlp = MLP(config, ("c_fc", "c_proj"), activation=ACTIVATIONS[config.activation])

    def __call__(
        self, x: Hidden, around: Surroundings, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        """Returns the block's output, and the layer's updated cache if one is given."""
        attended, cache = self.attn(self.ln_1(x), around, cache)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), cache


class GPT2(Decoder):
    """The decoder of GPT-2.

    Args:
      config: Architecture.
      execution: Execution settings.
    """

    config: GPT2Config
    block = GPT2Block
    embedding_name = "wte"
    norm_name = "ln_f"

    def __init__(self, config: GPT2Config, execution: ExecutionSettings):
        super().__init__(config, execution)
        self.wpe = Positions(config)

    @staticmethod
    def make_norm(config: DecoderConfig) -> LayerNorm:
        """Returns the final norm."""
        return LayerNorm(config.hidden_size, epsilon=config.norm_epsilon)

    def block_input(self, embedded: Hidden, positions: Int[Array, "batch tokens"]) -> Hidden:
        """Returns the embeddings plus those of their positions.

        Raises:
          ValueError: There are more tokens than positions.
        """
        longest = self.config.max_tokens
        if embedded.shape[1] > longest:
            raise ValueError(
                f"there are {embedded.shape[1]} tokens per row, but the model has positions for"
                f" {longest}"
            )
        return embedded + self.wpe(positions, embedded.dtype)
