"""Decoder of Llama 4: chunked attention, layers without positions, and experts beside a shared one.

Most layers attend within chunks of a text, with rotary positions, and norm queries and keys by
their root mean square. The others attend to everything, without positions, and multiply queries by
a temperature that grows with the position. A token's experts get their inputs times the sigmoid of
the router's logits, and their outputs are added to those of an expert that all tokens share. Layers
may have an MLP instead.

Source: Meta, 2025, the Llama 4 release; Yang et al., 2025 (arXiv 2501.18795).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from peft_jax.models.decoder import Hidden, Surroundings, scaled
from peft_jax.models.decoder_parts import GatedMLP, Keys, Queries
from peft_jax.models.experts import Routing, SparseMLP
from peft_jax.models.layers import unit_rms
from peft_jax.models.llama import Llama, LlamaAttention, LlamaBlock
from peft_jax.models.moe_llama import DENSE, EXPERTS, MoELlamaConfig, gated_silu
from peft_jax.models.rope import rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmoidRouting(Routing):
    """Chooses experts by the largest logits, whose sigmoids multiply the inputs."""

    normalized: bool = False
    weighs_inputs: ClassVar[bool] = True

    def __call__(
        self, logits: Float[Array, "*tokens experts"]
    ) -> tuple[Float32[Array, "*tokens chosen"], Int[Array, "*tokens chosen"]]:
        """Returns the weights and the numbers of each token's experts, largest weight first.

        Example:
          >>> routing = SigmoidRouting(num_experts=3, experts_per_token=1)
          >>> weights, chosen = routing(jnp.arange(3.0))
          >>> round(weights[0].item(), 3), chosen.tolist()
          (0.881, [2])
        """
        largest, chosen = jax.lax.top_k(logits.astype(jnp.float32), self.experts_per_token)
        return jax.nn.sigmoid(largest), chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama4Config(MoELlamaConfig):
    """Architecture of a Llama 4 model; see `MoELlamaConfig` for the other attributes.

    Attributes:
      unit_qk: Whether rotated queries and keys are divided by their root mean square.
    """

    routing: SigmoidRouting
    unit_qk: bool


class Llama4Attention(LlamaAttention):
    """Attention that may norm rotated queries and keys, without a scale."""

    config: Llama4Config
    rotates_neighbors = True

    def place(self, query: Queries, key: Keys, around: Surroundings) -> tuple[Queries, Keys]:
        """Returns the scaled queries and the keys, rotated and normed if the layer rotates."""
        if around.rotation is None or not self.config.unit_qk:
            return super().place(query, key, around)
        query, key = (
            unit_rms(rotate(x, *around.rotation, neighbors=True), self.config.norm_epsilon)
            for x in (query, key)
        )
        return scaled(query, self.config.query_scale), key


class Llama4SparseMLP(SparseMLP):
    """A router and its experts, and an expert that all tokens share."""

    def __init__(self, config: Llama4Config):
        features = config.expert_size
        super().__init__(
            config, config.routing, features=features, gate=gated_silu, router_name="router"
        )
        self.shared_expert = GatedMLP(config, features=features)

    def __call__(self, x: Hidden) -> Hidden:
        """Returns the sum of each token's experts and the shared one, [B, T, D]."""
        return super().__call__(x) + self.shared_expert(x)


class Llama4DenseBlock(LlamaBlock):
    """A block of Llama 4 with an MLP."""

    attention = Llama4Attention
    mlp_name = "feed_forward"


class Llama4Block(Llama4DenseBlock):
    """A block of Llama 4 with experts."""

    @staticmethod
    def make_mlp(config: Any) -> nnx.Module:
        """Returns the router and the experts."""
        return Llama4SparseMLP(config)


class Llama4(Llama):
    """The decoder of Llama 4."""

    config: Llama4Config
    forms: ClassVar[Mapping[str, type[Any]]] = {DENSE: Llama4DenseBlock, EXPERTS: Llama4Block}
