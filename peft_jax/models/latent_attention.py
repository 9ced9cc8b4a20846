"""Multi-head latent attention: keys and values of all heads are expanded from one small latent.

A token's latent C and one rotated key, which all heads share, are all that a cache holds. Keys and
values are expanded from the latents of all slots at each step. Queries may come from a latent too.
The rotation turns pairs of neighboring features.

Axes: B batch, T tokens, S slots, D embed, N heads, C latent, P features of keys without positions,
R rotated features, V features of values.

Source: DeepSeek-AI, 2024 (arXiv 2405.04434, section 2.1).
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from peft_jax.core.scopes import part
from peft_jax.core.validation import check_positive_int
from peft_jax.models.attention_layout import Keys, Values
from peft_jax.models.cache import LayerCache
from peft_jax.models.decoder import Hidden, Surroundings, scaled
from peft_jax.models.decoder_parts import Queries, linear_map
from peft_jax.models.layers import Linear, RMSNorm
from peft_jax.models.llama import LlamaConfig
from peft_jax.models.rope import rotate

_EPSILON = 1e-6
"""Added to the mean square of latents."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig(LlamaConfig):
    """Architecture of a model with latent attention; `head_dim` is P + R.

    Attributes:
      query_rank: Number of features of the queries' latent; None for queries without one.
      latent_rank: C.
      rotated_dim: R.
      value_head_dim: V.
      neighbors_paired: Whether the rotation turns features 2i and 2i + 1, and not i and i + R / 2.
    """

    query_rank: int | None
    latent_rank: int
    rotated_dim: int
    value_head_dim: int
    neighbors_paired: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("query_rank", "latent_rank", "rotated_dim", "value_head_dim"):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name))
        if self.rotated_dim >= self.head_dim:
            raise ValueError(
                f"rotated_dim is {self.rotated_dim}, but must be below head_dim = {self.head_dim}"
            )
        if self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}, but must equal num_heads = {self.num_heads}:"
                " each head expands keys and values of its own"
            )

    @property
    def value_dim(self) -> int:
        """Number of a head's features of values."""
        return self.value_head_dim

    @property
    def cache_dims(self) -> tuple[int, int, int]:
        """Sizes of a cache: one rotated key and one latent for each token."""
        return 1, self.rotated_dim, self.latent_rank


class LatentAttention(nnx.Module):
    """Attention to keys and values that are expanded from latents."""

    def __init__(self, config: LatentConfig):
        self.config, bias = config, config.qkv_bias
        embed, width = config.hidden_size, config.num_heads * config.head_dim
        if config.query_rank is None:
            self.q_proj = linear_map(config, embed, width, ("embed", "heads"))
        else:
            rank = config.query_rank
            self.q_a_proj = linear_map(config, embed, rank, ("embed", None), bias=bias)
            self.q_a_layernorm = RMSNorm(rank, epsilon=_EPSILON)
            self.q_b_proj = linear_map(config, rank, width, ("embed", "heads"))
        joined = config.latent_rank + config.rotated_dim
        self.kv_a_proj_with_mqa = linear_map(config, embed, joined, ("embed", None), bias=bias)
        self.kv_a_layernorm = RMSNorm(config.latent_rank, epsilon=_EPSILON)
        expanded = config.num_heads * (config.head_dim - config.rotated_dim + config.value_dim)
        self.kv_b_proj = linear_map(config, config.latent_rank, expanded, ("embed", "heads"))
        values = config.num_heads * config.value_dim
        self.o_proj = linear_map(config, values, embed, ("heads", "embed"), bias=config.output_bias)

    @part("attention")
    def __call__(
        self, x: Hidden, around: Surroundings, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        """Returns attention's output [B, T, D], and the layer's updated cache if one is given."""
        latent, key = jnp.split(self.kv_a_proj_with_mqa(x), [self.config.latent_rank], axis=-1)
        latent, key = self.kv_a_layernorm(latent), self._rotated(key, around)
        if cache is not None:
            cache = cache.append(key[:, :, None], latent[:, :, None])
            keys, latents = cache.read(x.dtype)
            key, latent = keys[:, :, 0], latents[:, :, 0]
        out = around.attend(self._queries(x, around), *self._expanded(latent, key))
        return self.o_proj(out.reshape(*x.shape[:2], -1)), cache

    def _queries(self, x: Hidden, around: Surroundings) -> Queries:
        """Returns queries [B, T, N, 1, P + R], scaled."""
        config = self.config
        if config.query_rank is None:
            (query,) = Linear.each(x, self.q_proj)
        else:
            (query,) = Linear.each(self.q_a_layernorm(self.q_a_proj(x)), self.q_b_proj)
        query = query.reshape(*x.shape[:2], config.num_heads, 1, config.head_dim)
        plain, rotated = jnp.split(query, [config.head_dim - config.rotated_dim], axis=-1)
        scale = config.query_scale
        rotated = self._rotated(rotated, around, scale=scale)
        return jnp.concatenate([scaled(plain, scale), rotated], axis=-1)

    def _expanded(
        self,
        latent: Float[Array, "batch slots latent"],
        key: Float[Array, "batch slots rotated"],
    ) -> tuple[Keys, Values]:
        """Returns keys [B, S, N, P + R] and values [B, S, N, V]."""
        config = self.config
        plain_dim = config.head_dim - config.rotated_dim
        (both,) = Linear.each(latent, self.kv_b_proj)
        both = both.reshape(*latent.shape[:2], config.num_heads, plain_dim + config.value_dim)
        plain, values = jnp.split(both, [plain_dim], axis=-1)
        shared = jnp.broadcast_to(key[:, :, None], (*plain.shape[:3], config.rotated_dim))
        return jnp.concatenate([plain, shared], axis=-1), values

    def _rotated(
        self, x: Float[Array, "*batch rotated"], around: Surroundings, *, scale: float = 1.0
    ) -> Float[Array, "*batch rotated"]:
        if around.rotation is None:
            raise ValueError("a layer has no rotary embedding, but latent attention needs one")
        neighbors = self.config.neighbors_paired
        return rotate(x, *around.rotation, scale=scale, neighbors=neighbors)
