"""Decoder of gpt-oss: experts with clamped gates, and attention with sinks.

Every other layer attends within a sliding window. Each head has a sink, a score that takes part in
the softmax and belongs to no token, so that a head may attend to nothing.

Sources: OpenAI, 2025 (arXiv 2508.10925); Xiao et al., 2023 (arXiv 2309.17453).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from peft_jax.core.validation import check_positive
from peft_jax.models.attention_layout import Keys as AllKeys
from peft_jax.models.decoder import Surroundings
from peft_jax.models.decoder_parts import Queries
from peft_jax.models.experts import SparseMLP
from peft_jax.models.layers import parameter
from peft_jax.models.llama import Llama, LlamaAttention, LlamaBlock, LlamaConfig
from peft_jax.models.moe_llama import MoELlamaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClampedSwiGLU:
    """Returns (up + 1) gate σ(alpha gate), of gates and ups that are clamped.

    The inputs alternate: gate, up, gate, up, ….

    Attributes:
      alpha: Slope of the sigmoid.
      limit: Largest gate, and largest magnitude of up.

    Example:
      >>> ClampedSwiGLU(alpha=1.0, limit=2.0)(jnp.array([[0.0, 5.0, 9.0, -9.0]])).tolist()
      [[0.0, -1.7615940570831299]]
    """

    alpha: float
    limit: float

    def __post_init__(self) -> None:
        check_positive("swiglu_alpha", self.alpha)
        check_positive("swiglu_limit", self.limit)

    def __call__(self, both: Float[Array, "rows both"]) -> Float[Array, "rows features"]:
        """Returns one output for each pair of a gate and an up."""
        gate = jnp.minimum(both[..., ::2], self.limit)
        up = jnp.clip(both[..., 1::2], -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssConfig(MoELlamaConfig):
    """Architecture of a gpt-oss model; `intermediate_size` is that of one expert.

    Attributes:
      gate: Nonlinearity of the experts.
    """

    gate: ClampedSwiGLU


class SinkAttention(LlamaAttention):
    """Attention with a sink for each head."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.sinks = parameter((config.num_heads,), ("heads",))

    def attend(self, around: Surroundings, query: Queries, key: AllKeys, value: AllKeys) -> Queries:
        """Returns attention's output of each head, to all keys of the cache if there is one."""
        sinks = self.sinks.get_value().reshape(query.shape[2:4]).astype(jnp.float32)
        return around.attend(query, key, value, sinks)


class GptOssBlock(LlamaBlock):
    """A block of gpt-oss."""

    attention = SinkAttention

    @staticmethod
    def make_mlp(config: Any) -> nnx.Module:
        """Returns the router and the experts."""
        return SparseMLP(config, config.routing, gate=config.gate, bias=True, router_name="router")


class GptOss(Llama):
    """The decoder of gpt-oss."""

    config: GptOssConfig
    block = GptOssBlock
