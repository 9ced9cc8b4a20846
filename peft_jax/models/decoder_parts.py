"""Parts of decoder blocks: grouped-query attention and MLPs.

Axes: B batch, T tokens, D embed, K key-value heads, G query heads per key-value head, H head
dimension, F mlp.
"""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from peft_jax.core.scopes import part
from peft_jax.models.attention_layout import Keys as AllKeys
from peft_jax.models.cache import LayerCache
from peft_jax.models.decoder import DecoderConfig, Hidden, Surroundings, scaled
from peft_jax.models.layers import Linear, recomputed
from peft_jax.models.rope import rotate

Queries = Float[Array, "batch tokens kv_heads group head_dim"]
Keys = Float[Array, "batch tokens kv_heads head_dim"]
Activation = Callable[[jax.Array], jax.Array]


def linear_map(
    config: DecoderConfig,
    d_in: int,
    d_out: int,
    axes: tuple[str, str | None],
    *,
    bias: bool = False,
) -> Linear:
    """Returns a linear map with the configuration's initial standard deviation."""
    return Linear(d_in, d_out, axes=axes, bias=bias, stddev=config.initializer_range)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions (Ainslie et al., 2023, arXiv 2305.13245).

    A subclass may norm the queries and keys, or compute them by one fused map, in `project`, or
    norm them after the rotation in `place`. It may give sinks to attention in `attend`, rotate
    neighboring features, and rename the output map.

    Args:
      config: Architecture.
      bias: Whether queries, keys and values have biases.
      output_bias: Whether the output map has a bias.
    """

    output_name = "o_proj"
    rotates_neighbors = False

    def __init__(self, config: DecoderConfig, *, bias: bool = False, output_bias: bool = False):
        self.config = config
        embed, width = config.hidden_size, config.num_heads * config.head_dim
        self.make_projections(config, bias=bias)
        output = linear_map(config, width, embed, ("heads", "embed"), bias=output_bias)
        setattr(self, self.output_name, output)

    def make_projections(self, config: DecoderConfig, *, bias: bool) -> None:
        """Makes the maps of `project`."""
        embed = config.hidden_size
        width, kv_width = (
            heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads)
        )
        self.q_proj = linear_map(config, embed, width, ("embed", "heads"), bias=bias)
        self.k_proj = linear_map(config, embed, kv_width, ("embed", "kv_heads"), bias=bias)
        self.v_proj = linear_map(config, embed, kv_width, ("embed", "kv_heads"), bias=bias)

    def project(self, x: Hidden) -> tuple[Queries, Keys, Keys]:
        """Returns queries, keys and values, before the rotation."""
        return self.split_heads(*Linear.each(x, self.q_proj, self.k_proj, self.v_proj))

    def split_heads(
        self,
        query: Float[Array, "batch tokens width"],
        key: Float[Array, "batch tokens kv_width"],
        value: Float[Array, "batch tokens kv_width"],
    ) -> tuple[Queries, Keys, Keys]:
        """Gives heads axes of their own."""
        config, leading = self.config, query.shape[:2]
        group = config.num_heads // config.num_kv_heads
        return (
            query.reshape(*leading, config.num_kv_heads, group, config.head_dim),
            key.reshape(*leading, config.num_kv_heads, config.head_dim),
            value.reshape(*leading, config.num_kv_heads, config.head_dim),
        )

    def place(self, query: Queries, key: Keys, around: Surroundings) -> tuple[Queries, Keys]:
        """Returns the scaled queries and the keys, rotated if the layer has a rotation."""
        scale = self.config.query_scale
        if around.rotation is None:
            return scaled(query, scale), key
        neighbors = self.rotates_neighbors
        query = rotate(query, *around.rotation, scale=scale, neighbors=neighbors)
        return query, rotate(key, *around.rotation, neighbors=neighbors)

    def attend(self, around: Surroundings, query: Queries, key: AllKeys, value: AllKeys) -> Queries:
        """Returns attention's output of each head, to all keys of the cache if there is one."""
        return around.attend(query, key, value)

    def through_cache(
        self, cache: LayerCache, key: Keys, value: Keys
    ) -> tuple[LayerCache, AllKeys, AllKeys]:
        """Returns the cache with a layer's next keys and values, and all that it holds."""
        cache = cache.append(key, value)
        return cache, *cache.read(key.dtype)

    @part("attention")
    def __call__(
        self, x: Hidden, around: Surroundings, cache: LayerCache | None
    ) -> tuple[Hidden, LayerCache | None]:
        """Returns attention's output [B, T, D], and the layer's updated cache if one is given."""
        query, key, value = self.project(x)
        query, key = self.place(query, key, around)
        if around.temperature is not None:
            query = (query * around.temperature[:, :, None, None, None]).astype(x.dtype)
        if cache is not None:
            cache, key, value = self.through_cache(cache, key, value)
        out = self.attend(around, query, key, value)
        return getattr(self, self.output_name)(out.reshape(*x.shape[:2], -1)), cache


class GatedMLP(nnx.Module):
    """The gated MLP down(activation(gate(x)) * up(x)) (Shazeer, 2020, arXiv 2002.05202).

    Args:
      config: Architecture.
      features: F; None for `intermediate_size`.
      activation: Nonlinearity of the gate.
      bias: Whether the three maps have biases.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        features: int | None = None,
        activation: Activation = jax.nn.silu,
        bias: bool = False,
    ):
        embed, mlp = config.hidden_size, features or config.intermediate_size
        self.activation = activation
        self.gate_proj = linear_map(config, embed, mlp, ("embed", "mlp"), bias=bias)
        self.up_proj = linear_map(config, embed, mlp, ("embed", "mlp"), bias=bias)
        self.down_proj = linear_map(config, mlp, embed, ("mlp", "embed"), bias=bias)

    @part("mlp")
    def __call__(self, x: Hidden) -> Hidden:
        """Returns the MLP's output, [B, T, D]."""
        gated = recomputed(lambda gate, up: self.activation(gate) * up)
        return self.down_proj(gated(*Linear.each(x, self.gate_proj, self.up_proj)))


class MLP(nnx.Module):
    """An MLP of two maps with biases and a nonlinearity between them.

    Args:
      config: Architecture.
      names: Names of the maps.
      activation: Nonlinearity.
    """

    def __init__(self, config: DecoderConfig, names: tuple[str, str], *, activation: Activation):
        embed, mlp = config.hidden_size, config.intermediate_size
        self.names, self.activation = names, activation
        first = linear_map(config, embed, mlp, ("embed", "mlp"), bias=True)
        second = linear_map(config, mlp, embed, ("mlp", "embed"), bias=True)
        for name, one in zip(names, (first, second), strict=True):
            setattr(self, name, one)

    @part("mlp")
    def __call__(self, x: Hidden) -> Hidden:
        """Returns the MLP's output, [B, T, D]."""
        first, second = (getattr(self, name) for name in self.names)
        (hidden,) = Linear.each(x, first)
        return second(recomputed(self.activation)(hidden))
