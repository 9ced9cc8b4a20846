"""Decoder of Gemma 4's dense models: Gemma 3 with other heads in its layers of full attention.

Layers of full attention have fewer and wider heads of keys and values, and may use the keys as
values. Queries, keys and values pass norms, and scores are not scaled. Each layer's output is
multiplied by a number of its own, which is not trained.

Source: Google DeepMind, 2026, the Gemma 4 release.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from peft_jax.core.validation import check_positive_int
from peft_jax.models.attention_layout import Keys as AllKeys
from peft_jax.models.cache import LayerCache
from peft_jax.models.decoder import DecoderConfig, Hidden, Surroundings
from peft_jax.models.decoder_parts import Attention, GatedMLP, Keys, Queries, linear_map
from peft_jax.models.gemma import Gemma, gelu_tanh
from peft_jax.models.layer_types import LayerType
from peft_jax.models.layers import Linear, RMSNorm, parameter, unit_rms

SLIDING, FULL = "sliding", "full"
"""Forms of blocks: with sliding and with full attention."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma4Config(DecoderConfig):
    """Architecture of a dense Gemma 4; `num_kv_heads` and `head_dim` are those of sliding layers.

    Attributes:
      attention_bias: Whether the maps of attention have biases.
      full_kv_heads: Number of key-value heads of layers with full attention.
      full_head_dim: Head dimension of these layers.
      full_shares_values: Whether these layers use the keys, before their norm, as values.
      shares_values: Whether the layers at hand do; see `of_full`.
    """

    attention_bias: bool = False
    full_kv_heads: int
    full_head_dim: int
    full_shares_values: bool
    shares_values: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("num_global_key_value_heads", self.full_kv_heads)
        check_positive_int("global_head_dim", self.full_head_dim)
        if self.num_heads % self.full_kv_heads:
            raise ValueError(
                f"num_global_key_value_heads is {self.full_kv_heads}, but must divide"
                f" num_attention_heads = {self.num_heads}"
            )

    @property
    def of_full(self) -> "Gemma4Config":
        """Returns the configuration of a layer with full attention."""
        return dataclasses.replace(
            self,
            num_kv_heads=self.full_kv_heads,
            head_dim=self.full_head_dim,
            shares_values=self.full_shares_values,
        )

    def head_dims(self, kind: LayerType) -> tuple[int, int]:
        """Returns the head dimensions of a layer's keys and of its values."""
        dim = self.full_head_dim if kind.form == FULL else self.head_dim
        return dim, dim

    @property
    def kv_head_counts(self) -> tuple[int, ...]:
        """Numbers of key-value heads of all layers."""
        return self.num_kv_heads, self.full_kv_heads

    @property
    def cache_dims(self) -> tuple[int, int, int]:
        """Sizes of a cache: one row for all heads of a token, as wide as the widest layer's."""
        width = max(self.num_kv_heads * self.head_dim, self.full_kv_heads * self.full_head_dim)
        return 1, width, width


class Gemma4Attention(Attention):
    """Attention with norms on queries, keys and values, whose keys may be its values."""

    config: Gemma4Config

    def __init__(self, config: Gemma4Config):
        super().__init__(config, bias=config.attention_bias, output_bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, epsilon=config.norm_epsilon)
        self.k_norm = RMSNorm(config.head_dim, epsilon=config.norm_epsilon)

    def make_projections(self, config: Any, *, bias: bool) -> None:
        """Makes the maps of `project`."""
        if not config.shares_values:
            super().make_projections(config, bias=bias)
            return
        embed = config.hidden_size
        for name, heads, axis in (
            ("q_proj", config.num_heads, "heads"),
            ("k_proj", config.num_kv_heads, "kv_heads"),
        ):
            width = heads * config.head_dim
            setattr(self, name, linear_map(config, embed, width, ("embed", axis), bias=bias))

    def project(self, x: Hidden) -> tuple[Queries, Keys, Keys]:
        """Returns queries, keys and values, before the rotation."""
        if self.config.shares_values:
            query, key = Linear.each(x, self.q_proj, self.k_proj)
            query, key, value = self.split_heads(query, key, key)
        else:
            query, key, value = super().project(x)
        return self.q_norm(query), self.k_norm(key), unit_rms(value, self.config.norm_epsilon)

    def through_cache(
        self, cache: LayerCache, key: Keys, value: Keys
    ) -> tuple[LayerCache, AllKeys, AllKeys]:
        """Returns the cache with a layer's next keys and values, and all that it holds.

        All heads of a token share one row of the cache.
        """
        width = self.config.cache_dims[1]
        cache = cache.append(*(_joined(x, width) for x in (key, value)))
        heads = key.shape[2:]
        keys, values = (
            x[..., : math.prod(heads)].reshape(*x.shape[:2], *heads) for x in cache.read(key.dtype)
        )
        return cache, keys, values


def _joined(x: Keys, width: int) -> Float[Array, "batch tokens 1 width"]:
    """Returns the features of all heads in one row, padded with zeros."""
    row = x.reshape(*x.shape[:2], 1, -1)
    return jnp.pad(row, ((0, 0),) * 3 + ((0, width - row.shape[-1]),))


class Gemma4Block(nnx.Module):
    """A block with sliding attention; norms are before and after attention and MLP."""

    attention_name = "self_attn"

    def __init__(self, config: Gemma4Config):
        self.input_layernorm = Gemma4.make_norm(config)
        setattr(self, self.attention_name, Gemma4Attention(self.own(config)))
        self.post_attention_layernorm = Gemma4.make_norm(config)
        self.pre_feedforward_layernorm = Gemma4.make_norm(config)
        self.mlp = GatedMLP(config, activation=gelu_tanh)
        self.post_feedforward_layernorm = Gemma4.make_norm(config)
        self.layer_scalar = parameter((1,), (None,), mean=1.0)

    @staticmethod
    def own(config: Gemma4Config) -> Gemma4Config:
        """Returns the configuration of this form's attention."""
        return config

    def __call__(
        self, x: Hidden, around: Surroundings, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        """Returns the block's output, and the layer's updated cache if one is given."""
        attention = getattr(self, self.attention_name)
        attended, cache = attention(self.input_layernorm(x), around, cache)
        x = x + self.post_attention_layernorm(attended)
        update = self.mlp(self.pre_feedforward_layernorm(x))
        x = x + self.post_feedforward_layernorm(update)
        return x * self.layer_scalar.get_value().astype(x.dtype), cache


class Gemma4FullBlock(Gemma4Block):
    """A block with full attention, whose parameters have other shapes and so another name."""

    attention_name = "full_attn"

    @staticmethod
    def own(config: Gemma4Config) -> Gemma4Config:
        """Returns the configuration of this form's attention."""
        return config.of_full


class Gemma4(Gemma):
    """Decodes as Gemma 4's dense models do."""

    config: Gemma4Config
    forms: ClassVar[Mapping[str, type[Any]]] = {SLIDING: Gemma4Block, FULL: Gemma4FullBlock}

    @staticmethod
    def make_norm(config: DecoderConfig) -> RMSNorm:
        """Returns a norm of the residual stream."""
        return RMSNorm(config.hidden_size, epsilon=config.norm_epsilon)
