"""Decoders of the Llama family whose MLPs are mixtures of experts: Mixtral and Qwen3 MoE.

Sources: Jiang et al., 2024 (arXiv 2401.04088); Yang et al., 2025 (arXiv 2505.09388).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from peft_jax.models.experts import Routing, SparseMLP
from peft_jax.models.llama import Llama, LlamaBlock, LlamaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoELlamaConfig(LlamaConfig):
    """Architecture of a model with experts; `intermediate_size` is that of one expert.

    Attributes:
      routing: How tokens choose experts.
    """

    routing: Routing


def gated_silu(both: Float[Array, "rows both"]) -> Float[Array, "rows features"]:
    """Returns silu(gate) * up of the two halves."""
    gate, up = jnp.split(both, 2, axis=-1)
    return jax.nn.silu(gate) * up


class MoELlamaBlock(LlamaBlock):
    """A block of the Llama family with experts."""

    @staticmethod
    def make_mlp(config: Any) -> nnx.Module:
        """Returns the router and the experts."""
        return SparseMLP(config, config.routing, gate=gated_silu)


class MoELlama(Llama):
    """The decoder of Mixtral and Qwen3 MoE."""

    config: MoELlamaConfig
    block = MoELlamaBlock
